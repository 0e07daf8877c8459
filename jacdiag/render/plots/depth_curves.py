"""What the picture draws, as plain lists: curves over depth taken from a report."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jacdiag.records import Interval, Report, SublayerRecord

INK, PALE = "#222222", "#777777"


@dataclass(frozen=True)
class Look:
    """How a kind of sub-layer is drawn. The tones differ in lightness, so that a grey print tells
    them apart.
    """

    label: str
    kinds: tuple[str, ...]
    colour: str
    marker: str


LOOKS = (
    Look("attention", ("attention",), "#17406d", "o"),
    Look("FFN", ("mlp", "moe"), "#e08a2e", "s"),
    Look("other", ("mixer", "conv", "other"), "#6aa67a", "^"),
)


@dataclass(frozen=True)
class Curve:
    """Values over depth: positive, or nan where there is none; `low` and `high` make the band,
    where there is one.

    A `high` that is inf stands for an interval without an upper end.
    """

    label: str
    x: list[float]
    y: list[float]
    colour: str
    marker: str = ""
    dashed: bool = False
    low: list[float] | None = None
    high: list[float] | None = None

    @property
    def finite(self) -> list[float]:
        return [value for value in self.y if math.isfinite(value)]

    @property
    def lonely(self) -> list[int]:
        """Points without a neighbour: a line alone would not show them."""
        known = [False, *(math.isfinite(value) for value in self.y), False]
        return [k for k in range(len(self.y)) if known[k + 1] and not known[k] and not known[k + 2]]


def places(report: Report) -> dict[str, float]:
    """Where each sub-layer stands on the depth axis: its depth, and evenly spread within it."""
    by_depth: dict[int, list[str]] = {}
    for row in report.sublayers:
        by_depth.setdefault(row.depth, []).append(row.name)
    return {
        name: depth + k / len(names)
        for depth, names in by_depth.items()
        for k, name in enumerate(names)
    }


def gains(report: Report) -> list[Curve]:
    """The upper panel: branch norms per kind with their bands, and the paper's bound per kind,
    dashed.
    """
    curves = [_intervals(report, look, "branch_norm", look.label) for look in LOOKS]
    curves += [_bound(report, look) for look in LOOKS]
    curves += [_earlier(report, look) for look in LOOKS]
    return [curve for curve in curves if curve.finite]


def is_split(report: Report) -> bool:
    """Whether the branch norms come with their two factors, which only a norm at the branch's
    beginning gives.
    """
    return any(row.norm_gain and row.core_norm for row in report.sublayers)


def factors(report: Report) -> list[Curve]:
    """The lower panel: core ‖J‖ per kind and 1/σ_x; without an input norm, the whole residual map
    instead.
    """
    if report.tier == "weights":
        return []
    if is_split(report):
        curves = [_intervals(report, look, "core_norm", f"core, {look.label}") for look in LOOKS]
        curves.append(_single(report, "norm_gain", "1/σ gain"))
    else:
        curves = [
            _single(report, "residual_norm", "‖aI + J‖"),
            _single(report, "out_norm_gain", "out-norm gain"),
        ]
    return [curve for curve in curves if curve.finite]


def missing(report: Report) -> list[float]:
    """Where sub-layers stand that should have a branch norm and have none, or one that is not
    finite.
    """
    if report.tier == "weights":
        return []
    at = places(report)
    return [
        at[row.name]
        for row in report.sublayers
        if not row.branch_norm
        or not (row.branch_norm.estimate == 0 or _drawn(row.branch_norm.estimate))
    ]


def zeros(report: Report) -> list[float]:
    """Where branches stand that add nothing, as a projection at zero makes them: a log scale has no
    place for 0.
    """
    at = places(report)
    return [
        at[row.name]
        for row in report.sublayers
        if row.branch_norm and row.branch_norm.estimate == 0
    ]


def _drawn(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0


_NOTHING = Interval.exact(math.nan)


def _pick(report: Report, kinds: tuple[str, ...], key: str) -> list[tuple[float, Interval]]:
    at = places(report)
    found = []
    for row in report.sublayers:
        value: Interval | None = getattr(row, key)
        if row.kind in kinds:
            found.append(
                (at[row.name], value if value is not None and _drawn(value.estimate) else _NOTHING)
            )
    return found


def _intervals(report: Report, look: Look, key: str, label: str) -> Curve:
    points = _pick(report, look.kinds, key)
    return Curve(
        label,
        [x for x, _ in points],
        [value.estimate for _, value in points],
        look.colour,
        look.marker,
        # 0 has no place on a log scale
        low=[max(value.lower, 1e-3 * value.estimate) for _, value in points],
        high=[value.upper for _, value in points],
    )


def _single(report: Report, key: str, label: str) -> Curve:
    everything = tuple(kind for look in LOOKS for kind in look.kinds)
    points = _pick(report, everything, key)
    colour, dashed = (PALE, True) if key == "out_norm_gain" else (INK, False)
    return Curve(
        label,
        [x for x, _ in points],
        [value.estimate for _, value in points],
        colour,
        dashed=dashed,
    )


def _earlier(report: Report, look: Look) -> Curve:
    """The branch norms of the model that this one is compared with, dashed; empty without a
    comparison.
    """
    at = places(report)
    norms = report.against.branch_norms if report.against is not None else {}
    rows = [row for row in report.sublayers if row.kind in look.kinds and row.name in norms]
    values = [norms[row.name][1] for row in rows]
    drawn = [value if _drawn(value) else math.nan for value in values]
    return Curve("earlier", [at[row.name] for row in rows], drawn, look.colour, dashed=True)


def _bound(report: Report, look: Look) -> Curve:
    at = places(report)
    rows = [row for row in report.sublayers if row.kind in look.kinds and _drawn(row.bound)]
    marker = look.marker if report.tier == "weights" else ""
    x, y = [at[row.name] for row in rows], [_excess(row) for row in rows]
    label = look.label if report.tier == "weights" else "paper's bound − 1"
    return Curve(label, x, y, look.colour, marker, dashed=True)


def _excess(row: SublayerRecord) -> float:
    """The bound is on |I + J|; what it grants the branch itself is the excess over 1."""
    assert row.bound is not None
    return row.bound - 1 if row.bound > 1 else math.nan


def extent(curves: list[Curve]) -> tuple[float, float]:
    """The smallest and largest value of a panel, bands included, at least a factor 3 apart."""
    values = [
        value
        for curve in curves
        for part in (curve.y, curve.low, curve.high)
        for value in part or []
    ]
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite), max(finite)
    widen = max(1.0, math.sqrt(3 * low / high))
    return low / widen, high * widen
