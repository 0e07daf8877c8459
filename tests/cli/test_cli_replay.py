"""`audit --replay`: runs with a known fault, checkpoints around it, and what the audit says of
them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from monitor.rig import T, V, adam, small
from torch import Tensor

import jacdiag
from jacdiag.errors import SourceError, UsageError
from jacdiag.records import ReplayRecord
from jacdiag.render.formats.markdown import render

AT = 120
SIZES = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "vocab_size": V,
    "block_size": T,
    "embed_scale": 4.0,
}


def sentences(step: int) -> tuple[Tensor, Tensor]:
    """Ids that follow from the one before, but for one in seven."""
    generator = torch.Generator().manual_seed(step)
    columns = [torch.randint(V, (8, 1), generator=generator)]
    for _ in range(T):
        jump = (torch.rand(8, 1, generator=generator) < 0.15) * torch.randint(
            V, (8, 1), generator=generator
        )
        columns.append((columns[-1] * 3 + 1 + jump) % V)
    ids = torch.cat(columns, 1)
    return ids[:, :-1], ids[:, 1:]


def noise(rows: int = 8) -> tuple[Tensor, Tensor]:
    ids = torch.randint(V, (rows, T + 1), generator=torch.Generator().manual_seed(99))
    return ids[:, :-1], ids[:, 1:]


def train(
    folder: Path,
    fault: str = "",
    *,
    micro: int = 1,
    keep: int = 12,
    clip: bool = True,
    targets: bool = True,
) -> Path:
    """Train with one fault at step `AT`; save checkpoints, and write the flight of that step.

    Args:
        folder: of the run.
        fault: "batch", "sequence", "attention" or "rate".
        micro: batches of a step.
        keep: batches that are kept.
        clip: the norm before clipping is logged.
        targets: the model is called with its targets.
    """
    model = small(dropout=0.0)
    optimizer = adam(model)
    options: dict[str, Any] = {
        "every": 100,
        "stats_every": None,
        "log_every": 5,
        "quiet": True,
        "keep_batches": keep,
    }
    with jacdiag.watch(model, optimizer, log_dir=folder, **options) as w:
        for step in range(1, AT + 4):
            if step == AT and fault == "attention":
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        parameter.mul_(8 if "attn" in name and parameter.dim() == 2 else 1)
            if step == AT - 1 and fault == "rate":
                optimizer.param_groups[0]["lr"] *= 30
            total = 0.0
            for part in range(micro):
                x, y = sentences(step * micro + part)
                if step == AT and fault == "batch":
                    x, y = noise()
                if step == AT and fault == "sequence":
                    x, y = (
                        torch.cat([bad, good[2:]])
                        for bad, good in zip(noise(2), (x, y), strict=True)
                    )
                if targets:
                    _, loss = model(x, y)
                else:
                    logits = model(x)
                    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
                (loss / micro).backward()
                total += float(loss.detach()) / micro
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0 if clip else 1e9)
            optimizer.step()
            optimizer.zero_grad()
            w.step(total, grad_norm=norm if clip else None)
            if step in (10, AT - 40, AT - 1, AT, AT + 3):
                saved = {"model": model.state_dict(), "model_args": SIZES, "step": step}
                torch.save(saved, folder / f"{step}.pt")
            if step == AT + 2:
                w.flush()
                w.record.recorder.dumps = 0  # type: ignore[union-attr]
                w.record.dump(AT, "a flight of the test")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    faults = ("", "batch", "sequence", "attention", "rate")
    return {fault: train(tmp_path_factory.mktemp(fault or "none"), fault) for fault in faults}


def replayed(folder: Path, checkpoint: Path | int) -> ReplayRecord:
    """The replay alone: no norm is measured."""
    path = folder / f"{checkpoint}.pt" if isinstance(checkpoint, int) else checkpoint
    (flight,) = folder.glob(f"flight-{AT}")
    report = jacdiag.audit(str(path), replay=flight, products=False)
    assert report.replay is not None
    return report.replay


# -- the three verdicts ----------------------------------------------------------------------------
@pytest.mark.parametrize("step", [AT - 40, AT - 1, AT + 3])
def test_a_corrupted_batch_in_a_healthy_run_is_the_batch(runs: dict[str, Path], step: int) -> None:
    replay = replayed(runs["batch"], step)
    assert replay.verdict == "batch", replay.sentence
    assert (replay.step, replay.onset, replay.checkpoint_step) == (AT, AT, step)
    (suspect,) = replay.suspects
    assert suspect.step == AT and sum(bool(s.outlying) for s in suspect.sequences) >= 4
    assert not any(
        s.outlying for batch in replay.others for s in batch.sequences if batch.step < AT
    )
    if step == AT - 1:  # the very weights: the run's own numbers come back
        assert suspect.loss == pytest.approx(suspect.logged_loss, rel=1e-4)
        assert suspect.gradient == pytest.approx(suspect.logged_gradient, rel=1e-3)
        assert "the weights that the batch of step 120 met" in replay.about_checkpoint


def test_corrupted_sequences_are_found_in_their_batch(runs: dict[str, Path]) -> None:
    replay = replayed(runs["sequence"], AT - 1)
    (suspect,) = replay.suspects
    assert {place for place, s in enumerate(suspect.sequences) if s.outlying} == {0, 1}
    # A healthy sequence has a surprise now and then: one token in seven follows from nothing.
    assert sum(token.sequence in (0, 1) for token in replay.tokens) >= len(replay.tokens) / 2
    assert replay.verdict in ("batch", "not decided")


@pytest.mark.parametrize("fault", ["attention", "rate"])
def test_a_healthy_batch_after_the_weights_were_wrecked(runs: dict[str, Path], fault: str) -> None:
    verdicts = {step: replayed(runs[fault], step) for step in (AT - 40, AT - 1, AT)}
    assert all(replay.verdict != "batch" for replay in verdicts.values())
    assert verdicts[AT].verdict == "weights", verdicts[AT].sentence
    assert f"hold the update of step {AT}" in verdicts[AT].sentence
    assert verdicts[AT - 40].verdict == "not decided"
    assert "not the weights of the flight" in verdicts[AT - 40].about_checkpoint
    assert "a later checkpoint would decide" in verdicts[AT - 40].sentence
    if fault == "rate":  # the update of the step before made them so: the batch is not in them
        assert (
            verdicts[AT - 1].verdict == "weights"
            and "hold the update" not in verdicts[AT - 1].sentence
        )


@pytest.mark.parametrize("step", [10, AT])
def test_a_healthy_run_names_nothing(runs: dict[str, Path], step: int) -> None:
    replay = replayed(runs[""], step)
    assert replay.verdict == "not decided" and "usual for it" in replay.sentence


def test_a_checkpoint_of_a_wrong_step_is_not_the_weights_fault(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    """The loss of step 10 is far above that before the flight, as it was in the run."""
    for fault in ("attention", "batch"):
        early = replayed(runs[fault], 10)
        assert early.verdict != "weights" and "110 steps before step 120" in early.about_checkpoint
        # A checkpoint that does not say its step: it may be such an early one.
        saved = torch.load(runs[fault] / "10.pt", weights_only=True)
        del saved["step"]
        torch.save(saved, tmp_path / "unnamed.pt")
        unnamed = replayed(runs[fault], tmp_path / "unnamed.pt")
        assert unnamed.verdict == "not decided" and unnamed.checkpoint_step is None
        assert unnamed.about_checkpoint == "the checkpoint does not say its step"
    # One that names another step than its own: ordinary batches do not have on it what they had in
    # the run.
    saved["step"] = AT
    torch.save(saved, tmp_path / "false.pt")
    false = replayed(runs["batch"], tmp_path / "false.pt")
    assert false.verdict == "not decided", false.sentence


# Whatever the fault was, there is nothing to compare the batch with.
@pytest.mark.parametrize("fault", ["batch", pytest.param("attention", marks=pytest.mark.long)])
def test_one_batch_kept_decides_nothing(tmp_path: Path, fault: str) -> None:
    replay = replayed(train(tmp_path, fault, keep=1), AT)
    assert replay.verdict == "not decided"
    assert "keeps no other batch" in replay.sentence and "keep_batches" in replay.sentence


# -- other loops -----------------------------------------------------------------------------------
def test_micro_batches_of_the_step_are_replayed_together(tmp_path: Path) -> None:
    folder = train(tmp_path, "batch", micro=2, keep=24)
    replay = replayed(folder, AT - 1)
    assert replay.verdict == "batch" and len(replay.suspects) == 2
    assert any("2 micro-batches together" in note for note in replay.notes)


def test_a_loss_outside_the_model(tmp_path: Path) -> None:
    """The kept batch holds no targets: the loss is that of its own next tokens, and the report says
    so.
    """
    folder = train(tmp_path, "batch", targets=False)
    replay = replayed(folder, AT - 1)
    assert (
        "next-token cross entropy" in replay.computed and "may have been another" in replay.computed
    )
    assert replay.verdict == "batch", replay.sentence


def test_a_loop_that_does_not_tell_the_norm_before_clipping(tmp_path: Path) -> None:
    folder = train(tmp_path, "batch", clip=False)
    assert replayed(folder, AT - 1).verdict == "batch"


def test_a_flight_without_its_run(runs: dict[str, Path], tmp_path: Path) -> None:
    """A flight that was copied away has its own steps, and no probe of the run."""
    import shutil

    shutil.copytree(runs["batch"] / f"flight-{AT}", tmp_path / f"flight-{AT}")
    shutil.copy(runs["batch"] / f"{AT}.pt", tmp_path)
    replay = replayed(tmp_path, AT)
    assert replay.verdict == "batch" and not replay.norms and replay.probe_step is None


def test_a_batch_that_cannot_be_read_or_run(runs: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(runs["batch"] / f"flight-{AT}", tmp_path / f"flight-{AT}")
    shutil.copy(runs["batch"] / f"{AT}.pt", tmp_path)
    bad = next((tmp_path / f"flight-{AT}").glob("batch-3-before-*.pt"))
    torch.save(
        {"idx": torch.full((8, T), V + 5), "targets": torch.zeros(8, T, dtype=torch.long)}, bad
    )
    replay = replayed(tmp_path, AT)
    assert replay.verdict == "batch"
    assert any(bad.name in note and "could not be run" in note for note in replay.notes)
    assert [batch.loss is None for batch in replay.batches].count(True) == 1
    with pytest.raises(SourceError, match="no folder of a flight recorder"):
        jacdiag.audit(str(tmp_path / f"{AT}.pt"), replay=tmp_path)
    with pytest.raises(UsageError, match="given twice"):
        jacdiag.audit(str(tmp_path / f"{AT}.pt"), replay=tmp_path / f"flight-{AT}", tokens="t.npy")


def test_a_module_that_is_handed_in_is_as_it_was(runs: dict[str, Path]) -> None:
    model = small(dropout=0.1)
    model.load_state_dict(torch.load(runs["batch"] / f"{AT}.pt", weights_only=True)["model"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    report = jacdiag.audit(model, replay=runs["batch"] / f"flight-{AT}", products=False)
    assert report.replay is not None and report.replay.verdict == "batch"
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())


def test_a_hugging_face_folder_with_masked_labels_and_autocast(tmp_path: Path) -> None:
    """The weights of a folder stay in their files; the run was in bfloat16, with dropout."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "vocab_size": V,
        "n_positions": T,
        "resid_pdrop": 0.1,
    }
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    options: dict[str, Any] = {"every": None, "stats_every": None, "quiet": True, "keep_batches": 8}
    with jacdiag.watch(model, optimizer, log_dir=tmp_path, **options) as w:
        for step in range(1, AT + 1):
            ids, _ = noise() if step == AT else sentences(step)
            labels = ids.clone()
            labels[0, :4] = -100
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if step == AT:
                model.save_pretrained(tmp_path / "folder")
                state = json.dumps({"global_step": AT - 1})
                (tmp_path / "folder" / "trainer_state.json").write_text(state)
            optimizer.step()
            optimizer.zero_grad()
            w.step(loss.detach(), grad_norm=norm)
        w.flush()
        w.record.dump(AT, "a flight of the test")
    for dtype in (torch.float32, torch.bfloat16):
        replay = replayed(tmp_path, tmp_path / "folder")
        (suspect,) = replay.suspects
        assert replay.verdict == "batch" and replay.checkpoint_step == AT - 1
        assert [sequence.tokens for sequence in suspect.sequences] == [T - 4, *[T - 1] * 7]
        # without dropout, in float32
        assert suspect.loss == pytest.approx(suspect.logged_loss, rel=0.1)
        assert any("float32 copy" in note for note in replay.notes) == (dtype is torch.bfloat16)
        model.to(torch.bfloat16).save_pretrained(tmp_path / "folder")


# -- what a person and a program read --------------------------------------------------------------
def test_the_page_and_the_json(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from jacdiag_cli.main import main

    folder, path = runs["batch"], tmp_path / "report.json"
    flight = str(folder / f"flight-{AT}")
    assert (
        main(
            [
                "audit",
                str(folder / f"{AT}.pt"),
                "--replay",
                flight,
                "--fail-on",
                "never",
                "--json",
                str(path),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "  Replay  The batch: on these weights (step 120) its loss is" in out
    assert re.search(
        r"\n +step +loss +in run +gradient +in run +sequences out\n +120 suspect ", out
    )
    assert "the checkpoint is of step 120: the weights right after the batch of that step" in out
    assert "branch norms on the batch of step 120 compared with the probe of step 100" in out

    # 1. The JSON holds all of it, and comes back as it was; a report of before has none.
    text = path.read_text(encoding="utf-8")
    report = jacdiag.Report.from_json(text)
    assert report.replay is not None and report.replay.verdict == "batch"
    assert report.replay.to_dict() == json.loads(text)["replay"]
    assert len(report.replay.batches) == 12 and all(
        len(batch.sequences) == 8 for batch in report.replay.batches
    )
    assert report.replay.probe_step == 100 and len(report.replay.norms) == 4
    data = json.loads(text)
    del data["replay"]
    assert jacdiag.Report.from_dict(data).replay is None

    # 2. 80 columns, and no colour needed.
    report.table(width=80)
    narrow = capsys.readouterr().out
    section = narrow[narrow.index("  Replay ") : narrow.index("  Cost ")]
    assert max(map(len, section.splitlines())) <= 80 and "\x1b" not in section
    assert "120 suspect" in section and "usual before" in section and "more" in section
    assert len(section.splitlines()) < 40

    # 3. Markdown.
    assert "**Replay** The batch:" in render(report) and "| 120 suspect |" in render(report)


def test_a_report_without_a_replay_says_nothing_of_one(runs: dict[str, Path]) -> None:
    report = jacdiag.audit(str(runs["batch"] / f"{AT}.pt"), products=False)
    assert report.replay is None and "Replay" not in render(report)
