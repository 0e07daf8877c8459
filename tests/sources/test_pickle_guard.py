"""Pickles that want to run code: nothing runs, and what they wanted is named."""

from __future__ import annotations

import builtins
import importlib
import io
import operator
import os
import pickle
import subprocess
import tarfile
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sources.rig import save, weights

from jacdiag.errors import SourceError
from jacdiag.sources.checkpoint import open_checkpoint

ATTACKS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "os.system": (os.system, ("touch was-run",)),
    "builtins.eval": (builtins.eval, ("open('was-run', 'w')",)),
    "builtins.exec": (builtins.exec, ("open('was-run', 'w')",)),
    "builtins.compile": (builtins.compile, ("0", "x", "eval")),
    "builtins.__import__": (builtins.__import__, ("antigravity",)),
    "subprocess.Popen": (subprocess.Popen, (["touch", "was-run"],)),
    "subprocess.check_output": (subprocess.check_output, (["touch", "was-run"],)),
    "webbrowser.open": (webbrowser.open, ("file:///",)),
    "importlib.import_module": (importlib.import_module, ("antigravity",)),
    "operator.methodcaller": (operator.methodcaller, ("system", "touch was-run")),
    "torch.serialization.load": (torch.load, ("elsewhere.pt",)),
    "torch.hub.load": (torch.hub.load, ("somebody/something", "model")),
}


class Payload:
    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return ATTACKS[self.name]


@pytest.mark.parametrize("name", list(ATTACKS))
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_an_attack_is_named_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, zipped: bool, protocol: int
) -> None:
    how = {"_use_new_zipfile_serialization": zipped, "pickle_protocol": protocol}
    path = save(tmp_path / "evil.pt", {"model": weights(), "extra": [Payload(name)]}, **how)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="Nothing was run") as refused:
        open_checkpoint(path)
    assert f"`{name}`" in refused.value.what and "--trust-pickle" in (refused.value.hint or "")
    assert {file.name for file in tmp_path.iterdir()} == {"evil.pt"}


def test_the_attack_works_where_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files above are real: the same one runs its code once it may."""
    path = save(tmp_path / "evil.pt", {"model": weights(), "extra": Payload("builtins.exec")})
    monkeypatch.chdir(tmp_path)
    open_checkpoint(path, trust_pickle=True)
    assert (tmp_path / "was-run").exists()


def test_pickle_that_uses_getattr_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`getattr(module, name)` is how a pickle would reach a function that no class of its own
    names.
    """
    steps = (
        b"\x80\x04cbuiltins\ngetattr\n(ctorch.nn\nModule\n"
        b"X\x06\x00\x00\x00systemtR(X\x0d\x00\x00\x00touch was-runtR."
    )
    path = save(tmp_path / "w.pt", weights(), _use_new_zipfile_serialization=False)
    head = path.read_bytes()
    start = head.index(b"\x80\x02}", 30)
    path.write_bytes(head[:start] + steps)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError):
        open_checkpoint(path)
    assert not (tmp_path / "was-run").exists()


def test_a_tar_archive_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(
                tarfile.TarInfo(f"\x80\x02{name}" if name == "storages" else name), io.BytesIO()
            )
    with pytest.raises(SourceError, match="tar archive"):
        open_checkpoint(path)


def test_what_an_attack_is_called_cannot_write_to_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    path.write_bytes(b"\x80\x02cos\n\x1b[2Jsystem\n(X\x01\x00\x00\x00atR.")
    with pytest.raises(SourceError) as refused:
        open_checkpoint(path)
    assert "\\x1b[2Jsystem" in refused.value.what and "\x1b" not in str(refused.value)


def test_a_plain_pickle_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(SourceError, match="a pickle, but not one of"):
        open_checkpoint(tmp_path / "plain.pt")


def test_a_bytearray_is_read_and_one_that_claims_too_much_is_refused(tmp_path: Path) -> None:
    saved = {"weight": torch.ones(2), "comment": bytearray(b"text")}
    torch.save(saved, tmp_path / "good.pt", pickle_protocol=5)
    assert list(open_checkpoint(tmp_path / "good.pt").state) == ["weight"]
    claim = (1 << 33).to_bytes(8, "little")
    (tmp_path / "bad.bin").write_bytes(b"\x80\x05\x96" + claim + b"text.")
    with pytest.raises(SourceError, match="longer than the file"):
        open_checkpoint(tmp_path / "bad.bin")
