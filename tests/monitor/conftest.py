"""What tests of the watch share: the same bits twice, and no watch that a test left open."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from jacdiag.monitor.process_endings import ENDINGS


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def closed_watches() -> Iterator[None]:
    """Close the watches that a test left open, so that the hooks of the process are given back."""
    yield
    for reference in list(ENDINGS.watches.values()):
        watch = reference()
        if watch is not None and not watch.closed:
            watch.close()
    if ENDINGS.watches:  # they were collected without having been closed
        ENDINGS.close(None)  # type: ignore[arg-type]
