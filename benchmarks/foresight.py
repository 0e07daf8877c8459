"""Does the Jacobian earn its place in JD105? Whole operating curves with the figure and without it,
on recorded runs.

Curves of the chance are made from some of the lab's grids, once as they ship (a figure of the
untrained model, the rate, the warm-up) and once of rate and warm-up alone. Both are asked, with the
rule that speaks in runs, about runs that made neither. A row is a limit: the lower end of the
chance's interval above which the rule speaks. It tells the share of divergences that were announced
20 steps before the loss left its band, and the false alarms in healthy steps. A chance of the one
is not a chance of the other, so the two are also held side by side at as many false alarms, each at
the limit that is best for it.

    python benchmarks/foresight.py            seven minutes; writes results/foresight.json
    python benchmarks/foresight.py --quick    one grid and three limits; prints only
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from examples.spike_lab.run import FAULTS, Setting  # noqa: E402
from jacdiag.backtest import Run, read_runs  # noqa: E402
from jacdiag.backtest.cross_validation import curves  # noqa: E402
from jacdiag.backtest.dataset import Dataset, build_dataset  # noqa: E402
from jacdiag.backtest.outcomes import label  # noqa: E402
from jacdiag.detectors.rising_rate import RisingRate  # noqa: E402
from jacdiag.records.risk import RiskCurve, RiskTable  # noqa: E402
from jacdiag.rules.thresholds import Limits, Thresholds, load_thresholds  # noqa: E402

GRIDS, RESULTS = (
    ROOT / "examples/spike_lab/results",
    Path(__file__).parent / "results" / "foresight.json",
)
MAKING, ASKED = ("cpu",), ("rise", "live", "unseen", "fresh")
PEERS = ("placement", "layers", "width", "warmup")  # whose best loss a healthy run is held against
CUTS = (0.05, 0.1, 0.15, *(round(0.2 + 0.01 * k, 2) for k in range(20)), 0.4, 0.5, 0.6, 0.7, 0.8)
# at which the two are compared, each at its own best limit
ALARMS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
LIMIT = load_thresholds({}).limits("risk").warning or 0.0  # that ships
LEAD = 20
GOAL = {"ahead": 0.8, "alarms": 1.0}
NOTHING = "nothing"  # the figure of a curve that has none


@dataclass(frozen=True)
class Point:
    """What one limit gives on one grid.

    Attributes:
        diverged, ahead: divergences, and those announced in time.
        alarms, healthy_runs, healthy_steps: runs falsely alarmed, of how many, of how many steps.
    """

    limit: float
    diverged: int
    ahead: int
    alarms: int
    healthy_runs: int
    healthy_steps: int

    def __add__(self, other: Point) -> Point:
        mine, others = asdict(self), asdict(other)
        return Point(
            self.limit, **{name: mine[name] + others[name] for name in mine if name != "limit"}
        )

    @property
    def share(self) -> float:
        return self.ahead / max(1, self.diverged)

    @property
    def in_10_000(self) -> float:
        return 1e4 * self.alarms / max(1, self.healthy_steps)


def columns(grids: Iterable[str]) -> tuple[list[Run], Dataset]:
    runs = [run for grid in grids for run in read_runs([GRIDS / f"{grid}.runs.gz"]) if run.whole]
    cast = build_dataset(
        runs,
        [label(run.loss) for run in runs],
        bad="any",
        stratum=["placement"],
        peers=PEERS,
        cluster_without=["seed"],
    )
    return runs, cast


def tables(cast: Dataset) -> dict[str, RiskTable]:
    """The curves with the figure, and without: the same placements, rates and warm-ups."""
    ones = {NOTHING: np.ones(len(cast.is_wrong))}
    with_it, without = curves(cast, 200), curves(replace(cast, figures=ones), 200, (NOTHING,))
    return {"figure": RiskTable(with_it), "rate and warm-up alone": RiskTable(without)}


def rates(run: Run) -> list[float]:
    """The learning rate of every step, as the lab's schedule has it."""
    setting = Setting.of(
        {
            k: int(v) if isinstance(v, float) and v.is_integer() else v
            for k, v in run.factors.items()
        }
    )
    leap = FAULTS[setting.fault] if setting.fault.startswith("rate") else lambda *_: 1.0
    return [setting.rate(int(step)) * leap(setting, None, int(step)) for step in run.steps]  # type: ignore[arg-type]


def speaks(run: Run, along: list[float], table: RiskTable, limit: float) -> int | None:
    """The first step at which the rule speaks; None if it never does."""
    curve = table.curves.get(str(run.factors["placement"]))
    value = (
        None if curve is None else 1.0 if curve.figure == NOTHING else run.figures.get(curve.figure)
    )
    if curve is None or value is None or not _inside(curve, run.factors, value):
        return None
    rule = RisingRate(Thresholds({("risk", ""): Limits(warning=limit)}, table))
    begun: dict[str, Any] = {
        "value": value,
        "highest": 0.0,
        "steepest": 0.0,
        "last": None,
        "said": [],
    }
    rule.load({"curve": {"placement": curve.placement, "figure": curve.figure}, **begun})
    for step, lr in zip(run.steps, along, strict=True):
        if rule.look(int(step), lr):
            return int(step)
    return None


def _inside(curve: RiskCurve, factors: Mapping[str, Any], value: float) -> bool:
    known = {"figure": value, "width": float(factors["width"]), "layers": float(factors["layers"])}
    spans = [(known[name], *span) for name, span in curve.ranges.items() if name in known]
    return all(low * (1 - 1e-9) <= one <= high * (1 + 1e-9) for one, low, high in spans)


@dataclass(frozen=True)
class Case:
    """A run that diverged (`left` is where it left its band) or did well (None), with its rate at
    every step.
    """

    run: Run
    along: list[float]
    left: int | None

    @property
    def placement(self) -> str:
        return str(self.run.factors["placement"])


def cases(grid: str) -> list[Case]:
    """Runs that spiked, and those that ended over their peers only, are neither found nor falsely
    alarmed.
    """
    runs, cast = columns((grid,))
    found = []
    for run, one, wrong in zip(runs, cast.labels, cast.is_wrong, strict=True):
        if one.outcome == "healthy" and not wrong:
            found.append(Case(run, rates(run), None))
        elif one.outcome == "diverged" and one.left is not None:
            found.append(Case(run, rates(run), int(run.steps[min(one.left, len(run.steps) - 1)])))
    return found


def point(of: list[Case], table: RiskTable, limit: float) -> Point:
    total = Point(limit, 0, 0, 0, 0, 0)
    for case in of:
        said = speaks(case.run, case.along, table, limit)
        if case.left is None:
            total += Point(limit, 0, 0, int(said is not None), 1, len(case.run.steps))
        else:
            total += Point(limit, 1, int(said is not None and case.left - said >= LEAD), 0, 0, 0)
    return total


def _line(point: Point) -> str:
    ok = point.share >= GOAL["ahead"] and point.in_10_000 <= GOAL["alarms"]
    return (
        f"{'ok  ' if ok else '    '}  above {point.limit:.2f}: {point.share:4.0%} ahead, "
        f"{point.in_10_000:4.1f} "
        f"alarms in 10,000 healthy steps"
    )


def most_announced(points: list[Point], alarms: float) -> int:
    """Of divergences, at the limit that is best for it among those with no more false alarms in
    10,000 steps.
    """
    return max((p.ahead for p in points if p.in_10_000 <= alarms), default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="one grid, three limits; nothing is written"
    )
    args = parser.parse_args()
    made = tables(columns(MAKING)[1])
    cuts, grids = ((0.2, 0.3, 0.5), ("rise",)) if args.quick else (CUTS, ASKED)
    found: dict[str, dict[str, list[Point]]] = {name: {} for name in made}
    everything: list[Case] = []
    for grid in grids:
        of = cases(grid)
        everything += of
        for name, table in made.items():
            found[name][grid] = [point(of, table, cut) for cut in cuts]
    for name, by in found.items():
        print(name, {p: c.figure for p, c in made[name].curves.items()})
        sums = []
        for k in range(len(cuts)):
            every = [by[grid][k] for grid in grids]
            told = ", ".join(
                f"{g} {p.ahead} of {p.diverged} at {p.alarms}"
                for g, p in zip(grids, every, strict=True)
            )
            sums.append(sum(every[1:], start=every[0]))
            print(f"{_line(sums[-1])} ({told})")
        best = ", ".join(f"{most_announced(sums, alarms)} at {alarms:g}" for alarms in ALARMS)
        print(f"announced at the best limit for so many alarms in 10,000: {best}")
    by_placement = {
        p: point([c for c in everything if c.placement == p], made["figure"], LIMIT)
        for p in dict.fromkeys(c.placement for c in everything)
    }
    for name, p in by_placement.items():
        print(
            f"{name} above {p.limit}: {p.ahead} of {p.diverged} ahead, {p.alarms} of "
            f"{p.healthy_runs} healthy runs "
            f"alarmed in {p.healthy_steps} steps"
        )
    if not args.quick:
        points = {
            name: {g: [asdict(p) for p in ps] for g, ps in by.items()} for name, by in found.items()
        }
        figures = {p: c.figure for p, c in made["figure"].curves.items()}
        asked = {
            "goal": GOAL,
            "lead": LEAD,
            "made_from": MAKING,
            "peers": PEERS,
            "figures": figures,
            "by_placement": {name: asdict(p) for name, p in by_placement.items()},
        }
        RESULTS.write_text(json.dumps({**asked, "points": points}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
