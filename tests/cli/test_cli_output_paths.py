"""Output options with devices, pipes, links and stdout."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.rig import Done, Stub, files, stubbed
from render import synthetic

Run = Callable[..., Done]
PNG = b"\x89PNG"


def test_every_file_is_said_to_be_written(jd: Run, stub: Stub) -> None:
    done = jd("audit", "c.pt", "--json", "r.json", "--plot", "g.svg", "--patch", "p.md")
    assert [line for line in done.err.splitlines() if line.startswith("wrote")] == [
        "wrote r.json",
        "wrote g.svg",
        "wrote p.md",
    ]
    assert "wrote" not in jd("audit", "c.pt").err


def test_a_full_device_is_an_error(jd: Run, stub: Stub) -> None:
    done = jd("audit", "c.pt", "--json", "/dev/full")
    assert done.code == 2 and "cannot write the result" in done.err and "No space left" in done.err
    assert "wrote" not in done.err and stat.S_ISCHR(Path("/dev/full").stat().st_mode)


def test_outputs_can_all_go_to_dev_null(jd: Run, stub: Stub) -> None:
    done = jd(
        "audit",
        "c.pt",
        *(part for o in ("--json", "--plot", "--patch") for part in (o, "/dev/null")),
    )
    assert (
        done.code == 0
        and done.err.count("wrote /dev/null") == 3
        and "transformer.h.0.attn" in done.out
    )


def test_a_dash_is_stdout_and_the_table_goes_to_stderr(jd: Run, stub: Stub, tmp_path: Path) -> None:
    done = jd("audit", "c.pt", "--json", "-")
    assert json.loads(done.out)["verdict"] == "warn" and "transformer.h.0.attn" in done.err
    assert "wrote" not in done.err and files(tmp_path) == set()
    assert jd("audit", "c.pt", "--patch", "-").out.startswith("#")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--json", "-", "--patch", "-"), "--json and --patch both write to stdout"),
        (("--json", "-", "--plot", "/dev/stdout"), "--json and --plot both write to stdout"),
        (("--json", "-", "--format", "json"), "--json and --format json both write to stdout"),
        (
            ("--patch", "-", "--format", "markdown"),
            "--patch and --format markdown both write to stdout",
        ),
        (("--json", "a.json", "--patch", "a.json"), "name the same file"),
        (("--json", ""), "an empty name"),
        (
            ("--json", "tokens.npy", "--tokens", "tokens.npy"),
            "would write over what --tokens reads",
        ),
        (
            ("--json", "other-name.npy", "--tokens", "tokens.npy"),
            "would write over what --tokens reads",
        ),
        (
            ("--json", "build.py", "--model", "build.py:f"),
            "would write over the factory of --model",
        ),
    ],
)
def test_two_outputs_to_one_place_are_refused(
    jd: Run, stub: Stub, tmp_path: Path, args: tuple[str, ...], said: str
) -> None:
    for name in ("tokens.npy", "build.py"):
        (tmp_path / name).write_text("old")
    (tmp_path / "other-name.npy").hardlink_to(tmp_path / "tokens.npy")
    done = jd("audit", "c.pt", *args)
    assert (done.code, done.out, stub.calls) == (2, "", 0) and said in done.err
    assert files(tmp_path) == {"tokens.npy", "build.py", "other-name.npy"}


@pytest.mark.parametrize("option", ["--json", "--plot", "--patch"])
def test_output_is_written_through_a_named_pipe(
    jd: Run, stub: Stub, tmp_path: Path, option: str
) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    done = jd("audit", "c.pt", option, pipe)
    reader.join(20)
    assert done.code == 0 and f"wrote {pipe}" in done.err and stat.S_ISFIFO(pipe.stat().st_mode)
    assert read[0].startswith({"--json": b"{", "--plot": PNG, "--patch": b"#"}[option])


def test_a_link_stays_a_link(jd: Run, stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("old")
    (tmp_path / "latest.json").symlink_to("old.json")
    assert jd("audit", "c.pt", "--json", "latest.json").code == 0
    assert (tmp_path / "latest.json").is_symlink() and (
        tmp_path / "old.json"
    ).read_text().startswith("{")


def shell(line: str, folder: Path, *args: str) -> subprocess.CompletedProcess[bytes]:
    env = {**os.environ, "CODE": stubbed("audit", "c.pt", *args), "PY": sys.executable}
    line = line.replace("$RUN", '"$PY" -c "$CODE"')
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=env, capture_output=True, timeout=60, check=False
    )


def test_output_is_written_to_a_process_substitution(tmp_path: Path) -> None:
    """Bash names a pipe by the number of an open descriptor."""
    (tmp_path / "run.sh").write_text('CODE=${CODE/FILE/$1} && "$PY" -c "$CODE"\n')
    line = "source ./run.sh >(cat > copy.json) > table.txt && wait $! && sleep 0.2"
    done = shell(line, tmp_path, "--json", "FILE")
    assert (
        done.returncode == 0
        and json.loads((tmp_path / "copy.json").read_text())["verdict"] == "warn"
    )
    assert b"wrote /dev/fd/" in done.stderr


def test_stdout_into_a_file_by_its_path(tmp_path: Path) -> None:
    done = shell("$RUN > out.json", tmp_path, "--json", "/dev/stdout")
    assert (
        done.returncode == 0
        and json.loads((tmp_path / "out.json").read_text())["verdict"] == "warn"
    )
    assert b"transformer.h.0.attn" in done.stderr


def test_a_picture_on_stdout(tmp_path: Path) -> None:
    done = shell("$RUN", tmp_path, "--plot", "-")
    assert (
        done.returncode == 0
        and done.stdout.startswith(PNG)
        and b"transformer.h.0.attn" in done.stderr
    )


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_full_stdout_exits_2_without_a_traceback(tmp_path: Path, option: str) -> None:
    done = shell("$RUN > /dev/full", tmp_path, option, "-")
    assert (
        done.returncode == 2 and b"No space left" in done.stderr and b"Traceback" not in done.stderr
    )
    assert b"Exception ignored" not in done.stderr


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_reader_of_stdout_that_leaves(tmp_path: Path, option: str) -> None:
    done = shell("$RUN | head -c 3; exit ${PIPESTATUS[0]}", tmp_path, option, "-")
    assert done.returncode == 0 and len(done.stdout) == 3 and b"Traceback" not in done.stderr


@pytest.fixture
def report(tmp_path: Path) -> str:
    (tmp_path / "report.json").write_text(synthetic.vanilla().to_json())
    return "report.json"


def test_plot_to_devices_and_links(jd: Run, report: str, tmp_path: Path) -> None:
    assert jd("plot", report, "-o", "/dev/null").err == "wrote /dev/null\n"
    full = jd("plot", report, "-o", "/dev/full")
    assert full.code == 2 and "No space left" in full.err
    (tmp_path / "link.svg").symlink_to("target.svg")
    assert jd("plot", report, "-o", "link.svg").err == "wrote link.svg\n"
    assert (tmp_path / "target.svg").read_text().startswith("<?xml") and (
        tmp_path / "link.svg"
    ).is_symlink()
    assert jd("plot", report).err == "wrote report.png\n"


def test_plot_does_not_write_over_what_it_draws(jd: Run, report: str, tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to(report)
    done = jd("plot", report, "-o", "link.png")
    assert done.code == 2 and "would write over what is drawn" in done.err
    assert (tmp_path / report).read_text().startswith("{")


def test_replay_with_another_probe(jd: Run, stub: Stub) -> None:
    done = jd("audit", "c.pt", "--replay", "flight-3", "--tokens", "t.npy")
    assert done.code == 2 and "the probe is given twice" in done.err and stub.calls == 0


def test_names_that_are_no_utf8_or_hold_a_line_end(jd: Run, stub: Stub, tmp_path: Path) -> None:
    """A name on Linux is any bytes. What is written of it stays JSON."""
    odd = os.fsdecode(b"r\xff.json")
    stub.report = dataclasses.replace(stub.report, source={"path": odd})
    done = jd("audit", "c.pt", "--json", odd, "--html", "p.html", "--plot", "g.svg")
    assert done.code == 0 and "wrote r\\udcff.json" in done.err.splitlines()
    assert json.loads((tmp_path / odd).read_bytes())["source"]["path"] == odd

    done = jd("audit", "c.pt", "--json", "a\nwrote b.json")
    assert done.code == 0 and done.err.splitlines() == ["wrote a\\nwrote b.json"]
