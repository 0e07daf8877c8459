"""float32 products in float32, whatever the process allows.

TF32 and bfloat16 round more than the ends of intervals are padded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch

_BACKENDS = ("cuda.matmul", "mkldnn.matmul", "cudnn.conv", "mkldnn.conv", "cudnn.rnn", "mkldnn.rnn")


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products without TF32 and bfloat16; restore the flags afterwards.

    torch has two sets of these flags and raises where both were written: the set that the process
    uses is borrowed.

    >>> with full_precision():
    ...     torch.get_float32_matmul_precision()
    'highest'
    """
    # 1. Read the first set of flags. torch raises if the process has written the second.
    try:
        with _without_advice():
            products = torch.get_float32_matmul_precision()
            convolutions = torch.backends.cudnn.allow_tf32
    except RuntimeError:
        with _second_set_of_flags():
            yield
        return

    # 2. Borrow it.
    try:
        _set_flags("highest", False)
        yield
    finally:
        _set_flags(products, convolutions)


@contextmanager
def _second_set_of_flags() -> Iterator[None]:
    """Compute float32 products in full precision by torch's newer flags, one for each backend."""
    before = [(backend, backend.fp32_precision) for backend in map(_backend, _BACKENDS)]
    try:
        for backend, _ in before:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in before:
            backend.fp32_precision = precision


def _set_flags(products: str, convolutions: bool) -> None:
    with _without_advice():
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def _without_advice() -> Iterator[None]:
    """Hide the advice of torch 2.9 to use the other set of flags: the process chooses the set."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please use the new API settings to control TF32")
        yield


def _backend(path: str) -> Any:
    return reduce(getattr, path.split("."), torch.backends)
