"""Logs that a Hugging Face Trainer and TensorBoard wrote are read as runs."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jacdiag_cli.main import main
from torch import nn

from jacdiag.backtest import read_runs
from jacdiag.errors import SourceError, UsageError

STEPS = 12


class Line(nn.Module):
    """A line through the origin, with the loss that a Trainer asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the loss."""
        return {"loss": ((x @ self.weight - labels) ** 2).mean()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output folder of a Trainer, with checkpoints and TensorBoard's files in it."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    folder = tmp_path_factory.mktemp("trainer") / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "runs"))
        options = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            logging_steps=1,
            save_steps=5,
            learning_rate=0.1,
            use_cpu=True,
            report_to=["tensorboard"],
            disable_tqdm=True,
        )
        x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
        rows = [{"x": row, "labels": row.sum()} for row in x]
        trainer = transformers.Trainer(model=Line(), args=options, train_dataset=rows)
        trainer.train()
        trainer.save_state()
    return folder


def event_folder(folder: Path) -> Path:
    """Return the folder below another that event files are in."""
    return next(folder.rglob("*tfevents*")).parent


def test_a_trainers_state_is_a_run(trained: Path) -> None:
    state = json.loads((trained / "trainer_state.json").read_text())
    logged = [row for row in state["log_history"] if "loss" in row]
    (run,) = read_runs([trained / "trainer_state.json"])
    assert run.name == "first"
    assert run.steps.tolist() == list(range(1, STEPS + 1))
    assert run.loss.tolist() == [row["loss"] for row in logged]
    assert run.grad_norm.tolist() == [row["grad_norm"] for row in logged]
    assert run.factors["lr"] == max(row["learning_rate"] for row in logged)
    assert run.whole


def test_tensorboards_files_of_the_same_run_say_the_same(trained: Path) -> None:
    (state,) = read_runs([trained / "trainer_state.json"])
    for path in (event_folder(trained), next(trained.rglob("*tfevents*"))):
        (events,) = read_runs([path])
        assert events.steps.tolist() == state.steps.tolist()
        assert events.loss == pytest.approx(state.loss, abs=1e-4)
        assert events.grad_norm == pytest.approx(state.grad_norm, rel=1e-4)
        assert events.factors["lr"] == pytest.approx(state.factors["lr"])


def test_a_folder_gives_each_run_once(trained: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(trained, tmp_path / "runs" / name)
    (tmp_path / "runs" / "b" / "trainer_state.json").unlink()
    (tmp_path / "runs" / "b" / "factors.json").write_text('{"recipe": "wide"}')
    first, second = read_runs([tmp_path / "runs"])
    assert (first.name, second.name) == ("a", "b")
    # b has its latest checkpoint only, which the Trainer wrote at its end
    assert second.factors["recipe"] == "wide"
    assert second.steps.tolist() == first.steps.tolist()


def test_a_checkpoint_in_the_middle_is_no_whole_run(trained: Path) -> None:
    (run,) = read_runs([trained / "checkpoint-5" / "trainer_state.json"])
    assert run.name == "first"
    assert run.steps[-1] == 5
    assert not run.whole


def test_a_run_that_stopped_early_by_its_own_rule_is_whole(trained: Path, tmp_path: Path) -> None:
    state = json.loads((trained / "checkpoint-5" / "trainer_state.json").read_text())
    state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"] = True
    state["trial_params"] = {"learning_rate": 0.1, "width": 64}
    file = tmp_path / "trainer_state.json"
    file.write_text(json.dumps(state))
    (run,) = read_runs([file])
    assert run.whole
    assert run.factors["width"] == 64


def test_a_trainers_loss_that_is_nan_broke(trained: Path, tmp_path: Path) -> None:
    state = json.loads((trained / "trainer_state.json").read_text())
    state["log_history"][STEPS - 1]["loss"] = math.nan
    file = tmp_path / "trainer_state.json"
    file.write_text(json.dumps(state))
    assert np.isnan(read_runs([file])[0].loss[-1])


def test_a_run_of_jacdiag_inside_is_not_read_a_second_time(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "both")
    lines: list[dict[str, Any]] = [{"type": "run", "schema_version": 1}]
    lines += [{"type": "step", "step": k, "loss": 3.0} for k in range(1, 20)]
    (tmp_path / "both" / "log").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "both" / "log" / "run.jsonl").write_text(text)
    assert [len(run.steps) for run in read_runs([tmp_path])] == [19]


def test_scalars_of_pytorch_and_of_other_names(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "x")) as writer:
        for step in range(10):
            writer.add_scalar("cross entropy", 3.0 - 0.1 * step, step)
            writer.add_histogram("weights", torch.ones(4), step)
        writer.add_text("note", "a text is no scalar", 3)
    with pytest.raises(UsageError, match="has no column 'loss'") as caught:
        read_runs([tmp_path / "x"])
    assert "cross entropy" in str(caught.value.got)
    (run,) = read_runs([tmp_path / "x"], {"loss": "cross entropy"})
    assert run.name == "x"
    assert run.loss == pytest.approx(3.0 - 0.1 * np.arange(10))


def test_scalars_that_are_tensors(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.scalar import metadata
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.util.tensor_util import make_tensor_proto

    kind = metadata.create_summary_metadata("loss", "")
    writer = EventFileWriter(str(tmp_path))
    for step in range(5):
        tensor = make_tensor_proto(2.0 + step)
        value = Summary.Value(tag="loss", tensor=tensor, metadata=kind)
        writer.add_event(Event(step=step, summary=Summary(value=[value])))
    writer.close()
    assert read_runs([tmp_path])[0].loss.tolist() == [2.0, 3.0, 4.0, 5.0, 6.0]


def test_without_tensorboard_the_way_out_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "events.out.tfevents.1.host").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing", None)
    assert main(["backtest", str(tmp_path)]) == 2
    assert "pip install 'jacdiag[tensorboard]'" in capsys.readouterr().err


def test_a_json_of_something_else_is_no_run(tmp_path: Path) -> None:
    file = tmp_path / "trainer_state.json"
    file.write_text('{"epoch": 1}')
    with pytest.raises(SourceError, match="no state of a Trainer"):
        read_runs([file])
    with pytest.raises(SourceError, match="no run was found"):
        read_runs([_empty(tmp_path)])


def _empty(folder: Path) -> Path:
    """Return a folder with nothing in it."""
    (folder / "empty").mkdir()
    return folder / "empty"


def test_tables_below_a_folder_are_read_if_there_is_no_log(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text("step,loss\n1,3.0\n2,2.9\n")
    assert [run.name for run in read_runs([tmp_path])] == ["a", "b"]
