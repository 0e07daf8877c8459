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
# not of the model
TRAINING = ("lr", "warmup", "steps", "every", "rows", "beta2", "clip", "fault", "at")


@dataclass(frozen=True)
class Board:
    """Columns, one entry a run.

    Attributes:
        labels: by loss alone.
        wrong: which runs went wrong, in the sense that was requested.
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
    wrong: Bools
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
        warmups = [None if math.isnan(w) else float(w) for w in self.warmups]
        return [(s, float(r), w) for s, r, w in zip(self.strata, self.rates, warmups, strict=True)]

    def best(self, chosen: Bools) -> str | None:
        """Return the figure that ranks the chosen runs best, given the learning rate.

        None if no pair of runs can be made.

        A run that a figure was not measured for ties with all others.
        """
        picked = np.flatnonzero(chosen)
        given = self.given_rate
        groups, wrong = [given[k] for k in picked], self.wrong[picked]
        scores = {}
        for name, values in self.figures.items():
            score = auroc(values[picked], wrong, groups, missing_ties=True)
            if score is not None:
                scores[name] = score
        return max(scores, key=lambda name: scores[name], default=None)


def board(
    runs: Sequence[Run],
    labels: list[Label],
    *,
    bad: str,
    stratum: Sequence[str],
    peers: Sequence[str],
    cluster_without: Sequence[str],
    worse: float = WORSE,
) -> Board:
    """Return the columns of some runs; see `backtest` for the arguments."""
    # 1. Which runs went wrong.
    rates = np.array([number_of(run.factors.get("lr")) for run in runs])
    warmups = np.array([number_of(run.factors.get("warmup")) for run in runs])
    ended_worse = _worse(runs, labels, rates, peers, worse)
    is_wrong = [
        _wrong(label.outcome, is_worse, bad)
        for label, is_worse in zip(labels, ended_worse, strict=True)
    ]
    wrong = np.array(is_wrong, dtype=bool)

    # 2. What they are compared within.
    strata = [" · ".join(str(run.factors.get(f, "?")) for f in stratum) or "all" for run in runs]
    clusters = _alike(runs, cluster_without)
    inits = _alike(runs, (*cluster_without, *TRAINING))

    # 3. Their figures.
    names = dict.fromkeys(name for run in runs for name in run.figures)
    figures = {name: np.array([run.figures.get(name, math.nan) for run in runs]) for name in names}
    factors = [dict(run.factors) for run in runs]
    trivial = _trivial(runs, strata, rates, wrong)
    return Board(labels, wrong, strata, rates, warmups, clusters, inits, figures, trivial, factors)


def _alike(runs: Sequence[Run], but_for: Sequence[str]) -> list[Hashable]:
    """Return a key for each run.

    Runs with the same key differ at most in the named factors. A run without factors shares its key
    with no other.
    """
    return [
        tuple(sorted((k, str(v)) for k, v in run.factors.items() if k not in but_for))
        if run.factors
        else run.name
        for run in runs
    ]


def _wrong(outcome: str, worse: bool, bad: str) -> bool:
    return {
        "diverged": outcome == "diverged",
        "spiked": outcome in ("diverged", "spiked"),
        "worse": outcome == "diverged" or worse,
        "any": outcome != "healthy" or worse,
    }[bad]


def _worse(
    runs: Sequence[Run], labels: Sequence[Label], rates: Floats, peers: Sequence[str], worse: float
) -> list[bool]:
    """Return which runs end far over the best of their peers at the same or a lower rate.

    A higher rate alone may not count against a lower one: a run that was merely slow did not go
    wrong.
    """
    groups = [tuple(str(run.factors.get(name)) for name in peers) for run in runs]
    finals = np.array([label.final for label in labels])
    ended_worse = []
    for group, rate, final in zip(groups, rates, finals, strict=True):
        # 1. The best final loss of the peers.
        compared = np.array([other == group for other in groups])
        if not math.isnan(rate):
            compared &= ~(rates > rate)
        known = finals[compared & np.isfinite(finals)]
        best = math.inf
        if known.size:
            best = known.min()

        # 2. A final loss that is nan is no better than any.
        ended_worse.append(not final <= best + worse)
    return ended_worse


def _trivial(
    runs: Sequence[Run], strata: Sequence[str], rates: Floats, wrong: Bools
) -> dict[str, Floats]:
    share = _share(strata, wrong)
    grads = np.array([_first(run.grad_norm) for run in runs])
    widths = np.array([number_of(run.factors.get("width")) for run in runs])
    scaled = {} if np.isnan(widths).all() else {"gradient norm, first step x width": grads * widths}
    return {
        "learning rate": rates,
        "architecture": share,
        "architecture, then learning rate": share + 1e-3 * _rank(rates),
        "gradient norm, first step": grads,
        **scaled,  # figures are scaled so, too
        "loss, first step": np.array([_first(run.loss) for run in runs]),
    }


def _share(strata: Sequence[str], wrong: Bools) -> Floats:
    """Return how often the runs of a stratum went wrong.

    Somebody who knows the architecture alone could say no more.

    It has seen the answers, the figures have not: a trivial classifier gets every benefit. (To
    leave each run out of its own share would be no fairer: the others of a bad run are good more
    often.)
    """
    names = np.array(strata)
    return np.array([float(wrong[names == name].mean()) for name in strata])


def _rank(values: Floats) -> Floats:
    unique = np.unique(values[~np.isnan(values)])
    return np.where(np.isnan(values), math.nan, np.searchsorted(unique, values)).astype(np.float64)


def number_of(value: Any) -> float:
    """Return a value as a float, or nan if it is no number."""
    return float(value) if isinstance(value, int | float) else math.nan


def _first(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(known[0]) if known.size else math.nan
