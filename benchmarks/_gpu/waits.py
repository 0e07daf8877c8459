"""How often the host waits for the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from benchmarks._gpu.bench import NotHereError


@dataclass
class Waits:
    """The number of waits in a block, known at its end."""

    count: int = 0


@contextmanager
def waits_of_cuda() -> Iterator[Waits]:
    """Count the warnings of torch at each operation that makes the host wait.

    Waits in a thread of autograd are not seen: its warnings do not reach Python.
    """
    waits = Waits()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
            waits.count = sum("synchroniz" in str(warning.message) for warning in caught)


# By kind of device. A test adds one for the device that it pretends to have.
COUNTERS: dict[str, Callable[[], AbstractContextManager[Waits]]] = {"cuda": waits_of_cuda}


def check_counted(device: torch.device) -> None:
    """Raise if nothing counts the waits for a device.

    Raises:
        NotHereError: nothing counts them for this kind of device.
    """
    if device.type not in COUNTERS:
        raise NotHereError(f"nothing counts the waits for a device of kind {device.type}")


def counted_waits(device: torch.device) -> AbstractContextManager[Waits]:
    """Return a context that counts the waits for a device that `check_counted` lets pass."""
    return COUNTERS[device.type]()
