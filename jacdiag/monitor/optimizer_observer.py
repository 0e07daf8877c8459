"""What a watch reads around each step of an optimizer: gradients, learning rates and updates."""

from __future__ import annotations

import time
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor

from jacdiag.monitor.guards import logger, quietly
from jacdiag.monitor.histograms import Histograms
from jacdiag.monitor.log.events import RunEvents
from jacdiag.monitor.measurements import Measurements
from jacdiag.monitor.optimizers import OptimizerTree, learning_rates, parameters_of, scaling
from jacdiag.monitor.rank_comparison import RankComparison
from jacdiag.monitor.schedule import Clock
from jacdiag.monitor.step_hooks import StepHooks
from jacdiag.monitor.step_metrics import StepMetrics, StepRow, UpdateTurn
from jacdiag.monitor.step_numbers import StepNumbers
from jacdiag.monitor.step_usage import StepOutcome, StepUsage
from jacdiag.monitor.weight_writes import WeightWrites

NO_FIGURES = "no figures of single steps from now on"
_NO_UPDATES = "no update norms from now on"
_NO_WRITES = "writes to weights between the steps are not looked for from now on"
_RATE_JUMP = 2.0  # times the rate of the step before; a warm-up beyond its first steps is slower
_SAMPLE = 32  # parameters whose count of changes is looked at
_REQUIRES_GRAD, _VERSION = attrgetter("requires_grad"), attrgetter("_version")
_NO_HOOK_RAN = (StepOutcome.COMPILED, StepOutcome.REPLAYED, StepOutcome.UNSEEN)
# Every optimizer counts as having stepped in these: no hook says which did.
_ALL_STEP = (StepOutcome.COMPILED, StepOutcome.REPLAYED)


class OptimizerObserver:
    """Hooks before and after the optimizers' steps, and what they have read of the step at hand.

    A step of the run lies between two calls of `Watch.step`. In it, each optimizer may step once.

    Args:
        optimizers: those of the watched model.
        measurements: gets what is read.
        record: the log of the run.
        numbers: of the steps.
        clock: charged with the seconds that the hooks take.
        histograms: of gradients, at the steps at which they are due.
        is_inert: whether another rank does all the work, so that this one attaches no hooks.
        log_every: steps between two looks at the device.
        update_every: steps between two update norms; 0 for none. None measures one at every step of
            a young run, one at every fourth step later, and again one at every step for a while
            once a learning rate jumps or an update leaps.
        owner: the watch. The hooks keep it alive as long as they are on the optimizers.

    Attributes:
        usage: counts the optimizer steps between two calls of `Watch.step`.
    """

    def __init__(
        self,
        optimizers: OptimizerTree,
        measurements: Measurements,
        record: RunEvents,
        numbers: StepNumbers,
        clock: Clock,
        histograms: Histograms,
        *,
        is_inert: bool,
        log_every: int,
        update_every: int | None,
        owner: Any,
    ) -> None:
        self.optimizers = optimizers
        self.measurements = measurements
        self.record = record
        self.guards = record.guards
        self.numbers = numbers
        self.clock = clock
        self.histograms = histograms
        self.is_inert = is_inert
        self.log_every = log_every
        self.update_every = update_every
        self.owner = owner

        self.usage = StepUsage(optimizers.leaves, record.warn)
        self.hooks: StepHooks | None = None
        self.turn: UpdateTurn | None = None
        self._is_compiled = False
        self._changes = ChangeCounts(optimizers.leaves)
        self._first_rate: float | None = None  # of the first parameter group's last step

        # What was seen since the last call of `Watch.step`. An optimizer that updates parameters is
        # known by its place among `optimizers.leaves`.
        self._running: list[int] = []  # ids of those whose step is running, the outermost first
        self._stepped: set[int] = set()  # places of those that stepped
        self._read: set[int] = set()  # ids of the parameters whose gradients are in the row
        self._rates: dict[int, list[float | Tensor | None]] = {}  # place -> rates of its groups
        self._last_rates: dict[int, list[float | Tensor | None]] = {}  # those of the step before

        self.comparison = RankComparison.begin(
            measurements.together, optimizers.leaves, record.warn, attach=is_inert
        )

    # -- attaching and removing --------------------------------------------------------------------
    def attach(self) -> None:
        """Put the hooks on the optimizers."""
        self.hooks = StepHooks(self.optimizers, self._before_step, self._after_step)

    def set_optimizers(self, tree: OptimizerTree) -> None:
        """Observe other optimizers from now on."""
        if self.hooks is not None:
            self.hooks.remove()
            self.hooks = StepHooks(tree, self._before_step, self._after_step)
        self.optimizers = tree
        self.turn = None
        self._is_compiled = False
        self.usage = StepUsage(tree.leaves, self.record.warn)
        self._changes = ChangeCounts(tree.leaves)
        self._last_rates.clear()
        self.begin_step()

    def remove(self) -> None:
        """Take the hooks off the optimizers."""
        for attached in (self.hooks, self.comparison):
            # If one of them cannot be removed, the other still is.
            if attached is not None:
                quietly(attached.remove)

    def release(self) -> None:
        """Let go of the optimizers and the model, for whoever keeps a closed watch."""
        self.turn = self.hooks = self.comparison = None
        self.optimizers = OptimizerTree()
        self._changes = ChangeCounts([])
        self._rates.clear()
        self._last_rates.clear()

    def parameters(self) -> list[Tensor]:
        """Return all parameters that the optimizers hold, each once."""
        return parameters_of(self.optimizers.leaves)

    # -- calls of the watch ------------------------------------------------------------------------
    def compare_ranks(self) -> None:
        """Go on with the comparison of gradients across ranks, which is made once per run."""
        if self.comparison is None:
            return
        try:
            if self.comparison.step_ended():
                self.comparison = None
        except Exception as error:
            self.comparison = None
            logger.debug("jacdiag.watch: gradients could not be compared across ranks: %s", error)

    def prepare(self) -> None:
        """Measure before the first update; see `Watch.prepare`."""
        # 1. The buffer. Inside a step the gradients are those before clipping.
        measurements = self.measurements
        with self.guards.part("figures", NO_FIGURES):
            if self.guards.on("figures"):
                metrics = measurements.prepared(self.numbers.count, self.log_every)
                if self._running and self._stepped:
                    metrics.look_before_update()

        # 2. The weights, if they were compared when this step began.
        with self.guards.part("writes", _NO_WRITES):
            writes, buffer = measurements.writes, measurements.metrics
            if self._running and writes is not None and buffer is not None:
                writes.look_again(buffer)

    def take_outcome(self) -> StepOutcome:
        """Return what was seen of the optimizers since the last call; reads no device."""
        # 1. What compiled code has noted, and what has counted the changes of parameters.
        has_changed = self._changes.last != self._changes.read()
        ran_compiled = self.hooks is not None and self.hooks.mark.ran
        if self.hooks is not None:
            self.hooks.mark.ran = False

        # 2. What has seen the step most exactly counts.
        if ran_compiled:
            self._is_compiled = True
            return StepOutcome.COMPILED
        if self._stepped:
            self._note_seen()
            return StepOutcome.SEEN
        if self._may_be_replayed():
            return StepOutcome.REPLAYED
        if has_changed:
            return StepOutcome.UNSEEN
        return StepOutcome.NONE

    def _note_seen(self) -> None:
        """Note a step whose hooks ran."""
        if self.hooks is not None:
            self.hooks.captured.step_seen()

    def _may_be_replayed(self) -> bool:
        """Return whether steps may be replays of a CUDA graph, which call no hook."""
        return self.hooks is not None and self.hooks.captured.may_be_replayed

    def complete_row(self, outcome: StepOutcome) -> StepMetrics:
        """Add to the row at hand what the hooks have left, and what they could not read.

        Args:
            outcome: what was seen of the optimizers in this step.

        Returns:
            The buffer with the row at hand.
        """
        # 1. The buffer. Without a hook the update has already been made.
        is_unseen = outcome in _NO_HOOK_RAN
        last_step = self.numbers.count if is_unseen else self.numbers.count - 1
        metrics = self.measurements.prepared(last_step, self.log_every)
        metrics.now.optimizer_step = outcome
        metrics.now.stepped_before = self.usage.ever

        # 2. Gradients of a step that no hook has seen.
        if is_unseen:
            self._read_late(metrics)
            if self.measurements.writes is not None:
                self.measurements.writes.forget()

        # 3. The update norm.
        with self.guards.part("updates", _NO_UPDATES):
            if self.turn is not None and self.guards.on("updates"):
                self._close_turn(self.turn, metrics, outcome)
        return metrics

    def _read_late(self, metrics: StepMetrics) -> None:
        """Take the gradients after a step that was not seen, if they have not been cleared."""
        has_gradients = any(p.grad is not None for p in self.parameters())
        if not has_gradients:
            return
        metrics.gradients(None, None, None, before=False)
        metrics.now.late = True

    def _close_turn(self, turn: UpdateTurn, metrics: StepMetrics, outcome: StepOutcome) -> None:
        if outcome in _ALL_STEP and turn.opened:
            for place in range(len(self.optimizers.leaves)):
                turn.note_step(place)
            turn.measure(metrics)
            turn.touched = True
        turn.close(metrics)

    def rates_of_groups(self, outcome: StepOutcome) -> list[float | Tensor | None]:
        """Return the learning rate of each parameter group, as the step used it.

        Args:
            outcome: what was seen of the optimizers in this step.

        Returns:
            One rate per group, in the optimizers' order. None for those of an optimizer that did
            not step.
        """
        rates: list[float | Tensor | None] = []
        for place, leaf in enumerate(self.optimizers.leaves):
            if place in self._rates:
                rates += self._rates[place]
            elif outcome is StepOutcome.REPLAYED:
                rates += self._rates_of_replay(leaf)
            elif outcome in _NO_HOOK_RAN:
                rates += learning_rates(leaf)
            else:
                rates += [None] * len(leaf.param_groups)
        return rates

    def _rates_of_replay(self, leaf: Any) -> list[float | Tensor | None]:
        """Return the learning rates of a step that is replayed.

        A rate that was a number when the step was captured is a part of the graph: a scheduler that
        changes it later changes nothing.
        """
        rates = learning_rates(leaf)
        if self.hooks is None:
            return rates
        in_graph = self.hooks.captured.rates.get(id(leaf), [])
        for place, rate in enumerate(in_graph[: len(rates)]):
            if rate is not None:
                rates[place] = rate
        return rates

    def rate_of_step(self, passed_rate: float | None, row: StepRow) -> float | None:
        """Return the passed rate, or the one that the first group had when it last stepped."""
        if passed_rate is not None:
            return passed_rate

        # 1. The rate of this step, if the first optimizer stepped.
        first = row.rates[0] if row.rates else None
        if isinstance(first, Tensor):
            return None  # known when the device is read
        if first is not None:
            self._first_rate = first

        # 2. Else its last one, if another optimizer stepped.
        if self._stepped or first is not None:
            return self._first_rate
        return None

    def begin_step(self) -> None:
        """Forget the step that has ended."""
        self._running.clear()
        self._stepped.clear()
        self._read.clear()
        self._rates.clear()
        # No hook will run before the next step of compiled code, or before a replay.
        runs_without_hooks = self._is_compiled or self._may_be_replayed()
        if runs_without_hooks and self.update_every != 0:
            with self.guards.part("updates", _NO_UPDATES):
                self._open_turn(None, has_closure=True)

    # -- hooks of the optimizers -------------------------------------------------------------------
    def _before_step(self, optimizer: Any, has_closure: bool) -> None:
        self.measurements.wait_before_first()
        started = time.perf_counter()
        place = self._place_of(optimizer)

        # 1. Note the call: an optimizer of its own, or the step of one inside another.
        self._leave(optimizer)  # it is still there if its last step ended with an exception
        is_outermost = not self._running
        self._running.append(id(optimizer))
        if place is not None:
            self._note_step(place, optimizer)
            if self.comparison is not None:
                self.comparison.see(has_closure)

        # 2. Read the gradients that this optimizer is going to use.
        if not has_closure:
            self._read_gradients(optimizer, place)
        gradients_read = time.perf_counter()
        self.clock.charge("figures", gradients_read - started)

        # 3. Keep the weights of the sub-layer whose turn it is.
        with self.guards.part("updates", _NO_UPDATES):
            self._open_turn(place, has_closure)
            if self.turn is not None and place is not None:
                self.turn.note_step(place)

        # 4. Compare the weights with what the last step has left.
        if is_outermost:
            with self.guards.part("writes", _NO_WRITES):
                self._look_for_writes(place)
        self.clock.charge("updates", time.perf_counter() - gradients_read)

    def _after_step(self, optimizer: Any, has_closure: bool) -> None:
        started = time.perf_counter()
        place = self._place_of(optimizer)

        # 1. With a closure the gradients were computed inside the step.
        if has_closure and place is not None:
            self._read_gradients(optimizer, place, before=False)
        self._leave(optimizer)
        is_outermost = not self._running

        # 2. Measure what the outermost step has moved.
        with self.guards.part("updates", _NO_UPDATES):
            if is_outermost:
                self._measure_update()

        # 3. Keep a sample of the weights for the next step.
        if is_outermost:
            with self.guards.part("writes", _NO_WRITES):
                self._keep_weights(place)
        self.clock.charge("updates", time.perf_counter() - started)

    def _leave(self, optimizer: Any) -> None:
        """Note that the step of an optimizer, and all steps inside it, are over."""
        if id(optimizer) in self._running:
            self._running = self._running[: self._running.index(id(optimizer))]

    def _measure_update(self) -> None:
        metrics = self.measurements.metrics
        if self.turn is None or metrics is None:
            return
        if not self.guards.on("updates"):
            return

        # A wrapper may not step at all, as in a micro-batch.
        if self._stepped:
            self.turn.measure(metrics)
        else:
            self.turn.drop()

    def _look_for_writes(self, place: int | None) -> None:
        """Look for weights that were written since the last step.

        Args:
            place: of the optimizer that steps; None for a wrapper around all of them.
        """
        # 1. What is noted of them goes into the row at hand.
        metrics = self.measurements.metrics
        if metrics is None:
            return
        if not self.guards.on("writes") or not self.guards.on("figures"):
            return

        # 2. Compare the weights of the optimizers that step now.
        writes = self.measurements.writes
        if writes is None or writes.groups is not metrics.groups:
            writes = self._make_weight_writes(metrics)
        for stepping in self._places_stepping(place):
            writes.begin(stepping, metrics)

    def _make_weight_writes(self, metrics: StepMetrics) -> WeightWrites:
        """Begin to look for writes; go on from the samples of a checkpoint, if there are some."""
        writes = WeightWrites(
            metrics.groups,
            self._holders(),
            len(self.optimizers.leaves),
            metrics.device,
        )
        self.measurements.writes = writes
        saved = self.measurements.saved_weights
        self.measurements.saved_weights = None
        if saved is not None and not self.measurements.together.sharded:
            writes.load(*saved)
        return writes

    def _keep_weights(self, place: int | None) -> None:
        """Keep a sample of what the step has left."""
        writes = self.measurements.writes
        if writes is None:
            return
        if not self.guards.on("writes"):
            return
        for stepping in self._places_stepping(place):
            writes.end(stepping, self.numbers.count + 1)

    def _places_stepping(self, place: int | None) -> Sequence[int]:
        """Return the places of the optimizers whose weights the outermost step may move."""
        if place is None:
            return range(len(self.optimizers.leaves))
        return (place,)

    def _place_of(self, optimizer: Any) -> int | None:
        """Return the place of an optimizer that updates parameters; None for a wrapper."""
        for place, leaf in enumerate(self.optimizers.leaves):
            if leaf is optimizer:
                return place
        return None

    def _note_step(self, place: int, optimizer: Any) -> None:
        """Note that an optimizer steps.

        If it has stepped since the last call of `Watch.step`, what that step has left is dropped.
        """
        if place in self._stepped:
            self._drop_step()
        self._stepped.add(place)
        self.usage.optimizer_steps()
        rates = learning_rates(optimizer)
        self._rates[place] = rates
        if _has_jumped(rates, self._last_rates.get(place, [])):
            self.look_closely()
        self._last_rates[place] = rates

    def look_closely(self) -> None:
        """Measure the update norm at each of the next steps."""
        if self.turn is not None:
            self.turn.look_closely()

    def _drop_step(self) -> None:
        self._stepped.clear()
        self._read.clear()
        self._rates.clear()
        if self.turn is not None:
            self.turn.drop()
        metrics = self.measurements.metrics
        if metrics is not None:
            metrics.now.has_gradients = False
            metrics.now.weights_seen = False

    def _open_turn(self, place: int | None, has_closure: bool) -> None:
        """Choose the sub-layer whose update is measured, and keep its weights."""
        metrics = self.measurements.metrics
        if metrics is None or self.update_every == 0:
            return
        if not self.guards.on("updates") or not self.guards.on("figures"):
            return

        # Begin again if the sub-layers are others than before.
        if self.turn is None or self.turn.groups is not metrics.groups:
            count = len(self.optimizers.leaves)
            self.turn = UpdateTurn(metrics.groups, self._holders(), count, self.update_every)
        self.turn.open(place, has_closure)

    def _holders(self) -> dict[int, int]:
        """Map the id of a parameter to the place of the optimizer that updates it."""
        holders: dict[int, int] = {}
        for place, leaf in enumerate(self.optimizers.leaves):
            for parameter in self.optimizers.own_parameters(leaf):
                # Of several optimizers with one parameter the first counts.
                holders.setdefault(id(parameter), place)
        return holders

    def _read_gradients(self, optimizer: Any, place: int | None, *, before: bool = True) -> None:
        """Read the gradients that an optimizer uses.

        Args:
            optimizer: the one that steps.
            place: of it; None for a wrapper, whose optimizers inside read their own.
            before: whether the step is still to be made.
        """
        with self.guards.part("figures", NO_FIGURES):
            if not self.guards.on("figures"):
                return
            measurements = self.measurements
            metrics = measurements.prepared(self.numbers.count, self.log_every)
            self.record.silence.look_at_gradients(
                measurements.names, measurements.model.parameters, self.parameters
            )
            if place is None:
                return

            # Of several optimizers each reads its own parameters, and no parameter is read twice.
            stepping: set[int] | None = None
            if len(self.optimizers.leaves) > 1:
                own = {id(p) for p in self.optimizers.own_parameters(optimizer)}
                stepping = own - self._read
                self._read |= own
            metrics.gradients(stepping, *scaling(optimizer), before=before)
            if self.histograms.is_due(self.numbers.coming, self.numbers.stride):
                self.histograms.take_gradients(metrics.groups, stepping)


def _has_jumped(
    rates: Sequence[float | Tensor | None], before: Sequence[float | Tensor | None]
) -> bool:
    """Return whether a parameter group's learning rate has risen by more than `_RATE_JUMP` times.

    A rate that lies on a device is not looked at, because the host would have to wait for it.
    """
    for rate, earlier in zip(rates, before, strict=False):
        if not isinstance(rate, float) or not isinstance(earlier, float):
            continue

        # A warm-up begins at zero, which is no jump.
        if 0 < _RATE_JUMP * earlier < rate:
            return True
    return False


class ChangeCounts:
    """How often PyTorch has counted a change in place of some parameters; reads no device.

    Args:
        leaves: the optimizers whose parameters are looked at.
    """

    def __init__(self, leaves: Sequence[Any]) -> None:
        self.leaves = list(leaves)
        self._layout: list[tuple[int, int]] = []
        self._sample: list[Tensor] = []
        self.last = self.read()

    def read(self) -> list[int]:
        """Return the counts as they are now, and keep them as the last ones."""
        # 1. Take another sample if the parameters of the optimizers have changed.
        layout = [
            _first_and_length(group["params"])
            for leaf in self.leaves
            for group in leaf.param_groups
        ]
        if layout != self._layout or not all(map(_REQUIRES_GRAD, self._sample)):
            self._layout = layout
            parameters = [p for p in parameters_of(self.leaves) if p.requires_grad]
            self._sample = parameters[:: max(len(parameters) // _SAMPLE, 1)]

        # 2. Read its counts.
        self.last = list(map(_VERSION, self._sample))
        return self.last


def _first_and_length(parameters: Sequence[Tensor]) -> tuple[int, int]:
    """Return what shows that a parameter group holds other parameters than before."""
    first = id(parameters[0]) if parameters else 0
    return first, len(parameters)
