"""Leave the levels of a factor out in turn, and predict their runs from the others.

Which two figures a curve may rest on (`CONDITIONS`), and that they are times the width, was decided
before, on runs of all levels: of that choice nothing here is held out.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Container, Hashable, Sequence
from typing import Any

import numpy as np

from jacdiag.backtest.dataset import Board, number_of
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


def held_out(board: Board, factor: str, false_alarms: float, times: int) -> HeldOut:
    """Leave out every level of a factor in turn, and predict its runs from all others.

    Args:
        board: the runs.
        factor: such as "seed" or "width".
        false_alarms: rate that the threshold of the chance has on the runs that it is chosen from.
        times: resamples of the intervals.
    """
    # 1. Predict each level by figure, curve and threshold of the other levels.
    count = len(board.wrong)
    values = [_level_name(factors.get(factor)) for factors in board.factors]
    score, chance, base = (np.full(count, np.nan) for _ in range(3))
    alarm = np.zeros(count, dtype=bool)
    levels: dict[str, Level] = {}
    chosen: dict[str, Counter[str]] = defaultdict(Counter)
    for value in dict.fromkeys(values):
        test = np.array([other == value for other in values])
        train = ~test
        figure = board.best(train)
        levels[value] = Level(int(test.sum()), int(board.wrong[test].sum()), figure)
        if figure is None:
            continue
        score[test] = board.figures[figure][test]
        chances, rate_alone, figure_of = _chances(board, train)
        for stratum, name in figure_of.items():
            chosen[stratum][name] += 1
        chance[test] = chances[test]
        base[test] = rate_alone[test]
        operating = operating_point(chances[train], board.wrong[train], false_alarms)
        if operating is not None:
            alarm[test] = chances[test] > operating.threshold

    # 2. Compare the predictions with the outcomes.
    keys: list[Hashable] = [(g, v) for g, v in zip(board.given_rate, values, strict=True)]
    known = ~np.isnan(chance)
    good_runs, bad_runs = known & ~board.wrong, known & board.wrong
    trivial = {
        name: _estimate(board, np.where(known, column, np.nan), keys, times)
        for name, column in board.trivial.items()
    }
    transfers = {
        name: _transfer(board, name, chance, keys, chosen[name])
        for name in dict.fromkeys(board.strata)
    }
    return HeldOut(
        factor,
        levels,
        _estimate(board, chance, keys, times),
        _estimate(board, score, keys, times),
        trivial,
        _brier(chance, board.wrong),
        _brier(base, board.wrong),
        _share_of_alarms(alarm, good_runs),
        _share_of_alarms(alarm, bad_runs),
        calibration(chance, board.wrong),
        transfers,
    )


def _share_of_alarms(alarm: Bools, runs: Bools) -> float | None:
    """Return the share of some runs that have an alarm; None if there are no such runs."""
    if not runs.any():
        return None
    return float(alarm[runs].mean())


def _level_name(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _estimate(board: Board, column: Floats, keys: Sequence[Hashable], times: int) -> Estimate:
    return auroc_interval(column, board.wrong, keys, board.clusters, times=times)


def _transfer(
    board: Board, stratum: str, chance: Floats, keys: Sequence[Hashable], chosen: Counter[str]
) -> Transfer:
    """Return how the predictions of one stratum compare with its outcomes."""
    places = np.array([k for k, other in enumerate(board.strata) if other == stratum])
    wrong, chances = board.wrong[places], chance[places]
    known = ~np.isnan(chances)
    expected, observed = None, None
    if known.any():
        expected = float(chances[known].mean())
        observed = float(wrong[known].mean())
    return Transfer(
        len(places),
        int(wrong.sum()),
        auroc(chances, wrong, [keys[k] for k in places]),
        expected,
        observed,
        _brier(chances, wrong),
        [name for name, _ in chosen.most_common()],
    )


def _brier(chance: Floats, wrong: Bools) -> float | None:
    """Return the mean squared distance of the chance from the outcome (Brier 1950)."""
    known = ~np.isnan(chance)
    if not known.any():
        return None
    return float(np.mean((chance[known] - wrong[known]) ** 2))


def _chances(board: Board, train: Bools) -> tuple[Floats, Floats, dict[str, str]]:
    """Return the chance of every run by curves that only the training runs made.

    Args:
        board: all runs.
        train: which of them make the curves.

    Returns:
        The chances, those without a figure, and the figure of each stratum's curve.
    """
    figure_of: dict[str, str] = {}
    chance, base = np.full(len(train), np.nan), np.full(len(train), np.nan)
    nothing = np.ones(len(train))
    for stratum in dict.fromkeys(board.strata):
        members = np.array([other == stratum for other in board.strata])
        rates, warmups = board.rates[members], board.warmups[members]
        best = _curve(board, train & members, 0)
        if best is not None:
            figure, curve = best
            figure_of[stratum] = figure
            chance[members] = curve.chances(board.figures[figure][members], rates, warmups)
        rate_alone = _fitted(board, nothing, train & members, 0)
        if rate_alone is not None:
            base[members] = rate_alone.chances(nothing[members], rates, warmups)
    return chance, base, figure_of


def _curve(board: Board, chosen: Bools, times: int) -> tuple[str, Curve] | None:
    """Return the figure of `foretelling`, and its curve."""
    figure = foretelling(board, chosen)
    if figure is None:
        return None
    curve = _fitted(board, board.figures[figure], chosen, times)
    if curve is None:
        return None
    return figure, curve


def foretelling(board: Board, chosen: Bools) -> str | None:
    """Return the figure for a curve: the condition that predicts left-out inits better.

    Every init is left out in turn, and its runs are scored by the mean log loss (Good 1952), which
    ranks nothing: a curve must say how likely, and of models that it has not seen. There are two
    candidates, for the best of thirty figures is often another one when some runs are left out. If
    neither is known, or nothing can be left out, it is the figure that ranks best.

    Args:
        board: all runs.
        chosen: which of them to use.
    """
    losses = {}
    for name in CONDITIONS:
        if name in board.figures:
            loss = _left_out_loss(board, board.figures[name], chosen)
            if loss is not None:
                losses[name] = loss
    if not losses:
        return board.best(chosen)
    return min(losses, key=lambda name: losses[name])


def _left_out_loss(board: Board, figure: Floats, chosen: Bools) -> float | None:
    """Return the mean log loss over inits left out in turn.

    A run that cannot be predicted gets the share of the other runs that went wrong.
    """
    losses: list[float] = []
    for init in dict.fromkeys(board.inits[k] for k in np.flatnonzero(chosen)):
        test = chosen & np.array([other == init for other in board.inits])
        train = chosen & ~test
        curve = _fitted(board, figure, train, 0)
        if curve is None:
            continue
        chances = curve.chances(figure[test], board.rates[test], board.warmups[test])
        chances = np.where(np.isnan(chances), board.wrong[train].mean(), chances)
        chances = np.clip(chances, SURE, 1 - SURE)
        losses += (-np.log(np.where(board.wrong[test], chances, 1 - chances))).tolist()
    return math.fsum(losses) / len(losses) if losses else None


def _fitted(board: Board, figure: Floats, chosen: Bools, times: int) -> Curve | None:
    """Fit a curve whose interval covers other inits; if there is only one, other runs of it."""
    inits = [board.inits[k] for k in np.flatnonzero(chosen)]
    clusters: Sequence[Hashable] = inits if len(set(inits)) > 1 else range(len(inits))
    return fit(
        figure[chosen],
        board.rates[chosen],
        board.wrong[chosen],
        clusters,
        warmup=board.warmups[chosen],
        times=times,
    )


def curves(board: Board, times: int, known: Container[str] = INIT) -> dict[str, RiskCurve]:
    """Fit one curve per placement to all runs.

    There is none from fewer than 10 runs of either outcome, none from two to four inits (their
    spread says nothing of another one), and none in a figure that is not `known`. The interval is
    that over resampled inits. `held_out` measures the quality of the curves.

    Args:
        board: all runs.
        times: resamples, 200 at most.
        known: figures that an audit has.

    Returns:
        Placement to curve.
    """
    by_stratum = {}
    for stratum in dict.fromkeys(board.strata):
        chosen = np.array([other == stratum for other in board.strata])
        bad = int(board.wrong[chosen].sum())
        if not LEAST <= bad <= int(chosen.sum()) - LEAST:
            continue
        best = _curve(board, chosen, min(times, 200))
        # a column of a foreign log is no figure of an audit
        if best is None or best[0] not in known:
            continue
        figure, curve = best
        used = np.flatnonzero(chosen & (board.figures[figure] > 0) & (board.rates > 0))
        by_stratum[stratum] = RiskCurve(
            stratum,
            figure,
            curve.coefficients.tolist(),
            curve.covariance.tolist(),
            _ranges(board, figure, used.tolist()),
            len(used),
            int(board.wrong[used].sum()),
            f"jacdiag backtest of {len(board.wrong)} runs",
        )
    return by_stratum


def _ranges(board: Board, figure: str, used: Sequence[int]) -> dict[str, list[float]]:
    """Return the smallest and largest value of the figure and of each factor, over some runs."""
    columns = {"figure": [float(board.figures[figure][k]) for k in used]}
    for factor in RANGED:
        values = [number_of(board.factors[k].get(factor)) for k in used]
        columns[factor] = [value for value in values if not math.isnan(value)]
    ranges = {name: [min(values), max(values)] for name, values in columns.items() if values}
    # 0 stands for runs that did not clip: no range of numbers holds those
    if ranges.get("clip", [1.0])[0] <= 0:
        del ranges["clip"]
    return ranges
