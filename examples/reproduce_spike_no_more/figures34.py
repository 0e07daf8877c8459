"""Figures 3 and 4 and the order of Table 1 at a small scale: loss and gradient norm of the recipes,
with seeds.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

from scipy.stats import spearmanr

from examples.spike_lab.run import Setting

from . import pictures
from .paper import ALL, KEEP, TABLE1
from .part import Data, Options, Part, Table, mean_spread, rounded, three
from .trainings import Trial, agreed, by, gaps, listed, outcomes, seconds_of, thinned

RATES = (4e-3, 3.2e-2)
SIZES: dict[str, Any] = {
    "layers": 6,
    "width": 64,
    "heads": 4,
    "length": 64,
    "steps": 250,
    "rows": 8,
}
SMALL: dict[str, Any] = {"layers": 2, "width": 16, "heads": 2, "length": 16, "steps": 40, "rows": 2}
SEEDS = (0, 1)
SHOWN = 40  # points of a curve


def trials(quick: bool) -> list[Trial]:
    sizes = SMALL if quick else SIZES
    return [
        Trial(f"recipe={recipe}", Setting.of({**sizes, "recipe": recipe, "lr": lr, "seed": seed}))
        for seed in SEEDS[: 1 if quick else None]
        for recipe in ALL
        for lr in RATES
    ]


def estimate(options: Options) -> float:
    return seconds_of(trials(options.quick), options)


def measure(options: Options) -> Data:
    runs = outcomes(trials(options.quick), options)
    for run in runs:
        run["recipe"] = run.pop("name").removeprefix("recipe=")
        grads = sorted(
            g for g in run["grad_norm"][len(run["grad_norm"]) // 10 :] if math.isfinite(g)
        )
        run["grad_median"], run["grad_max"] = grads[len(grads) // 2], grads[-1]
        run["loss"], run["grad_norm"] = thinned(run["loss"]), thinned(run["grad_norm"])
    return rounded({"sizes": SMALL if options.quick else SIZES, "rates": list(RATES), "runs": runs})


# -- words -----------------------------------------------------------------------------------------
def _finals(data: Data, recipe: str, lr: float) -> list[float]:
    return [float(run["final"]) for run in by(data["runs"], recipe=recipe, lr=lr)]


def setup(data: Data) -> list[str]:
    s, seeds = data["sizes"], listed(data["runs"], "seed")
    return [
        f"{len(data['runs'])} runs: {len(ALL)} recipes, learning rates "
        f"{' and '.join(f'{lr:g}' for lr in RATES)}, "
        f"{len(seeds)} seeds. {s['layers']} layers, width {s['width']}, {s['length']} bytes of "
        "the Python standard "
        f"library a sequence, {s['rows']} sequences a step, {s['steps']} steps (the paper: 350M "
        "to 13B parameters, "
        "50,000 steps), AdamW (0.9, 0.95), weight decay 0.1, clipping at 1. Final loss: the "
        "median over the last "
        "tenth of the run, of batches that are seen for the first time; ± is the standard "
        "deviation over seeds."
    ]


def tell(data: Data) -> list[str]:
    lines = []
    for lr in data["rates"]:
        mean = {r: mean_spread(_finals(data, r, lr)) for r in ALL}
        order = sorted(ALL, key=lambda r: mean[r][0])
        told = ", ".join(f"{r} {mean[r][0]:.3f} ± {mean[r][1]:.3f}" for r in order)
        lines.append(f"lr {lr:g}: final loss, best first: {told}. {_beside_paper(data, lr, mean)}")
        lines.append(f"lr {lr:g}: {_conditions(data, lr)}")
        lines.append(f"lr {lr:g}: {_spikes(data, lr)}")
    return lines


def _beside_paper(data: Data, lr: float, mean: dict[str, tuple[float, float]]) -> str:
    told = []
    for size, table in TABLE1.items():
        rho = spearmanr(
            [mean[r][0] for r in table], [perplexities[0] for perplexities in table.values()]
        ).statistic
        told.append(f"{rho:.2f} ({size})")
    same = sum(_same_side(mean, a, b) for a, b in combinations(TABLE1["1.7B"], 2))
    clear = sum(
        agreed(gaps(*(by(data["runs"], recipe=r, lr=lr) for r in pair)))
        for pair in combinations(TABLE1["1.7B"], 2)
    )
    return (
        "Rank correlation with Table 1's WikiText perplexity over its four methods: "
        f"{', '.join(told)}; {same} of 6 "
        f"pairs stand as at 1.7B, {clear} of 6 stand the same way round at every seed here."
    )


def _same_side(mean: dict[str, tuple[float, float]], a: str, b: str) -> bool:
    """A tie of the paper's stands as any order does."""
    theirs = TABLE1["1.7B"][a][0] - TABLE1["1.7B"][b][0]
    return theirs == 0 or (mean[a][0] - mean[b][0]) * theirs > 0


def _conditions(data: Data, lr: float) -> str:
    """The recipes that meet both conditions against those that do not, seed by seed."""
    of = {r: by(data["runs"], recipe=r, lr=lr) for r in ALL}
    won = [
        max(gap) < 0
        for good in KEEP
        for bad in ALL
        if bad not in KEEP and (gap := gaps(of[good], of[bad]))
    ]
    lost = [
        min(gap) > 0
        for good in KEEP
        for bad in ALL
        if bad not in KEEP and (gap := gaps(of[good], of[bad]))
    ]
    return (
        f"of {len(won)} comparisons of a recipe that meets both conditions with one that does "
        f"not, {sum(won)} are won "
        f"at every seed and {sum(lost)} lost at every seed."
    )


def _spikes(data: Data, lr: float) -> str:
    told = []
    for recipe in ALL:
        runs = by(data["runs"], recipe=recipe, lr=lr)
        wrong = sum(run["outcome"] != "healthy" for run in runs)
        ratio = mean_spread([run["grad_max"] / run["grad_median"] for run in runs])
        told.append(
            f"{recipe} {wrong} of {len(runs)} (gradient's maximum {ratio[0]:.1f} times its median)"
        )
    return "runs that spiked or diverged: " + ", ".join(told) + "."


def tables(data: Data) -> list[Table]:
    head = [
        "recipe",
        "conditions",
        "lr",
        "final loss",
        "gradient norm, median",
        "maximum",
        "spiked or diverged",
    ]
    rows = []
    for lr in data["rates"]:
        for recipe in ALL:
            runs = by(data["runs"], recipe=recipe, lr=lr)
            figures = [
                mean_spread([run[key] for run in runs])
                for key in ("final", "grad_median", "grad_max")
            ]
            wrong = sum(run["outcome"] != "healthy" for run in runs)
            told = [f"{mean:.3f} ± {spread:.3f}" for mean, spread in figures]
            rows.append(
                [
                    recipe,
                    "met" if recipe in KEEP else "not met",
                    f"{lr:g}",
                    *told,
                    f"{wrong} of {len(runs)}",
                ]
            )
    theirs = [
        [f"{size}", *(f"{three(table[r][0])} / {three(table[r][1])}" for r in table)]
        for size, table in TABLE1.items()
    ]
    return [
        Table("Here", head, rows),
        Table(
            "The paper's Table 1: perplexity on WikiText / LAMBADA", ["", *TABLE1["1.7B"]], theirs
        ),
    ]


def draw(data: Data, figure: Any) -> None:
    panels = figure.subplots(2, len(data["rates"]), sharex=True, sharey="row")
    for column, lr in enumerate(data["rates"]):
        for row, (key, label) in enumerate((("loss", "loss"), ("grad_norm", "gradient norm"))):
            axes = panels[row][column]
            for recipe in ALL:
                curves = [
                    thinned(list(map(float, run[key])), SHOWN)
                    for run in by(data["runs"], recipe=recipe, lr=lr)
                ]
                pictures.band(axes, curves, data["sizes"]["steps"], pictures.LOOKS[recipe].colour)
            if column == 0:
                axes.set_ylabel(label)
        panels[0][column].set_title(f"learning rate {lr:g}", fontsize=10, loc="left")
        panels[1][column].set_xlabel("step")
    pictures.logarithmic(panels[1][0])
    finals = [run["final"] for run in data["runs"]]
    panels[0][0].set_ylim(min(finals) - 0.1, max(3.2, max(finals) + 0.1))
    pictures.legend(figure, ALL)


PART = Part(
    "figures34",
    "Figures 3 and 4 and the order of Table 1, at a small scale",
    estimate,
    measure,
    setup,
    tell,
    tables,
    draw,
    (11.0, 6.6),
)
