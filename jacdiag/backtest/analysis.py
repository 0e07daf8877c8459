"""Whether figures of the untrained model, and live alerts, predict how runs end."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from jacdiag.backtest.cross_validation import curves, held_out
from jacdiag.backtest.dataset import WORSE, Dataset, build_dataset
from jacdiag.backtest.metrics import (
    Bools,
    Floats,
    auroc,
    auroc_interval,
    lead_interval,
    operating_point,
    pair_runs,
)
from jacdiag.backtest.outcomes import label
from jacdiag.backtest.recorded_run import Run
from jacdiag.errors import UsageError
from jacdiag.records.backtest import (
    LEAST_RUNS,
    BacktestReport,
    Detector,
    Estimate,
    Label,
    Lead,
    Ranking,
)

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
    complete = _complete_runs(runs)
    not_complete = len(runs) - len(complete)
    labels = [label(run.loss) for run in complete]
    dataset = build_dataset(
        complete,
        labels,
        bad=bad,
        stratum=stratum,
        peers=peers,
        cluster_without=cluster_without,
        worse=worse,
    )
    is_wrong = dataset.is_wrong
    _check_outcomes(is_wrong, not_complete)

    # 2. A curve of the chance holds for a placement of the norm, and for no other factor.
    curves_of_risk = {}
    if list(stratum) == ["placement"]:
        curves_of_risk = curves(dataset, times)

    # 3. The report.
    options = {
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
    rankings = _rankings(dataset, false_alarms, times)
    return BacktestReport(
        labels=dict(zip(names, labels, strict=True)),
        bad=dict(zip(names, is_wrong.tolist(), strict=True)),
        strata=_count_strata(dataset),
        rankings=rankings,
        detectors=_detectors(complete, labels, is_wrong, lead),
        held_out=[held_out(dataset, factor, false_alarms, times) for factor in hold_out],
        curves=curves_of_risk,
        lead=_lead(dataset, rankings, times),
        comparable=_count_comparable(dataset),
        asked=options,
    )


def _check_factors(runs: Sequence[Run], names: Sequence[str]) -> None:
    """Raise if no run has one of the factors."""
    known: set[str] = set()
    for run in runs:
        known.update(run.factors)
    listed = ", ".join(sorted(known)) or "no factors at all"
    for name in names:
        if name not in known:
            raise UsageError(f"no run has the factor '{name}'", got=listed)


def _complete_runs(runs: Sequence[Run]) -> list[Run]:
    """Return the runs that reached their end; raise if there are none."""
    complete = [run for run in runs if run.whole]
    if complete:
        return complete
    raise UsageError(
        "no run has reached its end",
        got=f"{len(runs)} begun",
        hint="the factor `steps` says where it is",
    )


def _check_outcomes(is_wrong: Bools, not_complete: int) -> None:
    """Raise if all runs ended alike."""
    if is_wrong.any() and not is_wrong.all():
        return

    # Runs that have not reached their end may end otherwise.
    hint = f"an AUROC takes {LEAST_RUNS} runs of either outcome; --bad chooses what is wrong"
    if not_complete:
        hint = f"{not_complete} more have not reached their end"
    raise UsageError(
        "all runs ended alike: nothing can be ranked",
        got=f"{int(is_wrong.sum())} of {len(is_wrong)} went wrong",
        hint=hint,
    )


def _count_strata(dataset: Dataset) -> dict[str, list[int]]:
    """Return for each stratum how many runs it has, and how many of them went wrong."""
    counts: dict[str, list[int]] = {}
    for name, is_wrong in zip(dataset.strata, dataset.is_wrong, strict=True):
        count = counts.setdefault(name, [0, 0])
        count[0] += 1
        count[1] += bool(is_wrong)
    return counts


def _rankings(dataset: Dataset, false_alarms: float, times: int) -> list[Ranking]:
    """Rank all figures, the best first, and then the trivial classifiers."""
    # 1. Rank each by itself.
    figures = []
    for name, values in dataset.figures.items():
        figures.append(_ranking(dataset, name, values, False, false_alarms, times))
    trivial = []
    for name, values in dataset.trivial.items():
        trivial.append(_ranking(dataset, name, values, True, false_alarms, times))

    # 2. The best first.
    figures.sort(key=_rank_order)
    trivial.sort(key=_rank_order)
    return figures + trivial


def _rank_order(ranking: Ranking) -> tuple[float, float]:
    """Return a key that puts the highest AUROC first; one that is not defined counts as 0.

    If no runs share a learning rate, figures stand by their AUROC within strata.
    """
    if ranking.all_pairs is None:
        return 0.0, -(ranking.within.value or 0.0)
    return -ranking.all_pairs, 0.0


def _ranking(
    dataset: Dataset, name: str, values: Floats, trivial: bool, false_alarms: float, times: int
) -> Ranking:
    """Rank one figure: over all runs, within strata, and with the learning rate given."""
    is_wrong = dataset.is_wrong
    strata = dataset.strata

    def interval(groups: Sequence[Hashable] | None) -> Estimate:
        """Return the AUROC with its interval; only runs of the same group are compared."""
        return auroc_interval(values, is_wrong, groups, dataset.clusters, times=times)

    # 1. Within each stratum alone.
    given_rate = dataset.given_rate
    by_stratum: dict[str, float | None] = {}
    given_by_stratum: dict[str, float | None] = {}
    for stratum in dict.fromkeys(strata):
        places = np.flatnonzero(np.array(strata) == stratum).tolist()
        scores = values[places]
        outcomes = is_wrong[places]
        rates = [given_rate[place] for place in places]
        by_stratum[stratum] = None
        given_by_stratum[stratum] = None
        if pair_runs(scores, outcomes, None).enough:
            by_stratum[stratum] = auroc(scores, outcomes)
        if pair_runs(scores, outcomes, rates).enough:
            given_by_stratum[stratum] = auroc(scores, outcomes, rates, missing_ties=True)

    # 2. Over all strata. A threshold needs as many runs as an AUROC.
    over_all = interval(None)
    given_lr = interval(given_rate)
    all_pairs = None
    if given_lr.value is not None:
        all_pairs = auroc(values, is_wrong, given_rate, missing_ties=True)
    operating = None
    if over_all.value is not None:
        operating = operating_point(values, is_wrong, false_alarms)
    return Ranking(
        name=name,
        over_all=over_all,
        within=interval(strata),
        given_lr=given_lr,
        all_pairs=all_pairs,
        by_stratum=by_stratum,
        given_by_stratum=given_by_stratum,
        operating=operating,
        trivial=trivial,
        measured=int(np.sum(~np.isnan(values))),
    )


def _count_comparable(dataset: Dataset) -> dict[str, list[int]]:
    """Return how many runs of either outcome share a group with one of the other outcome."""
    anything = np.zeros(len(dataset.is_wrong))
    groups: dict[str, Sequence[Hashable] | None] = {
        "over_all": None,
        "within": dataset.strata,
        "given_lr": dataset.given_rate,
    }
    counts = {}
    for name, keys in groups.items():
        counts[name] = list(pair_runs(anything, dataset.is_wrong, keys).runs)
    return counts


def _lead(dataset: Dataset, rankings: Sequence[Ranking], times: int) -> Lead | None:
    """Return how far the best figure is ahead of the best trivial classifier.

    Returns:
        None if there is no figure, or no trivial classifier, that could be ranked.
    """
    # 1. The rankings stand in their order: the first of each kind is the best.
    ranked = [ranking for ranking in rankings if ranking.given_lr.value is not None]
    figures = [ranking.name for ranking in ranked if not ranking.trivial]
    rivals = [ranking.name for ranking in ranked if ranking.trivial]
    if not figures or not rivals:
        return None

    # 2. Their difference on the same runs.
    difference = lead_interval(
        dataset.figures[figures[0]],
        dataset.trivial[rivals[0]],
        dataset.is_wrong,
        dataset.given_rate,
        dataset.clusters,
        times=times,
    )
    if difference.value is None:
        return None
    return Lead(figures[0], rivals[0], difference, candidates=len(figures))


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
        """Count a healthy run, in which every alert is a false alarm."""
        self.alarms += len(alert_steps)
        self.healthy_steps += len(run.steps)

    def add_bad(self, run: Run, outcome: Label, alert_steps: list[int], lead: int) -> None:
        """Count a run that went wrong, and how long before that the rule fired first."""
        # 1. The step at which the loss left its band.
        assert outcome.left is not None
        last = len(run.steps) - 1
        left_at = int(run.steps[min(outcome.left, last)])

        # 2. Count the run.
        self.bad += 1
        counts = self.ahead_by_outcome.setdefault(outcome.outcome, [0, 0])
        counts[1] += 1

        # 3. The first alert before that step has the longest lead.
        leads = [left_at - step for step in alert_steps if step <= left_at]
        if not leads:
            return
        self.leads.append(max(leads))
        if max(leads) >= lead:
            counts[0] += 1


def _detectors(
    runs: Sequence[Run], labels: Sequence[Label], is_wrong: Bools, lead: int
) -> list[Detector]:
    """Return how each live rule did, and all of them together."""
    # 1. The rules that fired in some run.
    fired: set[str] = set()
    for run in runs:
        fired.update(code for _, code in _live_alerts(run))

    # 2. Each of them, and all together.
    codes = sorted(fired)
    detectors = [_detector(code, {code}, runs, labels, is_wrong, lead) for code in codes]
    if len(codes) > 1:
        detectors.append(_detector("any", fired, runs, labels, is_wrong, lead))
    return detectors


def _live_alerts(run: Run) -> list[tuple[int, str]]:
    """Return step and code of a run's alerts.

    What step 0 says is the audit's, and no prediction of a live rule.
    """
    return [(step, code) for step, code in run.alerts if step > 0]


def _detector(
    name: str,
    codes: set[str],
    runs: Sequence[Run],
    labels: Sequence[Label],
    is_wrong: Bools,
    lead: int,
) -> Detector:
    """Count alerts of some codes in healthy runs, and before bad runs left their band."""
    # 1. Count run by run. A run that spiked, but does not count as bad, is neither.
    tally = _Tally()
    for run, outcome, is_bad in zip(runs, labels, is_wrong, strict=True):
        alert_steps = [step for step, code in _live_alerts(run) if code in codes]
        is_healthy = outcome.outcome == "healthy" and not is_bad
        if is_healthy:
            tally.add_healthy(run, alert_steps)
        elif is_bad and outcome.left is not None:
            tally.add_bad(run, outcome, alert_steps, lead)

    # 2. The figures of the rule.
    return Detector(
        code=name,
        bad=tally.bad,
        found=len(tally.leads),
        ahead=sum(value >= lead for value in tally.leads),
        leads=tally.leads,
        alarms=tally.alarms,
        healthy_steps=tally.healthy_steps,
        ahead_by_outcome=tally.ahead_by_outcome,
    )
