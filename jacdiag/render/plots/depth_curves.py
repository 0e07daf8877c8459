"""What the picture of a report draws: curves over depth as plain lists, marks and thresholds."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from jacdiag.records import Interval, Report, SublayerRecord
from jacdiag.records.number_format import three
from jacdiag.render.content.sentences import condition, worst_branch
from jacdiag.render.content.severity import FIELD_OF_RULE, drawn_threshold

INK, PALE = "#222222", "#6b6b6b"
_NOTHING = Interval.exact(math.nan)


@dataclass(frozen=True)
class Look:
    """How a kind of sub-layer is drawn. The tones differ in lightness, for a print in grey.

    A reader who cannot tell red from green tells them by the same lightness.
    """

    label: str
    kinds: tuple[str, ...]
    colour: str
    marker: str


LOOKS = (
    Look("attention", ("attention",), "#17406d", "o"),
    Look("FFN", ("mlp", "moe"), "#d67d22", "s"),
    Look("other", ("mixer", "conv", "other"), "#276f51", "^"),
)
_MOST_RUNS = 4  # stretches of layers that a sentence lists
_SHARED = re.compile(r"@(?P<call>\d+)(?=$|[:.])")  # of a module that is called several times
_CONDITIONS = {"JD101": "Small sub-layers", "JD102": "Large shortcut"}
_STATUS_WORDS = {
    "partly": "partly met",
    "unknown": "undecided",
    "not applicable": "does not apply",
    "not selected": "was not judged",
}
_CUT_WORDS = {"info": "met up to", "warning": "not met above", "error": "error above"}
_ALL_KINDS = tuple(kind for look in LOOKS for kind in look.kinds)


@dataclass(frozen=True)
class DepthCurve:
    """Values over depth.

    Attributes:
        label: its name at the right end.
        x: places on the depth axis.
        y: positive values; nan where there is none.
        colour, marker, dashed: how it is drawn.
        earlier: it is of the earlier model; drawn in dashes and dots.
        over_tokens: it is the 99th percentile over tokens, and its band is their range from the
            median to the largest.
        low, high: the band, if there is one. A `high` that is inf stands for an interval without
            an upper end.
    """

    label: str
    x: list[float]
    y: list[float]
    colour: str
    marker: str = ""
    dashed: bool = False
    earlier: bool = False
    over_tokens: bool = False
    low: list[float] | None = None
    high: list[float] | None = None

    @property
    def finite(self) -> list[float]:
        """The values that are finite."""
        return [value for value in self.y if math.isfinite(value)]

    @property
    def lonely(self) -> list[int]:
        """Points without a neighbour: a line alone would not show them."""
        # One more place on each side, so that every point has two neighbours.
        is_known = [False, *map(math.isfinite, self.y), False]
        lonely = []
        for place in range(1, len(is_known) - 1):
            has_neighbour = is_known[place - 1] or is_known[place + 1]
            if is_known[place] and not has_neighbour:
                lonely.append(place - 1)
        return lonely


@dataclass(frozen=True)
class Threshold:
    """A threshold on the figure of a panel.

    Attributes:
        level: of the rule that fires above it; "info" where a condition ceases to be met.
        value: where it lies.
        text: its label.
        colour: of the kind of sub-layer that it is for.
    """

    level: str
    value: float
    text: str
    colour: str = INK


@dataclass(frozen=True)
class WorstBranch:
    """The sub-layer with the largest branch norm, and its place on the depth axis.

    `shown` is its name with its depth if its module is applied at several depths.
    """

    name: str
    shown: str
    place: float
    norm: Interval


@dataclass(frozen=True)
class ConditionPanel:
    """One of the two conditions of the paper: its figure over depth with its targets.

    Attributes:
        code: of the rule that judges it.
        title: the condition and how it came out, with the layers that miss it.
        figure: what the vertical axis shows.
        curves: per kind of sub-layer, or one for all.
        targets: where the condition ceases to be met; none if no rule decides on this model.
        missed: place and value of each sub-layer that does not meet the condition in full.
    """

    code: str
    title: str
    figure: str
    curves: list[DepthCurve]
    targets: list[Threshold]
    missed: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class DepthView:
    """The panels of a report's picture.

    Attributes:
        measured: norms were measured; else the upper panel shows the paper's bound.
        gains: the upper panel: branch norms and bounds, per kind of sub-layer.
        residuals: the lower panel of a model whose branches do not begin with a norm.
        conditions: the two lower panels of a model whose branches do. A picture has these or
            `residuals`.
        missing: places of sub-layers that should have a branch norm and have none.
        zeros: places of branches that add nothing.
        last: the largest place on the depth axis.
        worst: the largest branch norm; None if none is finite.
        gain_limits: thresholds on branch norms.
        names: place on the depth axis -> name of the sub-layer.
    """

    measured: bool
    gains: list[DepthCurve]
    residuals: list[DepthCurve]
    conditions: list[ConditionPanel]
    missing: list[float]
    zeros: list[float]
    last: float
    worst: WorstBranch | None
    gain_limits: list[Threshold]
    names: dict[float, str]


def build_depth_view(report: Report) -> DepthView:
    """Build what a picture draws of a report.

    Args:
        report: of either tier and state.
    """
    at = places(report)
    shown = shown_names(report)
    return DepthView(
        measured=report.tier == "measured",
        gains=_gains(report),
        residuals=_residuals(report),
        conditions=_conditions(report),
        missing=_missing(report),
        zeros=_zeros(report),
        last=max(at.values(), default=1.0),
        worst=_worst(report, at, shown),
        gain_limits=_gain_limits(report),
        names={place: shown[name] for name, place in at.items()},
    )


def shown_names(report: Report) -> dict[str, str]:
    """Return the name of each sub-layer as a picture has it.

    A module that is applied at several depths is named "attention" at its first call and
    "attention@5" at its fifth, which is at another depth. A picture writes the depth.

    Args:
        report: of either tier and state.
    """
    # 1. The names that stand for several calls of a module.
    names = [row.name for row in report.sublayers]
    shared = {_SHARED.sub("", name) for name in names if _SHARED.search(name)}

    # 2. Each with its depth, and which call it is.
    shown = {}
    for row in report.sublayers:
        shown[row.name] = row.name
        module = _SHARED.sub("", row.name)
        if module in shared:
            call = _SHARED.search(row.name)
            number = "1"
            if call:
                number = call["call"]
            shown[row.name] = f"{module} at depth {row.depth} (call {number})"
    return shown


def places(report: Report) -> dict[str, float]:
    """Return where each sub-layer stands on the depth axis: evenly spread within its depth."""
    # 1. The sub-layers of each depth.
    by_depth: dict[int, list[str]] = {}
    for row in report.sublayers:
        by_depth.setdefault(row.depth, []).append(row.name)

    # 2. Their places from this depth to the next.
    at: dict[str, float] = {}
    for depth, names in by_depth.items():
        for k, name in enumerate(names):
            at[name] = depth + k / len(names)
    return at


# -- curves ----------------------------------------------------------------------------------------
def _gains(report: Report) -> list[DepthCurve]:
    """Return branch norms per kind with their bands; bounds and earlier norms are dashed."""
    norms, bounds, earlier = [], [], []
    for look in LOOKS:
        norms.append(_intervals(report, look, "branch_norm", look.label))
        bounds.append(_bound(report, look))
        earlier.append(_earlier(report, look))
    return _drawable([*norms, *bounds, *earlier])


def _drawable(curves: list[DepthCurve]) -> list[DepthCurve]:
    """Return the curves that have something to show."""
    return [curve for curve in curves if curve.finite]


def _is_split(report: Report) -> bool:
    """Return whether branch norms come with their two factors.

    Only a norm at the branch's beginning gives them.
    """
    return any(row.norm_gain and row.core_norm for row in report.sublayers)


def _residuals(report: Report) -> list[DepthCurve]:
    """Return the residual map and the gain of a norm at the branch's end.

    Nothing of branches that begin with a norm: those are split into two factors.
    """
    if report.tier == "weights" or _is_split(report):
        return []
    curves = [
        _single(report, "residual_norm", "‖aI + J‖"),
        _single(report, "out_norm_gain", "out-norm gain"),
    ]
    return _drawable(curves)


def _is_drawable(value: float | None) -> bool:
    """Return whether a log scale has a place for a value."""
    return value is not None and math.isfinite(value) and value > 0


def _pick(report: Report, kinds: tuple[str, ...], key: str) -> list[tuple[float, Interval]]:
    """Return place and interval of a figure; an interval of nan where nothing can be drawn."""
    at = places(report)
    points = []
    for row in report.sublayers:
        if row.kind not in kinds:
            continue

        # A gap, so that the line does not cross a sub-layer without a figure.
        interval: Interval | None = getattr(row, key)
        if interval is None or not _is_drawable(interval.estimate):
            interval = _NOTHING
        points.append((at[row.name], interval))
    return points


def _intervals(report: Report, look: Look, key: str, label: str) -> DepthCurve:
    """Return a figure of one kind of sub-layers with its intervals as a band."""
    x, y, low, high = [], [], [], []
    for place, interval in _pick(report, look.kinds, key):
        x.append(place)
        y.append(interval.estimate)
        # 0 has no place on a log scale.
        low.append(max(interval.lower, 1e-3 * interval.estimate))
        high.append(interval.upper)
    return DepthCurve(label, x, y, look.colour, look.marker, low=low, high=high)


def _scaled_cores(report: Report, look: Look) -> DepthCurve:
    """Return core ‖J‖·√(2N) of one kind of sub-layers, as the condition has it."""
    curve = _intervals(report, look, "core_norm", look.label)
    scale = _core_scale(report)
    y, low, high = (
        [scale * value for value in values]
        for values in (curve.y, curve.low or [], curve.high or [])
    )
    return DepthCurve(look.label, curve.x, y, look.colour, look.marker, low=low, high=high)


def _core_scale(report: Report) -> float:
    """Return √(2N), with N the number of layers."""
    return math.sqrt(2 * max(report.model.layers, 1))


def _norm_gains(report: Report) -> DepthCurve:
    """Return 1/σ of all kinds: its 99th percentile over tokens, from their median to the largest.

    The condition is judged by that percentile.
    """
    x, y, low, high = [], [], [], []
    for place, interval in _pick(report, _ALL_KINDS, "norm_gain"):
        least, value, most = interval.lower, interval.estimate, interval.upper
        spread = interval.per_token
        if spread is not None and _is_drawable(spread.p99):
            least, value, most = spread.median, spread.p99, spread.max
        x.append(place)
        y.append(value)
        low.append(least)
        high.append(most)
    return DepthCurve("1/σ", x, y, INK, "d", over_tokens=True, low=low, high=high)


def _single(report: Report, key: str, label: str) -> DepthCurve:
    """Return a figure of all kinds of sub-layers as one curve without a band."""
    x, y = [], []
    for place, interval in _pick(report, _ALL_KINDS, key):
        x.append(place)
        y.append(interval.estimate)

    # The gain of a norm at the branch's end stands next to the figure of the panel.
    if key == "out_norm_gain":
        return DepthCurve(label, x, y, PALE, dashed=True)
    return DepthCurve(label, x, y, INK)


def _earlier(report: Report, look: Look) -> DepthCurve:
    """Return the branch norms of the earlier model, dashed; empty without a comparison."""
    norms = {}
    if report.against is not None:
        norms = report.against.branch_norms
    at = places(report)
    x, y = [], []
    for row in report.sublayers:
        # The earlier model may lack a sub-layer.
        is_shown = row.kind in look.kinds and row.name in norms
        if not is_shown:
            continue
        _, estimate, _ = norms[row.name]
        if not _is_drawable(estimate):
            estimate = math.nan
        x.append(at[row.name])
        y.append(estimate)
    return DepthCurve("earlier model", x, y, look.colour, dashed=True, earlier=True)


def _bound(report: Report, look: Look) -> DepthCurve:
    """Return the paper's bound, less 1; of weights alone it is the figure that is shown."""
    at = places(report)
    x, y = [], []
    for row in report.sublayers:
        is_shown = row.kind in look.kinds and _is_drawable(row.bound)
        if is_shown:
            x.append(at[row.name])
            y.append(_excess(row))
    if report.tier == "weights":
        return DepthCurve(look.label, x, y, look.colour, look.marker, dashed=True)
    return DepthCurve("paper's bound − 1", x, y, look.colour, dashed=True)


def _excess(row: SublayerRecord) -> float:
    """Return what the bound, which is on |I + J|, leaves for the branch: its excess over 1."""
    bound = row.bound
    assert bound is not None
    if bound > 1:
        return bound - 1
    return math.nan  # nothing, or a bound that was rounded below 1


def extent(curves: list[DepthCurve]) -> tuple[float, float]:
    """Return the smallest and largest value of a panel, bands included.

    The two are at least a factor of 3 apart.

    Args:
        curves: with at least one finite value.
    """
    # 1. All that is drawn.
    values: list[float] = []
    for curve in curves:
        values += curve.y
        values += curve.low or []
        values += curve.high or []
    finite = [value for value in values if math.isfinite(value)]

    # 2. Its ends, moved apart on the log scale if they are too near.
    low, high = min(finite), max(finite)
    widen = max(1.0, math.sqrt(3 * low / high))
    return low / widen, high * widen


# -- marks and thresholds --------------------------------------------------------------------------
def _missing(report: Report) -> list[float]:
    """Return places of sub-layers whose branch norm is absent or not finite."""
    if report.tier == "weights":
        return []
    at = places(report)
    missing = []
    for row in report.sublayers:
        norm = None
        if row.branch_norm:
            norm = row.branch_norm.estimate
        # A norm of 0 has a sign of its own.
        is_missing = norm != 0 and not _is_drawable(norm)
        if is_missing:
            missing.append(at[row.name])
    return missing


def _zeros(report: Report) -> list[float]:
    """Return places of branches that add nothing: a log scale has no place for 0."""
    at = places(report)
    zeros = []
    for row in report.sublayers:
        norm = row.branch_norm
        if norm and norm.estimate == 0:
            zeros.append(at[row.name])
    return zeros


def _worst(report: Report, at: dict[str, float], shown: dict[str, str]) -> WorstBranch | None:
    """Return the largest branch norm with its place on the depth axis."""
    worst = worst_branch(report)
    if worst is None:
        return None
    row, norm = worst
    return WorstBranch(row.name, shown[row.name], at[row.name], norm)


def _gain_limits(report: Report) -> list[Threshold]:
    """Return the thresholds on branch norms at which a rule fires, with their labels."""
    # 1. Which placement they are for, if there are several.
    prefix = ""
    stratum = _stratum(report)
    if stratum:
        prefix = f"{stratum}, "

    # 2. The thresholds.
    limits = []
    for level in ("warning", "error"):
        value = drawn_threshold(report, "branch_norm", level)
        if value is not None:
            limits.append(Threshold(level, value, f"{prefix}{level} above {_plain(value)}"))
    return limits


def _plain(value: float) -> str:
    """Return a threshold as the user wrote it: 12.5, not 12.5000."""
    if 1e-4 <= value < 1e5:
        return f"{float(f'{value:.3g}'):,.10g}"
    return three(value)


def _stratum(report: Report) -> str:
    """Return the placement that thresholds on gains are for; "" if the model has one alone."""
    placements = {row.placement for row in report.sublayers}
    if len(placements - {None}) < 2:
        return ""

    # An older report does not say which.
    usual = report.settings.get("stratum")
    if not usual:
        return "the most frequent placement"
    return f"{usual}-norm"


# -- the two conditions of the paper ---------------------------------------------------------------
def _conditions(report: Report) -> list[ConditionPanel]:
    """Return a panel for each condition; none if branch norms have no two factors."""
    if report.tier == "weights" or not _is_split(report):
        return []
    cores = _drawable([_scaled_cores(report, look) for look in LOOKS])
    gains = _drawable([_norm_gains(report)])
    return [
        _condition_panel(report, "JD101", "core ‖J‖·√(2N)", cores, _core_targets(report)),
        _condition_panel(report, "JD102", "norm gain 1/σ", gains, _gain_targets(report)),
    ]


def _condition_panel(
    report: Report, code: str, figure: str, curves: list[DepthCurve], targets: list[Threshold]
) -> ConditionPanel:
    """Return the panel of one condition.

    Args:
        report: what is drawn.
        code: of the rule that judges the condition.
        figure: what the vertical axis shows.
        curves: the figure over depth.
        targets: where the condition ceases to be met.
    """
    # 1. The sub-layers that the rule named. One that only observes calls none of them wrong.
    partly_cuts = [target.value for target in targets if target.level == "info"]
    failed, partly = set(), set()
    for finding in report.findings:
        if finding.code != code:
            continue
        if _is_among(finding.evidence.get("threshold"), partly_cuts):
            partly.update(finding.where)
        else:
            failed.update(finding.where)
    rows_failed = [row for row in report.sublayers if row.name in failed]
    rows_partly = [row for row in report.sublayers if row.name in partly - failed]
    title = f"{_CONDITIONS[code]}: {_outcome(report, code, rows_failed, rows_partly, targets)}"
    rows = [*rows_failed, *rows_partly]
    if not targets:
        rows = []

    # 2. Their points.
    at = places(report)
    values: dict[float, float] = {}
    for curve in curves:
        values.update(zip(curve.x, curve.y, strict=True))
    missed = []
    for row in rows:
        value = values.get(at[row.name], math.nan)
        if math.isfinite(value):
            missed.append((at[row.name], value))
    return ConditionPanel(code, title, figure, curves, targets, missed)


def _is_among(value: object, cuts: Iterable[float]) -> bool:
    """Return whether a value is one of some cuts, up to rounding."""
    if not isinstance(value, float | int):
        return False
    return any(math.isclose(value, cut, rel_tol=1e-6) for cut in cuts)


def _outcome(
    report: Report,
    code: str,
    failed: Iterable[SublayerRecord],
    partly: Iterable[SublayerRecord],
    targets: list[Threshold],
) -> str:
    """Return how a condition came out, with the layers that miss it.

    Args:
        report: what is drawn.
        code: of the rule that judges the condition.
        failed: sub-layers that do not meet it.
        partly: sub-layers that meet it in part.
        targets: where it ceases to be met.
    """
    # 1. A rule that only observes has no target.
    if report.state == "trained" and not targets:
        return "no target, the model is trained"

    # 2. The layers that miss it, each once.
    status = _STATUS_WORDS.get(condition(report, code), condition(report, code))
    failed_depths = {row.depth for row in failed}
    partly_depths = {row.depth for row in partly} - failed_depths
    parts = []
    if failed_depths:
        parts.append(f"not met in {_layer_words(sorted(failed_depths))}")
    if partly_depths:
        parts.append(f"partly met in {_layer_words(sorted(partly_depths))}")
    if not parts:
        return status
    return f"{', '.join(parts)} (of {report.model.layers})"


def _layer_words(depths: list[int]) -> str:
    """Return layers in words: "layer 0", "layers 0 to 3, 7 and 2 more".

    >>> _layer_words([0, 1, 2, 5])
    'layers 0 to 2, 5'
    """
    # 1. Stretches of neighbours.
    stretches: list[list[int]] = []
    for depth in depths:
        if stretches and depth == stretches[-1][-1] + 1:
            stretches[-1].append(depth)
        else:
            stretches.append([depth])

    # 2. The first few in words.
    words = []
    for stretch in stretches[:_MOST_RUNS]:
        first, last = stretch[0], stretch[-1]
        if last > first + 1:
            words.append(f"{first} to {last}")
        else:
            words += map(str, stretch)

    # 3. How many are left out.
    text = ", ".join(words)
    beyond = sum(len(stretch) for stretch in stretches[_MOST_RUNS:])
    if beyond:
        text += f" and {beyond} more"
    if len(depths) == 1:
        return f"layer {text}"
    return f"layers {text}"


def _core_targets(report: Report) -> list[Threshold]:
    """Return where core ‖J‖·√(2N) ceases to meet its condition, for each kind that is drawn."""
    # 1. The cuts, and the looks that share each of them.
    scale = _core_scale(report)
    kinds = {row.kind for row in report.sublayers}
    looks_of: dict[tuple[str, float], list[Look]] = {}
    for look in LOOKS:
        for kind in look.kinds:
            for level in _CUT_WORDS:
                value = _core_cut(report, kind, level)
                is_new = value is not None and look not in looks_of.get((level, value), [])
                if kind in kinds and value is not None and is_new:
                    looks_of.setdefault((level, value), []).append(look)

    # 2. Their labels. A cut for all kinds needs none of their names.
    drawn = [look for look in LOOKS if kinds & set(look.kinds)]
    targets = []
    for (level, value), looks in looks_of.items():
        text = f"{_CUT_WORDS[level]} {_plain(value * scale)}"
        colour = INK
        if len(looks) < len(drawn):
            text = f"{' and '.join(look.label for look in looks)} {text}"
            colour = looks[0].colour
        targets.append(Threshold(level, value * scale, text, colour))
    return targets


def _core_cut(report: Report, kind: str, level: str) -> float | None:
    """Return a cut of the core norm of one kind; that of all kinds in an older report."""
    field_of_kind = f"{FIELD_OF_RULE['JD101']}.{kind}"
    if field_of_kind in report.settings.get("thresholds", {}):
        return drawn_threshold(report, field_of_kind, level)
    return drawn_threshold(report, FIELD_OF_RULE["JD101"], level)


def _gain_targets(report: Report) -> list[Threshold]:
    """Return where 1/σ ceases to meet its condition."""
    targets = []
    for level, words in _CUT_WORDS.items():
        value = drawn_threshold(report, FIELD_OF_RULE["JD102"], level)
        if value is not None:
            targets.append(Threshold(level, value, f"{words} {_plain(value)}"))
    return targets
