"""The run log: append-only, whole lines, going on without gaps or doubles; and clear words for bad
use.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from monitor.rig import adam, batch, lines, plain_step, small
from torch import nn

import jacdiag
from jacdiag.errors import SourceError, UsageError
from jacdiag.monitor.jacobian_probe import Price
from jacdiag.monitor.log.run_file import RunFile
from jacdiag.monitor.schedule import Clock
from jacdiag.records.run_log import KINDS, RUN_FILE, RUN_SCHEMA_VERSION, read_run, to_line

OPTIONS: dict[str, Any] = {
    "every": 10,
    "stats_every": 5,
    "log_every": 4,
    "quiet": True,
    "strict": True,
}


def go(model: Any, optimizer: Any, w: Any, steps: range) -> None:
    for step in steps:
        loss, norm = plain_step(model, optimizer, step)
        w.step(loss, grad_norm=norm)


def test_resume_from_a_checkpoint_has_no_gaps_and_no_doubles(tmp_path: Path) -> None:
    """Killed at step 23, resumed from the checkpoint of step 14: as if nothing had happened."""
    straight, broken = tmp_path / "a", tmp_path / "b"
    model = small()
    optimizer = adam(model)
    with jacdiag.watch(model, optimizer, log_dir=straight, **OPTIONS) as w:
        go(model, optimizer, w, range(1, 31))

    model = small()
    optimizer = adam(model)
    w = jacdiag.watch(model, optimizer, log_dir=broken, **OPTIONS)
    go(model, optimizer, w, range(1, 15))
    saved = tmp_path / "checkpoint.pt"
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "watch": w.state_dict(),
        "random": torch.get_rng_state(),
    }
    torch.save(state, saved)
    go(model, optimizer, w, range(15, 24))
    w.flush()
    w.file = None
    w.close()

    model = small()
    optimizer = adam(model)
    loaded = torch.load(saved, weights_only=True)  # plain containers and tensors: no code in it
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    torch.set_rng_state(loaded["random"])
    with jacdiag.watch(model, optimizer, log_dir=broken, resume=True, **OPTIONS) as w:
        w.load_state_dict(loaded["watch"])
        assert w.count == 14
        go(model, optimizer, w, range(15, 31))
    one, other = read_run(straight), read_run(broken)
    assert (
        [row["step"] for row in other.steps]
        == list(range(1, 31))
        == [row["step"] for row in one.steps]
    )
    assert other.column("loss") == one.column("loss")
    assert [row["scores"] for row in other.steps] == [row["scores"] for row in one.steps]
    assert other.resumes == [14] and [row["step"] for row in other.probes] == [0, 10, 14, 20, 30]
    assert one.probes[1]["figures"]["branch_norm"] == other.probes[1]["figures"]["branch_norm"]
    last = one.probes[-1]["figures"]["core_norm"], other.probes[-1]["figures"]["core_norm"]
    # the same probe, the same weights, other starts
    assert last[0] == pytest.approx(last[1], rel=0.02)


def test_every_line_has_the_schema_and_a_known_type(tmp_path: Path) -> None:
    model = small()
    optimizer = adam(model)
    with jacdiag.watch(model, optimizer, log_dir=tmp_path, **OPTIONS) as w:
        go(model, optimizer, w, range(1, 12))
    rows = lines(tmp_path)
    assert {row["v"] for row in rows} == {RUN_SCHEMA_VERSION} and {
        row["type"] for row in rows
    } <= set(KINDS)
    assert rows[0]["type"] == "run" and rows[-1]["type"] == "end"
    step = next(row for row in rows if row["type"] == "step")
    assert set(step) >= {
        "step",
        "loss",
        "lr",
        "tokens",
        "step_seconds",
        "grad_norm",
        "grad_norm_post",
        "clipped",
        "clip_ratio",
        "skipped",
        "nonfinite",
        "grad",
        "update",
        "votes",
        "scores",
    }
    report = next(row for row in rows if row["type"] == "probe")["report"]
    assert jacdiag.Report.from_json(json.dumps(report)).tier == "measured"
    price = next(row for row in rows if row["type"] == "price")
    assert price["probe_seconds"] > 0 and price["probe_peak_bytes"] > 0


def test_the_price_is_said_before_the_first_probe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small()
    optimizer = adam(model)
    with jacdiag.watch(model, optimizer, log_dir=tmp_path, **{**OPTIONS, "quiet": False}) as w:
        go(model, optimizer, w, range(1, 9))
    said = capsys.readouterr().err
    assert (
        "4 sub-layers" in said
        and "Jacobian probe on 2 x 8 about" in said
        and "every 10 steps" in said
    )
    # A probe of this model takes much longer than ten steps of it.
    assert "times the time of the steps, at" in said or "% of the time of the steps, at" in said
    kinds = [row["type"] for row in lines(tmp_path)]
    assert kinds.index("price") < kinds.index("probe")


@pytest.mark.parametrize(
    ("probe_seconds", "text"), [(0.3, "30.0% of the time"), (5.5, "5.5 times")]
)
def test_the_price_in_steps_never_is_more_than_all_of_the_run(
    probe_seconds: float, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small()
    optimizer = adam(model)
    options = {**OPTIONS, "quiet": False, "every": 10}
    with jacdiag.watch(model, optimizer, log_dir=tmp_path, **options) as w:
        go(model, optimizer, w, range(1, 2))
        w.measurements.price = Price(probe_seconds, 0)
        clock = Clock()
        clock.steps.extend([0.1] * 10)
        w.measurements._announce_share(clock)
        said = capsys.readouterr().err.splitlines()[-1]
        row = w.measurements.price.seconds / (10 * 0.1)
    assert f"the probe takes {text}" in said and "the steps, at 0.1 s a step" in said
    assert ("85% of the run" in said) == (probe_seconds > 1) and "550" not in said
    (share,) = [r["probe_share"] for r in lines(tmp_path, "price") if "probe_share" in r]
    assert share == pytest.approx(row)


def test_a_budget_keeps_the_probe_within_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jacdiag.monitor.schedule import Cadence

    cadence = Cadence.of("2%", "every")
    assert cadence.due(0)
    cadence.last = 0
    assert not cadence.due(1, price=1.0, step_seconds=None), "not known yet"
    assert next(step for step in range(1, 500) if cadence.due(step, price=None)) == 200, (
        "it had not the memory"
    )
    due = [step for step in range(1, 1000) if cadence.due(step, price=1.0, step_seconds=0.5)]
    assert due[0] == 100  # 1 s in 100 steps of 0.5 s


@pytest.mark.parametrize(
    ("step_seconds", "first"), [(1.0, 200), (0.5, 200), (0.4, 400), (0.1, 1000)]
)
def test_steps_with_a_budget_keep_both(step_seconds: float, first: int) -> None:
    from jacdiag.monitor.schedule import Cadence

    cadence = Cadence.of("200, 1%", "every")
    assert cadence.due(0)
    cadence.last = 0
    due = [
        step for step in range(1, 1001) if cadence.due(step, price=1.0, step_seconds=step_seconds)
    ]
    assert due[0] == first and cadence.interval(1.0, step_seconds) == first
    assert not any(step % 200 for step in due)


def test_reading_another_log_version_or_no_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot read"):
        read_run(tmp_path)
    file = tmp_path / "run.jsonl"
    file.write_bytes(b"no json\n[1]\n")
    with pytest.raises(SourceError, match="no run log"):
        read_run(file)
    file.write_bytes(to_line("run", {}).replace(b'"v":1', b'"v":2'))
    with pytest.raises(SourceError, match="newer"):
        read_run(file)


# -- bad use ---------------------------------------------------------------------------------------
def test_a_log_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    model = small()
    optimizer = adam(model)
    with jacdiag.watch(model, optimizer, log_dir=tmp_path, **OPTIONS) as w:
        go(model, optimizer, w, range(1, 3))
    with pytest.raises(UsageError, match="resume=True"):
        jacdiag.watch(model, optimizer, log_dir=tmp_path)


def test_two_watches_on_one_model(tmp_path: Path) -> None:
    model = small()
    optimizer = adam(model)
    with jacdiag.watch(model, optimizer, quiet=True):
        with pytest.raises(UsageError, match="watched already"):
            jacdiag.watch(model, optimizer)
        with pytest.raises(UsageError, match="watched already"):
            jacdiag.watch(torch.compile(model), optimizer)
    jacdiag.watch(model, optimizer, quiet=True).close()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda m: adam(small()), "none of the model's parameters"),
        (lambda m: m, "no torch.optim optimizer"),
        (lambda m: [], "no torch.optim optimizer"),
        (
            lambda m: type("OptimizersInBackwardContainer", (), {"optimizers": [adam(m)]})(),
            "inside the backward",
        ),
        (
            lambda m: type(
                "ZeroOptimizer",
                (),
                {"__module__": "deepspeed.runtime.zero.stage3", "optimizer": adam(m)},
            )(),
            "DeepSpeed",
        ),
        (
            lambda m: type("DistributedOptimizer", (), {"__module__": "megatron.core.optimizer"})(),
            "Megatron",
        ),
    ],
    ids=["another model's", "no optimiser", "empty", "in backward", "DeepSpeed", "Megatron"],
)
def test_optimizers_that_cannot_be_watched_are_named(make: Any, says: str) -> None:
    model = small()
    with pytest.raises(UsageError, match=says):
        jacdiag.watch(model, make(model))


def test_models_that_cannot_be_watched_are_named() -> None:
    model = small()
    optimizer = adam(model)
    with pytest.raises(UsageError, match="pipeline stages"):
        jacdiag.watch([model], optimizer)  # type: ignore[arg-type]
    stage = type("PipelineStage", (), {"__module__": "torch.distributed.pipelining.stage"})()
    with pytest.raises(UsageError, match="pipeline stages"):
        jacdiag.watch(stage, optimizer)  # type: ignore[arg-type]
    from torch.distributed.optim import _apply_optimizer_in_backward

    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    with pytest.raises(UsageError, match="inside the backward"):
        jacdiag.watch(model, optimizer)


@pytest.mark.parametrize(
    "wrong",
    [
        {"every": "often"},
        {"every": -5},
        {"every": True},
        {"every": "0%"},
        {"log_every": 0},
        {"on_alert": "shout"},
        {"sinks": ["graphite"]},
        {"sinks": [3]},
        {"thresholds": {"joint_both": {"warning": "high"}}},
    ],
    ids=str,
)
def test_invalid_watch_options_are_refused_before_any_hook(wrong: dict[str, Any]) -> None:
    model = small()
    with pytest.raises(UsageError):
        jacdiag.watch(model, adam(model), **wrong)
    assert not model._forward_pre_hooks


def test_watch_whose_step_was_never_called_warns(caplog: pytest.LogCaptureFixture) -> None:
    model = small()
    optimizer = adam(model)
    with jacdiag.watch(model, optimizer, every=None, quiet=True):
        plain_step(model, optimizer, 1)
    assert "step was never called" in caplog.text
    caplog.clear()
    with jacdiag.watch(model, optimizer, every=None, quiet=True) as w:
        for step in range(120):
            plain_step(model, optimizer, step)
        assert "without a call of step" in caplog.text
        w.step(1.0)


def test_two_watch_steps_for_one_optimizer_step_warn_once(caplog: pytest.LogCaptureFixture) -> None:
    model = small()
    optimizer = adam(model)
    with jacdiag.watch(model, optimizer, every=None, quiet=True) as w:
        for step in range(30):
            loss, _ = plain_step(model, optimizer, step)
            w.step(loss)
            w.step(loss)
    assert caplog.text.count("once per optimizer step") == 1


def test_step_after_the_end_and_late_states() -> None:
    model = small()
    optimizer = adam(model)
    w = jacdiag.watch(model, optimizer, every=None, quiet=True)
    state = w.state_dict()
    w.step(1.0)
    with pytest.raises(UsageError, match="after a step"):
        w.load_state_dict(state)
    w.close()
    w.close()
    with pytest.raises(UsageError, match="closed"):
        w.step(1.0)
    with (
        jacdiag.watch(model, optimizer, every=None, quiet=True) as w,
        pytest.raises(UsageError, match="version 7"),
    ):
        w.load_state_dict({**state, "version": 7})


def test_parameters_without_an_optimizer_get_a_warning(tmp_path: Path) -> None:
    model = small()
    some = torch.optim.SGD(model.transformer["h"].parameters(), lr=0.1)  # type: ignore[union-attr]
    with jacdiag.watch(model, some, log_dir=tmp_path, every=None, quiet=True):
        pass
    assert "in no optimizer" in lines(tmp_path, "note")[0]["text"]


def test_layer_added_to_the_optimizer_is_grouped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small()
    optimizer = adam(model)
    with jacdiag.watch(
        model, optimizer, log_dir=tmp_path, every=None, log_every=2, quiet=True
    ) as w:
        go(model, optimizer, w, range(1, 3))
        model.extra = nn.Linear(2, 2)
        optimizer.add_param_group({"params": model.extra.parameters()})
        model.extra(torch.ones(1, 2)).sum().backward()
        _, loss = model(*batch(3))
        loss.backward()
        optimizer.step()
        w.step(loss)
        go(model, optimizer, w, range(4, 7))
    assert "parameters changed" in caplog.text


def appended(folder: Path) -> tuple[bytes, list[Exception]]:
    """Writes two lines through a RunFile and returns them with its faults."""
    faults: list[Exception] = []
    file = RunFile(folder, resume=False, failed=faults.append)
    rows = [{"step": 1, "text": "a"}, {"step": 2, "text": "b"}]
    file.write("note", rows)
    file.close()
    return b"".join(to_line("note", row) for row in rows), faults


def test_log_that_is_a_symlink_is_written_to_its_target(tmp_path: Path) -> None:
    (tmp_path / RUN_FILE).symlink_to("elsewhere.jsonl")
    expected, faults = appended(tmp_path)
    assert (tmp_path / "elsewhere.jsonl").read_bytes() == expected and not faults
    assert (tmp_path / RUN_FILE).is_symlink()


def test_a_log_that_is_a_pipe_does_not_wait_for_its_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / RUN_FILE)
    holder = os.open(tmp_path / RUN_FILE, os.O_RDONLY | os.O_NONBLOCK)
    expected, faults = appended(tmp_path)
    assert os.read(holder, 10_000) == expected and not faults
    os.close(holder)
    assert stat.S_ISFIFO((tmp_path / RUN_FILE).stat().st_mode)
    assert not appended(tmp_path)[1], "nobody reads, and the training goes on"


def test_a_log_on_a_full_device_is_a_fault_and_the_device_stays(tmp_path: Path) -> None:
    (tmp_path / RUN_FILE).symlink_to("/dev/full")
    faults = appended(tmp_path)[1]
    assert len(faults) == 1 and "No space left" in str(faults[0])
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)


def test_a_folder_in_place_of_the_log(tmp_path: Path) -> None:
    (tmp_path / RUN_FILE).mkdir()
    with pytest.raises(UsageError, match=r"a folder named run\.jsonl"):
        appended(tmp_path)
