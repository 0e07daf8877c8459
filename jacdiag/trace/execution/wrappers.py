"""What libraries do to a module and its weights: shards, weights kept elsewhere, hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from jacdiag.errors import TraceError


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before FSDP2 (`fully_shard`) put its own in front."""
    cls = type(module)
    if not any(base.__name__ == "FSDPModule" for base in cls.__mro__):
        return cls
    return next(base for base in cls.__mro__[1:] if issubclass(base, nn.Module))


_GATHERED: ContextVar[Mapping[int, Tensor]] = ContextVar("gathered", default={})  # noqa: B039 - never written to


@contextmanager
def gathered(weights: Mapping[int, Tensor]) -> Iterator[None]:
    """Use these weights, by id of the shard, so that none is gathered or read again."""
    token = _GATHERED.set(weights)
    try:
        yield
    finally:
        _GATHERED.reset(token)


def whole_weights(module: nn.Module) -> dict[int, Tensor]:
    """Return the full weight of every parameter that is a shard or a placeholder, by its id.

    Shards of FSDP2 and tensor parallel are gathered, so every process of the group has to make the
    call. Weights that accelerate keeps on the CPU or on disk are read from there.

    Raises:
        TraceError: a weight is not here and cannot be gathered.
    """
    # 1. Weights that are known already, and those that accelerate keeps elsewhere.
    _refuse_scripted_modules(module)
    offloaded: dict[int, Tensor] = {}
    for part in module.modules():
        for placeholder, weight in _offloaded(part):
            offloaded[id(placeholder)] = weight
    weights: dict[int, Tensor] = dict(_GATHERED.get())

    # 2. The others. A model of which all parameters are on the meta device is looked at by
    # structure alone.
    valueless = all(parameter.is_meta for parameter in module.parameters())
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if id(tensor) in weights:
            continue
        gather = getattr(tensor.detach(), "full_tensor", None)
        if gather is not None:
            weights[id(tensor)] = gather()
        elif id(tensor) in offloaded:
            weights[id(tensor)] = offloaded[id(tensor)]
        elif tensor.is_meta and not valueless:
            raise TraceError(
                f"parameter '{name}' is on the meta device: it has a shape and no values",
                hint=(
                    "load the weights first; a model offloaded by another library must be "
                    "brought back to one device"
                ),
            )
    return weights


def _refuse_scripted_modules(module: nn.Module) -> None:
    """Raise if a module is scripted, since its code cannot be recorded."""
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise TraceError(
                f"'{name or type(module).__name__}' is a scripted module: its code is no Python "
                "any more",
                hint="pass the Python module that it was scripted from, or run with PYTORCH_JIT=0",
            )


def refuse_flat_shards(module: nn.Module) -> None:
    """Raise if FSDP1 has sharded the weights.

    It keeps a slice of a flat tensor per process, so that nothing can be run outside its context.
    """
    for part in module.modules():
        handle: Any = getattr(part, "_handle", None)
        flat = getattr(handle, "flat_param", None)
        if flat is None or not handle.uses_sharded_strategy:
            continue
        if handle.is_sharded(flat):
            raise TraceError(
                "the weights are sharded by FullyShardedDataParallel: this process holds a slice "
                "of them",
                hint="call jacdiag on every process inside `with "
                "FullyShardedDataParallel.summon_full_params(model):`, "
                "or use fully_shard (FSDP2), whose weights are gathered by themselves",
            )


def _hooks_of_accelerate(module: nn.Module) -> Iterator[Any]:
    """Yield accelerate's hooks on a module, one by one where it has put several in sequence."""
    hook = module.__dict__.get("_hf_hook")
    if hook is not None:
        yield from getattr(hook, "hooks", [hook])


def _offloaded(module: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the placeholders of a module's own weights, each with the weight."""
    named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    placeholders = [(name, tensor) for name, tensor in named if tensor.is_meta]
    for hook in _hooks_of_accelerate(module):
        weights = getattr(hook, "weights_map", None)
        if weights is None or not getattr(hook, "offload", False):
            continue
        for name, placeholder in placeholders:
            yield placeholder, weights[name]


def moves_weights(module: nn.Module) -> bool:
    """Return whether accelerate's hook brings a module's weights in for each call.

    A copy has them in place anyway.
    """
    return any(getattr(hook, "offload", False) for hook in _hooks_of_accelerate(module))


def skipped_attributes(module: nn.Module) -> set[str]:
    """Return the attributes that a copy does without: those that move weights."""
    if not moves_weights(module):
        return set()

    # The forward that the hook put in place is skipped too, unless it replaced another one.
    replaced = getattr(module.__dict__.get("_old_forward"), "__func__", None)
    if replaced is type(module).forward:
        return {"_hf_hook", "_old_forward", "forward"}
    return {"_hf_hook"}


def is_code(hook: Any) -> bool:
    """Return whether a forward pre-hook is part of the module's own code.

    That is so for torch's weight_norm, spectral_norm and pruning.
    """
    return type(hook).__module__.startswith("torch.nn.utils")


def has_foreign_hooks(module: nn.Module) -> bool:
    """Return whether a model has hooks or a replaced forward that are not its own code.

    A copy without them may compute something else.
    """
    for part in module.modules():
        # FSDP2's own hooks gather weights, and a run of one process alone would wait for ever.
        if original_class(part) is not type(part):
            continue

        # The model's own hooks, and a forward that replaces that of its class.
        pre_hooks = part._forward_pre_hooks.values()
        if part._forward_hooks or not all(is_code(hook) for hook in pre_hooks):
            return True
        if "forward" in part.__dict__ and not moves_weights(part):
            return True
    return False
