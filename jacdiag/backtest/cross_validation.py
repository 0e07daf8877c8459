"""Leave the levels of a factor out in turn, and predict their runs from the others.

Which two figures a curve may rest on (`CONDITIONS`), and that they are multiplied by the width, was
decided before, on runs of all levels. Nothing is held out of that choice.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Container, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jacdiag.backtest.dataset import Dataset, number_of
from jacdiag.backtest.metrics import (
    Bools,
    Floats,
    auroc,
    auroc_interval,
    calibration,
    operating_point,
)
from jacdiag.backtest.risk_fit import Curve, fit
from jacdiag.records.backtest import Estimate, HeldOut, Level, Transfer
from jacdiag.records.risk import RiskCurve
from jacdiag.rules.risk_features import CONDITIONS, INIT

RANGED = ("lr", "warmup", "width", "layers", "clip", "beta2")
SURE = 1e-6  # no chance is nearer to 0 or 1 when it is scored
LEAST = 10  # runs of either outcome that a curve needs before it is used for others


def held_out(dataset: Dataset, factor: str, false_alarms: float, times: int) -> HeldOut:
    """Leave out every level of a factor in turn, and predict its runs from all others.

    Args:
        dataset: the runs.
        factor: such as "seed" or "width".
        false_alarms: rate that the threshold of the chance has on the runs that it is chosen from.
        times: resamples of the intervals.
    """
    # 1. Predict each level by figure, curve and threshold of the other levels.
    levels_of_runs = [_level_name(factors.get(factor)) for factors in dataset.factors]
    predictions = _Predictions.unknown(len(dataset.is_wrong))
    levels = {}
    for level in dict.fromkeys(levels_of_runs):
        test = np.array([other == level for other in levels_of_runs])
        levels[level] = _predict_level(dataset, test, false_alarms, predictions)

    # 2. What the predictions are compared within.
    pairs = zip(dataset.given_rate, levels_of_runs, strict=True)
    keys: list[Hashable] = list(pairs)
    known = ~np.isnan(predictions.chance)
    trivial = {}
    for name, column in dataset.trivial.items():
        trivial[name] = _estimate(dataset, np.where(known, column, np.nan), keys, times)

    # 3. Compare them with the outcomes.
    transfers = {}
    for name in dict.fromkeys(dataset.strata):
        figures = predictions.figures_of[name]
        transfers[name] = _transfer(dataset, name, predictions.chance, keys, figures)
    return HeldOut(
        factor=factor,
        levels=levels,
        auroc=_estimate(dataset, predictions.chance, keys, times),
        one_figure=_estimate(dataset, predictions.score, keys, times),
        trivial=trivial,
        brier=_brier(predictions.chance, dataset.is_wrong),
        brier_rate_alone=_brier(predictions.rate_alone, dataset.is_wrong),
        false_alarms=_share_of_alarms(predictions.alarm, known & ~dataset.is_wrong),
        recall=_share_of_alarms(predictions.alarm, known & dataset.is_wrong),
        calibration=calibration(predictions.chance, dataset.is_wrong),
        transfer=transfers,
    )


@dataclass
class _Predictions:
    """What the other levels predict of each run; nan where they predict nothing.

    Attributes:
        score: the figure that ranks the runs of the other levels best.
        chance: that the run goes wrong.
        rate_alone: that chance by learning rate and warm-up alone.
        alarm: whether the chance lies above the threshold that the other levels chose.
        figures_of: stratum -> how often each figure was chosen for its curve.
    """

    score: Floats
    chance: Floats
    rate_alone: Floats
    alarm: Bools
    figures_of: dict[str, Counter[str]]

    @classmethod
    def unknown(cls, count: int) -> _Predictions:
        """Return predictions of which none is known yet.

        Args:
            count: of runs.
        """
        return cls(
            score=np.full(count, np.nan),
            chance=np.full(count, np.nan),
            rate_alone=np.full(count, np.nan),
            alarm=np.zeros(count, dtype=bool),
            figures_of=defaultdict(Counter),
        )


def _predict_level(
    dataset: Dataset, test: Bools, false_alarms: float, predictions: _Predictions
) -> Level:
    """Predict the runs of one level from all others.

    Args:
        dataset: all runs.
        test: the runs of the level.
        false_alarms: see `held_out`.
        predictions: where the predictions go.
    """
    # 1. The figure that ranks the others best.
    train = ~test
    figure = dataset.best(train)
    level = Level(int(test.sum()), int(dataset.is_wrong[test].sum()), figure)
    if figure is None:
        return level
    predictions.score[test] = dataset.figures[figure][test]

    # 2. The chance, by curves of the others.
    chances = _chances(dataset, train)
    predictions.chance[test] = chances.by_figure[test]
    predictions.rate_alone[test] = chances.by_rate[test]
    for stratum, name in chances.figure_of.items():
        predictions.figures_of[stratum][name] += 1

    # 3. The alarms, by the threshold of the others.
    operating = operating_point(chances.by_figure[train], dataset.is_wrong[train], false_alarms)
    if operating is not None:
        predictions.alarm[test] = chances.by_figure[test] > operating.threshold
    return level


def _share_of_alarms(alarm: Bools, runs: Bools) -> float | None:
    """Return the share of some runs that have an alarm; None if there are no such runs."""
    if not runs.any():
        return None
    return float(alarm[runs].mean())


def _level_name(value: Any) -> str:
    """Return a level of a factor as text: 0.1 and not 0.10000000000000001."""
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _estimate(dataset: Dataset, column: Floats, keys: Sequence[Hashable], times: int) -> Estimate:
    """Return the AUROC of a column; only runs with the same key are compared."""
    return auroc_interval(column, dataset.is_wrong, keys, dataset.clusters, times=times)


def _transfer(
    dataset: Dataset, stratum: str, chance: Floats, keys: Sequence[Hashable], figures: Counter[str]
) -> Transfer:
    """Return how the predictions of one stratum compare with its outcomes."""
    # 1. The runs of the stratum.
    places = np.flatnonzero(_runs_of(dataset, stratum)).tolist()
    is_wrong = dataset.is_wrong[places]
    chances = chance[places]

    # 2. The mean chance and the share that went wrong, of the same runs.
    known = ~np.isnan(chances)
    expected = None
    observed = None
    if known.any():
        expected = float(chances[known].mean())
        observed = float(is_wrong[known].mean())
    return Transfer(
        runs=len(places),
        bad=int(is_wrong.sum()),
        auroc=auroc(chances, is_wrong, [keys[place] for place in places]),
        expected=expected,
        observed=observed,
        brier=_brier(chances, is_wrong),
        figures=[name for name, _ in figures.most_common()],
    )


def _runs_of(dataset: Dataset, stratum: str) -> Bools:
    """Return which runs belong to a stratum."""
    return np.array([other == stratum for other in dataset.strata])


def _brier(chance: Floats, is_wrong: Bools) -> float | None:
    """Return the mean squared distance of the chance from the outcome (Brier 1950)."""
    known = ~np.isnan(chance)
    if not known.any():
        return None
    return float(np.mean((chance[known] - is_wrong[known]) ** 2))


@dataclass(frozen=True)
class _Chances:
    """The chance of every run by curves of some of them.

    Attributes:
        by_figure: by a figure, the learning rate and the warm-up; nan without a curve.
        by_rate: by learning rate and warm-up alone.
        figure_of: stratum -> the figure of its curve.
    """

    by_figure: Floats
    by_rate: Floats
    figure_of: dict[str, str]


def _chances(dataset: Dataset, train: Bools) -> _Chances:
    """Return the chance of every run by curves that only the training runs made.

    Args:
        dataset: all runs.
        train: which of them make the curves.
    """
    by_figure = np.full(len(train), np.nan)
    by_rate = np.full(len(train), np.nan)
    figure_of: dict[str, str] = {}
    no_figure = np.ones(len(train))
    for stratum in dict.fromkeys(dataset.strata):
        members = _runs_of(dataset, stratum)
        rates = dataset.rates[members]
        warmups = dataset.warmups[members]

        # 1. By the figure that fits the stratum.
        fitted = _fit_best(dataset, train & members, 0)
        if fitted is not None:
            figure_of[stratum] = fitted.figure
            values = dataset.figures[fitted.figure][members]
            by_figure[members] = fitted.curve.chances(values, rates, warmups)

        # 2. By a figure that is 1 for all, whose slope is 0.
        rate_curve = _fit_curve(dataset, no_figure, train & members, 0)
        if rate_curve is not None:
            by_rate[members] = rate_curve.chances(no_figure[members], rates, warmups)
    return _Chances(by_figure, by_rate, figure_of)


@dataclass(frozen=True)
class _FittedFigure:
    """A figure and its curve."""

    figure: str
    curve: Curve


def _fit_best(dataset: Dataset, chosen: Bools, times: int) -> _FittedFigure | None:
    """Fit a curve in the figure of `choose_figure`; None if there is no such figure or curve."""
    figure = choose_figure(dataset, chosen)
    if figure is None:
        return None

    # A curve needs runs of both outcomes.
    curve = _fit_curve(dataset, dataset.figures[figure], chosen, times)
    if curve is None:
        return None
    return _FittedFigure(figure, curve)


def choose_figure(dataset: Dataset, chosen: Bools) -> str | None:
    """Return the figure for a curve: the condition that predicts left-out inits better.

    Every init is left out in turn, and its runs are scored by the mean log loss (Good 1952). That
    score does not rank: a curve must say how likely, and of models that it has not seen. There are
    only two candidates, because the best of thirty figures is often another one when some runs are
    left out. If neither is known, or nothing can be left out, it is the figure that ranks best.

    Args:
        dataset: all runs.
        chosen: which of them to use.
    """
    # 1. The loss of each candidate.
    losses = {}
    for name in CONDITIONS:
        if name not in dataset.figures:
            continue
        loss = _left_out_loss(dataset, dataset.figures[name], chosen)
        if loss is not None:
            losses[name] = loss

    # 2. The least loss, the first of equal ones.
    if not losses:
        return dataset.best(chosen)
    return min(losses, key=lambda name: losses[name])


def _left_out_loss(dataset: Dataset, figure: Floats, chosen: Bools) -> float | None:
    """Return the mean log loss over inits left out in turn.

    A run that cannot be predicted gets the share of the other runs that went wrong.
    """
    losses: list[float] = []
    for init in dict.fromkeys(_inits_of(dataset, chosen)):
        # 1. A curve of the other inits.
        test = chosen & np.array([other == init for other in dataset.inits])
        train = chosen & ~test
        curve = _fit_curve(dataset, figure, train, 0)
        if curve is None:
            continue

        # 2. Its loss on the runs of this one.
        chances = curve.chances(figure[test], dataset.rates[test], dataset.warmups[test])
        chances = np.where(np.isnan(chances), dataset.is_wrong[train].mean(), chances)
        chances = np.clip(chances, SURE, 1 - SURE)
        chance_of_outcome = np.where(dataset.is_wrong[test], chances, 1 - chances)
        losses += (-np.log(chance_of_outcome)).tolist()
    if not losses:
        return None
    return math.fsum(losses) / len(losses)


def _inits_of(dataset: Dataset, chosen: Bools) -> list[Hashable]:
    """Return the init of each chosen run."""
    return [dataset.inits[place] for place in np.flatnonzero(chosen)]


def _fit_curve(dataset: Dataset, figure: Floats, chosen: Bools, times: int) -> Curve | None:
    """Fit a curve whose interval covers other inits; if there is only one, other runs of it."""
    clusters: Sequence[Hashable] = _inits_of(dataset, chosen)
    if len(set(clusters)) <= 1:
        clusters = range(len(clusters))
    return fit(
        figure[chosen],
        dataset.rates[chosen],
        dataset.is_wrong[chosen],
        clusters,
        warmup=dataset.warmups[chosen],
        times=times,
    )


def curves(dataset: Dataset, times: int, known: Container[str] = INIT) -> dict[str, RiskCurve]:
    """Fit one curve per placement to all runs.

    There is no curve from fewer than 10 runs of either outcome, and none in a figure that is not
    `known`. There is none from two to four inits either: their spread says nothing of another one.
    The interval is that over resampled inits. `held_out` measures the quality of the curves.

    Args:
        dataset: all runs.
        times: resamples, 200 at most.
        known: figures that an audit has.

    Returns:
        Placement to curve.
    """
    by_stratum = {}
    for stratum in dict.fromkeys(dataset.strata):
        # 1. Enough runs of either outcome.
        chosen = _runs_of(dataset, stratum)
        bad = int(dataset.is_wrong[chosen].sum())
        good = int(chosen.sum()) - bad
        if min(bad, good) < LEAST:
            continue

        # 2. A figure that an audit has. A column of a foreign log is none.
        fitted = _fit_best(dataset, chosen, min(times, 200))
        if fitted is None:
            continue
        if fitted.figure in known:
            by_stratum[stratum] = _curve_record(dataset, stratum, chosen, fitted)
    return by_stratum


def _curve_record(
    dataset: Dataset, stratum: str, chosen: Bools, fitted: _FittedFigure
) -> RiskCurve:
    """Return a curve as it is written to a file, with the ranges of the runs that made it."""
    has_figure = dataset.figures[fitted.figure] > 0
    has_rate = dataset.rates > 0
    used = np.flatnonzero(chosen & has_figure & has_rate)
    return RiskCurve(
        placement=stratum,
        figure=fitted.figure,
        coefficients=fitted.curve.coefficients.tolist(),
        covariance=fitted.curve.covariance.tolist(),
        ranges=_ranges(dataset, fitted.figure, used.tolist()),
        runs=len(used),
        bad=int(dataset.is_wrong[used].sum()),
        source=f"jacdiag backtest of {len(dataset.is_wrong)} runs",
    )


def _ranges(dataset: Dataset, figure: str, used: Sequence[int]) -> dict[str, list[float]]:
    """Return the smallest and largest value of the figure and of each factor, over some runs."""
    # 1. The figure.
    ranges: dict[str, list[float]] = {}
    values = [float(dataset.figures[figure][place]) for place in used]
    _add_range(ranges, "figure", values)

    # 2. The factors.
    for factor in RANGED:
        values = [number_of(dataset.factors[place].get(factor)) for place in used]
        _add_range(ranges, factor, [value for value in values if not math.isnan(value)])

    # 3. A clip of 0 stands for a run that did not clip: no range of numbers holds those.
    clip = ranges.get("clip")
    if clip is not None and clip[0] <= 0:
        del ranges["clip"]
    return ranges


def _add_range(ranges: dict[str, list[float]], name: str, values: Sequence[float]) -> None:
    """Add the smallest and largest of some values, if there are any."""
    if values:
        ranges[name] = [min(values), max(values)]
