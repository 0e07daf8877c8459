"""A running watch: the calls of the training loop, and how the watch ends."""

from __future__ import annotations

import atexit
import math
import os
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from jacdiag.devices.accelerators import is_capturing
from jacdiag.distributed.training_group import Together
from jacdiag.errors import UsageError, one_line
from jacdiag.monitor.batches import Batches
from jacdiag.monitor.guards import AlertRaised, Guards, quietly
from jacdiag.monitor.histograms import Histograms
from jacdiag.monitor.kept_batches import KeptBatches
from jacdiag.monitor.log.events import RunEvents
from jacdiag.monitor.measurements import Measurements
from jacdiag.monitor.noise_scale import MicroBatches
from jacdiag.monitor.optimizer_observer import NO_FIGURES, OptimizerObserver
from jacdiag.monitor.optimizers import OptimizerTree, check_belongs, names_of, optimizer_tree
from jacdiag.monitor.process_endings import ENDINGS, Ending
from jacdiag.monitor.schedule import Clock
from jacdiag.monitor.step_metrics import GIVEN, GIVEN_PART, LOSS, StepMetrics
from jacdiag.monitor.step_numbers import StepMove, StepNumbers
from jacdiag.records.run_log import Alert

# A signal waits for a step of another thread to end: how often it looks, and the seconds between.
_LOOKS, _PAUSE = 300, 0.01
_CAPTURED = (
    "w.step() was called while a CUDA graph was captured: no step is made then, and nothing is "
    "measured. Call w.step(loss) once after each graph.replay()"
)


class Watch:
    """A running watch, as `jacdiag.watch` returns it.

    It is also a context manager: leaving the `with` block closes it.

    Attributes:
        count: the number of the last optimizer step, skipped steps included. The number is the
            loop's own if it passes numbers.
        alerts: the alerts of this session.
        findings: what the probes report about the model and that is no alert.
        closed: whether the watch has ended and nothing of it is left on the model and the
            optimizers.

    Example:
        >>> import torch
        >>> from jacdiag.sources.gpt import build
        >>> model = build(n_layer=1, n_head=2, n_embd=16, vocab_size=32, block_size=8)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> from jacdiag.monitor import watch
        >>> with watch(model, optimizer, every=None, quiet=True) as w:
        ...     ids = torch.randint(32, (2, 9))
        ...     _, loss = model(ids[:, :-1], ids[:, 1:])
        ...     loss.backward()
        ...     optimizer.step()
        ...     w.step(loss)
        >>> print(w)
        Watch, closed: 1 step, 0 alerts
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: OptimizerTree,
        together: Together,
        record: RunEvents,
        measurements: Measurements,
        *,
        log_every: int,
        update_every: int | None,
        keep_batches: int | None,
        histograms: Histograms,
    ) -> None:
        """Attach a watch; `jacdiag.watch` checks the arguments and calls this.

        Args:
            model: the module that the loop calls, wrapped or not.
            optimizers: those that are watched.
            together: the ranks.
            record: the log.
            measurements: what is measured.
            log_every: steps between two looks at the device.
            update_every: steps between two update norms; 0 for none, None for the default schedule.
            keep_batches: how many batches to keep; None keeps them while they are small.
            histograms: those for the sinks.
        """
        self.together = together
        self.record = record
        self.measurements = measurements
        self.guards: Guards = record.guards
        self.histograms = histograms
        self.log_every = log_every
        self.numbers = StepNumbers(record.resumed_at, record.warn)
        self.clock = Clock()
        self.closed = False
        self.busy = False
        self.process = os.getpid()
        self.thread = threading.get_ident()  # the one that trains
        self._signal = ""  # name of one that came, and that somebody else handles
        # Every rank reads the same numbers if no weight is sharded: then the leading rank works.
        self.inert = not together.lead and not together.sharded

        # 1. Read the optimizers, and the batches of the model.
        self.observer = OptimizerObserver(
            optimizers,
            measurements,
            record,
            self.numbers,
            self.clock,
            histograms,
            is_inert=self.inert,
            log_every=log_every,
            update_every=update_every,
            owner=self,
        )
        self.batches: Batches | None = None
        if not self.inert:
            self.batches = self._observe_batches(model, keep_batches, log_every)
            self.observer.attach()
            self.batches.step = self.count + 1
        measurements.batches = self.batches
        record.batches = self.batches

        # 2. A loop may end without close() while lines of the log still wait.
        self._at_exit = partial(_close_at_exit, weakref.ref(self))
        atexit.register(self._at_exit)
        ENDINGS.open(self)

    def _observe_batches(
        self, model: nn.Module, keep_batches: int | None, log_every: int
    ) -> Batches:
        """Put the hook on the model that sees its batches."""
        has_recorder = self.record.recorder is not None
        kept_batches = KeptBatches(keep_batches, log_every) if has_recorder else None
        batches = Batches(model, fingerprints=has_recorder, keep=kept_batches)
        if has_recorder and not self.together.sharded:
            batches.micro_batches = MicroBatches(model, self.observer.parameters, log_every)
        return batches

    @property
    def count(self) -> int:
        """The number of the last step."""
        return self.numbers.count

    @property
    def alerts(self) -> list[Alert]:
        """The alerts of this session."""
        return list(self.record.alerts)

    @property
    def findings(self) -> list[Alert]:
        """What the probes report about the model and that is no alert."""
        return list(self.record.findings)

    def __str__(self) -> str:
        """Return the state of the watch, with the findings and alerts of this session."""
        # 1. The head, with the counts.
        state = "closed" if self.closed else "running"
        alerts = self.alerts
        steps = _counted(self.count, "step")
        lines = [f"Watch, {state}: {steps}, {_counted(len(alerts), 'alert')}"]

        # 2. The findings about the model, then the alerts.
        lines += [f"  finding: {finding}" for finding in self.findings]
        lines += [f"  {alert}" for alert in alerts]
        return "\n".join(lines)

    # -- the loop ----------------------------------------------------------------------------------
    def step(
        self,
        loss: Any,
        *,
        grad_norm: Any = None,
        lr: float | None = None,
        tokens: int | None = None,
        step: int | None = None,
    ) -> None:
        """Take one optimizer step; call it once per step, after `optimizer.step()`.

        If the step is a CUDA graph, call it after each replay. While a graph is captured, it does
        nothing.

        Args:
            loss: of this step, a tensor or a number; None if the loop does not know it.
            grad_norm: what `clip_grad_norm_` returned, if the loop clips.
            lr: the learning rate; the one that the first parameter group of the step used if not
                given.
            tokens: tokens so far, or in this step; written to the log as it is.
            step: the trainer's own number of the step. Log, alerts, flights and cadences use it.
                The first number of a process says where the run is: a run that goes on from a
                checkpoint of step 400 passes 401, and what the log has from there on is done again.
                Counted from 1 if not given.

        Raises:
            UsageError: the watch is closed, or `step` is no integer.
            AlertRaised: an alert, with `on_alert="raise"`.
        """
        if self.closed:
            raise UsageError(
                "step of a watch that is closed",
                hint="call it before close(), inside the `with` block",
            )
        # What is launched now would become a part of the graph, and no step is made.
        if is_capturing():
            self.record.warn("captured", _CAPTURED)
            return
        self.thread = threading.get_ident()
        self.busy = True
        try:
            self._take_step(loss, grad_norm, lr, tokens, self.numbers.advance(step))
        finally:
            self.busy = False
            ENDINGS.settle()
        self.record.raise_alert()

    def _take_step(
        self, loss: Any, grad_norm: Any, lr: float | None, tokens: int | None, move: StepMove
    ) -> None:
        self.observer.compare_ranks()
        if self.inert:
            return

        # 1. Take the time of the step. What the hook on the model took lies within it.
        self.measurements.wait_before_first()
        started = time.perf_counter()
        if self.batches is not None:
            self.clock.charge("batches", self.batches.seconds)
            self.batches.seconds = 0.0
        step_seconds = self.clock.step_ended(started)

        # 2. Note the step in the buffer.
        self._follow_numbers(move)
        if self.record.skip_list is not None:
            self.record.skip_list.step_ended(self.count)
        with self.guards.part("figures", NO_FIGURES):
            if self.guards.on("figures"):
                self._record_step(loss, grad_norm, lr, tokens, step_seconds)

        # 3. Begin the next step.
        self.record.settle(move.base)
        self._show_histograms()
        self.observer.begin_step()
        self._take_batch_fingerprints()
        self.clock.charge("figures", time.perf_counter() - started)

        # 4. Write the log, and measure what is due.
        metrics = self.measurements.metrics
        if metrics is not None and (metrics.full or self.guards.off.get("figures")):
            self._flush()
            if self.record.live.updates_leap:
                self.observer.look_closely()
        self.measurements.run(self.count, self.clock)
        if self.record.pulse is not None:
            self.record.pulse.step_ended(self.count, started, self.clock.usual_seconds)
        self._write_flight_of_signal()
        self.clock.begin(time.perf_counter())

    def _follow_numbers(self, move: StepMove) -> None:
        """Follow the numbers of the trainer, before anything of the step is noted."""
        # 1. The loop has gone back: what comes after `base` is done again.
        if move.is_rewind:
            self._flush()
            self.record.rewind(move.base)
            if self.batches is not None:
                self.batches.rewind(move.base)
            if self.record.skip_list is not None:
                self.record.skip_list.rewind(move.base)

        # 2. The batches of this step were seen before its number was known.
        if self.batches is not None and self.batches.step != move.number:
            self.batches.renumber(move.number)

    def _record_step(
        self,
        loss: Any,
        grad_norm: Any,
        lr: float | None,
        tokens: int | None,
        step_seconds: float | None,
    ) -> None:
        """Put the step into the buffer, and close its row."""
        # 1. What was seen of the optimizers.
        observer = self.observer
        outcome = observer.take_outcome()
        observer.usage.step_called(outcome, overflow=_is_overflow(grad_norm))
        metrics = observer.complete_row(outcome)

        # 2. What was read of the micro-batches.
        if self.batches is not None and self.batches.micro_batches is not None:
            sums = self.batches.micro_batches.step_ended()
            if sums is not None:
                metrics.put_micro_batches(*sums)

        # 3. What the loop passed.
        if loss is not None:
            metrics.put(LOSS, loss)
            metrics.now.has_loss = True
        if grad_norm is not None:
            _put_grad_norm(metrics, grad_norm)
            metrics.now.has_norm = True
        metrics.now.rates = observer.rates_of_groups(outcome)
        rate = observer.rate_of_step(lr, metrics.now)

        # 4. Close the row. The first step of a process has no time.
        if step_seconds is None:
            step_seconds = math.nan
        metrics.close_row(self.count, step_seconds, rate, tokens)

    def _show_histograms(self) -> None:
        """Send histograms to the sinks at a step at which they are due."""
        metrics = self.measurements.metrics
        if metrics is None or not self.guards.on("histograms"):
            return
        if not self.histograms.is_due(self.count, self.numbers.stride):
            return
        with self.guards.part("histograms", "no histograms from now on"):
            self.record.publish_histograms(self.count, self.histograms.finish(metrics.groups))

    def _take_batch_fingerprints(self) -> None:
        """Take what was seen of the step's batches, and say once if nothing was."""
        if self.batches is None:
            return
        # 1. The fingerprints. A hook on the model raises nothing: its error comes up here.
        with self.guards.part("batches", "no batch fingerprints and no kept batches from now on"):
            prints = self.batches.next_step(self.numbers.coming)
            # Without figures no row is written, and nobody would let go of them.
            if self.guards.on("figures"):
                self.record.prints.append(prints)
            if self.batches.failed is not None:
                error = self.batches.failed
                self.batches.failed = None
                self.batches.remove()
                raise error

        # 2. What was not seen.
        if not self.record.silence.looks_at_batches:
            return
        with self.guards.part("silence", "what the watch does not see is not said"):
            kind = type(self.measurements.model).__name__
            probe = self.measurements.probe_state()
            self.record.silence.step_ended(kind, self.batches, probe)

    def prepare(self) -> None:
        """Find the sub-layers and run the first probe now, before the first update.

        Without this call that happens at the first update. A loop whose gradients are computed
        inside the optimizer's step needs it, since the first update comes too early there. Called
        in such a loop at each step, after the backward and before the update, it also looks for
        gradients and weights that are not finite by then. While a CUDA graph is captured, it does
        nothing.
        """
        if self.inert or self.closed or is_capturing():
            return
        self.observer.prepare()

    def set_optimizer(self, optimizer: Any) -> None:
        """Watch another optimizer from now on; call after it has replaced the one that was watched.

        Args:
            optimizer: as for `jacdiag.watch`. It has to hold parameters of the watched model.

        Raises:
            UsageError: the watch is closed, or the optimizer cannot be watched.
        """
        if self.closed:
            raise UsageError(
                "set_optimizer of a watch that is closed", hint="call it inside the `with` block"
            )
        tree = optimizer_tree(optimizer)
        check_belongs(tree.leaves, names_of(self.measurements.model))
        self.flush()
        self.observer.set_optimizers(tree)
        if not self.inert:
            with self.guards.part("figures", NO_FIGURES):
                self.measurements.set_optimizers(tree.leaves, self.count)

    # -- the log -----------------------------------------------------------------------------------
    def _flush(self) -> None:
        # The host may not wait for a device whose work is being captured into a graph.
        if is_capturing():
            return
        started, waited = time.perf_counter(), self.clock.waited
        self.measurements.flush(self.clock)
        # The wait for the training's own work is not the watch's.
        waited = self.clock.waited - waited
        self.clock.charge("log", time.perf_counter() - started - waited)

    def flush(self) -> None:
        """Write the steps so far to the log; waits for the device."""
        if self.inert or self.closed:
            return
        self._flush()
        self.record.wait()

    def note(self, text: str) -> None:
        """Write a note to the log."""
        self.record.note(text)

    # -- checkpoints -------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Return what to save with a checkpoint, so that the log goes on without gaps or doubles.

        If weights are sharded, every rank has to call it.

        Returns:
            Plain containers and tensors, which `torch.load(..., weights_only=True)` reads.
        """
        self.flush()
        return {
            "version": 1,
            "step": self.count,
            "live": self.record.live.state(),
            "probe": self.measurements.fixed_probe(),
            "weights": self.measurements.weights_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; call before the first step.

        Args:
            state: what `state_dict` returned.

        Raises:
            UsageError: a step was made already, or the state is of another version.
        """
        if self.observer.usage.called:
            raise UsageError(
                "load_state_dict after a step",
                hint="call it right after jacdiag.watch(..., resume=True)",
            )
        if state.get("version") != 1:
            raise UsageError(
                "a watch cannot go on from this state", got=f"version {state.get('version')!r}"
            )
        self._go_to(int(state["step"]))
        self.record.go_on(self.count, state["live"])
        self.measurements.set_probe(state["probe"])
        samples = state.get("weights")  # a state of an older version has none
        if samples:
            self.measurements.saved_weights = (dict(samples), self.count)

    def resume_at(self, step: int) -> None:
        """Go on from a step without a saved state: the live rules start again.

        Args:
            step: the number of the last step that was made.
        """
        self._go_to(step)
        self.record.go_on(step, None)

    def _go_to(self, step: int) -> None:
        self.numbers.count = step
        if self.batches is not None:
            self.batches.step = step + 1

    # -- the end -----------------------------------------------------------------------------------
    def close(self) -> None:
        """Write what is left, and take everything off the model and the optimizers.

        A second call does nothing.
        """
        self._close(Ending(how="closed"))

    def _close(self, ending: Ending) -> None:
        if self.closed:
            return
        if os.getpid() != self.process:  # a copy that a fork has made: the run is the parent's
            self.closed = True
            return
        self.busy = True

        # 1. Write the last steps, and how the run ended.
        if not self.inert:
            self._write_ending(ending)
        self.closed = True

        # 2. Take the hooks off, and end the log.
        self.observer.remove()
        if self.batches is not None:
            quietly(self.batches.remove)
        if not self.inert:
            quietly(self.record.close, self.count, self.clock, self.measurements.looks)
        quietly(self.measurements.close)
        quietly(self.together.close)

        # 3. Whoever keeps a closed watch does not keep the model with it.
        self.observer.release()
        self.batches = None
        self.record.batches = None
        atexit.unregister(self._at_exit)
        self.busy = False
        ENDINGS.close(self)
        ENDINGS.settle()

    def _write_ending(self, ending: Ending) -> None:
        """Write the last steps and the row of the ending, with a flight if something happened."""
        self.observer.usage.ended()
        # 1. The last steps. What is sharded is read by all ranks together, and the others may have
        # gone on.
        needs_others = ending.is_alone and self.together.sharded
        if not needs_others:
            quietly(self._flush)

        # 2. The ending. A signal that the trainer has handled is its reason.
        if self._signal and not ending.reason:
            ending = replace(ending, reason=self._signal, has_flight=True)
        quietly(self.record.left, self.count, ending)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        has_flight = not isinstance(error, AlertRaised)  # the alert has one
        self._close(Ending.by_error(error, has_flight=has_flight))

    # -- ends without close, see jacdiag.monitor.process_endings -----------------------------------
    def left_by(self, error: BaseException) -> None:
        """Write the flight and close, because of an exception that nobody has caught."""
        has_flight = not isinstance(error, AlertRaised)
        self._close(Ending.by_error(error, has_flight=has_flight, is_alone=True))

    def killed_by(self, name: str) -> None:
        """Write the flight and the last lines, because of a signal that ends the process."""
        if self.closed or self.inert:
            return

        # 1. Write the last steps. What is sharded would need the other ranks.
        self._wait_for_step()
        self.closed = True
        if not self.together.sharded:
            quietly(self._flush)

        # 2. Write how it ended, and wait until it is on the disk.
        quietly(self.record.left, self.count, Ending(how="signal", reason=name, has_flight=True))
        quietly(self.record.end, self.count, self.clock, self.measurements.looks)
        quietly(self.record.wait)
        quietly(self.record.close_sinks)

    def _wait_for_step(self) -> None:
        """Wait until the step of a loop in another thread has ended, but not for ever."""
        for _ in range(_LOOKS):
            if not self.busy:
                return
            time.sleep(_PAUSE)

    def noticed(self, name: str) -> None:
        """Note a signal that the trainer handles: the next step writes a flight when it ends."""
        if not self.inert:
            self._signal = name
            self._write_note(f"{name} came; the trainer handles it")

    def _write_flight_of_signal(self) -> None:
        if self._signal:
            name, self._signal = self._signal, ""
            self._flush()
            self.record.dump(self.count, name)

    def interrupted_by(self, error: BaseException) -> None:
        """Write a flight and stay open: in an interactive session the loop may go on."""
        if self.inert or self.closed:
            return

        # What is sharded would need the other ranks.
        if not self.together.sharded:
            quietly(self._flush)
        self._write_note(f"the loop was left by {one_line(error)}")
        quietly(self.record.dump, self.count, one_line(error), Ending.by_error(error).how)
        quietly(self.record.wait)

    def _write_note(self, text: str) -> None:
        self.record.line("note", {"step": self.count, "text": text})

    def ended_with_process(self) -> None:
        """Close, because the program ends without `close`."""
        self._close(Ending(how="exit"))


def _close_at_exit(ref: weakref.ref[Watch]) -> None:
    watch = ref()
    if watch is not None:
        watch.ended_with_process()


def _counted(count: int, noun: str) -> str:
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun}s"


def _put_grad_norm(metrics: StepMetrics, grad_norm: Any) -> None:
    """Put the norm that the loop passed into the row at hand."""
    placements = getattr(grad_norm, "placements", ())
    if any(placement.is_partial() for placement in placements):
        # FSDP2 returns the norm of this rank's pieces: squares are summed over ranks.
        metrics.put(GIVEN_PART, grad_norm.to_local().detach().square())
    else:
        metrics.put(GIVEN, grad_norm)


def _is_overflow(grad_norm: Any) -> bool:
    """Return whether the passed gradient norm is known not to be finite.

    A tensor on a device is not read.
    """
    # 1. A number.
    if not isinstance(grad_norm, Tensor):
        return isinstance(grad_norm, float) and not math.isfinite(grad_norm)

    # 2. A tensor on the CPU, which is no share of a norm over ranks.
    if grad_norm.device.type != "cpu":
        return False
    if grad_norm.numel() != 1:
        return False
    if hasattr(grad_norm, "placements"):
        return False
    return not math.isfinite(float(grad_norm))
