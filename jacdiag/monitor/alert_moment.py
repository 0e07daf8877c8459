"""What an alert handler gets: the alert, the model it is about and the folder of the run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from jacdiag.records import Finding
from jacdiag.records.run_log import Alert


@dataclass(frozen=True, kw_only=True)
class AlertMoment:
    """The state of a run when an alert is raised: what a handler needs to save a checkpoint.

    Attributes:
        step: optimizer steps made so far. The weights are those after this step. The alert may be
            about an earlier one, at most `log_every` steps before: see `Alert.step`.
        alerts: all alerts of this session, this one included.
        findings: those of the last Jacobian probe's report; empty before the first probe.
        model: the module that was passed to `jacdiag.watch`. None for a handler that is called
            after the watch closed.
        optimizers: those that update parameters, in the order in which they were passed.
        log_dir: folder of the run log. None without one.
        flight: folder that the flight recorder wrote for this alert. None if it wrote none.
    """

    step: int
    alerts: Sequence[Alert] = ()
    findings: Sequence[Finding] = ()
    model: nn.Module | None = None
    optimizers: Sequence[Any] = field(default=())
    log_dir: Path | None = None
    flight: Path | None = None

    @property
    def run(self) -> str:
        """The name of the run: that of its folder, empty without one."""
        if self.log_dir is None:
            return ""
        return self.log_dir.resolve().name

    @property
    def model_name(self) -> str:
        """The class of the model, empty if it is not known."""
        if self.model is None:
            return ""
        return type(self.model).__name__

    @property
    def flight_name(self) -> str:
        """The name of the flight's folder, empty if there is none."""
        if self.flight is None:
            return ""
        return self.flight.name


def call_handler(handler: Callable[..., Any], alert: Alert, moment: AlertMoment) -> None:
    """Call what was passed as `on_alert`: with the alert alone, or with the alert and the moment.

    Args:
        handler: a function of one argument, or of two.
        alert: the first argument.
        moment: the second one, for a function that cannot be called without it.
    """
    if takes_moment(handler):
        handler(alert, moment)
    else:
        handler(alert)


def takes_moment(handler: Callable[..., Any]) -> bool:
    """Return whether a function needs two arguments.

    >>> takes_moment(print), takes_moment(lambda alert: None)
    (False, False)
    >>> takes_moment(lambda alert, moment: None)
    True
    >>> takes_moment(lambda alert, store=[]: None)
    False
    """
    try:
        signature = inspect.signature(handler)
    except (TypeError, ValueError):  # such as a class of an extension module
        return False
    # A handler that can be called with the alert alone gets nothing else.
    if _accepts(signature, 1):
        return False
    return _accepts(signature, 2)


def _accepts(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True
