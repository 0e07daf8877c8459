"""The state of numpy's generator is the one that numpy gives, also where it is not read again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jacdiag.trace.execution.rng_state import RandomState, borrowed

MOVES: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "a uniform number": lambda: np.random.rand(),  # noqa: NPY002
    "a normal number, another one is in store": lambda: np.random.randn(),  # noqa: NPY002
    "two normal numbers": lambda: np.random.randn(2),  # noqa: NPY002
    "a seed": lambda: np.random.seed(7),  # noqa: NPY002
}


def same(left: Any, right: Any) -> bool:
    return left[0] == right[0] and np.array_equal(left[1], right[1]) and left[2:] == right[2:]


@pytest.mark.parametrize("first", MOVES)
@pytest.mark.parametrize("second", MOVES)
def test_every_read_is_what_numpy_gives(first: str, second: str) -> None:
    with borrowed():
        np.random.seed(1)  # noqa: NPY002
        RandomState.now()
        for move in (first, second, "nothing"):
            MOVES[move]()
            assert same(RandomState.now().numpy, np.random.get_state())  # noqa: NPY002


def test_a_restored_normal_number_in_store_is_read() -> None:
    with borrowed():
        np.random.seed(1)  # noqa: NPY002
        np.random.randn()  # noqa: NPY002
        in_store = RandomState.now()
        np.random.randn()  # noqa: NPY002
        RandomState.now()
        in_store.restore()
        assert same(RandomState.now().numpy, in_store.numpy)


def test_a_state_that_has_not_moved_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with borrowed():
        np.random.seed(1)  # noqa: NPY002
        before = RandomState.now()
        monkeypatch.setattr(np.random, "get_state", lambda: pytest.fail("read again"))
        assert RandomState.now().numpy is before.numpy
