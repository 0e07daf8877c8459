"""Why an embedding whose std is near 1, and not larger? One init of the sub-layers, six sizes of
the embedding.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from examples.spike_lab.run import Setting
from examples.spike_lab.text import corpus
from jacdiag.records import Report

from . import pictures
from .part import Data, Options, Part, Table, mean_spread, rounded, three
from .trainings import Trial, agreed, by, gaps, listed, outcomes, seconds_of, untrained

SIGMAS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
RATES = (4e-3, 3.2e-2)
SIZES: dict[str, Any] = {
    "layers": 4,
    "width": 64,
    "heads": 4,
    "length": 64,
    "steps": 300,
    "rows": 8,
}
SMALL: dict[str, Any] = {"layers": 1, "width": 16, "heads": 2, "length": 16, "steps": 30, "rows": 2}
SEEDS = (0, 1)


def trials(quick: bool) -> list[Trial]:
    sizes = SMALL if quick else SIZES
    s = math.sqrt(2 / (5 * sizes["width"]))  # what the recipe draws the embedding with
    return [
        Trial(
            f"sigma={sigma:g}",
            Setting.of({**sizes, "embed_std": sigma / s, "lr": lr, "seed": seed}),
        )
        for sigma in _asked(quick)
        for lr in RATES
        for seed in SEEDS[: 1 if quick else None]
    ]


def _asked(quick: bool) -> tuple[float, ...]:
    return (0.1, 1.0, 30.0) if quick else SIGMAS


def estimate(options: Options) -> float:
    asked = trials(options.quick)
    begun = time.process_time()
    untrained(asked[0])
    return (time.process_time() - begun) * len(_asked(options.quick)) + seconds_of(asked, options)


def measure(options: Options) -> Data:
    asked = trials(options.quick)
    first = {trial.name: trial for trial in reversed(asked)}  # one seed of each size
    untouched = [
        _at_init(sigma, untrained(first[f"sigma={sigma:g}"])) for sigma in _asked(options.quick)
    ]
    runs = outcomes(asked, options)
    for run in runs:
        run["sigma"] = float(run.pop("name").removeprefix("sigma="))
        run["share_first"], run["share_last"] = run["shares"][0], run["shares"][-1]
        del run["loss"], run["grad_norm"], run["shares"]
    sizes = SMALL if options.quick else SIZES
    return rounded(
        {"sizes": sizes, "init": untouched, "runs": runs, "pair_entropy": pair_entropy()}
    )


def _at_init(sigma: float, report: Report) -> Data:
    worst = max(row.branch_norm.estimate for row in report.sublayers if row.branch_norm is not None)
    network = report.network
    return {
        "sigma": sigma,
        "worst_branch": worst,
        "product_log": network.gain_product_log if network is not None else None,
        "end_to_end": network.end_to_end.estimate
        if network is not None and network.end_to_end is not None
        else None,
    }


def pair_entropy() -> float:
    """Entropy of a byte given the one before it, in nats: about what a model without branches can
    reach.
    """
    text = corpus().long()
    counts = (
        torch.bincount(text[:-1] * 256 + text[1:], minlength=256 * 256).double().reshape(256, 256)
    )
    rows = counts.sum(1, keepdim=True).clamp(min=1)
    return float(-(counts / counts.sum() * torch.log((counts / rows).clamp(min=1e-300))).sum())


# -- words -----------------------------------------------------------------------------------------
def _sigmas(data: Data) -> list[float]:
    return [row["sigma"] for row in data["init"]]


def _rates(data: Data) -> list[float]:
    return listed(data["runs"], "lr")


def _finals(data: Data, sigma: float, lr: float) -> tuple[float, float]:
    return mean_spread([float(run["final"]) for run in by(data["runs"], sigma=sigma, lr=lr)])


def _of(data: Data, sigma: float, key: str) -> float:
    """A figure of the runs at the lower learning rate."""
    return mean_spread([run[key] for run in by(data["runs"], sigma=sigma, lr=_rates(data)[0])])[0]


def setup(data: Data) -> list[str]:
    s, seeds = data["sizes"], len(listed(data["runs"], "seed"))
    return [
        "Sub-layers drawn as in vanilla, the embedding from N(0, σ²), positions as in vanilla. "
        f"{s['layers']} layers, "
        f"width {s['width']}, {s['steps']} steps, learning rates "
        f"{' and '.join(f'{lr:g}' for lr in _rates(data))}, "
        f"{seeds} seeds. Share: std of a branch over that of its shortcut, the mean over "
        "sub-layers. A model that "
        f"sees the last byte alone can reach {three(data['pair_entropy'])} nats."
    ]


def tell(data: Data) -> list[str]:
    lines = []
    for lr in _rates(data):
        finals = {sigma: _finals(data, sigma, lr) for sigma in _sigmas(data)}
        best = min(finals, key=lambda sigma: finals[sigma][0])
        of = {sigma: by(data["runs"], sigma=sigma, lr=lr) for sigma in finals}
        tied = [
            f"{sigma:g}"
            for sigma in finals
            if sigma != best and not agreed(gaps(of[sigma], of[best]))
        ]
        wrong = sum(run["outcome"] != "healthy" for run in by(data["runs"], lr=lr))
        lines.append(
            f"lr {lr:g}: the best final loss is at σ = {best:g} ({finals[best][0]:.3f} ± "
            f"{finals[best][1]:.3f}), "
            f"no worse at one seed at least: {', '.join(tied) or 'none'}; "
            f"{wrong} of {len(by(data['runs'], lr=lr))} runs spiked or diverged."
        )
    return [*lines, _regret(data), _fade(data), _why(data)]


def _regret(data: Data) -> str:
    """What each size costs where the learning rate suits it least."""
    finals = {s: [_finals(data, s, lr)[0] for lr in _rates(data)] for s in _sigmas(data)}
    best = [min(at) for at in zip(*finals.values(), strict=True)]
    worst = {s: max(f - b for f, b in zip(at, best, strict=True)) for s, at in finals.items()}
    told = ", ".join(f"{cost:.3f} at σ = {s:g}" for s, cost in worst.items())
    least = min(worst, key=lambda s: worst[s])
    return (
        f"Loss over the best of all sizes, at the rate that suits a size least: {told}; least "
        f"at σ = {least:g}."
    )


def _fade(data: Data) -> str:
    large = [sigma for sigma in _sigmas(data) if sigma >= 1]
    share, gradient = (
        _slope(large, [_of(data, s, key) for s in large])
        for key in ("share_first", "branch_gradient")
    )
    worst = _slope(large, [row["worst_branch"] for row in data["init"] if row["sigma"] >= 1])
    return (
        "The fade, from σ = 1 to 30 at init: a branch's share of the stream goes as "
        f"σ^{share:.2f}, its norm as "
        f"σ^{worst:.2f}, the gradient of its weights as σ^{gradient:.2f} (1/σ is σ^-1): what "
        "makes the bound small "
        "takes the branch's say and its gradient with it."
    )


def _slope(x: list[float], y: list[float]) -> float:
    """Between the ends, in logarithms."""
    return math.log(y[-1] / y[0]) / math.log(x[-1] / x[0])


def _why(data: Data) -> str:
    told = ", ".join(
        f"{three(_of(data, sigma, 'share_last'))} at σ = {sigma:g}" for sigma in _sigmas(data)
    )
    ends = [
        " and ".join(
            f"{_finals(data, s, lr)[0] - _finals(data, 1.0, lr)[0]:+.3f}" for lr in _rates(data)
        )
        for s in (30.0, 0.1)
    ]
    return (
        f"After training (lr {_rates(data)[0]:g}) the share is {told}. Final loss against that of "
        "σ = 1, at the two "
        f"rates: {ends[0]} for σ = 30, {ends[1]} for σ = 0.1."
    )


def tables(data: Data) -> list[Table]:
    head = [
        "σ",
        "worst branch ‖J‖",
        "ln of product",
        "end-to-end",
        "branch gradient",
        "share at init",
        "share, end",
        *(f"final loss, lr {lr:g}" for lr in _rates(data)),
        "spiked or diverged",
    ]
    rows = []
    for row in data["init"]:
        sigma = row["sigma"]
        finals = ["{:.3f} ± {:.3f}".format(*_finals(data, sigma, lr)) for lr in _rates(data)]
        runs = by(data["runs"], sigma=sigma)
        wrong = f"{sum(run['outcome'] != 'healthy' for run in runs)} of {len(runs)}"
        figures = [three(row[key]) for key in ("worst_branch", "product_log", "end_to_end")]
        figures += [
            three(_of(data, sigma, key)) for key in ("branch_gradient", "share_first", "share_last")
        ]
        rows.append([f"{sigma:g}", *figures, *finals, wrong])
    return [
        Table(f"By the embedding's std; gradient and shares of lr {_rates(data)[0]:g}", head, rows)
    ]


def draw(data: Data, figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    looks = (pictures.LOOKS["scaled-embed"], pictures.LOOKS["vanilla"])
    for lr, look, aside in zip(_rates(data), looks, (0.96, 1.04), strict=True):
        finals = [_finals(data, sigma, lr) for sigma in _sigmas(data)]
        x = [aside * sigma for sigma in _sigmas(data)]
        left.errorbar(
            x,
            [m for m, _ in finals],
            [s for _, s in finals],
            color=look.colour,
            marker=look.marker,
            markersize=5,
            capsize=3,
            label=f"lr {lr:g}",
        )
    left.axhline(data["pair_entropy"], color=pictures.PALE, linewidth=0.9, linestyle=(0, (4, 2)))
    left.annotate(
        "last byte alone",
        (_sigmas(data)[0], data["pair_entropy"]),
        xytext=(-8, 3),
        textcoords="offset points",
        fontsize=8,
        color=pictures.PALE,
    )
    pictures.logarithmic(left, "x")
    left.set_title("(a) final loss", fontsize=10, loc="left")
    curves = {
        "worst branch ‖J‖": [row["worst_branch"] for row in data["init"]],
        "share, at init": [_of(data, sigma, "share_first") for sigma in _sigmas(data)],
        "share, after training": [_of(data, sigma, "share_last") for sigma in _sigmas(data)],
        "gradient of the branches": [
            _of(data, sigma, "branch_gradient") for sigma in _sigmas(data)
        ],
    }
    for (label, values), look in zip(curves.items(), pictures.LOOKS.values(), strict=False):
        right.plot(
            _sigmas(data), values, color=look.colour, marker=look.marker, markersize=5, label=label
        )
    pictures.logarithmic(right, "xy")
    right.set_title("(a) what the branches have to say", fontsize=10, loc="left")
    for axes in (left, right):
        axes.set_xlabel("std of the embedding")
        axes.legend(frameon=False, fontsize=9)


PART = Part(
    "questions-a",
    "Why an embedding std near 1, and not larger",
    estimate,
    measure,
    setup,
    tell,
    tables,
    draw,
)
