"""Look for NaN and inf in the arguments of a forward. Each tensor is read from its device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from jacdiag.records.batch_values import BatchValues, NonFiniteArgument

_KINDS = {"NaN": torch.isnan, "+inf": torch.isposinf, "-inf": torch.isneginf}
_MOST_EARLIER = 32  # batches that say whether a mask holds inf by design


def find_nonfinite_values(
    arguments: Mapping[str, Any], earlier: Iterable[Mapping[str, Any]] = ()
) -> BatchValues:
    """Return the tensors of a batch that hold NaN or inf.

    Args:
        arguments: of the forward, by name.
        earlier: the arguments of earlier batches, the latest first. They tell whether a mask holds
            -inf by design, and are read only if something is not finite.

    Example:
        >>> values = find_nonfinite_values({"x": torch.tensor([[1.0, 2.0], [float("nan"), 0.0]])})
        >>> [(found.name, found.counts, found.sequences) for found in values.arguments]
        [('x', {'NaN': 1}, [1])]
    """
    # 1. The tensors of this batch.
    tensors = _tensors_of(arguments)
    rows = _batch_size(tensors)
    nonfinite: list[NonFiniteArgument] = []
    unread = 0
    for name, tensor in tensors.items():
        try:
            argument = _look_at(name, tensor, rows, len(tensors))
        # A layout or a type without these operations.
        except (RuntimeError, NotImplementedError, TypeError):
            unread += 1
            continue
        if argument is not None:
            nonfinite.append(argument)
    if not nonfinite:
        return BatchValues(unread=unread, rows=rows)

    # 2. What the same arguments held in earlier batches.
    usual: dict[str, set[str]] = {argument.name: set() for argument in nonfinite}
    count = 0
    for batch in islice(earlier, _MOST_EARLIER):
        count += 1
        _note_usual(usual, _tensors_of(batch))

    # 3. What is in both is usual, such as -inf in a mask.
    compared = [
        replace(argument, usual=_in_both(argument, usual[argument.name])) for argument in nonfinite
    ]
    return BatchValues(compared, count, unread, rows)


def _tensors_of(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors that can hold NaN, by name; a DTensor by the part that is here."""
    tensors: dict[str, Tensor] = {}
    for name, value in arguments.items():
        leaves, _ = tree_flatten_with_path(value)
        for path, leaf in leaves:
            if not isinstance(leaf, Tensor):
                continue

            tensor = _local_part(leaf)
            if _can_hold_nan(tensor):
                tensors[f"{name}{keystr(path)}"] = tensor.detach()

    return tensors


def _local_part(tensor: Tensor) -> Tensor:
    """Return the part of a DTensor that is here; any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor

    local: Tensor = to_local()
    return local


def _can_hold_nan(tensor: Tensor) -> bool:
    """Return whether the numbers of a tensor can be NaN or infinite."""
    return tensor.is_floating_point() or tensor.is_complex()


def _batch_size(tensors: Mapping[str, Tensor]) -> int:
    """Return the first dimension that most tensors have; 0 if no tensor has two dimensions."""
    sizes = [tensor.shape[0] for tensor in tensors.values() if tensor.dim() >= 2]
    return max(sizes, key=sizes.count, default=0)


def _look_at(name: str, tensor: Tensor, rows: int, count: int) -> NonFiniteArgument | None:
    """Return what a tensor holds that is not finite; None if it is finite everywhere.

    Args:
        name: of the argument.
        tensor: its value.
        rows: size of the batch; 0 if it is not known.
        count: of the tensors of the batch.
    """
    # 1. How many numbers of each kind there are.
    counts = {}
    is_nonfinite = torch.zeros_like(tensor, dtype=torch.bool)
    for kind, flags in _flags_of(tensor):
        number = int(flags.sum())
        if number:
            counts[kind] = number
            is_nonfinite |= flags

    if not counts:
        return None

    # 2. In which sequences they are.
    sequences: list[int] = []
    if _has_sequences(tensor, rows, count):
        sequences = is_nonfinite.reshape(rows, -1).any(dim=1).nonzero().flatten().tolist()
    return NonFiniteArgument(name, counts, tensor.numel(), sequences)


def _has_sequences(tensor: Tensor, rows: int, count: int) -> bool:
    """Return whether the first dimension of a tensor is that of the batch."""
    if tensor.dim() == 0:
        return False
    if tensor.shape[0] != rows:
        return False

    # A square matrix among other tensors is as likely a mask over positions.
    is_square = tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1]
    has_others = count > 1
    return not (is_square and has_others)


def _flags_of(tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Return where the numbers of a tensor are of each kind that is not finite."""
    # A complex infinity has no sign.
    if tensor.is_complex():
        return [("NaN", torch.isnan(tensor)), ("+inf", torch.isinf(tensor))]

    return [(kind, test(tensor)) for kind, test in _KINDS.items()]


def _note_usual(usual: dict[str, set[str]], tensors: Mapping[str, Tensor]) -> None:
    """Add the kinds of values that an earlier batch has in the arguments that are requested."""
    for name, kinds in usual.items():
        # An optional argument is not in every batch.
        if name not in tensors:
            continue

        for kind, flags in _flags_of(tensors[name]):
            if bool(flags.any()):
                kinds.add(kind)


def _in_both(argument: NonFiniteArgument, kinds: set[str]) -> list[str]:
    """Return the kinds of an argument that earlier batches had, too."""
    return [kind for kind in argument.counts if kind in kinds]
