"""Devices that are there, and those that are not."""

from __future__ import annotations

import pytest
import torch

from jacdiag.errors import UsageError
from jacdiag.sources.device_choice import pick


def test_the_best_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert pick(None).type == kind
    assert pick("cpu") == torch.device("cpu")


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_one_that_is_not_there(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(getattr(torch, kind), "is_available", lambda: False)
    with pytest.raises(UsageError, match=f"{kind.upper()} was asked for and is not there"):
        pick(kind)


def test_cuda_device_index_out_of_range_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick("cuda:1").index == 1 and pick("cuda").type == "cuda"
    with pytest.raises(UsageError, match="the last is cuda:1"):
        pick("cuda:2")


def test_a_name_without_meaning() -> None:
    with pytest.raises(UsageError, match="no such device"):
        pick("gpu")
