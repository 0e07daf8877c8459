"""The sinks with the real libraries: slash-named figures, and no network."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from watching.rig import lines, trained


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(8, {"every": 4, "log_every": 2, "log_dir": tmp_path, "sinks": ["tensorboard"], "strict": True})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"jacdiag/loss", "jacdiag/gain/transformer.h.0.attn", "jacdiag/grad/transformer.h.1.mlp"} <= set(tags)
    losses = [row["loss"] for row in lines(tmp_path, "step")]
    assert [e.value for e in events.Scalars("jacdiag/loss")] == pytest.approx(losses, rel=1e-6)
    assert [e.step for e in events.Scalars("jacdiag/gain/transformer.h.0.attn")] == [0, 4, 8]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trained(4, {"every": None, "log_every": 2, "log_dir": tmp_path, "sinks": ["wandb"], "strict": True})
    (file,) = tmp_path.rglob("*.wandb")
    assert b"jacdiag/loss" in file.read_bytes()
