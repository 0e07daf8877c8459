"""The initialization of a model as plain data: every weight's draw, and its figures over seeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from jacdiag.records.base import SCHEMA_VERSION, Record
from jacdiag.records.structure import (
    AdapterRecord,
    RateRecord,
    TableRecord,
    TieRecord,
    ZeroShortcut,
)

# Roles of matrices that do the work of several, and these in the usual order.
FUSED = {
    "W_QKV": ("W_Q", "W_K", "W_V"),
    "W_QK": ("W_Q", "W_K"),
    "W_QV": ("W_Q", "W_V"),
    "W_KV": ("W_K", "W_V"),
    "W_gate_up": ("W_gate", "W_1"),
}


@dataclass(frozen=True)
class SectionRecord(Record):
    """The rows of a fused matrix that play one role: the queries, keys or values of a W_QKV.

    Attributes:
        role: As that of a weight.
        fan_out: How many outputs these rows make.
        family, std, lower, upper, mean, truncation: As those of a weight, over these rows alone.
        dim: The dimension of the outputs of the matrix; None in a report from before it was kept.
        groups: How often the roles follow one another along it, such as once a head.
        start: Where these rows begin in each group.
    """

    role: str
    fan_out: int
    family: str = "other"
    std: float | None = None
    lower: float | None = None
    upper: float | None = None
    mean: float | None = None
    truncation: float = 1.0

    # Where these rows lie.
    dim: int | None = None
    groups: int = 1
    start: int = 0


@dataclass(frozen=True)
class WeightRecord(Record):
    """How one parameter was initialised, as far as its values tell.

    Attributes:
        parameter, shape: `pattern` is its name with the layer number as "*".
        role: embedding, positions, cls, W_Q, W_K, W_V, W_O, W_1, W_gate, W_2, router, head,
            norm_gain, scale, bias ...; "" unknown.
        layer, sublayer: None and "" outside all sub-layers.
        fan_in, fan_out: of the linear map that it makes, whichever way it is stored.
        family: normal, truncated, uniform, orthogonal, zero, constant, sinusoid (a table of sines
            and cosines, which nobody drew) or other.
        std: over all elements; rows of a table that are exactly zero (padding) are left out and
            counted.
        lower, upper: sampling interval of the std that it was drawn with, at 1 - `alpha` of the
            contract.
        mean: over all elements; the value itself for a constant.
        truncation: for a truncated normal, std over that of the normal before it was cut.
        largest: largest magnitude; None in older reports.
        tiny: numbers that are not zero and closer to it than any generator's (1e-30).
        same_as: the first parameter with the very same numbers, "" for none; constants are no
            copies. The parameter's own name for a stack of matrices (experts) that holds one of
            them twice, and a matrix of equal blocks.
        piece_of: a parameter that holds the numbers of this gain, scale or bias as a piece of its
            own; "" for none.
        stream_of: the first matrix whose numbers this one repeats, up to a factor and over the
            shorter of both; "" for none.
        padding_row, padding_size: the row of a table that padding reads, and its largest magnitude;
            None without one.
        norm_length: for a gain of one number, how many numbers its norm divides by their length
            (ScaleNorm); None for any other norm.
        outliers: numbers further from the rest than any draw reaches; in matrices and tables only.
        core_std: std of the rest; None without outliers.
        offset: the number that the model adds before it uses a gain, 1 for one stored as 1 + w.
        decayed: in a parameter group with weight decay; None where no optimizer was given.
        kind: of the sub-layer that reads it (attention, mlp, moe, mixer, conv ...); "" outside all,
            and in reports from before it was kept.
        sections: of a fused matrix, the rows of each role; empty if it is not fused or its layout
            is not known.
    """

    # What it is, and where.
    parameter: str
    shape: list[int]
    role: str
    pattern: str
    layer: int | None = None
    sublayer: str = ""

    # How its values were drawn.
    fan_in: int | None = None
    fan_out: int | None = None
    family: str = "other"
    std: float | None = None
    lower: float | None = None
    upper: float | None = None
    mean: float | None = None
    truncation: float = 1.0
    zero_rows: int = 0

    # How the model uses it.
    decayed: bool | None = None
    kind: str = ""
    sections: list[SectionRecord] = field(default_factory=list)

    # What is unusual about its values.
    largest: float | None = None
    tiny: int = 0
    same_as: str = ""
    piece_of: str = ""
    offset: float = 0.0
    stream_of: str = ""
    padding_row: int | None = None
    padding_size: float | None = None
    norm_length: int | None = None
    outliers: int = 0
    core_std: float | None = None


@dataclass(frozen=True)
class ContractRecord(Record):
    """What the init contract is judged by.

    Attributes:
        family: model type of a Hugging Face config, else the class; published inits are looked up
            by it.
        sizes: variables of formulas: N (layers), d (width), V (vocabulary), and numbers of the
            model's config.
        weights: every parameter.
        tied: the embeddings that the head reads too.
        logits_std: std of the model's output where that is logits over the vocabulary, else None.
        alpha: chance that a weight drawn as expected falls outside its interval, per test.
        pinned: the user's contract: role or name pattern -> formula.
        tables: buffers that are computed when the model is built.
        rates: parameters of time steps and decay rates.
        adapters: pairs of factors of low-rank additions.
        tie: what the model says of its head and embedding, and what they are; None if it says
            nothing.
        zero_shortcuts: sub-layers whose shortcut is multiplied by zero.
    """

    # Which published init the model should have, and its sizes.
    family: str
    sizes: dict[str, float]

    # The weights, and how they are judged.
    weights: list[WeightRecord] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)
    logits_std: float | None = None
    alpha: float = 1e-6
    pinned: dict[str, str] = field(default_factory=dict)

    # Parts of the model that have rules of their own.
    tables: list[TableRecord] = field(default_factory=list)
    rates: list[RateRecord] = field(default_factory=list)
    adapters: list[AdapterRecord] = field(default_factory=list)
    tie: TieRecord | None = None
    zero_shortcuts: list[ZeroShortcut] = field(default_factory=list)


@dataclass(frozen=True)
class FiguresRecord(Record):
    """Figures of a model over seeds, each with its sampling interval, as a baseline holds them.

    Attributes:
        model, parameters, layers, width: of what.
        seeds: how many different initialisations were measured.
        spread: relative std of a sub-layer's figure from seed to seed, pooled over sub-layers; None
            for one seed.
        sublayers: name -> figure -> [lower, median, upper]: between these a figure lies for another
            seed.
        weights: name -> {"role", "family", "std", "lower", "upper", "value", "shape"}; `value` that
            of a constant; no `shape` in baselines from before it was kept.
        probe: {"batch", "seq", "tokens", "dtype"} that the figures of sub-layers were measured
            with; {} if none were, and in baselines from before it was kept.
    """

    _document: ClassVar[str] = "baseline"

    # The model, and how often it was initialised.
    model: str
    parameters: int
    layers: int
    width: int | None
    seeds: int
    spread: float | None = None

    # The figures.
    sublayers: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    weights: dict[str, dict[str, Any]] = field(default_factory=dict)

    # When and how they were measured.
    created: str = ""
    jacdiag: str = ""
    command: str = ""
    probe: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
