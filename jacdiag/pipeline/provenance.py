"""The provenance of every report: when and with what it was made, and the memory that it took."""

from __future__ import annotations

import datetime
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from jacdiag._version import __version__
from jacdiag.devices.accelerators import peak_device_memory


def stamp() -> dict[str, Any]:
    """Return when a report is made, and with which versions."""
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"created": created, "torch": torch.__version__, "jacdiag": __version__}


def peak_memory_mb(device: torch.device | None = None) -> float:
    """Return the peak of the device's allocator, or of the entire process on a CPU, in MiB.

    Linux hands the peak of the parent process down in `ru_maxrss`. The kernel's VmHWM is that of
    the process itself.

    Args:
        device: that the model runs on; the CPU if not given. The peak of the process stands for
            that of a device whose allocator does not tell it (MPS, whose memory is the host's).
    """
    # 1. The device.
    if device is not None:
        of_device = peak_device_memory(device)
        if of_device is not None:
            return of_device / 2**20

    # 2. The process, as the kernel has it.
    own_peak = _kernel_peak_kib()
    if own_peak is not None:
        return own_peak / 2**10

    # 3. The process, as it inherited it.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    # It is in KiB, and on macOS in bytes.
    if sys.platform == "darwin":
        return peak / 2**20
    return peak / 2**10


def _kernel_peak_kib() -> int | None:
    """Return the peak of this process in KiB; None on a system that does not say it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None

    # A line such as "VmHWM:   123456 kB".
    for line in lines:
        if line.startswith("VmHWM"):
            return int(line.split()[1])
    return None
