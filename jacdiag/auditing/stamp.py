"""What every report bears: when and with what it was made, and the memory that it took."""

from __future__ import annotations

import datetime
import resource
import sys
from typing import Any

import torch

import jacdiag


def stamp() -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"created": now, "torch": torch.__version__, "jacdiag": jacdiag.__version__}


def peak_memory_mb() -> float:
    """Peak of the device's allocator, or of the whole process on a CPU (ru_maxrss: KiB on Linux, bytes on macOS)."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
