"""Probe tokens: drawn, read from files, and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sources.rig import BUILD, SIZES
from torch import nn

from jacdiag.errors import ProbeError, TraceError
from jacdiag.sources import Probe, Source, build_probe, load
from jacdiag.sources.input_facts import vocabulary


@pytest.fixture
def source() -> Source:
    return load(BUILD, model_args=SIZES)


def ids(source: Source, **how: Any) -> torch.Tensor:
    found = build_probe(source, **how).token_ids
    assert found is not None
    return found


def test_random_tokens_are_seeded_and_within_the_vocabulary(source: Source) -> None:
    one, same, other = (
        ids(source, batch=3, seq=9),
        ids(source, batch=3, seq=9),
        ids(source, batch=3, seq=9, seed=1),
    )
    assert one.shape == (3, 9) and torch.equal(one, same) and not torch.equal(one, other)
    assert int(one.min()) >= 0 and int(one.max()) < SIZES["vocab_size"]


def test_the_default_length_is_what_the_model_allows(source: Source) -> None:
    assert ids(source).shape == (2, SIZES["block_size"])


def test_dead_rows_are_left_out(source: Source) -> None:
    table = source.model.transformer["wte"].weight  # type: ignore[union-attr,index]
    with torch.no_grad():
        table[10:20] = 0.0
        table[20:30] = table[20]
    probe = build_probe(source, batch=64)
    assert probe.token_ids is not None and probe.record.excluded_rows == 20
    assert not ((probe.token_ids >= 10) & (probe.token_ids < 30)).any()


@pytest.mark.parametrize("name", ["t.npy", "t.bin", "t.pt", "table.npy", "table.pt", "small.npy"])
def test_token_files_of_every_format_are_read(source: Source, tmp_path: Path, name: str) -> None:
    flat, path = np.arange(100) % 64, tmp_path / name
    writers: dict[str, Any] = {
        "t.npy": lambda: np.save(path, flat),
        "t.bin": lambda: flat.astype("<u2").tofile(path),
        "t.pt": lambda: torch.save(torch.from_numpy(flat), path),
        "table.npy": lambda: np.save(path, flat.reshape(4, 25)),
        "table.pt": lambda: torch.save(torch.from_numpy(flat).reshape(4, 25), path),
        "small.npy": lambda: np.save(path, flat.astype("uint8")),
    }
    writers[name]()
    probe = build_probe(source, tokens=str(path))
    rows = flat.reshape(4, 25)[:2] if name.startswith("table") else flat[:64].reshape(2, 32)
    assert probe.token_ids is not None and probe.token_ids.tolist() == rows.tolist()
    assert probe.record.tokens == name


def spoil(folder: Path) -> None:
    np.save(folder / "floats.npy", np.ones(99))
    np.save(folder / "words.npy", np.array(["a"] * 99))
    np.save(folder / "objects.npy", np.array([{}] * 99), allow_pickle=True)
    np.save(folder / "high.npy", np.full(99, 64))
    np.save(folder / "negative.npy", np.full(99, -1))
    np.save(folder / "short.npy", np.arange(5))
    torch.save({"a": torch.ones(99)}, folder / "dict.pt")
    torch.save(torch.ones(99) > 0, folder / "bools.pt")
    torch.save(torch.zeros(2, 0, dtype=torch.long), folder / "hollow.pt")
    for suffix in ("npy", "bin", "txt", "pt", "csv"):
        (folder / f"empty.{suffix}").write_bytes(b"")
    (folder / "text.npy").write_text("a story")
    (folder / "text.csv").write_text("1,2,3")
    (folder / "none").write_text("1,2,3")
    (folder / "folder.npy").mkdir()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing.npy", "no such token file"),
        ("folder.npy", "is a folder or a device"),
        ("text.csv", "is no token file"),
        ("none", "is no token file"),
        ("text.npy", "cannot read tokens"),
        ("floats.npy", "no token ids"),
        ("words.npy", "cannot read tokens"),
        ("objects.npy", "cannot read tokens"),
        ("dict.pt", "not a tensor"),
        ("bools.pt", "no token ids"),
        ("high.npy", "id 64 at position 0 of sequence 0, 64 in all; the model knows 0 to 63"),
        ("negative.npy", "id -1 at position 0"),
        ("short.npy", "too few tokens"),
        ("hollow.pt", "too few tokens"),
        ("empty.npy", "empty.npy"),
        ("empty.bin", "too few tokens"),
        ("empty.txt", "no tokenizer for this model"),
        ("empty.pt", "cannot read tokens"),
    ],
)
def test_files_that_hold_no_probe(source: Source, tmp_path: Path, name: str, said: str) -> None:
    spoil(tmp_path)
    with pytest.raises(ProbeError) as refused:
        build_probe(source, tokens=str(tmp_path / name))
    assert said in str(refused.value)


def test_a_sequence_longer_than_the_model_allows(source: Source) -> None:
    with pytest.raises(
        ProbeError, match="longer than the model allows\n--seq 33, the model says 32\n--seq 32"
    ):
        build_probe(source, seq=33)


def test_no_input_that_can_be_guessed() -> None:
    with pytest.raises(ProbeError, match="--inputs FACTORY"):
        build_probe(Source.of_module(torch.nn.Linear(2, 2)))


@pytest.mark.parametrize("made", ["3", "None", "'text'", "[]"])
def test_an_input_factory_that_makes_no_input(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str
) -> None:
    (tmp_path / "inputs_of_mine.py").write_text(f"def f(): return {made}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProbeError, match="holds no tensor"):
        build_probe(source, inputs="inputs_of_mine.py:f")


def test_a_longer_table_of_positions_is_not_the_vocabulary() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(7, 4), nn.Embedding(64, 4)

    assert vocabulary(Net()) == 7
    assert vocabulary(nn.ModuleDict({"positions": nn.Embedding(64, 4)})) == 64


def refusal(source: Source, error: Exception | None, **asked: Any) -> TraceError:
    probe = build_probe(source, **asked)
    with pytest.raises(TraceError) as refused, probe.suspected():
        raise TraceError("the model's forward raised", got="here") from error
    return refused.value


@pytest.mark.parametrize(
    "error",
    [
        AssertionError(),
        IndexError("index out of range in self"),
        RuntimeError("The size of tensor a (32) must match the size of tensor b (16)"),
        ValueError("sequence too long"),
    ],
    ids=repr,
)
def test_probe_too_long_for_the_model_suggests_seq(source: Source, error: Exception) -> None:
    told = refusal(source, error)
    assert told.got == "here" and told.__cause__ is error
    assert told.hint is not None and "32 tokens a sequence" in told.hint and "--seq 16" in told.hint
    assert "--seq 16" in str(told)


@pytest.mark.parametrize(
    "error",
    [KeyError("d_model"), NameError("x"), RuntimeError("expected m1 and m2 of one dtype"), None],
    ids=repr,
)
def test_errors_not_about_length_are_left_unchanged(
    source: Source, error: Exception | None
) -> None:
    assert refusal(source, error).hint is None


def test_no_length_is_suggested_for_inputs_that_were_handed_in() -> None:
    probe = Probe.of_inputs(torch.zeros(2, 128, dtype=torch.long))
    with pytest.raises(TraceError) as refused, probe.suspected():
        raise TraceError("the model's forward raised") from AssertionError()
    assert refused.value.hint is None
