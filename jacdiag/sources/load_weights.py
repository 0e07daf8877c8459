"""Puts a checkpoint's weights into a model, strictly: every name and every shape must fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from jacdiag.errors import SourceError
from jacdiag.sources.lazy_tensors import StoredWeights

_SHOWN = 5
_HINT = "--model and --model-args must build exactly the model that was saved"


class Misfit(SourceError):
    """Weights and a model that do not belong together.

    Attributes:
        unexpected: whether the weights have names that the model does not have.
    """

    unexpected = False


class TieConflict(SourceError):
    """Two names of one parameter in the model that are two different tensors in the weights."""


def fit(model: nn.Module, state: Mapping[str, Tensor], where: str, hint: str = _HINT) -> list[str]:
    """Replace the model's parameters and buffers by those of a state dict, by reference.

    They keep the file's own precision. Tied parameters stay tied. A file that holds only one of a
    tie's names is complete.

    Args:
        model: changed in place.
        state: weights by name.
        where: the source of the state, for the message.
        hint: what to try if it does not fit.

    Returns:
        Notes for the report.

    Raises:
        SourceError: missing or unexpected keys, shapes that differ, numbers that no model computes
            with. The message names the first ones, and how many there are.
    """
    tensors, notes = _match(model, state, where, hint, lambda tensor: tensor)
    _place(model, tensors)
    return notes


def attach(
    model: nn.Module, weights: StoredWeights, where: str, hint: str = _HINT
) -> tuple[StoredWeights, list[str]]:
    """Fit weights that stay in their files.

    The model's parameters become outlines. Its buffers are read.

    Args:
        model: changed in place.
        weights: by name.
        where: the file, for messages.
        hint: what to try if the weights do not fit.

    Returns:
        The weights by the names of the model's parameters (every name of a tie), and notes for the
        report.

    Raises:
        SourceError: like `fit`, and if a file cannot be read.
    """
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    state = weights.outlines()
    for name in buffers & state.keys():
        state[name] = weights[name]
    names = {id(tensor): name for name, tensor in state.items()}
    tensors, notes = _match(model, state, where, hint, lambda tensor: weights[names[id(tensor)]])
    _place(model, tensors)
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return weights.renamed({name: names[id(tensors[name])] for name in parameters}), notes


def _match(
    model: nn.Module,
    state: Mapping[str, Tensor],
    where: str,
    hint: str,
    value: Callable[[Tensor], Tensor],
) -> tuple[dict[str, Tensor], list[str]]:
    """Return a tensor of the state for every name of the model, and notes.

    Args:
        model: its names and shapes count.
        state: the weights, or their outlines.
        where: the file, for messages.
        hint: what to try if the weights do not fit.
        value: reads a tensor, if the state has outlines.
    """
    expected = model.state_dict(keep_vars=True)
    state, notes = _without_prefix(state, expected)
    ties = _ties(expected)
    _check_names_and_shapes(model, state, expected, ties, where, hint)
    _check_precision(expected, state, where)
    _check_ties(ties, state, where, value)
    tensors = {}
    for name in expected:
        stored_name = next(twin for twin in ties[name] if twin in state)
        tensors[name] = state[stored_name]
    return tensors, notes


def _check_names_and_shapes(
    model: nn.Module,
    state: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    ties: Mapping[str, list[str]],
    where: str,
    hint: str,
) -> None:
    """Raise Misfit unless the state has the names and shapes of the model, and no others."""
    missing = [name for name in expected if not any(twin in state for twin in ties[name])]
    unexpected = [name for name in state if name not in expected]
    shapes = []
    for name, tensor in expected.items():
        if name in state and state[name].shape != tensor.shape:
            shapes.append(f"{name} {_size(state[name])}, the model has {_size(tensor)}")
    if not missing and not unexpected and not shapes:
        return
    lines = [
        _listed("missing", missing),
        _listed("unexpected", unexpected),
        _listed("of another shape", shapes),
    ]
    got = "\n".join(line for line in lines if line)
    misfit = Misfit(f"{where} does not fit {type(model).__name__}", got=got, hint=hint)
    misfit.unexpected = bool(unexpected)
    raise misfit


def _check_precision(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str
) -> None:
    """Raise if weights are quantised.

    They mean nothing without their scales, which a state dict keeps elsewhere.
    """
    floats = [name for name, t in expected.items() if t.is_floating_point() and name in state]
    quantised = [name for name in floats if not _is_computable(state[name])]
    if quantised:
        kinds = sorted({str(state[name].dtype).removeprefix("torch.") for name in quantised})
        raise SourceError(
            f"weights in {where} are quantised: stored as {', '.join(kinds)}, read only together "
            "with its scales",
            got=_listed("such", quantised),
            hint="save them in float32, bfloat16 or float16",
        )


def _is_computable(tensor: Tensor) -> bool:
    """Return whether a tensor holds floating-point numbers of at least 16 bits."""
    return tensor.is_floating_point() and tensor.element_size() >= 2


def _without_prefix(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor], list[str]]:
    """Take off one first name that all keys share, if that makes them fit.

    A LightningModule puts `model.` before all names.
    """
    heads = {name.partition(".")[0] for name in state}
    if len(heads) != 1 or set(state) == set(expected):
        return state, []
    head = f"{heads.pop()}."
    shorter = {name.removeprefix(head): tensor for name, tensor in state.items()}
    if set(shorter) <= set(expected) and not set(state) <= set(expected):
        return shorter, [f"the prefix '{head}' was taken off every name"]
    return state, []


def _ties(expected: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return for each name all names of the same tensor, itself first."""
    by_tensor: dict[int, list[str]] = {}
    for name, tensor in expected.items():
        by_tensor.setdefault(id(tensor), []).append(name)
    ties = {}
    for name, tensor in expected.items():
        twins = [twin for twin in by_tensor[id(tensor)] if twin != name]
        ties[name] = [name, *twins]
    return ties


def _check_ties(
    ties: Mapping[str, list[str]],
    state: Mapping[str, Tensor],
    where: str,
    value: Callable[[Tensor], Tensor],
) -> None:
    """Raise TieConflict if the state has different tensors for one parameter."""
    for first, *twins in ties.values():
        for twin in twins:
            has_both = first in state and twin in state
            is_first_of_pair = first < twin  # each pair is compared once
            if not has_both or not is_first_of_pair:
                continue
            if not _same(value(state[first]), value(state[twin])):
                raise TieConflict(
                    f"'{first}' and '{twin}' are one parameter in the model, but differ in {where}",
                    hint="build the model without weight tying",
                )


def _same(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors are equal; two with NaN count as equal."""
    if first.data_ptr() == second.data_ptr() or torch.equal(first, second):
        return True
    return bool(torch.isnan(first).any() and torch.isnan(second).any())


def _place(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Set tensors as parameters and buffers.

    There is one new parameter for each old one, so that ties last.
    """
    # The old parameter is held too: the id of one that is freed would be used again.
    pairs: dict[int, tuple[Tensor, nn.Parameter]] = {}
    placed: set[int] = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        lead = f"{prefix}." if prefix else ""
        for key, old in module._parameters.items():
            if old is None or id(old) in placed:
                continue
            if id(old) not in pairs:
                tensor = tensors[lead + key]
                needs_grad = old.requires_grad and tensor.is_floating_point()
                new = nn.Parameter(tensor, requires_grad=needs_grad)
                pairs[id(old)] = (old, new)
                placed.add(id(new))
            module._parameters[key] = pairs[id(old)][1]
        for key, buffer in module._buffers.items():
            if buffer is not None and lead + key in tensors:
                module._buffers[key] = tensors[lead + key]


def _listed(what: str, items: Sequence[str]) -> str:
    """Return how many items there are, and the first ones; "" if there are none."""
    if not items:
        return ""
    more = f" ... ({len(items)} in all)" if len(items) > _SHOWN else ""
    return f"{len(items)} {what}: {', '.join(items[:_SHOWN])}{more}"


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
