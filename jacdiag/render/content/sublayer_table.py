"""The table of sub-layers before it is laid out: which rows, columns, texts and marks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from jacdiag.records import AgainstRecord, Interval, Report, SublayerRecord
from jacdiag.records.number_format import ABSENT, spoken, three
from jacdiag.render.content.number_cells import aligned, bar
from jacdiag.render.content.severity import LOUDNESS, SIGNS, guilty, marks

_SHOWN_IN_FULL = 16  # a table this long needs no folding
_HEAD, _TAIL, _NOTABLE = 6, 2, 4
_END_ROLES = {"first": ("W_Q", "W_QKV", "W_1"), "last": ("W_O", "W_2")}


@dataclass(frozen=True)
class SublayerColumn:
    """One column of the visible rows.

    Attributes:
        key: of the figure in a record.
        title: of the column.
        interest: rank; on a narrow terminal the least interesting column goes first.
        cells: texts, padded to one width.
        levels: of the mark of each cell, "" for none.
        left: whether the texts are aligned at the left.
    """

    key: str
    title: str
    interest: int
    cells: list[str]
    levels: list[str]
    left: bool = False

    @property
    def marked(self) -> bool:
        """Whether one of the visible cells has a mark."""
        return any(SIGNS[level] for level in self.levels)


@dataclass(frozen=True)
class Gap:
    """Rows that are folded away, and what they are like; `brief` is for a narrow table."""

    rows: list[SublayerRecord]
    text: str
    brief: str


@dataclass(frozen=True)
class Grid:
    """The columns of the visible rows, and the folds between them.

    Attributes:
        columns: from left to right.
        rows: the visible sub-layers.
        gaps: folds, by the number of visible rows above each.
    """

    columns: list[SublayerColumn]
    rows: list[SublayerRecord]
    gaps: dict[int, Gap]


def build(report: Report, *, all_rows: bool = False, sort: str = "depth") -> Grid:
    """Build the grid of a report's sub-layers.

    Args:
        report: any report, of either tier and state.
        all_rows: show every row; else long models are folded.
        sort: "depth" (as the model runs) or "worst" (largest branch norm first).
    """
    records = list(report.sublayers)
    if sort == "worst":
        records.sort(key=lambda row: -badness(row))

    # The loudest mark of each sub-layer: later entries of a dict win.
    levels = marks(report)
    loudest = {}
    for (name, _), level in sorted(levels.items(), key=lambda item: LOUDNESS.index(item[1])):
        loudest[name] = level

    shown = set(range(len(records)))
    if not all_rows:
        shown = _visible(records, loudest, sort)
    rows = [row for place, row in enumerate(records) if place in shown]
    return Grid(_columns(report, rows, levels), rows, _gaps(records, shown, loudest))


def badness(row: SublayerRecord) -> float:
    """Return what a sub-layer is sorted by: its branch norm, else the paper's bound.

    What is not finite counts as the worst.
    """
    value = row.bound
    if row.branch_norm:
        value = row.branch_norm.estimate
    if value is None:
        return -math.inf
    if not math.isfinite(value):
        return math.inf
    return value


# -- rows ------------------------------------------------------------------------------------------
def _visible(records: list[SublayerRecord], loudest: dict[str, str], sort: str) -> set[int]:
    """Return the places of the rows that are not folded away."""
    count = len(records)
    if count <= _SHOWN_IN_FULL:
        return set(range(count))
    if sort == "worst":
        return set(range(_SHOWN_IN_FULL - _NOTABLE))

    # 1. The first rows and the last ones.
    shown = {*range(_HEAD), *range(count - _TAIL, count)}

    # 2. A few of the others: those with a mark that matters, and those that stand out.
    def rank(place: int) -> tuple[int, float]:
        row = records[place]
        return -LOUDNESS.index(loudest.get(row.name, "")), -badness(row)

    hidden = sorted((place for place in range(count) if place not in shown), key=rank)
    # a hair above the first rows is no news
    top = 1.25 * max(badness(records[place]) for place in shown)
    for place in hidden[:_NOTABLE]:
        is_marked = loudest.get(records[place].name) in ("error", "undecided")
        if is_marked or badness(records[place]) > top:
            shown.add(place)

    # 3. A single row between two shown ones takes no more room than a fold.
    lonely = {place for place in hidden if place - 1 in shown and place + 1 in shown}
    return shown | lonely


def _gaps(
    records: list[SublayerRecord], shown: set[int], loudest: dict[str, str]
) -> dict[int, Gap]:
    """Return the folds, by the number of visible rows above each."""
    gaps: dict[int, Gap] = {}
    hidden: list[SublayerRecord] = []
    visible = 0
    for place, row in enumerate(records):
        if place not in shown:
            hidden.append(row)
            continue
        if hidden:
            gaps[visible] = _gap(hidden, loudest)
            hidden = []
        visible += 1
    if hidden:
        gaps[visible] = _gap(hidden, loudest)
    return gaps


def _gap(rows: list[SublayerRecord], loudest: dict[str, str]) -> Gap:
    """Return a fold, with how the gains go on in it and how many of its rows have marks."""
    count = f"{len(rows)} more like this"
    marked = _count_marks(rows, loudest)
    trend = _trend([badness(row) for row in rows])
    return Gap(rows, f"{count}{trend}{marked}", f"{count}{marked}")


def _count_marks(rows: list[SublayerRecord], loudest: dict[str, str]) -> str:
    """Return how many rows have each mark, as the end of a sentence: ", 3 ●"."""
    levels = Counter(loudest.get(row.name) for row in rows)
    shown = [level for level in ("error", "warning", "undecided") if levels[level]]
    counts = [f"{levels[level]} {SIGNS[level]}" for level in shown]
    if not counts:
        return ""
    return f", {' '.join(counts)}"


def _trend(gains: list[float]) -> str:
    """Return whether the finite gains fall, rise or stay, as the end of a sentence."""
    values = [gain for gain in gains if math.isfinite(gain)]
    if not values:
        return ""
    low, high = min(values), max(values)
    begins_high, ends_low = values[0] >= 0.8 * high, values[-1] <= 1.25 * low
    begins_low, ends_high = values[0] <= 1.25 * low, values[-1] >= 0.8 * high
    if begins_high and ends_low:
        return f", falling to {three(low)}"
    if begins_low and ends_high:
        return f", rising to {three(high)}"
    return f", between {three(low)} and {three(high)}"


# -- columns ---------------------------------------------------------------------------------------
def _columns(
    report: Report, rows: list[SublayerRecord], levels: dict[tuple[str, str], str]
) -> list[SublayerColumn]:
    """Return every column that has something to show, from left to right."""
    # 1. Depth and name.
    unmarked = [""] * len(rows)
    depths = [f"{row.depth:>2}" for row in rows]
    names = [row.name for row in rows]
    columns = [
        SublayerColumn("depth", "depth", 100, depths, unmarked),
        SublayerColumn("name", "sub-layer", 100, names, unmarked, left=True),
    ]

    # 2. The figures, and next to the branch norm its range over several probes.
    probes = report.settings.get("probes", {}).get("count")
    for figure in _FIGURES:
        if any(_has(row, figure.key, report.tier) for row in report.sublayers):
            columns.append(_figure_column(report, figure, rows, levels))
        if figure.key == "branch_norm" and probes:
            columns.append(_over_probes(rows, probes))

    # 3. The earlier model, and which factor breaks its condition.
    if report.against is not None:
        columns.append(_earlier(report.against, rows))
    factor_of = guilty(report)
    if any(row.name in factor_of for row in rows):
        factors = [factor_of.get(row.name, "") for row in rows]
        columns.append(SublayerColumn("who", "who", 80, factors, unmarked, left=True))
    return columns


def _figure_column(
    report: Report,
    figure: _Figure,
    rows: list[SublayerRecord],
    levels: dict[tuple[str, str], str],
) -> SublayerColumn:
    cells = aligned([figure.text(row) for row in rows])
    if figure.key == "shortcut_std":
        cells = [f"{cell} {_bar(row)}" for cell, row in zip(cells, rows, strict=True)]
    interest = figure.interest
    if figure.key == "bound" and report.tier == "weights":
        interest = _BOUND_ALONE
    row_levels = [levels.get((row.name, figure.key), "") for row in rows]
    return SublayerColumn(figure.key, figure.title, interest, cells, row_levels)


def _bar(row: SublayerRecord) -> str:
    if row.shortcut_std is None:
        return " "
    return bar(row.shortcut_std.min)


def _earlier(against: AgainstRecord, rows: list[SublayerRecord]) -> SublayerColumn:
    """Return the branch norms of the earlier model."""
    texts = []
    for row in rows:
        ends = against.branch_norms.get(row.name)
        text = ABSENT
        if ends is not None:
            lower, estimate, upper = ends
            text = spoken(Interval(estimate, lower, upper))
        texts.append(text)
    return SublayerColumn("earlier", "earlier ‖J‖", 90, aligned(texts), [""] * len(rows))


def _over_probes(rows: list[SublayerRecord], probes: int) -> SublayerColumn:
    """Return the smallest to largest branch norm over several probes."""
    spreads = [row.over_probes.get("branch_norm") for row in rows]
    texts = [str(spread or ABSENT) for spread in spreads]
    title = f"over {probes} probes"
    return SublayerColumn("over_probes", title, _SPREAD, aligned(texts), [""] * len(rows))


def _has(row: SublayerRecord, key: str, tier: str) -> bool:
    """Return whether a row has a figure that says more than another column does."""
    if key == "residual_norm" and row.placement == "pre":
        return False  # 1 + branch norm, nearly: says nothing that the branch norm does not
    if key == "core_norm" and row.core_norm == row.branch_norm:
        return False  # no input norm: the core is the branch itself
    if key.startswith("weights."):
        return tier == "weights" and _end_weight(row, key) is not None
    return getattr(row, key) is not None


def _end_weight(row: SublayerRecord, key: str) -> float | None:
    """Return a figure of the branch's last matrix, or of its first one.

    Args:
        row: a sub-layer.
        key: such as "weights.last_std" or "weights.first_norm".
    """
    place, figure = key.removeprefix("weights.").split("_")
    for role in _END_ROLES[place]:
        if role in row.weights:
            value: float | None = getattr(row.weights[role], figure)
            return value
    return None


def _weight(key: str) -> Callable[[SublayerRecord], str]:
    def text(row: SublayerRecord) -> str:
        return three(_end_weight(row, key))

    return text


def _norm(key: str) -> Callable[[SublayerRecord], str]:
    def text(row: SublayerRecord) -> str:
        value: Interval | None = getattr(row, key)
        return spoken(value)

    return text


def _shortcut_std(row: SublayerRecord) -> str:
    """Return the smallest std over tokens: the one that 1/σ belongs to."""
    if row.shortcut_std is None:
        return ABSENT
    return three(row.shortcut_std.min)


@dataclass(frozen=True)
class _Figure:
    """A figure that has a column: its key in a record, its title, its rank, its text."""

    key: str
    title: str
    interest: int
    text: Callable[[SublayerRecord], str]


_SPREAD = 65  # it was asked for and paid for
_BOUND_ALONE = 70  # without a measurement the bound is the most that is known

_FIGURES = [
    _Figure("shortcut_std", "shortcut σ", 50, _shortcut_std),
    _Figure("norm_gain", "1/σ gain", 60, _norm("norm_gain")),
    _Figure("core_norm", "core ‖J‖", 40, _norm("core_norm")),
    _Figure("branch_norm", "branch ‖J‖", 100, _norm("branch_norm")),
    _Figure("out_norm_gain", "out-norm gain", 20, _norm("out_norm_gain")),
    _Figure("residual_norm", "‖aI + J‖", 30, _norm("residual_norm")),
    _Figure("weights.first_std", "std W in", 35, _weight("weights.first_std")),
    _Figure("weights.last_std", "std W out", 45, _weight("weights.last_std")),
    _Figure("weights.first_norm", "‖W in‖", 15, _weight("weights.first_norm")),
    _Figure("weights.last_norm", "‖W out‖", 25, _weight("weights.last_norm")),
    _Figure("bound", "paper's bound", 10, lambda row: three(row.bound)),
]
