"""What an audit is asked to do, checked and complete."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol

import torch

from jacdiag.comparison.seed_spread import figures_of
from jacdiag.distributed import Ranks
from jacdiag.records import AgainstRecord, FiguresRecord, Plan, Report
from jacdiag.rules import evaluate
from jacdiag.rules.thresholds import Thresholds
from jacdiag.sources import Source
from jacdiag.trace import Declaration


class Progress(Protocol):
    """What a long audit tells about itself; the command line draws it."""

    def start(self, total: float, text: str) -> None: ...
    def advance(self, units: float, text: str) -> None: ...
    def stop(self) -> None: ...


@dataclass(frozen=True)
class Request:
    source: Source
    inputs: Any
    tokens: str | None
    input_factory: Any
    batch: int
    seq: int | None
    seed: int
    device: str | None
    dtype: torch.dtype
    tol: float
    confidence: float
    decide: bool
    state: Literal["init", "trained"] | None
    plan: Plan
    profile: str
    select: tuple[str, ...]
    ignore: tuple[str, ...]
    thresholds: Thresholds
    max_products: int
    declared: tuple[Declaration, ...]
    progress: Progress | None
    ranks: Ranks
    contract: dict[str, str]
    optimizer: Any
    products: bool
    remedies: str = "none"
    baseline: FiguresRecord | None = None
    trust_code: bool = False  # of a tokenizer
    confidence_all: float | None = None
    probes: int = 1
    against: AgainstRecord | None = None
    replay: str | None = None  # a folder of a flight recorder

    def split_level(self) -> tuple[float, float]:
        """Return the family-wise level of this model's own intervals, and that of the intervals of
        all remedies.

        The chance of a miss is shared equally between the two. Without remedies the model has all
        of it.
        """
        assert self.confidence_all is not None
        if self.remedies == "none":
            return self.confidence_all, 1.0
        half = (1.0 + self.confidence_all) / 2
        return half, half

    def options(self) -> dict[str, Any]:
        """What must be the same on every rank, beside the model and the probe."""
        its_own = (
            "source",
            "inputs",
            "tokens",
            "input_factory",
            "device",
            "progress",
            "ranks",
            "optimizer",
            "remedies",
            "baseline",
            "against",
            "replay",
        )
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in its_own}

    def judged(self, report: Report) -> Report:
        """The report with the verdict of the rules; beside the baseline, if there is one."""
        if self.baseline is not None:
            figures = figures_of([report], self.thresholds.limits("regression").warning or 0.0)
            report = replace(report, figures=figures, baseline=self.baseline, against=self.against)
        return evaluate(
            report,
            thresholds=self.thresholds,
            profile=self.profile,
            select=self.select,
            ignore=self.ignore,
        )
