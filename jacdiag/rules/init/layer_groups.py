"""Parameters that stand at the same place of different layers, as groups that may be compared."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from jacdiag.records import WeightRecord

_NUMBER = re.compile(r"(?<![^.])\d+(?=\.)")
_SAME = 1e-3  # relative: what low precisions move a constant by
DRAWN = ("normal", "truncated", "uniform", "orthogonal")
CONSTANT = ("zero", "constant")
MAJORITY = 2 / 3  # of a group: fewer do not say what is usual


@dataclass(frozen=True)
class Group:
    """The same parameter of several layers.

    Attributes:
        pattern: their name, with "*" for the number that differs.
        numbers: the numbers, ascending.
        members: in the order of the numbers.
    """

    pattern: str
    numbers: tuple[int, ...]
    members: tuple[WeightRecord, ...]


def layer_groups(weights: Iterable[WeightRecord], least: int = 2) -> Iterator[Group]:
    """Yield the groups of parameters that differ in one layer number only.

    Members have one shape, and the other parameters of their modules have too: a bias is drawn by
    the size of its matrix, so that those of unlike matrices may differ.

    Args:
        weights: all parameters of a model.
        least: members that a group needs.
    """
    weights = list(weights)
    blocks = _blocks_of(weights)
    siblings: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for weight in weights:
        module, _, name = weight.parameter.rpartition(".")
        siblings.setdefault(module, []).append((name, tuple(weight.shape)))
    groups: dict[tuple[Any, ...], list[tuple[int, WeightRecord]]] = {}
    for weight in weights:
        around = frozenset(siblings[weight.parameter.rpartition(".")[0]])
        for match in _NUMBER.finditer(weight.parameter):
            if weight.parameter[: match.end()] not in blocks:
                continue
            pattern = f"{weight.parameter[: match.start()]}*{weight.parameter[match.end() :]}"
            key = (pattern, weight.role, weight.offset, around)
            groups.setdefault(key, []).append((int(match[0]), weight))
    for (pattern, *_), numbered in groups.items():
        if len(numbered) >= least:
            ascending = sorted(numbered, key=lambda pair: pair[0])
            numbers, members = zip(*ascending, strict=True)
            yield Group(pattern, numbers, members)


def _blocks_of(weights: Iterable[WeightRecord]) -> set[str]:
    """Return the numbered modules that hold modules: `blocks.3`, not `mlp.2`.

    The latter is a place in a row of unlike modules.
    """
    return {
        weight.parameter[: match.end()]
        for weight in weights
        for match in _NUMBER.finditer(weight.parameter)
        if "." in weight.parameter[match.end() + 1 :]
    }


def is_constant(weight: WeightRecord) -> bool:
    """Return whether all numbers of a parameter are one."""
    return weight.family in CONSTANT


def same_value(weight: WeightRecord, other: WeightRecord) -> bool:
    """Return whether two parameters hold the same constant, or the very same numbers.

    Args:
        weight: one of them.
        other: the other one.
    """
    # 1. Constants, up to the rounding of low precisions.
    if is_constant(weight) and is_constant(other):
        return math.isclose(weight.mean or 0.0, other.mean or 0.0, rel_tol=_SAME)

    # 2. Numbers that are those of one first weight.
    origin = weight.same_as or weight.parameter
    other_origin = other.same_as or other.parameter
    return origin == other_origin


def usual_value(weights: Iterable[WeightRecord]) -> WeightRecord | None:
    """Return a parameter whose value two thirds of the given ones have, or None.

    Args:
        weights: parameters of one name.
    """
    # 1. How many have the value of each.
    weights = list(weights)
    counts: Counter[int] = Counter()
    for index, weight in enumerate(weights):
        counts[index] = sum(same_value(weight, other) for other in weights)
    if not counts:
        return None

    # 2. Most must have it.
    index, count = counts.most_common(1)[0]
    if count < MAJORITY * len(weights):
        return None
    return weights[index]
