"""Matches the sub-layers and weights of two reports, and finds where they differ.

A sub-layer is identified by its depth, its kind and its number among those of that kind at that
depth. A weight is identified by layer, role and number. If one model has W_Q, W_K and W_V and the
other a fused W_QKV, the three are put together, and so are W_gate and W_1 for W_gate_up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, cast

from jacdiag.comparison.probe_facts import drawn_with, measured_with, parting, spoken
from jacdiag.errors import UsageError
from jacdiag.records import Interval, Report, SublayerRecord, WeightRecord

FIGURES = ("shortcut_std", "norm_gain", "core_norm", "branch_norm")
FUSED = {"W_QKV": ("W_Q", "W_K", "W_V"), "W_KV": ("W_K", "W_V"), "W_gate_up": ("W_gate", "W_1")}
_NOT_COMPARED = ("", "bias", "norm_gain", "scale")  # vectors are judged by the contract alone
_MOST_NAMES = 3  # of sub-layers, in a note
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
        part: kind of the sub-layer, or role of the weight.
        figure: branch_norm, std or another figure of it.
        a, b: its name in each model, "" if it is missing.
        old, new: lower, middle and upper end in each; None if it is missing or was not measured.
        parts: whether the figure differs: the intervals have no value in common, or it is missing
            in one of the models.
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
        """The new estimate over the old one; None if there is none."""
        if self.old is None or self.new is None:
            return None

        _, old_estimate, _ = self.old
        _, new_estimate, _ = self.new
        # A weight that was zero has no ratio to what it is now.
        if old_estimate == 0:
            return None

        return new_estimate / old_estimate


@dataclass(frozen=True)
class Comparison:
    """All pairs of two reports.

    Attributes:
        pairs: in the order in which the forward meets them.
        notes: why figures may differ for a reason outside the models.
    """

    pairs: tuple[Pair, ...]
    notes: tuple[str, ...] = ()

    @property
    def first(self) -> Pair | None:
        """The first pair that differs; None if none does."""
        return next(iter(self.parted), None)

    @property
    def parted(self) -> tuple[Pair, ...]:
        """The pairs that differ."""
        return tuple(pair for pair in self.pairs if pair.parts)


def compare(a: Report, b: Report) -> Comparison:
    """Compare two reports figure by figure.

    Args:
        a: the older report.
        b: the newer one.

    Raises:
        UsageError: one of them is no report.

    Example:
        >>> compare(report_of_main, report_of_branch).first           # doctest: +SKIP
        Pair(depth=0, part='W_2', figure='std', a='h.0.mlp.c_proj.weight', ...)
    """
    for report in (a, b):
        if not isinstance(report, Report):
            got = f"type {type(report).__name__}"
            hint = "jacdiag.audit(SOURCE), or Report.from_json(TEXT)"
            raise UsageError("compare takes two reports", got=got, hint=hint)
    pairs = [*_weight_pairs(a, b), *_sublayer_pairs(a, b)]
    return Comparison(tuple(sorted(pairs, key=_place)), tuple(_notes(a, b)))


def _notes(a: Report, b: Report) -> Iterable[str]:
    """Yield why figures may differ for a reason outside the models."""
    probe_of_a, probe_of_b = drawn_with(a), drawn_with(b)
    if parting(probe_of_a, probe_of_b):
        yield (
            f"the probes differ, and norms may differ by that alone: {spoken(probe_of_a)} of A, "
            f"{spoken(probe_of_b)} of B"
        )
    yield from _note_on_random_probes(a, b)
    yield from _notes_on_unmeasured(a, b)


def _notes_on_unmeasured(a: Report, b: Report) -> Iterable[str]:
    """Yield which sub-layers of a measured model have no norm to compare."""
    for letter, report in (("A", a), ("B", b)):
        # 1. A model whose weights alone were read has no norms at all.
        rows = numbered_rows(report.sublayers).values()
        names = [row.name for row in rows if row.branch_norm is None]
        if not names or len(names) == len(rows):
            continue

        # 2. The first few of them.
        listed = ", ".join(names[:_MOST_NAMES])
        if len(names) > _MOST_NAMES:
            listed += f" and {len(names) - _MOST_NAMES} more"
        yield f"not compared: branch norm of {listed}, not measured in {letter}"


def _note_on_random_probes(a: Report, b: Report) -> Iterable[str]:
    """Yield that norms of a trained model were measured with a random probe, if they were."""
    # 1. The models of which that is true.
    letters = [letter for letter, report in (("A", a), ("B", b)) if is_off_distribution(report)]
    if not letters:
        return

    # 2. What was random, and the option that gives a real probe.
    verb = "is"
    if len(letters) > 1:
        verb = "are"
    sources = [spoken(measured_with(report)) for report in (a, b)]
    noun, option = "tokens", "--tokens FILE with real text"
    is_of_pixels = "random pixels" in " ".join(sources)
    if is_of_pixels:
        noun, option = "pixels", "--inputs FACTORY with real images"

    # 3. The sentence.
    yield (
        f"{' and '.join(letters)} {verb} trained and measured on random {noun}, unlike the data of "
        f"the training: norms on real data may differ ({option})"
    )


def is_off_distribution(report: Report) -> bool:
    """Return whether norms of a trained model were measured with a random probe.

    Args:
        report: of a model.
    """
    # 1. A model that was not measured has no probe.
    facts = measured_with(report)
    if not facts:
        return False
    assert report.probe is not None

    # 2. No data are unlike those of a model that is not trained.
    is_trained = report.state == "trained"
    return is_trained and report.probe.off_distribution


def _place(pair: Pair) -> tuple[float, int, int]:
    """Return the place of a pair in the forward.

    The embedding is before layer 0, the head after the last. In a layer the weights are before the
    figures that they cause.
    """
    figure = 0  # a weight
    if pair.figure in FIGURES:
        figure = 1 + FIGURES.index(pair.figure)

    # Weights stand in the order of use.
    weight = len(_ORDER)
    if pair.part in _ORDER:
        weight = _ORDER.index(pair.part)
    return _depth_in_forward(pair), figure, weight


def _depth_in_forward(pair: Pair) -> float:
    """Return the layer of a pair, -1 before the first layer and infinity after the last."""
    if pair.depth is not None:
        return float(pair.depth)

    # Outside all layers.
    if pair.part in ("embedding", "positions"):
        return -1.0

    return math.inf


# -- sub-layers ------------------------------------------------------------------------------------
def _sublayer_pairs(a: Report, b: Report) -> Iterable[Pair]:
    """Yield the pairs of the figures of sub-layers, and those that one report lacks."""
    rows_of_a = numbered_rows(a.sublayers)
    rows_of_b = numbered_rows(b.sublayers)
    # A report of weights alone has none.
    if not rows_of_a or not rows_of_b:
        return

    # In the order of A, and then what B has alone.
    for key in dict.fromkeys((*rows_of_a, *rows_of_b)):
        yield from _pairs_of_sublayer(rows_of_a.get(key), rows_of_b.get(key))


def _pairs_of_sublayer(
    first: SublayerRecord | None, second: SublayerRecord | None
) -> Iterable[Pair]:
    """Return the pairs of the figures of one sub-layer; a single pair if one report lacks it."""
    # 1. Only one of the reports has it.
    if second is None:
        assert first is not None
        return [Pair(first.depth, first.kind, "sub-layer", first.name, "", None, None, True)]
    if first is None:
        return [Pair(second.depth, second.kind, "sub-layer", "", second.name, None, None, True)]

    # 2. Both have it.
    return _figure_pairs(first, second)


def _figure_pairs(first: SublayerRecord, second: SublayerRecord) -> Iterable[Pair]:
    """Yield the pairs of the figures of one sub-layer that either report has."""
    names = (first.name, second.name)
    for figure in FIGURES:
        old = ends_of(first, figure)
        new = ends_of(second, figure)
        # Neither report has it: the sub-layer has no norm, or it was not measured.
        if (old, new) == (None, None):
            continue

        yield Pair(first.depth, first.kind, figure, *names, old, new, are_apart(old, new))


class StreamSublayer(Protocol):
    """What a sub-layer is matched by, measured or not."""

    @property
    def name(self) -> str:
        """Its name in the model."""

    @property
    def depth(self) -> int:
        """The number of its layer."""

    @property
    def norm_inside(self) -> bool | None:
        """Whether a call that may be a norm lies in the branch; None if that is not known."""

    @property
    def kind(self) -> Any:
        """Such as "attention" or "mlp"."""

    @property
    def placement(self) -> Any:
        """Where its norm stands; None if it is not on the stream."""

    @property
    def nested(self) -> bool:
        """Whether it is part of another sub-layer."""


Row = TypeVar("Row", bound=StreamSublayer)


def numbered_rows(rows: Iterable[Row]) -> dict[Key, Row]:
    """Return the sub-layers on the stream by depth, kind, and number among those of that kind."""
    seen: dict[Key, int] = {}
    numbered: dict[Key, Row] = {}
    for row in rows:
        # One inside another, or off the stream, has no counterpart by depth.
        if row.placement is None or row.nested:
            continue

        key: Key = (row.depth, row.kind)
        seen[key] = seen.get(key, 0) + 1
        numbered[(*key, seen[key])] = row

    return numbered


def ends_of(row: SublayerRecord, figure: str) -> Ends | None:
    """Return lower end, middle and upper end of a figure; None if it was not measured."""
    value = getattr(row, figure)
    if value is None:
        return None
    # 1. A figure over tokens, without an interval.
    if not isinstance(value, Interval):
        return value.min, value.median, value.max

    # 2. The gain of a norm is exact for each token, and varies from one to the next.
    tokens = value.per_token
    if figure == "norm_gain" and tokens is not None:
        return tokens.median, tokens.p99, tokens.max

    # 3. Any other figure, measured for the probe in one piece.
    return value.lower, value.estimate, value.upper


def are_apart(old: Ends | None, new: Ends | None) -> bool:
    """Return whether two intervals have no value in common, but for rounding.

    Args:
        old: lower end, middle and upper end.
        new: those of the other interval.
    """
    # One that was not measured says nothing.
    if old is None or new is None:
        return False

    # NaN is apart from everything.
    if _has_nan(old) or _has_nan(new):
        return True

    return _is_above(old, new) or _is_above(new, old)


def _has_nan(ends: Ends) -> bool:
    """Return whether an end or the middle of an interval is not a number."""
    return any(math.isnan(end) for end in ends)


def _is_above(upper: Ends, lower: Ends) -> bool:
    """Return whether an interval lies above another one."""
    return upper[0] * (1 - _ROUNDING) > lower[2] * (1 + _ROUNDING)


# -- weights ---------------------------------------------------------------------------------------
def _weight_pairs(a: Report, b: Report) -> Iterable[Pair]:
    """Yield the pairs of the std of weights, and those that one report lacks."""
    # 1. Fuse what the other model has fused.
    weights_of_a, weights_of_b = numbered_weights(a), numbered_weights(b)
    fused_a = _fuse_like(weights_of_a, weights_of_b)
    fused_b = _fuse_like(weights_of_b, weights_of_a)
    # 2. Pair them. A report without a contract has no weights.
    if not fused_a or not fused_b:
        return

    for key in dict.fromkeys((*fused_a, *fused_b)):
        yield _pair_of_weight(fused_a.get(key), fused_b.get(key))


def _pair_of_weight(first: WeightRecord | None, second: WeightRecord | None) -> Pair:
    """Return the pair of the stds of one weight."""
    # 1. One report lacks the weight.
    old, new = _std(first), _std(second)
    if second is None:
        assert first is not None
        return Pair(first.layer, first.role, "std", first.parameter, "", old, new, True)
    if first is None:
        return Pair(second.layer, second.role, "std", "", second.parameter, old, new, True)

    # 2. Both have it.
    names = (first.parameter, second.parameter)
    return Pair(first.layer, first.role, "std", *names, old, new, are_apart(old, new))


def numbered_weights(report: Report) -> dict[Key, WeightRecord]:
    """Return the weights that have a role by layer, role, and number among those of that role."""
    if report.contract is None:
        return {}

    seen: dict[Key, int] = {}
    numbered: dict[Key, WeightRecord] = {}
    for weight in report.contract.weights:
        if weight.role in _NOT_COMPARED:
            continue

        key: Key = (weight.layer, weight.role)
        seen[key] = seen.get(key, 0) + 1
        numbered[(*key, seen[key])] = weight

    return numbered


Weights = dict[Key, WeightRecord]


def _fuse_like(weights: Weights, model: Mapping[Key, WeightRecord]) -> Weights:
    """Return weights with those put together that another model has fused."""
    fused = dict(weights)
    for key in model:
        # 1. The parts that the other model's weight is made of; none if it is not fused.
        parts = _parts_of(key)
        is_fused_in_both = key in fused
        if not parts or is_fused_in_both:
            continue

        # 2. One weight in place of all of them.
        if fused.keys() >= set(parts):
            _, role, _ = key
            fused[key] = _put_together([fused.pop(part) for part in parts], str(role))

    return fused


def _parts_of(key: Key) -> list[Key]:
    """Return the keys of the weights that a fused weight holds; [] if it is not fused."""
    layer, role, number = key
    return [(layer, part, number) for part in FUSED.get(str(role), ())]


def _put_together(weights: Sequence[WeightRecord], role: str) -> WeightRecord:
    """Return several weights as one: their mean square, and the interval that theirs make."""
    return replace(
        weights[0],
        parameter=" + ".join(weight.parameter for weight in weights),
        role=role,
        std=_pooled(weights, "std"),
        lower=_pooled(weights, "lower"),
        upper=_pooled(weights, "upper"),
    )


def _pooled(weights: Sequence[WeightRecord], figure: str) -> float | None:
    """Return the root mean square of a figure of weights; None if one lacks it.

    The draws have mean zero, so their variances add up by the share of numbers that each holds.
    """
    sizes = [math.prod(weight.shape) for weight in weights]
    squares = []
    for size, weight in zip(sizes, weights, strict=True):
        value = getattr(weight, figure)
        # A constant has no interval, and no std that adds up.
        if value is None:
            return None

        squares.append(size * value * value)

    return math.sqrt(sum(squares) / sum(sizes))


def _std(weight: WeightRecord | None) -> Ends | None:
    """Return the std of a weight with its interval; None if it was not measured."""
    if weight is None:
        return None

    ends = (weight.lower, weight.std, weight.upper)
    # A constant has no interval.
    if None in ends:
        return None

    return cast(Ends, ends)
