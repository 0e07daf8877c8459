"""Puts a checkpoint's weights into a model, strictly: every name and every shape must fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

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
    # 1. Outlines of the weights, and the values of the buffers.
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    state = weights.outlines()
    for name in buffers & state.keys():
        state[name] = weights[name]

    # 2. Put them into the model.
    names = {id(tensor): name for name, tensor in state.items()}
    tensors, notes = _match(model, state, where, hint, lambda tensor: weights[names[id(tensor)]])
    _place(model, tensors)

    # 3. The weights by the names of the parameters.
    #    A tied one has several.
    stored_names = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        stored_names[name] = names[id(tensors[name])]
    return weights.renamed(stored_names), notes


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
    # 1. Check that they belong together.
    expected = model.state_dict(keep_vars=True)
    state, notes = _without_prefix(state, expected)
    ties = _ties(expected)
    _check_names_and_shapes(model, state, expected, ties, where, hint)
    _check_precision(expected, state, where)
    _check_ties(ties, state, where, value)

    # 2. A tensor for each name. A name that the file lacks gets that of a tied one.
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
    missing = _missing(state, ties)
    unexpected = [name for name in state if name not in expected]
    shapes = _other_shapes(state, expected)
    lines = [
        *_listed("missing", missing),
        *_listed("unexpected", unexpected),
        *_listed("of another shape", shapes),
    ]
    if not lines:
        return
    misfit = Misfit(f"{where} does not fit {type(model).__name__}", got="\n".join(lines), hint=hint)
    misfit.unexpected = bool(unexpected)
    raise misfit


def _missing(state: Mapping[str, Tensor], ties: Mapping[str, list[str]]) -> list[str]:
    """Return the names of the model of which the state has neither this nor a tied one."""
    return [name for name, twins in ties.items() if state.keys().isdisjoint(twins)]


def _other_shapes(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Return the names whose tensors have another shape than in the model, with both shapes."""
    differing = []
    for name, tensor in expected.items():
        if name not in state:
            continue

        stored = state[name]
        if stored.shape != tensor.shape:
            differing.append(f"{name} {_size(stored)}, the model has {_size(tensor)}")
    return differing


def _check_precision(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str
) -> None:
    """Raise if weights are quantised.

    They mean nothing without their scales, which a state dict keeps elsewhere.
    """
    # 1. The model computes with these in floating point, the file has something else.
    quantised = []
    for name, tensor in expected.items():
        if name not in state or not tensor.is_floating_point():
            continue
        if not _is_computable(state[name]):
            quantised.append(name)
    if not quantised:
        return

    # 2. Say what it has.
    kinds = sorted({str(state[name].dtype).removeprefix("torch.") for name in quantised})
    if all(state[name].is_complex() for name in quantised):
        raise SourceError(
            f"weights in {where} are complex numbers, those of the model are real",
            got="\n".join(_listed("such", quantised)),
            hint="--model with the module that was saved, whose parameters are complex too",
        )
    raise SourceError(
        f"weights in {where} are quantised: stored as {', '.join(kinds)}, read only together "
        "with its scales",
        got="\n".join(_listed("such", quantised)),
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

    Returns:
        The state under its new names, or as it was, and notes.
    """
    # 1. Names that fit as they are need no change.
    if state.keys() <= expected.keys():
        return state, []
    heads = {name.partition(".")[0] for name in state}
    if len(heads) != 1:
        return state, []

    # 2. All must fit without the prefix: some alone would be a coincidence.
    head = f"{heads.pop()}."
    shorter = {name.removeprefix(head): tensor for name, tensor in state.items()}
    if not shorter.keys() <= expected.keys():
        return state, []
    return shorter, [f"the prefix '{head}' was taken off every name"]


def _ties(expected: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return for each name all names of the same tensor, itself first."""
    # 1. The names of each tensor.
    by_tensor: dict[int, list[str]] = {}
    for name, tensor in expected.items():
        by_tensor.setdefault(id(tensor), []).append(name)

    # 2. The same by name. Most tensors have a single one.
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
    for first, second in _tied_pairs(ties):
        # A file with one name of a tie is complete.
        if first not in state or second not in state:
            continue

        are_same = _same(value(state[first]), value(state[second]))
        if not are_same:
            raise TieConflict(
                f"'{first}' and '{second}' are one parameter in the model, but differ in {where}",
                hint="build the model without weight tying",
            )


def _tied_pairs(ties: Mapping[str, list[str]]) -> Iterator[tuple[str, str]]:
    """Yield every pair of names of one parameter once."""
    for first, *twins in ties.values():
        # The other order is the same pair, and comes with the other name.
        later = [twin for twin in twins if first < twin]
        for second in later:
            yield first, second


def _same(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors are equal; two with NaN count as equal."""
    # The same memory need not be read.
    if first.data_ptr() == second.data_ptr():
        return True
    if torch.equal(first, second):
        return True

    # NaN differs from itself. What they hold cannot be compared, and is reported elsewhere.
    return _has_nan(first) and _has_nan(second)


def _has_nan(tensor: Tensor) -> bool:
    """Return whether one of the numbers of a tensor is NaN."""
    return bool(torch.isnan(tensor).any())


def _place(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Set tensors as parameters and buffers.

    There is one new parameter for each old one, so that ties last.
    """
    replaced = _Replaced()
    for prefix, module in model.named_modules(remove_duplicate=False):
        lead = f"{prefix}." if prefix else ""

        # 1. Its parameters. A place for one may be empty.
        for key, old in module._parameters.items():
            if old is not None:
                module._parameters[key] = replaced.parameter_for(old, lead + key, tensors)

        # 2. Its buffers. One that is not persistent is in no state dict.
        for key, buffer in module._buffers.items():
            value = tensors.get(lead + key)
            if buffer is not None and value is not None:
                module._buffers[key] = value


class _Replaced:
    """The parameters of a model that were replaced, and those in their place.

    A module that stands at two places of a model comes twice: its parameters are new by then.
    """

    def __init__(self) -> None:
        # The old parameter is held too: the id of one that is freed would be used again.
        self._pairs: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        self._new_ids: set[int] = set()

    def parameter_for(
        self, old: nn.Parameter, name: str, tensors: Mapping[str, Tensor]
    ) -> nn.Parameter:
        """Return the parameter in place of an old one, the same for every name of a tie.

        Args:
            old: as the model has it.
            name: of it in the model.
            tensors: the new values by name.
        """
        # 1. Its module came before, at another place.
        if id(old) in self._new_ids:
            return old

        # 2. A new one, unless it was made for another name of a tie.
        if id(old) not in self._pairs:
            tensor = tensors[name]
            needs_grad = old.requires_grad and tensor.is_floating_point()
            new = nn.Parameter(tensor, requires_grad=needs_grad)
            self._pairs[id(old)] = (old, new)
            self._new_ids.add(id(new))

        return self._pairs[id(old)][1]


def _listed(what: str, items: Sequence[str]) -> list[str]:
    """Return a line with the number of items and the first ones; none if there are no items."""
    if not items:
        return []
    shown = ", ".join(items[:_SHOWN])
    if len(items) > _SHOWN:
        shown += f" ... ({len(items)} in all)"
    return [f"{len(items)} {what}: {shown}"]


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
