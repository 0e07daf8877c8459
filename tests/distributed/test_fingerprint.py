"""What two ranks compare: a checksum that sees every bit, and the first difference by name."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from jacdiag.distributed.fingerprint import Fingerprint, checksum, fingerprint

pytestmark = pytest.mark.check("distributed")

TYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.bool,
    torch.complex64,
]


def some(dtype: torch.dtype, n: int = 1000) -> torch.Tensor:
    numbers = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (numbers > 0) if dtype is torch.bool else (100 * numbers).to(dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_bit_of_every_element_counts(dtype: torch.dtype) -> None:
    t = some(dtype)
    for place in (0, 1, 499, 999):
        changed = t.clone().contiguous()
        raw = changed.view(torch.uint8)
        size = raw.numel() // t.numel()
        raw[place * size] ^= 1
        assert checksum(changed) != checksum(t)
    assert checksum(t.clone()) == checksum(t)


def test_checksum_equals_its_documented_arithmetic() -> None:
    """Against Python's own integers, over more than one chunk."""
    t = torch.randn((1 << 18) + 77, generator=torch.Generator().manual_seed(1))
    bits = [int(b) for b in t.numpy().view(np.int32)]
    total = 0
    for start in range(0, len(bits), 1 << 18):
        part = sum(b * (2 * k + 1) for k, b in enumerate(bits[start : start + (1 << 18)]))
        total = (total * 1_000_003 + part) % 2**64
    assert checksum(t) == total


def test_order_counts_and_memory_layout_does_not() -> None:
    t = some(torch.float32).reshape(20, 50)
    swapped = t.clone()
    swapped[0, 0], swapped[0, 1] = t[0, 1], t[0, 0]
    assert checksum(swapped) != checksum(t)
    assert checksum(t.T.contiguous().T) == checksum(t)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert checksum(t) == checksum(t.clone())
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2)])
def test_checksum_of_scalar_and_empty_zeros_is_0(shape: tuple[int, ...]) -> None:
    assert checksum(torch.zeros(shape)) == 0


def of(model: nn.Module, **options: object) -> Fingerprint:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return fingerprint(model, tensors, [torch.arange(4)], options, {"h.0": "mlp"})


def test_the_first_difference_has_a_name() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, eps=1e-5))
    base = of(model, tol=0.05)
    assert base.difference(of(model, tol=0.05)) is None
    assert base.difference(of(model, tol=0.01)) == ("other options", "tol", "0.05, against 0.01")
    model[1].eps = 1e-6
    assert base.difference(of(model, tol=0.05)) == (
        "another model",
        "1.eps",
        "1e-05, against 1e-06",
    )
    model[1].eps = 1e-5
    model[1].running_mean[2] = 1e-30
    what, name, _ = base.difference(of(model, tol=0.05)) or ("", "", "")
    assert (what, name) == ("other weights", "1.running_mean")
    newer = dataclasses.replace(base, versions={**base.versions, "jacdiag": "9"})
    assert (base.difference(newer) or "")[0] == "other versions"


def test_what_a_rank_has_for_itself_is_no_difference() -> None:
    """Which rank it is, its device, where its files lie."""
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.load_state_dict(one.state_dict())
    one.local_rank, other.local_rank = 0, 1
    one.device_index, other.device_index = 0, 1
    assert of(one).difference(of(other)) is None


def test_fingerprint_survives_json() -> None:
    base = of(nn.Linear(2, 2), tol=0.05)
    assert Fingerprint.from_dict(base.to_dict()) == base
