"""`benchmarks/gpu.py` runs whole at toy size, so that nothing of it is broken when a card comes."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerator import machine as accelerator_machine
from accelerator.pretended import NAME, Counts, pretended_device

from benchmarks import gpu
from benchmarks._gpu import bench, correctness, overhead, speed, waits
from benchmarks._gpu.bench import Case, NotHereError, Row, run_cases
from benchmarks._gpu.shapes import GPT2
from jacdiag.devices import accelerators
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


def fail() -> Row:
    raise RuntimeError("expected all tensors to be on the same device\nand more lines")


def measure_nothing() -> Row:
    return Row(part="audit", what="fine", figure="1 s")


def test_an_error_that_is_not_for_lack_of_memory_is_not_hidden(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cases = [Case("audit", "broken", fail), Case("audit", "fine", measure_nothing)]
    broken, fine = run_cases(cases, CPU, 60)
    assert broken.passes is False and not broken.why
    assert broken.figure == "failed: RuntimeError: expected all tensors to be on the same device"
    assert fine.figure == "1 s"
    shown = capsys.readouterr()
    assert "Traceback" in shown.err and "in fail" in shown.err
    assert shown.out.splitlines()[0].endswith("WRONG")


def test_a_failed_case_fails_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_case(plan: gpu.Plan, device: torch.device) -> list[Case]:
        return [Case("audit", "broken", fail)]

    monkeypatch.setattr(gpu, "cases_of", one_case)
    monkeypatch.setattr(gpu.sys, "argv", ["gpu.py", "--quick", "--device", "cpu"])
    assert gpu.main() == 1


def test_nothing_is_tried_on_a_device_that_an_error_has_taken_away(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As after an illegal memory access: every later call of CUDA fails."""
    with pretended_device() as counts:

        def break_device() -> Row:
            accelerator_machine.machine().is_capturing = True  # every wait raises from here on
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        cases = [Case("audit", "broken", break_device), Case("watch", "later", measure_nothing)]
        broken, later = run_cases(cases, DEVICE, 60)
        counts.clear()
    assert "illegal memory access" in broken.figure and broken.passes is False
    assert later.why == "the device does not work since the error above"
    assert "in a new process" in capsys.readouterr().err


def test_the_rows_so_far_are_in_the_file_when_a_case_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def end_process() -> Row:
        raise KeyboardInterrupt

    def two_cases(plan: gpu.Plan, device: torch.device) -> list[Case]:
        return [Case("audit", "fine", measure_nothing), Case("audit", "last", end_process)]

    monkeypatch.setattr(gpu, "cases_of", two_cases)
    results = tmp_path / "gpu.json"
    with pytest.raises(KeyboardInterrupt):
        gpu.measure(gpu.SMALLEST, CPU, results=results)
    assert [row["what"] for row in json.loads(results.read_text())["rows"]] == ["fine"]


def test_the_peak_of_memory_is_that_of_one_case() -> None:
    def allocate() -> Row:
        torch.zeros(100_000, device=DEVICE)
        return measure_nothing()

    peaks: list[int] = []

    def read_peak() -> Row:
        peaks.append(accelerators.peak_device_memory(DEVICE) or 0)
        return measure_nothing()

    with pretended_device():
        run_cases([Case("audit", "a", allocate), Case("audit", "b", read_peak)], DEVICE, 60)
    assert peaks == [0]


def test_the_rate_of_products_is_that_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []

    def note_mode(device: torch.device) -> None:
        modes.append(torch.get_float32_matmul_precision())

    monkeypatch.setattr(speed, "wait_for", note_mode)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        speed.product_rate(CPU, 4)
        assert set(modes) == {"highest"} and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_products_in_tf32_need_a_card_that_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda", 0)
    capability = (7, 5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(NotHereError, match=r"capability 7.5 has no TF32"):
        correctness.check_tf32(card)
    capability = (8, 0)
    correctness.check_tf32(card)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    with pytest.raises(NotHereError, match="ROCm"):
        correctness.check_tf32(card)


def test_the_tests_that_need_cuda_run_on_the_chosen_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 1. Every file with the mark, and no other.
    assert gpu.cuda_test_files() == ["tests/monitor/test_cuda.py"]

    # 2. The device, by the name that another process knows it by.
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu.visible_name(torch.device("cuda")) == "0"
    assert gpu.visible_name(torch.device("cuda", 1)) == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6")
    assert gpu.visible_name(torch.device("cuda", 1)) == "6"

    # 3. Both reach the process of the tests.
    calls: list[tuple[list[str], dict[str, str]]] = []

    def note_call(command: list[str], **options: Any) -> SimpleNamespace:
        calls.append((command, options["env"]))
        return SimpleNamespace(returncode=0, stdout="3 passed", stderr="")

    monkeypatch.setattr(gpu.subprocess, "run", note_call)
    row = gpu.cuda_tests(torch.device("cuda", 1))
    ((command, environment),) = calls
    assert command[-1] == "tests/monitor/test_cuda.py" and row.figure == "3 passed"
    assert environment["CUDA_VISIBLE_DEVICES"] == "6"


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
        # Torch says this once, when the mode is set.
        warnings.warn("Synchronization debug mode does not yet detect all synchronizing operations")
    assert found.count == 3 and modes == ["warn", 0]
