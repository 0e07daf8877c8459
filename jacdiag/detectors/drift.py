"""JD504 and JD507: figures of the probe and of the statistics, compared with the run's own
trend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jacdiag.detectors.running_statistics import Trend
from jacdiag.records.run_log import Alert
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.thresholds import Thresholds

IN_A_ROW = 2
LEAST = 3
"""Points before the first prediction: a line through two has no scatter."""

# standard errors of what the trend predicts; a figure that scatters widely has to move further
SCATTER = 6.0
_FEW = 6  # points from which on a sub-layer's own scatter is known well enough
_NAMES = {
    "branch_norm": "branch ‖J‖",
    "core_norm": "core ‖J‖",
    "shortcut_std": "shortcut σ",
    "statistics/logit": "the largest attention logit",
    "statistics/branch_std": "branch σ",
    "statistics/shortcut_std": "shortcut σ",
}
_OF_STATISTICS = ("logit", "branch_std", "shortcut_std")


@dataclass
class Away:
    """A figure that has left its trend.

    Attributes:
        count: points in a row.
        since: step of the first of them.
        usual: the last value before it.
    """

    count: int = 0
    since: int = 0
    usual: float = math.nan


@dataclass(frozen=True)
class Departure:
    """A departure that has lasted.

    Attributes:
        off: ln of the factor between the value and what the trend predicted.
        since: step of the first point of the departure.
        usual: the last value before it.
    """

    off: float
    since: int
    usual: float


class Drift:
    """Gains, sizes of shortcut and branch, and logits that leave their own trend, and stable ranks
    that fall.

    A slow monotone drift is the trend itself and never fires. A figure has to double (or halve)
    twice over: compared with what the line through its last points predicts, beyond six standard
    errors of that, and compared with its last value. So a curve that a line does not follow is no
    departure. It has to do so at two points in a row.

    The standard error of a line through three to five points is not known from that line. There the
    scatter of the same figure in all sub-layers is pooled.

    Attributes:
        looks: rounds of statistics and probes so far, a step counted once.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        self.limits = thresholds
        self.trends: dict[str, Trend] = {}
        self.away: dict[str, Away] = {}
        self.largest: dict[str, float] = {}
        self.votes: list[str] = []
        self.looks, self._last_step = 0, -1

    def renumber(self, old: int, new: int) -> None:
        """Give the points of step `old` another number."""
        self._last_step = new if self._last_step == old else self._last_step
        for trend in self.trends.values():
            moved = [new if step == old else step for step in trend.steps]
            trend.steps.clear()
            trend.steps.extend(moved)

    def look(self, step: int, series: Mapping[str, Mapping[str, float]]) -> list[Alert]:
        """Take the figures of one round; return what stands out, one alert per figure."""
        self.votes, alerts = [], []
        if step != self._last_step:
            self.looks, self._last_step = self.looks + 1, step
        for figure, values in series.items():
            if figure == "stable_rank":
                self._rank(values)
                continue
            pooled = self._pooled_scatter(figure, values)
            departures = {}
            for name, value in values.items():
                departure = self._departed(figure, name, step, value, pooled)
                if departure is not None:
                    departures[name] = departure
            if departures:
                alerts.append(_alert(step, figure, values, departures))
        return alerts

    def _pooled_scatter(self, figure: str, values: Mapping[str, float]) -> float:
        """Root mean square of the scatter of one figure in all sub-layers, around their lines."""
        squares, freedom = 0.0, 0
        for name in values:
            trend = self.trends.get(f"{figure}/{name}")
            if trend is not None and len(trend.logs) >= LEAST:
                squares += trend.residual_square()
                freedom += len(trend.logs) - 2
        return math.sqrt(squares / freedom) if freedom else 0.0

    def _departed(
        self, figure: str, name: str, step: int, value: float, pooled: float
    ) -> Departure | None:
        """Return how a figure has left its trend, at two points in a row; None otherwise."""
        key = f"{figure}/{name}"
        trend = self.trends.setdefault(key, Trend(least=LEAST))
        limit = self.limits.limits("gain_drift").warning
        scatter = pooled if len(trend.logs) < _FEW else 0.0
        predicted = trend.departure(step, value, least_scatter=scatter)
        if predicted is None or limit is None:
            trend.add(step, value)
            return None
        # 1. Compare with the line and with the last value; the smaller distance counts.
        by_line, error = predicted
        last = trend.logs[-1]
        by_last = math.log(value) - last
        off = _smaller(by_line, by_last)
        if abs(off) <= math.log(limit) or abs(by_line) <= SCATTER * error:
            self.away.pop(key, None)
            trend.add(step, value)
            return None
        # 2. Wait for a second point; the first stays outside the trend until it is known whether it
        # lasts.
        away = self.away.setdefault(key, Away(0, step, math.exp(last)))
        away.count += 1
        if away.count < IN_A_ROW:
            return None
        # 3. A new level, a new trend.
        del self.away[key]
        self.trends[key] = Trend(least=LEAST)
        self.trends[key].add(step, value)
        return Departure(by_line, away.since, away.usual)

    def _rank(self, values: Mapping[str, float]) -> None:
        limit = self.limits.limits("stable_rank_fall").info
        for name, value in values.items():
            top = max(self.largest.get(name, 0.0), value)
            self.largest[name] = top
            if limit is not None and value > 0 and top / value > limit:
                self.votes.append(f"JD507:{name}")

    def state(self) -> dict[str, Any]:
        """Return what `load` goes on from."""
        trends = {key: trend.state() for key, trend in self.trends.items()}
        away = {key: [point.count, point.since, point.usual] for key, point in self.away.items()}
        looks = {"looks": self.looks, "last_step": self._last_step}
        return {
            "trends": trends,
            "away_since": away,
            "away": {},
            "largest": dict(self.largest),
            **looks,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; one of an older version has forgotten what had just left its
        trend.
        """
        self.trends = {}
        for key, saved in state["trends"].items():
            self.trends[key] = Trend(least=LEAST)
            self.trends[key].load(saved)
        self.away = {key: Away(*point) for key, point in state.get("away_since", {}).items()}
        self.largest = dict(state["largest"])
        known = max((len(trend.logs) for trend in self.trends.values()), default=0)
        self.looks = int(state.get("looks", known))
        self._last_step = int(state.get("last_step", -1))


def statistics_series(
    figures: Mapping[str, Mapping[str, float | None]],
) -> dict[str, dict[str, float]]:
    """Return what of a round of statistics has a trend, under names that the probe's figures do not
    have.
    """
    series: dict[str, dict[str, float]] = {}
    for figure in _OF_STATISTICS:
        values = {
            name: value for name, value in figures.get(figure, {}).items() if value is not None
        }
        if values:
            series[f"statistics/{figure}"] = values
    return series


def _alert(
    step: int, figure: str, values: Mapping[str, float], departures: Mapping[str, Departure]
) -> Alert:
    where = sorted(departures, key=lambda name: -abs(departures[name].off))
    most = where[0]
    departure = departures[most]
    times = math.exp(departure.off)
    label = _NAMES.get(figure, figure)
    what = (
        f"{label} of {most} is {plain(times)} times what its own trend predicted: "
        f"{plain(values[most])} now, "
    )
    what += f"{plain(departure.usual)} before step {departure.since}, since which it has been so"
    if len(where) > 1:
        what += f"; {len(where) - 1} more sub-layers with it, which of them first is not known"
    evidence = {
        "figure": figure,
        "times": times,
        "value": values[most],
        "count": len(where),
        "since": departure.since,
        "usual": departure.usual,
    }
    return Alert(step, "JD504", "warning", what, where, evidence)


def _smaller(first: float, second: float) -> float:
    """The one nearer to zero of two numbers of one sign; 0 if their signs differ."""
    if first * second <= 0:
        return 0.0
    return min(first, second, key=abs)
