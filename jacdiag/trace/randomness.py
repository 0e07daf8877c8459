"""The random numbers of a guest: borrowed for a run, and given back; the same ones for every run of the same code."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The state of every generator that a model may draw from: torch's on each device, numpy's and Python's."""

    cpu: Tensor
    cuda: tuple[Tensor, ...]
    numpy: Any
    python: Any

    @classmethod
    def now(cls) -> RandomState:
        started = torch.cuda.is_available() and torch.cuda.is_initialized()
        cuda = tuple(torch.cuda.get_rng_state_all()) if started else ()
        return cls(torch.get_rng_state(), cuda, np.random.get_state(), random.getstate())  # noqa: NPY002

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)

    def same_as(self, other: RandomState) -> bool:
        tensors = zip((self.cpu, *self.cuda), (other.cpu, *other.cuda), strict=False)
        return (
            len(self.cuda) == len(other.cuda)
            and all(torch.equal(a, b) for a, b in tensors)
            and self.python == other.python
            and self.numpy[2:] == other.numpy[2:]
            and np.array_equal(self.numpy[1], other.numpy[1])
        )


@contextmanager
def borrowed(start: RandomState | None = None) -> Iterator[RandomState]:
    """Inside, generators begin at `start` (or go on from where they are); afterwards they stand where they stood."""
    before = RandomState.now()
    try:
        if start is not None:
            start.restore()
        yield before
    finally:
        before.restore()


def another_draw() -> None:
    """Moves every generator elsewhere, so that a run draws other numbers. Only inside `borrowed`, which undoes it."""
    torch.manual_seed(0x1E5)
    np.random.seed(0x1E5)  # noqa: NPY002
    random.seed(0x1E5)
