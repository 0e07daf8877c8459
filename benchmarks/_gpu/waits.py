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

    Those of a backward pass count too: torch repeats the warnings of its threads when the pass has
    ended. This mode of torch does not report `Event.synchronize`, `torch.cuda.synchronize` and
    copies that do not block.
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
            # Torch also says once that the mode is a prototype, and that is no wait.
            messages = [str(warning.message) for warning in caught]
            waits.count = sum("called a synchronizing" in message for message in messages)


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
