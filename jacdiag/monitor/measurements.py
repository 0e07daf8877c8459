"""The three kinds of measurement of a watch, each at its cadence, on one rank or on many.

These are the metrics of single steps, the statistics of the forward and the Jacobian probe.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jacdiag.devices.accelerators import wait_for_stream
from jacdiag.devices.float32_precision import full_precision
from jacdiag.distributed.training_group import Together
from jacdiag.errors import TraceError
from jacdiag.monitor.batches import Batches
from jacdiag.monitor.blind_spots import ProbeState
from jacdiag.monitor.forward_statistics import ForwardFigures
from jacdiag.monitor.fresh_init import has_stepped, judge_init
from jacdiag.monitor.jacobian_probe import LiveProbe, Price
from jacdiag.monitor.log.events import RunEvents
from jacdiag.monitor.log.sinks import slashed_series
from jacdiag.monitor.model_contents import ModelContents
from jacdiag.monitor.optimizers import group_names, local, names_of, parameters_of
from jacdiag.monitor.parameter_groups import (
    SublayerGroups,
    by_names,
    by_sites,
    group_parameters,
    sort_labels,
)
from jacdiag.monitor.schedule import Cadence, Clock
from jacdiag.monitor.sharded_weights import GatheredWeights, is_shard
from jacdiag.monitor.square_sums import find_nonfinite
from jacdiag.monitor.step_metrics import (
    FIRST,
    GIVEN_PART,
    WRITTEN,
    DeviceWait,
    StepMetrics,
    StepRow,
)
from jacdiag.monitor.step_rows import NonfiniteNames, build_step_row
from jacdiag.monitor.weight_writes import NOTED, WeightWrites
from jacdiag.records import Finding, Report
from jacdiag.records.number_format import of_step_time
from jacdiag.records.run_log import Alert
from jacdiag.rules.thresholds import Thresholds
from jacdiag.trace import Sites
from jacdiag.trace.execution.wrappers import has_foreign_hooks

_NO_PROBE = "no Jacobian norms and no statistics from now on"
_OPEN = 10**6 + 2  # the place at which ranks begin a probe
_MAY_BE_TRAINED = (
    ". That is said of a model that was never trained; the optimizer keeps no state, and does not "
    "show whether it was"
)
_NO_INIT = "how the weights were drawn is not judged"
_NO_FIGURES = "no figures of single steps from now on"
_LEAST_STEPS = 5  # whose time is known before the probe's share of the time is announced


@dataclass(frozen=True, kw_only=True)
class DueMeasurements:
    """What is due after a step.

    Attributes:
        probe: the Jacobian probe.
        statistics: those of the forward on the probe.
    """

    probe: bool
    statistics: bool


class Measurements:
    """What a watch measures, and when.

    Args:
        model: the watched model.
        optimizers: those that update its parameters.
        names: id of a parameter -> its name.
        together: the ranks.
        record: the log of the run.
        probe: the user's own input for the probe; None for the first batch.
        thresholds: of the rules.
        probe_cadence: of the Jacobian probe.
        statistics_cadence: of the statistics.

    Attributes:
        metrics: the buffer of single steps; None before the first optimizer step.
        price: of a probe, as announced before the first one and as measured after the last.
        looks: how often the host waited for the device.
        findings: those of the last probe's report.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[Any],
        names: dict[int, str],
        together: Together,
        record: RunEvents,
        *,
        probe: Any,
        thresholds: Thresholds,
        probe_cadence: Cadence,
        statistics_cadence: Cadence,
    ) -> None:
        self.model = model
        self.optimisers = optimizers
        self.names = names
        self.together = together
        self.record = record
        self.guards = record.guards
        self.probe_cadence = probe_cadence
        self.statistics_cadence = statistics_cadence
        self.live = LiveProbe(model, thresholds, probe)
        self.batches: Batches | None = None
        self.metrics: StepMetrics | None = None
        self.writes: WeightWrites | None = None
        # samples of the weights in a checkpoint, and its step
        self.saved_weights: tuple[dict[str, Tensor], int] | None = None
        self.price: Price | None = None
        self.statistics_seconds = 0.0
        self.looks = 0
        self.findings: list[Finding] = []
        self._last_fired: set[str] = set()  # code and level of what the last report has found
        self._reported: set[str] = set()  # the same of findings that are no alerts, each said once
        self._is_first_report = True
        self._has_judged_init = False
        self._init_findings: list[Finding] = []  # until the first step has a number
        self._has_announced_share = False
        self._contents = ModelContents(model)

    # -- the first step ----------------------------------------------------------------------------
    def prepared(self, step: int, capacity: int) -> StepMetrics:
        """Return the buffer; the first call finds the sub-layers and runs the first probe.

        The first call comes before the first update. The weights are still the initial ones then,
        and a batch has been seen.

        Args:
            step: the number of the last step.
            capacity: steps between two looks at the device.
        """
        if self.metrics is None:
            self.metrics = StepMetrics(self._find_groups(step), capacity)
        return self.metrics

    def _find_groups(self, step: int) -> SublayerGroups:
        """Group the parameters by sub-layer, write the log's header and run the first probe."""
        # 1. Group by the sub-layers that are found, and by module names where none is.
        group_of = by_names(list(self.names.values()))
        order: list[str] = []
        sites, seconds = self._trace()
        if sites is not None:
            group_of |= by_sites(sites)
            order = [site.name for site in sites]
        if self.together.sharded:
            group_of, order = self.together.share((group_of, order))

        # 2. Write the header of the log.
        self.record.begin(self._header(group_of, order))

        # 3. Run the first probe.
        if sites is not None:
            self._announce_price(sites, seconds)
            self._measure(sites, step, seconds, probe=not self.probe_cadence.never)
        self.live.blocks = None

        world = self.together.size if self.together.sharded else 1
        parameters = parameters_of(self.optimisers)
        return group_parameters(parameters, self.names, group_of, order, world)

    def _header(self, group_of: Mapping[str, str], order: Sequence[str]) -> dict[str, Any]:
        return {
            "model": type(self.model).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "ranks": self.together.size,
            "sharded": self.together.sharded,
            "every": self.probe_cadence.steps or self.probe_cadence.budget,
            "stats_every": self.statistics_cadence.steps or self.statistics_cadence.budget,
            "groups": self._labels_in_use(group_of, order),
            "lr_groups": group_names(self.optimisers),
        }

    def _labels_in_use(self, group_of: Mapping[str, str], order: Sequence[str]) -> list[str]:
        """Return the groups of what the optimizers hold, those in `order` first."""
        used: set[str] = set()
        for parameter in parameters_of(self.optimisers):
            name = self.names.get(id(parameter))
            if name is not None:
                used.add(group_of.get(name, ""))
        return sort_labels(used, order)

    def _announce_price(self, sites: Sites, tracing: float) -> None:
        """Announce what the statistics and the probe cost.

        Args:
            sites: the sub-layers.
            tracing: seconds that finding them took.
        """
        with self.guards.part("probe", _NO_PROBE):
            assert self.live.probe is not None
            self.statistics_seconds = tracing
            row: dict[str, Any] = {"statistics_seconds": tracing, "sub_layers": len(sites)}
            noun = "sub-layer" if len(sites) == 1 else "sub-layers"
            text = (
                f"{len(sites)} {noun}; per step a pass over the gradients; statistics "
                f"about {tracing:.2g} s {_cadence_text(self.statistics_cadence)}"
            )
            if not self.probe_cadence.never:
                # The first step may run under autocast, and the probe never does.
                with self._undisturbed(), self.together.in_step():
                    fits = self.together.fits(not self.live.fits(sites))
                    self.price = self.live.price(sites, tracing) if fits else None
                if self.price is None:
                    return  # said when the probe is due
                tokens = self.live.probe.record
                row["probe_seconds"] = self.price.seconds
                row["probe_peak_bytes"] = self.price.peak
                text += (
                    f"; Jacobian probe on {tokens.batch} x {tokens.seq or 1} about "
                    f"{self.price.seconds:.2g} s and {self.price.peak / 2**20:,.0f} MB "
                    f"{_cadence_text(self.probe_cadence)}"
                )
            if self.together.lead:
                self.record.announce(text, row)

    # -- metrics of single steps -------------------------------------------------------------------
    def flush(self, clock: Clock) -> None:
        """Read the buffer and write its steps to the log.

        Sums of squares are summed over ranks if weights are sharded.
        """
        with self.guards.part("figures", _NO_FIGURES):
            # 1. Whether there is something to read. Ranks that hold shards have to agree.
            if self.together.sharded and not self._all_ranks_have_metrics():
                return
            if self.metrics is None or not self.guards.on("figures"):
                return

            # 2. Read it.
            if self.together.lead:
                self.record.begin_fingerprints(self.metrics.slot)
            if self.writes is not None:
                self.writes.settle(self.metrics)
            rows, table = self.metrics.read()
            self._share_wait(self.metrics.last_wait, clock)
            self.looks = self.metrics.looks
            if self.together.sharded:
                table = self._sum_over_ranks(table)

            # 3. Write it to the log, and say what else can be said by now.
            nonfinite = self._name_nonfinite(self.metrics, rows, table)
            if rows and self.together.lead:
                self._write_steps(self.metrics, rows, table, nonfinite)
            self._announce_share(clock)
            self._check_model()

    def _share_wait(self, wait: DeviceWait, clock: Clock) -> None:
        """Count a wait for the training as time of the steps that were waited for."""
        clock.share_wait(wait.seconds, wait.steps)

    def wait_before_first(self) -> None:
        """Wait for the device before the first measurements, so that they are timed alone."""
        if self.metrics is not None or not self.guards.on("figures"):
            return
        with self.guards.part("figures", _NO_FIGURES):
            wait_for_stream(local(next(self.model.parameters())).device)

    def _sum_over_ranks(self, table: Tensor) -> Tensor:
        """Sum the squares of all ranks; `found_inf` is the same on each of them."""
        totals = self.together.total(table[:, GIVEN_PART:])
        totals[:, 1] = table[:, GIVEN_PART + 1]
        return torch.cat([table[:, :GIVEN_PART], totals], dim=1)

    def _write_steps(
        self,
        metrics: StepMetrics,
        rows: Sequence[StepRow],
        table: Tensor,
        nonfinite: Mapping[int, NonfiniteNames],
    ) -> None:
        labels = metrics.groups.labels
        values = table.tolist()
        written = self._describe_writes(table)
        lines = [
            build_step_row(row, values[k], labels, nonfinite.get(k), written.get(k))
            for k, row in enumerate(rows)
        ]
        self.record.steps(lines)

    def _describe_writes(self, table: Tensor) -> dict[int, dict[str, Any]]:
        """Return what was written outside the optimizer, by the row before whose step it was."""
        if self.writes is None:
            return {}
        places = (table[:, WRITTEN] >= NOTED).nonzero().flatten().tolist()
        return {place: self.writes.describe(place) for place in places}

    def _name_nonfinite(
        self, metrics: StepMetrics, rows: list[StepRow], table: Tensor
    ) -> dict[int, NonfiniteNames]:
        """Name what is not finite in each row that has a gradient that is not finite.

        Weights that no optimizer holds are looked at now: nothing has changed them since.

        Returns:
            Place of the row -> the names.
        """
        # 1. The rows that have such a gradient.
        if not rows:
            return {}
        is_broken = table[:, FIRST:].isfinite().all(dim=1).logical_not()
        is_broken &= torch.tensor([row.has_gradients for row in rows], dtype=torch.bool)
        if not bool(is_broken.any()):
            return {}

        # 2. The parameters that an optimizer holds, as they were before its step.
        gradient_flags, weight_flags = metrics.nonfinite()
        gradients = self.together.total(gradient_flags.float()) > 0
        weights = self.together.total(weight_flags.float()) > 0
        held = [member.name for member in metrics.groups.members]

        # 3. All other parameters.
        frozen = self._name_nonfinite_frozen(metrics)

        # 4. The names of each row.
        names: dict[int, NonfiniteNames] = {}
        for place in is_broken.nonzero().flatten().tolist():
            weight_names: list[str] | None = None
            if rows[place].weights_seen:
                weight_names = frozen + _select(held, weights[place])
            names[place] = NonfiniteNames(_select(held, gradients[place]), weight_names)
        return names

    def _name_nonfinite_frozen(self, metrics: StepMetrics) -> list[str]:
        """Name the parameters that no optimizer holds and that are not finite now."""
        # 1. What no optimizer holds.
        held_ids = {id(member.parameter) for member in metrics.groups.members}
        names: list[str] = []
        weights: list[Tensor] = []
        for parameter in self.model.parameters():
            if id(parameter) not in held_ids:
                names.append(self.names[id(parameter)])
                weights.append(local(parameter.detach()))

        # 2. Whether it is finite on all ranks.
        flags = torch.zeros(0)
        if weights:
            flags = find_nonfinite(weights, torch.device("cpu"))
        return _select(names, self.together.total(flags.float()) > 0)

    def _all_ranks_have_metrics(self) -> bool:
        """Return whether the metrics work; raise if they do on this rank and not on another."""
        is_working = self.guards.on("figures") and self.metrics is not None
        if self.together.broken:
            raise RuntimeError(self.together.broken)

        # Every rank takes part in this, also one on which the metrics have failed.
        all_work = self.together.agree(is_working)
        if is_working and not all_work:
            raise RuntimeError("they failed on another rank")
        return is_working

    def _announce_share(self, clock: Clock) -> None:
        """Announce the probe's price in steps, once the time of a training step is known."""
        step_seconds = clock.step_seconds
        if self._has_announced_share or step_seconds is None or self.price is None:
            return
        if len(clock.steps) < _LEAST_STEPS:
            return
        self._has_announced_share = True
        if not self.together.lead:
            return
        steps_between = self.probe_cadence.interval(self.price.seconds, step_seconds)
        share = self.price.seconds / (steps_between * step_seconds)
        row = {"step_seconds": step_seconds, "probe_share": share}
        text = f"the probe takes {of_step_time(share)}, at {step_seconds:.3g} s a step"
        # The run takes the steps and the probes, so that a share of it is below 100%.
        if share >= 1:
            text += (
                f", which is {share / (1 + share):.0%} of the run; every='200, 1%' keeps it at 1%"
            )
        self.record.announce(text, row)

    def _check_model(self) -> None:
        """Group the parameters again, with a warning, if the model has other ones than before."""
        # 1. Compare the parameters with those of before.
        if not self._contents.have_changed():
            return
        if {id(p) for p in self.model.parameters()} == self.names.keys():
            return
        names = names_of(self.model)
        # A wrapper may have parameters of its own.
        if names.keys() == self.names.keys():
            return

        # 2. Group them again.
        self.record.warn(
            "model",
            "the model's parameters changed after watch was attached: they are grouped again",
        )
        self.names = names
        capacity = self.metrics.capacity if self.metrics is not None else 1
        self.metrics = None
        self.prepared(-1, capacity)

    def set_optimizers(self, optimizers: list[Any], step: int) -> None:
        """Group the parameters of other optimizers from now on."""
        self.optimisers = optimizers
        if self.metrics is not None:
            capacity = self.metrics.capacity
            self.metrics = None
            self.prepared(step, capacity)

    # -- statistics and probe ----------------------------------------------------------------------
    def run(self, step: int, clock: Clock) -> None:
        """Measure what is due after a step.

        Args:
            step: its number.
            clock: of the run; charged with the seconds that this takes.
        """
        # 1. What waited for the number of the first step, then whether anything is due.
        if self._init_findings:
            self._report_init(step)
        if self.metrics is None:
            return
        # A rank on which the probe has failed goes on to take part where all ranks have to.
        if not self.guards.on("probe") and not self.together.sharded:
            return
        due = self._due(step, clock.usual_seconds, self.metrics.capacity)
        if not due.probe and not due.statistics:
            return

        # 2. Measure it on the model as it is now. The training's own work comes first.
        self._share_wait(self.metrics.wait(), clock)
        started = time.perf_counter()
        sites, tracing = self._trace()
        if sites is not None:
            self._measure(sites, step, tracing, probe=due.probe)
        self.live.blocks = None  # and with it the last weights
        clock.charge("probe" if due.probe else "statistics", time.perf_counter() - started)

    def _due(
        self, step: int, step_seconds: Callable[[], float | None], capacity: int
    ) -> DueMeasurements:
        """Return what is due after a step; ranks with sharded weights agree on it."""
        probe_seconds = self.price.seconds if self.price else None
        own = DueMeasurements(
            probe=self.probe_cadence.due(step, probe_seconds, step_seconds),
            statistics=self.statistics_cadence.due(step, self.statistics_seconds, step_seconds),
        )
        cadences = (self.probe_cadence, self.statistics_cadence)
        if not self.together.sharded or not any(cadence.budget for cadence in cadences):
            return own

        # With a budget each rank decides by times of its own: the leading rank decides for all.
        if not any(cadence.may_be_due(step, capacity) for cadence in cadences):
            return DueMeasurements(probe=False, statistics=False)
        with self.guards.part("probe", _NO_PROBE):
            probe, statistics = self.together.share((own.probe, own.statistics))
            return DueMeasurements(probe=probe, statistics=statistics)
        return own

    def _trace(self) -> tuple[Sites | None, float]:
        """Record the model on the probe, on all ranks or on none.

        Returns:
            The sub-layers, and the seconds that it took. None if the model cannot be recorded.
        """
        started = time.perf_counter()
        sites: Sites | None = None
        with self.guards.part("probe", _NO_PROBE):
            if self.together.sharded:
                with self.together.in_step():
                    sites_of_all = self._trace_in_step()
                sites = sites_of_all  # only after all ranks have succeeded
            elif self.guards.on("probe"):
                self.live.choose(self._first_batch())
                with self._undisturbed():
                    sites = self.live.sites()
        return sites, time.perf_counter() - started

    def _first_batch(self) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.batches is None:
            return None

        # A compiled forward has kept its arguments aside.
        if self.batches.first is None:
            self.batches.take_compiled()
        return self.batches.first

    def probe_state(self) -> ProbeState:
        """Return what the probe runs on, and whether anything is measured on it."""
        probe = self.live.probe
        never_runs = self.probe_cadence.never and self.statistics_cadence.never
        return ProbeState(
            is_random=probe is not None and probe.record.is_random,
            is_needed=self.guards.on("probe") and not never_runs,
        )

    def _trace_in_step(self) -> Sites:
        """Record the sharded model on the leading rank's probe, with all ranks in step.

        Only the skeleton of the model runs. Its weights are gathered block by block.
        """
        # 1. Agree that no rank has a reason not to.
        fault = self.guards.off.get("probe")
        error: Exception | None = None
        if fault is not None:
            error = RuntimeError(fault)
        own_probe = None
        try:
            self._check_shards()
            if self.together.lead:
                self.live.choose(self._first_batch(), sharded=True)
                if self.live.probe is not None:
                    own_probe = self.live.probe.to("cpu")
        except Exception as failure:
            error = error or failure
        self.together.check(_OPEN, error)

        # 2. Take the leading rank's probe.
        shared = self.together.share(own_probe)
        if not self.together.lead:
            self.live.probe = shared.to(local(next(self.model.parameters())).device)

        # 3. Record the model.
        self.live.blocks = GatheredWeights(self.model, self.together)
        with self._undisturbed():
            return self.live.sites()

    def _check_shards(self) -> None:
        """Raise TraceError if the skeleton of a sharded model cannot run on its own."""
        if has_foreign_hooks(self.model):
            raise TraceError(
                "hooks of others are on the sharded model: its own run would need every rank"
            )
        if any(map(is_shard, self.model.buffers())):
            raise TraceError("a buffer of the model is sharded, and only weights are gathered")

    def _undisturbed(self) -> ExitStack:
        """Return a context without the hooks of the watch, and without autocast and TF32."""
        # The runs of the probe are no batches of the training.
        stack = ExitStack()
        if self.batches is not None:
            stack.enter_context(self.batches.away())

        # Autocast and TF32 would change the precision of what is measured.
        stack.enter_context(full_precision())
        return stack

    def _measure(self, sites: Sites, step: int, tracing: float, *, probe: bool) -> None:
        """Measure the statistics, and the Jacobian norms if they are due.

        Args:
            sites: the sub-layers.
            step: the number of the step.
            tracing: seconds that finding the sub-layers took.
            probe: the Jacobian norms are due.
        """
        started = time.perf_counter()
        with self.guards.part("probe", _NO_PROBE), self._undisturbed():
            # 1. Statistics of the forward.
            with self.together.in_step():
                statistics = self.live.statistics(sites)
            self.statistics_seconds = tracing + time.perf_counter() - started
            self.statistics_cadence.last = step
            if self.together.lead:
                self._write_statistics(step, statistics)
            if not probe:
                return

            # 2. Jacobian norms, if the memory suffices on every rank.
            started -= tracing
            with self.together.in_step():
                shortage = self.live.fits(sites)
                if not self.together.fits(not shortage):
                    self.probe_cadence.last = step
                    reason = shortage or "another rank has not the memory"
                    self.record.warn("memory", f"the probe is skipped: {reason}")
                    return
                report = self.live.measure(sites, step, started)
                series = self.live.series(sites, report)

            # 3. What it has cost, and what it shows.
            seconds = time.perf_counter() - started
            announced = self.price.seconds if self.price is not None else None
            self.price = Price(seconds, self.price.peak if self.price else 0)
            self.probe_cadence.last = step
            if self.together.lead:
                self._write_probe(step, report, series, seconds, announced)
                # How the weights were drawn is no part of the price of a probe.
                self._judge_init_once(sites, report, step)

    def _judge_init_once(self, sites: Sites, report: Report, step: int) -> None:
        """Judge by the rules JD2xx how the weights were drawn, before the first update of a run.

        Weights that a run goes on from are not judged as fresh ones, and neither are pieces of
        weights. `run` reports what is found once the first step has a number.
        """
        # 1. Whether nothing has been trained yet, as far as that is known by now.
        if self._has_judged_init:
            return
        self._has_judged_init = True
        is_first_step = step <= 0 and not self.record.going_on
        is_fresh = is_first_step and not any(map(has_stepped, self.optimisers))
        if not is_fresh or report.state != "init" or self.together.sharded:
            return

        # 2. Judge the weights.
        with self.guards.part("init", _NO_INIT):
            self._init_findings = judge_init(
                self.model, sites, report, self.optimisers, self.live.thresholds
            )

    def _report_init(self, step: int) -> None:
        """Report what was found in the weights before the first update.

        Args:
            step: the number of the first step.
        """
        # 1. A loop whose first step is a later one goes on from a checkpoint.
        findings = self._init_findings
        self._init_findings = []
        if step > 1:
            return

        # 2. An optimizer that keeps no state does not show whether it has stepped before.
        caveat = ""
        if not any(getattr(optimizer, "state", None) for optimizer in self.optimisers):
            caveat = _MAY_BE_TRAINED
        for finding in findings:
            self.findings = [*self.findings, finding]
            if finding.level != "info":
                what = f"{finding.what}{caveat}"
                self.record.finding(
                    Alert(0, finding.code, finding.level, what, finding.where, finding.evidence)
                )

    def _write_statistics(self, step: int, statistics: ForwardFigures) -> None:
        """Write the statistics to the log, send them to the sinks and check them."""
        row: dict[str, Any] = {
            "step": step,
            "seconds": self.statistics_seconds,
            "figures": statistics.figures,
        }
        if statistics.heads:
            row["heads"] = statistics.heads
        if statistics.experts:
            row["experts"] = statistics.experts
        self.record.line("stats", row)
        self.record.publish(step, lambda: slashed_series(statistics.figures))
        verdict = self.record.live.statistics(step, statistics.figures)
        for alert in verdict.alerts:
            self.record.alert(alert)
        for repeat in verdict.repeats:
            self.record.repeat(repeat)
        self.record.note_ready(step)

    def _write_probe(
        self,
        step: int,
        report: Report,
        series: Mapping[str, Mapping[str, float]],
        seconds: float,
        announced: float | None,
    ) -> None:
        """Write a probe to the log, send it to the sinks and check it.

        Args:
            step: the number of the step.
            report: what was measured.
            series: figure -> sub-layer -> value.
            seconds: that the probe took.
            announced: seconds that were predicted, or that the last probe took.
        """
        self.record.live.know(report)
        self.record.silence.look_at_probe(report)
        self.findings = report.findings
        verdict = self.record.live.probe(step, series)
        row = {
            "step": step,
            "seconds": seconds,
            "announced": announced,
            "figures": series,
            "votes": verdict.votes,
        }
        self.record.line("probe", {**row, "report": report.to_dict()})
        gains = {key: series[key] for key in ("branch_norm", "core_norm", "stable_rank")}
        self.record.publish(step, lambda: slashed_series(gains))
        self._report_findings(report, step)
        for alert in verdict.alerts:
            self.record.alert(alert)
        for repeat in verdict.repeats:
            self.record.repeat(repeat)
        self.record.note_ready(step)

    def _report_findings(self, report: Report, step: int) -> None:
        """Report the findings of a probe that the probe before it did not have.

        Most of them are a finding and no alert. The first report describes the model as the watch
        found it: nothing has happened then. Rules JD1xx and JD2xx judge an init, and a model in a
        run leaves it. A warning of theirs must not end the run of a model that trains well. An
        error is an alert, since a rule has it only for something broken, or for the user's own
        threshold.
        """
        # 1. Report what is new. Rules from JD900 on judge the measurement, and not the model.
        findings = [f for f in report.findings if f.level != "info" and f.code < "JD900"]
        for finding in findings:
            key = _finding_key(finding)
            if key in self._reported or key in self._last_fired:
                continue
            alert = Alert(
                step, finding.code, finding.level, finding.what, finding.where, finding.evidence
            )
            if self._is_alert(finding):
                self.record.alert(alert)
            else:
                self._reported.add(key)
                self.record.finding(alert)

        # 2. Remember it for the next probe.
        self._last_fired = {_finding_key(finding) for finding in findings}
        self._is_first_report = False

    def _is_alert(self, finding: Finding) -> bool:
        """Return whether a finding of a probe is an alert; see `_report_findings`."""
        if finding.level == "error":
            return True
        is_of_init = self._is_first_report or finding.code < "JD300"
        return not is_of_init

    # -- checkpoints and the end -------------------------------------------------------------------
    def weights_state(self) -> dict[str, Tensor]:
        """Return samples of the weights; none if they are sharded."""
        if self.writes is None:
            return {}
        # The next run may cut sharded weights in another way.
        if self.together.sharded:
            return {}
        return self.writes.state()

    def fixed_probe(self) -> dict[str, Any] | None:
        """Return the arguments of the probe; None before there is one."""
        probe = self.live.probe
        if probe is None:
            return None
        return {"args": probe.args, "kwargs": probe.kwargs}

    def set_probe(self, saved: Mapping[str, Any] | None) -> None:
        """Take the probe of the run so far, so that its series go on."""
        if saved is not None and self.live.inputs is None and self.live.probe is None:
            self.live.choose((tuple(saved["args"]), dict(saved["kwargs"])))

    def close(self) -> None:
        """Let go of the model and the optimizers; the probe stays for `fixed_probe`."""
        self.metrics = None
        self.batches = None
        self.writes = None
        self.live.close()
        del self.model, self.optimisers, self._contents


def _select(names: Sequence[str], flags: Tensor) -> list[str]:
    return [name for name, flag in zip(names, flags.tolist(), strict=True) if flag]


def _finding_key(finding: Finding) -> str:
    return f"{finding.code} {finding.level}"


def _cadence_text(cadence: Cadence) -> str:
    if cadence.never:
        return "(switched off)"
    words: list[str] = []
    if cadence.steps:
        words.append(f"every {cadence.steps} steps")
    if cadence.budget:
        words.append(f"for at most {cadence.budget:.1%} of the time")
    return ", ".join(words)
