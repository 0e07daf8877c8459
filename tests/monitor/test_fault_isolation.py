"""Never kills: faults in every part; the training goes on bit for bit, each is said once, the log
stays readable.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import fork_server
from monitor.rig import adam, assert_same_state, lines, plain_step, small, trained
from torch import nn

import jacdiag
from jacdiag.errors import TraceError
from jacdiag.monitor import forward_statistics as statistics
from jacdiag.monitor import jacobian_probe as probe
from jacdiag.monitor import measurements
from jacdiag.monitor import step_metrics as figures
from jacdiag.monitor import training_watch as hook
from jacdiag.monitor.guards import Guards, describe_cause
from jacdiag.monitor.log import events as record
from jacdiag.monitor.log import flight_recorder as recorder
from jacdiag.monitor.log import run_file as log
from jacdiag.records.run_log import read_run

OPTIONS: dict[str, Any] = {"every": 6, "stats_every": 3, "log_every": 4, "keep_batches": 1}
STEPS = 8  # two probes, three statistics: enough to see that a fault is reported once


def one_layer() -> nn.Module:
    """Two sub-layers: which part of the watch fails does not depend on how many there are."""
    return small(n_layer=1)


def trained_one_layer(
    options: dict[str, Any] | None, inside: Callable[[int], None] | None = None
) -> Any:
    return trained(STEPS, options, make=one_layer, inside=inside)


@pytest.fixture(scope="module")
def plain() -> Any:
    return trained_one_layer(None)


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("broken by the test")


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("no memory left")


PARTS = {
    "gradients": (figures.StepMetrics, "gradients", "figures"),
    "end of a row": (figures.StepMetrics, "close_row", "figures"),
    "read": (figures.StepMetrics, "read", "figures"),
    "update before": (figures.UpdateTurn, "open", "updates"),
    "update behind": (figures.UpdateTurn, "close", "updates"),
    "batch hook": (hook.Batches, "next_step", "batches"),
    "sites": (probe, "sites", "probe"),
    "norms": (probe, "measure_group", "probe"),
    "statistics": (probe, "forward_figures", "probe"),
    "ranks": (statistics.StableRanks, "look", "probe"),
    "rules": (probe, "evaluate", "probe"),
    "detectors": (record.LiveRules, "step", "detectors"),
    "drift": (record.LiveRules, "probe", "probe"),
    "log": (log.RunFile, "write", "log"),
    "row": (measurements, "build_step_row", "figures"),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize(
    "error", [broken, pytest.param(out_of_memory, marks=pytest.mark.long)], ids=["error", "memory"]
)
def test_failing_part_is_switched_off_with_one_message(
    name: str,
    error: Any,
    plain: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    where, attribute, part = PARTS[name]
    monkeypatch.setattr(where, attribute, error)
    with caplog.at_level(logging.WARNING, "jacdiag.watch"):
        watched = trained_one_layer({**OPTIONS, "log_dir": tmp_path})
    assert plain[0] == watched[0] and plain[2] == watched[2]
    assert_same_state(plain[1], watched[1])
    said = [r.getMessage() for r in caplog.records if "failed" in r.getMessage()]
    assert [line for line in said if f": {part} failed" in line] == said[:1] and len(said) == 1, (
        said
    )
    assert "from now on" in said[0] or "nothing more" in said[0]
    if part != "log":
        assert [row["part"] for row in lines(tmp_path, "fault")] == [part]
    else:
        assert (tmp_path / "run.jsonl").read_bytes() == b""
    if part in ("probe", "updates", "batches", "detectors"):
        assert [row["step"] for row in lines(tmp_path, "step")] == list(range(1, STEPS + 1))
    if part in ("figures", "updates"):
        assert name == "gradients" or lines(tmp_path, "probe")


@pytest.mark.parametrize("name", PARTS)
def test_strict_watch_raises_the_error_of_each_part(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, attribute, _ = PARTS[name]
    monkeypatch.setattr(where, attribute, broken)
    with pytest.raises(RuntimeError, match="broken by the test"):
        trained_one_layer({**OPTIONS, "log_dir": tmp_path, "strict": True})


class Sink:
    def __init__(self, write: Callable[..., None], close: Callable[..., None]) -> None:
        self.write, self.close = write, close


class Good(Sink):
    pass


def test_sinks_and_functions_of_the_user(
    plain: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good: list[Any] = []
    sinks = [Sink(broken, broken), Good(lambda *given: good.append(given), lambda: None)]
    watched = trained_one_layer(
        {**OPTIONS, "log_dir": tmp_path, "sinks": sinks, "on_alert": broken}
    )
    assert plain[0] == watched[0]
    assert [row["part"] for row in lines(tmp_path, "fault")] == ["sink Sink"]
    names = {name for _, figures in good for name in figures}
    assert {
        "jacdiag/loss",
        "jacdiag/gain/transformer.h.0.attn",
        "jacdiag/grad/transformer.h.0.mlp",
    } <= names


def test_a_dump_that_fails(plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder.FlightRecorder, "dump", broken)
    model = small()
    w = jacdiag.watch(model, adam(model), log_dir=tmp_path, every=None, log_every=1, quiet=True)
    w.step(float("nan"))
    w.close()
    assert [row["part"] for row in lines(tmp_path, "fault")] == ["recorder"]
    assert [row["code"] for row in lines(tmp_path, "alert")] == ["JD505"]


def test_half_written_line_is_removed_when_the_disk_is_full(
    plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A write that gets half a line through, and then none: the half is taken back."""
    real, calls = os.write, 0

    def full(handle: int, data: Any) -> int:
        nonlocal calls
        calls += 1
        if calls < 6:
            return real(handle, data)
        if calls == 6:
            return real(handle, bytes(data)[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log.os, "write", full)
    watched = trained_one_layer({**OPTIONS, "log_dir": tmp_path})
    assert plain[0] == watched[0]
    data = (tmp_path / "run.jsonl").read_bytes()
    assert data.endswith(b"\n") and read_run(tmp_path).header
    assert sum("No space left" in r.getMessage() for r in caplog.records) == 1


def test_log_folder_removed_during_training_is_one_fault(
    plain: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    watched = trained_one_layer(
        {**OPTIONS, "log_dir": folder},
        inside=lambda step: shutil.rmtree(folder) if step == 4 else None,
    )
    assert plain[0] == watched[0]
    assert sum("nothing more is written" in r.getMessage() for r in caplog.records) == 1


def test_a_slow_disk_does_not_hold_the_training_up(
    plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    monkeypatch.setattr(log.os, "write", lambda handle, data: time.sleep(0.3) or real(handle, data))
    stamps: list[float] = []
    options = {**OPTIONS, "every": None, "stats_every": None, "log_every": 1, "log_dir": tmp_path}
    watched = trained_one_layer(options, inside=lambda step: stamps.append(time.perf_counter()))
    assert plain[0] == watched[0]
    assert stamps[-1] - stamps[0] < 0.3 * STEPS / 2  # one write per step would take twice as long
    monkeypatch.setattr(log, "_MOST_WAITING", 3)
    trained_one_layer({**options, "log_dir": tmp_path / "b"})
    assert read_run(tmp_path / "b").header


def test_training_with_nan_weights_is_not_changed_by_the_watch(tmp_path: Path) -> None:
    def poisoned() -> nn.Module:
        model = one_layer()
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(float("nan"))
        return model

    plain = trained(8, None, make=poisoned)
    watched = trained(8, {**OPTIONS, "log_dir": tmp_path, "strict": True}, make=poisoned)
    assert [str(v) for v in plain[0]] == [str(v) for v in watched[0]]
    (alert,) = lines(tmp_path, "alert")
    assert alert["code"] == "JD505" and alert["level"] == "error" and alert["step"] == 1
    assert lines(tmp_path, "step")[0]["loss"] == "nan"
    assert lines(tmp_path, "probe")[0]["report"]["sublayers"][0]["branch_norm"] is None


def test_a_module_that_vanishes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def run(watched: bool) -> list[float]:
        torch.manual_seed(1)
        model = small()
        optimizer = adam(model)
        w = (
            jacdiag.watch(model, optimizer, log_dir=tmp_path, quiet=True, **OPTIONS)
            if watched
            else None
        )
        losses = []
        for step in range(1, 17):
            if step == 7:
                del model.transformer["h"][1]
            loss, norm = plain_step(model, optimizer, step)
            losses.append(float(loss.detach()))
            if w is not None:
                w.step(loss, grad_norm=norm)
        if w is not None:
            w.close()
        return losses

    assert run(False) == run(True)
    assert any("parameters changed" in row["text"] for row in lines(tmp_path, "note"))
    assert len(lines(tmp_path, "probe")[-1]["report"]["sublayers"]) == 2


def test_kill_in_the_middle_of_a_run_leaves_whole_lines(tmp_path: Path) -> None:
    code = f"""
from monitor.rig import trained
trained(10_000, dict(every=None, stats_every=None, log_every=1, log_dir={str(tmp_path)!r}))
"""
    process = fork_server().start(["-c", code])
    file = tmp_path / "run.jsonl"
    until = time.monotonic() + 120
    while time.monotonic() < until and not (file.exists() and file.read_bytes().count(b"\n") > 20):
        time.sleep(0.05)
    process.kill()
    run = read_run(tmp_path)
    assert [row["step"] for row in run.steps] == list(range(1, len(run.steps) + 1)) and len(
        run.steps
    ) > 10
    with file.open("ab") as handle:
        handle.write(b'{"v":1,"type":"step","step":99')  # a kill in the middle of a write
    assert len(read_run(tmp_path).steps) == len(run.steps)
    model = small()
    optimizer = adam(model)
    with jacdiag.watch(
        model, optimizer, log_dir=tmp_path, resume=True, every=None, log_every=1, quiet=True
    ) as w:
        assert w.count == len(run.steps)
        loss, _ = plain_step(model, optimizer, 1)
        w.step(loss)
    for line in file.read_text(encoding="utf-8").splitlines():
        json.loads(line)
    assert [row["step"] for row in read_run(tmp_path).steps] == list(range(1, len(run.steps) + 2))


def test_an_untraceable_model_keeps_its_figures(tmp_path: Path) -> None:
    """No sub-layer can be found: parameters are grouped by module, and the probe is off."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = adam(model)
    with jacdiag.watch(model, optimizer, log_dir=tmp_path, log_every=2, quiet=True) as w:
        for _ in range(4):
            loss = model(torch.ones(2, 4)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            w.step(loss)
    assert lines(tmp_path, "run")[0]["groups"] == ["0", "2"]
    assert [row["part"] for row in lines(tmp_path, "fault")] == ["probe"]
    assert all(row["grad_norm_post"] > 0 for row in lines(tmp_path, "step"))


def test_memory_that_does_not_fit_skips_the_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "available", lambda device: 1000)
    trained(8, {**OPTIONS, "log_dir": tmp_path, "strict": True})
    assert not lines(tmp_path, "probe") and lines(tmp_path, "stats")
    assert sum("free" in row["text"] for row in lines(tmp_path, "note")) == 1


# -- cause and cure --------------------------------------------------------------------------------
def test_a_probe_that_cannot_run_the_model_says_the_models_own_error_and_what_helps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small(dropout=0.0)
    optimizer = adam(model)
    wrong = torch.full((1, 4), 10**6)  # far beyond the vocabulary
    with (
        caplog.at_level(logging.WARNING, "jacdiag.watch"),
        jacdiag.watch(model, optimizer, log_dir=tmp_path, probe=wrong, quiet=True) as w,
    ):
        for step in range(1, 3):
            loss, norm = plain_step(model, optimizer, step)
            w.step(loss, grad_norm=norm)
    (said,) = [r.getMessage() for r in caplog.records if "probe failed" in r.getMessage()]
    assert "What helps: " in said and "The training goes on." in said
    (row,) = lines(tmp_path, "fault")
    assert row["cure"] and row["error"] in said and row["cure"] in said


@pytest.mark.parametrize(
    ("part", "error", "cause", "cure"),
    [
        (
            "probe",
            TraceError(
                "the model's forward raised",
                got="RuntimeError: no mask\nat model.py:7 in forward: x",
            ),
            "no mask; at model.py:7 in forward",
            "probe=INPUTS",
        ),
        (
            "probe",
            TraceError("nothing found", hint="declare= names them"),
            "nothing found",
            "declare= names them",
        ),
        ("probe", torch.OutOfMemoryError("2 GB"), "2 GB", "give the probe less"),
        ("log", OSError("No space left on device"), "No space left", "resume=True"),
        ("on_alert", KeyError("x"), "KeyError", "mend the function"),
        ("sink Wandb", RuntimeError("offline"), "offline", "check what the sink writes to"),
        ("figures", ValueError("odd"), "odd", "strict=True"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_every_fault_has_its_cause_and_its_cure(
    part: str, error: Exception, cause: str, cure: str
) -> None:
    told: list[tuple[str, ...]] = []
    Guards(strict=False, told=lambda *given: told.append(given)).fail(
        part, error, "nothing from now on"
    )
    ((name, said, loses, helps),) = told
    assert (name, loses) == (part, "nothing from now on") and cause in said and cure in helps


def test_a_cause_is_one_line_and_what_it_came_from_is_in_it() -> None:
    try:
        try:
            raise KeyError("mask")
        except KeyError as error:
            raise TraceError("a copy could not be made") from error
    except TraceError as error:
        said = describe_cause(error)
    assert said == "TraceError: a copy could not be made; KeyError: 'mask'"
    assert (
        "\n" not in describe_cause(TraceError("a", got="b\nc" * 500))
        and len(describe_cause(ValueError())) < 20
    )
