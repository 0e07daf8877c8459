"""The random numbers of a model: the same for every run of the same code, restored afterwards."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jacdiag.devices.accelerators import (
    RandomStates,
    read_random_states,
    restore_random_states,
    seed_generators,
)


@dataclass(frozen=True)
class RandomState:
    """The state of every generator that a model may draw from.

    Those are torch's on each device, numpy's and Python's.
    """

    cpu: Tensor
    accelerators: RandomStates
    numpy: Any
    python: Any

    @classmethod
    def now(cls) -> RandomState:
        """Return the present state."""
        accelerators = read_random_states()
        return cls(torch.get_rng_state(), accelerators, _numpy_state(), random.getstate())

    def restore(self) -> None:
        """Put every generator back to this state."""
        _NUMPY_STATES.clear()
        torch.set_rng_state(self.cpu)
        restore_random_states(self.accelerators)
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)

    def same_as(self, other: RandomState) -> bool:
        """Return whether two states are equal, so that nothing was drawn between them.

        Args:
            other: the other state.
        """
        # 1. Python's generator.
        if self.python != other.python:
            return False

        # 2. Torch's, on each device.
        if self.accelerators.keys() != other.accelerators.keys():
            return False
        of_each = {"cpu": (self.cpu,), **self.accelerators}
        of_each_other = {"cpu": (other.cpu,), **other.accelerators}
        for kind, states in of_each.items():
            if not _are_equal(states, of_each_other[kind]):
                return False

        # 3. numpy's: its key is an array, the other fields are numbers.
        has_same_key = np.array_equal(self.numpy[1], other.numpy[1])
        return has_same_key and bool(self.numpy[2:] == other.numpy[2:])


def _are_equal(states: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    """Return whether the devices of one kind have the same states."""
    return len(states) == len(others) and all(map(torch.equal, states, others))


_MERSENNE_BYTES = 4 * 624 + 4  # of numpy's mt19937_state: the key and the place in it
# the last state that was read, by the bytes that it was read from
_NUMPY_STATES: dict[tuple[int, bytes], Any] = {}
# the last generator and its address: to look the address up takes as long as all else here
_ADDRESSES: dict[str, tuple[Any, int]] = {}


def _numpy_state() -> Any:
    """Return the state of numpy's global generator; it is read again only if it has moved.

    A read takes numpy about as long as an optimizer needs for ten small weights. With a normal
    number in store the state is read in any case: to take that number out moves nothing else.
    """
    # 1. The state that was read last, if its bytes are the same.
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if type(generator) is not np.random.MT19937:
        return np.random.get_state()  # noqa: NPY002
    key = (id(generator), ctypes.string_at(_address_of(generator), _MERSENNE_BYTES))
    state: Any = _NUMPY_STATES.get(key)
    if state is not None:
        return state

    # 2. A new reading.
    state = np.random.get_state()  # noqa: NPY002
    _NUMPY_STATES.clear()
    has_normal_in_store = bool(state[3])
    if not has_normal_in_store:
        _NUMPY_STATES[key] = state
    return state


def _address_of(generator: Any) -> int:
    """Return the address of a generator's state, which stays where it is."""
    known, address = _ADDRESSES.get("numpy", (None, 0))
    if known is not generator:
        address = generator.ctypes.state_address
        _ADDRESSES["numpy"] = (generator, address)
    return address


@contextmanager
def borrowed(start: RandomState | None = None) -> Iterator[RandomState]:
    """Run with generators that begin at `start`, and put them back afterwards.

    Args:
        start: None lets them go on from where they are.

    Yields:
        The state before.
    """
    before = RandomState.now()
    try:
        if start is not None:
            start.restore()
        yield before
    finally:
        before.restore()


def another_draw() -> None:
    """Move every generator, so that a run draws other numbers.

    Call it inside `borrowed` only, which undoes it.
    """
    seed_generators(0x1E5)
    np.random.seed(0x1E5)  # noqa: NPY002
    random.seed(0x1E5)
