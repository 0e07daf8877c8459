"""The three tiers: per-step figures, statistics, the Jacobian probe; each at its cadence, on one
rank or on many.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jacdiag.distributed.training_group import Together
from jacdiag.errors import TraceError
from jacdiag.monitor.batches import Batches
from jacdiag.monitor.blind_spots import ProbeState
from jacdiag.monitor.jacobian_probe import LiveProbe, Price
from jacdiag.monitor.log.events import Record
from jacdiag.monitor.log.sinks import slashed_series
from jacdiag.monitor.optimizers import group_names, local, names_of, parameters_of
from jacdiag.monitor.parameter_groups import by_names, by_sites, grouped
from jacdiag.monitor.schedule import Cadence, Clock
from jacdiag.monitor.sharded_weights import Blocks, is_shard
from jacdiag.monitor.square_sums import find_nonfinite
from jacdiag.monitor.step_metrics import FIRST, GIVEN_PART, WRITTEN, Figures, Row
from jacdiag.monitor.step_rows import BadNames, row_of
from jacdiag.monitor.weight_writes import NOTED, WeightWrites
from jacdiag.records import Finding, Report
from jacdiag.records.run_log import Alert
from jacdiag.rules.thresholds import Thresholds
from jacdiag.trace import Sites
from jacdiag.trace.execution.wrappers import has_foreign_hooks

_NO_PROBE = "no Jacobian norms and no statistics from now on"
_OPEN = 10**6 + 2  # the place at which ranks begin a probe
_NO_FIGURES = "no figures of single steps from now on"


class Tiers:
    """What is measured, and when.

    Args:
        cadences: of the probe and of the statistics.

    Attributes:
        figures: the buffer of per-step figures; None before the first optimiser step.
        price: of a probe: as announced, then as last measured.
    """

    def __init__(
        self,
        model: nn.Module,
        optimisers: list[Any],
        names: dict[int, str],
        together: Together,
        record: Record,
        *,
        probe: Any,
        thresholds: Thresholds,
        cadences: tuple[Cadence, Cadence],
    ) -> None:
        self.model, self.optimisers, self.names, self.together, self.record = (
            model,
            optimisers,
            names,
            together,
            record,
        )
        self.guards = record.guards
        self.every, self.stats_every = cadences
        self.live = LiveProbe(model, thresholds, probe)
        self.batches: Batches | None = None
        self.figures: Figures | None = None
        self.writes: WeightWrites | None = None
        # samples of a checkpoint, and its step
        self.saved_weights: tuple[dict[str, Tensor], int] | None = None
        self.price: Price | None = None
        self.stats_price = 0.0
        self.looks = 0
        self.fired: set[str] = set()
        self.findings: list[Finding] = []  # of the last probe's report
        self.told: set[str] = set()  # findings that are no alerts, each told once
        self._first_report = True
        self._told_share = False

    # -- the first step ----------------------------------------------------------------------------
    def prepared(self, step: int, capacity: int) -> Figures:
        """The buffer; at the first call the sub-layers are found, the price is told, and the first
        probe runs.

        That is before the first update, when the weights are still the initial ones and a batch has
        been seen.
        """
        if self.figures is None:
            homes, order = self._homes(step)
            world = self.together.size if self.together.sharded else 1
            groups = grouped(parameters_of(self.optimisers), self.names, homes, order, world)
            self.figures = Figures(groups, capacity)
        return self.figures

    def _homes(self, step: int) -> tuple[dict[str, str], list[str]]:
        homes, order = by_names(list(self.names.values())), list[str]()
        parameters = sum(p.numel() for p in self.model.parameters())
        header = {
            "model": type(self.model).__name__,
            "parameters": parameters,
            "ranks": self.together.size,
            "sharded": self.together.sharded,
            "every": self.every.steps or self.every.budget,
            "stats_every": self.stats_every.steps or self.stats_every.budget,
        }
        found, seconds = self._find()
        if found is not None:
            homes, order = {**homes, **by_sites(found)}, [site.name for site in found]
        if self.together.sharded:
            homes, order = self.together.share((homes, order))
        used = [
            homes.get(self.names[id(p)], "")
            for p in parameters_of(self.optimisers)
            if id(p) in self.names
        ]
        labels = [*[label for label in order if label in used], *sorted(set(used) - set(order))]
        self.record.begin({**header, "groups": labels, "lr_groups": group_names(self.optimisers)})
        if found is not None:
            self._announce(found, seconds)
            self._measure(found, step, seconds, probe=not self.every.never)
        self.live.blocks = None
        return homes, order

    def _announce(self, found: Sites, tracing: float) -> None:
        with self.guards.part("probe", _NO_PROBE):
            assert self.live.probe is not None
            self.stats_price = tracing
            row: dict[str, Any] = {"statistics_seconds": tracing, "sub_layers": len(found)}
            text = (
                f"{len(found)} sub-layers; per step a pass over the gradients; statistics "
                f"about {tracing:.2g} s"
            )
            text += f" {_often(self.stats_every)}"
            if not self.every.never:
                with self.together.in_step():
                    fits = self.together.fits(not self.live.fits(found))
                    self.price = self.live.price(found, tracing) if fits else None
                if self.price is None:
                    return  # said where the probe is due
                tokens = self.live.probe.record
                row |= {"probe_seconds": self.price.seconds, "probe_peak_bytes": self.price.peak}
                text += (
                    f"; Jacobian probe on {tokens.batch} x {tokens.seq or 1} about "
                    f"{self.price.seconds:.2g} s and "
                )
                text += f"{self.price.peak / 2**20:,.0f} MB {_often(self.every)}"
            if self.together.lead:
                self.record.announce(text, row)

    # -- per-step figures --------------------------------------------------------------------------
    def flush(self, clock: Clock) -> None:
        """Reads the buffer and hands the steps over; sums over ranks where weights are sharded."""
        with self.guards.part("figures", _NO_FIGURES):
            if self.together.sharded and not self._all_have_figures():
                return
            if self.figures is None or not self.guards.on("figures"):
                return
            rows, table = self.figures.read()
            if self.writes is not None:
                self.writes.keep_read(len(rows))
            self.looks = self.figures.looks
            if self.together.sharded:
                whole = self.together.total(table[:, GIVEN_PART:])
                whole[:, 1] = table[:, GIVEN_PART + 1]  # found_inf is everybody's
                table = torch.cat([table[:, :GIVEN_PART], whole], dim=1)
            names = self._name_nonfinite(self.figures, rows, table)
            if rows and self.together.lead:
                labels = self.figures.groups.labels
                values = table.tolist()
                written = self._describe_writes(table)
                lines = [
                    row_of(row, values[k], labels, names.get(k), written.get(k))
                    for k, row in enumerate(rows)
                ]
                self.record.steps(lines)
            self._tell_share(clock)
            self._check_model()

    def _describe_writes(self, table: Tensor) -> dict[int, dict[str, Any]]:
        """Return what was written outside the optimizer, by the row before whose step it was."""
        if self.writes is None:
            return {}
        places = (table[:, WRITTEN] >= NOTED).nonzero().flatten().tolist()
        return {place: self.writes.describe(place) for place in places}

    def _name_nonfinite(
        self, figures: Figures, rows: list[Row], table: Tensor
    ) -> dict[int, BadNames]:
        """Name the gradients and the weights of each row that has a gradient that is not finite.

        Weights that no optimizer holds are looked at now: nothing has changed them since.
        """
        broken = (
            table[:, FIRST:].isfinite().all(dim=1).logical_not()
            if rows
            else torch.zeros(0, dtype=torch.bool)
        )
        broken &= torch.tensor([row.made for row in rows], dtype=torch.bool)
        if not bool(broken.any()):
            return {}
        # 1. The parameters that an optimizer holds, as they were before its step.
        gradients, weights = (
            self.together.total(flags.float()) > 0 for flags in figures.nonfinite()
        )
        held = [member.name for member in figures.groups.members]
        # 2. All others.
        known = {id(member.parameter) for member in figures.groups.members}
        others = [
            (self.names[id(p)], local(p.detach()))
            for p in self.model.parameters()
            if id(p) not in known
        ]
        flags = (
            find_nonfinite([weight for _, weight in others], torch.device("cpu"))
            if others
            else torch.zeros(0)
        )
        frozen_bad = self.together.total(flags.float()) > 0
        frozen = [
            name for (name, _), is_bad in zip(others, frozen_bad.tolist(), strict=True) if is_bad
        ]
        # 3. Names.
        found: dict[int, BadNames] = {}
        for place in broken.nonzero().flatten().tolist():
            bad_weights = frozen + _picked(held, weights[place])
            seen = rows[place].weights_seen
            found[place] = BadNames(_picked(held, gradients[place]), bad_weights if seen else None)
        return found

    def _all_have_figures(self) -> bool:
        mine = self.guards.on("figures") and self.figures is not None
        if self.together.broken:
            raise RuntimeError(self.together.broken)
        if not self.together.agree(mine) and mine:
            raise RuntimeError("they failed on another rank")
        return mine

    def _tell_share(self, clock: Clock) -> None:
        """Once a training step's time is known: what the tiers come to."""
        step = clock.step_seconds
        if self._told_share or step is None or self.price is None or len(clock.steps) < 5:
            return
        self._told_share = True
        if not self.together.lead:
            return
        probe = self.price.seconds / (self.every.interval(self.price.seconds, step) * step)
        row = {"step_seconds": step, "probe_share": probe}
        self.record.announce(
            f"the probe comes to {probe:.1%} of the time, at {step:.3g} s a step", row
        )

    def _check_model(self) -> None:
        """A model whose parameters are others than at the start is grouped anew, aloud."""
        if {id(p) for p in self.model.parameters()} == self.names.keys():
            return
        names = names_of(self.model)
        if names.keys() == self.names.keys():  # a wrapper has parameters of its own
            return
        self.record.warn(
            "model",
            "the model's parameters changed after watch was attached: they are grouped anew",
        )
        self.names = names
        capacity = self.figures.capacity if self.figures is not None else 1
        self.figures = None
        self.prepared(-1, capacity)

    def set_optimisers(self, optimisers: list[Any], step: int) -> None:
        """Group the parameters of other optimizers from now on."""
        self.optimisers = optimisers
        if self.figures is not None:
            capacity, self.figures = self.figures.capacity, None
            self.prepared(step, capacity)

    # -- statistics and probe ----------------------------------------------------------------------
    def run(self, step: int, clock: Clock) -> None:
        """Runs what is due after a step."""
        if self.figures is None or (not self.guards.on("probe") and not self.together.sharded):
            return
        seconds = clock.step_seconds
        probe = self.every.due(step, self.price.seconds if self.price else None, seconds)
        stats = self.stats_every.due(step, self.stats_price, seconds)
        if self.together.sharded and (self.every.budget or self.stats_every.budget):
            capacity = self.figures.capacity
            if not any(
                cadence.may_be_due(step, capacity) for cadence in (self.every, self.stats_every)
            ):
                return
            with self.guards.part("probe", _NO_PROBE):
                probe, stats = self.together.share((probe, stats))
        if not (probe or stats):
            return
        begun = time.perf_counter()
        found, tracing = self._find()
        if found is not None:
            self._measure(found, step, tracing, probe=probe)
        self.live.blocks = None  # and with it the last weights
        clock.charge("probe" if probe else "statistics", time.perf_counter() - begun)

    def _find(self) -> tuple[Sites | None, float]:
        """Records the model on the probe; None where that is not possible. On all ranks or on
        none.
        """
        begun = time.perf_counter()
        found: Sites | None = None
        with self.guards.part("probe", _NO_PROBE):
            if self.together.sharded:
                with self.together.in_step():
                    made = self._found_in_step()
                found = made
            elif self.guards.on("probe"):
                self.live.choose(self._first_batch())
                with self._undisturbed():
                    found = self.live.sites()
        return found, time.perf_counter() - begun

    def _first_batch(self) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.batches is None:
            return None
        if self.batches.first is None:
            self.batches.take_compiled()
        return self.batches.first

    def probe_state(self) -> ProbeState:
        """Return what the probe runs on, and whether anything is measured on it."""
        probe = self.live.probe
        is_needed = self.guards.on("probe") and not (self.every.never and self.stats_every.never)
        return ProbeState(
            is_random=probe is not None and probe.record.is_random, is_needed=is_needed
        )

    def _found_in_step(self) -> Sites:
        """Agree, settle on the leading rank's probe, run the skeleton: its weights are gathered
        block by block.
        """
        off = self.guards.off.get("probe")
        error: Exception | None = RuntimeError(off) if off is not None else None
        lead = self.together.lead
        try:
            if has_foreign_hooks(self.model):
                raise TraceError(
                    "hooks of others are on the sharded model: its own run would need every rank"
                )
            if any(map(is_shard, self.model.buffers())):
                raise TraceError("a buffer of the model is sharded, and only weights are gathered")
            if lead:
                self.live.choose(self._first_batch(), sharded=True)
            mine = self.live.probe.to("cpu") if lead and self.live.probe is not None else None
        except Exception as failed:
            error = error or failed
        self.together.check(_OPEN, error)
        shared = self.together.share(mine)
        if not lead:
            self.live.probe = shared.to(local(next(self.model.parameters())).device)
        self.live.blocks = Blocks(self.model, self.together)
        with self._undisturbed():
            return self.live.sites()

    def _undisturbed(self) -> Any:
        from contextlib import ExitStack

        stack = ExitStack()
        if self.batches is not None:
            stack.enter_context(self.batches.away())
        for device in {"cpu", *(["cuda"] if torch.cuda.is_available() else [])}:
            stack.enter_context(torch.autocast(device, enabled=False))
        return stack

    def _measure(self, found: Sites, step: int, tracing: float, *, probe: bool) -> None:
        """Statistics, and the norms where they are due."""
        begun = time.perf_counter()
        with self.guards.part("probe", _NO_PROBE), self._undisturbed():
            with self.together.in_step():
                shown = self.live.statistics(found)
            self.stats_price = tracing + time.perf_counter() - begun
            self.stats_every.last = step
            if self.together.lead:
                row = {"step": step, "seconds": self.stats_price, "figures": shown.figures}
                lists = {"heads": shown.heads, "experts": shown.experts}
                self.record.line(
                    "stats", row | {name: values for name, values in lists.items() if values}
                )
                self.record.publish(step, lambda: slashed_series(shown.figures))
                for alert in self.record.live.statistics(step, shown.figures).alerts:
                    self.record.alert(alert)
                self.record.note_ready(step)
            if not probe:
                return
            begun -= tracing
            with self.together.in_step():
                why = self.live.fits(found)
                if not self.together.fits(not why):
                    self.every.last = step
                    self.record.warn(
                        "memory",
                        f"the probe is skipped: {why or 'another rank has not the memory'}",
                    )
                    return
                report = self.live.measure(found, step, begun)
                series = self.live.series(found, report)
            seconds = time.perf_counter() - begun
            announced = self.price.seconds if self.price is not None else None
            self.price = Price(seconds, self.price.peak if self.price else 0)
            self.every.last = step
            if self.together.lead:
                self._hand_over(step, report, series, seconds, announced)

    def _hand_over(
        self,
        step: int,
        report: Report,
        series: Mapping[str, Mapping[str, float]],
        seconds: float,
        announced: float | None,
    ) -> None:
        self.record.live.know(report)
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
        self._tell_findings(report, step)
        for alert in verdict.alerts:
            self.record.alert(alert)
        self.record.note_ready(step)

    def _tell_findings(self, report: Report, step: int) -> None:
        """Tell what the rules newly say of the model on the probe.

        What they say of it as the watch found it is a report: nothing has happened then. Rules
        JD1xx and JD2xx judge an init, and a model in a run leaves it: what they newly say later is
        a finding too. A warning of theirs must not end the run of a model that trains well. An
        error is an alert: a rule speaks so only of something broken, or by the user's own
        threshold.
        """
        findings = [f for f in report.findings if f.level != "info" and f.code < "JD900"]
        for finding in findings:
            key = f"{finding.code} {finding.level}"
            if key in self.told or key in self.fired:
                continue
            told = Alert(
                step, finding.code, finding.level, finding.what, finding.where, finding.evidence
            )
            of_init = self._first_report or finding.code < "JD300"
            if of_init and finding.level != "error":
                self.told.add(key)
                self.record.finding(told)
            else:
                self.record.alert(told)
        self.fired = {f"{finding.code} {finding.level}" for finding in findings}
        self._first_report = False

    # -- memory ------------------------------------------------------------------------------------
    def weights_state(self) -> dict[str, Tensor]:
        """Samples of the weights; none where they are sharded, since the next run may cut them
        otherwise.
        """
        return self.writes.state() if self.writes is not None and not self.together.sharded else {}

    def fixed_probe(self) -> dict[str, Any] | None:
        probe = self.live.probe
        return None if probe is None else {"args": probe.args, "kwargs": probe.kwargs}

    def set_probe(self, saved: Mapping[str, Any] | None) -> None:
        """The probe of the run so far, so that its series go on."""
        if saved is not None and self.live.inputs is None and self.live.probe is None:
            self.live.choose((tuple(saved["args"]), dict(saved["kwargs"])))

    def close(self) -> None:
        """Lets go of the model and the optimisers; what can still be asked for is the probe."""
        self.figures, self.batches, self.writes = None, None, None
        self.live.close()
        del self.model, self.optimisers


def _picked(names: Sequence[str], flags: Tensor) -> list[str]:
    return [name for name, flag in zip(names, flags.tolist(), strict=True) if flag]


def _often(cadence: Cadence) -> str:
    if cadence.never:
        return "(switched off)"
    words: list[str] = []
    if cadence.steps:
        words.append(f"every {cadence.steps} steps")
    if cadence.budget:
        words.append(f"for at most {cadence.budget:.1%} of the time")
    return ", ".join(words)
