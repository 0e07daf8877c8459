"""Where products run: the device that is requested, or the best one of this machine."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from jacdiag.errors import UsageError


def pick(wanted: str | torch.device | None) -> torch.device:
    """Return the device of that name; by default CUDA if there is one, else the CPU.

    Args:
        wanted: as torch names devices.

    Raises:
        UsageError: no device of that name, or it is not there.

    Example:
        >>> pick("cpu")
        device(type='cpu')
    """
    # 1. A name.
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UsageError(
            "no such device", got=f"--device {wanted}", hint="cpu, cuda, cuda:1"
        ) from error

    # 2. A device that is there. There is always a CPU.
    if device.type == "cpu":
        return device
    count = _count(device.type)
    if not count:
        raise UsageError(
            f"{device.type.upper()} was asked for and is not there",
            got=f"--device {wanted}",
            hint="--device cpu",
        )

    # 3. One of several, which count from 0.
    if device.index is not None and device.index >= count:
        last = f"{device.type}:{count - 1}"
        raise UsageError(
            f"there is no {device}",
            got=f"--device {wanted}, the last is {last}",
            hint=f"--device {last}",
        )
    return device


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU torch's current one for a while.

    Code that says "cuda" then means it, and its allocator is the one that is read.

    Args:
        device: any device; only one of CUDA is made the current one.
    """
    if device.type == "cuda":
        return torch.cuda.device(device)
    # the CPU has none
    return nullcontext()


def _count(kind: str) -> int:
    """Return how many devices of a kind this machine has; 0 if torch has no code for the kind."""
    backend = getattr(torch, kind, None)
    available = getattr(backend, "is_available", None)
    # torch may know the kind, and the machine have none.
    if backend is None or available is None or not available():
        return 0
    return int(backend.device_count())
