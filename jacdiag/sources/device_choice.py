"""Where products run: the device that was asked for, or the best that is there."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from jacdiag.errors import UsageError


def pick(wanted: str | None) -> torch.device:
    """Returns the device of that name; CUDA if there, else the CPU, where none is given.

    Raises:
        UsageError: no device of that name, or it is not there.

    Example:
        >>> pick("cpu")
        device(type='cpu')
    """
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UsageError(
            "no such device", got=f"--device {wanted}", hint="cpu, cuda, cuda:1"
        ) from error
    if device.type == "cpu":
        return device
    count = _count(device.type)
    if not count:
        raise UsageError(
            f"{device.type.upper()} was asked for and is not there",
            got=f"--device {wanted}",
            hint="--device cpu",
        )
    if device.index is not None and device.index >= count:
        last = f"{device.type}:{count - 1}"
        raise UsageError(
            f"there is no {device}",
            got=f"--device {wanted}, the last is {last}",
            hint=f"--device {last}",
        )
    return device


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU torch's current one for a while: code that says "cuda" means it, and its
    allocator is read.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _count(kind: str) -> int:
    """How many devices of a kind this machine has; 0 for a kind that torch has no code for here."""
    backend = getattr(torch, kind, None)
    available = getattr(backend, "is_available", None)
    return (
        int(backend.device_count())
        if backend is not None and available is not None and available()
        else 0
    )
