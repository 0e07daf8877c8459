"""Where output goes: results to stdout, talk to stderr, files whole, terminals narrow or absent."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.rig import Done, Stub, files, on_terminal, stubbed
from render import synthetic

from jacdiag.records import Report

Run = Callable[..., Done]
ESCAPE = "\x1b["


def test_pretty_is_plain_when_piped(jd: Run, stub: Stub) -> None:
    done = jd("audit", "checkpoint.pt")
    assert ESCAPE not in done.out and done.err == ""
    assert "transformer.h.0.attn" in done.out and "WARN" in done.out
    assert "again: jacdiag audit checkpoint.pt" in done.out


def test_the_command_can_be_pasted(jd: Run, stub: Stub) -> None:
    done = jd("audit", "my run/check point.pt", "--model-args", '{"n": 1}', "--seed", 3)
    again = done.out.split("again: ")[1].splitlines()[0]
    assert again == """jacdiag audit 'my run/check point.pt' --model-args '{"n": 1}' --seed 3"""


def test_json_is_all_of_stdout(jd: Run, stub: Stub) -> None:
    done = jd("audit", "checkpoint.pt", "--format", "json")
    report = Report.from_json(done.out)
    assert report.settings["command"] == "jacdiag audit checkpoint.pt --format json"
    assert done.err.startswith("warn: ") and done.err.count("\n") == 1


def test_markdown_format_starts_with_the_verdict(jd: Run, stub: Stub) -> None:
    done = jd("audit", "checkpoint.pt", "--format", "markdown")
    assert done.out.startswith("### ▲ WARN") and "|" in done.out
    assert done.err.startswith("warn: ")


def test_rows_and_order_reach_the_renderers(jd: Run, stub: Stub) -> None:
    stub.report = synthetic.vanilla(48)
    folded, whole = jd("audit", "c.pt").out, jd("audit", "c.pt", "--all").out
    assert "--all shows them" in folded and "transformer.h.30.mlp" not in folded
    assert "transformer.h.30.mlp" in whole
    markdown = jd("audit", "c.pt", "--all", "--sort", "worst", "--format", "markdown").out
    assert markdown.index("transformer.h.0.attn") < markdown.index("transformer.h.47.attn")


def test_json_and_plot_are_written_in_addition_to_the_table(
    jd: Run, stub: Stub, tmp_path: Path
) -> None:
    done = jd("audit", "checkpoint.pt", "--json", "report.json", "--plot", "gain.svg")
    assert done.code == 0 and "transformer.h.0.attn" in done.out
    assert files(tmp_path) == {"report.json", "gain.svg"}
    assert json.loads((tmp_path / "report.json").read_text())["verdict"] == "warn"
    assert (tmp_path / "gain.svg").read_text().startswith("<?xml")


def test_files_are_written_with_findings_too(jd: Run, stub: Stub, tmp_path: Path) -> None:
    stub.report = synthetic.broken()
    assert jd("audit", "checkpoint.pt", "--json", "report.json").code == 1
    assert files(tmp_path) == {"report.json"}


def test_a_file_is_replaced_whole_and_keeps_its_mode(jd: Run, stub: Stub, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    path.chmod(0o640)
    jd("audit", "checkpoint.pt", "--json", path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640 and path.read_text().startswith("{")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--json", "no/such/folder/report.json"], "its folder does not exist"),
        (["--plot", "no/such/folder/gain.png"], "its folder does not exist"),
        (["--json", "."], "a folder of that name"),
        (["--plot", "gain.jpg"], "end it in .png, .svg or .pdf"),
        (["--plot", "gain"], "end it in .png, .svg or .pdf"),
        (["--json", "checkpoint.pt"], "would write over what is audited"),
        (["--json", "sub/../checkpoint.pt"], "would write over what is audited"),
        (["--json", "both.svg", "--plot", "both.svg"], "name the same file"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else None,
)
def test_refused_before_the_work(
    jd: Run, stub: Stub, tmp_path: Path, args: list[str], message: str
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "checkpoint.pt").write_text("weights")
    done = jd("audit", "checkpoint.pt", *args)
    assert (done.code, done.out, stub.calls) == (2, "", 0)
    assert message in done.err
    assert files(tmp_path) == {"checkpoint.pt", "sub"}
    assert (tmp_path / "checkpoint.pt").read_text() == "weights"


def test_a_factorys_own_file_is_not_written_over(jd: Run, stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "build.py").write_text("")
    assert jd("audit", "build.py:model", "--json", "build.py").code == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(jd: Run, stub: Stub, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "no permission" in jd("audit", "x.pt", "--json", locked / "report.json").err


def test_a_full_disk_leaves_no_half_file(
    jd: Run, stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    done = jd("audit", "checkpoint.pt", "--json", "report.json")
    assert done.code != 0 and "No space left" in done.err
    assert files(tmp_path) == set()


def shell(line: str, folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs `$RUN` of a shell line: a command with a made-up audit, its streams as the line says."""
    env = {**os.environ, "CODE": stubbed("audit", "checkpoint.pt", *args), "PY": sys.executable}
    line = line.replace("$RUN", '"$PY" -c "$CODE"')
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, cwd=folder, env=env, timeout=60
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", ">&- 2>&-"])
@pytest.mark.parametrize("args", [(), ("--format", "json")], ids=["pretty", "json"])
def test_closed_streams_are_no_error(tmp_path: Path, closed: str, args: tuple[str, ...]) -> None:
    done = shell(f"$RUN {closed}", tmp_path, *args, "--json", "report.json")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert (">&-" in closed.split()) or "transformer.h.0.attn" in done.stdout
    assert Report.from_json((tmp_path / "report.json").read_text()).sublayers


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
@pytest.mark.parametrize("args", [(), ("--format", "json"), ("--format", "markdown")], ids=" ".join)
def test_no_room_for_the_result(tmp_path: Path, args: tuple[str, ...]) -> None:
    done = shell("$RUN >/dev/full", tmp_path, *args)
    assert (
        done.returncode == 2 and "No space left" in done.stderr and "Traceback" not in done.stderr
    )
    assert shell("$RUN 2>/dev/full", tmp_path, *args).returncode == 0


def test_json_to_a_file_and_talk_to_stderr(tmp_path: Path) -> None:
    done = shell("$RUN > out.json", tmp_path, "--format", "json")
    assert (done.returncode, done.stdout) == (0, "") and done.stderr.startswith("warn: ")
    assert Report.from_json((tmp_path / "out.json").read_text()).sublayers


def test_piped_output_does_not_depend_on_the_terminal(tmp_path: Path) -> None:
    settings = (
        "",
        "COLUMNS=40 TERM=xterm-256color",
        "COLUMNS=200 TERM=dumb NO_COLOR=1 LC_ALL=C",
    )
    shown = {shell(f"env {setting} $RUN", tmp_path).stdout for setting in settings}
    assert len(shown) == 1 and "\x1b" not in shown.pop()


def test_what_the_model_prints_is_talk(jd: Run, stub: Stub) -> None:
    stub.during = lambda options: print("number of parameters: 124M")
    done = jd("audit", "checkpoint.pt", "--format", "json")
    json.loads(done.out)
    assert "number of parameters" in done.err


def test_no_progress_bar_without_a_terminal(jd: Run, stub: Stub) -> None:
    def work(options: dict[str, object]) -> None:
        bar = options["progress"]
        bar.start(2, "measuring")  # type: ignore[attr-defined]
        bar.advance(1, "h.0.attn")  # type: ignore[attr-defined]
        bar.stop()  # type: ignore[attr-defined]

    stub.during = work
    assert jd("audit", "checkpoint.pt").err == ""


# -- terminals -------------------------------------------------------------------------------------


def test_a_terminal_gets_colours(tmp_path: Path) -> None:
    done = on_terminal(stubbed("audit", "checkpoint.pt"), tmp_path, columns=130)
    assert done.code == 0 and ESCAPE in done.out and "branch norm" in done.out


def test_no_color_variable_removes_colours_on_a_terminal(tmp_path: Path) -> None:
    done = on_terminal(stubbed("audit", "checkpoint.pt"), tmp_path, columns=130, NO_COLOR="1")
    assert not [code for code in done.out.split(ESCAPE)[1:] if code[:2] in ("31", "33", "36", "32")]
    assert "▲" in done.out


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_a_narrow_terminal_wraps_no_row(tmp_path: Path, columns: int) -> None:
    done = on_terminal(
        stubbed("audit", "checkpoint.pt", "--all"), tmp_path, columns=columns, NO_COLOR="1"
    )
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.out)
    rows = [line for line in plain.splitlines() if re.match(r" +\d+  \S*\.attn ", line)]
    assert len(rows) == 12 and all(len(row) <= columns for row in rows)


def test_a_bar_on_a_terminal_goes_away(tmp_path: Path) -> None:
    code = stubbed(
        "audit",
        "checkpoint.pt",
        "--format",
        "json",
        during="""
        bar = options.progress
        bar.start(4, "measuring")
        import time
        for name in ("h.0.attn", "h.0.mlp"):
            bar.advance(1, name)
            print("said by the model")
            time.sleep(0.2)
        bar.stop()
    """,
    )
    done = on_terminal(code, tmp_path, columns=100, stdout_too=False)
    assert done.code == 0
    assert "h.0.mlp" in done.err and "said by the model" in done.err and f"{ESCAPE}2K" in done.err
    assert json.loads(done.out)["verdict"] == "warn"


def test_a_bar_says_what_is_left_once_it_knows(tmp_path: Path) -> None:
    during = """
        import time
        bar = options.progress
        time.sleep(0.3)
        bar.start(40, "measuring")
        time.sleep(0.7)
        print("now it moves")
        for _ in range(6):
            time.sleep(0.2)
            bar.advance(1, "h.0.attn")
        bar.stop()
    """
    done = on_terminal(
        stubbed("audit", "c.pt", "--format", "json", during=during),
        tmp_path,
        columns=100,
        stdout_too=False,
    )
    before, _, after = done.err.partition("now it moves")
    assert "reading the model" in before and "measuring" in before
    assert "left" not in before and "-:--" not in done.err
    assert re.search(r"0:00:\d\d\S* left", after), after


def test_a_reader_that_has_left_is_no_error(tmp_path: Path) -> None:
    code = stubbed("audit", "checkpoint.pt")
    reading, writing = os.pipe()
    os.close(reading)
    writer = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    _, said = writer.communicate(timeout=60)
    assert (writer.returncode, said) == (0, "")
