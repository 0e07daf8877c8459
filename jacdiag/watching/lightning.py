"""Deprecated: import the callback from `jacdiag.monitor.integrations.lightning`."""

import warnings

from jacdiag.monitor.integrations.lightning import WatchCallback

__all__ = ["WatchCallback"]

warnings.warn(
    "jacdiag.watching.lightning is deprecated; import jacdiag.monitor.integrations.lightning",
    DeprecationWarning,
    stacklevel=2,
)
