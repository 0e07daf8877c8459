"""JD504 and JD507: figures of the probe against the run's own trend."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jacdiag.report.runlog import Alert
from jacdiag.report.thresholds import Thresholds
from jacdiag.rules.numbers import plain
from jacdiag.rules.series import Trend

IN_A_ROW = 2
SCATTER = 6.0  # standard errors of what the trend foretells; a figure that scatters widely has to move further
_NAMES = {"branch_norm": "branch ‖J‖", "core_norm": "core ‖J‖", "shortcut_std": "shortcut σ"}


class Drift:
    """Gains and shortcut sizes that leave their own trend, and stable ranks that fall.

    A slow monotone drift is the trend itself and never speaks; a figure has to double (or halve) against it, beyond six
    standard errors of what it foretells, at two probes in a row.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        self.limits = thresholds
        self.trends: dict[str, Trend] = {}
        self.away: dict[str, int] = {}
        self.largest: dict[str, float] = {}
        self.votes: list[str] = []

    def look(self, step: int, series: Mapping[str, Mapping[str, float]]) -> list[Alert]:
        """Takes the figures of one probe; returns what stands out, one alert per figure."""
        self.votes, alerts = [], []
        for figure, values in series.items():
            if figure == "stable_rank":
                self._rank(values)
                continue
            gone = {name: by for name, value in values.items() if (by := self._departed(figure, name, step, value))}
            if gone:
                where = sorted(gone, key=lambda name: -abs(gone[name]))
                times = math.exp(gone[where[0]])
                what = f"{_NAMES.get(figure, figure)} of {where[0]} is {plain(times)} times what its own trend foretold"
                what += f", and {len(where) - 1} more" if len(where) > 1 else ""
                evidence = {"figure": figure, "times": times, "value": values[where[0]], "count": len(where)}
                alerts.append(Alert(step, "JD504", "warning", what, where, evidence))
        return alerts

    def _departed(self, figure: str, name: str, step: int, value: float) -> float:
        """ln of the factor by which a figure has left its trend, twice in a row; 0 otherwise."""
        key = f"{figure}/{name}"
        trend = self.trends.setdefault(key, Trend())
        limit = self.limits.limits("gain_drift").warning
        found = trend.departure(step, value)
        if found is None or limit is None:
            trend.add(step, value)
            return 0.0
        off, error = found
        if abs(off) <= max(math.log(limit), SCATTER * error):
            self.away[key] = 0
            trend.add(step, value)
            return 0.0
        self.away[key] = self.away.get(key, 0) + 1
        if self.away[key] < IN_A_ROW:
            return 0.0  # the point stays outside the trend until it is known whether it lasts
        self.away[key] = 0
        self.trends[key] = Trend()  # a new level, a new trend
        self.trends[key].add(step, value)
        return off

    def _rank(self, values: Mapping[str, float]) -> None:
        limit = self.limits.limits("stable_rank_fall").info
        for name, value in values.items():
            top = max(self.largest.get(name, 0.0), value)
            self.largest[name] = top
            if limit is not None and value > 0 and top / value > limit:
                self.votes.append(f"JD507:{name}")

    def state(self) -> dict[str, Any]:
        trends = {key: trend.state() for key, trend in self.trends.items()}
        return {"trends": trends, "away": dict(self.away), "largest": dict(self.largest)}

    def load(self, state: Mapping[str, Any]) -> None:
        self.trends = {}
        for key, saved in state["trends"].items():
            self.trends[key] = Trend()
            self.trends[key].load(saved)
        self.away, self.largest = dict(state["away"]), dict(state["largest"])
