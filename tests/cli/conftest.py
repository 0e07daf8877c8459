"""Fixtures of the command line: run it in this process, with a made-up audit or with a real little
model.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.rig import MODEL, Done, Stub
from jacdiag_cli.main import main


@pytest.fixture
def jd(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Done]:
    """Runs a command in an empty folder (so that no configuration is near) and returns what it
    left.
    """
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> Done:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        left = capsys.readouterr()
        return Done(code, left.out, left.err)

    return run


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    """Put a made-up audit in place of the real one."""
    # Imported first, so that the same module returns after the test.
    importlib.import_module("jacdiag.pipeline.audit")
    replacement, module = Stub(), types.ModuleType("jacdiag.pipeline.audit")
    module.run_audit = replacement  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jacdiag.pipeline.audit", module)
    return replacement


@pytest.fixture
def factory(tmp_path: Path) -> str:
    """A factory file; append a callable's name."""
    path = tmp_path / "build.py"
    path.write_text(MODEL, encoding="utf-8")
    return f"{path}:"
