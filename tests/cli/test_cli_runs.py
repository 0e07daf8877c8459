"""`jacdiag live` and `jacdiag plot` on a run that was really made, and on what is none."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from jacdiag_cli.live import Follower
from jacdiag_cli.main import main
from rich.console import Console

import jacdiag
from jacdiag.records.run_log import RunLog, read_run
from jacdiag.render.plots.run_heatmap import heat_of
from jacdiag.render.terminal.run_screen import screen, spark
from jacdiag.sources.gpt import build


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = build("vanilla", n_layer=2, n_head=2, n_embd=16, vocab_size=32, block_size=8)
    optimizer = torch.optim.AdamW(model.parameters())
    with jacdiag.watch(model, optimizer, log_dir=folder, every=5, log_every=3, quiet=True) as w:
        for step in range(20):
            ids = torch.randint(32, (2, 9))
            _, loss = model(ids[:, :-1], ids[:, 1:])
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            w.step(float("nan") if step == 18 else loss, grad_norm=norm, tokens=16 * step)
    return folder


@pytest.mark.parametrize("width", [80, 120, 200])
def test_a_frame_fits_the_terminal_and_says_what_happened(run: Path, width: int) -> None:
    terminal = Console(width=width, height=24, force_terminal=False, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    with terminal.capture() as held:
        terminal.print(screen(read_run(run), "runs/a", width, 24), height=24)
    lines = held.get().splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= width
    text = held.get()
    for word in (
        "step 20",
        "loss",
        "gradient",
        "clipped",
        "h.0.attn",
        "‖J‖",
        "● JD505 at 19",
        "ended at step 20",
    ):
        assert word in text, word
    assert "nan" not in text.lower().replace("jd505", "")


def shown(run: RunLog, width: int, height: int = 24) -> str:
    """One frame as text."""
    terminal = Console(width=width, height=height, force_terminal=False, file=io.StringIO())
    with terminal.capture() as held:
        terminal.print(screen(run, "runs/a", width, height), height=height)
    return held.get()


@pytest.mark.parametrize(("bad", "width"), [("nan", 60), ("nan", 80), ("inf", 80), ("-inf", 200)])
def test_a_loss_that_is_lost_is_shown_with_the_step_since_when(bad: str, width: int) -> None:
    """Not the last finite one; the log has null for a nan norm before clipping, and nan for the one
    behind it.
    """
    steps = [
        {"step": k, "loss": 3.39, "grad_norm": 1.89, "grad_norm_post": 1.0} for k in range(1, 191)
    ]
    lost = {"loss": bad, "grad_norm": None if bad == "nan" else bad, "grad_norm_post": bad}
    text = shown(RunLog(steps=[*steps, *({"step": k, **lost} for k in range(191, 201))]), width)
    assert f"loss {bad} since{' step' if width >= 80 else ''} 191" in text and "3.39" not in text
    assert (
        f"{'gradient' if width == 200 else 'grad'} {bad} since{' step' if width >= 80 else ''} 191"
        in text
    )
    text = shown(
        RunLog(steps=[*steps, {"step": 191, **lost}, {**steps[-1], "step": 192, "loss": None}]),
        width,
    )
    # not measured is no recovery; a finite norm is one
    assert f"loss {bad} since" in text and "1.89" in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_norm_after_clipping_keeps_its_value_if_its_label_is_too_long(width: int) -> None:
    text = shown(RunLog(steps=[{"step": 1, "loss": 3.39, "grad_norm_post": 0.123}]), width)
    assert "post-clip 0.123" in text


NAMES = [f"model.layers.{k}.{part}" for k in range(12) for part in ("self_attn", "self_mlp")]


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize(
    "names",
    [NAMES, ["encoder.layers.0.attn", "decoder.layers.0.attn"], ["one.and.only.sublayer"], []],
)
def test_sublayer_names_stay_distinct_at_every_width(names: list[str], width: int) -> None:
    figures = {"branch_norm": {name: 1.0 + k for k, name in enumerate(names)}}
    text = shown(
        RunLog(probes=[{"step": 0, "figures": figures}, {"step": 5000, "figures": figures}]),
        width,
        40,
    )
    rows = [line.split("││")[1].split(" ")[1] for line in text.splitlines()[1 : len(names) + 1]]
    assert len(set(rows)) == len(names) and "steps 0" in text


@pytest.mark.parametrize("width", [60, 80])
def test_the_sentence_of_an_alert_is_wrapped_where_there_is_room(width: int) -> None:
    what = "loss 13.1, 10.1 over its median and 11.5 standard deviations over its mean"
    alerts = [
        {
            "step": step,
            "code": "JD502",
            "level": "warning",
            "what": what,
            "where": ["layers.0.feed_forward"],
        }
        for step in range(1, 20)
    ]
    text = shown(RunLog(alerts=alerts[:2]), width)
    right = " ".join(
        " ".join(line.split("││")[2].strip(" │") for line in text.splitlines()[1:22]).split()
    )
    assert right.count(what) == 2 and right.count("0.feed_forward") == 2
    full = shown(RunLog(alerts=alerts), width)
    assert "JD502 at 19" in full and full.count("JD502") == 7 and full.count("loss 13.1") == 7


@pytest.mark.check("jacdiag live")
def test_a_run_without_a_step_or_a_probe(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = (run / "run.jsonl").read_bytes().splitlines(keepends=True)[0]
    (tmp_path / "run.jsonl").write_bytes(header)
    assert main(["live", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "no step yet" in out and "no probe yet" in out and "none" in out
    assert main(["plot", str(tmp_path)]) == 2
    assert "without a step" in capsys.readouterr().err


def test_the_follower_takes_whole_lines_only(run: Path, tmp_path: Path) -> None:
    data = (run / "run.jsonl").read_bytes()
    half = data.index(b'"step":7') + 3
    file = tmp_path / "run.jsonl"
    file.write_bytes(data[:half])
    follower = Follower(file)
    follower.read()
    assert [row["step"] for row in follower.run.steps] == list(range(1, 7))
    file.write_bytes(data)
    follower.read()
    assert [row["step"] for row in follower.run.steps] == list(range(1, 21))
    assert follower.run.ended is not None


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_of_a_run(
    run: Path, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / f"a.{suffix}"
    assert main(["plot", str(run), "-o", str(target)]) == 0
    first = target.read_bytes()
    assert first[:4] == {"png": b"\x89PNG", "svg": b"<?xm"}[suffix]
    assert main(["plot", str(run / "run.jsonl"), "-o", str(target)]) == 0
    assert target.read_bytes() == first  # the same run, the same bytes


@pytest.mark.check("jacdiag plot")
def test_plot_of_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = build("vanilla", n_layer=1, n_head=2, n_embd=16, vocab_size=32, block_size=8)
    (tmp_path / "r.json").write_text(jacdiag.audit(model, torch.randint(32, (1, 8))).to_json())
    assert main(["plot", str(tmp_path / "r.json")]) == 0
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    for name, text in (("x.json", "{}"), ("y.json", "no json")):
        (tmp_path / name).write_text(text)
        assert main(["plot", str(tmp_path / name)]) == 2
    for command, *args in (
        ["plot", "gone.json"],
        ["live", "gone"],
        ["live", "r.json"],
        ["plot", "r.json", "-o", "a.bmp"],
    ):
        given = [a if a.startswith("-") else str(tmp_path / a) for a in args]
        assert main([command, *given]) == 2, given
    assert "bug" not in capsys.readouterr().err


def test_heat_is_thinned_and_keeps_the_last_probe(run: Path) -> None:
    heat = heat_of(read_run(run))
    assert heat.steps == [0, 5, 10, 15, 20] and len(heat.names) == 4
    thin = heat_of(read_run(run), columns=3)
    assert thin.steps == [0, 10, 20]
    low, high = heat.extent
    assert (
        heat.level(low, 5) == 0 and heat.level(high, 5) == 4 and heat.level(float("nan"), 5) is None
    )


def test_sparkline_has_a_gap_for_nan_and_is_empty_without_values() -> None:
    assert spark([1.0, 2.0, 3.0], 3) == "▁▅█" or spark([1.0, 2.0, 3.0], 3) == "▁▄█"
    assert spark([1.0, float("nan"), 3.0], 3) == "▁ █"
    assert spark([], 5) == spark([float("nan")], 5) == ""
    assert len(spark([float(k) for k in range(1000)], 20)) == 20


def test_ctrl_c_leaves_the_screen(run: Path) -> None:
    """In a pseudo terminal: the screen comes up, follows, and Ctrl-C ends with 130."""
    import pty
    import signal

    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "jacdiag_cli", "live", str(run), "--refresh", "0.1"],
        stdout=follower,
        stderr=follower,
        stdin=follower,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
    )
    seen, until, left = b"", time.monotonic() + 60, b""
    while b"ended at step" not in seen and time.monotonic() < until:
        seen += os.read(leader, 65536)
    process.send_signal(signal.SIGINT)
    os.set_blocking(leader, False)
    until = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < until:
        try:
            left += os.read(leader, 65536)
        except BlockingIOError:
            time.sleep(0.05)
    with contextlib.suppress(OSError):
        left += os.read(leader, 65536)
    assert process.wait(5) == 130 and b"ended at step" in seen
    # to leave as the screen says is no error
    assert b"error" not in left and b"interrupted" not in left


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_last_line_says_how_to_leave_and_that_a_run_goes_on_while_it_does(width: int) -> None:
    steps = [{"step": 1, "loss": 1.0}]
    for ended, wanted in ((None, "Ctrl-C leaves; the run goes on"), ({"step": 1}, "Ctrl-C leaves")):
        terminal = Console(width=width, height=24, force_terminal=False, file=io.StringIO())
        with terminal.capture() as held:
            terminal.print(
                screen(
                    RunLog(steps=steps, ended=ended), "a/long/path/" * 5 + "run.jsonl", width, 24
                )
            )
        assert held.get().rstrip().endswith(wanted), ended
