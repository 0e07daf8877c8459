"""Exit codes, and the message that each kind of trouble gets."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable
from importlib import metadata

import pytest
from cli.rig import Done, Stub
from render import synthetic

import jacdiag
from jacdiag.errors import MeasureError, ProbeError, SourceError, TraceError, UsageError
from jacdiag.records import Report

pytestmark = pytest.mark.check("jacdiag audit")

Run = Callable[..., Done]

WARNING = synthetic.vanilla
ERROR = synthetic.broken
CLEAN = synthetic.clean


def info() -> Report:
    report = synthetic.vanilla()
    return dataclasses.replace(
        report, findings=[dataclasses.replace(f, level="info") for f in report.findings]
    )


@pytest.mark.parametrize(
    ("build", "fail_on", "code"),
    [
        (CLEAN, "info", 0),
        (CLEAN, "error", 0),
        (info, "info", 1),
        (info, "warning", 0),
        (WARNING, "info", 1),
        (WARNING, "warning", 1),
        (WARNING, "error", 0),
        (WARNING, "never", 0),
        (ERROR, "warning", 1),
        (ERROR, "error", 1),
        (ERROR, "never", 0),
        (synthetic.undecided, "error", 0),
        (synthetic.undecided, "warning", 1),
        (synthetic.weights_tier, "error", 0),
    ],
)
def test_exit_code_follows_fail_on_and_the_highest_level(
    jd: Run, stub: Stub, build: Callable[[], Report], fail_on: str, code: int
) -> None:
    stub.report = build()
    assert jd("audit", "checkpoint.pt", "--fail-on", fail_on).code == code


def test_the_default_fails_on_errors_only(jd: Run, stub: Stub) -> None:
    assert jd("audit", "checkpoint.pt").code == 0
    stub.report = synthetic.broken()
    assert jd("audit", "checkpoint.pt").code == 1


@pytest.mark.parametrize(
    ("args", "what", "hint"),
    [
        (("live", "gone"), "cannot read the run log 'gone'", "log_dir"),
        (("plot", "gone.jsonl"), "cannot read the run log 'gone.jsonl'", "log_dir"),
        (("plot", "gone.json"), "cannot read 'gone.json'", "a report from --json, or a run.jsonl"),
        (
            ("backtest", "gone.csv"),
            "cannot read the run 'gone.csv'",
            "a CSV or JSONL with a row a step",
        ),
        (
            ("audit", "FACTORY", "--tokens", "gone.txt"),
            "no such token file: 'gone.txt'",
            "text in .txt",
        ),
    ],
)
def test_a_file_that_is_not_there_gets_a_hint(
    jd: Run, factory: str, args: tuple[str, ...], what: str, hint: str
) -> None:
    done = jd(*(f"{factory}build" if arg == "FACTORY" else arg for arg in args))
    assert (done.code, done.out) == (2, "")
    assert f"error: {what}" in done.err and hint in done.err.partition("  try: ")[2]


@pytest.mark.parametrize("kind", [SourceError, ProbeError, TraceError, MeasureError, UsageError])
def test_a_refusal_says_what_got_try(jd: Run, stub: Stub, kind: type[SourceError]) -> None:
    stub.error = kind("cannot read 'x.pt'", got="an empty file", hint="copy it again")
    done = jd("audit", "x.pt", "--json", "report.json")
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: cannot read 'x.pt'\n  got: an empty file\n  try: copy it again\n"


def test_a_refusal_of_many_lines_stays_aligned(jd: Run, stub: Stub) -> None:
    stub.error = SourceError("weights do not fit", got="missing a\nmissing b")
    assert (
        jd("audit", "x.pt").err == "error: weights do not fit\n  got: missing a\n       missing b\n"
    )


def test_internal_error_exits_70_with_a_traceback(jd: Run, stub: Stub) -> None:
    stub.error = ZeroDivisionError("by a bug")
    done = jd("audit", "x.pt")
    assert (done.code, done.out) == (70, "")
    assert "Traceback" in done.err and "this is a bug in jacdiag" in done.err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        type("OutOfMemoryError", (RuntimeError,), {})(
            "CUDA out of memory. Tried to allocate 2 GiB"
        ),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 "
            "bytes"
        ),
    ],
    ids=["python", "cuda", "cpu"],
)
def test_out_of_memory_exits_2_and_suggests_a_smaller_batch(
    jd: Run, stub: Stub, error: Exception
) -> None:
    stub.error = error
    done = jd("audit", "x.pt")
    assert done.code == 2 and "out of memory" in done.err and "--batch 1" in done.err


def test_ctrl_c_exits_130_without_a_traceback(jd: Run, stub: Stub) -> None:
    stub.error = KeyboardInterrupt()
    done = jd("audit", "x.pt", "--json", "report.json")
    assert (done.code, done.out) == (130, "")
    assert "interrupted" in done.err and "Traceback" not in done.err


def test_sys_exit_in_user_code_exits_2(jd: Run, stub: Stub) -> None:
    stub.error = SystemExit(0)
    done = jd("audit", "x.pt")
    assert done.code == 2 and "sys.exit(0)" in done.err


def test_eof_error_is_not_reported_as_ctrl_c(jd: Run, stub: Stub) -> None:
    stub.error = EOFError("Ran out of input")
    assert jd("audit", "x.pt").code == 70


@pytest.mark.parametrize(
    "args", [["-h"], ["--help"], ["--version"], ["audit", "-h"], ["sites", "-h"], ["rules", "-h"]]
)
def test_help_is_no_failure(jd: Run, args: list[str]) -> None:
    done = jd(*args)
    assert (done.code, done.err) == (0, "") and done.out


def test_version_names_jacdiag_torch_and_python(jd: Run) -> None:
    lines = jd("--version").out.splitlines()
    assert lines == [
        f"jacdiag, version {jacdiag.__version__}",
        f"torch {metadata.version('torch')}, Python {platform.python_version()}",
    ]


def test_version_works_without_torch(jd: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    done = jd("--version")
    assert done.code == 0
    assert "torch is not installed, Python" in done.out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Usage: jacdiag"),
        (["adit", "x.pt"], "no such command 'adit'"),
        (["audit"], "missing argument 'SOURCE'"),
        (["audit", "a.pt", "b.pt"], "unexpected extra argument"),
        (["audit", "a.pt", "--fial-on", "never"], "no such option"),
        (["live"], "missing argument 'RUN'"),
    ],
)
def test_usage_errors_exit_2_before_any_audit(
    jd: Run, stub: Stub, args: list[str], message: str
) -> None:
    done = jd(*args)
    assert (done.code, done.out) == (2, "") and message in done.err
    assert stub.calls == 0
