"""The provenance of every report: when and with what it was made, and the memory that it took."""

from __future__ import annotations

import contextlib
import datetime
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from jacdiag._version import __version__


def stamp() -> dict[str, Any]:
    """Return when a report is made, and with which versions."""
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"created": created, "torch": torch.__version__, "jacdiag": __version__}


def peak_memory_mb() -> float:
    """Return the peak of the device's allocator, or of the entire process on a CPU, in MiB.

    Linux hands the peak of the parent down in ru_maxrss (KiB; on macOS bytes); the kernel's VmHWM
    is the process's own.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
