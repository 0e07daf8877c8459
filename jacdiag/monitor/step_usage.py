"""Check how `step` is called, and that the optimizer's steps are seen; warn once if not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

_UNSEEN = 5  # steps that moved the weights unseen; one or two may be an edit of the weights by hand
_NEVER = 24  # calls without any step: a loss scaler that starts at 2^16 needs at most 16 to reach 1
# equal counts of calls per step in a row; a loss scaler skips now and then, not in a rhythm
_REPEATS = 6


class StepOutcome(StrEnum):
    """What was seen of the optimizers between two calls of `step`.

    Attributes:
        SEEN: the hooks of a step ran.
        COMPILED: a step ran that `torch.compile` had compiled; its hooks are not in it.
        REPLAYED: no hook ran, after a step had been captured into a CUDA graph. A replay of it runs
            no Python code, so that it cannot be distinguished from a step that was left out.
        UNSEEN: no hook ran, and the weights changed.
        NONE: no hook ran, and the weights did not change as far as PyTorch counts changes.
    """

    SEEN = "seen"
    COMPILED = "compiled"
    REPLAYED = "replayed"
    UNSEEN = "unseen"
    NONE = "none"


class StepUsage:
    """A count of the optimizer steps between calls of `step`.

    Args:
        optimizers: those that are watched.
        warn: called with (topic, text) if something is wrong.

    Attributes:
        stepped: optimizer steps since the last call.
        ever: an optimizer step was seen.
        called: `step` was called.
    """

    def __init__(self, optimizers: Sequence[Any], warn: Callable[[str, str], None]) -> None:
        """Begin before the first step; see the class for the arguments."""
        self.kinds = " and ".join(
            dict.fromkeys(type(optimizer).__name__ for optimizer in optimizers)
        )
        self.count = len(optimizers)
        self.warn = warn
        self.stepped = 0
        self.called = False
        self.ever = False
        self._seen = False  # a hook ran
        self._unseen = 0  # steps in a row that moved the weights unseen
        self._without = 0  # calls before the first step
        self._calls = 0  # calls since the last one that had a step before it
        self._calls_before = 0  # the same before that call
        self._repeats = 0  # how often in a row both were equal

    def optimizer_steps(self) -> None:
        """Count a step of one optimizer."""
        self.stepped += 1
        self.ever = True
        self._seen = True
        if self.stepped == 100 * self.count:
            self.warn(
                "use",
                "100 optimizer steps without a call of step: call w.step(loss) once per optimizer "
                "step",
            )

    def step_called(self, outcome: StepOutcome, *, overflow: bool = False) -> None:
        """Take what was seen since the last call.

        Args:
            outcome: of the optimizers.
            overflow: the gradient norm that the loop passed was not finite, so that a missing step
                is explained.
        """
        self.stepped = 0
        self.called = True
        # 1. Steps that no hook has seen.
        if outcome is StepOutcome.COMPILED:
            self._explain_compiled()
        if outcome is StepOutcome.REPLAYED:
            self._explain_replayed()
        if outcome is StepOutcome.UNSEEN:
            self._unseen += 1
        else:
            self._unseen = 0
        if self._unseen == _UNSEEN:
            self.warn("unseen", self._unseen_text())
        if outcome is not StepOutcome.NONE:
            self.ever = True

        # 2. Calls without a step. An overflow explains one.
        if overflow:
            return
        if not self.ever:
            self._without += 1
            if self._without == _NEVER:
                self.warn("unseen", self._never_text())
        self._count_calls(outcome)

    def _count_calls(self, outcome: StepOutcome) -> None:
        """Notice several calls per optimizer step, the same number each time."""
        if outcome is StepOutcome.NONE:
            self._calls += 1
            return
        # A loss scaler leaves steps out as well, but not the same number each time.
        if self._calls > 0 and self._calls == self._calls_before:
            self._repeats += 1
        else:
            self._repeats = 0
        self._calls_before = self._calls
        self._calls = 0
        if self._repeats == _REPEATS:
            self.warn(
                "use",
                f"step was called {self._calls_before + 1} times for each step of the optimizer: "
                "call it once per optimizer step, after optimizer.step()",
            )

    def _explain_compiled(self) -> None:
        """Say what differs if the step is compiled."""
        self.warn(
            "compiled",
            f"the step of {self.kinds} runs compiled by torch.compile, and the hooks of the watch "
            "are not in it: gradient norms are read at w.step(), and the update norm keeps a copy "
            "of one sub-layer between two calls. Call optimizer.zero_grad() after w.step(loss), or "
            "no gradient is left to read; pass lr= if a scheduler steps before w.step()",
        )

    def _explain_replayed(self) -> None:
        """Say what is read and what is not if the step is replayed."""
        self.warn(
            "replayed",
            f"the step of {self.kinds} was captured into a CUDA graph, and a replay of it calls no "
            "hook of the watch. Gradient norms are read at w.step(), if the gradients are still "
            "there then, and the update norm keeps a copy of one sub-layer between two calls. What "
            "cannot be measured: whether a step was left out, weights that are not finite before "
            "the step, weights that something else has written, and histograms of gradients. The "
            "batches are not seen either if the forward is in the graph. Call w.step(loss) once "
            "after each graph.replay()",
        )

    def _unseen_text(self) -> str:
        """Return what is wrong if the weights change and no step is seen."""
        # 1. Steps were seen before.
        if self._seen:
            return (
                f"no optimizer step seen: step() of {self.kinds} has not been called for "
                f"{_UNSEEN} steps, though the weights change. If another optimizer has taken over, "
                "call w.set_optimizer(optimizer)"
            )

        # 2. None was seen from the start.
        return (
            f"no optimizer step seen: the weights change, but step() of {self.kinds} is not "
            "called. Gradient norms are read at w.step() if the gradients are still there then: "
            "clear them after it. Update norms need the optimizer whose step() is called"
        )

    def _never_text(self) -> str:
        """Return what is wrong if nothing changes and no step is seen."""
        return (
            f"no optimizer step seen: step() of {self.kinds} was not called in the first {_NEVER} "
            "calls of w.step(). Either another optimizer steps, which is the one to pass to the "
            "watch, or a loss scaler leaves out every step because gradients are not finite. "
            "w.step(loss, grad_norm=norm) with the norm of the unscaled gradients tells which"
        )

    def ended(self) -> None:
        """Warn if `step` was never called in a run with optimizer steps."""
        if self.stepped and not self.called:
            self.warn("use", "step was never called: call w.step(loss) once per optimizer step")
