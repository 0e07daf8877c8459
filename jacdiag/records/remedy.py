"""A change to a model that was tried on a copy: what it is, what it did and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field

from jacdiag.records.base import Record
from jacdiag.records.judged_sublayers import JudgedSublayers


@dataclass(frozen=True)
class Outlook(Record):
    """The figures that a remedy is judged by, each the worst over all sub-layers.

    Attributes:
        branch_norm, core_norm: [lower, upper] of the sub-layer with the largest upper end; None
            where not measured.
        norm_gain: 1 / sigma_x, the 99th percentile over tokens.
        small_sublayers, large_shortcut: the two conditions.
        small_sublayers_judged, large_shortcut_judged: at how many sub-layers each was judged; None
            if its rule was not run.
        verdict: of the report that the figures come from.
        fired: codes of the rules that found something at warning or above.
        undecided: codes of the rules that stayed unknown.
    """

    # Figures.
    branch_norm: list[float] | None = None
    core_norm: list[float] | None = None
    norm_gain: float | None = None
    small_sublayers: str = "unknown"
    large_shortcut: str = "unknown"

    # What the rules say of them.
    verdict: str = "unknown"
    fired: list[str] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)

    # Where the two conditions were judged.
    small_sublayers_judged: JudgedSublayers | None = None
    large_shortcut_judged: JudgedSublayers | None = None


@dataclass(frozen=True)
class RemedyRecord(Record):
    """One remedy, as it was tried.

    Attributes:
        name: short, such as "scaled-embed" or "scaled-embed + depth-scaling".
        title: what is done, in words.
        codes: the rules whose findings it was tried against.
        price: what it costs: parameters, operations, whether a run that has begun can take it.
        before, after: figures of the model as it was, and of the changed copy.
        sufficient: no warning or error of what it was tried against is left and none is new, on
            every seed of `seeds`. Infos may remain.
        recommended: the smallest sufficient one.
        keeps_function: meant to leave the function as it is; `function_change` is the largest
            relative difference of the outputs that was measured, None where it is not meant to.
        seeds: initialisations that it was tried on.
        sequences: of the probe that `after` was measured on; None if it has none, and in older
            reports.
        patches: "pytorch", "huggingface", "megatron", "torchtitan" -> text.
    """

    # What is changed.
    name: str
    title: str
    codes: list[str]
    price: str

    # What it did.
    before: Outlook
    after: Outlook
    sufficient: bool = False
    recommended: bool = False
    keeps_function: bool = False
    function_change: float | None = None
    seeds: list[int] = field(default_factory=list)
    sequences: int | None = None

    # How it is written.
    patches: dict[str, str] = field(default_factory=dict)
