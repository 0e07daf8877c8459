"""Do figures of the untrained model, and live alerts, foretell how runs end? Beside trivial classifiers."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jacdiag.backtest.labels import label
from jacdiag.backtest.runs import Run
from jacdiag.backtest.scores import Bools, Floats, auroc, bootstrap, operating_point
from jacdiag.errors import UsageError
from jacdiag.report.backtest import BacktestReport, Detector, Label, Ranking

WORSE = 0.4  # nats over the best of its peers: a run that did not learn


def backtest(
    runs: Sequence[Run], *, stratum: Sequence[str] = ("placement",), peers: Sequence[str] = (), bad: str = "any",
    false_alarms: float = 0.05, lead: int = 20, times: int = 1000, cluster_without: Sequence[str] = ("seed",),
) -> BacktestReport:  # fmt: skip
    """Labels runs and ranks every figure.

    Args:
        runs: from `read_runs`.
        stratum: factors that make an architecture.
        peers: factors whose runs share a best loss; a run that ends 0.4 over it has not learned.
        bad: which outcome counts: "diverged", "spiked" (or diverged), "worse" (or diverged), "any".
        false_alarms: rate at which precision is given.
        lead: steps that count as early.
        times: resamples of the bootstrap.
        cluster_without: runs that differ in these factors only are resampled together.

    Raises:
        UsageError: an unknown outcome, a factor that no run has, or runs that all ended alike.
    """
    if bad not in ("diverged", "spiked", "worse", "any"):
        raise UsageError("unknown outcome", got=bad, hint="diverged, spiked, worse or any")
    known = {name for run in runs for name in run.factors}
    for name in (*stratum, *peers):
        if name not in known:
            raise UsageError(f"no run has the factor '{name}'", got=", ".join(sorted(known)) or "no factors at all")
    labels = [label(run.loss) for run in runs]
    worse = _worse(runs, labels, peers)
    wrong = np.array([_wrong(one.outcome, w, bad) for one, w in zip(labels, worse, strict=True)], dtype=bool)
    if wrong.all() or not wrong.any():
        told = f"{int(wrong.sum())} of {len(wrong)} went wrong"
        raise UsageError("all runs ended alike: nothing can be ranked", got=told, hint="--bad chooses what is wrong")
    names = [" · ".join(str(run.factors.get(f, "?")) for f in stratum) or "all" for run in runs]
    clusters = [tuple(sorted((k, str(v)) for k, v in run.factors.items() if k not in cluster_without)) for run in runs]
    rates = [run.factors.get("lr") for run in runs]
    rankings = [
        _ranking(name, values, wrong, names, rates, clusters, trivial, false_alarms, times)
        for name, (values, trivial) in _columns(runs, names, wrong).items()
    ]
    ill = [name for name, w in zip(names, wrong, strict=True) if w]
    counts = {name: [names.count(name), ill.count(name)] for name in dict.fromkeys(names)}
    return BacktestReport(
        labels={run.name: one for run, one in zip(runs, labels, strict=True)},
        bad={run.name: bool(w) for run, w in zip(runs, wrong, strict=True)},
        strata=counts,
        rankings=sorted(rankings, key=lambda r: (r.trivial, -(r.given_lr.value or 0.0))),
        detectors=_detectors(runs, labels, wrong, lead),
        asked={"stratum": list(stratum), "peers": list(peers), "bad": bad, "false_alarms": false_alarms, "lead": lead},
    )


def _wrong(outcome: str, worse: bool, bad: str) -> bool:
    return {
        "diverged": outcome == "diverged",
        "spiked": outcome in ("diverged", "spiked"),
        "worse": outcome == "diverged" or worse,
        "any": outcome != "healthy" or worse,
    }[bad]


def _worse(runs: Sequence[Run], labels: Sequence[Label], peers: Sequence[str]) -> list[bool]:
    groups = [tuple(str(run.factors.get(p)) for p in peers) for run in runs]
    best: dict[Hashable, float] = {}
    for group, one in zip(groups, labels, strict=True):
        if math.isfinite(one.final):
            best[group] = min(best.get(group, math.inf), one.final)
    return [not one.final <= best.get(group, math.inf) + WORSE for group, one in zip(groups, labels, strict=True)]


# -- figures -----------------------------------------------------------------------------------------------------------
def _columns(runs: Sequence[Run], strata: Sequence[str], wrong: Bools) -> dict[str, tuple[Floats, bool]]:
    """Every figure of the untrained models, and the trivial classifiers."""
    found: dict[str, tuple[Floats, bool]] = {}
    for name in dict.fromkeys(name for run in runs for name in run.figures):
        found[name] = (np.array([run.figures.get(name, math.nan) for run in runs]), False)
    rates = np.array([_number(run.factors.get("lr")) for run in runs])
    share = _share(strata, wrong)
    found["learning rate"] = (rates, True)
    found["architecture"] = (share, True)
    found["architecture, then learning rate"] = (share + 1e-3 * _rank(rates), True)
    found["gradient norm, first step"] = (np.array([_first(run.grad_norm) for run in runs]), True)
    found["loss, first step"] = (np.array([_first(run.loss) for run in runs]), True)
    return found


def _share(strata: Sequence[str], wrong: Bools) -> Floats:
    """How often the runs of a stratum went wrong: the most that somebody who knows the architecture alone could say.

    It has seen the answers, the figures have not: a trivial classifier gets every benefit. (To leave each run out of
    its own share would be no fairer: the others of a bad run are good more often.)
    """
    names = np.array(strata)
    return np.array([float(wrong[names == name].mean()) for name in strata])


def _rank(values: Floats) -> Floats:
    unique = np.unique(values[~np.isnan(values)])
    return np.where(np.isnan(values), math.nan, np.searchsorted(unique, values)).astype(np.float64)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _first(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(known[0]) if known.size else math.nan


def _ranking(
    name: str, values: Floats, wrong: Bools, strata: Sequence[str], rates: Sequence[Any],
    clusters: Sequence[Hashable], trivial: bool, false_alarms: float, times: int,
) -> Ranking:  # fmt: skip
    both = [f"{s} · {r}" for s, r in zip(strata, rates, strict=True)]

    def by(groups: Sequence[Hashable] | None) -> Callable[[NDArray[np.intp]], float | None]:
        def of(chosen: NDArray[np.intp]) -> float | None:
            told = None if groups is None else [groups[k] for k in chosen]
            return auroc(values[chosen], wrong[chosen], told)

        return of

    each: dict[str, float | None] = {}
    for stratum in dict.fromkeys(strata):
        mine = np.array([k for k, s in enumerate(strata) if s == stratum])
        each[stratum] = auroc(values[mine], wrong[mine])
    return Ranking(
        name,
        bootstrap(by(None), clusters, times=times),
        bootstrap(by(strata), clusters, times=times),
        bootstrap(by(both), clusters, times=times),
        each,
        operating_point(values, wrong, false_alarms),
        trivial,
        int(np.sum(~np.isnan(values))),
    )


# -- live rules --------------------------------------------------------------------------------------------------------
def _detectors(runs: Sequence[Run], labels: Sequence[Label], wrong: Bools, lead: int) -> list[Detector]:
    codes = sorted({code for run in runs for _, code in run.alerts})
    made = []
    for code in [*codes, *(["any"] if len(codes) > 1 else [])]:
        leads, alarms, steps, bad = [], 0, 0, 0
        for run, one, ill in zip(runs, labels, wrong, strict=True):
            spoken = [step for step, which in run.alerts if code in (which, "any")]
            if one.outcome == "healthy" and not ill:
                alarms, steps = alarms + len(spoken), steps + len(run.steps)
            elif one.left is not None:
                bad += 1
                left = int(run.steps[min(one.left, len(run.steps) - 1)])
                early = [left - step for step in spoken if step <= left]
                leads += [max(early)] if early else []
        ahead = sum(1 for value in leads if value >= lead)
        made.append(Detector(code, bad, len(leads), ahead, leads, alarms, steps))
    return made
