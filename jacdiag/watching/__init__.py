"""The live hook inside somebody else's training loop: the same numbers as the run goes on, early warning, a record."""

from jacdiag.watching.attach import watch
from jacdiag.watching.guards import AlertRaised
from jacdiag.watching.hook import Watch
from jacdiag.watching.skip_list import Skipping, skipping

__all__ = ["AlertRaised", "Skipping", "Watch", "skipping", "watch"]
