"""Deprecated: this package is `jacdiag.monitor` now. The names stay importable until 1.0."""

from jacdiag.monitor import AlertRaised, Skipping, Watch, skipping, watch

__all__ = ["AlertRaised", "Skipping", "Watch", "skipping", "watch"]
