"""A factor's levels are left out in turn, and foretold by figure, curve and threshold that the
others made.

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
LEAST = 10  # runs of either outcome that a curve needs before it may speak of others


def held_out(board: Board, factor: str, false_alarms: float, times: int) -> HeldOut:
    """Leaves out every level of a factor in turn.

    Args:
        factor: such as "seed" or "width".
        false_alarms: rate that the threshold of the chance has on the runs that it is chosen from.
    """
    count = len(board.wrong)
    values = [_told(board.factors[k].get(factor)) for k in range(count)]
    score, chance, base = (np.full(count, np.nan) for _ in range(3))
    alarm = np.zeros(count, dtype=bool)
    levels: dict[str, Level] = {}
    chosen: dict[str, Counter[str]] = defaultdict(Counter)
    for value in dict.fromkeys(values):
        test = np.array([v == value for v in values])
        figure = board.best(~test)
        levels[value] = Level(int(test.sum()), int(board.wrong[test].sum()), figure)
        if figure is None:
            continue
        score[test] = board.figures[figure][test]
        mine, plain, by = _chances(board, ~test)
        for stratum, name in by.items():
            chosen[stratum][name] += 1
        chance[test], base[test] = mine[test], plain[test]
        at = operating_point(mine[~test], board.wrong[~test], false_alarms)
        alarm[test] = mine[test] > at.threshold if at is not None else False
    keys: list[Hashable] = [(g, v) for g, v in zip(board.given_rate, values, strict=True)]
    known = ~np.isnan(chance)
    good, ill = known & ~board.wrong, known & board.wrong
    return HeldOut(
        factor,
        levels,
        _estimate(board, chance, keys, times),
        _estimate(board, score, keys, times),
        {
            n: _estimate(board, np.where(known, values, np.nan), keys, times)
            for n, values in board.trivial.items()
        },
        _brier(chance, board.wrong),
        _brier(base, board.wrong),
        float(alarm[good].mean()) if good.any() else None,
        float(alarm[ill].mean()) if ill.any() else None,
        calibration(chance, board.wrong),
        {
            name: _transfer(board, name, chance, keys, chosen[name])
            for name in dict.fromkeys(board.strata)
        },
    )


def _told(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _estimate(board: Board, column: Floats, keys: Sequence[Hashable], times: int) -> Estimate:
    return auroc_interval(column, board.wrong, keys, board.clusters, times=times)


def _transfer(
    board: Board, stratum: str, chance: Floats, keys: Sequence[Hashable], chosen: Counter[str]
) -> Transfer:
    mine = np.array([k for k, s in enumerate(board.strata) if s == stratum])
    wrong, known = board.wrong[mine], ~np.isnan(chance[mine])
    return Transfer(
        len(mine),
        int(wrong.sum()),
        auroc(chance[mine], wrong, [keys[k] for k in mine]),
        float(chance[mine][known].mean()) if known.any() else None,
        float(wrong[known].mean()) if known.any() else None,
        _brier(chance[mine], wrong),
        [name for name, _ in chosen.most_common()],
    )


def _brier(chance: Floats, wrong: Bools) -> float | None:
    """Mean squared distance between the chance and what happened (Brier 1950)."""
    known = ~np.isnan(chance)
    return float(np.mean((chance[known] - wrong[known]) ** 2)) if known.any() else None


def _chances(board: Board, train: Bools) -> tuple[Floats, Floats, dict[str, str]]:
    """The chance of every run by curves that only the train runs made; without a figure; the figure
    of each curve.
    """
    by: dict[str, str] = {}
    chance, base = np.full(len(train), np.nan), np.full(len(train), np.nan)
    nothing = np.ones(len(train))
    for stratum in dict.fromkeys(board.strata):
        mine = np.array([s == stratum for s in board.strata])
        made = _curve(board, train & mine, 0)
        plain = _fitted(board, nothing, train & mine, 0)
        if made is not None:
            by[stratum] = made[0]
            chance[mine] = made[1].chances(
                board.figures[made[0]][mine], board.rates[mine], board.warmups[mine]
            )
        if plain is not None:
            base[mine] = plain.chances(nothing[mine], board.rates[mine], board.warmups[mine])
    return chance, base, by


def _curve(board: Board, chosen: Bools, times: int) -> tuple[str, Curve] | None:
    """The figure of `foretelling`, and its curve."""
    figure = foretelling(board, chosen)
    curve = None if figure is None else _fitted(board, board.figures[figure], chosen, times)
    return None if figure is None or curve is None else (figure, curve)


def foretelling(board: Board, chosen: Bools) -> str | None:
    """The figure that a curve is in: of the paper's two conditions the one that foretells inits
    left out better.

    Every init is left out in turn, and its runs are scored by the mean log loss (Good 1952), which
    ranks nothing: a curve must say how likely, and of models that it has not seen. Two, for the
    best of thirty figures is often another one when some runs are left out. Where neither is known,
    or nothing can be left out, the figure that ranks best.
    """
    told = {
        name: _left_out_loss(board, board.figures[name], chosen)
        for name in CONDITIONS
        if name in board.figures
    }
    known = {name: loss for name, loss in told.items() if loss is not None}
    return min(known, key=lambda name: known[name]) if known else board.best(chosen)


def _left_out_loss(board: Board, figure: Floats, chosen: Bools) -> float | None:
    """Mean log loss over inits left out in turn; what cannot be foretold is given the share that
    went wrong.
    """
    losses: list[float] = []
    for init in dict.fromkeys(board.inits[k] for k in np.flatnonzero(chosen)):
        test = chosen & np.array([i == init for i in board.inits])
        train = chosen & ~test
        curve = _fitted(board, figure, train, 0)
        if curve is None:
            continue
        told = curve.chances(figure[test], board.rates[test], board.warmups[test])
        told = np.clip(np.where(np.isnan(told), board.wrong[train].mean(), told), SURE, 1 - SURE)
        losses += (-np.log(np.where(board.wrong[test], told, 1 - told))).tolist()
    return math.fsum(losses) / len(losses) if losses else None


def _fitted(board: Board, figure: Floats, chosen: Bools, times: int) -> Curve | None:
    """A curve whose interval says what other inits might have shown; of one init alone, what other
    runs of it might.
    """
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
    """One curve per placement from all runs, for `report/risk.toml`.

    None from fewer than 10 runs of either outcome, none from two to four inits (their spread tells
    no other one), and none in a figure that is not `known`. The interval is that over resampled
    inits; its quality `held_out` tells.
    """
    found = {}
    for stratum in dict.fromkeys(board.strata):
        chosen = np.array([s == stratum for s in board.strata])
        bad = int(board.wrong[chosen].sum())
        made = (
            _curve(board, chosen, min(times, 200))
            if LEAST <= bad <= int(chosen.sum()) - LEAST
            else None
        )
        # a column of a foreign log is no figure of an audit
        if made is None or made[0] not in known:
            continue
        name, curve = made
        used = np.flatnonzero(chosen & (board.figures[name] > 0) & (board.rates > 0))
        spans = {
            "figure": board.figures[name][used],
            **{
                f: np.array(
                    [
                        number
                        for k in used
                        if not math.isnan(number := number_of(board.factors[k].get(f)))
                    ]
                )
                for f in RANGED
            },
        }
        ranges = {f: [float(v.min()), float(v.max())] for f, v in spans.items() if v.size}
        # 0 stands for runs that did not clip: no range of numbers holds those
        if ranges.get("clip", [1.0])[0] <= 0:
            del ranges["clip"]
        found[stratum] = RiskCurve(
            stratum,
            name,
            curve.coefficients.tolist(),
            curve.covariance.tolist(),
            ranges,
            len(used),
            int(board.wrong[used].sum()),
            f"jacdiag backtest of {len(board.wrong)} runs",
        )
    return found
