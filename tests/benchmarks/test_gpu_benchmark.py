"""`benchmarks/gpu.py` runs whole at toy size, so that nothing of it is broken when a card comes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from accelerator.pretended import NAME, Counts, pretended_device

from benchmarks import gpu
from benchmarks._gpu import bench, overhead, waits
from benchmarks._gpu.bench import Case, NotHereError, Row, run_cases
from benchmarks._gpu.shapes import GPT2
from jacdiag.spectra.interval import PAD_WITHOUT_FLOAT64

CPU = torch.device("cpu")
DEVICE = torch.device(NAME, 0)


def rows_of(result: dict[str, Any], part: str) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["part"] == part]


@contextmanager
def counter_of(counts: Counts) -> Iterator[waits.Waits]:
    """Count as `waits_of_cuda` does."""
    found = waits.Waits()
    before = counts.waits
    yield found
    found.count = counts.waits - before


@pytest.mark.parametrize("libraries", [False, pytest.param(True, marks=pytest.mark.long)])
def test_it_runs_whole_on_a_pretended_device(
    libraries: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # wandb takes seconds to start and to stop.
    if not libraries:
        monkeypatch.setattr(overhead.importlib.util, "find_spec", lambda name: None)
    with pretended_device() as counts:
        monkeypatch.setitem(waits.COUNTERS, NAME, partial(counter_of, counts))
        result = gpu.measure(gpu.SMALLEST, DEVICE)

    # 1. Each part has a figure, or is left out for what this device lacks.
    why = {row["what"]: row["why"] for row in result["rows"] if row["why"]}
    assert why.pop("J^T w in TF32") == f"a device of kind {NAME} has no TF32"
    assert all(text.endswith("is not installed") for text in why.values()), why
    assert {row["part"] for row in result["rows"]} == set(gpu.PARTS) - {"tests"}

    # 2. What is demanded of every device.
    assert [row["passes"] for row in rows_of(result, "products")] == [True, None, None]
    assert rows_of(result, "products")[2]["numbers"]["inside_the_pad"] is False
    assert rows_of(result, "intervals")[0]["passes"]
    assert rows_of(result, "audit")[0]["passes"]
    assert rows_of(result, "waits")[0]["numbers"]["waits"] > 0
    assert result["name"] == "Pretended 0" and result["device"] == f"{NAME}:0"


def test_it_runs_on_a_device_without_float64_and_without_a_generator() -> None:
    with pretended_device(float64=False, generator=False):
        result = gpu.measure(gpu.SMALLEST, DEVICE, ("products", "waits"))
    assert rows_of(result, "products")[0]["numbers"]["pad"] == PAD_WITHOUT_FLOAT64
    assert all("nothing counts" in row["why"] for row in rows_of(result, "waits"))


def test_a_card_that_is_too_small_leaves_a_sentence() -> None:
    def allocate() -> Row:
        torch.zeros(4000, device=DEVICE)
        raise AssertionError

    with pretended_device(memory=10_000):
        rows = run_cases(
            [Case("audit", "seen", allocate), Case("audit", "known", allocate, 2**30)], DEVICE, 60
        )
    assert rows[0].why == "the device ran out of memory"
    assert rows[1].why == "it needs about 1 GiB, and 9.31e-06 GiB are free on the device"
    assert bench.line_of(rows[0]).endswith("left out: the device ran out of memory")


def test_an_error_that_is_not_for_lack_of_memory_is_not_hidden() -> None:
    def fail() -> Row:
        raise RuntimeError("expected all tensors to be on the same device")

    with pytest.raises(RuntimeError, match="same device"):
        run_cases([Case("audit", "broken", fail)], CPU, 60)


def test_no_case_goes_on_after_the_end() -> None:
    def loop() -> Row:
        while True:
            with contextlib.suppress(Exception):
                time.sleep(0.01)

    cases = [Case("watch", "endless", loop), Case("watch", "later", loop)]
    rows = run_cases(cases, CPU, 0.2)
    assert rows[0].why == "it was stopped after 0 s, at the end"
    assert rows[1].why == "no time was left for it"


def test_a_library_that_is_not_there_leaves_a_sentence() -> None:
    def missing() -> Row:
        import no_such_library  # noqa: F401

        raise AssertionError

    def lacking() -> Row:
        raise NotHereError("trainscope is not installed")

    rows = run_cases([Case("watch", "a", missing), Case("watch", "b", lacking)], CPU, 60)
    assert [row.why for row in rows] == [
        "no_such_library is not installed",
        "trainscope is not installed",
    ]


def test_memory_of_the_large_shapes_is_estimated_from_their_sizes() -> None:
    assert GPT2.parameters == pytest.approx(124e6, rel=0.01)
    shapes = {shape.name: shape for shape in (*gpu.FULL.audited, *gpu.FULL.watched)}
    assert shapes["1B"].parameters == pytest.approx(1.1e9, rel=0.05)
    assert shapes["7B"].parameters == pytest.approx(6.6e9, rel=0.02)


def test_waits_of_cuda_are_counted_by_the_warnings_of_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import warnings

    modes: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with waits.waits_of_cuda() as found:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation")
        warnings.warn("something else")
    assert found.count == 3 and modes == ["warn", 0]
