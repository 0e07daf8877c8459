"""Devices that are there, and those that are not."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from jacdiag.devices import accelerators
from jacdiag.devices.accelerators import present_names
from jacdiag.devices.device_choice import check_precision, pick
from jacdiag.errors import UsageError

pytestmark = pytest.mark.check("devices")


def let_there_be(monkeypatch: pytest.MonkeyPatch, kind: str, count: int) -> None:
    monkeypatch.setattr(getattr(torch, kind), "is_available", lambda: count > 0)
    monkeypatch.setattr(getattr(torch, kind), "device_count", lambda: count)


def test_the_best_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, kind in ((1, "cuda"), (0, "cpu")):
        let_there_be(monkeypatch, "cuda", count)
        assert pick(None).type == kind
    assert pick("cpu") == torch.device("cpu")


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps", "mtia", "meta"])
def test_one_that_is_not_there(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    if kind != "meta":
        monkeypatch.setattr(getattr(torch, kind), "is_available", lambda: False)
    with pytest.raises(UsageError, match=f"{kind.upper()} was asked for and is not there") as info:
        pick(kind)
    assert info.value.got == f"--device {kind}; this machine has cpu"


def test_cuda_device_index_out_of_range_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    let_there_be(monkeypatch, "cuda", 2)
    assert pick("cuda:1").index == 1 and pick("cuda").type == "cuda"
    with pytest.raises(UsageError, match=r"this machine has cpu, cuda:0, cuda:1") as info:
        pick("cuda:2")
    assert info.value.hint == "--device cuda:1"


def test_a_name_without_meaning() -> None:
    with pytest.raises(UsageError, match="no such device"):
        pick("gpu")


def test_float64_is_refused_where_there_is_none() -> None:
    weights = [torch.ones(1, dtype=torch.float64)]
    mps = torch.device("mps")
    with pytest.raises(UsageError, match="MPS has no float64") as info:
        check_precision(mps, torch.float64)
    assert info.value.got == "--device mps with --dtype float64"
    with pytest.raises(UsageError, match="float64 weights"):
        check_precision(mps, torch.float32, weights)
    check_precision(mps, torch.float32, [torch.ones(1)])
    check_precision(torch.device("cuda"), torch.float64, weights)


def test_a_build_for_an_accelerator_on_a_machine_without_one_has_the_cpu_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> None:
        raise RuntimeError("Cannot access accelerator device when none is available.")

    monkeypatch.setattr("torch.accelerator.current_accelerator", refuse)
    not_asked_yet = cache(accelerators._kind_of_build.__wrapped__)
    monkeypatch.setattr(accelerators, "_kind_of_build", not_asked_yet)
    for kind in ("cuda", "xpu"):
        let_there_be(monkeypatch, kind, 0)
    assert "cuda:0" not in present_names()
    assert pick(None).type == "cpu"
