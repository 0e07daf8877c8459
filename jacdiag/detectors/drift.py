"""Judge JD504 and JD507: figures of probes and statistics, compared with the run's own trend."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jacdiag.detectors.running_statistics import LogTrend
from jacdiag.records.run_log import Alert
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.thresholds import Thresholds

IN_A_ROW = 2
"""Points in a row beyond the limits before a figure has left its trend."""
LEAST = 3
"""Points before the first prediction: a line through two has no scatter."""

# standard errors of what the trend predicts; a figure that scatters widely has to move further
SCATTER = 6.0
_OWN_SCATTER = 6  # points from which on a sub-layer's own scatter is known well enough
_NAMES = {
    "branch_norm": "branch norm",
    "core_norm": "core norm",
    "shortcut_std": "shortcut std",
    "statistics/logit": "the largest attention logit",
    "statistics/branch_std": "branch std",
    "statistics/shortcut_std": "shortcut std",
}
_OF_STATISTICS = ("logit", "branch_std", "shortcut_std")


@dataclass
class PendingDeparture:
    """A figure that is off its trend, and may turn out to have left it.

    Attributes:
        count: points in a row.
        since: step of the first of them.
        usual: the last value before it.
    """

    count: int = 0
    since: int = 0
    usual: float = math.nan


@dataclass(frozen=True)
class TrendDeparture:
    """A figure that has left its trend.

    Attributes:
        off: ln of the factor between the value and what the trend predicted.
        since: step of the first point that was off.
        usual: the last value before it.
    """

    off: float
    since: int
    usual: float


class Drift:
    """Figures that leave their own trend, and stable ranks that fall.

    The figures are gains, sizes of shortcut and branch, and logits. A slow monotone drift is the
    trend itself and never fires.

    A figure has to double (or halve) in two comparisons. The first is with what the line through
    its last points predicts, where it also has to be beyond six standard errors. The second is with
    its last value, so that a curve which a line does not follow does not fire. It has to do so at
    two points in a row.

    The standard error of a line through three to five points is not known from that line. There the
    scatter of the same figure in all sub-layers is pooled.

    Args:
        thresholds: with the limits of "gain_drift" and "stable_rank_fall".

    Attributes:
        looks: rounds of statistics and probes so far, a step counted once.
        votes: of the last round.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        """Begin without a trend; see the class for the arguments."""
        self._limits = thresholds
        self._trends: dict[str, LogTrend] = {}
        self._pending: dict[str, PendingDeparture] = {}
        self._largest_rank: dict[str, float] = {}
        self._last_step = -1
        self.votes: list[str] = []
        self.looks = 0

    def renumber(self, old: int, new: int) -> None:
        """Give the points of step `old` the number `new`."""
        if self._last_step == old:
            self._last_step = new
        for trend in self._trends.values():
            trend.renumber(old, new)

    def look(self, step: int, series: Mapping[str, Mapping[str, float]]) -> list[Alert]:
        """Judge the figures of one round, and take them in.

        Args:
            step: that they were measured at.
            series: figure -> sub-layer (or matrix) -> value.

        Returns:
            One alert for each figure that stands out.
        """
        # 1. A step with both statistics and a probe is one round.
        self.votes = []
        if step != self._last_step:
            self.looks += 1
            self._last_step = step

        # 2. Ranks are compared with their largest value, everything else with its trend.
        alerts = []
        for figure, values in series.items():
            if figure == "stable_rank":
                self._vote_on_ranks(values)
                continue

            departures = self._find_departures(figure, step, values)
            if departures:
                alerts.append(_alert(step, figure, values, departures))
        return alerts

    def _find_departures(
        self, figure: str, step: int, values: Mapping[str, float]
    ) -> dict[str, TrendDeparture]:
        """Return the sub-layers of which a figure has left its trend."""
        pooled = self._pooled_scatter(figure, values)
        departures = {}
        for name, value in values.items():
            departure = self._compare(f"{figure}/{name}", step, value, pooled)
            if departure is not None:
                departures[name] = departure
        return departures

    def _pooled_scatter(self, figure: str, values: Mapping[str, float]) -> float:
        """Return the root mean square scatter of a figure in all sub-layers, around their lines."""
        squares = 0.0
        degrees_of_freedom = 0
        for name in values:
            trend = self._trends.get(f"{figure}/{name}")
            if trend is not None and len(trend.logs) >= LEAST:
                squares += trend.residual_square()
                degrees_of_freedom += len(trend.logs) - 2
        if not degrees_of_freedom:
            return 0.0
        return math.sqrt(squares / degrees_of_freedom)

    def _compare(self, key: str, step: int, value: float, pooled: float) -> TrendDeparture | None:
        """Compare a value with its trend, and take it in.

        Args:
            key: of the figure in a sub-layer.
            step: of the value.
            value: the new point.
            pooled: scatter of the figure in all sub-layers.

        Returns:
            How it has left its trend, at two points in a row; None if it has not.
        """
        trend = self._trends.setdefault(key, LogTrend(least=LEAST))
        limit = self._limits.limits("gain_drift").warning
        least_scatter = pooled if len(trend.logs) < _OWN_SCATTER else 0.0
        deviation = trend.departure(step, value, least_scatter=least_scatter)
        if deviation is None or limit is None:
            trend.add(step, value)
            return None

        # 1. Compare with the line and with the last value; the smaller distance counts.
        last = trend.logs[-1]
        off = _smaller(deviation.log_ratio, math.log(value) - last)
        is_within_factor = abs(off) <= math.log(limit)
        is_within_scatter = abs(deviation.log_ratio) <= SCATTER * deviation.error
        if is_within_factor or is_within_scatter:
            self._pending.pop(key, None)
            trend.add(step, value)
            return None

        # 2. Wait for a second point. The first stays out of the trend until it is known whether it
        # lasts.
        pending = self._pending.setdefault(key, PendingDeparture(0, step, math.exp(last)))
        pending.count += 1
        if pending.count < IN_A_ROW:
            return None

        # 3. Begin a new trend at the new level.
        del self._pending[key]
        self._trends[key] = LogTrend(least=LEAST)
        self._trends[key].add(step, value)
        return TrendDeparture(deviation.log_ratio, pending.since, pending.usual)

    def _vote_on_ranks(self, values: Mapping[str, float]) -> None:
        """Vote for matrices whose stable rank has fallen from its largest value."""
        limit = self._limits.limits("stable_rank_fall").info
        for name, value in values.items():
            largest = max(self._largest_rank.get(name, 0.0), value)
            self._largest_rank[name] = largest
            if limit is None or value <= 0:
                continue
            if largest / value > limit:
                self.votes.append(f"JD507:{name}")

    def state(self) -> dict[str, Any]:
        """Return what `load` goes on from."""
        pending = {
            key: [point.count, point.since, point.usual] for key, point in self._pending.items()
        }
        return {
            "trends": {key: trend.state() for key, trend in self._trends.items()},
            "away_since": pending,
            "away": {},  # older versions read it
            "largest": dict(self._largest_rank),
            "looks": self.looks,
            "last_step": self._last_step,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. One of an older version lacks the pending departures."""
        self._trends = {}
        for key, saved in state["trends"].items():
            self._trends[key] = LogTrend(least=LEAST)
            self._trends[key].load(saved)
        self._pending = {
            key: PendingDeparture(*saved) for key, saved in state.get("away_since", {}).items()
        }
        self._largest_rank = dict(state["largest"])
        most_points = max((len(trend.logs) for trend in self._trends.values()), default=0)
        self.looks = int(state.get("looks", most_points))
        self._last_step = int(state.get("last_step", -1))


def statistics_series(
    figures: Mapping[str, Mapping[str, float | None]],
) -> dict[str, dict[str, float]]:
    """Return the statistics that have a trend, under names that no figure of a probe has.

    Args:
        figures: figure -> sub-layer -> value, None if it was not measured.
    """
    series: dict[str, dict[str, float]] = {}
    for figure in _OF_STATISTICS:
        measured = figures.get(figure, {}).items()
        values = {name: value for name, value in measured if value is not None}
        # A figure that no sub-layer has is left out.
        if values:
            series[f"statistics/{figure}"] = values
    return series


def _alert(
    step: int, figure: str, values: Mapping[str, float], departures: Mapping[str, TrendDeparture]
) -> Alert:
    """Return the alert of a figure, about the sub-layer where it is furthest off."""
    # 1. Name the sub-layers, the one that is furthest off first.
    where = sorted(departures, key=lambda name: -abs(departures[name].off))
    furthest = where[0]
    departure = departures[furthest]

    # 2. Say how far it is off.
    times = math.exp(departure.off)
    label = _NAMES.get(figure, figure)
    what = (
        f"{label} of {furthest} is {plain(times)} times what its own trend predicted: "
        f"{plain(values[furthest])} now, {plain(departure.usual)} before step {departure.since}, "
        "since which it has been so"
    )
    others = len(where) - 1
    if others == 1:
        what += "; 1 more sub-layer with it, which of the two first is not known"
    elif others > 1:
        what += f"; {others} more sub-layers with it, which of them first is not known"
    evidence = {
        "figure": figure,
        "times": times,
        "value": values[furthest],
        "count": len(where),
        "since": departure.since,
        "usual": departure.usual,
    }
    return Alert(step, "JD504", "warning", what, where, evidence)


def _smaller(first: float, second: float) -> float:
    """Return the number nearer to zero of two of one sign; 0 if their signs differ."""
    if first * second <= 0:
        return 0.0
    return min(first, second, key=abs)
