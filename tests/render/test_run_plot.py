"""The picture of a run: what is drawn of which log, and where the axis ends."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jacdiag_cli.main import main
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from render import synthetic
from render.run_logs import FINDINGS, NAMES, run_lines, run_log, write_log

from jacdiag.errors import UsageError
from jacdiag.records.run_log import RunLog, read_run
from jacdiag.render.content.run_alerts import alerts_of_run, report_at_start
from jacdiag.render.plots.picture_file import STYLE
from jacdiag.render.plots.run_heatmap import heat_of
from jacdiag.render.plots.run_plot import (
    FIGURES,
    SIZES,
    RunPlot,
    draw_run,
    parse_figures,
    parse_size,
)
from jacdiag.render.plots.run_series import band, column, gradient, series


def titles(figure: Any) -> list[str]:
    return [panel.get_title(loc="left") for panel in figure.axes if panel.get_title(loc="left")]


def panel_of(figure: Any, title: str) -> Any:
    [panel] = [panel for panel in figure.axes if panel.get_title(loc="left") == title]
    return panel


def words(part: Any) -> list[str]:
    return [text.get_text() for text in part.texts if text.get_text()]


def title_of(figure: Any) -> str:
    return str(figure.get_suptitle())


# -- the axis, the panels --------------------------------------------------------------------------
@pytest.mark.parametrize("steps", [2, 7, 100, 2003])
def test_the_axis_ends_with_the_last_step(steps: int) -> None:
    figure = draw_run(run_log(steps))
    panels = [panel for panel in figure.axes if panel.get_title(loc="left")]
    assert len(panels) == len(FIGURES)
    assert {panel.get_xlim() for panel in panels} == {(0.0, float(steps))}
    labelled = [panel for panel in panels if panel.get_xlabel()]
    assert [panel.get_xticks()[-1] for panel in labelled] == [steps, steps]


def test_a_panel_is_there_only_if_its_data_is() -> None:
    run = run_log(100)
    assert set(titles(draw_run(run))) == {
        "loss",
        "gradient norm",
        "branch norm ‖J‖",
        "learning rate",
        "update / weight norm",
        "shortcut std",
        "largest attention logit",
        "clipped steps, %",
    }
    run.probes.clear()
    run.stats.clear()
    for row in run.steps:
        row.update(clipped=None, update=None, grad_norm=None)
    assert titles(draw_run(run)) == ["loss", "gradient norm", "learning rate"]
    for row in run.steps:
        row.update(lr=None, grad_norm_post=None)
    assert titles(draw_run(run)) == ["loss"]


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_of_one_step_is_drawn_and_an_empty_one_is_refused(steps: int) -> None:
    run = run_log(steps, probe_every=1)
    if steps:
        assert "1 step;" in title_of(draw_run(run))
    else:
        with pytest.raises(UsageError, match="without a step"):
            draw_run(run)


def test_the_range_cuts_every_panel_and_never_ends_after_the_run() -> None:
    run = run_log(200, spike=150)
    figure = draw_run(run, RunPlot(first=50, last=120))
    assert panel_of(figure, "loss").get_xlim() == (50, 120)
    x = [line.get_xdata() for line in panel_of(figure, "loss").lines]
    assert all(min(points) >= 50 and max(points) <= 120 for points in x)
    assert "JD501" not in words(panel_of(figure, "loss"))
    assert panel_of(draw_run(run, RunPlot(last=10_000)), "loss").get_xlim() == (0, 200)
    with pytest.raises(UsageError, match="no step in the range"):
        draw_run(run, RunPlot(first=300))


def test_figures_and_size_are_as_asked_for() -> None:
    figure = draw_run(run_log(50), RunPlot(figures=("clip", "loss"), size=(8.0, 4.0)))
    assert titles(figure) == ["clipped steps, %", "loss"] and tuple(figure.get_size_inches()) == (
        8.0,
        4.0,
    )
    assert parse_size("wide") == SIZES["wide"] and parse_figures("loss,loss, lr") == ("loss", "lr")
    for bad in ("huge", "1x1", "8x900", "8", "axb"):
        with pytest.raises(UsageError, match="slide, page, wide"):
            parse_size(bad)
    for bad in ("loss,lost", "", ","):
        with pytest.raises(UsageError, match="there are loss, gradient"):
            parse_figures(bad)
    run = run_log(50)
    run.stats.clear()
    with pytest.raises(UsageError, match="no logits in the log"):
        draw_run(run, RunPlot(figures=("logits",)))


# Every size and every kind of run; the other pairs are long.
PICTURES = [
    pytest.param(size, kind, marks=[] if (row + column) % 3 == 0 else pytest.mark.long)
    for row, kind in enumerate(("spike", "nan", "several", "one"))
    for column, size in enumerate(sorted(SIZES))
]


@pytest.mark.parametrize(("size", "kind"), PICTURES)
def test_no_text_leaves_the_picture(size: str, kind: str) -> None:
    runs: dict[str, Any] = {
        "spike": run_log(300, spike=290, drift=100, resume=20, findings=FINDINGS),
        "nan": run_log(300, lost=280),
        "several": {
            f"runs/a-long-name-of-a-run-{k}": run_log(100 * k + 100, seed=k) for k in range(5)
        },
        "one": run_log(1, probe_every=1),
    }
    with style.context({**STYLE, "font.size": 12.0}, after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        figure: Any = draw_run(runs[kind], RunPlot(size=SIZES[size]))
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        whole, inches = figure.get_tightbbox(renderer), figure.get_size_inches()
    assert whole.x0 >= -0.02 and whole.y0 >= -0.02
    assert whole.x1 <= inches[0] + 0.02 and whole.y1 <= inches[1] + 0.02


@pytest.mark.parametrize("high", [1.04, 1.3, 2.5, 9.0, 300.0, 1e7])
def test_a_log_axis_has_ticks_that_can_be_read_whatever_its_range(high: float) -> None:
    run = run_log(50)
    for k, row in enumerate(run.steps):
        row["grad_norm"] = high if k == 30 else 1.0
    panel = panel_of(draw_run(run, RunPlot(smooth=1)), "gradient norm")
    bottom, top = panel.get_ylim()
    ticks = panel.get_yticks()
    assert panel.get_yscale() == "log" and 2 <= len(ticks) <= 8
    assert all(bottom <= tick <= top for tick in ticks)
    labels = [panel.yaxis.get_major_formatter()(tick) for tick in ticks]
    assert len(set(labels)) == len(labels)


# -- alerts ----------------------------------------------------------------------------------------
def test_alerts_carry_their_code_and_the_report_at_the_start_is_no_alert() -> None:
    figure = draw_run(run_log(400, spike=300, findings=FINDINGS, resume=50))
    assert {"JD502", "JD501", "resumed"} <= set(words(panel_of(figure, "loss")))
    assert not {"JD102", "JD103"} & set(words(panel_of(figure, "loss")))
    dashed = [
        line for line in panel_of(figure, "learning rate").lines if line.get_linestyle() == "--"
    ]
    assert sorted(line.get_xdata()[0] for line in dashed) == [300, 301]
    assert title_of(figure) == (
        "GPT, 400 steps; alerts: JD502 at 300, JD501 at 301; report at step 0: JD102, JD103"
    )
    assert title_of(draw_run(run_log(400))) == "GPT, 400 steps; no alert"


def test_the_same_code_is_said_once_where_alerts_crowd() -> None:
    run = run_log(400, spike=300)
    for step in range(302, 330, 2):
        run.alerts.append({**run.alerts[-1], "step": step})
    labels = words(panel_of(draw_run(run), "loss"))
    assert labels.count("JD501") == 1 and labels.count("JD502") == 1


def test_a_finding_of_a_later_probe_is_an_alert_of_the_run() -> None:
    run = run_log(100, findings=FINDINGS)
    later = {**FINDINGS[0], "step": 50}
    run.alerts.append(later)
    assert alerts_of_run(run) == [later] and [row["code"] for row in report_at_start(run)] == [
        "JD102",
        "JD103",
    ]
    rate = {"step": 0, "code": "JD105", "level": "warning", "what": "", "where": []}
    run.alerts.append(rate)
    assert alerts_of_run(run) == [later, rate], "JD105 is about the rate, whatever the step"


# -- values ----------------------------------------------------------------------------------------
def test_the_bold_line_is_the_mean_of_the_last_steps_and_lies_over_the_raw_one() -> None:
    run = run_log(500)
    panel = panel_of(draw_run(run, RunPlot(smooth=4)), "loss")
    raw, mean = panel.lines[:2]
    losses = run.column("loss")
    assert list(raw.get_ydata()) == pytest.approx(losses)
    expected = [sum(losses[max(k - 3, 0) : k + 1]) / min(k + 1, 4) for k in range(len(losses))]
    assert list(mean.get_ydata()) == pytest.approx(expected)
    assert mean.get_linewidth() > raw.get_linewidth() and mean.get_alpha() > raw.get_alpha()
    [legend] = draw_run(run, RunPlot(smooth=4)).legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "loss, gradient norm: mean of the last 4 steps"
    ]
    plain = draw_run(run, RunPlot(smooth=1))
    assert plain.legends == [] and len(panel_of(plain, "loss").lines) == 1


@pytest.mark.parametrize(("smooth", "clips", "updates"), [(4, 20, 10), (1, 20, 0), (50, 50, 50)])
def test_each_panel_says_what_its_own_line_is_the_mean_of(
    smooth: int, clips: int, updates: int
) -> None:
    run = run_log(500, spike=200)
    figure = draw_run(run, RunPlot(smooth=smooth))
    clipping = panel_of(figure, "clipped steps, %")
    assert words(clipping)[-1:] == [f"of the last {clips} steps"]
    shares = [100.0 * row["clipped"] for row in run.steps]
    expected = [np.mean(shares[max(k + 1 - clips, 0) : k + 1]) for k in range(len(shares))]
    assert list(clipping.lines[0].get_ydata()) == pytest.approx(expected)

    # Without a mean there are only dots.
    note = f"line: mean of the last {updates} dots"
    assert (note in words(panel_of(figure, "update / weight norm"))) == (updates > 0)

    # The legend is about the panels that are drawn.
    alone = draw_run(run, RunPlot(smooth=smooth, figures=("clip", "update")))
    assert alone.legends == []


def test_a_sub_layer_that_no_probe_measures_is_a_row_without_a_colour() -> None:
    run = run_log(200)
    assert not any("white" in text for text in words(panel_of(draw_run(run), "branch norm ‖J‖")))
    rows = [{"name": name, "depth": k // 2} for k, name in enumerate(NAMES)]
    run.probes[0]["report"] = {"sublayers": rows}
    for row in run.probes:
        del row["figures"]["branch_norm"][NAMES[3]]
    panel = panel_of(draw_run(run), "branch norm ‖J‖")
    assert words(panel)[-1] == "white: not measured"
    assert heat_of(run).names == NAMES, "in the order of depth"
    run.probes[-1]["figures"]["branch_norm"][NAMES[0]] = 0.0
    assert heat_of(run).gaps_in_words == "0 or not measured"


@pytest.mark.parametrize(("width", "lines"), [(7.0, 2), (16.0, 1)])
def test_a_title_that_is_too_long_for_one_line_has_two(width: float, lines: int) -> None:
    run = run_log(300, spike=200, findings=FINDINGS)
    title = title_of(draw_run(run, RunPlot(size=(width, 6.0))))
    assert len(title.splitlines()) == lines
    assert "report at step 0: " in title and "…" not in title


def test_means_leave_out_what_is_not_finite_and_gaps_stay() -> None:
    given = series([(1, 1.0), (2, 3.0), (3, math.nan), (4, 5.0), (5, math.inf)])
    assert given.lost.tolist() == [3, 5]
    smooth = given.smoothed(3).y
    assert smooth[[0, 1, 3]].tolist() == [1.0, 2.0, 4.0] and np.isnan(smooth[[2, 4]]).all()


def test_lost_steps_are_marked_and_said_and_finite_ones_are_not() -> None:
    figure = draw_run(run_log(300, lost=280))
    for title in ("loss", "gradient norm"):
        [note] = [text for text in words(panel_of(figure, title)) if "not finite" in text]
        assert note.endswith("not finite from 280, 21 steps")
        crosses = [line for line in panel_of(figure, title).lines if line.get_marker() == "x"]
        assert crosses[0].get_xdata().tolist() == list(range(280, 301))
    # The line after clipping is still named.
    assert note.startswith("orange: after clipping; ")
    healthy = draw_run(run_log(300))
    assert not any("not finite" in text for panel in healthy.axes for text in words(panel))
    run = run_log(300)
    run.steps[99]["loss"] = "inf"
    assert "not finite at 100" in words(panel_of(draw_run(run), "loss"))


def test_the_norm_before_clipping_is_drawn_if_the_loop_passed_it() -> None:
    run = run_log(40)
    assert gradient(run).y.tolist() == pytest.approx(run.column("grad_norm"))
    assert "orange: after clipping" in words(panel_of(draw_run(run), "gradient norm"))
    for row in run.steps:
        row.update(grad_norm=None, clipped=None)
    figure = draw_run(run)
    assert words(panel_of(figure, "gradient norm")) == ["after clipping, if there was any"]
    both = draw_run({"a": run_log(40), "b": run})
    assert words(panel_of(both, "gradient norm")) == ["b: after clipping, if there was any"]
    known = draw_run({"a": run_log(40), "c": run_log(40)})
    assert words(panel_of(known, "gradient norm")) == []
    assert list(panel_of(figure, "gradient norm").lines[0].get_ydata()) == pytest.approx(
        run.column("grad_norm_post")
    )


def test_bands_are_over_sub_layers() -> None:
    run = run_log(100)
    found = band(run.stats, "shortcut_std")
    values = [list(row["figures"]["shortcut_std"].values()) for row in run.stats]
    assert found.low.y.tolist() == [min(row) for row in values]
    assert found.high.y.tolist() == [max(row) for row in values]
    run.stats[-1]["figures"]["shortcut_std"][NAMES[0]] = "inf"
    assert band(run.stats, "shortcut_std").high.lost.tolist() == [run.stats[-1]["step"]]


def test_a_long_series_is_thinned_and_keeps_its_spikes() -> None:
    values = np.sin(np.arange(100_000) / 3000.0)
    values[61_234], values[70_001] = 9.0, -9.0
    whole = series(list(zip(range(100_000), values.tolist(), strict=True)))
    thin = whole.thinned()
    assert thin.x.size <= 2000 and (np.diff(thin.x) > 0).all()
    assert (
        thin.y.max() == 9.0 and thin.y.min() == -9.0 and thin.x[thin.y == 9.0].tolist() == [61_234]
    )
    assert whole.thinned(200_000) is whole


# -- several runs ----------------------------------------------------------------------------------
def test_several_runs_are_drawn_over_each_other() -> None:
    runs = {
        "a": run_log(300, seed=1),
        "b": run_log(200, seed=2, lost=150),
        "c": run_log(300, seed=3, spike=250),
    }
    figure = draw_run(runs)
    panel = panel_of(figure, "loss")
    colours = [
        line.get_color()
        for line in panel.lines
        if line.get_linewidth() > 1.5 and len(line.get_xdata()) > 2
    ]
    assert len(set(colours)) == 3 and panel.get_xlim() == (0, 300)
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "a: 300 steps",
        "b: 200 steps",
        "c: 300 steps",
    ]
    assert "b: not finite from 150, 51 steps" in words(panel)
    assert "largest over sub-layers" in words(panel_of(figure, "branch norm ‖J‖"))
    with pytest.raises(UsageError, match="b: a run without a step"):
        draw_run({"a": runs["a"], "b": RunLog()})


def test_the_command_draws_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_log(tmp_path / "x" / "a", 60), write_log(tmp_path / "y" / "a", 40, seed=1)
    target = tmp_path / "both.svg"
    options = [
        "--figures",
        "loss,gain",
        "--from",
        "10",
        "--to",
        "50",
        "--smooth",
        "3",
        "--size",
        "8x4",
    ]
    assert main(["plot", str(a), str(b / "run.jsonl"), "-o", str(target), *options]) == 0
    first = target.read_bytes()
    assert first.startswith(b"<?xml")
    assert main(["plot", str(a), str(b), "-o", str(target), *options]) == 0
    assert target.read_bytes() == first, "the same runs, the same bytes"
    capsys.readouterr()

    (tmp_path / "r.json").write_text(synthetic.vanilla(2).to_json())
    for args, wanted in (
        ([str(a), str(b)], "-o FILE.png"),
        ([str(a), str(tmp_path / "r.json"), "-o", "x.png"], "only if all are runs"),
        ([str(tmp_path / "r.json"), "--figures", "loss"], "are for runs"),
        ([str(a), "--size", "huge"], "slide, page, wide"),
        ([str(a), "--figures", "lost"], "there are loss"),
        ([str(a), "--from", "50", "--to", "20"], "no step in the range"),
    ):
        assert main(["plot", *args]) == 2
        assert wanted in capsys.readouterr().err


def test_a_log_read_lightly_draws_the_same_picture(tmp_path: Path) -> None:
    folder = write_log(tmp_path, 120, spike=90, findings=FINDINGS, lost=110)
    whole, light = read_run(folder), read_run(folder, light=True)
    assert whole.steps[0]["grad"] and "grad" not in light.steps[0]
    assert "report" in light.probes[0] and "report" not in light.probes[1]
    for key in ("loss", "lr", "grad_norm_post"):
        assert str(column(light, key)) == str(column(whole, key))
    a, b = draw_run(whole), draw_run(light)
    assert title_of(a) == title_of(b)
    assert [words(panel) for panel in a.axes] == [words(panel) for panel in b.axes]


def test_the_made_logs_are_as_a_watch_writes_them() -> None:
    kinds = {json.loads(line)["type"] for line in run_lines(10, spike=5, resume=7)}
    assert kinds == {"run", "price", "step", "stats", "probe", "alert", "resume", "end"}


def dots(panel: Any) -> int:
    """How many points a panel marks."""
    return sum(len(line.get_xdata()) for line in panel.lines if line.get_marker() == ".")


def test_a_line_through_few_points_has_a_dot_at_each() -> None:
    assert dots(panel_of(draw_run(run_log(200, probe_every=100)), "shortcut std")) == 6
    assert dots(panel_of(draw_run(run_log(2000, probe_every=100)), "shortcut std")) == 0


def test_a_spike_keeps_its_height_though_the_mean_hides_it() -> None:
    run = run_log(2000, spike=1500)
    [top] = [max(run.column("loss")[1400:])]
    figure = draw_run(run, RunPlot(smooth=100))
    panel = panel_of(figure, "loss")
    heights = [max(line.get_ydata()) for line in panel.lines if line.get_marker() == "."]
    assert heights == pytest.approx([top])
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == [
        "loss, gradient norm: mean of the last 100 steps",
        "a step far above the mean",
    ]

    # A healthy run has no such step, and the picture does not speak of one.
    figure = draw_run(run_log(2000), RunPlot(smooth=100))
    assert dots(panel_of(figure, "loss")) == dots(panel_of(figure, "gradient norm")) == 0
    assert len(figure.legends[0].get_texts()) == 1
