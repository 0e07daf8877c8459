"""A running watch: the calls of the loop, the hooks of the optimisers, the end."""

from __future__ import annotations

import atexit
import math
import os
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from jacdiag.distributed.training_group import Together
from jacdiag.errors import UsageError, one_line
from jacdiag.monitor.batches import Batches
from jacdiag.monitor.fault_isolation import AlertRaised, Guards, logger, quietly
from jacdiag.monitor.histograms import Histograms
from jacdiag.monitor.kept_batches import KeptBatches
from jacdiag.monitor.log.events import Record
from jacdiag.monitor.measurements import Tiers
from jacdiag.monitor.noise_scale import MicroBatches
from jacdiag.monitor.optimizers import (
    OptimizerTree,
    check_belongs,
    learning_rates,
    names_of,
    optimizer_tree,
    parameters_of,
    scaling,
)
from jacdiag.monitor.process_endings import ENDINGS, Ending
from jacdiag.monitor.rank_comparison import RankComparison
from jacdiag.monitor.schedule import Clock
from jacdiag.monitor.step_hooks import StepHooks
from jacdiag.monitor.step_metrics import GIVEN, GIVEN_PART, LOSS, Figures, Row, UpdateTurn
from jacdiag.monitor.step_numbers import StepMove, StepNumbers
from jacdiag.monitor.step_usage import Outcome, Usage
from jacdiag.monitor.weight_writes import WeightWrites
from jacdiag.records.run_log import Alert

_NO_FIGURES = "no figures of single steps from now on"
_NO_UPDATES = "no update norms from now on"
# how often, and after how many seconds, a step in another thread is asked for its end
_LOOKS, _PAUSE = 300, 0.01
_NO_WRITES = "writes to weights between the steps are not looked for from now on"
_SAMPLE = 32  # parameters whose count of changes is looked at


class Watch:
    """A running watch; see `jacdiag.watch`.

    Attributes:
        count: optimiser steps so far, skipped ones included; the number of the last one where the
            loop passes numbers.
        alerts: those of this session.
        closed: nothing of it is left on the model and the optimisers.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: OptimizerTree,
        together: Together,
        record: Record,
        tiers: Tiers,
        log_every: int,
        updates: int,
        keep_batches: int | None,
        histograms: Histograms,
    ) -> None:
        self.optimizers, self.together, self.record, self.tiers = (
            optimizers,
            together,
            record,
            tiers,
        )
        self.guards: Guards = record.guards
        self.numbers = StepNumbers(record.resumed_at, record.warn)
        self.log_every, self.updates = log_every, updates
        self.histograms = histograms
        self.clock = Clock()
        self.closed = self.busy = False
        self.process, self.thread = os.getpid(), threading.get_ident()  # those that train
        self._signal = ""  # one that came, and that somebody else handles
        self.usage = Usage(optimizers.leaves, record.warn)
        self.turn: UpdateTurn | None = None
        # ids of the optimizers whose step is running, the outermost first
        self._running: list[int] = []
        # numbers of the leaves that stepped since the last call of `step`
        self._stepped: set[int] = set()
        self._read: set[int] = set()  # ids of the parameters whose gradients are in the row at hand
        self._rates: dict[int, list[float | Tensor | None]] = {}  # of the leaves that stepped
        self._first_rate: float | None = None
        self._compiled = False
        self._changes = ChangeCounts(optimizers.leaves)
        # every rank knows the same: one of them speaks
        self.inert = not together.lead and not together.sharded
        self.comparison = RankComparison.begin(
            together, optimizers.leaves, record.warn, attach=self.inert
        )
        self.batches: Batches | None = None
        self.hooks: StepHooks | None = None
        if not self.inert:
            keeps = record.recorder is not None
            kept = KeptBatches(keep_batches, log_every) if keeps else None
            self.batches = Batches(model, fingerprints=keeps, keep=kept)
            if keeps and not together.sharded:
                self.batches.micro_batches = MicroBatches(
                    model, lambda: parameters_of(self.optimizers.leaves), log_every
                )
            self.hooks = StepHooks(optimizers, self._before, self._after)
            self.batches.step = self.count + 1
        tiers.batches = record.batches = self.batches
        # a loop may end without close(), and lines may wait
        self._at_exit = partial(_close, weakref.ref(self))
        atexit.register(self._at_exit)
        ENDINGS.open(self)

    @property
    def count(self) -> int:
        return self.numbers.count

    def __str__(self) -> str:
        """Return how far the watch is, and what it said in this session."""
        state = "closed" if self.closed else "running"
        steps = "1 step" if self.count == 1 else f"{self.count} steps"
        alerts = [f"  {alert}" for alert in self.alerts]
        said = "1 alert" if len(alerts) == 1 else f"{len(alerts)} alerts"
        findings = [f"  finding: {finding}" for finding in self.findings]
        return "\n".join([f"Watch, {state}: {steps}, {said}", *findings, *alerts])

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

        Args:
            loss: of this step, a tensor or a number; None where the loop does not know it.
            grad_norm: what `clip_grad_norm_` returned, if the loop clips.
            lr: the learning rate; the one that the first parameter group of the step used if not
                given.
            tokens: tokens so far, or in this step; written to the log as it is.
            step: the trainer's own number of the step. Log, alerts, flights and cadences use it.
                The first number of a process says where the run is: a run that goes on from a
                checkpoint of step 400 passes 401, and what the log has from there on is done again.
                Counted from 1 if not given.

        Raises:
            UsageError: the watch is closed, or `step` is no whole number.
            AlertRaised: an alert, with `on_alert="raise"`.
        """
        if self.closed:
            raise UsageError(
                "step of a watch that is closed",
                hint="call it before close(), inside the `with` block",
            )
        self.thread, self.busy = threading.get_ident(), True
        try:
            self._step(loss, grad_norm, lr, tokens, self.numbers.advance(step))
        finally:
            self.busy = False
            ENDINGS.settle()
        self.record.raise_alert()

    def _step(
        self, loss: Any, grad_norm: Any, lr: float | None, tokens: int | None, move: StepMove
    ) -> None:
        if self.comparison is not None:
            self._compare_ranks()
        if self.inert:
            return
        begun = time.perf_counter()
        if self.batches is not None:  # what its hook took lies within the step
            self.clock.charge("batches", self.batches.seconds)
            self.batches.seconds = 0.0
        passed = self.clock.step_ended(begun)
        self._place(move)
        if self.record.skip_list is not None:
            self.record.skip_list.step_ended(self.count)
        with self.guards.part("figures", _NO_FIGURES):
            if self.guards.on("figures"):
                self._put(loss, grad_norm, lr, tokens, passed)
        self.record.settle(move.base)
        self._show_histograms()
        self._begin_window()
        self._batch_seen()
        self.clock.charge("figures", time.perf_counter() - begun)
        figures = self.tiers.figures
        if figures is not None and (figures.full or self.guards.off.get("figures")):
            self._flush()
        self.tiers.run(self.count, self.clock)
        if self.record.pulse is not None:
            self.record.pulse.step_ended(self.count, begun, self.clock.usual_seconds)
        self._write_flight_of_signal()
        self.clock.begin(time.perf_counter())

    def _place(self, move: StepMove) -> None:
        """Follow the numbers of the trainer, before anything of the step is noted."""
        if move.is_rewind:
            self._flush()
            self.record.rewind(move.base)
            if self.batches is not None:
                self.batches.rewind(move.base)
            if self.record.skip_list is not None:
                self.record.skip_list.rewind(move.base)
        if self.batches is not None and self.batches.step != move.number:
            self.batches.renumber(move.number)

    def _show_histograms(self) -> None:
        """Send histograms to the sinks at a step at which they are due."""
        figures = self.tiers.figures
        if figures is None or not self.guards.on("histograms"):
            return
        if not self.histograms.is_due(self.count, self.numbers.stride):
            return
        with self.guards.part("histograms", "no histograms from now on"):
            self.record.publish_histograms(self.count, self.histograms.finish(figures.groups))

    def prepare(self) -> None:
        """Finds the sub-layers and runs the first probe now, before the first update; done at that
        update otherwise.

        For loops whose gradients are made inside the optimiser's step: there the first update comes
        too early. Called there at each step, after the backward and before the update, it also
        looks for what is not finite by then.
        """
        if self.inert or self.closed:
            return
        with self.guards.part("figures", _NO_FIGURES):
            if self.guards.on("figures"):
                figures = self.tiers.prepared(self.count, self.log_every)
                if self._running and self._stepped:
                    figures.look_before_update()
        with self.guards.part("writes", _NO_WRITES):
            if self._running and self.tiers.writes is not None and self.tiers.figures is not None:
                self.tiers.writes.look_again(self.tiers.figures)

    def _put(
        self, loss: Any, grad_norm: Any, lr: float | None, tokens: int | None, passed: float | None
    ) -> None:
        outcome = self._outcome()
        self.usage.step_called(outcome, overflow=_is_overflow(grad_norm))
        unseen = outcome in (Outcome.COMPILED, Outcome.UNSEEN)
        figures = self.tiers.prepared(self.count if unseen else self.count - 1, self.log_every)
        figures.now.optimizer_step, figures.now.stepped_before = outcome, self.usage.ever
        if unseen:
            self._read_late(figures)
            if self.tiers.writes is not None:
                self.tiers.writes.forget()
        with self.guards.part("updates", _NO_UPDATES):
            if self.turn is not None and self.guards.on("updates"):
                self._close_turn(self.turn, figures, outcome)
        micro_batches = self.batches.micro_batches if self.batches is not None else None
        if micro_batches is not None and (read := micro_batches.step_ended()) is not None:
            figures.put_micro_batches(*read)
        if loss is not None:
            figures.put(LOSS, loss)
            figures.now.told = True
        if grad_norm is not None:
            placements = getattr(grad_norm, "placements", ())
            if any(p.is_partial() for p in placements):  # FSDP2's norm of this rank's pieces
                figures.put(GIVEN_PART, grad_norm.to_local().detach().square())
            else:
                figures.put(GIVEN, grad_norm)
        figures.now.rates = self._rates_of_groups(outcome)
        figures.close_row(
            self.count,
            float("nan") if passed is None else passed,
            self._rate(lr, figures.now),
            tokens,
        )

    # -- what was seen of the optimizers -----------------------------------------------------------
    def _outcome(self) -> Outcome:
        """What was seen of the optimizers since the last call; reads no device."""
        has_changed = self._changes.last != self._changes.read()
        compiled = self.hooks is not None and self.hooks.mark.ran
        if self.hooks is not None:
            self.hooks.mark.ran = False
        if compiled:
            self._compiled = True
            return Outcome.COMPILED
        if self._stepped:
            return Outcome.SEEN
        return Outcome.UNSEEN if has_changed else Outcome.NONE

    def _read_late(self, figures: Figures) -> None:
        """Take the gradients after a step that was not seen, as far as they are still there."""
        parameters = parameters_of(self.optimizers.leaves)
        if any(p.grad is not None for p in parameters):
            figures.gradients(None, None, None, before=False)
            figures.now.late = True

    def _close_turn(self, turn: UpdateTurn, figures: Figures, outcome: Outcome) -> None:
        if outcome is Outcome.COMPILED and turn.opened:
            for number in range(len(self.optimizers.leaves)):
                turn.note_step(number)
            turn.measure(figures)
            turn.touched = True
        turn.close(figures)

    def _rates_of_groups(self, outcome: Outcome) -> list[float | Tensor | None]:
        """The learning rate of each parameter group, as the step used it; None for an optimizer
        that did not step.
        """
        rates: list[float | Tensor | None] = []
        unseen = outcome in (Outcome.COMPILED, Outcome.UNSEEN)
        for number, leaf in enumerate(self.optimizers.leaves):
            if number in self._rates:
                rates += self._rates[number]
            elif unseen:
                rates += learning_rates(leaf)
            else:
                rates += [None] * len(leaf.param_groups)
        return rates

    def _rate(self, given: float | None, row: Row) -> float | None:
        """The rate of the step: the one passed, or that of the first group when it last stepped."""
        if given is not None:
            return given
        first = row.rates[0] if row.rates else None
        if isinstance(first, Tensor):
            return None  # known when the device is read
        self._first_rate = first if first is not None else self._first_rate
        return self._first_rate if self._stepped or first is not None else None

    def _begin_window(self) -> None:
        """Forget the step that has ended."""
        self._running.clear()
        self._stepped.clear()
        self._read.clear()
        self._rates.clear()
        if self._compiled and self.updates:  # no hook will run before the next step
            with self.guards.part("updates", _NO_UPDATES):
                self._open_turn(None, closure=True)

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
        check_belongs(tree.leaves, names_of(self.tiers.model))
        self.flush()
        if self.hooks is not None:
            self.hooks.remove()
            self.hooks = StepHooks(tree, self._before, self._after)
        self.optimizers, self.turn, self._compiled = tree, None, False
        self.usage = Usage(tree.leaves, self.record.warn)
        self._changes = ChangeCounts(tree.leaves)
        self._begin_window()
        if not self.inert:
            with self.guards.part("figures", _NO_FIGURES):
                self.tiers.set_optimisers(tree.leaves, self.count)

    def _compare_ranks(self) -> None:
        """Compare gradients across ranks, once per run; look at the result when the other ranks
        have answered.
        """
        try:
            if self.comparison is not None and self.comparison.step_ended():
                self.comparison = None
        except Exception as error:
            self.comparison = None
            logger.debug("jacdiag.watch: gradients could not be compared across ranks: %s", error)

    def _batch_seen(self) -> None:
        if self.batches is None:
            return
        with self.guards.part("batches", "no batch fingerprints and no kept batches from now on"):
            prints = self.batches.next_step(self.numbers.coming)
            self.record.prints.append(prints)
            if self.batches.failed is not None:
                error, self.batches.failed = self.batches.failed, None
                self.batches.remove()
                raise error
        with self.guards.part("silence", "what the watch does not see is not said"):
            kind = type(self.tiers.model).__name__
            self.record.silence.step_ended(kind, self.batches, self.tiers.probe_state())

    # -- hooks of the optimizers -------------------------------------------------------------------
    def _before(self, optimizer: Any, closure: bool) -> None:
        begun = time.perf_counter()
        number = self._number(optimizer)
        # 1. Place the call: an optimizer of its own, or the step of one inside another.
        if id(optimizer) in self._running:  # its last step ended with an exception
            self._running = self._running[: self._running.index(id(optimizer))]
        is_outermost = not self._running
        self._running.append(id(optimizer))
        if number is not None:
            self._note_step(number, optimizer)
            if self.comparison is not None:
                self.comparison.see(closure)
        # 2. Read the gradients that this optimizer is going to use.
        if not closure:
            self._gradients(optimizer, number)
        taken = time.perf_counter()
        self.clock.charge("figures", taken - begun)
        # 3. Keep the weights of the sub-layer whose turn it is.
        with self.guards.part("updates", _NO_UPDATES):
            self._open_turn(number, closure)
            if self.turn is not None and number is not None:
                self.turn.note_step(number)
        # 4. Compare the weights with what the last step has left.
        if is_outermost:
            with self.guards.part("writes", _NO_WRITES):
                self._look_for_writes(number)
        self.clock.charge("updates", time.perf_counter() - taken)

    def _after(self, optimizer: Any, closure: bool) -> None:
        begun = time.perf_counter()
        number = self._number(optimizer)
        if closure and number is not None:
            self._gradients(optimizer, number, before=False)
        if id(optimizer) in self._running:
            self._running = self._running[: self._running.index(id(optimizer))]
        with self.guards.part("updates", _NO_UPDATES):
            figures = self.tiers.figures
            if (
                self.turn is not None
                and figures is not None
                and self.guards.on("updates")
                and not self._running
            ):
                if self._stepped:
                    self.turn.measure(figures)
                else:
                    self.turn.drop()  # a wrapper that did not step, as in a micro-batch
        if not self._running:
            with self.guards.part("writes", _NO_WRITES):
                self._keep_weights(number)
        self.clock.charge("updates", time.perf_counter() - begun)

    def _look_for_writes(self, number: int | None) -> None:
        """Look for weights that were written since the last step of an optimizer, or of all inside
        a wrapper.
        """
        figures = self.tiers.figures
        if figures is None or not self.guards.on("writes") or not self.guards.on("figures"):
            return
        writes = self.tiers.writes
        if writes is None or writes.groups is not figures.groups:
            count = len(self.optimizers.leaves)
            writes = WeightWrites(
                figures.groups, self._holders(), count, figures.device, figures.capacity
            )
            self.tiers.writes = writes
            saved, self.tiers.saved_weights = self.tiers.saved_weights, None
            if saved is not None and not self.together.sharded:
                writes.load(*saved)
        for place in self._stepping(number):
            writes.begin(place, figures)

    def _keep_weights(self, number: int | None) -> None:
        """Keep a sample of what the step has left."""
        writes = self.tiers.writes
        if writes is None or not self.guards.on("writes"):
            return
        for place in self._stepping(number):
            writes.end(place, self.count + 1)

    def _stepping(self, number: int | None) -> Sequence[int]:
        """The optimizers whose weights the outermost step may move."""
        return range(len(self.optimizers.leaves)) if number is None else (number,)

    def _number(self, optimizer: Any) -> int | None:
        """The place of an optimizer among those that update parameters; None for a wrapper."""
        for number, leaf in enumerate(self.optimizers.leaves):
            if leaf is optimizer:
                return number
        return None

    def _note_step(self, number: int, optimizer: Any) -> None:
        """Note that an optimizer steps; drop the step before it if nobody has called `step` in
        between.
        """
        if number in self._stepped:
            self._stepped.clear()
            self._read.clear()
            self._rates.clear()
            if self.turn is not None:
                self.turn.drop()
            if self.tiers.figures is not None:
                self.tiers.figures.now.made = self.tiers.figures.now.weights_seen = False
        self._stepped.add(number)
        self.usage.optimizer_steps()
        self._rates[number] = learning_rates(optimizer)

    def _open_turn(self, number: int | None, closure: bool) -> None:
        figures = self.tiers.figures
        if (
            figures is None
            or not self.updates
            or not self.guards.on("updates")
            or not self.guards.on("figures")
        ):
            return
        if self.turn is None or self.turn.groups is not figures.groups:
            self.turn = UpdateTurn(
                figures.groups, self._holders(), len(self.optimizers.leaves), self.updates
            )
        self.turn.open(number, closure)

    def _holders(self) -> dict[int, int]:
        """Id of a parameter -> the number of the optimizer that updates it."""
        holders: dict[int, int] = {}
        for place, leaf in enumerate(self.optimizers.leaves):
            for parameter in self.optimizers.own_parameters(leaf):
                holders.setdefault(id(parameter), place)
        return holders

    def _gradients(self, optimizer: Any, number: int | None, *, before: bool = True) -> None:
        with self.guards.part("figures", _NO_FIGURES):
            if not self.guards.on("figures"):
                return
            figures = self.tiers.prepared(self.count, self.log_every)
            self.record.silence.look_at_gradients(
                self.tiers.names,
                self.tiers.model.parameters,
                lambda: parameters_of(self.optimizers.leaves),
            )
            if number is None:
                return  # the optimizers inside are going to step with them
            stepping: set[int] | None = None
            if len(self.optimizers.leaves) > 1:
                own = {id(p) for p in self.optimizers.own_parameters(optimizer)}
                stepping = own - self._read
                self._read |= own
            figures.gradients(stepping, *scaling(optimizer), before=before)
            if self.histograms.is_due(self.numbers.coming, self.numbers.stride):
                self.histograms.take_gradients(figures.groups, stepping)

    # -- the log -----------------------------------------------------------------------------------
    def _flush(self) -> None:
        begun = time.perf_counter()
        self.tiers.flush(self.clock)
        self.clock.charge("log", time.perf_counter() - begun)

    def flush(self) -> None:
        """Writes what is known so far; looks at the device."""
        if not self.inert and not self.closed:
            self._flush()
            self.record.wait()

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved with a checkpoint, so that the log goes on without gaps or doubles.

        Plain containers and tensors. Where weights are sharded, every rank has to ask.
        """
        self.flush()
        return {
            "version": 1,
            "step": self.count,
            "live": self.record.live.state(),
            "probe": self.tiers.fixed_probe(),
            "weights": self.tiers.weights_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`; to be called before the first step.

        Raises:
            UsageError: steps were made already, or the state is of another version.
        """
        if self.usage.called:
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
        self.tiers.set_probe(state["probe"])
        samples = state.get("weights")  # a state of an older version has none
        if samples:
            self.tiers.saved_weights = (dict(samples), self.count)

    def resume_at(self, step: int) -> None:
        """Goes on from a step without a state: the live rules begin anew, the log goes on there."""
        self._go_to(step)
        self.record.go_on(step, None)

    def _go_to(self, step: int) -> None:
        self.numbers.count = step
        if self.batches is not None:
            self.batches.step = step + 1

    @property
    def alerts(self) -> list[Alert]:
        return list(self.record.alerts)

    @property
    def findings(self) -> list[Alert]:
        """What the probes say of the model's init: a report, no alerts."""
        return list(self.record.findings)

    # -- the end -----------------------------------------------------------------------------------
    def close(self) -> None:
        """Writes what is left and takes everything off the model and the optimisers. May be called
        twice.
        """
        self._close(Ending(how="closed"))

    def _close(self, ending: Ending) -> None:
        if self.closed:
            return
        if os.getpid() != self.process:  # a copy that a fork has made: the run is the parent's
            self.closed = True
            return
        self.busy = True
        if not self.inert:
            self.usage.ended()
            if not (ending.is_alone and self.together.sharded):
                quietly(self._flush)
            if self._signal and not ending.reason:
                ending = replace(ending, reason=self._signal, has_flight=True)
            quietly(self.record.left, self.count, ending)
        self.closed = True
        for part in (self.hooks, self.batches, self.comparison):
            if part is not None:
                quietly(part.remove)
        if not self.inert:
            quietly(self.record.close, self.count, self.clock, self.tiers.looks)
        quietly(self.tiers.close)
        quietly(self.together.close)
        # Whoever keeps a closed watch does not keep the model with it.
        self.turn = self.hooks = self.batches = self.record.batches = self.comparison = None
        self.optimizers, self._changes = OptimizerTree(), ChangeCounts([])
        self._rates.clear()
        atexit.unregister(self._at_exit)
        self.busy = False
        ENDINGS.close(self)
        ENDINGS.settle()

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
        """Write the flight and close, because an exception was caught by nobody."""
        has_flight = not isinstance(error, AlertRaised)
        self._close(Ending.by_error(error, has_flight=has_flight, is_alone=True))

    def killed_by(self, name: str) -> None:
        """Write the flight and the last lines, because a signal is going to end the process."""
        if self.closed or self.inert:
            return
        # the loop may run in another thread: wait for the end of its step, but not for ever
        for _ in range(_LOOKS):
            if not self.busy:
                break
            time.sleep(_PAUSE)
        self.closed = True
        if not self.together.sharded:
            quietly(self._flush)
        quietly(self.record.left, self.count, Ending(how="signal", reason=name, has_flight=True))
        quietly(self.record.end, self.count, self.clock, self.tiers.looks)
        quietly(self.record.wait)
        quietly(self.record.close_sinks)

    def noticed(self, name: str) -> None:
        """Note a signal that the trainer handles: the flight is written when the step at hand has
        ended.
        """
        if not self.inert:
            self._signal = name
            self.record.line(
                "note", {"step": self.count, "text": f"{name} came; the trainer handles it"}
            )

    def _write_flight_of_signal(self) -> None:
        if self._signal:
            name, self._signal = self._signal, ""
            self._flush()
            self.record.dump(self.count, name)

    def interrupted_by(self, error: BaseException) -> None:
        """Write a flight and stay open: in an interactive session the loop may go on."""
        if self.inert or self.closed:
            return
        if not self.together.sharded:
            quietly(self._flush)
        self.record.line(
            "note", {"step": self.count, "text": f"the loop was left by {one_line(error)}"}
        )
        quietly(self.record.dump, self.count, one_line(error), Ending.by_error(error).how)
        quietly(self.record.wait)

    def ended_with_process(self) -> None:
        """Close, because the program ends without `close`."""
        self._close(Ending(how="exit"))

    def note(self, text: str) -> None:
        """Write a note to the log."""
        self.record.note(text)


def _close(ref: weakref.ref[Watch]) -> None:
    watch = ref()
    if watch is not None:
        watch.ended_with_process()


class ChangeCounts:
    """How often PyTorch has counted a change in place of some parameters; reads no device.

    Args:
        leaves: the optimizers whose parameters are looked at.
    """

    def __init__(self, leaves: Sequence[Any]) -> None:
        self.leaves = list(leaves)
        self._layout: list[tuple[int, int]] = []
        self._chosen: list[Tensor] = []
        self.last = self.read()

    def read(self) -> list[int]:
        """Return the counts as they are now, and keep them as the last ones."""
        layout = [
            _first_and_length(group["params"])
            for leaf in self.leaves
            for group in leaf.param_groups
        ]
        if layout != self._layout or not all(p.requires_grad for p in self._chosen):
            self._layout = layout
            parameters = [p for p in parameters_of(self.leaves) if p.requires_grad]
            self._chosen = parameters[:: max(len(parameters) // _SAMPLE, 1)]
        self.last = [p._version for p in self._chosen]
        return self.last


def _first_and_length(parameters: Sequence[Tensor]) -> tuple[int, int]:
    return (id(parameters[0]) if parameters else 0), len(parameters)


def _is_overflow(grad_norm: Any) -> bool:
    """Whether the gradient norm that the loop passed is known not to be finite; a tensor on a
    device is not read.
    """
    if isinstance(grad_norm, Tensor):
        if (
            grad_norm.device.type != "cpu"
            or grad_norm.numel() != 1
            or hasattr(grad_norm, "placements")
        ):
            return False
        return not math.isfinite(float(grad_norm))
    return isinstance(grad_norm, float) and not math.isfinite(grad_norm)
