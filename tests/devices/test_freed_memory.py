"""Memory that was freed in small pieces is given back to the system."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import Any

import pytest

from jacdiag.devices.host_memory import return_freed_memory

SCRIPT = """
import torch
from pathlib import Path
from jacdiag.devices.host_memory import return_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

large = torch.ones(2**22)  # 16 MiB: freed once, the library keeps blocks of this size
del large
pieces = [torch.ones(2**18) for _ in range(400)]  # 1 MiB each
last = pieces[-1]
full = resident()
pieces.clear()
kept = resident()
return_freed_memory()
print(full - kept, kept - resident())
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc only"
)
def test_freed_memory_is_given_back() -> None:
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    freed_at_once, given_back = map(float, out.split())
    assert freed_at_once < 40 and given_back > 300


@pytest.mark.parametrize("error", [OSError, TypeError, AttributeError])
def test_a_library_that_cannot_give_back_is_left_alone(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def missing(name: Any) -> Any:
        asked.append(name)
        raise error

    monkeypatch.setattr(ctypes, "CDLL", missing)
    return_freed_memory()
    assert asked == [None]
