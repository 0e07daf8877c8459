"""The table of sub-layers before it is laid out: which rows, which columns, which texts and
marks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from jacdiag.records import AgainstRecord, Interval, Report, SublayerRecord
from jacdiag.render.terminal.number_cells import ABSENT, aligned, bar, spoken, three
from jacdiag.render.terminal.severity import LOUDNESS, SIGNS, guilty, marks

_SHOWN_WHOLE = 16  # a table this long needs no folding
_HEAD, _TAIL, _NOTABLE = 6, 2, 4


@dataclass(frozen=True)
class Column:
    """One column: its texts (already padded to one width) and the level of its mark, per visible
    row.

    `interest` ranks columns: on a narrow terminal the least interesting goes first.
    """

    key: str
    title: str
    interest: int
    cells: list[str]
    levels: list[str]
    left: bool = False

    @property
    def marked(self) -> bool:
        return any(SIGNS[level] for level in self.levels)


@dataclass(frozen=True)
class Gap:
    """Rows that are folded away, and what they are like; `brief` where there is no room for
    that.
    """

    rows: list[SublayerRecord]
    text: str
    brief: str


@dataclass(frozen=True)
class Grid:
    """Columns of the visible rows, and where between them (`gaps`: before which visible row) others
    are folded.
    """

    columns: list[Column]
    rows: list[SublayerRecord]
    gaps: dict[int, Gap]


def build(report: Report, *, all_rows: bool = False, sort: str = "depth") -> Grid:
    """Lays a report's sub-layers out as a grid.

    Args:
        report: any report, of either tier and state.
        all_rows: show every row; else long models are folded.
        sort: "depth" (as the model runs) or "worst" (largest branch norm first).
    """
    records = list(report.sublayers)
    if sort == "worst":
        records.sort(key=lambda row: -badness(row))
    levels = marks(report)
    loud = {
        name: level
        for (name, _), level in sorted(levels.items(), key=lambda item: LOUDNESS.index(item[1]))
    }
    shown = set(range(len(records))) if all_rows else _visible(records, loud, sort)
    rows = [row for place, row in enumerate(records) if place in shown]
    return Grid(_columns(report, rows, levels), rows, _gaps(records, shown, loud))


def badness(row: SublayerRecord) -> float:
    """What a sub-layer is sorted by: its branch norm, else the paper's bound; not finite counts as
    worst.
    """
    value = row.branch_norm.estimate if row.branch_norm else row.bound
    if value is None:
        return -math.inf
    return value if math.isfinite(value) else math.inf


def _visible(records: list[SublayerRecord], loud: dict[str, str], sort: str) -> set[int]:
    count = len(records)
    if count <= _SHOWN_WHOLE:
        return set(range(count))
    if sort == "worst":
        return set(range(_SHOWN_WHOLE - _NOTABLE))
    shown = {*range(_HEAD), *range(count - _TAIL, count)}
    rest = [place for place in range(count) if place not in shown]
    rest.sort(
        key=lambda place: (
            -LOUDNESS.index(loud.get(records[place].name, "")),
            -badness(records[place]),
        )
    )
    # a hair above the first rows is no news
    top = 1.25 * max(badness(records[place]) for place in shown)
    shown |= {
        place
        for place in rest[:_NOTABLE]
        if loud.get(records[place].name) in ("error", "undecided") or badness(records[place]) > top
    }
    lonely = {place for place in rest if place - 1 in shown and place + 1 in shown}
    return shown | lonely


def _gaps(records: list[SublayerRecord], shown: set[int], loud: dict[str, str]) -> dict[int, Gap]:
    gaps: dict[int, Gap] = {}
    hidden: list[SublayerRecord] = []
    visible = 0
    for place, row in enumerate([*records, None]):
        if row is not None and place not in shown:
            hidden.append(row)
            continue
        if hidden:
            gaps[visible] = _gap(hidden, loud)
            hidden = []
        visible += 1
    return gaps


def _gap(rows: list[SublayerRecord], loud: dict[str, str]) -> Gap:
    values = [badness(row) for row in rows if math.isfinite(badness(row))]
    count, text = f"{len(rows)} more like this", ""
    if values:
        low, high = min(values), max(values)
        if values[0] >= 0.8 * high and values[-1] <= 1.25 * low:
            text = f", falling to {three(low)}"
        elif values[0] <= 1.25 * low and values[-1] >= 0.8 * high:
            text = f", rising to {three(high)}"
        else:
            text = f", between {three(low)} and {three(high)}"
    spoken_of = [
        f"{n} {SIGNS[level]}"
        for level in ("error", "warning", "undecided")
        if (n := _count(rows, loud, level))
    ]
    marked = f", {' '.join(spoken_of)}" if spoken_of else ""
    return Gap(rows, f"{count}{text}{marked}", f"{count}{marked}")


def _count(rows: list[SublayerRecord], loud: dict[str, str], level: str) -> int:
    return sum(loud.get(row.name) == level for row in rows)


def _columns(
    report: Report, rows: list[SublayerRecord], levels: dict[tuple[str, str], str]
) -> list[Column]:
    who = guilty(report)
    probes = report.settings.get("probes", {}).get("count")
    columns = [
        Column("depth", "depth", 100, [f"{row.depth:>2}" for row in rows], [""] * len(rows)),
        Column("name", "sub-layer", 100, [row.name for row in rows], [""] * len(rows), left=True),
    ]
    for key, title, interest, text in _FIGURES:
        if any(_has(row, key, report.tier) for row in report.sublayers):
            cells = aligned([text(row) for row in rows])
            interest = _BOUND_ALONE if key == "bound" and report.tier == "weights" else interest
            columns.append(
                Column(
                    key, title, interest, cells, [levels.get((row.name, key), "") for row in rows]
                )
            )
        if key == "branch_norm" and probes:
            columns.append(_over_probes(rows, probes))
    if report.against is not None:
        columns.append(_earlier(report.against, rows))
    if any(row.name in who for row in rows):
        columns.append(
            Column(
                "who",
                "who",
                80,
                [who.get(row.name, "") for row in rows],
                [""] * len(rows),
                left=True,
            )
        )
    return [
        _with_bars(column, rows) if column.key == "shortcut_std" else column for column in columns
    ]


def _earlier(against: AgainstRecord, rows: list[SublayerRecord]) -> Column:
    """The branch norms of the earlier model."""
    texts = []
    for row in rows:
        ends = against.branch_norms.get(row.name)
        texts.append(ABSENT if ends is None else spoken(Interval(ends[1], ends[0], ends[2])))
    return Column("earlier", "earlier ‖J‖", 90, aligned(texts), [""] * len(rows))


def _over_probes(rows: list[SublayerRecord], probes: int) -> Column:
    """Return the column next to the branch norm: its smallest to largest estimate over several
    probes.
    """
    spreads = [row.over_probes.get("branch_norm") for row in rows]
    cells = aligned([ABSENT if spread is None else str(spread) for spread in spreads])
    return Column("over_probes", f"over {probes} probes", _SPREAD, cells, [""] * len(rows))


def _has(row: SublayerRecord, key: str, tier: str) -> bool:
    if key == "residual_norm" and row.placement == "pre":
        return False  # 1 + branch norm, nearly: says nothing that the branch norm does not
    if key == "core_norm" and row.core_norm == row.branch_norm:
        return False  # no input norm: the core is the whole branch
    if key.startswith("weights."):
        return tier == "weights" and _end_weight(row, key) is not None
    return getattr(row, key) is not None


def _with_bars(column: Column, rows: list[SublayerRecord]) -> Column:
    bars = [bar(row.shortcut_std.min) if row.shortcut_std else " " for row in rows]
    cells = [f"{cell} {block}" for cell, block in zip(column.cells, bars, strict=True)]
    return Column(column.key, column.title, column.interest, cells, column.levels)


def _end_weight(row: SublayerRecord, key: str) -> float | None:
    """A figure of the matrix that writes the branch's result ("weights.last_std"), or of the first
    that reads.
    """
    place, figure = key.removeprefix("weights.").split("_")
    last = [role for role in ("W_O", "W_2") if role in row.weights]
    first = [role for role in ("W_Q", "W_QKV", "W_1") if role in row.weights]
    roles = last if place == "last" else first
    if not roles:
        return None
    value: float | None = getattr(row.weights[roles[0]], figure)
    return value


def _weight(key: str) -> Callable[[SublayerRecord], str]:
    return lambda row: three(_end_weight(row, key))


def _norm(key: str) -> Callable[[SublayerRecord], str]:
    def text(row: SublayerRecord) -> str:
        value: Interval | None = getattr(row, key)
        return spoken(value)

    return text


_SPREAD = 65  # it was asked for and paid for
_BOUND_ALONE = 70  # without a measurement the bound is the most that is known

# key, title, interest, text. The shortcut's std is the smallest over tokens: the one that 1/σ
# belongs to.
_FIGURES: list[tuple[str, str, int, Callable[[SublayerRecord], str]]] = [
    (
        "shortcut_std",
        "shortcut σ",
        50,
        lambda row: three(row.shortcut_std.min) if row.shortcut_std else ABSENT,
    ),
    ("norm_gain", "1/σ gain", 60, _norm("norm_gain")),
    ("core_norm", "core ‖J‖", 40, _norm("core_norm")),
    ("branch_norm", "branch ‖J‖", 100, _norm("branch_norm")),
    ("out_norm_gain", "out-norm gain", 20, _norm("out_norm_gain")),
    ("residual_norm", "‖aI + J‖", 30, _norm("residual_norm")),
    ("weights.first_std", "std W in", 35, _weight("weights.first_std")),
    ("weights.last_std", "std W out", 45, _weight("weights.last_std")),
    ("weights.first_norm", "‖W in‖", 15, _weight("weights.first_norm")),
    ("weights.last_norm", "‖W out‖", 25, _weight("weights.last_norm")),
    ("bound", "paper's bound", 10, lambda row: three(row.bound)),
]
