"""Parameters that stand at the same place of different layers, as groups that may be compared."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

from jacdiag.records import WeightRecord
from jacdiag.rules.grouping import group_by
from jacdiag.rules.init.weight_facts import content_of, is_constant, mean_of, module_of

_NUMBER = re.compile(r"(?<![^.])\d+(?=\.)")
_SAME = 1e-3  # relative: what low precisions move a constant by
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
    # 1. Every place of every parameter.
    places: list[_Place] = []
    weights = list(weights)
    blocks = _blocks_of(weights)
    siblings = _shapes_by_module(weights)
    for weight in weights:
        places += _places_in_blocks(weight, blocks, siblings[module_of(weight)])

    # 2. Those at the same place, in the order of their layers.
    for (pattern, *_), group in group_by(places, _key_of).items():
        if len(group) < least:
            continue

        ascending = sorted(group, key=lambda place: place.number)
        numbers = tuple(place.number for place in ascending)
        yield Group(pattern, numbers, tuple(place.weight for place in ascending))


Shapes = frozenset[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class _Place:
    """A parameter at one number of its name.

    Attributes:
        weight: the parameter.
        number: the number.
        pattern: the name with "*" for the number.
        siblings: name and shape of all parameters of its module.
    """

    weight: WeightRecord
    number: int
    pattern: str
    siblings: Shapes


def _key_of(place: _Place) -> tuple[str, str, float, Shapes]:
    """Return what the parameters at the same place of different layers have in common."""
    return (place.pattern, place.weight.role, place.weight.offset, place.siblings)


def _shapes_by_module(weights: Iterable[WeightRecord]) -> dict[str, Shapes]:
    """Return name and shape of the parameters of each module."""
    modules: dict[str, Shapes] = {}
    for module, members in group_by(weights, module_of).items():
        shapes = [(weight.parameter.rpartition(".")[2], tuple(weight.shape)) for weight in members]
        modules[module] = frozenset(shapes)

    return modules


def _places_in_blocks(
    weight: WeightRecord, blocks: Container[str], siblings: Shapes
) -> Iterator[_Place]:
    """Yield the places of a parameter: one for each number of its name that numbers a block."""
    name = weight.parameter
    for match in _NUMBER.finditer(name):
        if name[: match.end()] in blocks:
            pattern = f"{name[: match.start()]}*{name[match.end() :]}"
            yield _Place(weight, int(match[0]), pattern, siblings)


def _blocks_of(weights: Iterable[WeightRecord]) -> set[str]:
    """Return the numbered modules that hold modules: `blocks.3`, not `mlp.2`.

    The latter is a place in a row of unlike modules.
    """
    blocks: set[str] = set()
    for weight in weights:
        name = weight.parameter
        for match in _NUMBER.finditer(name):
            # The name goes on with a module, and not with a parameter.
            holds_modules = "." in name[match.end() + 1 :]
            if holds_modules:
                blocks.add(name[: match.end()])

    return blocks


def same_value(weight: WeightRecord, other: WeightRecord) -> bool:
    """Return whether two parameters hold the same constant, or the very same numbers.

    Args:
        weight: one of them.
        other: the other one.
    """
    # 1. Constants, up to the rounding of low precisions.
    if is_constant(weight) and is_constant(other):
        return math.isclose(mean_of(weight), mean_of(other), rel_tol=_SAME)

    # 2. Numbers that are those of one first weight.
    return content_of(weight) == content_of(other)


def usual_value(weights: Iterable[WeightRecord]) -> WeightRecord | None:
    """Return a parameter whose value two thirds of the given ones have, or None.

    Args:
        weights: parameters of one name.
    """
    # 1. The first of those whose value most parameters have.
    weights = list(weights)
    most = 0
    usual: WeightRecord | None = None
    for weight in weights:
        count = sum(same_value(weight, other) for other in weights)
        if count > most:
            most = count
            usual = weight

    # 2. They must be two thirds of all.
    is_usual = most >= MAJORITY * len(weights)
    return usual if is_usual else None
