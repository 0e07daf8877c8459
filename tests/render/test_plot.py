"""The picture: files of every format, what is drawn in them, and that nothing else is changed."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from render import synthetic

from jacdiag.errors import JacdiagError
from jacdiag.records import AgainstRecord, Interval, Report
from jacdiag.render.plots.report_plot import _STYLE, draw, save

MAGIC = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<?xml", ".pdf": b"%PDF-"}
KINDS: dict[str, Callable[[int], Report]] = {
    name: getattr(synthetic, name)
    for name in ("vanilla", "clean", "post", "trained", "weights_tier", "undecided", "broken")
}
INF = float("inf")


def bare(**changes: object) -> Report:
    """Three layers with some figures of every sub-layer replaced."""
    base = synthetic.vanilla(3)
    rows = [dataclasses.replace(row, **changes) for row in base.sublayers]  # type: ignore[arg-type]
    return dataclasses.replace(base, sublayers=rows)


def with_thresholds(report: Report, **levels: float) -> Report:
    thresholds = {"branch_norm": levels, "norm_gain": {"warning": 8.8}}
    return dataclasses.replace(report, settings={**report.settings, "thresholds": thresholds})


def with_long_names() -> Report:
    base = synthetic.vanilla(12)
    rows = [
        dataclasses.replace(row, name=f"{'注[red]$x_' * 30}.{row.index}") for row in base.sublayers
    ]
    return dataclasses.replace(
        base, sublayers=rows, model=dataclasses.replace(base.model, name="VeryLongModelName" * 12)
    )


ODD: dict[str, Report] = {
    "one sub-layer": dataclasses.replace(
        synthetic.vanilla(1), sublayers=synthetic.vanilla(1).sublayers[:1]
    ),
    "no sub-layers": dataclasses.replace(synthetic.vanilla(1), sublayers=[]),
    "no bounds": bare(bound=None),
    "no split": bare(norm_gain=None),
    "branches only": bare(bound=None, core_norm=None, norm_gain=None),
    "nothing": bare(
        bound=None, core_norm=None, norm_gain=None, branch_norm=None, residual_norm=None
    ),
    "zeros": bare(branch_norm=Interval.exact(0.0), core_norm=Interval.exact(0.0), bound=1.0),
    "no upper ends": bare(branch_norm=Interval(3.0, 2.9, INF), core_norm=Interval(3.0, 2.9, INF)),
    "huge": bare(branch_norm=Interval(1e30, 1e-30, 1e31), bound=INF),
    "near thresholds": with_thresholds(synthetic.vanilla(4), warning=10.0, error=10.5),
    "long names": with_long_names(),
}


def texts(figure: Any) -> list[str]:
    return [text.get_text() for part in (figure, *figure.axes) for text in part.texts]


def drawn(line: Any) -> tuple[list[float], list[float]]:
    return [float(x) for x in line.get_xdata()], [float(y) for y in line.get_ydata()]


def corners(axes: Axes) -> list[set[tuple[float, float]]]:
    """The corners of every band."""
    bands: list[Any] = [band for band in axes.collections if isinstance(band, PolyCollection)]
    return [
        {(float(x), float(y)) for path in band.get_paths() for x, y in path.vertices}
        for band in bands
    ]


def lines_of(axes: Axes, values: list[float]) -> list[Line2D]:
    return [line for line in axes.lines if drawn(line)[1] == values]


def curve_of(axes: Axes, report: Report, key: str, kind: str) -> tuple[list[float], list[float]]:
    """The drawn line whose values are a figure of one kind of sub-layer, and those values."""
    values = [getattr(row, key).estimate for row in report.sublayers if row.kind == kind]
    [line] = lines_of(axes, values)
    return drawn(line)[0], values


@pytest.mark.parametrize("suffix", MAGIC)
@pytest.mark.parametrize("layers", [2, 96])
def test_files_of_every_format(tmp_path: Path, suffix: str, layers: int) -> None:
    path = tmp_path / f"gain{suffix}"
    save(synthetic.vanilla(layers), path)
    data = path.read_bytes()
    assert data.startswith(MAGIC[suffix]) and len(data) > 5000
    save(synthetic.vanilla(layers), str(path))
    assert path.read_bytes() == data, "the same report makes the same bytes"


@pytest.mark.parametrize("name", ODD)
def test_odd_reports_are_drawn_within_the_picture(
    name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    save(ODD[name], tmp_path / "gain.PNG")
    assert (tmp_path / "gain.PNG").read_bytes().startswith(MAGIC[".png"])
    assert [str(warning.message) for warning in recwarn] == []
    assert_within(ODD[name])


@pytest.mark.parametrize("layers", [2, 12, 96])
@pytest.mark.parametrize("name", KINDS)
def test_no_text_leaves_the_picture_and_no_label_covers_another(name: str, layers: int) -> None:
    assert_within(KINDS[name](layers))


def assert_within(report: Report) -> None:
    with style.context(_STYLE, after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        figure: Any = draw(report)
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        whole, size = figure.get_tightbbox(renderer), figure.get_size_inches()
        assert whole.x0 >= 0 and whole.y0 >= 0 and whole.x1 <= size[0] and whole.y1 <= size[1], (
            whole
        )
        for part in (figure, *figure.axes):
            boxes = [(text.get_window_extent(renderer), text.get_text()) for text in part.texts]
            covered = [
                (text, other)
                for k, (box, text) in enumerate(boxes)
                for at, other in boxes[:k]
                if box.overlaps(at)
            ]
            assert covered == []


def test_an_unknown_suffix_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    for name in ("gain.jpg", "gain", "gain.png.txt"):
        with pytest.raises(JacdiagError, match=r"\.png, \.svg or \.pdf"):
            save(synthetic.vanilla(2), tmp_path / name)
    with pytest.raises(JacdiagError, match="its folder does not exist"):
        save(synthetic.vanilla(2), tmp_path / "none" / "gain.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["savefig", "replace"])
def test_a_failure_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(self: object, *args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure if step == "savefig" else Path, step, full)
    before, path = dict(matplotlib.rcParams), tmp_path / "gain.svg"
    path.write_text("old")
    with pytest.raises((OSError, JacdiagError), match="No space"):
        save(synthetic.vanilla(2), path)
    assert [file.name for file in tmp_path.iterdir()] == ["gain.svg"] and path.read_text() == "old"
    assert dict(matplotlib.rcParams) == before


def test_matplotlib_is_left_as_it_was(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    with matplotlib.rc_context({"font.size": 7.0, "axes.facecolor": "black", "svg.hashsalt": None}):
        own = plt.figure()
        before, backend, figures = (
            dict(matplotlib.rcParams),
            matplotlib.get_backend(),
            plt.get_fignums(),
        )
        save(synthetic.vanilla(2), tmp_path / "own.png")
        assert dict(matplotlib.rcParams) == before and matplotlib.get_backend() == backend
        assert plt.get_fignums() == figures and plt.gcf() is own
        plt.close(own)
    save(synthetic.vanilla(2), tmp_path / "default.png")
    assert (tmp_path / "own.png").read_bytes() == (tmp_path / "default.png").read_bytes(), (
        "a user's style leaks in"
    )


def test_pyplot_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from render import synthetic; from jacdiag.render.plots.report_plot import "
        "save; "
        f"save(synthetic.vanilla(1), {str(tmp_path / 'gain.svg')!r}); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    env = {
        "PYTHONPATH": ":".join(path for path in sys.path if path),
        "MPLBACKEND": "TkAgg",
        "HOME": str(tmp_path),
    }
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=60).returncode == 0


def test_upper_panel_shows_each_interval_on_a_log_scale() -> None:
    base, rows = synthetic.undecided(6), []
    for row in base.sublayers:
        assert row.branch_norm is not None
        lower = 0.4 * row.branch_norm.estimate
        rows.append(
            dataclasses.replace(row, branch_norm=dataclasses.replace(row.branch_norm, lower=lower))
        )
    report = dataclasses.replace(base, sublayers=rows)
    top = draw(report).axes[0]
    assert top.get_yscale() == "log"
    for kind in ("attention", "mlp"):
        x, values = curve_of(top, report, "branch_norm", kind)
        norms = [row.branch_norm for row in rows if row.kind == kind and row.branch_norm]
        ends = {
            (place, end)
            for place, norm in zip(x, norms, strict=True)
            for end in (norm.lower, norm.upper)
        }
        assert any(ends <= band for band in corners(top))
        low, high = top.get_ylim()
        assert low < min(values) and high > max(norm.upper for norm in norms)
    bounds = [row.bound - 1 for row in report.sublayers if row.kind == "attention" and row.bound]
    [dashed] = lines_of(top, bounds)
    assert dashed.get_linestyle() == "--"
    assert len({line.get_marker() for line in top.lines if line.get_linestyle() == "-"}) == 2


def test_lower_panel_shows_the_two_factors() -> None:
    report = synthetic.vanilla(6)
    top, bottom = draw(report).axes
    assert bottom.get_yscale() == "log" and top.get_shared_x_axes().joined(top, bottom)
    for kind in ("attention", "mlp"):
        curve_of(bottom, report, "core_norm", kind)
    gains = [row.norm_gain.estimate for row in report.sublayers if row.norm_gain]
    assert len(lines_of(bottom, gains)) == 1
    assert len(draw(synthetic.weights_tier(6)).axes) == 1, (
        "the weights alone say nothing about factors"
    )


def test_thresholds_are_drawn_where_the_report_has_them() -> None:
    top, bottom = draw(with_thresholds(synthetic.vanilla(4), warning=12.5, error=31.0)).axes
    heights = [drawn(line)[1] for line in top.lines]
    assert sorted(y for y, *others in heights if others == [y]) == [12.5, 31.0]
    assert {"warning above 12.5", "error above 31"} <= {text.get_text() for text in top.texts}
    assert "1/σ, warning above 8.8" in [text.get_text() for text in bottom.texts]
    far = draw(with_thresholds(synthetic.vanilla(4), warning=1e7)).axes[0]
    assert far.get_ylim()[1] < 1e4, "a threshold far away does not flatten the data"


def thresholds_drawn(report: Report) -> list[str]:
    return [text for text in texts(draw(report)) if " above " in text and ":" not in text]


def mixed(layers: int) -> Report:
    """Half of the sub-layers in pre-norm, half in sandwich-norm."""
    base = with_thresholds(synthetic.vanilla(layers), warning=12.5)
    rows = [
        dataclasses.replace(row, placement="sandwich") if row.index % 2 else row
        for row in base.sublayers
    ]
    return dataclasses.replace(base, sublayers=rows, settings={**base.settings, "stratum": "pre"})


def test_no_threshold_is_drawn_that_no_rule_uses() -> None:
    """By state, by placement and by selection: a line that no rule compares with is a claim that is
    false.
    """
    init = with_thresholds(synthetic.vanilla(4), warning=12.5)
    assert thresholds_drawn(init) == ["warning above 12.5", "1/σ, warning above 8.8"]

    # 1. On a trained model the rules observe, unless a profile makes one decide.
    trained = dataclasses.replace(init, state="trained")
    assert thresholds_drawn(trained) == []
    strict = dataclasses.replace(
        trained, settings={**trained.settings, "levels": {"JD102": "error"}}
    )
    assert thresholds_drawn(strict) == ["1/σ, warning above 8.8"]

    # 2. A rule that matched no sub-layer for its placement, or was not selected.
    unmatched = [dataclasses.replace(r, matched=0) if r.code == "JD102" else r for r in init.rules]
    assert thresholds_drawn(dataclasses.replace(init, rules=unmatched)) == ["warning above 12.5"]
    selected = [rule for rule in init.rules if rule.code == "JD102"]
    assert thresholds_drawn(dataclasses.replace(init, rules=selected)) == ["1/σ, warning above 8.8"]

    # 3. Several placements: the line says which one it is for.
    assert thresholds_drawn(mixed(4)) == ["pre-norm, warning above 12.5", "1/σ, warning above 8.8"]


def test_the_earlier_norms_are_drawn_dashed() -> None:
    base = synthetic.trained(4)
    norms = {
        row.name: [1.0 + row.index, 2.0 + row.index, 3.0 + row.index] for row in base.sublayers
    }
    report = dataclasses.replace(
        base, against=AgainstRecord("earlier.pt", "trained", branch_norms=norms)
    )
    top = draw(report).axes[0]
    values = [2.0 + row.index for row in report.sublayers if row.kind == "attention"]
    [line] = lines_of(top, values)
    assert line.get_linestyle() == "--" and "- - earlier" in [text.get_text() for text in top.texts]
    assert_within(report)


def test_the_title_is_the_verdict_in_words() -> None:
    title = (
        "Large shortcut not met, small sub-layers met: worst branch gain 22.4 to 23.3 at "
        "transformer.h.0.attn"
    )
    assert title in texts(draw(synthetic.vanilla(12)))
    assert "JD906: transformer.h.0.mlp.c_fc.weight holds 3 NaN" in texts(draw(synthetic.broken()))


def test_what_has_no_place_on_the_scale_is_said() -> None:
    assert {"no finite value", "● attention", "■ FFN"} <= set(texts(draw(synthetic.broken())))
    assert "no finite value" not in texts(draw(ODD["zeros"]))
    assert {"every branch gain is 0", "0"} <= set(texts(draw(ODD["zeros"])))
    assert "nothing could be measured" in texts(draw(ODD["no sub-layers"]))
    top = draw(ODD["no upper ends"]).axes[0]
    tallest = max(y for band in corners(top) for _, y in band)
    assert top.get_ylim()[1] < tallest < math.inf, "the band leaves the panel at its top"


def test_a_lonely_point_is_seen() -> None:
    top, bottom = draw(ODD["one sub-layer"]).axes
    for axes in (top, bottom):
        single = [line for line in axes.lines if len(drawn(line)[0]) == 1]
        assert len(single) == 2 and all(
            line.get_marker() not in (None, "", "None") for line in single
        )
        assert all(line.get_markevery() in (None, [0]) for line in single)
        assert [label for label in axes.get_xticks() if 0 <= label <= 0.4] == [0.0]
