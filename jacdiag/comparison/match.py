"""Matches the sub-layers and weights of two reports, and finds the first where they part beyond
their intervals.

A sub-layer is known by its depth, its kind and its number among those of that kind at that depth; a
weight by layer, role and number. W_Q, W_K and W_V of one model beside a fused W_QKV of the other
are put together, as are W_gate and W_1 beside W_gate_up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from jacdiag.comparison.probe_facts import drawn_with, parting, spoken
from jacdiag.errors import UsageError
from jacdiag.records import Interval, Report, SublayerRecord, WeightRecord

FIGURES = ("shortcut_std", "norm_gain", "core_norm", "branch_norm")
FUSED = {"W_QKV": ("W_Q", "W_K", "W_V"), "W_KV": ("W_K", "W_V"), "W_gate_up": ("W_gate", "W_1")}
_ROUNDING = 1e-3  # two runs of one model, in other kernels, may differ by so much
_ORDER = (
    "W_Q",
    "W_K",
    "W_V",
    "W_QK",
    "W_KV",
    "W_QKV",
    "W_O",
    "router",
    "W_gate",
    "W_1",
    "W_gate_up",
    "W_2",
)

Key = tuple[object, ...]
Ends = tuple[float, float, float]  # lower, middle, upper


@dataclass(frozen=True)
class Pair:
    """One figure of both models.

    Attributes:
        depth: None outside all layers.
        part: kind of the sub-layer, or role of the weight; `figure` is its branch_norm, std ...
        a, b: what it is called in each, "" where it is missing.
        old, new: lower, middle and upper end in each; None where it is missing or was not measured.
        parts: whether the intervals have no value in common, or it is missing in one.
    """

    depth: int | None
    part: str
    figure: str
    a: str
    b: str
    old: Ends | None
    new: Ends | None
    parts: bool

    @property
    def ratio(self) -> float | None:
        """New over old."""
        return self.new[1] / self.old[1] if self.old and self.new and self.old[1] else None


@dataclass(frozen=True)
class Comparison:
    """All pairs, in the order in which the forward meets them; `first` is the first that parts,
    None if none does.

    `notes` say what makes figures part that is not in the models.
    """

    pairs: tuple[Pair, ...]
    notes: tuple[str, ...] = ()

    @property
    def first(self) -> Pair | None:
        return next((p for p in self.pairs if p.parts), None)

    @property
    def parted(self) -> tuple[Pair, ...]:
        return tuple(p for p in self.pairs if p.parts)


def compare(a: Report, b: Report) -> Comparison:
    """Compares two reports.

    Example:
        >>> compare(report_of_main, report_of_branch).first           # doctest: +SKIP
        Pair(depth=0, part='W_2', figure='std', a='h.0.mlp.c_proj.weight', ...)
    """
    for given in (a, b):
        if not isinstance(given, Report):
            hint = "jacdiag.audit(SOURCE), or Report.from_json(TEXT)"
            raise UsageError(
                "compare takes two reports", got=f"type {type(given).__name__}", hint=hint
            )
    pairs = [*_weight_pairs(a, b), *_sublayer_pairs(a, b)]
    return Comparison(tuple(sorted(pairs, key=_place)), tuple(_notes(a, b)))


def _notes(a: Report, b: Report) -> Iterable[str]:
    ours, theirs = drawn_with(a), drawn_with(b)
    if parting(ours, theirs):
        yield (
            f"the probes differ, and norms may part by that alone: {spoken(ours)} of A beside "
            f"{spoken(theirs)} of B"
        )


def _place(pair: Pair) -> tuple[float, int, int]:
    """The embedding before layer 0, the head behind the last; in a layer weights before the figures
    they cause.
    """
    outside = -1.0 if pair.part in ("embedding", "positions") else math.inf
    weight = _ORDER.index(pair.part) if pair.part in _ORDER else len(_ORDER)
    figure = 1 + FIGURES.index(pair.figure) if pair.figure in FIGURES else 0
    return (outside if pair.depth is None else float(pair.depth), figure, weight)


# -- sub-layers ------------------------------------------------------------------------------------
def _sublayer_pairs(a: Report, b: Report) -> Iterable[Pair]:
    ours, theirs = numbered_rows(a.sublayers), numbered_rows(b.sublayers)
    if not ours or not theirs:  # weights alone on one side
        return
    for key in dict.fromkeys((*ours, *theirs)):
        one, other = ours.get(key), theirs.get(key)
        row = one or other
        assert row is not None
        names = (one.name if one else "", other.name if other else "")
        if one is None or other is None:
            yield Pair(row.depth, row.kind, "sub-layer", *names, None, None, True)
            continue
        for figure in FIGURES:
            old, new = ends_of(one, figure), ends_of(other, figure)
            if old is not None or new is not None:
                yield Pair(row.depth, row.kind, figure, *names, old, new, are_apart(old, new))


class Placed(Protocol):
    """What a sub-layer is matched by: a record of a report, or a sub-layer that was found and not
    yet measured.
    """

    @property
    def name(self) -> str: ...
    @property
    def depth(self) -> int: ...
    @property
    def kind(self) -> Any: ...
    @property
    def placement(self) -> Any: ...
    @property
    def nested(self) -> bool: ...


Row = TypeVar("Row", bound=Placed)


def numbered_rows(rows: Iterable[Row]) -> dict[Key, Row]:
    """Return the sub-layers on the stream by depth, kind, and number among those of that kind at
    that depth.
    """
    seen: dict[Key, int] = {}
    numbered: dict[Key, Row] = {}
    for row in rows:
        if row.placement is None or row.nested:
            continue
        key: Key = (row.depth, row.kind)
        seen[key] = seen.get(key, 0) + 1
        numbered[(*key, seen[key])] = row
    return numbered


def ends_of(row: SublayerRecord, figure: str) -> Ends | None:
    value = getattr(row, figure)
    if value is None:
        return None
    if isinstance(value, Interval) and value.per_token is not None and figure == "norm_gain":
        return (value.per_token.median, value.per_token.p99, value.per_token.max)
    if isinstance(value, Interval):
        return (value.lower, value.estimate, value.upper)
    return (value.min, value.median, value.max)  # over tokens


def are_apart(old: Ends | None, new: Ends | None) -> bool:
    if old is None or new is None:
        return False  # not measured on one side: nothing is said
    if any(math.isnan(x) for x in (*old, *new)):
        return True
    return old[0] * (1 - _ROUNDING) > new[2] * (1 + _ROUNDING) or new[0] * (1 - _ROUNDING) > old[
        2
    ] * (1 + _ROUNDING)


# -- weights ---------------------------------------------------------------------------------------
def _weight_pairs(a: Report, b: Report) -> Iterable[Pair]:
    ours, theirs = _like_each_other(numbered_weights(a), numbered_weights(b))
    if not ours or not theirs:
        return
    for key in dict.fromkeys((*ours, *theirs)):
        one, other = ours.get(key), theirs.get(key)
        weight = one or other
        assert weight is not None
        names = (one.parameter if one else "", other.parameter if other else "")
        old, new = _std(one), _std(other)
        missing = (one is None or other is None) and weight.role not in (
            "bias",
            "norm_gain",
            "scale",
            "",
        )
        yield Pair(
            weight.layer, weight.role, "std", *names, old, new, missing or are_apart(old, new)
        )


def numbered_weights(report: Report) -> dict[Key, WeightRecord]:
    """Return the weights that have a role by layer, role, and number among those of that role in
    that layer.
    """
    seen: dict[Key, int] = {}
    found: dict[Key, WeightRecord] = {}
    for weight in report.contract.weights if report.contract is not None else ():
        if not weight.role or weight.role in ("bias", "norm_gain", "scale"):
            continue
        key: Key = (weight.layer, weight.role)
        seen[key] = seen.get(key, 0) + 1
        found[(*key, seen[key])] = weight
    return found


Weights = dict[Key, WeightRecord]


def _like_each_other(ours: Weights, theirs: Weights) -> tuple[Weights, Weights]:
    """Puts parts together in one model that are fused in the other."""
    return _fused_as(ours, theirs), _fused_as(theirs, ours)


def _fused_as(weights: Weights, model: Mapping[Key, WeightRecord]) -> Weights:
    made = dict(weights)
    for layer, role, number in model:
        keys: list[Key] = [(layer, part, number) for part in FUSED.get(str(role), ())]
        if keys and (layer, role, number) not in made and all(k in made for k in keys):
            made[layer, role, number] = _together([made.pop(k) for k in keys], str(role))
    return made


def _together(parts: list[WeightRecord], role: str) -> WeightRecord:
    """Several weights as one: their mean square, and the interval that theirs make."""
    sizes = [math.prod(p.shape) for p in parts]

    def pooled(figure: str) -> float | None:
        values = [getattr(p, figure) for p in parts]
        if any(v is None for v in values):
            return None
        return math.sqrt(sum(n * v * v for n, v in zip(sizes, values, strict=True)) / sum(sizes))

    name = " + ".join(p.parameter for p in parts)
    return replace(
        parts[0],
        parameter=name,
        role=role,
        std=pooled("std"),
        lower=pooled("lower"),
        upper=pooled("upper"),
    )


def _std(weight: WeightRecord | None) -> Ends | None:
    if weight is None or weight.std is None or weight.lower is None or weight.upper is None:
        return None
    return (weight.lower, weight.std, weight.upper)
