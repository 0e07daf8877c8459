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
        "DeepSpeed's optimizers keep flat partitions of the weights and step on copies of them"
    ),
    "megatron": "Megatron's optimizer classes step on master weights of their own",
    "colossalai": "ColossalAI's optimizers step on flat partitions",
}
_PLAIN_WAY = "pass the torch.optim optimizer that steps, or any object with step() and param_groups"
_KNOWN_ATTRIBUTES = ("param_groups", "state", "defaults", "optimizer", "optimizers")
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
    """Return the optimizers that update parameters in what a user passed.

    Args:
        given: as for `optimizer_tree`.

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
            "optimizer holds no torch.optim optimizer",
            got=f"a {type(given).__name__}",
            hint=_PLAIN_WAY,
        )
    return tree


def _collect(candidate: Any, tree: OptimizerTree, visited: set[int]) -> None:
    """Add an object to the tree if it is an optimizer, after all optimizers inside it."""
    if id(candidate) in visited:
        return
    visited.add(id(candidate))
    _refuse_foreign(candidate)

    # 1. The optimizers inside.
    count = len(tree.leaves)
    for child in _children(candidate):
        _collect(child, tree, visited)
    if not _steps_parameters(candidate):
        return
    inner = {id(p) for leaf in tree.leaves[count:] for p in held_parameters(leaf)}
    own = {id(p) for p in held_parameters(candidate)}

    # 2. One with parameters that none inside holds is a leaf, such as ZeroRedundancyOptimizer.
    if not own <= inner:
        tree.leaves.append(candidate)
        if inner:
            tree.inner[id(candidate)] = inner
        return

    # 3. A wrapper. Those that only forward the call move no weights themselves.
    library = type(candidate).__module__.split(".")[0]
    if library not in _FORWARDING:
        tree.shells.append(candidate)


def _refuse_foreign(candidate: Any) -> None:
    """Raise UsageError if the class of an optimizer is of a kind that is not supported."""
    kind = type(candidate).__name__
    for cls in type(candidate).__mro__:
        reason = _FOREIGN.get(cls.__module__.split(".")[0])
        if reason is not None:
            raise UsageError(f"{kind} is not supported", got=reason, hint=_PLAIN_WAY)
    if kind == "OptimizersInBackwardContainer":
        raise UsageError(
            "an optimizer that steps inside the backward is not supported",
            got=kind,
            hint="there is no moment at which all gradients are there; switch it off",
        )


def _children(candidate: Any) -> list[Any]:
    """Return what may be an optimizer inside a collection or an object."""
    # 1. A collection of optimizers.
    if isinstance(candidate, dict):
        return list(candidate.values())
    if isinstance(candidate, list | tuple | set):
        return list(candidate)

    # 2. An object. What a module holds is not its optimizer.
    if isinstance(candidate, nn.Module):
        return []
    children = [*_children_by_name(candidate), *_children_in_attributes(candidate)]
    return [child for child in children if child is not candidate]


def _children_by_name(candidate: Any) -> list[Any]:
    """Return what lies under the names that trainers and containers use, whatever it is."""
    children: list[Any] = []
    # 1. Several of them.
    several = getattr(candidate, "optimizers", None)
    if isinstance(several, dict):
        several = list(several.values())
    if isinstance(several, list | tuple):
        children.extend(several)

    # 2. One of them.
    single = getattr(candidate, "optimizer", None)
    if single is not None:
        children.append(single)
    return children


def _children_in_attributes(candidate: Any) -> list[Any]:
    """Return the optimizers that any other attribute holds, also in a list or a dict."""
    children: list[Any] = []
    for name, value in list(getattr(candidate, "__dict__", {}).items()):
        if name in _KNOWN_ATTRIBUTES:
            continue
        # Look into a container, but not into containers inside of it.
        members = [value]
        if isinstance(value, dict):
            members = list(value.values())
        elif isinstance(value, list | tuple):
            members = list(value)
        children.extend(member for member in members if _steps_parameters(member))
    return children


def _steps_parameters(value: Any) -> bool:
    """Return whether an object has what a training loop needs: parameter groups and a step."""
    # 1. Read what it has.
    if isinstance(value, type | nn.Module | Tensor):
        return False
    try:
        groups = getattr(value, "param_groups", None)
        step = getattr(value, "step", None)
    except Exception:  # a property of somebody else's object
        return False

    # 2. A step, and groups of parameters.
    if not callable(step):
        return False
    if not isinstance(groups, list | tuple):
        return False
    have_parameters = [isinstance(group, dict) and "params" in group for group in groups]
    return len(have_parameters) > 0 and all(have_parameters)


def check_supported(model: Any) -> None:
    """Raise UsageError if a watch cannot see into the model.

    The message names the reason. Without this check the log would stay empty.
    """
    # 1. Something other than one module.
    is_stage = type(model).__module__.startswith("torch.distributed.pipelining")
    if is_stage or isinstance(model, list | tuple):
        raise UsageError(
            "pipeline stages are not supported",
            got=f"a {type(model).__name__}",
            hint="watch takes one nn.Module that holds the whole model",
        )
    check_module(model, "jacdiag.watch")

    # 2. The engine of a library with optimizers of its own.
    for cls in type(model).__mro__:
        reason = _FOREIGN.get(cls.__module__.split(".")[0])
        if reason is not None and cls.__name__.endswith("Engine"):
            raise UsageError(
                f"{type(model).__name__} is not supported",
                got=reason,
                hint="watch the module itself",
            )

    # 3. Flat shards.
    for module in model.modules():
        handle: Any = getattr(module, "_handle", None)
        if getattr(handle, "flat_param", None) is not None:
            raise UsageError(
                "FullyShardedDataParallel (FSDP1) is not supported: its parameters are flat shards",
                hint="fully_shard (FSDP2) is",
            )

    # 4. Optimizers inside the backward.
    for name, parameter in model.named_parameters():
        if getattr(parameter, "_in_backward_optimizers", None):
            raise UsageError(
                "an optimizer that steps inside the backward is not supported",
                got=f"on '{name}'",
                hint="there is no moment at which all gradients are there; switch it off",
            )


def names_of(model: nn.Module) -> dict[int, str]:
    """Map the id of a parameter to its name without wrappers; of tied names the first counts."""
    names: dict[int, str] = {}
    for name, parameter in unwrap(model).named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), plain_name(name))
    return names


def parameters_of(optimizers: list[Any]) -> list[Tensor]:
    """Return all parameters of some optimizers, each once."""
    by_id: dict[int, Tensor] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                by_id[id(parameter)] = parameter
    return list(by_id.values())


def check_belongs(optimizers: list[Any], names: dict[int, str]) -> list[str]:
    """Return the names of the model's parameters that no optimizer holds.

    Args:
        optimizers: those that are passed.
        names: id of a parameter of the model -> its name.

    Raises:
        UsageError: the optimizers hold none of them.
    """
    held = {id(p) for p in parameters_of(optimizers)}
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


def scaling(optimizer: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return `(grad_scale, found_inf)` of a fused optimizer inside `GradScaler.step`.

    Such an optimizer gets scaled gradients and unscales them. Any other gets gradients that the
    scaler has unscaled, and is not called if one of them is inf: both are None then.
    """
    scale = getattr(optimizer, "grad_scale", None)
    found_inf = getattr(optimizer, "found_inf", None)
    if not isinstance(scale, Tensor):
        scale = None
    if not isinstance(found_inf, Tensor):
        found_inf = None
    return scale, found_inf


def learning_rates(optimizer: Any) -> list[float | Tensor | None]:
    """Return the learning rate of each parameter group.

    Returns:
        Numbers; a copy on the device for a rate that lies there; None for a group without a rate.
    """
    rates: list[float | Tensor | None] = []
    for group in optimizer.param_groups:
        rate = group.get("lr")
        if rate is None:
            rates.append(None)
        elif isinstance(rate, Tensor) and rate.device.type != "cpu":
            rates.append(rate.detach().clone())
        else:
            rates.append(float(rate))
    return rates


def group_names(optimizers: Sequence[Any]) -> list[str]:
    """Return a name for each parameter group, such as "AdamW 0", or with the group's own name."""
    kinds = [type(optimizer).__name__ for optimizer in optimizers]
    names: list[str] = []
    for place, optimizer in enumerate(optimizers):
        # 1. Two optimizers of one class also have their places.
        optimizer_name = kinds[place]
        if kinds.count(optimizer_name) > 1:
            optimizer_name = f"{optimizer_name} ({place})"

        # 2. The groups.
        for number, group in enumerate(optimizer.param_groups):
            group_name = group.get("name")
            if not isinstance(group_name, str):
                group_name = str(number)
            names.append(f"{optimizer_name} {group_name}")
    return names


def held_parameters(optimizer: Any) -> list[Tensor]:
    """Return the parameters of an optimizer, as its groups hold them now."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor; a plain tensor is returned as it is."""
    to_local = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor
    return to_local()


def copies(tensor: Tensor, world: int) -> float:
    """Return how many ranks hold the same piece of a tensor as this one.

    A sum over ranks counts the piece that often.
    """
    placements = getattr(tensor, "placements", None)
    if placements is None or not torch.distributed.is_initialized():
        return float(world)
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    pieces = 1
    for dim, placement in enumerate(placements):
        if not placement.is_replicate():
            pieces *= mesh.size(dim)
    return world / pieces
