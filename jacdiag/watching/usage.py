"""Is `step` called where it is meant to be? A wrong place is told, once, and nothing else happens."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

_LOOK_BACK = 24


class Usage:
    """Counts optimiser steps between calls of `step`.

    Args:
        optimisers: how many there are; each steps once per step.
        warn: told of a wrong place.

    Attributes:
        stepped: optimiser steps since the last call.
    """

    def __init__(self, optimisers: int, warn: Callable[[str, str], None]) -> None:
        self.optimisers, self.warn = optimisers, warn
        self.stepped, self.called = 0, False
        self.idle: deque[bool] = deque(maxlen=_LOOK_BACK)

    @property
    def untold(self) -> bool:
        """Whether an optimiser steps anew and nobody told of its last step."""
        return self.stepped > self.optimisers

    def optimiser_steps(self) -> None:
        self.stepped += 1
        if self.stepped == 100 * self.optimisers:
            self.warn("use", "100 optimiser steps without a call of step: call w.step(loss) once per optimiser step")

    def step_called(self) -> None:
        """A loss scaler skips a step now and then; half of all calls without a step is a call in the wrong place."""
        self.idle.append(self.stepped == 0)
        self.stepped, self.called = 0, True
        if len(self.idle) == _LOOK_BACK and sum(self.idle) >= _LOOK_BACK // 2:
            self.warn(
                "use", "half of the calls of step had no optimiser step before them: call it once per optimiser step, "
                "behind it, and pass the optimiser that steps",
            )  # fmt: skip

    def ended(self) -> None:
        if self.stepped and not self.called:
            self.warn("use", "step was never called: call w.step(loss) once per optimiser step")
