"""The flight recorder: what it keeps, when it dumps, and an audit on the very batch that went
wrong.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monitor.rig import V, adam, batch, lines, plain_step, small

import jacdiag
from jacdiag.errors import SourceError
from jacdiag.monitor.batch_fingerprints import fingerprint
from jacdiag.monitor.kept_batches import SMALL, KeptBatches
from jacdiag.monitor.log.flight_recorder import read_batch

OPTIONS: dict[str, Any] = {
    "every": None,
    "stats_every": None,
    "log_every": 5,
    "quiet": True,
    "strict": True,
}


def go(
    folder: Path, steps: int, *corrupt_steps: int, corrupt: int | None = None, **more: Any
) -> tuple[Any, dict[int, Any]]:
    """Trains; at some steps the targets are noise and the loss is scaled up, as a broken batch
    does.
    """
    model = small(dropout=0.1)
    optimizer = adam(model, lr=1e-3)
    given: dict[int, Any] = {}
    broken = {corrupt, *corrupt_steps}
    with jacdiag.watch(model, optimizer, log_dir=folder, **{**OPTIONS, **more}) as w:
        for step in range(1, steps + 1):
            x, y = batch(step % 4)
            if step in broken:
                x, y = (
                    torch.randint(V, x.shape, generator=torch.Generator().manual_seed(99))
                    for _ in range(2)
                )
            given[step] = (x, y, torch.get_rng_state())
            _, loss = model(x, y)
            (loss * (50.0 if step in broken else 1.0)).backward()
            optimizer.step()
            optimizer.zero_grad()
            w.step(loss.detach() * (5.0 if step in broken else 1.0))
    return model, given


def test_an_alert_dumps_the_batch_that_went_wrong(tmp_path: Path) -> None:
    _, given = go(tmp_path, 160, corrupt=150, keep_batches=12)
    (alert,) = [row for row in lines(tmp_path, "alert") if row["code"] == "JD502"]
    assert alert["step"] == 150
    folder = tmp_path / "flight-150"
    about = json.loads((folder / "about.json").read_text())
    assert about["batch_step"] == 150 and "JD502" in about["why"]
    kept = read_batch(folder)
    assert set(kept) == {"idx", "targets"}  # by the names of the model's own forward
    assert torch.equal(kept["idx"], given[150][0]) and torch.equal(kept["targets"], given[150][1])
    random_state = torch.load(folder / "random.pt", weights_only=True)
    assert torch.equal(random_state["cpu"], given[150][2])
    rows = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 151))
    prints = {row["step"]: row["batches"] for row in lines(tmp_path, "step")}
    assert prints[149] == prints[145] != prints[150]  # the same batch again, and another
    assert len(list(folder.glob("batch-*-before-*.pt"))) > 0


def test_a_second_batch_that_went_wrong_can_be_replayed_though_its_rule_is_quiet(
    tmp_path: Path,
) -> None:
    _, given = go(tmp_path, 240, 150, 230, keep_batches=12)
    assert [r["step"] for r in lines(tmp_path, "alert") if r["code"] == "JD502"] == [150]
    (note,) = [row for row in lines(tmp_path, "note") if row.get("code") == "JD502"]
    assert note["step"] == 230 and note["text"].startswith("JD502 again at step 230: the loss")
    kept = read_batch(tmp_path / "flight-230")
    assert isinstance(kept, dict) and torch.equal(kept["idx"], given[230][0])


def test_a_crash_dumps_too_and_without_batches_it_says_how_to_keep_them(tmp_path: Path) -> None:
    model = small()
    optimizer = adam(model)
    options = {"log_dir": tmp_path, "recorder": 3, "keep_batches": 0, **OPTIONS}
    with pytest.raises(ZeroDivisionError), jacdiag.watch(model, optimizer, **options) as w:
        for step in range(1, 8):
            w.step(plain_step(model, optimizer, step)[0])
        _ = 1 / 0
    folder = tmp_path / "flight-7"
    assert [
        json.loads(line)["step"] for line in (folder / "steps.jsonl").read_text().splitlines()
    ] == [5, 6, 7]
    with pytest.raises(SourceError, match="holds no batch") as caught:
        read_batch(folder)
    assert "keep_batches" in (caught.value.hint or "")
    with pytest.raises(SourceError, match="no folder of a flight recorder"):
        read_batch(tmp_path / "nothing")


def test_evaluation_in_the_loop_is_no_batch(tmp_path: Path) -> None:
    model = small()
    optimizer = adam(model)
    with jacdiag.watch(model, optimizer, log_dir=tmp_path, keep_batches=4, **OPTIONS) as w:
        for step in range(1, 6):
            w.step(plain_step(model, optimizer, step)[0])
            model.eval()
            model(batch(100)[0])
            model.train()
        assert w.batches is not None and w.batches.kept is not None and len(w.batches.kept) == 4
    assert all(len(row["batches"]) == 1 for row in lines(tmp_path, "step"))


def test_small_batches_are_kept_without_being_asked_for(tmp_path: Path) -> None:
    """The batch of the alert, though the rules look at it up to nine steps later."""
    _, given = go(tmp_path, 160, corrupt=142, log_every=10)
    folder = tmp_path / "flight-142"
    assert json.loads((folder / "about.json").read_text())["batch_step"] == 142
    kept = read_batch(folder)
    assert isinstance(kept, dict) and torch.equal(kept["idx"], given[142][0])
    assert torch.equal(torch.load(folder / "random.pt", weights_only=True)["cpu"], given[142][2])
    before = sorted(
        int(path.stem.rpartition("-")[2]) for path in folder.glob("batch-*-before-*.pt")
    )
    assert len(before) >= 9 and before[0] >= 142 - 16 and before[-1] == 141, (
        "what --replay compares it with"
    )


def test_batches_that_are_kept_by_themselves_stay_small(tmp_path: Path) -> None:
    """Never more than 64 MB, no step twice as old as needed, and nothing of batches that are too
    large.
    """
    kept = KeptBatches(None, log_every=10)
    for step in range(1, 60):
        for _ in range(3):
            kept.add(step, {"x": torch.zeros(1000), "n": 3})
    assert len(kept) == 60 and kept.queue[0].step == 40 and kept.bytes == 60 * 4000
    assert [entry.step for entry in kept.chosen(45)] == [
        step for step in range(40, 46) for _ in range(3)
    ]
    assert {entry.step for entry in kept.chosen(59)} == set(range(59 - 16, 60)), (
        "where the cause of an alert may lie"
    )

    limit = SMALL // 10  # bytes of one step, at log_every=10
    for size, stays in ((limit, True), (limit + 8, False)):
        kept = KeptBatches(None, log_every=10)
        for step in range(1, 40):
            kept.add(step, {"x": torch.zeros(size, dtype=torch.uint8)})
        assert (len(kept) > 0) is stays and kept.bytes <= SMALL
        assert kept.step_bytes == (None if stays else size)
        assert [entry.step for entry in kept.chosen(35)][-1:] == ([35] if stays else [])

    model = small()
    optimizer = adam(model)
    large = torch.zeros(SMALL // 4, dtype=torch.uint8)
    with jacdiag.watch(model, optimizer, log_dir=tmp_path, **OPTIONS) as w:
        for step in range(1, 8):
            assert w.batches is not None and w.batches.kept is not None
            w.batches.kept.add(step, {"x": large})
            w.step(plain_step(model, optimizer, step)[0])
    (note,) = lines(tmp_path, "note")
    assert (
        "batches are not kept: those of a step take 16 MB" in note["text"]
        and "keep_batches=N" in note["text"]
    )


def test_fingerprints_tell_batches_apart() -> None:
    ids = torch.arange(12).view(3, 4)
    same = fingerprint(((ids,), {}))
    assert same == fingerprint(((ids.clone(),), {}))
    others = [ids.flip(0), ids + 1, ids.t(), ids.float() * 1.0001, torch.zeros_like(ids)]
    assert len({fingerprint(((t.contiguous(),), {})) for t in [ids, *others]}) == len(others) + 1
    assert fingerprint((("no tensor",), {})) == 0
    state = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert state == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002


def test_replay_audits_the_checkpoint_on_that_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from jacdiag_cli.main import main

    model, given = go(tmp_path, 160, corrupt=150, keep_batches=12)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": V, "block_size": 8}
    saved = {"model": model.state_dict(), "model_args": {**sizes, "embed_scale": 4.0}}
    torch.save(saved, tmp_path / "ckpt.pt")
    flight, report = str(tmp_path / "flight-150"), tmp_path / "report.json"
    code = main(
        [
            "audit",
            str(tmp_path / "ckpt.pt"),
            "--replay",
            flight,
            "--fail-on",
            "never",
            "--json",
            str(report),
        ]
    )
    assert code == 0, capsys.readouterr().err
    data = json.loads(report.read_text())
    assert data["probe"]["batch"] == 4 and data["probe"]["tokens"] == "inputs"
    assert data["settings"]["replayed"] == {"folder": flight, "step": 150, "batch_step": 150}
    assert (
        "4 x 8, from --replay, the batch of step 150" in capsys.readouterr().out
        and not data["notes"]
    )
    reference = jacdiag.audit(
        model.eval(), {"idx": given[150][0], "targets": given[150][1]}, state="trained"
    )
    for row, wanted in zip(data["sublayers"], reference.sublayers, strict=True):
        assert row["shortcut_std"]["median"] == pytest.approx(wanted.shortcut_std.median, rel=1e-5)
        assert row["branch_norm"]["estimate"] == pytest.approx(
            wanted.branch_norm.estimate, rel=1e-3
        )
    args = [
        "audit",
        str(tmp_path / "ckpt.pt"),
        "--replay",
        flight,
        "--batch",
        "1",
        "--tol",
        "0.3",
        "--fail-on",
        "never",
    ]
    assert main([*args, "--json", str(report)]) == 0
    assert json.loads(report.read_text())["probe"]["batch"] == 1
    capsys.readouterr()
    assert main(["audit", str(tmp_path / "ckpt.pt"), "--replay", str(tmp_path)]) == 2
    assert "no folder of a flight recorder" in capsys.readouterr().err


def test_flight_notes_batches_that_do_not_reach_the_alert(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Alerts are noticed every `log_every` steps: by then, two kept batches are those of later
    steps.
    """
    from jacdiag_cli.main import main

    model = small()
    with jacdiag.watch(
        model, adam(model), log_dir=tmp_path / "run", keep_batches=2, quiet=True
    ) as w:
        pass
    assert "keep_batches=10" in caplog.text
    caplog.clear()
    for options in (
        {"keep_batches": 10},
        {"keep_batches": 2, "log_every": 2},
        {},
        {"keep_batches": 2, "recorder": 0},
    ):
        with jacdiag.watch(
            model, adam(model), log_dir=tmp_path / str(options), quiet=True, **options
        ):
            pass
    assert w.closed and not caplog.text

    trained, _ = go(tmp_path / "b", 160, corrupt=145, keep_batches=2, log_every=10)
    flight = tmp_path / "b" / "flight-145"
    assert json.loads((flight / "about.json").read_text())["batch_step"] == 150
    sizes = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "vocab_size": V,
        "block_size": 8,
        "embed_scale": 4.0,
    }
    torch.save({"model": trained.state_dict(), "model_args": sizes}, tmp_path / "ckpt.pt")
    options = ["--replay", str(flight), "--tol", "0.3", "--fail-on", "never"]
    assert main(["audit", str(tmp_path / "ckpt.pt"), *options]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "from --replay, the batch of step 150" in out
    assert "the batch is of step 150, not of step 145 that flight-145 is about" in out
