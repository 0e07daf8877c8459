"""A recorded run, as a backtest looks at it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Factor = str | float


@dataclass(frozen=True)
class Run:
    """One run, as a backtest looks at it.

    Attributes:
        factors: what was varied: name -> text or number.
        steps, loss, grad_norm: one value a logged step; nan where it was not logged.
        figures: of the model before its first step (`jacdiag.rules.risk_features`), or columns of a
            foreign log.
        alerts: (step, rule code) of the live rules that fired.
    """

    name: str
    factors: Mapping[str, Factor]
    steps: Floats
    loss: Floats
    grad_norm: Floats
    figures: Mapping[str, float] = field(default_factory=dict)
    alerts: Sequence[tuple[int, str]] = ()

    @property
    def whole(self) -> bool:
        """Whether the run went to its end.

        It did if it has as many steps as its factor `steps` says, or if its loss broke.
        """
        if not self.steps.size:
            return False

        # 1. Nothing says how long it should be.
        planned = self.factors.get("steps")
        if not isinstance(planned, int | float):
            return True

        # 2. A loss that is not finite ends a run early.
        is_broken = not np.isfinite(self.loss[-1])
        return bool(is_broken or self.steps[-1] >= planned)
