"""Figure 2: Eq. 15 per layer at init for the 1.7B shape, in closed form, with jacdiag's measured
norms beside it.
"""

from __future__ import annotations

import time
from typing import Any

from jacdiag.measure.branch_norms import Effort
from jacdiag.measure.weight_statistics import initial_bound
from jacdiag.records import SublayerRecord
from jacdiag.sources import gpt

from . import pictures
from .measuring import layer_by_layer
from .paper import BREAK, FIGURE2, KEEP, LENGTH, SHAPE_1_7B
from .part import Data, Options, Part, Table, in_parallel, rounded, span, three
from .stream import closed_form

PROBE = 32  # tokens; every product costs one forward of them
MEASURED = (*range(8), 15, 23)  # the shallow third, the middle, the end
EFFORT = Effort(tol=0.2)  # of the interval's width; the Ritz value that is given is closer by far
SMALL: dict[str, Any] = {"n_layer": 6, "n_embd": 96, "n_head": 4, "vocab_size": 50257}
_FORWARDS = 130  # that one layer takes, of its block: the solver's products, and the tracing of it


def _sizes(quick: bool) -> tuple[dict[str, Any], tuple[int, ...]]:
    return (SMALL, tuple(range(6))) if quick else (SHAPE_1_7B, MEASURED)


def _config(sizes: dict[str, Any], length: int) -> gpt.GPTConfig:
    return gpt.config_of({**sizes, "block_size": length})


def estimate(options: Options) -> float:
    """From one layer at no effort: its draw, and one forward."""
    sizes, layers = _sizes(options.quick)
    config = _config({**sizes, "n_layer": 1}, PROBE)
    begun = time.process_time()
    for _ in layer_by_layer("vanilla", config, PROBE, (), 0):
        raise AssertionError("no layer was asked for")
    one = time.process_time() - begun
    return len(FIGURE2) * (sizes["n_layer"] * one + len(layers) * _FORWARDS * 0.12 * one)


def measure(options: Options) -> Data:
    sizes, layers = _sizes(options.quick)
    asked = [(recipe, sizes, layers) for recipe in FIGURE2]
    rows: list[list[Data]] = list(in_parallel(_measured, asked, options.jobs))
    found = dict(zip(FIGURE2, rows, strict=True))
    data: Data = {
        "shape": sizes,
        "probe": PROBE,
        "paper_length": LENGTH,
        "layers": list(layers),
        "first_ffn": {r: initial_bound(r, sizes["n_layer"], sizes["n_embd"]) for r in FIGURE2},
        "closed_form": {r: _closed(r, sizes, LENGTH) for r in FIGURE2},
        "closed_form_probe": {r: _closed(r, sizes, PROBE) for r in FIGURE2},
        "measured": found,
    }
    return rounded(data)


def _closed(recipe: str, sizes: dict[str, Any], length: int) -> list[dict[str, float]]:
    found = closed_form(recipe, _config(sizes, length), length)
    return [{"sigma": row.sigma, "sigma_ffn": row.sigma_ffn, "bound": row.bound} for row in found]


def _measured(asked: tuple[str, dict[str, Any], tuple[int, ...]]) -> list[Data]:
    recipe, sizes, layers = asked
    rows = []
    for k, records in layer_by_layer(
        recipe, _config(sizes, PROBE), PROBE, layers, seed=0, effort=EFFORT
    ):
        rows.append({"layer": k, **{str(record.kind): _row(record) for record in records}})
        print(f"  {recipe}: layer {k + 1} of {sizes['n_layer']}", flush=True)
    return rows


def _row(record: SublayerRecord) -> Data:
    branch, residual, spread = record.branch_norm, record.residual_norm, record.shortcut_std
    assert branch is not None and residual is not None and spread is not None
    return {
        "sigma": spread.median,
        "branch": branch.estimate,
        "branch_lower": branch.lower,
        "branch_upper": branch.upper,
        "residual": residual.estimate,
        "bound": record.bound,
        "tightness": record.tightness,
        "bound_norms": record.bound_norms,
    }


# -- words -----------------------------------------------------------------------------------------
def _of(data: Data, kind: str, key: str, recipe: str) -> list[float]:
    return [row[kind][key] for row in data["measured"][recipe]]


def setup(data: Data) -> list[str]:
    shape = data["shape"]
    return [
        f"N {shape['n_layer']}, d {shape['n_embd']}, {shape['n_head']} heads, d_ffn 4 d; "
        "untrained. "
        f"Closed form: every layer, from the weights' std and sizes, at {data['paper_length']:,} "
        "tokens (the paper's) "
        f"and at {data['probe']} (the probe's). Measured, at the full width, one layer in memory "
        "at a time: layers "
        f"{', '.join(str(k + 1) for k in data['layers'])} of {shape['n_layer']}, one sequence of "
        f"{data['probe']} "
        "different random tokens, float32, one draw. GELU; learned positions, drawn like the "
        "embedding."
    ]


def tell(data: Data) -> list[str]:
    closed = {r: [row["bound"] - 1 for row in data["closed_form"][r]] for r in FIGURE2}
    branches = {r: _of(data, "mlp", "branch", r) for r in FIGURE2}
    lines = [
        _order(data, "Eq. 15 in closed form", closed, list(range(data["shape"]["n_layer"]))),
        _order(data, "the FFN's branch as measured", branches, data["layers"]),
    ]
    ffn = [v for r in FIGURE2 for v in _of(data, "mlp", "tightness", r)]
    attention = [v for r in FIGURE2 for v in _of(data, "attention", "tightness", r)]
    single = "one factor, nearly" if max(ffn) / min(ffn) < 1.5 else "not one factor"
    lines.append(
        f"How loose: the bound's excess over 1 is {span(ffn)} times the measured norm of the "
        "FFN's branch (Eq. 15: "
        f"{single}), and {span(attention)} times that of attention (Eq. 20 with |J^Z| measured)."
    )
    norms = [
        first
        for r in FIGURE2
        if (first := data["measured"][r][0]["mlp"])["bound_norms"] is not None
    ]
    lines.append(
        "At layer 1, measured |W|, the smallest sigma_x' and the activation's largest slope in "
        "place of the estimates "
        f"give {span((n['bound_norms'] - 1) / n['branch'] for n in norms)} times the measured "
        "norm: the looseness is "
        "that of |W_2| |W_1| against |W_2 D W_1|, D the activation's slopes, and not of the "
        "estimate of |W|."
    )
    return [*lines, _beginning(data), _sigma(data)]


def _order(data: Data, what: str, values: dict[str, list[float]], layers: list[int]) -> str:
    """The lower of BREAK over the higher of KEEP, layer by layer."""
    third = data["shape"]["n_layer"] // 3
    ratios = [
        min(values[r][i] for r in BREAK) / max(values[r][i] for r in KEEP)
        for i in range(len(layers))
    ]
    shallow = [(ratio, k) for ratio, k in zip(ratios, layers, strict=True) if k < third]
    least, at = min(shallow)
    lost = next((k + 1 for ratio, k in zip(ratios, layers, strict=True) if ratio <= 1), None)
    deeper = "and at every deeper one" if lost is None else f"and is lost from layer {lost} on"
    holds = "holds" if least > 1 else "does not hold"
    return (
        f"Order, {what}: vanilla and xavier above scaled-embed and embed-ln {holds} at every "
        "layer of the shallow "
        f"third (the lower of the first two is {three(ratios[0])} times the higher of the others "
        "at layer 1, at least "
        f"{three(least)} times, at layer {at + 1}), {deeper}."
    )


def _beginning(data: Data) -> str:
    told = (
        f"{r} {three(data['first_ffn'][r])} / {three(data['closed_form'][r][0]['bound'])}"
        for r in FIGURE2
    )
    return (
        "Eq. 15 at the first FFN, without / with what positions and the first attention add to "
        "sigma_x': "
        f"{', '.join(told)}."
    )


def _sigma(data: Data) -> str:
    off = [
        (
            abs(row["mlp"]["sigma"] / data["closed_form_probe"][r][row["layer"]]["sigma_ffn"] - 1),
            r,
            row["layer"] + 1,
        )
        for r in FIGURE2
        for row in data["measured"][r]
    ]
    (worst, recipe, layer), middle = max(off), sorted(off)[len(off) // 2][0]
    return (
        f"The closed form's sigma_x' is within {100 * middle:.1f}% of the measured one at half of "
        "the measured layers, "
        f"within {100 * worst:.0f}% at all (the worst: {recipe}, layer {layer})."
    )


def tables(data: Data) -> list[Table]:
    closed = data["closed_form"]
    rows = [
        [str(k + 1), *(three(closed[r][k][key]) for r in FIGURE2 for key in ("sigma_ffn", "bound"))]
        for k in range(data["shape"]["n_layer"])
    ]
    head = ["layer", *(f"{r}: {what}" for r in FIGURE2 for what in ("σ", "Eq. 15"))]
    first = [
        [
            "first FFN, σ_x' that of the embedding alone",
            *(three(data["first_ffn"][r]) for r in FIGURE2),
        ]
    ]
    made = [
        Table("Eq. 15 as the paper's anchors have it", ["", *FIGURE2], first),
        Table(f"Closed form, {data['paper_length']:,} tokens, the token in the middle", head, rows),
    ]
    names = {"mlp": "FFN, Eq. 15", "attention": "Attention, Eq. 20"}
    keys = ("branch", "residual", "bound", "tightness")
    for kind, name in names.items():
        head = [
            "layer",
            *(f"{r}: {what}" for r in FIGURE2 for what in ("‖J‖", "‖I+J‖", "bound", "loose ×")),
        ]
        rows = [
            [
                str(k + 1),
                *(three(data["measured"][r][i][kind][key]) for r in FIGURE2 for key in keys),
            ]
            for i, k in enumerate(data["layers"])
        ]
        made.append(
            Table(
                f"{name}, measured beside the bound at the measured σ ({data['probe']} tokens)",
                head,
                rows,
            )
        )
    return made


def draw(data: Data, figure: Any) -> None:
    panels = figure.subplots(1, 3)
    at = [k + 1 for k in data["layers"]]
    for axes, kind, title in zip(
        panels, ("mlp", "attention"), ("FFN (Eq. 15)", "attention (Eq. 20)"), strict=False
    ):
        for recipe in FIGURE2:
            look = pictures.LOOKS[recipe]
            axes.plot(
                at,
                _of(data, kind, "branch", recipe),
                color=look.colour,
                marker=look.marker,
                markersize=4,
            )
            axes.plot(
                at,
                [b - 1 for b in _of(data, kind, "bound", recipe)],
                color=look.colour,
                linestyle=(0, (4, 2)),
                linewidth=1.1,
            )
        pictures.logarithmic(axes)
        axes.set_title(f"{title}: bound − 1 (dashed), measured ‖J‖", fontsize=10, loc="left")
        axes.set_xlabel("layer")
    for recipe in FIGURE2:
        look = pictures.LOOKS[recipe]
        for kind, face in (("mlp", look.colour), ("attention", "white")):
            panels[2].plot(
                at,
                _of(data, kind, "tightness", recipe),
                color=look.colour,
                marker=look.marker,
                markerfacecolor=face,
                markersize=4,
                linewidth=0.8,
            )
    panels[2].set_ylim(bottom=0)
    panels[2].axhline(1, color=pictures.PALE, linewidth=0.8)
    panels[2].set_title(
        "(bound − 1) / measured ‖J‖: FFN filled, attention open", fontsize=10, loc="left"
    )
    panels[2].set_xlabel("layer")
    pictures.legend(figure, FIGURE2)


PART = Part(
    "figure2",
    "Figure 2: the bound of Eq. 15 per layer, and the measured norms beside it",
    estimate,
    measure,
    setup,
    tell,
    tables,
    draw,
    (14.0, 4.6),
)
