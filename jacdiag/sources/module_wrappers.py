"""Wrappers around a module (DDP, compile, FSDP, Fabric), and what they add to weight names."""

from __future__ import annotations

import torch
from torch import nn

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside wrappers: compile, FSDP, checkpointing, Fabric, DDP."""
    while True:
        inner = _inner(module)
        if inner is None:
            return module
        # there may be one more wrapper
        module = inner


def _inner(module: nn.Module) -> nn.Module | None:
    """Return the module inside the outermost wrapper; None if there is no wrapper."""
    # Its dict of modules is another one.
    if isinstance(module, torch.jit.ScriptModule):
        return None
    for attribute in WRAPPERS:
        inner = module._modules.get(attribute)
        if inner is not None:
            return inner
    # The name of these wrappers' attribute is one that models use too.
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return module.module
    return None


def plain_name(name: str) -> str:
    """Return a parameter's name without what wrappers leave in it.

    Args:
        name: of a parameter, with dots in it.

    Example:
        >>> plain_name("_orig_mod.layers.0._fsdp_wrapped_module.weight")
        'layers.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
