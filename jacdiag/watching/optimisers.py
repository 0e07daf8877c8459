"""Which optimisers a user handed in, what of them is supported, and the hooks on their step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from jacdiag.errors import UsageError
from jacdiag.sources.given import check_module
from jacdiag.sources.wrapped import plain_name, unwrap

_FOREIGN = {
    "deepspeed": "DeepSpeed's optimisers keep flat partitions of the weights and step on copies of them",
    "megatron": "Megatron's optimiser classes step on master weights of their own",
    "colossalai": "ColossalAI's optimisers step on flat partitions",
}
_PLAIN_WAY = "pass the torch.optim optimiser that steps on the model's own parameters"


def optimisers_of(given: Any) -> list[Optimizer]:
    """Returns the plain torch optimisers in what a user handed in: one, a list, a dict, a wrapper or a container.

    Raises:
        UsageError: there is none, or it is of a kind that is not supported; the message names it.
    """
    found: list[Optimizer] = []
    _collect(given, found, set())
    if not found:
        raise UsageError(
            "optimizer holds no torch.optim optimiser", got=f"a {type(given).__name__}", hint=_PLAIN_WAY
        )  # fmt: skip
    return found


def _collect(given: Any, found: list[Optimizer], seen: set[int]) -> None:
    if id(given) in seen:
        return
    seen.add(id(given))
    for cls in type(given).__mro__:
        why = _FOREIGN.get(cls.__module__.split(".")[0])
        if why is not None:
            raise UsageError(f"{type(given).__name__} is not supported", got=why, hint=_PLAIN_WAY)
    if type(given).__name__ == "OptimizersInBackwardContainer":
        raise UsageError("an optimiser that steps inside the backward is not supported", got=type(given).__name__,
                         hint="there is no moment at which all gradients are there; switch it off")  # fmt: skip
    inner = getattr(given, "optimizer", None)  # accelerate, Lightning, many a scheduler-like wrapper
    several = getattr(given, "optimizers", None)  # a container, such as torchtitan's
    if isinstance(given, dict):
        several = list(given.values())
    elif isinstance(given, list | tuple | set):
        several = list(given)
    if isinstance(several, list | tuple):
        for one in several:
            _collect(one, found, seen)
    elif inner is not None and inner is not given:
        _collect(inner, found, seen)
    elif isinstance(given, Optimizer):
        found.append(given)


def check_supported(model: Any) -> None:
    """Raises UsageError for what a watch cannot see into: named, instead of figures that stay empty in silence."""
    if isinstance(model, list | tuple) or type(model).__module__.startswith("torch.distributed.pipelining"):
        raise UsageError("pipeline stages are not supported", got=f"a {type(model).__name__}",
                         hint="watch takes one nn.Module that holds the whole model")  # fmt: skip
    check_module(model, "jacdiag.watch")
    for cls in type(model).__mro__:
        why = _FOREIGN.get(cls.__module__.split(".")[0])
        if why is not None and cls.__name__.endswith("Engine"):
            raise UsageError(f"{type(model).__name__} is not supported", got=why, hint="watch the module itself")
    for part in model.modules():
        handle: Any = getattr(part, "_handle", None)
        if getattr(handle, "flat_param", None) is not None:
            raise UsageError("FullyShardedDataParallel (FSDP1) is not supported: its parameters are flat shards",
                             hint="fully_shard (FSDP2) is")  # fmt: skip
    for name, p in model.named_parameters():
        if getattr(p, "_in_backward_optimizers", None):
            raise UsageError("an optimiser that steps inside the backward is not supported", got=f"on '{name}'",
                             hint="there is no moment at which all gradients are there; switch it off")  # fmt: skip


def names_of(model: nn.Module) -> dict[int, str]:
    """Maps id of a parameter -> its plain name, inside all wrappers; the first name of a tie."""
    found: dict[int, str] = {}
    for name, p in unwrap(model).named_parameters(remove_duplicate=False):
        found.setdefault(id(p), plain_name(name))
    return found


def parameters_of(optimisers: list[Optimizer]) -> list[Tensor]:
    """All parameters of optimisers, each once."""
    every = {id(p): p for o in optimisers for group in o.param_groups for p in group["params"]}
    return list(every.values())


def check_belongs(optimisers: list[Optimizer], names: dict[int, str]) -> list[str]:
    """Raises UsageError for optimisers without a parameter of the model; returns names of those that none holds."""
    held = {id(p) for p in parameters_of(optimisers)}
    if not held & names.keys():
        raise UsageError(
            "the optimizer holds none of the model's parameters",
            got=f"{len(held)} parameters in the optimizer, {len(names)} in the model",
            hint="build the optimizer after the model was moved, wrapped or sharded, and pass that very model",
        )
    return [name for key, name in names.items() if key not in held]


class StepHooks:
    """Hooks before and behind the step of every optimiser; gone after `remove`.

    Each is called with the optimiser and whether the step was given a closure: then the gradients are made inside the
    step, and stand behind it, not before it.
    """

    def __init__(
        self,
        optimisers: list[Optimizer],
        before: Callable[[Optimizer, bool], None],
        behind: Callable[[Optimizer, bool], None],
    ) -> None:
        self._handles: list[Any] = []
        for optimiser in optimisers:
            self._handles.append(optimiser.register_step_pre_hook(lambda o, a, k: before(o, _closure(a, k))))
            self._handles.append(optimiser.register_step_post_hook(lambda o, a, k: behind(o, _closure(a, k))))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a step was given a closure; `args` may begin with the optimiser itself."""
    return callable(kwargs.get("closure")) or any(callable(a) and not isinstance(a, Optimizer) for a in args)


def scaling(optimiser: Optimizer) -> tuple[Tensor | None, Tensor | None]:
    """(scale, found_inf) of a fused optimiser inside GradScaler.step: it is given scaled gradients and unscales them.

    Others are stepped with gradients that the scaler has unscaled, and not at all where one of them is inf.
    """
    scale, inf = getattr(optimiser, "grad_scale", None), getattr(optimiser, "found_inf", None)
    return (scale if isinstance(scale, Tensor) else None), (inf if isinstance(inf, Tensor) else None)


def learning_rates(optimisers: list[Optimizer]) -> Iterator[float]:
    """The learning rates that need no look at the device."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            lr = group.get("lr")
            if isinstance(lr, Tensor):
                if lr.device.type == "cpu":
                    yield float(lr)
            elif lr is not None:
                yield float(lr)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank; a plain tensor is that itself."""
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local is not None else tensor


def copies(tensor: Tensor, world: int) -> float:
    """How many ranks hold the very piece of a tensor that this one holds: a sum over ranks counts it so often."""
    placements = getattr(tensor, "placements", None)
    if placements is None or not torch.distributed.is_initialized():
        return float(world)
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    pieces = 1
    for dim, placement in enumerate(placements):
        pieces *= 1 if placement.is_replicate() else mesh.size(dim)
    return world / pieces
