"""The heat map of `jacdiag live`: what each cell shows, by fixed scales and by the rules."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

from jacdiag.records.run_log import RunLog, number
from jacdiag.render.content.run_alerts import alerts_of_run, report_at_start
from jacdiag.render.content.run_sublayers import sublayer_depths
from jacdiag.rules.thresholds import load_thresholds

# The shade says how large a gain is, on a scale that is the same for every run: a third of a decade
# is a factor of 3.
SHADES = "·░▒▓█"
CUTS = (0.3, 1.0, 3.0, 10.0)
_MARKS = {"error": "●", "warning": "▲"}
_BEFORE = 8  # probes whose median a gain is compared with: so many points the trend of JD504 has
_RULES = ("JD101", "JD102", "JD103")  # about a sub-layer's norms


@dataclass(frozen=True)
class Cell:
    """One sub-layer at one probe.

    Attributes:
        glyph: a shade for the size; + or - where the gain has changed by JD504's factor; ▲ or ●
            where a rule fired.
        change: share of that factor that it has changed by, on a log scale: 1 is all of it.
        level: of the rule that fired, or empty.
        value: the gain.
    """

    glyph: str
    change: float = 0.0
    level: str = ""
    value: float = math.nan

    @property
    def style(self) -> str:
        """Colour: by the rule that fired, else by how much of the factor the change is."""
        # 1. A rule.
        if self.level == "error":
            return "bold red"
        if self.level:
            return "bold yellow"

        # 2. A change: all of the factor, or half of it.
        if self.change >= 1:
            return "yellow"
        if self.change >= 0.5:
            return "cyan"
        return "grey50"


class GainCells:
    """The cells of a run, which grow with it: a probe is looked at once.

    Attributes:
        names: sub-layers, first depth first.
        steps: of the probes.
        rows: for each probe, a cell for each sub-layer that it has.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.steps: list[int] = []
        self.rows: list[dict[str, Cell]] = []
        self._before: dict[str, deque[float]] = {}
        self._alerts = -1
        self.factor = float(load_thresholds().limits("gain_drift").warning or 2.0)

    def update(self, run: RunLog) -> None:
        """Take the probes and the alerts that are new."""
        probes = [row for row in run.probes if row.get("figures")]
        if not self._continues(probes, len(run.alerts)):
            self.__init__()  # type: ignore[misc]

        # What was looked at already is not looked at again.
        fired = _fired(run)
        if not self.names:
            # A sub-layer that no probe can measure has a row too.
            self.names = list(sublayer_depths(run))
        for row in probes[len(self.steps) :]:
            self._add(row, fired)
        self._alerts = len(run.alerts)

    def _continues(self, probes: list[dict[str, Any]], alerts: int) -> bool:
        """Return whether a log goes on from where it was last read.

        A resume may have taken probes back, and a new alert may be about an earlier probe.

        Args:
            probes: all that the log holds now.
            alerts: how many it holds.
        """
        if alerts != self._alerts:
            return False
        known = probes[: len(self.steps)]
        return [int(row["step"]) for row in known] == self.steps

    def _add(self, row: dict[str, Any], fired: dict[tuple[int, str], str]) -> None:
        """Add the cells of one probe.

        Args:
            row: of the probe.
            fired: level of the rule that fired, by step and sub-layer.
        """
        # 1. Sub-layers that no earlier probe had.
        step = int(row["step"])
        values = row["figures"].get("branch_norm", {})
        known = set(self.names)
        self.names += [name for name in values if name not in known]

        # 2. A cell for each, compared with the probes before.
        cells: dict[str, Cell] = {}
        for name, logged in values.items():
            value = number(logged)
            before = self._before.setdefault(name, deque(maxlen=_BEFORE))
            cells[name] = self._cell(value, before, fired.get((step, name), ""))

            # Later gains are compared by their factor, which 0 has not.
            if _is_positive(value):
                before.append(value)
        self.steps.append(step)
        self.rows.append(cells)

    def _cell(self, value: float, before: deque[float], level: str) -> Cell:
        """Return the cell of a gain.

        Args:
            value: the gain.
            before: gains of the same sub-layer at the probes before.
            level: of the rule that fired, or empty.
        """
        # 1. How far it is from what it was, as a share of the rule's factor.
        ratio = 1.0
        if len(before) >= 2 and _is_positive(value):
            ratio = value / median(before)
        change = abs(math.log(ratio)) / math.log(self.factor)

        # 2. What a reader must see comes before the size.
        if level:
            return Cell(_MARKS[level], change, level, value)
        if not math.isfinite(value):
            return Cell("?", change, value=value)
        if change < 1:
            return Cell(_shade(value), change, value=value)
        if ratio > 1:
            return Cell("+", change, value=value)
        return Cell("-", change, value=value)

    def binned(self, columns: int) -> tuple[list[int], list[dict[str, Cell]]]:
        """Return at most a given count of columns.

        A column of several probes shows the last one, and a mark if any of them has one.
        """
        count = len(self.steps)
        columns = min(max(columns, 1), count)
        steps, rows = [], []
        for k in range(columns):
            begin, end = k * count // columns, (k + 1) * count // columns
            steps.append(self.steps[end - 1])
            rows.append(_merged(self.rows[begin:end]))
        return steps, rows


def loudest(cells: list[Cell | None]) -> Cell | None:
    """Return the cell that stands for several sub-layers.

    A mark comes first, then the largest change, then the size.
    """
    known = [cell for cell in cells if cell is not None]
    return max(known, key=lambda cell: (_rank(cell), SHADES.find(cell.glyph)), default=None)


def _merged(rows: list[dict[str, Cell]]) -> dict[str, Cell]:
    """Return the last of some probes, with the marks of those before."""
    merged = dict(rows[-1])
    for cells in rows:
        for name, cell in cells.items():
            if _rank(cell) > _rank(merged.get(name)):
                merged[name] = cell
    return merged


def _shade(value: float) -> str:
    """Return the shade of a gain: one darker for each cut that it reaches."""
    reached = [cut for cut in CUTS if value >= cut]
    return SHADES[len(reached)]


def _is_positive(value: float) -> bool:
    """Return whether a gain has a logarithm."""
    return math.isfinite(value) and value > 0


def _rank(cell: Cell | None) -> int:
    """Return how much a cell must be seen: an error first, then a warning, then a mark."""
    if cell is None:
        return -1
    if cell.level == "error":
        return 3
    if cell.level:
        return 2

    # A gain that changed or was lost, without a rule.
    has_mark = cell.change >= 1 or cell.glyph == "?"
    return int(has_mark)


def _fired(run: RunLog) -> dict[tuple[int, str], str]:
    """Return the level of the rule that fired for a sub-layer at a probe's step."""
    fired: dict[tuple[int, str], str] = {}
    for row in _alerts_on_norms(run):
        level = str(row.get("level"))
        if level not in _MARKS:
            continue  # an observation

        step = int(row["step"])
        for name in row.get("where") or []:
            key = step, str(name)
            # An error stays one, whatever else fired there.
            if fired.get(key) != "error":
                fired[key] = level
    return fired


def _alerts_on_norms(run: RunLog) -> list[dict[str, Any]]:
    """Return the alerts about a sub-layer's branch norm: drifts, and findings at the start."""
    # 1. Drifts in the run.
    rows = []
    for row in alerts_of_run(run):
        evidence = row.get("evidence") or {}
        figure = evidence.get("figure", "branch_norm")
        if row.get("code") == "JD504" and figure == "branch_norm":
            rows.append(row)

    # 2. What the first probe's report says of norms.
    for row in report_at_start(run):
        if row.get("code") in _RULES:
            rows.append(row)
    return rows
