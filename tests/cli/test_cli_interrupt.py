"""Ctrl-C at every stage: exit code 130, one line, and no file that is not whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli.rig import MODEL, ROOT, files, stubbed

ENV = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "cli")]),
    "OMP_NUM_THREADS": "1",
}
INTERRUPT = "os.kill(os.getpid(), signal.SIGINT)"


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env=ENV,
        timeout=60,
    )


def check(
    done: subprocess.CompletedProcess[str], folder: Path, left: set[str] | None = None
) -> None:
    assert done.returncode == 130, done.stderr
    assert (
        "interrupted; no file was written or changed" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert files(folder) == (left or set())


def test_from_outside_while_it_measures(tmp_path: Path) -> None:
    code = stubbed(
        "audit",
        "c.pt",
        "--json",
        "r.json",
        during="print('measuring', flush=True); import time; time.sleep(50)",
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=ENV,
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "measuring\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert "interrupted" in err and "Traceback" not in err
    assert files(tmp_path) == set()


@pytest.mark.parametrize("moment", ["Path.replace", "Path.chmod", "os.fdopen"])
def test_while_a_file_is_written(tmp_path: Path, moment: str) -> None:
    """The signal arrives between opening the temporary file and its renaming."""
    owner, name = moment.split(".")
    during = f"""
        from pathlib import Path
        real = {moment}
        def late(*args, **how):
            {INTERRUPT}
            return real(*args, **how)
        setattr({owner}, "{name}", late)
    """
    check(run(stubbed("audit", "c.pt", "--json", "r.json", during=during), tmp_path), tmp_path)


def test_an_old_file_survives(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("old")
    during = f"""
        from pathlib import Path
        Path.replace = lambda *args: {INTERRUPT}
    """
    check(
        run(stubbed("audit", "c.pt", "--json", "r.json", during=during), tmp_path),
        tmp_path,
        {"r.json"},
    )
    assert (tmp_path / "r.json").read_text() == "old"


def test_a_file_that_was_written_before_is_named(tmp_path: Path) -> None:
    during = f"""
        from jacdiag.render.plots import report_plot
        report_plot.save = lambda *args: {INTERRUPT}
    """
    done = run(
        stubbed("audit", "c.pt", "--json", "r.json", "--plot", "r.png", during=during), tmp_path
    )
    assert done.returncode == 130 and files(tmp_path) == {"r.json"}
    assert "interrupted; written completely before that: r.json" in done.stderr


@pytest.mark.parametrize(
    "module", ["torch", "torch.nn", "numpy._core._multiarray_umath", "torch._tensor"]
)
def test_while_torch_is_imported(tmp_path: Path, module: str) -> None:
    """The signal arrives in the middle of the import, where a C extension may make another error of
    it.
    """
    (tmp_path / "build.py").write_text(MODEL)
    code = "\n".join(
        [
            "import os, signal, sys",
            "class Finder:",
            "    def find_spec(self, name, path=None, target=None):",
            f"        if name == {module!r}: {INTERRUPT}",
            "sys.meta_path.insert(0, Finder())",
            "from jacdiag_cli.main import main",
            "sys.exit(main(['audit', 'build.py:build', '--json', 'r.json']))",
        ]
    )
    check(run(code, tmp_path), tmp_path, {"build.py"})


def test_in_the_models_own_code(tmp_path: Path) -> None:
    """A guest that catches everything makes another error of Ctrl-C; it is Ctrl-C all the same."""
    (tmp_path / "build.py").write_text(
        "import os, signal\n"
        "def build():\n"
        "    try:\n"
        f"        {INTERRUPT}\n"
        "    except BaseException:\n"
        "        raise RuntimeError('a worker died')\n"
    )
    code = (
        "from jacdiag_cli.main import main; import sys; sys.exit(main(['audit', "
        "'build.py:build', '--json', 'r.json']))"
    )
    check(run(code, tmp_path), tmp_path, {"build.py"})


def test_swallowed_by_a_bare_except(tmp_path: Path) -> None:
    during = f"""
        try:
            {INTERRUPT}
        except:
            pass
    """
    check(run(stubbed("audit", "c.pt", "--json", "r.json", during=during), tmp_path), tmp_path)
    during += "\n        options.progress.advance(1, 'h.0.attn')\n        print('went on')"
    done = run(stubbed("audit", "c.pt", "--json", "r.json", during=during), tmp_path)
    check(done, tmp_path)
    assert "went on" not in done.stderr


def test_inside_an_exec_of_text(tmp_path: Path) -> None:
    """CPython notes such a Ctrl-C for good and would end by the signal itself; dataclasses are made
    by exec.
    """
    check(run(stubbed("audit", "c.pt", during=f"exec({INTERRUPT!r})"), tmp_path), tmp_path)


def test_ignored_where_the_caller_says_so(tmp_path: Path) -> None:
    """A shell starts what stands before `&` with SIGINT ignored."""
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    done = run(code + stubbed("audit", "c.pt", during=INTERRUPT), tmp_path)
    assert done.returncode == 0 and "h.0.attn" in done.stdout


def test_the_handler_is_given_back() -> None:
    from jacdiag_cli.main import main

    before = signal.getsignal(signal.SIGINT)
    main(["--version"])
    assert signal.getsignal(signal.SIGINT) is before
