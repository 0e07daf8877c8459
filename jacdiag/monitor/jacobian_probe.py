"""The audit's Jacobian norms inside a run: on a small fixed probe, on the skeleton, never on the
wrapped module.
"""

from __future__ import annotations

import datetime
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from jacdiag._version import __version__
from jacdiag.errors import ProbeError, TraceError
from jacdiag.measure.branch_norms import Effort
from jacdiag.measure.init_or_trained import State, StateDecision, decide_state, judge_weights
from jacdiag.measure.model_summary import model_record
from jacdiag.measure.nonfinite_weights import non_finite_state
from jacdiag.measure.sublayer_norms import measure_group
from jacdiag.monitor.forward_statistics import ForwardFigures, StableRanks, forward_figures
from jacdiag.monitor.probe_memory import available, needed
from jacdiag.monitor.sharded_weights import Blocks
from jacdiag.monitor.warm_start import Memory, WarmSolver
from jacdiag.records import Cost, Report, SublayerRecord
from jacdiag.rules import evaluate
from jacdiag.rules.thresholds import Thresholds
from jacdiag.sources import Probe, Source, build_probe
from jacdiag.trace import Sites, Sublayer, sites
from jacdiag.trace.discovery.declarations import nothing_found
from jacdiag.trace.execution.wrappers import gathered

# per solved norm: a fixed price, and an interval of 3 to 10% (measured on GPT-2's shape)
PRODUCTS = 16
CONFIDENCE = 0.999


@dataclass
class Price:
    """Seconds that a tier takes, as foretold or as measured, and the memory that it needs at its
    peak.
    """

    seconds: float
    peak: int = 0


@dataclass
class LiveProbe:
    """What is measured on the probe, and what is remembered between two probes.

    Args:
        model: the guest; only its skeleton is run.
        thresholds: of the rules JD1xx.
        inputs: the user's own probe, or None.
        seed: of the random starts.
        blocks: the weights, where a rank holds only pieces of them.
    """

    model: nn.Module
    thresholds: Thresholds
    inputs: Any = None
    seed: int = 0
    memory: Memory = field(default_factory=Memory)
    ranks: StableRanks = field(default_factory=StableRanks)
    probe: Probe | None = None
    report: Report | None = None
    blocks: Blocks | None = None
    decision: StateDecision | None = None

    def choose(
        self, first: tuple[tuple[Any, ...], dict[str, Any]] | None, sharded: bool = False
    ) -> None:
        """Settles on the probe: the user's own, else the first sequences of the stream, else random
        tokens.

        Random tokens need a look at the embedding, and are not to be had where that lies in pieces.

        Raises:
            ProbeError: none of them can be had.
        """
        if self.probe is not None:
            return
        if self.inputs is not None:
            self.probe = Probe.of_inputs(self.inputs, seed=self.seed)
        elif first is not None:
            args, kwargs = first
            made = Probe.of_inputs(args if args else kwargs, seed=self.seed)
            self.probe = replace(
                made, args=args, kwargs=kwargs, record=replace(made.record, tokens="stream")
            )
        elif sharded:
            raise ProbeError(
                "no batch was seen and no probe was given",
                hint="jacdiag.watch(..., probe=input_ids)",
            )
        else:
            try:
                made = build_probe(Source.of_module(self.model), batch=2, seed=self.seed)
            except ProbeError as error:
                raise ProbeError(
                    "no batch was seen and no probe was given",
                    got=error.what,
                    hint="jacdiag.watch(..., probe=input_ids)",
                ) from error
            self.probe = made.to(
                next((p.device for p in self.model.parameters()), torch.device("cpu"))
            )

    def sites(self) -> Sites:
        """Records the model on the probe as it is now."""
        assert self.probe is not None
        blocks = self.blocks
        with gathered(blocks.outlines if blocks is not None else {}):
            try:
                found = sites(self.model, *self.probe.args, weights=blocks, **self.probe.kwargs)
            except TraceError as error:
                if not self.probe.record.is_random:
                    raise
                what = "no batch was seen, and a run on random tokens failed: pass probe=input_ids"
                raise ProbeError(what, got=str(error)) from error
        if not found:
            raise nothing_found(found)
        return found

    def statistics(self, found: Sites) -> ForwardFigures:
        return forward_figures(found)

    # -- norms -------------------------------------------------------------------------------------
    def price(self, found: Sites, tracing: float) -> Price:
        """Foretells a probe: one sub-layer of each kind is measured twice, cold and warm, and
        counts for its like.
        """
        groups = found.by_shortcut()
        like = Counter(_alike(members) for members in groups)
        seconds = tracing
        state = self.state_of(found)
        for kind, count in like.items():
            members = next(m for m in reversed(groups) if _alike(m) == kind)
            for _ in range(2):
                begun = time.perf_counter()
                self._measured(members, state)
                once = time.perf_counter() - begun
            seconds += count * once
        return Price(seconds, self.peak(found))

    def peak(self, found: Sites) -> int:
        """Bytes that a probe needs, from above."""
        return needed(found, self.blocks.peak if self.blocks is not None else 0)

    def fits(self, found: Sites) -> str:
        """Why the probe's peak does not fit into the memory that is free; "" if it does."""
        peak, free = self.peak(found), available(found[0].shortcut.device)
        if free is None or peak <= 0.9 * free:
            return ""
        return f"the probe needs about {peak / 2**20:,.0f} MB and {free / 2**20:,.0f} MB are free"

    def measure(self, found: Sites, step: int, begun: float) -> Report:
        """Measures every sub-layer and judges the model by the rules JD1xx."""
        if not found.deterministic:
            raise TraceError("two runs of the model on the probe differ", got=found.culprit)
        state = self.state_of(found)
        records: list[SublayerRecord] = []
        for members in found.by_shortcut():
            records += self._measured(members, state)
        records.sort(key=lambda record: record.index)
        report = self._report(found, records, state, step, begun)
        self.report = evaluate(report, thresholds=self.thresholds)
        return self.report

    def series(self, found: Sites, report: Report) -> dict[str, dict[str, float]]:
        """What the drift rules look at: figure -> sub-layer -> value."""
        rows = report.sublayers
        return {
            "branch_norm": {r.name: r.branch_norm.estimate for r in rows if r.branch_norm},
            "core_norm": {r.name: r.core_norm.estimate for r in rows if r.core_norm},
            "shortcut_std": {r.name: r.shortcut_std.median for r in rows if r.shortcut_std},
            "stable_rank": self.ranks.look(found),
        }

    def state_of(self, found: Sites) -> State:
        """Return the state that the weights show; a model that was trained once stays so."""
        if self.decision is None or self.decision.state == "init":
            skeleton = found.skeleton
            self.decision = decide_state(
                None, None, lambda: judge_weights(skeleton.params, skeleton.outlines)
            )
        return self.decision.state

    def _measured(self, members: list[Sublayer], state: State) -> list[SublayerRecord]:
        assert self.probe is not None
        solver = partial(WarmSolver, memory=self.memory)
        effort = Effort(0.0, CONFIDENCE, PRODUCTS, self.seed, _to_budget, early=True, solver=solver)
        return measure_group(members, effort, self.probe.token_ids, state, lambda _name: None)

    def _report(
        self, found: Sites, records: list[SublayerRecord], state: Any, step: int, begun: float
    ) -> Report:
        assert self.probe is not None and self.decision is not None
        off = state == "trained" and self.probe.record.is_random
        checks = {"deterministic": found.deterministic, "non_finite": non_finite_state(found).names}
        return Report(
            source={"format": "live", "step": step},
            tier="measured",
            state=state,
            state_reason=self.decision.reason,
            state_basis=self.decision.basis,
            probe=replace(self.probe.record, off_distribution=off),
            model=model_record(self.model, found),
            sublayers=records,
            cost=Cost(sum(r.cost or 0.0 for r in records), None, time.perf_counter() - begun),
            settings={
                "confidence": CONFIDENCE,
                "seed": self.seed,
                "max_products": PRODUCTS,
                "checks": checks,
            },
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            torch=torch.__version__,
            jacdiag=__version__,
        )

    def close(self) -> None:
        """Lets go of the model and of what was remembered; the probe stays."""
        self.memory.vectors.clear()
        self.ranks.tops.clear()
        self.blocks = None
        del self.model


def _to_budget(site: Sublayer) -> Mapping[str, Callable[[float, float], bool]]:
    """The core is solved to its whole budget; what follows from it is taken. Where nothing follows,
    the branch is.
    """
    norm = site.input_norm
    follows = (
        norm is not None
        and norm.closed_form
        and norm.aligned
        and norm.value.shape == site.shortcut.shape
    )

    def always(_lower: float, _upper: float) -> bool:
        return True

    def never(_lower: float, _upper: float) -> bool:
        return False

    return {
        "core_norm": never,
        "branch_norm": always if follows else never,
        "residual_norm": always,
    }


def _alike(members: list[Sublayer]) -> tuple[Any, ...]:
    return tuple((s.kind, s.placement, tuple(s.shortcut.shape), len(s.parameters)) for s in members)
