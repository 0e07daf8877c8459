"""Phrases that several rules use: lists of names, and layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jacdiag.errors import clipped
from jacdiag.records import WeightRecord

_MOST_NAMES = 3
_LONGEST_NAME = 100  # characters; calls are listed with their source line
_MOST_RANGES = 6  # of layers, in a sentence


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
    """Return which layers a finding is about, as ", in layers 1 and 2"; "" if it is about all.

    Args:
        weights: the parameters that differ.
        of: in how many layers there is such a parameter.
    """
    layers = [weight.layer for weight in weights if weight.layer is not None]
    is_some = 0 < len(layers) < of
    if not is_some:
        return ""
    return f", in {name_layers(layers)}"


def name_layers(layers: Iterable[int]) -> str:
    """Return the numbers of layers in words; neighbours are joined.

    Args:
        layers: their numbers, from 0, in any order; at least one.

    Example:
        >>> name_layers([0]), name_layers([4, 5]), name_layers([0, 2, 3, 4, 6])
        ('layer 0', 'layers 4 and 5', 'layers 0, 2 to 4 and 6')
    """
    # 1. Runs of neighbours.
    numbers = sorted(set(layers))
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])

    # 2. The first of them, each as "2 to 4"; two neighbours are no run.
    names: list[str] = []
    for run in runs[:_MOST_RANGES]:
        is_run = len(run) > 2
        if is_run:
            names.append(f"{run[0]} to {run[-1]}")
        else:
            names.extend(map(str, run))

    # 3. How many are left out.
    left_out = sum(map(len, runs[_MOST_RANGES:]))
    if left_out:
        names.append(f"{left_out} more")

    # 4. As one phrase.
    noun = "layers"
    if len(numbers) == 1:
        noun = "layer"

    # The last of several is joined by "and".
    *first, last = names
    if not first:
        return f"{noun} {last}"
    return f"{noun} {', '.join(first)} and {last}"
