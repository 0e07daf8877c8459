"""Is it the product over depth, or the worst layer? Models that agree in one of the two and differ
in the other.
"""

from __future__ import annotations

import math
import time
from typing import Any

from scipy.stats import spearmanr

from examples.spike_lab.run import Setting
from examples.spike_lab.text import batch
from jacdiag.records import SublayerRecord

from . import pictures
from .measuring import sublayers
from .part import Data, Options, Part, Table, mean_spread, rounded, span, three
from .trainings import Trial, by, listed, outcomes, seconds_of

RATES = (8e-3, 6.4e-2)
SIZES: dict[str, Any] = {
    "layers": 6,
    "width": 64,
    "heads": 4,
    "length": 64,
    "steps": 150,
    "rows": 8,
}
SMALL: dict[str, Any] = {"layers": 2, "width": 16, "heads": 2, "length": 16, "steps": 20, "rows": 2}
SEEDS = (0, 1)
FACTORS = (3.0, 9.0)
# Equal product: (all layers, one layer). Equal worst branch: likewise.
SAME_PRODUCT = (
    ("all × 3", "first, product of all × 3"),
    ("all × 9", "first, product of all × 9"),
    ("all × 3", "last, product of all × 3"),
)
SAME_WORST = (("all × 3", "first × 3"), ("all × 9", "first × 9"))
PAIRED = dict.fromkeys(name for pair in (*SAME_PRODUCT, *SAME_WORST) for name in pair)
NAMES = {"product_log": "product", "worst": "worst branch"}
Scales = tuple[tuple[int, float], ...]


def _setting(quick: bool, lr: float = RATES[0], seed: int = 0) -> Setting:
    return Setting.of(
        {**(SMALL if quick else SIZES), "recipe": "scaled-embed", "lr": lr, "seed": seed}
    )


def estimate(options: Options) -> float:
    begun = time.process_time()
    figures((), options.quick)
    each = time.process_time() - begun
    names = [name for name in ("unscaled", *PAIRED) if not options.quick or "9" not in name]
    return 3 * len(names) * each + seconds_of(
        _trials(dict.fromkeys(names, ()), options.quick), options
    )


def _trials(models: dict[str, Scales], quick: bool) -> list[Trial]:
    return [
        Trial(name.replace(" ", "-"), _setting(quick, lr, seed), scales)
        for name, scales in models.items()
        for lr in RATES
        for seed in SEEDS[: 1 if quick else None]
    ]


def measure(options: Options) -> Data:
    models = _models(options.quick)
    at_init = [
        {"name": name, "scales": list(scales), **figures(scales, options.quick)}
        for name, scales in models.items()
    ]
    runs = []
    for run in outcomes(_trials(models, options.quick), options):
        grads = [g for g in run["grad_norm"] if math.isfinite(g)]
        kept = {key: run[key] for key in ("lr", "seed", "outcome", "final")}
        runs.append({"model": run["name"].replace("-", " "), "grad_max": max(grads), **kept})
    return rounded({"sizes": SMALL if options.quick else SIZES, "models": at_init, "runs": runs})


def figures(scales: Scales, quick: bool) -> Data:
    """Log of the product of residual norms, and the worst branch norm, of the untrained model of
    the first seed.
    """
    setting = _setting(quick)
    ids, _ = batch(0, 0, 2, setting.shape.length)
    records = sublayers(Trial("", setting, scales).model(), ids)
    return {
        "product_log": math.fsum(math.log(_residual(r)) for r in records),
        "worst": max(r.branch_norm.estimate for r in records if r.branch_norm is not None),
    }


def _residual(record: SublayerRecord) -> float:
    assert record.residual_norm is not None
    return record.residual_norm.estimate


def _models(quick: bool) -> dict[str, Scales]:
    """One layer's factor is searched for where a product is to be met; its worst branch then
    differs.
    """
    layers = _setting(quick).shape.layers
    found: dict[str, Scales] = {"unscaled": ()}
    for factor in FACTORS[: 1 if quick else None]:
        found[f"all × {factor:g}"] = tuple((k, factor) for k in range(layers))
        found[f"first × {factor:g}"] = ((0, factor),)
    for whole, name in SAME_PRODUCT:
        if whole not in found:
            continue
        layer = 0 if name.startswith("first") else layers - 1
        target = figures(found[whole], quick)["product_log"]
        found[name] = ((layer, _meet(target, layer, quick)),)
    return found


def _meet(target: float, layer: int, quick: bool, tries: int = 5) -> float:
    """The factor on one layer at which the log of the product is `target`, by secants on the
    factor's logarithm.
    """

    def off(x: float) -> float:
        return float(figures(((layer, math.exp(x)),), quick)["product_log"]) - target

    a, b = math.log(5.0), math.log(20.0)
    at_a, at_b = off(a), off(b)
    for _ in range(tries):
        if abs(at_b) < 0.03 or at_b == at_a:
            break
        a, at_a, b = b, at_b, min(b - at_b * (b - a) / (at_b - at_a), 12.0)
        at_b = off(b)
    # a folder's runs must be those of the factor that is written down
    return float(f"{math.exp(b):.4g}")


# -- words -----------------------------------------------------------------------------------------
def _rates(data: Data) -> list[float]:
    return listed(data["runs"], "lr")


def _finals(data: Data, model: str, lr: float) -> tuple[float, float]:
    return mean_spread([float(run["final"]) for run in by(data["runs"], model=model, lr=lr)])


def setup(data: Data) -> list[str]:
    s, seeds = data["sizes"], len(listed(data["runs"], "seed"))
    return [
        f"scaled-embed, {s['layers']} layers, width {s['width']}; the output matrices of all "
        "layers, or of one, times "
        f"a factor before the first step. {s['steps']} steps, {seeds} seeds, learning rates "
        f"{', '.join(f'{lr:g}' for lr in _rates(data))}. Product: of the measured ‖I + J‖ over "
        "all sub-layers (Eq. 7), "
        "its logarithm; worst: the largest measured branch norm. Both of the first seed's model."
    ]


def tell(data: Data) -> list[str]:
    lines = [
        _pairs(data, SAME_PRODUCT, "of equal product whose worst branch differs"),
        _pairs(data, SAME_WORST, "of equal worst branch whose product differs"),
    ]
    found = {key: [_rho(data, lr, key) for lr in _rates(data)] for key in NAMES}
    for k, lr in enumerate(_rates(data)):
        told = ", ".join(
            f"with the {name} {found[key][k][0]:.2f} (p {found[key][k][1]:.2f})"
            for key, name in NAMES.items()
        )
        runs = by(data["runs"], lr=lr)
        wrong = sum(run["outcome"] != "healthy" for run in runs)
        lines.append(
            f"lr {lr:g}: rank correlation over {len(data['models'])} models of the final loss "
            f"{told}; {wrong} of "
            f"{len(runs)} runs spiked or diverged."
        )
    return [*lines, _verdict(found), _caveat(data)]


def _verdict(found: dict[str, list[tuple[float, float]]]) -> str:
    sure = {name: sum(p < 0.05 for _, p in found[key]) for key, name in NAMES.items()}
    mean = {name: mean_spread([rho for rho, _ in found[key]])[0] for key, name in NAMES.items()}
    better = max(mean, key=lambda name: mean[name])
    of = len(found["worst"])
    told = ", ".join(
        f"{mean[name]:.2f} for the {name} (told from chance at {sure[name]} of {of} rates)"
        for name in mean
    )
    return f"The {better} orders the outcomes better here: on average {told}."


def _caveat(data: Data) -> str:
    """One layer that carries a whole product is an extreme model, and the product alone does not
    say so.
    """
    factors = [model["scales"][0][1] for model in data["models"] if "product" in model["name"]]
    return (
        f"To meet the product in one layer takes a factor of {span(factors)} on it, and the "
        "stream behind a first "
        "layer of that size drowns the branches of all others: such a pair differs in more than "
        "its worst branch."
    )


def _pairs(data: Data, pairs: tuple[tuple[str, str], ...], what: str) -> str:
    known = {model["name"] for model in data["models"]}
    pairs = tuple(pair for pair in pairs if known.issuperset(pair))
    told = []
    for lr in _rates(data):
        gaps = [_finals(data, one, lr)[0] - _finals(data, whole, lr)[0] for whole, one in pairs]
        told.append(f"{', '.join(f'{gap:+.3f}' for gap in gaps)} at lr {lr:g}")
    named = "; ".join(f"{one} less {whole}" for whole, one in pairs)
    return f"Final loss of models {what} ({named}): {'; '.join(told)}."


def _rho(data: Data, lr: float, key: str) -> tuple[float, float]:
    """Rank correlation with the final loss, and its p-value."""
    finals = [_finals(data, model["name"], lr)[0] for model in data["models"]]
    found = spearmanr([model[key] for model in data["models"]], finals)
    return float(found.statistic), float(found.pvalue)


def tables(data: Data) -> list[Table]:
    head = [
        "model",
        "factor",
        "ln of product",
        "worst ‖J‖",
        *(f"final loss, lr {lr:g}" for lr in _rates(data)),
        "spiked or diverged",
    ]
    rows = []
    for model in data["models"]:
        name, runs = model["name"], by(data["runs"], model=model["name"])
        finals = ["{:.3f} ± {:.3f}".format(*_finals(data, name, lr)) for lr in _rates(data)]
        factor = three(model["scales"][0][1]) if model["scales"] else "1"
        wrong = f"{sum(run['outcome'] != 'healthy' for run in runs)} of {len(runs)}"
        rows.append(
            [name, factor, three(model["product_log"]), three(model["worst"]), *finals, wrong]
        )
    return [Table("Product, worst branch, and what became of it", head, rows)]


def draw(data: Data, figure: Any) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    looks = (pictures.LOOKS["scaled-embed"], pictures.LOOKS["vanilla"], pictures.LOOKS["xavier"])
    titles = {"product_log": "ln of the product over depth", "worst": "worst ‖J‖"}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for lr, look in zip(_rates(data), looks, strict=False):
            finals = [_finals(data, model["name"], lr) for model in data["models"]]
            axes.errorbar(
                [model[key] for model in data["models"]],
                [m for m, _ in finals],
                [s for _, s in finals],
                fmt=look.marker,
                color=look.colour,
                markersize=5,
                capsize=3,
                label=f"lr {lr:g}, ρ {_rho(data, lr, key)[0]:.2f}",
            )
        axes.set_xlabel(title)
        axes.set_title(f"(c) final loss by the {NAMES[key]}", fontsize=10, loc="left")
        axes.margins(y=0.15)
        axes.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)
    pictures.logarithmic(panels[1], "x")


PART = Part(
    "questions-c",
    "The product over depth, or the worst layer",
    estimate,
    measure,
    setup,
    tell,
    tables,
    draw,
)
