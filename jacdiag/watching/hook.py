"""A running watch: the calls of the loop, the hooks of the optimisers, the end."""

from __future__ import annotations

import atexit
import time
import weakref
from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer

from jacdiag.errors import UsageError
from jacdiag.report.runlog import Alert
from jacdiag.watching.batches import Batches
from jacdiag.watching.cadence import Clock
from jacdiag.watching.figures import GIVEN, GIVEN_PART, LOSS, UpdateTurn
from jacdiag.watching.guards import Guards, quietly
from jacdiag.watching.optimisers import (
    StepHooks,
    learning_rates,
    scaling,
)
from jacdiag.watching.record import Record
from jacdiag.watching.tiers import Tiers
from jacdiag.watching.together import Together
from jacdiag.watching.usage import Usage

_NO_FIGURES = "no figures of single steps from now on"
_NO_UPDATES = "no update norms from now on"


class Watch:
    """A running watch; see `jacdiag.watch`.

    Attributes:
        count: optimiser steps so far, skipped ones included.
        alerts: those of this session.
        closed: nothing of it is left on the model and the optimisers.
    """

    def __init__(
        self, model: nn.Module, optimisers: list[Optimizer], together: Together, record: Record, tiers: Tiers,
        log_every: int, updates: bool, keep_batches: int,
    ) -> None:  # fmt: skip
        self.optimisers, self.together, self.record, self.tiers = optimisers, together, record, tiers
        self.guards: Guards = record.guards
        self.count, self.log_every, self.updates = record.resumed_at, log_every, updates
        self.clock = Clock()
        self.closed = False
        self.usage = Usage(len(optimisers), record.warn)
        self.turn: UpdateTurn | None = None
        self.inert = not together.lead and not together.sharded  # every rank knows the same: one of them speaks
        self.batches: Batches | None = None
        self.hooks: StepHooks | None = None
        if not self.inert:
            keeps = record.recorder is not None
            self.batches = Batches(model, fingerprints=keeps, keep=keep_batches if keeps else 0)
            self.hooks = StepHooks(optimisers, self._before, self._behind)
        tiers.batches = record.batches = self.batches
        self._at_exit = partial(_close, weakref.ref(self))  # a loop may end without close(), and lines may wait
        atexit.register(self._at_exit)

    def __str__(self) -> str:
        """Return how far the watch is, and what it said in this session."""
        state = "closed" if self.closed else "running"
        steps = "1 step" if self.count == 1 else f"{self.count} steps"
        alerts = [f"  {alert}" for alert in self.alerts]
        said = "1 alert" if len(alerts) == 1 else f"{len(alerts)} alerts"
        return "\n".join([f"Watch, {state}: {steps}, {said}", *alerts])

    # -- the loop --------------------------------------------------------------------------------------------------
    def step(self, loss: Any, *, grad_norm: Any = None, lr: float | None = None, tokens: int | None = None) -> None:
        """To be called once per optimiser step, behind it.

        Args:
            loss: of this step, a tensor or a number; None where the loop does not know it.
            grad_norm: what `clip_grad_norm_` returned, if the loop clips.
            lr: the learning rate; that of the optimiser's first group if not given.
            tokens: tokens so far, or in this step; written to the log as it is.

        Raises:
            UsageError: the watch is closed.
            AlertRaised: an alert, with `on_alert="raise"`.
        """
        if self.closed:
            raise UsageError("step of a watch that is closed", hint="call it inside the `with` block")
        self.count += 1
        self.usage.step_called()
        if self.inert:
            return
        begun = time.perf_counter()
        passed = self.clock.step_ended(begun)
        with self.guards.part("figures", _NO_FIGURES):
            if self.guards.on("figures"):
                self._put(loss, grad_norm, lr, tokens, passed)
        self._batch_seen()
        self.clock.charge("figures", time.perf_counter() - begun)
        figures = self.tiers.figures
        if figures is not None and (figures.full or self.guards.off.get("figures")):
            self._flush()
        self.tiers.run(self.count, self.clock)
        self.clock.begin(time.perf_counter())
        self.record.raise_alert()

    def prepare(self) -> None:
        """Finds the sub-layers and runs the first probe now, before the first update; done at that update otherwise.

        For loops whose gradients are made inside the optimiser's step: there the first update comes too early.
        """
        if self.inert or self.closed:
            return
        with self.guards.part("figures", _NO_FIGURES):
            if self.guards.on("figures"):
                self.tiers.prepared(self.count, self.log_every)

    def _put(self, loss: Any, grad_norm: Any, lr: float | None, tokens: int | None, passed: float | None) -> None:
        figures = self.tiers.prepared(self.count - 1, self.log_every)
        if loss is not None:
            figures.put(LOSS, loss)
            figures.now.told = True
        if grad_norm is not None:
            placements = getattr(grad_norm, "placements", ())
            if any(p.is_partial() for p in placements):  # FSDP2's norm of this rank's pieces
                figures.put(GIVEN_PART, grad_norm.to_local().detach().square())
            else:
                figures.put(GIVEN, grad_norm)
        rate = lr if lr is not None else next(learning_rates(self.optimisers), None)
        figures.close_row(self.count, float("nan") if passed is None else passed, rate, tokens)

    def _batch_seen(self) -> None:
        if self.batches is None:
            return
        with self.guards.part("batches", "no batch fingerprints and no kept batches from now on"):
            prints = self.batches.next_step(self.count + 1)
            self.record.prints.append(prints)
            if self.batches.failed is not None:
                error, self.batches.failed = self.batches.failed, None
                self.batches.remove()
                raise error

    # -- hooks of the optimisers ------------------------------------------------------------------------------------
    def _before(self, optimiser: Optimizer, closure: bool) -> None:
        begun = time.perf_counter()
        self.usage.optimiser_steps()
        if not closure:
            self._gradients(optimiser)
        taken = time.perf_counter()
        self.clock.charge("figures", taken - begun)
        figures = self.tiers.figures
        with self.guards.part("updates", _NO_UPDATES):
            if figures is not None and self.updates and self.guards.on("updates") and self.guards.on("figures"):
                if self.turn is None or self.turn.groups is not figures.groups:
                    self.turn = UpdateTurn(figures.groups)
                self.turn.open(_held(optimiser), closure)
        self.clock.charge("updates", time.perf_counter() - taken)

    def _behind(self, optimiser: Optimizer, closure: bool) -> None:
        begun = time.perf_counter()
        if closure:
            self._gradients(optimiser)
        with self.guards.part("updates", _NO_UPDATES):
            if self.turn is not None and self.tiers.figures is not None and self.guards.on("updates"):
                self.turn.close(self.tiers.figures)
        self.clock.charge("updates", time.perf_counter() - begun)

    def _gradients(self, optimiser: Optimizer) -> None:
        with self.guards.part("figures", _NO_FIGURES):
            if self.guards.on("figures"):
                figures = self.tiers.prepared(self.count, self.log_every)
                if self.usage.untold:
                    figures.now.made = False  # the figures of the last step stand
                several = len(self.optimisers) > 1
                figures.gradients({id(p) for p in _held(optimiser)} if several else None, *scaling(optimiser))

    # -- the log ---------------------------------------------------------------------------------------------------
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
        return {"version": 1, "step": self.count, "live": self.record.live.state(), "probe": self.tiers.fixed_probe()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`; to be called before the first step.

        Raises:
            UsageError: steps were made already, or the state is of another version.
        """
        if self.usage.called:
            raise UsageError("load_state_dict after a step", hint="call it right after jacdiag.watch(..., resume=True)")
        if state.get("version") != 1:
            raise UsageError("a watch cannot go on from this state", got=f"version {state.get('version')!r}")
        self.count = int(state["step"])
        self.record.go_on(self.count, state["live"])
        self.tiers.set_probe(state["probe"])

    def resume_at(self, step: int) -> None:
        """Goes on from a step without a state: the live rules begin anew, the log goes on there."""
        self.count = step
        self.record.go_on(step, None)

    @property
    def alerts(self) -> list[Alert]:
        return list(self.record.alerts)

    # -- the end ---------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Writes what is left and takes everything off the model and the optimisers. May be called twice."""
        if self.closed:
            return
        if not self.inert:
            self.usage.ended()
            quietly(self._flush)
        self.closed = True
        for part in (self.hooks, self.batches):
            if part is not None:
                quietly(part.remove)
        if not self.inert:
            quietly(self.record.close, self.count, self.clock, self.tiers.looks)
        quietly(self.tiers.close)
        quietly(self.together.close)
        # Whoever keeps a closed watch does not keep the model with it.
        self.turn = self.hooks = self.batches = self.record.batches = None
        self.optimisers = []
        atexit.unregister(self._at_exit)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self.inert and not self.closed:
            quietly(self._flush)
            quietly(self.record.crashed, self.count, error)
        self.close()


def _close(ref: weakref.ref[Watch]) -> None:
    watch = ref()
    if watch is not None:
        watch.close()


def _held(optimiser: Optimizer) -> list[torch.Tensor]:
    return [p for group in optimiser.param_groups for p in group["params"]]
