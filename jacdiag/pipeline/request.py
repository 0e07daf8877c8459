"""What an audit works on: its options, the opened model, and what they were resolved to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from jacdiag.comparison.seed_spread import figures_of
from jacdiag.distributed import Ranks
from jacdiag.measure.branch_norms import NORMS
from jacdiag.pipeline.options import AuditOptions
from jacdiag.records import AgainstRecord, FiguresRecord, Report
from jacdiag.rules import evaluate
from jacdiag.rules.thresholds import Thresholds
from jacdiag.sources import Source


@dataclass(frozen=True, kw_only=True)
class Scope:
    """What an audit measures and checks.

    Attributes:
        hooks: record the model with its hooks. Else they are recorded only if they change what it
            computes, which takes a run of the model itself.
        replay: check that parts of the model that are run alone give what the model gives.
        network: the gradient at every depth, dead paths and the end-to-end norm.
        contract: how every weight was drawn, and the paper's bounds, which are made of that.
        norms: fields of the norms of a sub-layer. That of the branch is always measured.
    """

    hooks: bool = False
    replay: bool = True
    network: bool = True
    contract: bool = True
    norms: frozenset[str] = NORMS


@dataclass(frozen=True, kw_only=True)
class Request:
    """One audit to run.

    Attributes:
        source: the model, opened.
        options: of the audit; `device` is that of this rank.
        thresholds: the options' thresholds and risk curves, read.
        ranks: the processes that share the work.
        baseline: figures to compare with: those of the options, or of an earlier model.
        against: the comparison with an earlier model, once it was measured.
        scope: what is measured; less than everything for changed copies of a model.
    """

    source: Source
    options: AuditOptions
    thresholds: Thresholds
    ranks: Ranks
    baseline: FiguresRecord | None = None
    against: AgainstRecord | None = None
    scope: Scope = field(default_factory=Scope)

    def with_options(self, **changes: Any) -> Request:
        """Return this request with some options changed.

        Args:
            **changes: options by their names.
        """
        return replace(self, options=replace(self.options, **changes))

    def shared_by_ranks(self) -> dict[str, Any]:
        """Return what must be the same on every rank, apart from the model and the probe."""
        # The thresholds as they were read: a path or a partial table says less.
        shared = self.options.shared_by_ranks() | {"thresholds": self.thresholds}
        del shared["risk"]
        return shared

    def judged(self, report: Report) -> Report:
        """Return the report with the verdict of the rules, compared with the baseline if any.

        Args:
            report: as it was measured.
        """
        # 1. The figures that a baseline is compared with.
        if self.baseline is not None:
            margin = self.thresholds.limits("regression").warning or 0.0
            figures = figures_of([report], margin)
            report = replace(report, figures=figures, baseline=self.baseline, against=self.against)

        # 2. The rules.
        options = self.options
        return evaluate(
            report,
            thresholds=self.thresholds,
            profile=options.profile,
            select=options.select,
            ignore=options.ignore,
        )
