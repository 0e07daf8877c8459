"""Garbage collection while all tests are read.

Reading them makes 700,000 objects, nearly all of which stay. Looking for garbage among these takes
seconds in each worker and frees nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Generator
from typing import Any

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()
