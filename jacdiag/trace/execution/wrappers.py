"""What libraries do to a module and its weights: shards, weights kept elsewhere, hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from jacdiag.errors import TraceError
from jacdiag.sources.offloaded_weights import moves_weights, placeholders_of


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before FSDP2 (`fully_shard`) put its own in front."""
    # 1. Its own class, if FSDP2 did not change it.
    cls = type(module)
    names = {base.__name__ for base in cls.__mro__}
    if "FSDPModule" not in names:
        return cls

    # 2. The first of its bases that is a module by itself.
    bases = cls.__mro__[1:]
    return next(base for base in bases if issubclass(base, nn.Module))


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
    offloaded = placeholders_of(module)
    weights: dict[int, Tensor] = dict(_GATHERED.get())

    # 2. The others. A model of which all parameters are on the meta device is looked at by
    # structure alone.
    valueless = all(parameter.is_meta for parameter in module.parameters())
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        key = id(tensor)
        if key in weights:
            continue

        # 3. A shard is gathered, a placeholder has its weight elsewhere.
        gather = getattr(tensor.detach(), "full_tensor", None)
        if gather is not None:
            weights[key] = gather()
        elif key in offloaded:
            weights[key] = offloaded[key].read()
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
        # Python runs its code.
        if not isinstance(part, torch.jit.ScriptModule):
            continue

        # The model itself has no name.
        if not name:
            name = type(module).__name__
        raise TraceError(
            f"'{name}' is a scripted module: its code is no Python any more",
            hint="pass the Python module that it was scripted from, or run with PYTORCH_JIT=0",
        )


def refuse_flat_shards(module: nn.Module) -> None:
    """Raise if FSDP1 has sharded the weights.

    It keeps a slice of a flat tensor per process, so that nothing can be run outside its context.
    """
    for part in module.modules():
        # 1. A module that FSDP1 wraps, with weights that may be sharded.
        handle: Any = getattr(part, "_handle", None)
        flat = getattr(handle, "flat_param", None)
        if flat is None or not handle.uses_sharded_strategy:
            continue

        # 2. Inside summon_full_params they are whole.
        if handle.is_sharded(flat):
            raise TraceError(
                "the weights are sharded by FullyShardedDataParallel: this process holds a slice "
                "of them",
                hint="call jacdiag on every process inside `with "
                "FullyShardedDataParallel.summon_full_params(model):`, "
                "or use fully_shard (FSDP2), whose weights are gathered by themselves",
            )


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
        is_sharded = original_class(part) is not type(part)
        if is_sharded:
            continue

        # Hooks, and a forward that replaces that of its class.
        if _has_hooks(part) or _has_replaced_forward(part):
            return True
    return False


def _has_hooks(module: nn.Module) -> bool:
    """Return whether a module has forward hooks that are not its own code."""
    # 1. Hooks after the forward. Torch's own code has none.
    if module._forward_hooks:
        return True

    # 2. Hooks before it, some of which compute a weight.
    pre_hooks = module._forward_pre_hooks.values()
    return not all(is_code(hook) for hook in pre_hooks)


def _has_replaced_forward(module: nn.Module) -> bool:
    """Return whether a module runs another forward than its class, for another reason than weights.

    Accelerate's own forward brings the weights in and calls the module's.
    """
    return "forward" in module.__dict__ and not moves_weights(module)
