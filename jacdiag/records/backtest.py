"""The result of a backtest as plain data: labels of runs, rankings of figures, live rules."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from statistics import median
from typing import Any, ClassVar, Literal

from jacdiag.records.base import SCHEMA_VERSION, Record
from jacdiag.records.risk import RiskCurve

Outcome = Literal["diverged", "spiked", "healthy"]

# Runs of either outcome that an AUROC takes. With three of each, a figure without any value ranks
# them all right or all wrong in 1 of 10 tries, with four of each in 1 of 35.
LEAST_RUNS = 4


@dataclass(frozen=True)
class Label(Record):
    """What became of a run.

    Attributes:
        outcome: the worst of all that happened.
        spike_rate: per 10,000 steps.
        spike_score: share of steps.
        left: index of the first step of the divergence, or of the first spike; None for a healthy
            run.
        final: median loss of the last tenth, nan where none is finite.
        steps: how many were looked at.
    """

    outcome: Outcome
    spike_rate: float
    spike_score: float
    left: int | None
    final: float
    steps: int


@dataclass(frozen=True)
class Estimate(Record):
    """A statistic with its bootstrap interval; None where it is not defined (a class is empty).

    Attributes:
        value, lower, upper: percentile interval at `level`.
        resamples: in which the statistic was defined.
    """

    value: float | None
    lower: float | None = None
    upper: float | None = None
    level: float = 0.95
    resamples: int = 0


@dataclass(frozen=True)
class Operating(Record):
    """A threshold, and what it does: `score > threshold` is an alarm.

    Attributes:
        false_alarms: share of good runs that it alarms on.
        recall: share of bad runs that it finds.
        precision: share of its alarms that are bad runs; None without an alarm.
    """

    threshold: float
    false_alarms: float
    recall: float
    precision: float | None


@dataclass(frozen=True)
class Bin(Record):
    """Runs with about the same predicted chance: the chance, how many runs, how many went wrong."""

    chance: float
    runs: int
    bad: int
    lower: float
    upper: float


@dataclass(frozen=True)
class Ranking(Record):
    """How well one figure ranks bad runs above good ones.

    Attributes:
        over_all: all runs together; an architecture that fails always shows here.
        within: only runs of the same stratum are compared.
        given_lr: only runs of the same stratum and learning rate are compared.
        all_pairs: the same with every pair that it was not measured for as a tie; figures are put
            in order by it.
        by_stratum: AUROC in each stratum, None where one class is empty.
        given_by_stratum: the same with the learning rate given, None where no pair can be made.
        operating: at the requested false-alarm rate, over all strata.
        trivial: whether it is a classifier that uses no Jacobian.
        measured: runs that have the figure.
    """

    name: str

    # AUROC, from the widest comparison to the narrowest.
    over_all: Estimate
    within: Estimate
    given_lr: Estimate
    all_pairs: float | None
    by_stratum: dict[str, float | None]
    given_by_stratum: dict[str, float | None]

    # As a classifier.
    operating: Operating | None
    trivial: bool
    measured: int


@dataclass(frozen=True)
class Lead(Record):
    """How far the best figure is ahead of the best classifier that knows no Jacobian.

    Attributes:
        figure, rival: their names.
        difference: of their AUROCs, learning rate given, over the same resamples of the runs.
        candidates: figures that the best one was picked from, on the same runs.
    """

    figure: str
    rival: str
    difference: Estimate
    candidates: int


@dataclass(frozen=True)
class Level(Record):
    """A level of a factor that was left out: its runs, and the figure that the others chose."""

    runs: int
    bad: int
    figure: str | None


@dataclass(frozen=True)
class Transfer(Record):
    """How well the choices of the other levels predict the runs of one architecture.

    Attributes:
        auroc: of the chance, learning rate given.
        figures: that the other levels chose for it, the most frequent first.
        expected, observed: mean chance, and the share that went wrong.
        brier: mean squared distance between chance and outcome.
    """

    runs: int
    bad: int
    auroc: float | None
    expected: float | None
    observed: float | None
    brier: float | None
    figures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class HeldOut(Record):
    """Every level of a factor in turn left out of all choices, and then predicted.

    Attributes:
        auroc: of the chance, by the figure that the other levels chose for each architecture; only
            runs of the same level, architecture and rate are compared.
        one_figure: the same of a single figure for all architectures.
        trivial: the same of classifiers that know no Jacobian, on the runs that have a chance.
        brier, brier_rate_alone: of the chance, and of one that knows architecture and learning rate
            only.
        false_alarms, recall: of the chance at the threshold that the other levels chose.
        calibration: chances against outcomes.
        transfer: by architecture.
    """

    factor: str
    levels: dict[str, Level]

    # How well the chance ranks the runs, and how far off it is.
    auroc: Estimate
    one_figure: Estimate
    trivial: dict[str, Estimate]
    brier: float | None
    brier_rate_alone: float | None

    # The chance as an alarm, and as a chance.
    false_alarms: float | None
    recall: float | None
    calibration: list[Bin]
    transfer: dict[str, Transfer]


@dataclass(frozen=True)
class Detector(Record):
    """The record of one live rule: alarms on healthy runs, and how early it fired on bad ones.

    Attributes:
        found: bad runs on which it fired before or at the step at which the loss left its band.
        ahead: those with a lead of `lead` steps or more.
        leads: steps between its first alert and that step, one a found run.
        alarms: on healthy runs; `healthy_steps` is how long these are together.
        ahead_by_outcome: "diverged", "spiked" -> [as many as `ahead`, bad runs of it].
    """

    code: str
    bad: int
    found: int
    ahead: int
    leads: list[int]
    alarms: int
    healthy_steps: int
    ahead_by_outcome: dict[str, list[int]] = field(default_factory=dict)

    @property
    def alarms_per_10k(self) -> float | None:
        """Alarms in 10,000 steps of healthy runs; None without such steps."""
        # Without a healthy run nothing is known of false alarms.
        if not self.healthy_steps:
            return None
        return 1e4 * self.alarms / self.healthy_steps

    @property
    def median_lead(self) -> float | None:
        """Median lead in steps; None if no bad run was found."""
        if not self.leads:
            return None
        return median(self.leads)


@dataclass(frozen=True)
class BacktestReport(Record):
    """The result of a backtest.

    Attributes:
        labels, bad: by run.
        strata: name -> [runs, of which went wrong].
        rankings: figures first, the best first; then the trivial classifiers.
        held_out: one for each requested factor.
        curves: of the chance, by placement, from all runs.
        lead: of the best figure; None if nothing could be compared.
        comparable: "over_all", "within" and "given_lr" -> [runs that went wrong, others] that share
            a group with a run of the other outcome.
    """

    _document: ClassVar[str] = "result of a backtest"

    # The runs, and how they ended.
    labels: dict[str, Label]
    bad: dict[str, bool]
    strata: dict[str, list[int]]

    # How well the figures and the live rules predict it.
    rankings: list[Ranking]
    detectors: list[Detector]
    held_out: list[HeldOut] = field(default_factory=list)
    curves: dict[str, RiskCurve] = field(default_factory=dict)

    # How far the best figure is ahead, and how many runs could be compared.
    lead: Lead | None = None
    comparable: dict[str, list[int]] = field(default_factory=dict)

    # The options of the backtest.
    asked: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_json(self, indent: int | None = 2) -> str:
        """Return strict JSON (no bare NaN or Infinity).

        Args:
            indent: spaces of each level; None for one line.
        """
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False, ensure_ascii=False)

    @property
    def best(self) -> Ranking | None:
        """The figure with the highest AUROC, learning rate given; unmeasured runs are ties."""
        # 1. Figures of the model, in which some pairs of runs could be compared.
        candidates = []
        for ranking in self.rankings:
            is_known = ranking.given_lr.value is not None
            if is_known and not ranking.trivial:
                candidates.append(ranking)

        # 2. The first of the highest.
        return max(candidates, key=_auroc_of_all_pairs, default=None)


def _auroc_of_all_pairs(ranking: Ranking) -> float:
    """Return the AUROC in which unmeasured runs are ties; 0 if it is not defined."""
    return ranking.all_pairs or 0.0
