"""The live hook inside somebody else's training loop: the same numbers as the run goes on, early warning, a record."""

from jacdiag.watching.attach import watch
from jacdiag.watching.guards import AlertRaised
from jacdiag.watching.hook import Watch

__all__ = ["AlertRaised", "Watch", "watch"]
