"""The runs of a backtest as columns.

Columns hold how each run ended, its architecture and learning rate, its figures, and trivial
figures.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jacdiag.backtest.metrics import Bools, Floats, auroc
from jacdiag.backtest.recorded_run import Run
from jacdiag.records.backtest import Label

WORSE = 0.4  # nats over the best of its peers at the same or a lower rate: the rate did harm

# Factors of the training, which do not make another model.
TRAINING = ("lr", "warmup", "steps", "every", "rows", "beta2", "clip", "fault", "at")


@dataclass(frozen=True)
class Dataset:
    """Columns, one entry a run.

    Attributes:
        labels: by loss alone.
        is_wrong: which runs went wrong, in the sense that was requested.
        strata: architectures.
        rates: peak learning rates, nan where not known.
        warmups: steps over which the rate rose, nan where not known.
        clusters: runs of one cluster differ in their seed only.
        inits: runs of one init differ in their seed and in how they were trained.
        figures: of the untrained models, larger meaning worse.
        trivial: classifiers that know no Jacobian.
        factors: what was varied.
    """

    labels: list[Label]
    is_wrong: Bools
    strata: list[str]
    rates: Floats
    warmups: Floats
    clusters: list[Hashable]
    inits: list[Hashable]
    figures: dict[str, Floats]
    trivial: dict[str, Floats]
    factors: list[dict[str, Any]]

    @property
    def given_rate(self) -> list[Hashable]:
        """Groups of the same architecture, learning rate and warm-up."""
        groups: list[Hashable] = []
        for stratum, rate, warmup in zip(self.strata, self.rates, self.warmups, strict=True):
            # nan differs from itself, so runs without a known warm-up would share no group.
            known_warmup = None if math.isnan(warmup) else float(warmup)
            groups.append((stratum, float(rate), known_warmup))
        return groups

    def best(self, chosen: Bools) -> str | None:
        """Return the figure that ranks the chosen runs best, given the learning rate.

        A run that a figure was not measured for ties with all others.

        Args:
            chosen: which runs to use.

        Returns:
            The name of the figure; None if no pair of runs can be made.
        """
        # 1. The chosen runs, and what they are compared within.
        places = np.flatnonzero(chosen)
        groups_of_all = self.given_rate
        groups = [groups_of_all[place] for place in places]
        is_wrong = self.is_wrong[places]

        # 2. The figure with the highest score, the first of equal ones.
        scores = {}
        for name, values in self.figures.items():
            score = auroc(values[places], is_wrong, groups, missing_ties=True)
            if score is not None:
                scores[name] = score
        return max(scores, key=lambda name: scores[name], default=None)


def build_dataset(
    runs: Sequence[Run],
    labels: list[Label],
    *,
    bad: str,
    stratum: Sequence[str],
    peers: Sequence[str],
    cluster_without: Sequence[str],
    worse: float = WORSE,
) -> Dataset:
    """Return the columns of some runs.

    Args:
        runs: as `read_runs` returns them.
        labels: of the runs, in their order.
        bad: which outcome counts. This one and the others are those of `backtest`.
        stratum: factors that make an architecture.
        peers: factors whose runs share a best loss.
        cluster_without: runs that differ in these factors only are resampled together.
        worse: nats over the best of its peers.
    """
    # 1. Which runs went wrong.
    rates = np.array([number_of(run.factors.get("lr")) for run in runs])
    warmups = np.array([number_of(run.factors.get("warmup")) for run in runs])
    ended_worse = _find_worse(runs, labels, rates, peers, worse)
    is_wrong = []
    for label, is_worse in zip(labels, ended_worse, strict=True):
        is_wrong.append(_counts_as_bad(label.outcome, is_worse, bad))
    wrong_runs = np.array(is_wrong, dtype=bool)

    # 2. What they are compared within.
    strata = [_stratum_name(run, stratum) for run in runs]
    clusters = [_key_without(run, cluster_without) for run in runs]
    inits = [_key_without(run, (*cluster_without, *TRAINING)) for run in runs]

    # 3. Their figures.
    figures = _columns_of_figures(runs)
    trivial = _trivial_figures(runs, strata, rates, wrong_runs)

    # 4. All as columns, with one value a run.
    return Dataset(
        labels=labels,
        is_wrong=wrong_runs,
        strata=strata,
        rates=rates,
        warmups=warmups,
        clusters=clusters,
        inits=inits,
        figures=figures,
        trivial=trivial,
        factors=[dict(run.factors) for run in runs],
    )


def _columns_of_figures(runs: Sequence[Run]) -> dict[str, Floats]:
    """Return each figure that some run has, one value a run; nan where it was not measured."""
    # 1. The names, in the order in which the runs have them.
    names: dict[str, None] = {}
    for run in runs:
        names.update(dict.fromkeys(run.figures))

    # 2. The values.
    columns = {}
    for name in names:
        columns[name] = np.array([run.figures.get(name, math.nan) for run in runs])
    return columns


def _stratum_name(run: Run, factors: Sequence[str]) -> str:
    """Return the values of the factors that make an architecture; "all" if there is no factor."""
    values = [str(run.factors.get(factor, "?")) for factor in factors]
    return " · ".join(values) or "all"


def _key_without(run: Run, left_out: Sequence[str]) -> Hashable:
    """Return a key that runs share if they differ at most in the named factors.

    A run without factors shares its key with no other.
    """
    if not run.factors:
        return run.name
    pairs = []
    for factor, value in run.factors.items():
        if factor not in left_out:
            pairs.append((factor, str(value)))
    return tuple(sorted(pairs))


def _counts_as_bad(outcome: str, is_worse: bool, bad: str) -> bool:
    """Return whether a run went wrong, in the sense that was requested.

    Args:
        outcome: "diverged", "spiked" or "healthy".
        is_worse: whether it ended far over the best of its peers.
        bad: the option of `backtest`.
    """
    if outcome == "diverged":
        return True
    if bad == "diverged":
        return False
    if bad == "spiked":
        return outcome == "spiked"
    if bad == "worse":
        return is_worse

    # "any" of these.
    return is_worse or outcome != "healthy"


def _find_worse(
    runs: Sequence[Run], labels: Sequence[Label], rates: Floats, peers: Sequence[str], worse: float
) -> list[bool]:
    """Return which runs end far over the best of their peers at the same or a lower rate.

    A run with a higher rate is no peer. A run that was merely slow did not go wrong.
    """
    groups = [tuple(str(run.factors.get(name)) for name in peers) for run in runs]
    finals = np.array([label.final for label in labels])
    ended_worse = []
    for group, rate, final in zip(groups, rates, finals, strict=True):
        # 1. The best final loss of the peers.
        is_peer = np.array([other == group for other in groups])
        if not math.isnan(rate):
            is_peer &= ~(rates > rate)
        known = finals[is_peer & np.isfinite(finals)]
        best = known.min(initial=math.inf)

        # 2. A final loss that is nan is no better than any.
        ended_worse.append(not final <= best + worse)
    return ended_worse


def _trivial_figures(
    runs: Sequence[Run], strata: Sequence[str], rates: Floats, is_wrong: Bools
) -> dict[str, Floats]:
    """Return classifiers that know no Jacobian, larger meaning worse."""
    # 1. What was varied.
    share = _share_of_wrong(strata, is_wrong)
    columns = {
        "learning rate": rates,
        "architecture": share,
        "architecture, then learning rate": share + 1e-3 * _rank(rates),
    }

    # 2. The first step. Figures of the model are scaled by the width, so the norm is as well.
    gradient_norms = np.array([_first_finite(run.grad_norm) for run in runs])
    columns["gradient norm, first step"] = gradient_norms

    widths = np.array([number_of(run.factors.get("width")) for run in runs])
    if not np.isnan(widths).all():
        columns["gradient norm, first step x width"] = gradient_norms * widths
    columns["loss, first step"] = np.array([_first_finite(run.loss) for run in runs])
    return columns


def _share_of_wrong(strata: Sequence[str], is_wrong: Bools) -> Floats:
    """Return how often the runs of a stratum went wrong.

    Somebody who knows the architecture alone could say no more.

    It has seen the answers, and the figures have not. So a trivial classifier gets every benefit.
    To leave each run out of its own share would be no fairer, because the others of a bad run are
    good more often.
    """
    names = np.array(strata)
    return np.array([float(is_wrong[names == name].mean()) for name in strata])


def _rank(values: Floats) -> Floats:
    """Return the place of each value among the different ones, from 0; nan stays nan."""
    unique = np.unique(values[~np.isnan(values)])
    ranks = np.searchsorted(unique, values)
    return np.where(np.isnan(values), math.nan, ranks).astype(np.float64)


def number_of(value: Any) -> float:
    """Return a value as a float, or nan if it is no number.

    Args:
        value: of a factor, which may be a text.
    """
    if isinstance(value, int | float):
        return float(value)
    return math.nan


def _first_finite(values: Floats) -> float:
    """Return the first finite value; nan if there is none."""
    known = values[np.isfinite(values)]
    if not known.size:
        return math.nan

    # A run may log its first gradient norm some steps late.
    return float(known[0])
