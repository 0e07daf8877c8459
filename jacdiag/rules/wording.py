"""Phrases that several rules use: lists of names, layers, placements of norms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jacdiag.errors import clipped
from jacdiag.records import WeightRecord

_MOST_NAMES = 3
_LONGEST_NAME = 100  # characters; calls are listed with their source line
_MOST_LAYERS = 8


def list_names(
    names: Sequence[str], most: int = _MOST_NAMES, longest: int | None = _LONGEST_NAME
) -> str:
    """Return names for a sentence: the first ones, and how many more there are.

    Args:
        names: of parameters, modules or calls.
        most: how many are listed.
        longest: characters of a name after which it is cut; None cuts none.
    """
    shown = names[:most]
    if longest is not None:
        shown = [clipped(name, longest) for name in shown]
    text = ", ".join(shown)

    # How many are left out.
    more = len(names) - most
    if more > 0:
        text += f" and {more} more"
    return text


def layers_in_words(weights: Iterable[WeightRecord], of: int) -> str:
    """Return which layers a finding is about, as ", layer 1, 2"; "" if it is about all of them.

    Args:
        weights: the parameters that differ.
        of: in how many layers there is such a parameter.
    """
    layers = [str(weight.layer) for weight in weights if weight.layer is not None]
    is_some = 0 < len(layers) < of
    if not is_some:
        return ""

    shown = ", ".join(layers[:_MOST_LAYERS])
    return f", layer {shown}"


def placement_in_words(placement: str | None) -> str:
    """Return where a sub-layer has its norm, as "pre-norm"; "no norm" if it has none."""
    if placement in (None, "none"):
        return "no norm"
    return f"{placement}-norm"
