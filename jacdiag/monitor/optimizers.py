"""Which optimizers a user passed, what of them is supported, and what is read from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from jacdiag.errors import UsageError
from jacdiag.sources.module_wrappers import plain_name, unwrap
from jacdiag.sources.python_source import check_module

_FOREIGN = {
    "deepspeed": (
        "DeepSpeed's optimisers keep flat partitions of the weights and step on copies of them"
    ),
    "megatron": "Megatron's optimiser classes step on master weights of their own",
    "colossalai": "ColossalAI's optimisers step on flat partitions",
}
_PLAIN_WAY = "pass the torch.optim optimizer that steps, or any object with step() and param_groups"
_FORWARDING = ("accelerate", "lightning", "pytorch_lightning", "lightning_fabric", "transformers")


@dataclass(frozen=True)
class OptimizerTree:
    """The optimizers in what a user passed.

    Attributes:
        leaves: those that update parameters themselves, in the user's order.
        shells: wrappers and containers of others, which may move the weights as well, such as
            Lookahead.
        inner: id of a leaf that holds other optimizers -> ids of the parameters that those update.
    """

    leaves: list[Any] = field(default_factory=list)
    shells: list[Any] = field(default_factory=list)
    inner: dict[int, set[int]] = field(default_factory=dict)

    def own_parameters(self, leaf: Any) -> list[Tensor]:
        """Return the parameters that a leaf updates itself."""
        inner = self.inner.get(id(leaf), set())
        return [p for p in held_parameters(leaf) if id(p) not in inner]


def optimisers_of(given: Any) -> list[Any]:
    """Return the optimizers that update parameters in what a user passed: one, several, a wrapper
    or a container.

    Raises:
        UsageError: there is none, or it is of a kind that is not supported; the message names it.
    """
    return optimizer_tree(given).leaves


def optimizer_tree(given: Any) -> OptimizerTree:
    """Find the optimizers in what a user passed.

    Args:
        given: an optimizer, a list, tuple, set or dict of them, a wrapper around them, or a
            container of them. An optimizer needs no torch class: `param_groups` and `step` are
            enough.

    Raises:
        UsageError: there is none, or it is of a kind that is not supported; the message names it.
    """
    tree = OptimizerTree()
    _collect(given, tree, set())
    if not tree.leaves:
        raise UsageError(
            "optimizer holds no torch.optim optimiser",
            got=f"a {type(given).__name__}",
            hint=_PLAIN_WAY,
        )
    return tree


def _collect(given: Any, tree: OptimizerTree, seen: set[int]) -> None:
    if id(given) in seen:
        return
    seen.add(id(given))
    _refuse_foreign(given)
    known = len(tree.leaves)
    for child in _children(given):
        _collect(child, tree, seen)
    if not _steps_parameters(given):
        return
    inner = {id(p) for leaf in tree.leaves[known:] for p in held_parameters(leaf)}
    if not {id(p) for p in held_parameters(given)} <= inner:
        tree.leaves.append(given)  # such as ZeroRedundancyOptimizer, whose inner one holds a part
        if inner:
            tree.inner[id(given)] = inner
    elif type(given).__module__.split(".")[0] not in _FORWARDING:
        tree.shells.append(given)


def _refuse_foreign(given: Any) -> None:
    for cls in type(given).__mro__:
        why = _FOREIGN.get(cls.__module__.split(".")[0])
        if why is not None:
            raise UsageError(f"{type(given).__name__} is not supported", got=why, hint=_PLAIN_WAY)
    if type(given).__name__ == "OptimizersInBackwardContainer":
        raise UsageError(
            "an optimiser that steps inside the backward is not supported",
            got=type(given).__name__,
            hint="there is no moment at which all gradients are there; switch it off",
        )


def _children(given: Any) -> list[Any]:
    """The optimizers inside an object: members of a collection, or what its attributes hold."""
    if isinstance(given, dict):
        return list(given.values())
    if isinstance(given, list | tuple | set):
        return list(given)
    if isinstance(given, nn.Module):
        return []
    # 1. The names that trainers and containers use; what they hold is looked into whatever it is.
    children: list[Any] = []
    several = getattr(given, "optimizers", None)
    if isinstance(several, dict):
        several = list(several.values())
    if isinstance(several, list | tuple):
        children.extend(several)
    inner = getattr(given, "optimizer", None)
    if inner is not None and inner is not given:
        children.append(inner)
    # 2. Any other attribute that holds an optimizer, or a list or dict of them.
    for name, value in list(getattr(given, "__dict__", {}).items()):
        if name in ("param_groups", "state", "defaults", "optimizer", "optimizers"):
            continue
        members = value.values() if isinstance(value, dict) else value
        if isinstance(value, list | tuple | dict):
            children.extend(member for member in members if _steps_parameters(member))
        elif _steps_parameters(value):
            children.append(value)
    return [child for child in children if child is not given]


def _steps_parameters(value: Any) -> bool:
    """Whether an object is an optimizer as a training loop needs it: parameter groups and a
    step.
    """
    if isinstance(value, type | nn.Module | Tensor):
        return False
    try:
        groups, step = getattr(value, "param_groups", None), getattr(value, "step", None)
    except Exception:  # a property of somebody else's object
        return False
    if not callable(step) or not isinstance(groups, list | tuple) or not groups:
        return False
    return all(isinstance(group, dict) and "params" in group for group in groups)


def check_supported(model: Any) -> None:
    """Raises UsageError for what a watch cannot see into: named, instead of figures that stay empty
    in silence.
    """
    if isinstance(model, list | tuple) or type(model).__module__.startswith(
        "torch.distributed.pipelining"
    ):
        raise UsageError(
            "pipeline stages are not supported",
            got=f"a {type(model).__name__}",
            hint="watch takes one nn.Module that holds the whole model",
        )
    check_module(model, "jacdiag.watch")
    for cls in type(model).__mro__:
        why = _FOREIGN.get(cls.__module__.split(".")[0])
        if why is not None and cls.__name__.endswith("Engine"):
            raise UsageError(
                f"{type(model).__name__} is not supported", got=why, hint="watch the module itself"
            )
    for part in model.modules():
        handle: Any = getattr(part, "_handle", None)
        if getattr(handle, "flat_param", None) is not None:
            raise UsageError(
                "FullyShardedDataParallel (FSDP1) is not supported: its parameters are flat shards",
                hint="fully_shard (FSDP2) is",
            )
    for name, p in model.named_parameters():
        if getattr(p, "_in_backward_optimizers", None):
            raise UsageError(
                "an optimiser that steps inside the backward is not supported",
                got=f"on '{name}'",
                hint="there is no moment at which all gradients are there; switch it off",
            )


def names_of(model: nn.Module) -> dict[int, str]:
    """Maps id of a parameter -> its plain name, inside all wrappers; the first name of a tie."""
    found: dict[int, str] = {}
    for name, p in unwrap(model).named_parameters(remove_duplicate=False):
        found.setdefault(id(p), plain_name(name))
    return found


def parameters_of(optimisers: list[Any]) -> list[Tensor]:
    """All parameters of optimisers, each once."""
    every = {id(p): p for o in optimisers for group in o.param_groups for p in group["params"]}
    return list(every.values())


def check_belongs(optimisers: list[Any], names: dict[int, str]) -> list[str]:
    """Raises UsageError for optimisers without a parameter of the model; returns names of those
    that none holds.
    """
    held = {id(p) for p in parameters_of(optimisers)}
    if not held & names.keys():
        raise UsageError(
            "the optimizer holds none of the model's parameters",
            got=f"{len(held)} parameters in the optimizer, {len(names)} in the model",
            hint=(
                "build the optimizer after the model was moved, wrapped or sharded, and pass "
                "that very model"
            ),
        )
    return [name for key, name in names.items() if key not in held]


def scaling(optimiser: Any) -> tuple[Tensor | None, Tensor | None]:
    """(scale, found_inf) of a fused optimiser inside GradScaler.step: it is given scaled gradients
    and unscales them.

    Others are stepped with gradients that the scaler has unscaled, and not at all where one of them
    is inf.
    """
    scale, inf = getattr(optimiser, "grad_scale", None), getattr(optimiser, "found_inf", None)
    return (scale if isinstance(scale, Tensor) else None), (
        inf if isinstance(inf, Tensor) else None
    )


def learning_rates(optimizer: Any) -> list[float | Tensor | None]:
    """Return the learning rate of each parameter group: a number, or a copy on the device where it
    lies there.
    """
    rates: list[float | Tensor | None] = []
    for group in optimizer.param_groups:
        rate = group.get("lr")
        if isinstance(rate, Tensor):
            rates.append(float(rate) if rate.device.type == "cpu" else rate.detach().clone())
        else:
            rates.append(None if rate is None else float(rate))
    return rates


def group_names(optimizers: Sequence[Any]) -> list[str]:
    """Return a name for each parameter group of some optimizers, such as "AdamW 0", or the name the
    group has.
    """
    kinds = [type(optimizer).__name__ for optimizer in optimizers]
    names: list[str] = []
    for place, (optimizer, kind) in enumerate(zip(optimizers, kinds, strict=True)):
        unique = kind if kinds.count(kind) == 1 else f"{kind} ({place})"
        for number, group in enumerate(optimizer.param_groups):
            given = group.get("name")
            names.append(f"{unique} {given if isinstance(given, str) else number}")
    return names


def held_parameters(optimizer: Any) -> list[Tensor]:
    """Return the parameters of an optimizer, as its groups hold them now."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank; a plain tensor is that itself."""
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local is not None else tensor


def copies(tensor: Tensor, world: int) -> float:
    """How many ranks hold the very piece of a tensor that this one holds: a sum over ranks counts
    it so often.
    """
    placements = getattr(tensor, "placements", None)
    if placements is None or not torch.distributed.is_initialized():
        return float(world)
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    pieces = 1
    for dim, placement in enumerate(placements):
        pieces *= 1 if placement.is_replicate() else mesh.size(dim)
    return world / pieces
