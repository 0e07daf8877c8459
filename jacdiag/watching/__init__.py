"""Deprecated: `jacdiag.monitor` is the name of this package. Its names stay importable from here until 1.0."""

from jacdiag.monitor import AlertRaised, Skipping, Watch, skipping, watch

__all__ = ["AlertRaised", "Skipping", "Watch", "skipping", "watch"]
