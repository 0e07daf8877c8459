"""Whether figures of the untrained model, and live alerts, predict how runs end."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from jacdiag.backtest.cross_validation import curves, held_out
from jacdiag.backtest.dataset import WORSE, Board, board
from jacdiag.backtest.metrics import Bools, Floats, auroc, auroc_interval, operating_point
from jacdiag.backtest.outcomes import label
from jacdiag.backtest.recorded_run import Run
from jacdiag.errors import UsageError
from jacdiag.records.backtest import BacktestReport, Detector, Estimate, Label, Ranking

_OUTCOMES = ("diverged", "spiked", "worse", "any")


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
    """Label runs by their outcome and rank every figure by how well it predicts the outcome.

    Args:
        runs: from `read_runs`.
        stratum: factors that make an architecture.
        peers: factors whose runs share a best loss; a run that ends `worse` over the best at its
            own or a lower learning rate is worse.
        bad: which outcome counts: "diverged", "spiked" (or diverged), "worse" (or diverged), "any".
        false_alarms: rate at which precision is given.
        lead: steps that count as early.
        times: resamples of the bootstrap.
        cluster_without: runs that differ in these factors only are resampled together.
        hold_out: factors; of each, every level in turn is left out of the choice of figure, curve
            and threshold, and then judged by them.
        worse: nats.

    Returns:
        Labels, rankings with intervals, live rules, and what was held out.

    Raises:
        UsageError: an unknown outcome, a factor that no run has, or runs that all ended alike.
    """
    # 1. The runs that reached their end, with their outcomes.
    if bad not in _OUTCOMES:
        raise UsageError("unknown outcome", got=bad, hint="diverged, spiked, worse or any")
    _check_factors(runs, [*stratum, *peers, *hold_out])
    complete = [run for run in runs if run.whole]
    not_complete = len(runs) - len(complete)
    if not complete:
        raise UsageError(
            "no run has reached its end",
            got=f"{len(runs)} begun",
            hint="the factor `steps` says where it is",
        )
    labels = [label(run.loss) for run in complete]
    dataset = board(
        complete,
        labels,
        bad=bad,
        stratum=stratum,
        peers=peers,
        cluster_without=cluster_without,
        worse=worse,
    )
    wrong = dataset.wrong
    _check_outcomes(wrong, not_complete)

    # 2. Every figure, and the trivial classifiers.
    rankings = []
    for is_trivial, figures in ((False, dataset.figures), (True, dataset.trivial)):
        for name, values in figures.items():
            rankings.append(_ranking(dataset, name, values, is_trivial, false_alarms, times))
    rankings.sort(key=lambda ranking: (ranking.trivial, -(ranking.all_pairs or 0.0)))

    # 3. The report.
    asked = {
        "stratum": list(stratum),
        "peers": list(peers),
        "bad": bad,
        "false_alarms": false_alarms,
        "lead": lead,
        "hold_out": list(hold_out),
        "worse": worse,
        "not_whole": not_complete,
    }
    names = [run.name for run in complete]
    return BacktestReport(
        labels=dict(zip(names, labels, strict=True)),
        bad=dict(zip(names, (bool(is_wrong) for is_wrong in wrong), strict=True)),
        strata=_count_strata(dataset),
        rankings=rankings,
        detectors=_detectors(complete, labels, wrong, lead),
        held_out=[held_out(dataset, factor, false_alarms, times) for factor in hold_out],
        curves=curves(dataset, times) if list(stratum) == ["placement"] else {},
        asked=asked,
    )


def _check_factors(runs: Sequence[Run], names: Sequence[str]) -> None:
    """Raise if no run has one of the factors."""
    known = {name for run in runs for name in run.factors}
    for name in names:
        if name not in known:
            raise UsageError(
                f"no run has the factor '{name}'",
                got=", ".join(sorted(known)) or "no factors at all",
            )


def _check_outcomes(wrong: Bools, not_complete: int) -> None:
    """Raise if all runs ended alike."""
    if wrong.any() and not wrong.all():
        return
    hint = "--bad chooses what is wrong"
    if not_complete:
        hint = f"{not_complete} more have not reached their end"
    raise UsageError(
        "all runs ended alike: nothing can be ranked",
        got=f"{int(wrong.sum())} of {len(wrong)} went wrong",
        hint=hint,
    )


def _count_strata(dataset: Board) -> dict[str, list[int]]:
    """Return for each stratum how many runs it has, and how many of them went wrong."""
    counts: dict[str, list[int]] = {}
    for name, is_wrong in zip(dataset.strata, dataset.wrong, strict=True):
        count = counts.setdefault(name, [0, 0])
        count[0] += 1
        count[1] += bool(is_wrong)
    return counts


def _ranking(
    dataset: Board, name: str, values: Floats, trivial: bool, false_alarms: float, times: int
) -> Ranking:
    """Rank one figure: over all runs, within strata, and with the learning rate given."""
    wrong, strata = dataset.wrong, dataset.strata

    def interval(groups: Sequence[Hashable] | None) -> Estimate:
        return auroc_interval(values, wrong, groups, dataset.clusters, times=times)

    # 1. Within each stratum alone.
    by_stratum: dict[str, float | None] = {}
    given_by_stratum: dict[str, float | None] = {}
    for stratum in dict.fromkeys(strata):
        places = np.array([k for k, other in enumerate(strata) if other == stratum])
        rates = [dataset.given_rate[k] for k in places]
        by_stratum[stratum] = auroc(values[places], wrong[places])
        given_by_stratum[stratum] = auroc(values[places], wrong[places], rates, missing_ties=True)

    # 2. Over all strata.
    return Ranking(
        name,
        interval(None),
        interval(strata),
        interval(dataset.given_rate),
        auroc(values, wrong, dataset.given_rate, missing_ties=True),
        by_stratum,
        given_by_stratum,
        operating_point(values, wrong, false_alarms),
        trivial,
        int(np.sum(~np.isnan(values))),
    )


# -- live rules ------------------------------------------------------------------------------------
@dataclass
class _Tally:
    """Counts of one live rule over all runs, as `Detector` has them."""

    bad: int = 0
    leads: list[int] = field(default_factory=list)
    alarms: int = 0
    healthy_steps: int = 0
    ahead_by_outcome: dict[str, list[int]] = field(default_factory=dict)

    def add_healthy(self, run: Run, alert_steps: list[int]) -> None:
        self.alarms += len(alert_steps)
        self.healthy_steps += len(run.steps)

    def add_bad(self, run: Run, outcome: Label, alert_steps: list[int], lead: int) -> None:
        """Count a run that went wrong, and how long before that the rule fired first."""
        assert outcome.left is not None
        self.bad += 1
        last = len(run.steps) - 1
        left_at = int(run.steps[min(outcome.left, last)])
        leads = [left_at - step for step in alert_steps if step <= left_at]
        ahead, count = self.ahead_by_outcome.setdefault(outcome.outcome, [0, 0])
        if leads:
            self.leads.append(max(leads))
            ahead += max(leads) >= lead
        self.ahead_by_outcome[outcome.outcome] = [ahead, count + 1]


def _detectors(
    runs: Sequence[Run], labels: Sequence[Label], wrong: Bools, lead: int
) -> list[Detector]:
    """Return how each live rule did, and all of them together.

    What step 0 says is the audit's, and no prediction of a live rule.
    """
    codes = sorted({code for run in runs for step, code in run.alerts if step > 0})
    detectors = [_detector(code, {code}, runs, labels, wrong, lead) for code in codes]
    if len(codes) > 1:
        detectors.append(_detector("any", set(codes), runs, labels, wrong, lead))
    return detectors


def _detector(
    name: str,
    codes: set[str],
    runs: Sequence[Run],
    labels: Sequence[Label],
    wrong: Bools,
    lead: int,
) -> Detector:
    """Count alerts of some codes in healthy runs, and before bad runs left their band."""
    tally = _Tally()
    for run, outcome, is_wrong in zip(runs, labels, wrong, strict=True):
        alert_steps = [step for step, code in run.alerts if step > 0 and code in codes]
        if outcome.outcome == "healthy" and not is_wrong:
            tally.add_healthy(run, alert_steps)
        elif is_wrong and outcome.left is not None:
            tally.add_bad(run, outcome, alert_steps, lead)
    return Detector(
        name,
        tally.bad,
        len(tally.leads),
        sum(value >= lead for value in tally.leads),
        tally.leads,
        tally.alarms,
        tally.healthy_steps,
        tally.ahead_by_outcome,
    )
