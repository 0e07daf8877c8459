"""The rows of embeddings that stand for padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class PaddingRow:
    """The row of a table that padding reads.

    Attributes:
        index: of the row.
        largest: its largest magnitude, 0 for a row of zeros.
    """

    index: int
    largest: float


def padding_rows(model: nn.Module, aliases: Mapping[str, str]) -> dict[str, PaddingRow]:
    """Return the padding row of every embedding that has one, by the name of its weight.

    Args:
        model: searched for `nn.Embedding` with a `padding_idx`.
        aliases: every name of a tied weight -> the name that stands for it.

    Example:
        >>> padding_rows(nn.Sequential(nn.Embedding(4, 2, padding_idx=1)), {})
        {'0.weight': PaddingRow(index=1, largest=0.0)}
    """
    rows = {}
    for module_name, module in model.named_modules():
        if not isinstance(module, nn.Embedding):
            continue

        row = _padding_row_of(module)
        if row is None:
            continue

        # The model itself has no name.
        name = f"{module_name}.weight".removeprefix(".")
        rows[aliases.get(name, name)] = row

    return rows


def _padding_row_of(module: nn.Embedding) -> PaddingRow | None:
    """Return the padding row of an embedding; None if it has none, or no values."""
    index = module.padding_idx
    if index is None:
        return None
    if module.weight.is_meta:
        return None

    # A table that was cut to fewer rows may have lost it.
    if index >= module.weight.shape[0]:
        return None

    largest = float(module.weight.detach()[index].abs().max())
    return PaddingRow(index, largest)
