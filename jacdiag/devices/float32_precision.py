"""float32 products in float32, whatever the process allows.

TF32 and bfloat16 round more than the ends of intervals are padded. Two runs of one model by
different ways also differ by more than the comparisons of the trace allow.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch

from jacdiag.devices.accelerators import without_autocast

_BACKENDS = ("cuda.matmul", "mkldnn.matmul", "cudnn.conv", "mkldnn.conv", "cudnn.rnn", "mkldnn.rnn")


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products without TF32, bfloat16 and autocast; restore the flags afterwards.

    The flags of TF32 and bfloat16 are those of the process: the first to enter sets them, and the
    last to leave restores them. Autocast is switched off in this thread.

    >>> with full_precision():
    ...     torch.get_float32_matmul_precision()
    'highest'
    """
    _borrowed.enter()
    try:
        with without_autocast():
            yield
    finally:
        _borrowed.leave()


def is_in_full_precision() -> bool:
    """Return whether this thread is inside `full_precision`, without autocast.

    >>> is_in_full_precision()
    False
    """
    return _borrowed.is_entered_here and not torch._C._is_any_autocast_enabled()


@dataclass(frozen=True)
class _Flags:
    """The flags of the process.

    torch has two sets of them, and raises if the process reads one after it wrote the other.

    Attributes:
        products, convolutions: the older set; products is None if it cannot be read.
        of_backends: the newer set, one for each backend; () if it is not to be written, or does not
            exist.
    """

    products: str | None
    convolutions: bool
    of_backends: tuple[str, ...]

    @classmethod
    def read(cls) -> _Flags:
        """Return the flags as they are."""
        of_backends = tuple(backend.fp32_precision for backend in _newer_set())
        try:
            with _without_advice():
                products = torch.get_float32_matmul_precision()
                convolutions = torch.backends.cudnn.allow_tf32
        except RuntimeError:
            return cls(None, False, of_backends)
        return cls(products, convolutions, of_backends)

    def in_full_precision(self) -> _Flags:
        """Return the flags of full precision, in the set that the process uses."""
        if self.products is None:
            return _Flags(None, False, ("ieee",) * len(self.of_backends))
        return _Flags("highest", False, ())

    def write(self) -> None:
        """Set the flags to these. The older set writes into the newer one, and so comes first."""
        # 1. The older set.
        if self.products is not None:
            with _without_advice():
                torch.set_float32_matmul_precision(self.products)
                torch.backends.cudnn.allow_tf32 = self.convolutions

        # 2. The newer set.
        if self.of_backends:
            for backend, precision in zip(_newer_set(), self.of_backends, strict=True):
                backend.fp32_precision = precision


class _Borrowed:
    """The flags of the process, while somebody computes in full precision."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._own = threading.local()  # its `depth` is that of one thread
        self._before = _Flags(None, False, ())

    @property
    def is_entered_here(self) -> bool:
        """Whether this thread computes in full precision."""
        return getattr(self._own, "depth", 0) > 0

    def enter(self) -> None:
        """Set the flags, if nobody has yet."""
        with self._lock:
            if self._depth == 0:
                self._before = _Flags.read()
                self._before.in_full_precision().write()
            self._depth += 1
        self._own.depth = getattr(self._own, "depth", 0) + 1

    def leave(self) -> None:
        """Restore the flags, if nobody else computes in full precision."""
        self._own.depth -= 1
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._before.write()


_borrowed = _Borrowed()


@contextmanager
def _without_advice() -> Iterator[None]:
    """Hide the advice of torch 2.9 to use the other set of flags: the process chooses the set."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please use the new API settings to control TF32")
        yield


def _newer_set() -> list[Any]:
    """Return the backends that hold the newer set of flags; [] before torch 2.9."""
    if not hasattr(torch.backends, "fp32_precision"):
        return []
    return [reduce(getattr, path.split("."), torch.backends) for path in _BACKENDS]
