"""Wrappers around a module (DDP, compile, FSDP, Fabric), and what they add to weight names."""

from __future__ import annotations

import torch
from torch import nn

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside wrappers: compile, FSDP, checkpointing, Fabric, DDP."""
    while not isinstance(module, torch.jit.ScriptModule):  # its dict of modules is another
        inner = next(
            (module._modules[a] for a in WRAPPERS if module._modules.get(a) is not None), None
        )
        if inner is None and isinstance(
            module, (nn.DataParallel, nn.parallel.DistributedDataParallel)
        ):
            inner = module.module
        if inner is None:
            return module
        module = inner
    return module


def plain_name(name: str) -> str:
    """Strips what wrappers leave in parameter names.

    >>> plain_name("_orig_mod.layers.0._fsdp_wrapped_module.weight")
    'layers.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
