"""The table of sub-layers before it is laid out: which rows, columns, texts and marks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from jacdiag.records import AgainstRecord, Interval, Report, SublayerRecord
from jacdiag.records.number_format import ABSENT, spoken, three
from jacdiag.render.content.columns import title_of
from jacdiag.render.content.number_cells import aligned, bar
from jacdiag.render.content.severity import LOUDNESS, SIGNS, UNDECIDED, guilty, marks

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
    # 1. The sub-layers in their order.
    records = list(report.sublayers)
    if sort == "worst":
        records.sort(key=lambda row: -badness(row))

    # 2. The loudest mark of each.
    levels = marks(report)
    loudest = _loudest_marks(levels)

    # 3. The rows that are shown.
    shown = set(range(len(records)))
    if not all_rows:
        shown = _visible(records, loudest, sort)
    rows = [row for place, row in enumerate(records) if place in shown]

    # 4. Their columns, and the folds between them.
    return Grid(_columns(report, rows, levels), rows, _gaps(records, shown, loudest))


def _loudest_marks(levels: dict[tuple[str, str], str]) -> dict[str, str]:
    """Return the loudest mark of each sub-layer, from the marks of its figures."""
    from_low_to_high = sorted(levels.items(), key=lambda item: LOUDNESS.index(item[1]))
    loudest = {}
    for (name, _), level in from_low_to_high:
        loudest[name] = level  # a later entry is at least as loud
    return loudest


def badness(row: SublayerRecord) -> float:
    """Return what a sub-layer is sorted by: its branch norm, else the paper's bound.

    What is not finite counts as the worst.
    """
    # 1. The measured norm goes before the bound.
    value = row.bound
    if row.branch_norm:
        value = row.branch_norm.estimate

    # 2. Neither is the least, and inf or nan the most.
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
        # The worst rows stand at the top, where none of the others can be missed.
        return set(range(_SHOWN_IN_FULL - _NOTABLE))

    # 1. The first rows and the last ones.
    shown = {*range(_HEAD), *range(count - _TAIL, count)}

    # 2. A few of the others.
    shown |= _notable(records, loudest, shown)

    # 3. A single row between two shown ones takes no more room than a fold.
    return shown | _lonely(shown, count)


def _notable(records: list[SublayerRecord], loudest: dict[str, str], shown: set[int]) -> set[int]:
    """Return the places of a few other rows: with a mark that matters, or larger than all shown.

    Args:
        records: all sub-layers.
        loudest: the loudest mark of each, by name.
        shown: places that are shown anyway.
    """

    def rank(place: int) -> tuple[int, float]:
        row = records[place]
        return -LOUDNESS.index(loudest.get(row.name, "")), -badness(row)

    # 1. The others, the loudest first, and of these the worst first.
    hidden = [place for place in range(len(records)) if place not in shown]
    hidden.sort(key=rank)

    # 2. Those of them that tell a reader something new.
    largest_shown = max(badness(records[place]) for place in shown)
    limit = 1.25 * largest_shown  # a hair above the first rows is no news
    notable = set()
    for place in hidden[:_NOTABLE]:
        row = records[place]
        is_marked = loudest.get(row.name) in ("error", "undecided")
        if is_marked or badness(row) > limit:
            notable.add(place)
    return notable


def _lonely(shown: set[int], count: int) -> set[int]:
    """Return the places between two shown rows that are not shown themselves."""
    lonely = set()
    for place in range(count):
        is_between = place - 1 in shown and place + 1 in shown
        if is_between:
            lonely.add(place)
    return lonely


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

        # A visible row ends the fold above it.
        if hidden:
            gaps[visible] = _gap(hidden, loudest)
            hidden = []
        visible += 1

    # The last rows may be hidden too.
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
    counts = []
    for level in ("error", "warning", "undecided"):
        if levels[level]:
            counts.append(f"{levels[level]} {SIGNS[level]}")
    if not counts:
        return ""  # no row has a mark
    return f", {' '.join(counts)}"


def _trend(gains: list[float]) -> str:
    """Return whether the finite gains fall, rise or stay, as the end of a sentence."""
    values = [gain for gain in gains if math.isfinite(gain)]
    if not values:
        return ""
    low, high = min(values), max(values)

    # Near the largest or the smallest value is as good as at it.
    near_high, near_low = 0.8 * high, 1.25 * low
    first, last = values[0], values[-1]
    is_falling = first >= near_high and last <= near_low
    is_rising = first <= near_low and last >= near_high

    if is_falling:
        return f", falling to {three(low)}"
    if is_rising:
        return f", rising to {three(high)}"
    return f", between {three(low)} and {three(high)}"


def explain_marks(grid: Grid, columns: list[SublayerColumn]) -> str:
    """Return what the marks of a table mean, said once below it; "" if it has none.

    Args:
        grid: the table, whose folds count the marks of their rows.
        columns: those that are shown.
    """
    # 1. The marks that stand in the table.
    levels: set[str] = set()
    for column in columns:
        levels.update(column.levels)
    in_folds = "".join(gap.text for gap in grid.gaps.values())

    # 2. Each of them with its level.
    meanings = []
    for level in ("error", "warning"):
        if level in levels or SIGNS[level] in in_folds:
            meanings.append(f"{SIGNS[level]} {level}")
    sentences = []
    if meanings:
        sentences.append(f"a mark means that a rule fired: {', '.join(meanings)}")
    if UNDECIDED in levels or SIGNS[UNDECIDED] in in_folds:
        sentences.append(f"{SIGNS[UNDECIDED]} means that a rule could not decide")
    return "; ".join(sentences)


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
        SublayerColumn("depth", title_of("depth"), 100, depths, unmarked),
        SublayerColumn("name", title_of("name"), 100, names, unmarked, left=True),
    ]

    # 2. The figures, and next to the branch norm its range over several probes.
    probes = report.settings.get("probes", {}).get("count")
    for figure in _FIGURES:
        if _any_has(report, figure.key):
            columns.append(_figure_column(report, figure, rows, levels))
        if figure.key == "branch_norm" and probes:
            columns.append(_over_probes(rows, probes))

    # 3. The earlier model, and which factor breaks its condition.
    if report.against is not None:
        columns.append(_earlier(report.against, rows))
    factor_of = guilty(report)
    factors = [factor_of.get(row.name, "") for row in rows]
    if any(factors):
        columns.append(SublayerColumn("who", title_of("who"), 80, factors, unmarked, left=True))
    return columns


def _any_has(report: Report, key: str) -> bool:
    """Return whether a figure has something to show, in a visible row or in a folded one."""
    return any(_has(row, key, report.tier) for row in report.sublayers)


def _figure_column(
    report: Report,
    figure: _Figure,
    rows: list[SublayerRecord],
    levels: dict[tuple[str, str], str],
) -> SublayerColumn:
    """Return the column of one figure, with the marks of its cells."""
    # 1. The cells. The std of the shortcut has a bar next to its number.
    cells = aligned([figure.text(row) for row in rows])
    if figure.key == "shortcut_std":
        cells = _with_bars(cells, rows)

    # 2. Its rank among the columns.
    interest = figure.interest
    if figure.key == "bound" and report.tier == "weights":
        interest = _BOUND_ALONE

    # 3. The marks.
    row_levels = [levels.get((row.name, figure.key), "") for row in rows]
    return SublayerColumn(figure.key, title_of(figure.key), interest, cells, row_levels)


def _with_bars(cells: list[str], rows: list[SublayerRecord]) -> list[str]:
    """Return cells with the bar of each row's shortcut at their end."""
    with_bars = []
    for cell, row in zip(cells, rows, strict=True):
        with_bars.append(f"{cell} {_bar(row)}")
    return with_bars


def _bar(row: SublayerRecord) -> str:
    """Return the bar of a shortcut's std; a space keeps the width where there is none."""
    std = row.shortcut_std
    if std is None:
        return " "
    return bar(std.min)


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
    return SublayerColumn("earlier", title_of("earlier"), 90, aligned(texts), [""] * len(rows))


def _over_probes(rows: list[SublayerRecord], probes: int) -> SublayerColumn:
    """Return the smallest to largest branch norm over several probes."""
    texts = []
    for row in rows:
        spread = row.over_probes.get("branch_norm")
        texts.append(str(spread or ABSENT))
    title = title_of("over_probes").replace("N", str(probes))
    return SublayerColumn("over_probes", title, _SPREAD, aligned(texts), [""] * len(rows))


def _has(row: SublayerRecord, key: str, tier: str) -> bool:
    """Return whether a row has a figure that says more than another column does."""
    # 1. Figures of weights stand in a table that has no others.
    if key.startswith("weights."):
        has_weight = _end_weight(row, key) is not None
        return tier == "weights" and has_weight

    # 2. Some repeat what the branch norm says.
    repeats_branch = False
    if key == "residual_norm":
        repeats_branch = row.placement == "pre"  # 1 + branch norm, nearly
    elif key == "core_norm":
        repeats_branch = row.core_norm == row.branch_norm  # no input norm: the same map

    # 3. All others are shown where they were measured.
    return not repeats_branch and getattr(row, key) is not None


def _end_weight(row: SublayerRecord, key: str) -> float | None:
    """Return a figure of the branch's last matrix, or of its first one.

    Args:
        row: a sub-layer.
        key: such as "weights.last_std" or "weights.first_norm".
    """
    place, figure = key.removeprefix("weights.").split("_")
    for role in _END_ROLES[place]:
        # A fused matrix has another role than single ones: the first that is there counts.
        if role in row.weights:
            value: float | None = getattr(row.weights[role], figure)
            return value
    return None


def _weight(key: str) -> Callable[[SublayerRecord], str]:
    """Return the function that writes one figure of a row's matrices."""

    def text(row: SublayerRecord) -> str:
        return three(_end_weight(row, key))

    return text


def _norm(key: str) -> Callable[[SublayerRecord], str]:
    """Return the function that writes one norm of a row with its interval."""

    def text(row: SublayerRecord) -> str:
        value: Interval | None = getattr(row, key)
        return spoken(value)

    return text


def _shortcut_std(row: SublayerRecord) -> str:
    """Return the smallest std over tokens: the one that 1/σ belongs to."""
    std = row.shortcut_std
    if std is None:
        return ABSENT
    return three(std.min)


@dataclass(frozen=True)
class _Figure:
    """A figure that has a column: its key in a record, its rank, its text."""

    key: str
    interest: int
    text: Callable[[SublayerRecord], str]


_SPREAD = 65  # it was requested and paid for
_BOUND_ALONE = 70  # without a measurement the bound is the most that is known

_FIGURES = [
    _Figure("shortcut_std", 50, _shortcut_std),
    _Figure("norm_gain", 60, _norm("norm_gain")),
    _Figure("core_norm", 40, _norm("core_norm")),
    _Figure("branch_norm", 100, _norm("branch_norm")),
    _Figure("out_norm_gain", 20, _norm("out_norm_gain")),
    _Figure("residual_norm", 30, _norm("residual_norm")),
    _Figure("weights.first_std", 35, _weight("weights.first_std")),
    _Figure("weights.last_std", 45, _weight("weights.last_std")),
    _Figure("weights.first_norm", 15, _weight("weights.first_norm")),
    _Figure("weights.last_norm", 25, _weight("weights.last_norm")),
    _Figure("bound", 10, lambda row: three(row.bound)),
]
