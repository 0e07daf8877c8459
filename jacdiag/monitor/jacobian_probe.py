"""The audit's Jacobian norms inside a run, on a small fixed probe.

They are measured on the skeleton of the model, never on the wrapped module.
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
from jacdiag.monitor.sharded_weights import GatheredWeights
from jacdiag.monitor.warm_start import TopVectors, WarmSolver
from jacdiag.records import Cost, Report, SublayerRecord
from jacdiag.rules import evaluate
from jacdiag.rules.thresholds import Thresholds
from jacdiag.sources import Probe, Source, build_probe
from jacdiag.trace import Sites, Sublayer, sites
from jacdiag.trace.discovery.nothing_found import nothing_found
from jacdiag.trace.execution.wrappers import gathered

# per solved norm: a fixed price, and an interval of 3 to 10% (measured on GPT-2's shape)
PRODUCTS = 16
CONFIDENCE = 0.999


@dataclass
class Price:
    """What a probe costs, as predicted or as measured.

    Attributes:
        seconds: of one probe.
        peak: bytes of memory at its peak.
    """

    seconds: float
    peak: int = 0


@dataclass
class LiveProbe:
    """What is measured on the probe, and what is kept from one probe to the next.

    Args:
        model: the watched model; only its skeleton is run.
        thresholds: of the rules JD1xx.
        inputs: the user's own probe, or None.
        seed: of the random starts.
        blocks: the weights, if a rank holds only pieces of them.
    """

    model: nn.Module
    thresholds: Thresholds
    inputs: Any = None
    seed: int = 0
    memory: TopVectors = field(default_factory=TopVectors)
    ranks: StableRanks = field(default_factory=StableRanks)
    probe: Probe | None = None
    report: Report | None = None
    blocks: GatheredWeights | None = None
    decision: StateDecision | None = None

    def choose(
        self, first: tuple[tuple[Any, ...], dict[str, Any]] | None, sharded: bool = False
    ) -> None:
        """Choose the probe: the user's own, the first sequences of the stream, or random tokens.

        Random tokens need a look at the embedding, which is not possible if that is sharded.

        Args:
            first: the first batch, as arguments and keyword arguments; None if none was seen.
            sharded: whether the weights are.

        Raises:
            ProbeError: there is none.
        """
        if self.probe is not None:
            return
        # 1. The user's own, or the first batch of the run.
        if self.inputs is not None:
            self.probe = Probe.of_inputs(self.inputs, seed=self.seed)
        elif first is not None:
            args, kwargs = first
            of_batch = Probe.of_inputs(args or kwargs, seed=self.seed)
            self.probe = replace(
                of_batch,
                args=args,
                kwargs=kwargs,
                record=replace(of_batch.record, tokens="stream"),
            )
        elif sharded:
            raise ProbeError(
                "no batch was seen and no probe was given",
                hint="jacdiag.watch(..., probe=input_ids)",
            )

        # 2. Random tokens.
        else:
            try:
                random_tokens = build_probe(Source.of_module(self.model), batch=2, seed=self.seed)
            except ProbeError as error:
                raise ProbeError(
                    "no batch was seen and no probe was given",
                    got=error.what,
                    hint="jacdiag.watch(..., probe=input_ids)",
                ) from error
            device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
            self.probe = random_tokens.to(device)

    def sites(self) -> Sites:
        """Record the model on the probe as it is now.

        Raises:
            TraceError: the model cannot be recorded, or no sub-layer was found.
            ProbeError: a run on random tokens has failed.
        """
        assert self.probe is not None
        blocks = self.blocks
        with gathered(blocks.outlines if blocks is not None else {}):
            try:
                sublayers = sites(self.model, *self.probe.args, weights=blocks, **self.probe.kwargs)
            except TraceError as error:
                if not self.probe.record.is_random:
                    raise
                what = "no batch was seen, and a run on random tokens failed: pass probe=input_ids"
                raise ProbeError(what, got=str(error)) from error
        if not sublayers:
            raise nothing_found(sublayers)
        return sublayers

    def statistics(self, found: Sites) -> ForwardFigures:
        """Measure what the forward on the probe shows."""
        return forward_figures(found)

    # -- norms -------------------------------------------------------------------------------------
    def price(self, found: Sites, tracing: float) -> Price:
        """Predict the cost of a probe.

        One sub-layer of each kind is measured twice, without and with vectors of an earlier probe.
        The second time counts for all of its kind.

        Args:
            found: the sub-layers.
            tracing: seconds that finding them took.
        """
        groups = found.by_shortcut()
        kinds = Counter(map(_kind_of, groups))
        seconds = tracing
        state = self.state_of(found)

        for kind, count in kinds.items():
            # 1. The last sub-layer of the kind stands for all of them.
            members = next(m for m in reversed(groups) if _kind_of(m) == kind)

            # 2. Measure it without and then with vectors. The second time counts.
            for _ in range(2):
                started = time.perf_counter()
                self._measured(members, state)
                group_seconds = time.perf_counter() - started
            seconds += count * group_seconds
        return Price(seconds, self.peak(found))

    def peak(self, found: Sites) -> int:
        """Return an upper bound of the bytes that a probe needs."""
        gathered = 0
        if self.blocks is not None:
            gathered = self.blocks.peak
        return needed(found, gathered)

    def fits(self, found: Sites) -> str:
        """Return why the probe does not fit into the free memory; "" if it does."""
        peak = self.peak(found)
        free = available(found[0].shortcut.device)
        # Not every device says what is free.
        if free is None:
            return ""
        if peak <= 0.9 * free:
            return ""
        return f"the probe needs about {peak / 2**20:,.0f} MB and {free / 2**20:,.0f} MB are free"

    def measure(self, found: Sites, step: int, begun: float) -> Report:
        """Measure every sub-layer and apply the rules JD1xx.

        Args:
            found: the sub-layers.
            step: the number of the step.
            begun: when the probe began, of `time.perf_counter`.

        Raises:
            TraceError: two runs of the model on the probe differ.
        """
        if not found.deterministic:
            raise TraceError("two runs of the model on the probe differ", got=found.culprit)
        # 1. Measure sub-layers that share a shortcut together, and put them in their order.
        state = self.state_of(found)
        records: list[SublayerRecord] = []
        for members in found.by_shortcut():
            records += self._measured(members, state)
        records.sort(key=lambda record: record.index)

        # 2. Apply the rules.
        report = self._report(found, records, state, step, begun)
        self.report = evaluate(report, thresholds=self.thresholds)
        return self.report

    def series(self, found: Sites, report: Report) -> dict[str, dict[str, float]]:
        """Return what the drift rules use: figure -> sub-layer -> value."""
        branch_norms: dict[str, float] = {}
        core_norms: dict[str, float] = {}
        shortcut_stds: dict[str, float] = {}
        for record in report.sublayers:
            # A norm that could not be measured has no point in its trend.
            if record.branch_norm:
                branch_norms[record.name] = record.branch_norm.estimate
            if record.core_norm:
                core_norms[record.name] = record.core_norm.estimate
            if record.shortcut_std:
                shortcut_stds[record.name] = record.shortcut_std.median
        return {
            "branch_norm": branch_norms,
            "core_norm": core_norms,
            "shortcut_std": shortcut_stds,
            "stable_rank": self.ranks.look(found),
        }

    def state_of(self, found: Sites) -> State:
        """Return the state that the weights show; a model that was trained once stays so."""
        if self.decision is not None and self.decision.state != "init":
            return self.decision.state

        # Nothing is declared, so that the weights alone decide.
        skeleton = found.skeleton
        self.decision = decide_state(
            None, None, lambda: judge_weights(skeleton.params, skeleton.outlines)
        )
        return self.decision.state

    def _measured(self, members: list[Sublayer], state: State) -> list[SublayerRecord]:
        assert self.probe is not None
        solver = partial(WarmSolver, memory=self.memory)
        effort = Effort(0.0, CONFIDENCE, PRODUCTS, self.seed, _to_budget, early=True, solver=solver)
        return measure_group(members, effort, self.probe.token_ids, state, lambda _names: {})

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
        """Let go of the model and of what was kept between probes; the probe stays."""
        self.memory.vectors.clear()
        self.ranks.tops.clear()
        self.blocks = None
        del self.model


def _to_budget(site: Sublayer) -> Mapping[str, Callable[[float, float], bool]]:
    """Return for each norm when its solver may stop.

    The core norm takes the full budget, and so does the branch norm if it does not follow from it.
    """
    # 1. The branch norm follows if the norm layer is known in closed form.
    norm = site.input_norm
    follows = False
    if norm is not None and norm.closed_form and norm.aligned:
        follows = norm.value.shape == site.shortcut.shape

    # 2. When each may stop.
    def always(_lower: float, _upper: float) -> bool:
        return True

    def never(_lower: float, _upper: float) -> bool:
        return False

    return {
        "core_norm": never,
        "branch_norm": always if follows else never,
        "residual_norm": always,
    }


def _kind_of(members: list[Sublayer]) -> tuple[Any, ...]:
    """Return what sub-layers have in common that take the same time."""
    return tuple((s.kind, s.placement, tuple(s.shortcut.shape), len(s.parameters)) for s in members)
