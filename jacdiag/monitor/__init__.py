"""The live hook inside somebody else's training loop: the same numbers as the run goes on, early
warning, a record.
"""

from jacdiag.monitor.api import watch
from jacdiag.monitor.fault_isolation import AlertRaised
from jacdiag.monitor.skip_list import Skipping, skipping
from jacdiag.monitor.training_watch import Watch

__all__ = ["AlertRaised", "Skipping", "Watch", "skipping", "watch"]
