"""The screen that follows a run: its height, its fixed scales, and what stands apart from the
alerts.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from jacdiag_cli.live import Follower
from jacdiag_cli.main import main
from render.run_logs import FINDINGS, run_log, write_log
from rich.console import Console

from jacdiag.records.run_log import RunLog
from jacdiag.render.terminal.gain_cells import CUTS, SHADES, GainCells
from jacdiag.render.terminal.run_screen import chart, screen


def shown(run: RunLog, width: int = 80, height: int = 24, **options: Any) -> str:
    """One frame as text."""
    terminal = Console(width=width, height=height, force_terminal=False, file=io.StringIO())
    with terminal.capture() as held:
        terminal.print(screen(run, "runs/a", width, height, **options), height=height)
    return held.get()


def column(text: str, place: int) -> str:
    """The text of one of the three columns, joined."""
    lines = [re.split("││|│╭|│╰|╮╭|╯╰", line) for line in text.splitlines()]
    return " ".join(
        " ".join(line[place].strip(" │╭╮╰╯─") for line in lines if len(line) == 3).split()
    )


def probed(*gains: float, names: tuple[str, ...] = ("h.0.attn",), **first: Any) -> RunLog:
    """A run whose probes gave these gains for every sub-layer."""
    run = RunLog()
    for k, gain in enumerate(gains):
        report = {"report": first} if k == 0 and first else {}
        run.add(
            {
                "type": "probe",
                "step": 100 * k,
                "figures": {"branch_norm": dict.fromkeys(names, gain)},
                **report,
            }
        )
    return run


def glyphs(run: RunLog, name: str = "h.0.attn") -> str:
    cells = GainCells()
    cells.update(run)
    return "".join(row[name].glyph for row in cells.rows)


RUNS: dict[str, RunLog] = {
    "spike": run_log(300, spike=200, drift=150, findings=FINDINGS, resume=50),
    "nan": run_log(300, lost=250),
    "one": run_log(1, probe_every=1, end=False),
    "empty": run_log(0, end=False),
    "nothing": RunLog(),
}


@pytest.mark.parametrize("height", [12, 24, 50, 120])
@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("kind", RUNS)
def test_a_frame_fits_and_fills_the_screen(kind: str, width: int, height: int) -> None:
    lines = shown(RUNS[kind], width, height).splitlines()
    assert len(lines) == height and max(map(len, lines)) <= width
    assert "Ctrl-C" in lines[-1]


def test_a_taller_screen_shows_more_curves_and_taller_ones() -> None:
    low, high = shown(RUNS["spike"], 120, 24), shown(RUNS["spike"], 120, 50)
    assert "learning rate" not in low and "learning rate" in high
    assert column(high, 0).count("█") > 1.5 * column(low, 0).count("█")
    assert column(high, 1).count("h.0.attn") == 1 and high.count("▒") > 1.5 * low.count("▒")


def test_a_chart_of_several_lines_is_the_line_of_bars_in_finer_steps() -> None:
    assert chart([0.0, 1.0, 2.0, 3.0], 4, 2) == ["  ▃█", "▁▆██"]
    assert chart([1.0, float("nan"), 3.0], 3, 3) == ["  █", "  █", "▁ █"]
    assert chart([2.0, 2.0], 5, 2) == ["", "▁▁"] or chart([2.0, 2.0], 5, 2) == ["  ", "▁▁"]
    assert chart([], 5, 3) == chart([float("inf")], 5, 3) == ["", "", ""]


# -- the heat map ----------------------------------------------------------------------------------
def test_a_shade_means_the_same_in_every_run() -> None:
    """Cut points are fixed: a run between 0.50 and 0.52 shows one shade, not the whole scale."""
    assert len(CUTS) == len(SHADES) - 1 and sorted(CUTS) == list(CUTS)
    assert glyphs(probed(0.50, 0.51, 0.52)) == "░░░"
    for gain, shade in (
        (0.29, "·"),
        (0.31, "░"),
        (0.99, "░"),
        (1.01, "▒"),
        (3.1, "▓"),
        (9.9, "▓"),
        (11.0, "█"),
    ):
        assert glyphs(probed(gain)) == shade


@pytest.mark.parametrize(
    ("last", "glyph", "style"),
    [
        (1.9, "▒", "cyan"),
        (2.1, "+", "yellow"),
        (0.55, "░", "cyan"),
        (0.48, "-", "yellow"),
        (1.2, "▒", "grey50"),
        (float("nan"), "?", "grey50"),
    ],
)
def test_colours_and_signs_follow_the_factor_of_the_rule(
    last: float, glyph: str, style: str
) -> None:
    cells = GainCells()
    cells.update(probed(1.0, 1.0, 1.0, last))
    cell = cells.rows[-1]["h.0.attn"]
    assert cells.factor == 2.0 and (cell.glyph, cell.style) == (glyph, style)


def test_a_mark_is_where_a_rule_fired_and_nowhere_else() -> None:
    names = ("h.0.attn", "h.0.mlp")
    run = probed(
        5.0,
        5.0,
        5.0,
        names=names,
        findings=[{"code": "JD103", "level": "error", "where": ["h.0.mlp"]}],
    )
    assert (glyphs(run), glyphs(run, "h.0.mlp")) == ("▓▓▓", "●▓▓"), (
        "of the probe that the report is of"
    )
    run.alerts.append(
        {
            "step": 200,
            "code": "JD504",
            "level": "warning",
            "where": ["h.0.attn"],
            "evidence": {"figure": "branch_norm"},
            "what": "",
        }
    )
    assert glyphs(run) == "▓▓▲"
    run.alerts[0]["evidence"]["figure"] = "shortcut_std"
    assert glyphs(run) == "▓▓▓", "an alert about another figure is not about the gain"
    run.alerts[0].update(code="JD501")
    assert glyphs(run) == "▓▓▓"


def test_cells_grow_with_the_run_and_follow_a_resume() -> None:
    run = probed(1.0, 1.0)
    cells = GainCells()
    cells.update(run)
    rows = cells.rows
    run.add({"type": "probe", "step": 200, "figures": {"branch_norm": {"h.0.attn": 3.5}}})
    cells.update(run)
    assert cells.rows is rows and cells.steps == [0, 100, 200], (
        "probes that were seen are not looked at again"
    )
    run.add({"type": "resume", "step": 150})
    run.add({"type": "probe", "step": 300, "figures": {"branch_norm": {"h.0.attn": 1.1}}})
    cells.update(run)
    assert (
        cells.steps == [0, 100, 300] and [row["h.0.attn"].glyph for row in cells.rows] == ["▒"] * 3
    )


def test_a_mark_is_not_lost_where_probes_share_a_column() -> None:
    gains = [1.0] * 100
    gains[37] = 2.5
    cells = GainCells()
    cells.update(probed(*gains))
    _, columns = cells.binned(10)
    assert "".join(column["h.0.attn"].glyph for column in columns) == "▒▒▒+▒▒▒▒▒▒"


# -- the right column ------------------------------------------------------------------------------
@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 50)])
def test_the_report_at_the_start_stands_apart_from_the_alerts(width: int, height: int) -> None:
    right = column(shown(run_log(100, findings=FINDINGS), width, height), 2)
    assert "none" in right and right.index("none") < right.index("report at step 0") < right.index(
        "JD102"
    )
    assert "JD103" in right and "JD102 at" not in right
    assert "report at step" not in shown(run_log(100), width, height)


def test_what_is_off_is_shown_with_its_reason() -> None:
    run = run_log(100)
    assert "notes" not in shown(run, 120, 40)
    fault = {
        "part": "probe",
        "error": "MeasureError: no sub-layer was found",
        "off": "no Jacobian norms from now on",
    }
    run.faults.append(fault)
    run.notes.append({"step": 12, "text": "flight recorder: flight-12"})
    right = column(shown(run, 120, 40), 2)
    assert (
        "off, notes" in right
        and "× probe is off MeasureError: no sub-layer was found; no Jacobian norms" in right
    )
    assert "· 12: flight recorder: flight-12" in right


def test_the_last_line_says_since_when_a_run_is_silent() -> None:
    run = run_log(20, end=False)
    assert "no line for 5 min 0 s" in shown(run, idle=300.0)
    assert "the run goes on" not in shown(run, idle=300.0), "that is not known"
    for text in (shown(run, idle=5.0), shown(run)):
        assert "running" in text and "no line" not in text
    assert "ended at step 20" in shown(run_log(20), idle=300.0) and "no line" not in shown(
        run_log(20), idle=300.0
    )


def test_the_command_prints_a_frame_as_high_as_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_log(tmp_path, 100, findings=FINDINGS)
    assert main(["live", str(folder), "--once", "--lines", "40"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 40
    assert main(["live", str(folder), "--once"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 24
    follower = Follower(folder / "run.jsonl")
    follower.read()
    idle = follower.idle()
    assert idle is not None and idle < 60 and len(follower.run.steps) == 100


# -- one probe, and the next one -------------------------------------------------------------------
def test_a_single_probe_is_a_number_and_no_course_over_time() -> None:
    once, twice = probed(1.25), probed(1.25, 2.5)
    middle = column(shown(once), 1)
    assert "h.0.attn ▒ 1.25" in middle and "one probe, at step 0" in middle
    assert "+ -" not in middle, "there is no probe before to compare it with"
    middle = column(shown(twice), 1)
    assert "▒▒▒" in middle and "2.50" in middle and "steps 0 to 100" in middle
    assert "+ -" in middle and "one probe" not in middle


def test_probes_of_one_step_are_no_course_over_steps() -> None:
    run = probed(1.25, 2.5)
    for row in run.probes:
        row["step"] = 0
    middle = column(shown(run), 1)
    assert "2 probes, all at step 0" in middle and "0 to 0" not in middle


@pytest.mark.parametrize(
    ("every", "step"), [(100, "next probe about step 200"), (0.01, "next probe about step 960")]
)
def test_the_next_probe_is_said_while_the_run_goes_on(every: float, step: str) -> None:
    """By 1% of the time: a probe of 2.4 s pays after 240 s of steps that take 0.25 s each."""
    run = run_log(100, probe_every=100, end=False)
    run.header["every"] = every
    if every < 1:
        run.probes.pop()
    assert step in column(shown(run, 120, 40), 1)


def test_no_next_probe_is_said_if_there_is_none() -> None:
    ended, never, off = run_log(100), run_log(100, end=False), run_log(100, end=False)
    never.header["every"] = None
    off.faults.append({"part": "probe", "error": "", "off": ""})
    for run in (ended, never, off):
        assert "next probe" not in shown(run, 120, 40)


# -- numbers that fit, and sub-layers that have none -----------------------------------------------
@pytest.mark.parametrize(("width", "is_shown"), [(60, False), (80, True)])
def test_a_gain_is_shown_whole_or_not_at_all(width: int, is_shown: bool) -> None:
    """Cut to its first digit, 0.785 would be 0."""
    run = probed(0.785, 0.785, names=("h.0.attn", "h.0.mlp"))
    middle = column(shown(run, width), 1)
    assert ("0.785" in middle) == is_shown
    assert ("a number: the last" in middle) == is_shown
    assert not re.search(r"[·░▒▓█] 0(?!\.)", middle.replace("░ 0.3", ""))


def test_a_sub_layer_that_no_probe_measures_has_a_row() -> None:
    rows = [{"name": name, "depth": 0} for name in ("h.0.attn", "h.0.mlp")]
    run = probed(1.0, 1.0, sublayers=rows)
    assert re.search(r"h\.0\.mlp +–", column(shown(run), 1))
    assert "h.0.mlp" not in shown(probed(1.0, 1.0))


@pytest.mark.parametrize(("share", "words"), [(1.2, "1.2 x steps' time"), (0.5, "50.0% of steps'")])
@pytest.mark.parametrize("width", [60, 80, 200])
def test_what_probes_cost_is_not_cut(width: int, share: float, words: str) -> None:
    run = run_log(100)
    run.prices.append({"probe_share": share})
    text = column(shown(run, width, 40), 0)
    if width == 200:
        words = words.replace("x steps' time", "times the time of").replace("of steps'", "of the")
    assert words in text and "x the" not in text


# -- a frame that is printed once ------------------------------------------------------------------
def test_only_a_screen_that_follows_the_run_says_how_to_leave(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_log(tmp_path, 300)
    assert main(["live", str(folder), "--once"]) == 0
    assert "Ctrl-C" not in capsys.readouterr().out
    assert "Ctrl-C leaves" in shown(run_log(300))


def test_once_prints_the_alerts_in_full_below_the_frame(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_log(tmp_path, 300, spike=200)
    assert main(["live", str(folder), "--once"]) == 0
    text = " ".join(capsys.readouterr().out.splitlines()[24:])
    assert text.startswith("alerts in full:")
    what = "loss 4.9, 3.1 over its median and 44 standard deviations over its mean"
    assert what in " ".join(text.split())
    assert "..." not in text

    quiet = write_log(tmp_path / "quiet", 300)
    assert main(["live", str(quiet), "--once"]) == 0
    assert "alerts in full" not in capsys.readouterr().out


def test_a_shared_layer_has_its_depth_in_the_map_and_in_alerts() -> None:
    names = ("attention", "attention@2")
    rows = [{"name": name, "depth": depth} for depth, name in enumerate(names)]
    run = probed(1.0, 1.0, names=names, sublayers=rows)
    alert = {"step": 100, "code": "JD504", "level": "warning", "where": ["attention@2"]}
    run.alerts.append({**alert, "what": "branch norm of attention@2 is 3 times as usual"})
    text = shown(run, 200, 40)
    assert "0 attention" in text and "1 attention" in text
    assert "attention at depth 1 (call 2)" in text and "@" not in text
