"""Deprecated: import the callback from `jacdiag.monitor.integrations.huggingface`."""

import warnings

from jacdiag.monitor.integrations.huggingface import WatchCallback

__all__ = ["WatchCallback"]

warnings.warn(
    "jacdiag.watching.huggingface is deprecated; import jacdiag.monitor.integrations.huggingface",
    DeprecationWarning,
    stacklevel=2,
)
