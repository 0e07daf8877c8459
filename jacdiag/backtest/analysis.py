"""Do figures of the untrained model, and live alerts, foretell how runs end? Beside trivial
classifiers.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from jacdiag.backtest.cross_validation import curves, held_out
from jacdiag.backtest.dataset import WORSE, Board, board
from jacdiag.backtest.metrics import Bools, Floats, auroc, auroc_interval, operating_point
from jacdiag.backtest.outcomes import label
from jacdiag.backtest.recorded_run import Run
from jacdiag.errors import UsageError
from jacdiag.records.backtest import BacktestReport, Detector, Estimate, Label, Ranking


def backtest(
    runs: Sequence[Run],
    *,
    stratum: Sequence[str] = ("placement",),
    peers: Sequence[str] = (),
    bad: str = "any",
    false_alarms: float = 0.05,
    lead: int = 20,
    times: int = 1000,
    cluster_without: Sequence[str] = ("seed",),
    hold_out: Sequence[str] = (),
    worse: float = WORSE,
) -> BacktestReport:
    """Labels runs and ranks every figure.

    Args:
        runs: from `read_runs`.
        stratum: factors that make an architecture.
        peers: factors whose runs share a best loss; a run that ends `worse` over the best at its
            own or a lower learning rate is worse.
        bad: which outcome counts: "diverged", "spiked" (or diverged), "worse" (or diverged), "any".
        false_alarms: rate at which precision is given.
        lead: steps that count as early.
        times: resamples of the bootstrap.
        hold_out: factors; of each, every level in turn is left out of the choice of figure, curve
            and threshold, and then judged by them.
        worse: nats.
        cluster_without: runs that differ in these factors only are resampled together.

    Raises:
        UsageError: an unknown outcome, a factor that no run has, or runs that all ended alike.
    """
    if bad not in ("diverged", "spiked", "worse", "any"):
        raise UsageError("unknown outcome", got=bad, hint="diverged, spiked, worse or any")
    known = {name for run in runs for name in run.factors}
    for name in (*stratum, *peers, *hold_out):
        if name not in known:
            raise UsageError(
                f"no run has the factor '{name}'",
                got=", ".join(sorted(known)) or "no factors at all",
            )
    given, runs = len(runs), [run for run in runs if run.whole]
    if not runs:
        raise UsageError(
            "no run has reached its end",
            got=f"{given} begun",
            hint="the factor `steps` says where it is",
        )
    labels = [label(run.loss) for run in runs]
    cast = board(
        runs,
        labels,
        bad=bad,
        stratum=stratum,
        peers=peers,
        cluster_without=cluster_without,
        worse=worse,
    )
    wrong = cast.wrong
    if wrong.all() or not wrong.any():
        told = f"{int(wrong.sum())} of {len(wrong)} went wrong"
        torn = given - len(runs)
        hint = f"{torn} more have not reached their end" if torn else "--bad chooses what is wrong"
        raise UsageError("all runs ended alike: nothing can be ranked", got=told, hint=hint)
    rankings = [
        _ranking(cast, name, values, False, false_alarms, times)
        for name, values in cast.figures.items()
    ]
    rankings += [
        _ranking(cast, name, values, True, false_alarms, times)
        for name, values in cast.trivial.items()
    ]
    ill = [name for name, w in zip(cast.strata, wrong, strict=True) if w]
    counts = {
        name: [cast.strata.count(name), ill.count(name)] for name in dict.fromkeys(cast.strata)
    }
    asked = {
        "stratum": list(stratum),
        "peers": list(peers),
        "bad": bad,
        "false_alarms": false_alarms,
        "lead": lead,
        "hold_out": list(hold_out),
        "worse": worse,
        "not_whole": given - len(runs),
    }
    return BacktestReport(
        labels={run.name: one for run, one in zip(runs, labels, strict=True)},
        bad={run.name: bool(w) for run, w in zip(runs, wrong, strict=True)},
        strata=counts,
        rankings=sorted(rankings, key=lambda r: (r.trivial, -(r.all_pairs or 0.0))),
        detectors=_detectors(runs, labels, wrong, lead),
        held_out=[held_out(cast, factor, false_alarms, times) for factor in hold_out],
        curves=curves(cast, times) if list(stratum) == ["placement"] else {},
        asked=asked,
    )


def _ranking(
    board: Board, name: str, values: Floats, trivial: bool, false_alarms: float, times: int
) -> Ranking:
    wrong, strata = board.wrong, board.strata

    def by(groups: Sequence[Hashable] | None) -> Estimate:
        return auroc_interval(values, wrong, groups, board.clusters, times=times)

    each: dict[str, float | None] = {}
    given: dict[str, float | None] = {}
    for stratum in dict.fromkeys(strata):
        mine = np.array([k for k, s in enumerate(strata) if s == stratum])
        each[stratum] = auroc(values[mine], wrong[mine])
        rates = [board.given_rate[k] for k in mine]
        given[stratum] = auroc(values[mine], wrong[mine], rates, missing_ties=True)
    return Ranking(
        name,
        by(None),
        by(strata),
        by(board.given_rate),
        auroc(values, wrong, board.given_rate, missing_ties=True),
        each,
        given,
        operating_point(values, wrong, false_alarms),
        trivial,
        int(np.sum(~np.isnan(values))),
    )


# -- live rules ------------------------------------------------------------------------------------
def _detectors(
    runs: Sequence[Run], labels: Sequence[Label], wrong: Bools, lead: int
) -> list[Detector]:
    """Alerts in the run; what step 0 says is the audit's, and not foretold by a live rule."""
    codes = sorted({code for run in runs for step, code in run.alerts if step > 0})
    made = []
    for code in [*codes, *(["any"] if len(codes) > 1 else [])]:
        leads, alarms, steps, bad = [], 0, 0, 0
        kinds: dict[str, list[int]] = {}
        for run, one, ill in zip(runs, labels, wrong, strict=True):
            spoken = [step for step, which in run.alerts if step > 0 and code in (which, "any")]
            if one.outcome == "healthy" and not ill:
                alarms, steps = alarms + len(spoken), steps + len(run.steps)
            elif ill and one.left is not None:
                bad += 1
                left = int(run.steps[min(one.left, len(run.steps) - 1)])
                early = [left - step for step in spoken if step <= left]
                leads += [max(early)] if early else []
                kind = kinds.setdefault(one.outcome, [0, 0])
                kind[0] += bool(early) and max(early) >= lead
                kind[1] += 1
        ahead = sum(1 for value in leads if value >= lead)
        made.append(Detector(code, bad, len(leads), ahead, leads, alarms, steps, kinds))
    return made
