"""Watch a training loop: figures of each step, warnings, and a record of the run."""

from jacdiag.monitor.api import watch
from jacdiag.monitor.guards import AlertRaised
from jacdiag.monitor.skip_list import Skipping, skipping
from jacdiag.monitor.training_watch import Watch

__all__ = ["AlertRaised", "Skipping", "Watch", "skipping", "watch"]
