"""Files of an enemy, by hand, and those that the fuzzer found: exit code 2, a message, nothing run,
nothing written.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import outputs
from hostile.fuzz import CORPUS, verdict_on
from hostile.seeds import WEIGHTS, honest, honest_folders
from jacdiag_cli.main import main


def saved(held: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(held, buffer)
    return buffer.getvalue()


def repacked(pickled: bytes, extra: dict[str, bytes] | None = None) -> bytes:
    """A zip of torch.save whose pickle is another."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(WEIGHTS))) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            new.writestr(
                info.filename, pickled if info.filename.endswith("data.pkl") else old.read(info)
            )
        for name, data in (extra or {}).items():
            new.writestr(name, data)
    return buffer.getvalue()


def header(tensors: dict[str, Any], body: bytes = b"\0" * 64, length: int | None = None) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


GLOBAL_BYTES = b"\x80\x02c__builtin__\nbytes\n"
ATTACKS: dict[str, bytes] = {
    "memo-bomb.pt": repacked(b"\x80\x02]r\xff\xff\xff\x7f."),
    "old-memo-bomb.pt": (
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02]r\xff\xff\xff\x7f."
    ),
    "bytes-of-8-gib.pt": repacked(GLOBAL_BYTES + b"\x8a\x05\x00\x00\x00\x00\x02\x85R."),
    "list-of-a-range.pt": repacked(
        b"\x80\x02c__builtin__\nlist\nc__builtin__\nxrange\nJ\xff\xff\xff\x7f\x85R\x85R."
    ),
    "bytearray8.pt": repacked(b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b"x."),
    "long-string.pt": repacked(b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x."),
    "cyclic-id.pt": repacked(b"\x80\x02(h\x00q\x00Q."),
    "id-of-itself.pt": repacked(b"\x80\x02]q\x00h\x00aQ."),
    "deep.pt": repacked(b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."),
    "huge-view.pt": saved({"w": torch.ones(1).expand(2**31, 2**20)}),
    "zip-in-zip.pt": repacked(pickle.dumps({"w": 1}, 2), {"archive/inner.pt": saved(WEIGHTS)}),
    "only-a-zip-in-a-zip.pt": saved(saved(WEIGHTS)),
    "two-pickles.pt": repacked(
        b"cos\nsystem\n(S'touch owned'\ntR.", {"archive/data.pkl": b"\x80\x02}."}
    ),
    "path-names.pt": repacked(b"\x80\x02}.", {"../../owned": b"x", "/tmp/owned": b"x"}),
    "extension.pt": repacked(b"\x80\x02\x82\x01."),
    "exabyte.safetensors": header({}, length=2**60),
    "all-ones.safetensors": b"\xff" * 64,
    "overlap.safetensors": header({"a": entry([8], 0, 32), "b": entry([8], 16, 48)}, b"\0" * 48),
    "outside.safetensors": header({"a": entry([2**40], 0, 2**42)}),
    "negative.safetensors": header({"a": entry([-8], 0, 32)}),
    "overflow.safetensors": header({"a": entry([2**33, 2**33], 0, 32)}),
    "shape-and-size.safetensors": header({"a": entry([4], 0, 64)}),
    "duplicate.safetensors": struct.pack("<Q", 130)
    + (
        b'{"a":{"dtype":"F32","shape":[8],"data_offsets":[0,32]},"a":{"dtype":"F32","shape":[8],"data_offsets":[32,64]}}'
    ).ljust(130)
    + b"\0" * 64,
    "no-json.safetensors": struct.pack("<Q", 8) + b"\x00\xff{{{{[[" + b"\0" * 8,
    "deep-json.safetensors": struct.pack("<Q", 100_000) + b"[" * 100_000,
}


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_files_are_refused_quickly_and_in_little_memory(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(ATTACKS[name])
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code = main(["audit", name])
    said = capsys.readouterr().err
    assert code == 2 and said.startswith("error: ") and "Traceback" not in said
    assert time.perf_counter() - begun < 10  # the bound that is promised, not a speed
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 2**20  # KiB
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == [name]
        and not (tmp_path.parent / "owned").exists()
    )


def test_names_reach_the_terminal_without_their_escapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for k, name in enumerate(("\x1b[31mred", "‮evil", "a\nb", "\x00", "x" * 5000)):
        torch.save({name: torch.ones(1).expand(2**40)}, tmp_path / f"{k}.pt")
        assert main(["audit", f"{k}.pt"]) == 2
        said = capsys.readouterr().err
        assert "\x1b" not in said and "‮" not in said and "\x00" not in said


@pytest.mark.parametrize(
    "make", [lambda p: p.symlink_to(p.name), lambda p: p.symlink_to("/dev/zero"), os.mkfifo]
)
def test_symlink_loops_devices_and_pipes_are_refused(
    make: Callable[[Path], object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "x.pt")
    assert main(["audit", "x.pt"]) == 2 and capsys.readouterr().err.startswith("error: ")


def test_an_index_that_leaves_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = honest_folders(tmp_path)["hf"]
    for name in ("../x.safetensors", "/etc/passwd", "a/b", ".."):
        folder = tmp_path / f"hf-{len(name)}"
        folder.mkdir()
        for file, data in files.items():
            (folder / file).write_bytes(data)
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"w": name}})
        )
        assert main(["audit", str(folder)]) == 2
        said = capsys.readouterr().err
        assert "outside its folder" in said or (name == ".." and "incomplete" in said)


def test_the_watch_sees_what_it_should(tmp_path: Path) -> None:
    """The fuzzer's own verdicts: honest files are read; one that runs code is caught by the audit
    hook.
    """
    for name, data in honest(tmp_path).items():
        (tmp_path / name).write_bytes(data)
        assert verdict_on(tmp_path / name) == ("refused" if name == "plain.bin" else "read")


@pytest.mark.parametrize(
    "path", sorted(CORPUS.iterdir()) if CORPUS.is_dir() else [], ids=lambda p: p.name
)
def test_what_the_fuzzer_found(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "Traceback" not in said


@pytest.mark.parametrize("kind", outputs.KINDS)
def test_output_paths_of_every_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(outputs, "KINDS", (kind,))
    rng = random.Random(1)
    assert {outputs.verdict_on_output(tmp_path, rng) for _ in range(8)} <= {"written", "refused"}


def test_an_output_that_replaces_devices_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check itself: the write of before, by renaming, is called wrong."""

    def rename(path: str, data: bytes) -> None:
        Path(f"{path}.part").write_bytes(data)
        Path(f"{path}.part").replace(path)

    monkeypatch.setattr("jacdiag.records.output_file.write_output", rename)
    for kind in ("link", "pipe", "descriptor"):
        monkeypatch.setattr(outputs, "KINDS", (kind,))
        assert outputs.verdict_on_output(tmp_path, random.Random(1)).startswith(f"output {kind}: ")
