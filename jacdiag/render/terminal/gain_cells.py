"""The heat map of `jacdiag live`: what each cell shows, by fixed scales and by the rules."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

from jacdiag.records.run_log import RunLog, number
from jacdiag.render.content.run_alerts import alerts_of_run, report_at_start
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
    """

    glyph: str
    change: float = 0.0
    level: str = ""

    @property
    def style(self) -> str:
        """Colour: by the rule that fired, else by how much of the factor the change is."""
        if self.level == "error":
            return "bold red"
        if self.level:
            return "bold yellow"
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
        seen = len(self.steps)
        same = [int(row["step"]) for row in probes[:seen]] == self.steps and len(
            run.alerts
        ) == self._alerts
        if not same:  # a resume took some back, or an alert is about an earlier probe
            self.__init__()  # type: ignore[misc]
            seen = 0
        fired = _fired(run)
        for row in probes[seen:]:
            self._add(row, fired)
        self._alerts = len(run.alerts)

    def _add(self, row: dict[str, Any], fired: dict[tuple[int, str], str]) -> None:
        step = int(row["step"])
        values = row["figures"].get("branch_norm", {})
        known = set(self.names)
        self.names += [name for name in values if name not in known]
        cells: dict[str, Cell] = {}
        for name, logged in values.items():
            value = number(logged)
            before = self._before.setdefault(name, deque(maxlen=_BEFORE))
            cells[name] = self._cell(value, before, fired.get((step, name), ""))
            if math.isfinite(value) and value > 0:
                before.append(value)
        self.steps.append(step)
        self.rows.append(cells)

    def _cell(self, value: float, before: deque[float], level: str) -> Cell:
        ratio = 1.0
        if len(before) >= 2 and math.isfinite(value) and value > 0:
            ratio = value / median(before)
        change = abs(math.log(ratio)) / math.log(self.factor)
        if level:
            return Cell(_MARKS[level], change, level)
        if not math.isfinite(value):
            return Cell("?", change)
        if change >= 1 and ratio > 1:
            return Cell("+", change)
        if change >= 1:
            return Cell("-", change)
        return Cell(SHADES[sum(value >= cut for cut in CUTS)], change)

    def binned(self, columns: int) -> tuple[list[int], list[dict[str, Cell]]]:
        """Return at most a given count of columns.

        A column of several probes shows the last one, and a mark if any of them has one.
        """
        count = len(self.steps)
        columns = min(max(columns, 1), count)
        steps, rows = [], []
        for k in range(columns):
            part = self.rows[k * count // columns : (k + 1) * count // columns]
            merged = dict(part[-1])
            for cells in part:
                for name, cell in cells.items():
                    if _rank(cell) > _rank(merged.get(name)):
                        merged[name] = cell
            steps.append(self.steps[(k + 1) * count // columns - 1])
            rows.append(merged)
        return steps, rows


def loudest(cells: list[Cell | None]) -> Cell | None:
    """Return the cell that stands for several sub-layers.

    A mark comes first, then the largest change, then the size.
    """
    known = [cell for cell in cells if cell is not None]
    return max(known, key=lambda cell: (_rank(cell), SHADES.find(cell.glyph)), default=None)


def _rank(cell: Cell | None) -> int:
    """Return how much a cell must be seen: an error first, then a warning, then a mark."""
    if cell is None:
        return -1
    if cell.level == "error":
        return 3
    if cell.level:
        return 2
    if cell.change >= 1 or cell.glyph == "?":
        return 1
    return 0


def _fired(run: RunLog) -> dict[tuple[int, str], str]:
    """Return the level of the rule that fired for a sub-layer at a probe's step."""
    fired: dict[tuple[int, str], str] = {}
    for row in _alerts_on_norms(run):
        level = str(row.get("level"))
        if level not in _MARKS:
            continue
        for name in row.get("where") or []:
            key = int(row["step"]), str(name)
            # An error stays one, whatever else fired there.
            if fired.get(key) != "error":
                fired[key] = level
    return fired


def _alerts_on_norms(run: RunLog) -> list[dict[str, Any]]:
    """Return the alerts about a sub-layer's branch norm: drifts, and findings at the start."""
    rows = []
    for row in alerts_of_run(run):
        evidence = row.get("evidence") or {}
        is_branch_norm = evidence.get("figure", "branch_norm") == "branch_norm"
        if row.get("code") == "JD504" and is_branch_norm:
            rows.append(row)
    for row in report_at_start(run):
        if row.get("code") in _RULES:
            rows.append(row)
    return rows
