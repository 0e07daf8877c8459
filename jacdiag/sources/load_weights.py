"""Puts a checkpoint's weights into a model, strictly: every name and every shape must fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from jacdiag.errors import SourceError
from jacdiag.sources.lazy_tensors import StoredWeights

_SHOWN = 5


class Misfit(SourceError):
    """Weights and model do not belong together. `unexpected`: the weights have names that the model
    has not.
    """

    unexpected = False


class TieConflict(SourceError):
    """Two names are one parameter in the model, and two different tensors in the weights."""


_HINT = "--model and --model-args must build exactly the model that was saved"


def fit(model: nn.Module, state: Mapping[str, Tensor], where: str, hint: str = _HINT) -> list[str]:
    """Replaces the model's parameters and buffers by those of a state dict, by reference, in the
    file's own precision.

    Tied parameters stay tied; a file that holds only one of a tie's names is complete.

    Args:
        model: changed in place.
        state: weights by name.
        where: what the state came from, for the message.
        hint: what to try where it does not fit.

    Returns:
        Notes for the report.

    Raises:
        SourceError: missing or unexpected keys, shapes that differ, numbers that no model computes
            with; the first ones, and how many.
    """
    chosen, notes = _match(model, state, where, hint, lambda tensor: tensor)
    _place(model, chosen)
    return notes


def attach(
    model: nn.Module, weights: StoredWeights, where: str, hint: str = _HINT
) -> tuple[StoredWeights, list[str]]:
    """Fits weights that stay in their files: the model's parameters become outlines, its buffers
    are read.

    Args:
        model: changed in place.
        weights: by name.
        where, hint: as for `fit`.

    Returns:
        The weights by the names of the model's parameters (every name of a tie), and notes for the
        report.

    Raises:
        SourceError: like `fit`, and where a file cannot be read.
    """
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    state = {
        name: weights[name] if name in buffers else t for name, t in weights.outlines().items()
    }
    names = {id(t): name for name, t in state.items()}
    chosen, notes = _match(model, state, where, hint, lambda tensor: weights[names[id(tensor)]])
    _place(model, chosen)
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return weights.renamed({name: names[id(chosen[name])] for name in parameters}), notes


def _match(
    model: nn.Module,
    state: Mapping[str, Tensor],
    where: str,
    hint: str,
    value: Callable[[Tensor], Tensor],
) -> tuple[dict[str, Tensor], list[str]]:
    """Returns a tensor of the state for every name of the model. `value` reads one, where the state
    has outlines.
    """
    wanted = model.state_dict(keep_vars=True)
    state, notes = _renamed(state, wanted)
    ties = _ties(wanted)
    missing = [name for name in wanted if not any(twin in state for twin in ties[name])]
    unexpected = [name for name in state if name not in wanted]
    shapes = [
        f"{name} {_size(state[name])}, the model has {_size(tensor)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if missing or unexpected or shapes:
        parts = [
            _listed("missing", missing),
            _listed("unexpected", unexpected),
            _listed("of another shape", shapes),
        ]
        got = "\n".join(part for part in parts if part)
        misfit = Misfit(f"{where} does not fit {type(model).__name__}", got=got, hint=hint)
        misfit.unexpected = bool(unexpected)
        raise misfit
    _check_precision(wanted, state, where)
    _check_ties(ties, state, where, value)
    return {
        name: next(state[twin] for twin in ties[name] if twin in state) for name in wanted
    }, notes


def _check_precision(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    """Quantised weights mean nothing without their scales, which a state dict keeps elsewhere."""
    floats = [name for name, t in wanted.items() if t.is_floating_point() and name in state]
    odd = [
        name
        for name in floats
        if not state[name].is_floating_point() or state[name].element_size() < 2
    ]
    if odd:
        kinds = sorted({str(state[name].dtype).removeprefix("torch.") for name in odd})
        raise SourceError(
            f"weights in {where} are quantised: stored as {', '.join(kinds)}, read only together "
            "with its scales",
            got=_listed("such", odd),
            hint="save them in float32, bfloat16 or float16",
        )


def _renamed(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor], list[str]]:
    """Takes off one first name that all keys share (a LightningModule's `model.`), where that makes
    them fit.
    """
    heads = {name.partition(".")[0] for name in state}
    if len(heads) != 1 or set(state) == set(wanted):
        return state, []
    head = f"{heads.pop()}."
    short = {name.removeprefix(head): tensor for name, tensor in state.items()}
    if set(short) <= set(wanted) and not set(state) <= set(wanted):
        return short, [f"the prefix '{head}' was taken off every name"]
    return state, []


def _ties(wanted: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """For each name, all names of the same tensor, itself first."""
    by_tensor: dict[int, list[str]] = {}
    for name, tensor in wanted.items():
        by_tensor.setdefault(id(tensor), []).append(name)
    return {
        name: [name, *(n for n in by_tensor[id(tensor)] if n != name)]
        for name, tensor in wanted.items()
    }


def _check_ties(
    ties: Mapping[str, list[str]],
    state: Mapping[str, Tensor],
    where: str,
    value: Callable[[Tensor], Tensor],
) -> None:
    for first, *twins in ties.values():
        for twin in twins:
            both = first in state and twin in state and first < twin
            if both and not _same(value(state[first]), value(state[twin])):
                raise TieConflict(
                    f"'{first}' and '{twin}' are one parameter in the model, but differ in {where}",
                    hint="build the model without weight tying",
                )


def _same(a: Tensor, b: Tensor) -> bool:
    return (
        a.data_ptr() == b.data_ptr()
        or torch.equal(a, b)
        or bool(torch.isnan(a).any() and torch.isnan(b).any())
    )


def _place(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Sets tensors as parameters and buffers; one new parameter for each old one, so that ties
    last.
    """
    # the old one is held too: a freed id would be used again
    made: dict[int, tuple[Tensor, nn.Parameter]] = {}
    placed: set[int] = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        lead = f"{prefix}." if prefix else ""
        for key, old in module._parameters.items():
            if old is None or id(old) in placed:
                continue
            if id(old) not in made:
                tensor = tensors[lead + key]
                new = nn.Parameter(
                    tensor, requires_grad=old.requires_grad and tensor.is_floating_point()
                )
                made[id(old)] = (old, new)
                placed.add(id(new))
            module._parameters[key] = made[id(old)][1]
        for key, buffer in module._buffers.items():
            if buffer is not None and lead + key in tensors:
                module._buffers[key] = tensors[lead + key]


def _listed(what: str, items: Sequence[str]) -> str:
    if not items:
        return ""
    more = f" ... ({len(items)} in all)" if len(items) > _SHOWN else ""
    return f"{len(items)} {what}: {', '.join(items[:_SHOWN])}{more}"


def _size(t: Tensor) -> str:
    return "x".join(map(str, t.shape)) or "scalar"
