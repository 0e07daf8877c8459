"""The picture: files of every format, what is drawn in them, and that nothing else is changed."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from render import synthetic
from render.picture_overlaps import overlaps

from jacdiag.errors import JacdiagError
from jacdiag.records import (
    AgainstRecord,
    Finding,
    Growth,
    Interval,
    NetworkRecord,
    Report,
    StreamRange,
)
from jacdiag.render.content.depth_curves import LOOKS
from jacdiag.render.content.shared_names import shown_names, with_shown_names
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


def title_of(figure: Figure) -> str:
    """The headline, which may take several lines."""
    return " ".join(text.get_text() for text in figure.texts if text.get_fontweight() == "bold")


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


@pytest.mark.parametrize(
    ("layers", "suffix"),
    [
        *((2, suffix) for suffix in MAGIC),
        (96, ".png"),
        *(pytest.param(96, suffix, marks=pytest.mark.long) for suffix in (".svg", ".pdf")),
    ],
)
def test_files_of_every_format(tmp_path: Path, layers: int, suffix: str) -> None:
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


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        *itertools.product(KINDS, (2, 126)),
        ("vanilla", 12),
        *(pytest.param(name, 12, marks=pytest.mark.long) for name in KINDS if name != "vanilla"),
    ],
)
def test_no_label_covers_a_line_or_another_label(name: str, layers: int) -> None:
    assert_within(KINDS[name](layers))


def assert_within(report: Report) -> None:
    with style.context(_STYLE, after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        assert overlaps(draw(report)) == []


def test_an_overlap_would_be_found() -> None:
    figure = Figure(figsize=(6, 4))
    axes = figure.add_axes((0.2, 0.2, 0.6, 0.6))
    axes.plot([0, 1], [0, 1])
    axes.text(0.5, 0.5, "on the line", ha="center", va="center")
    figure.text(0.99, 0.5, "beyond the edge")
    figure.text(0.1, 0.95, "below")
    figure.text(0.1, 0.95, "above")
    found = overlaps(figure)
    assert set(found) == {("on the line", "line"), ("beyond the edge", "edge"), ("above", "below")}


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
    assert {"o", "s"} <= {line.get_marker() for line in top.lines if line.get_linestyle() == "-"}


def test_lower_panels_show_the_two_conditions() -> None:
    report = synthetic.vanilla(6)
    top, cores, gains = draw(report).axes
    scale = math.sqrt(2 * 6)
    for axes in (cores, gains):
        assert axes.get_yscale() == "log" and top.get_shared_x_axes().joined(top, axes)
    for kind in ("attention", "mlp"):
        norms = [row.core_norm for row in report.sublayers if row.kind == kind and row.core_norm]
        values = [scale * norm.estimate for norm in norms]
        assert len(lines_of(cores, values)) == 1
        ends = {scale * norm.upper for norm in norms}
        assert any(ends <= {y for _, y in band} for band in corners(cores))

    # 1/σ as its rule judges it: the percentile over tokens.
    spreads = [row.norm_gain.per_token for row in report.sublayers if row.norm_gain]
    assert len(lines_of(gains, [spread.p99 for spread in spreads if spread])) == 1
    assert len(draw(synthetic.weights_tier(6)).axes) == 1, "nothing was run"


def rings(axes: Axes) -> list[float]:
    """The places of the rings around points."""
    found = []
    for line in axes.lines:
        if line.get_markerfacecolor() == "none" and line.get_marker() in ("o", "|"):
            found += drawn(line)[0]
    return found


def test_a_condition_names_the_layers_that_miss_it_and_no_other() -> None:
    _, cores, gains = draw(synthetic.vanilla(12)).axes
    above = [axes.texts[-1].get_text() for axes in (cores, gains)]
    assert above == ["Small sub-layers: met", "Large shortcut: not met in layers 0 to 2 (of 12)"]
    assert (rings(cores), len(rings(gains))) == ([], 6)

    # All is well, and the two do not apply.
    for axes in draw(synthetic.clean(12)).axes[1:]:
        assert axes.texts[-1].get_text().endswith(": met") and not rings(axes)
    assert len(draw(synthetic.post(12)).axes) == 2, "without the two factors, the residual map"

    # On a trained model the rules observe.
    for axes in draw(synthetic.trained(12)).axes[1:]:
        assert axes.texts[-1].get_text().endswith("no target, the model is trained")
        assert not rings(axes)


def test_a_condition_that_is_met_in_part_is_not_called_not_met() -> None:
    base = synthetic.vanilla(6)
    cuts = {"norm_gain": {"info": 3.87, "warning": 8.64}}
    names = [row.name for row in base.sublayers]

    def finding(where: list[str], threshold: float) -> Finding:
        return Finding("JD102", "warning", where, "small", {"threshold": threshold})

    def title(*findings: Finding) -> str:
        settings = {**base.settings, "thresholds": cuts}
        report = dataclasses.replace(base, settings=settings, findings=list(findings))
        return draw(report).axes[2].texts[-1].get_text().replace("\n", " ")

    partly, failed = finding(names[3:8], 3.87), finding(names[:3], 8.64)
    words = "not met in layers 0 and 1, partly met in layers 2 and 3 (of 6)"
    assert title(failed, partly) == f"Large shortcut: {words}"
    assert title(partly) == "Large shortcut: partly met in layers 1 to 3 (of 6)"
    assert title(failed) == "Large shortcut: not met in layers 0 and 1 (of 6)"


def test_a_title_of_two_lines_has_room() -> None:
    base = synthetic.vanilla(126)
    where = [row.name for row in base.sublayers if row.depth % 3 == 1]
    finding = Finding("JD102", "warning", where, "small", {"threshold": 3.0})
    partly = Finding("JD101", "info", [row.name for row in base.sublayers], "partly", {})
    report = dataclasses.replace(base, findings=[finding, partly])
    assert "and 36 more" in draw(report).axes[2].texts[-1].get_text()
    assert_within(report)


def test_many_layers_that_miss_a_condition_have_ticks_in_place_of_rings() -> None:
    figure = draw(synthetic.vanilla(126))
    [ticks] = [line for line in figure.axes[2].lines if line.get_marker() == "|"]
    assert len(drawn(ticks)[0]) == 63
    assert any("A tick at the foot" in text for text in texts(figure))
    assert not any("ring" in text for text in texts(figure))
    assert any("A ring" in text for text in texts(draw(synthetic.vanilla(12))))
    assert not any("A ring" in text for text in texts(draw(synthetic.clean(12))))


def test_targets_of_cores_are_those_of_their_kind() -> None:
    base = synthetic.vanilla(6)
    scale = math.sqrt(12)
    cuts = {
        "core_norm.attention": {"info": 4.05 / scale, "warning": 9.42 / scale},
        "core_norm.mlp": {"info": 1.91 / scale},
    }
    report = dataclasses.replace(base, settings={**base.settings, "thresholds": cuts})
    cores = draw(report).axes[1]
    assert {
        "attention met up to 4.05",
        "attention not met above 9.42",
        "FFN met up to 1.91",
    } <= {text.get_text() for text in cores.texts}
    heights = sorted(y for y, *others in (drawn(line)[1] for line in cores.lines) if others == [y])
    assert heights == pytest.approx([1.91, 4.05, 9.42])


def test_thresholds_are_drawn_where_the_report_has_them() -> None:
    report = with_thresholds(synthetic.vanilla(4), warning=12.5, error=31.0)
    top, _, gains = draw(report).axes
    heights = [drawn(line)[1] for line in top.lines]
    assert sorted(y for y, *others in heights if others == [y]) == [12.5, 31.0]
    assert {"warning above 12.5", "error above 31"} <= {text.get_text() for text in top.texts}
    assert "not met above 8.8" in [text.get_text() for text in gains.texts]
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
    assert thresholds_drawn(init) == ["warning above 12.5", "not met above 8.8"]

    # 1. On a trained model the rules observe, unless a profile makes one decide.
    trained = dataclasses.replace(init, state="trained")
    assert thresholds_drawn(trained) == []
    strict = dataclasses.replace(
        trained, settings={**trained.settings, "levels": {"JD102": "error"}}
    )
    assert thresholds_drawn(strict) == ["not met above 8.8"]

    # 2. A rule that matched no sub-layer for its placement, or was not selected.
    unmatched = [dataclasses.replace(r, matched=0) if r.code == "JD102" else r for r in init.rules]
    assert thresholds_drawn(dataclasses.replace(init, rules=unmatched)) == ["warning above 12.5"]
    selected = [rule for rule in init.rules if rule.code == "JD102"]
    assert thresholds_drawn(dataclasses.replace(init, rules=selected)) == ["not met above 8.8"]

    # 3. Several placements: the line says which one it is for.
    assert thresholds_drawn(mixed(4)) == ["pre-norm, warning above 12.5", "not met above 8.8"]


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
    assert line.get_linestyle() == "--"
    assert [text.get_text() for text in top.texts].count("earlier model") == 1
    assert_within(report)


def test_the_title_is_the_verdict_in_words() -> None:
    title = (
        "Large shortcut not met, small sub-layers met: worst branch norm 22.4 to 23.3 at "
        "transformer.h.0.attn"
    )
    assert title_of(draw(synthetic.vanilla(12))) == title
    broken = title_of(draw(synthetic.broken()))
    assert broken == "JD906: transformer.h.0.mlp.c_fc.weight holds 3 NaN"


def test_no_bracket_is_cut_in_the_facts_about_the_model() -> None:
    for length in (1, 40, 60, 90, 300):
        base = synthetic.vanilla(2)
        model = dataclasses.replace(base.model, name="M" * length, parameters=736_000)
        model = dataclasses.replace(model, covered_parameters=736_000)
        figure = draw(dataclasses.replace(base, model=model))
        assert any("736k parameters (100% covered)" in text for text in texts(figure))


def shared(layers: int) -> Report:
    """The two sub-layers of one layer that is applied at every depth, the fourth as the worst."""
    base, rows = synthetic.vanilla(layers), []
    for row in base.sublayers:
        name = ("attention", "ffn")[row.index % 2]
        if row.depth:
            name += f"@{row.depth + 1}"
        if row.depth == 4:
            row = dataclasses.replace(row, branch_norm=Interval(90.0, 89.0, 91.0))
        rows.append(dataclasses.replace(row, name=name))
    return dataclasses.replace(base, sublayers=rows)


def test_a_layer_that_is_applied_at_several_depths_is_named_by_its_depth() -> None:
    figure = draw(shared(6))
    assert title_of(figure).endswith("at attention at depth 4 (call 5)")
    assert "worst: 89.0 to 91.0 at attention at depth 4 (call 5)" in texts(figure)
    assert not any("@" in text for text in texts(figure))
    assert_within(shared(6))
    assert with_shown_names(shared(6)).sublayers[1].name == "ffn at depth 0 (call 1)"

    # A name that no other call has stays as it is.
    plain = synthetic.vanilla(2)
    assert with_shown_names(plain) is plain
    assert shown_names({"h.0.mlp": 0}) == {"h.0.mlp": "h.0.mlp"}


def test_several_placements_and_an_earlier_model_cover_nothing() -> None:
    assert_within(mixed(12))
    base = mixed(12)
    assert_within(dataclasses.replace(base, settings={**base.settings, "stratum": ""}))


def test_kinds_are_named_once_and_axes_say_that_there_is_no_unit() -> None:
    for report in (synthetic.vanilla(4), synthetic.post(4), synthetic.weights_tier(4)):
        figure = draw(report)
        for name in ("attention", "FFN"):
            assert texts(figure).count(name) == 1
        for axes in figure.axes:
            assert "no unit" in axes.get_ylabel() and "layer" in axes.get_xlabel()


def lightness(colour: str) -> float:
    """CIE L* of a colour."""
    luminance = float(linear(colour) @ [0.2126, 0.7152, 0.0722])
    return 116.0 * luminance ** (1 / 3) - 16.0


def linear(colour: str) -> Any:
    values = np.array(to_rgb(colour))
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def seen_without_green_cones(colour: str) -> Any:
    """A colour in linear RGB as deuteranopes see it (Machado et al. 2009, severity 1)."""
    matrix = [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ]
    return np.clip(np.array(matrix) @ linear(colour), 0.0, 1.0)


def test_kinds_are_told_apart_in_grey_and_without_green_cones() -> None:
    assert len({look.marker for look in LOOKS}) == len(LOOKS)
    for first, second in itertools.combinations(LOOKS, 2):
        assert abs(lightness(first.colour) - lightness(second.colour)) > 12
        seen = [seen_without_green_cones(look.colour) for look in (first, second)]
        brightness = [116.0 * float(c @ [0.2126, 0.7152, 0.0722]) ** (1 / 3) for c in seen]
        assert abs(brightness[0] - brightness[1]) > 8


def test_what_has_no_place_on_the_scale_is_said() -> None:
    assert {"no finite value", "attention", "FFN"} <= set(texts(draw(synthetic.broken())))
    assert "no finite value" not in texts(draw(ODD["zeros"]))
    assert not any("not measured" in text for text in texts(draw(synthetic.broken())))
    base = synthetic.vanilla(4)
    why = {"branch_norm": "a backward in it has no derivative"}
    rows = list(base.sublayers)
    rows[1] = dataclasses.replace(rows[1], branch_norm=None, notes=why)
    unmeasured = dataclasses.replace(base, sublayers=rows)
    assert "not measured" in texts(draw(unmeasured))
    assert "no finite value" not in texts(draw(unmeasured))
    rows[2] = synthetic.broken().sublayers[2]
    both = dataclasses.replace(base, sublayers=rows)
    assert "not measured or no finite value" in texts(draw(both))
    assert {"every branch norm is 0", "0"} <= set(texts(draw(ODD["zeros"])))
    assert "nothing could be measured" in texts(draw(ODD["no sub-layers"]))
    top = draw(ODD["no upper ends"]).axes[0]
    tallest = max(y for band in corners(top) for _, y in band)
    assert top.get_ylim()[1] < tallest < math.inf, "the band leaves the panel at its top"


def test_a_lonely_point_is_seen() -> None:
    for axes in draw(ODD["one sub-layer"]).axes:
        single = [line for line in axes.lines if len(drawn(line)[0]) == 1]
        assert single
        assert all(line.get_marker() not in (None, "", "None") for line in single)
        assert all(line.get_markevery() in (None, [0]) for line in single)
        assert [label for label in axes.get_xticks() if 0 <= label <= 0.4] == [0.0]


@pytest.mark.parametrize(
    ("of", "label"),
    [
        (4, "depth: layer, counted from the embedding"),
        (6, "depth: layer, in the order of the forward, on more than one stream"),
        (0, "depth: layer"),
    ],
)
def test_layers_of_two_streams_are_not_counted_from_one_embedding(of: int, label: str) -> None:
    base = synthetic.clean(2)
    stream = StreamRange("h.0.attn", "h.1.mlp", sublayers=4, of=of, layers=2)
    network = NetworkRecord(growth=Growth(), stream=stream)
    if not of:
        network = dataclasses.replace(network, stream=None)
    figure = draw(dataclasses.replace(base, network=network))
    assert figure.axes[0].get_xlabel() == label


@pytest.mark.parametrize(
    ("placements", "label"),
    [
        (("post", "post"), "‖J_norm (aI + J)‖"),
        (("sandwich", "sandwich"), "‖aI + J‖"),
        (("post", "sandwich"), "residual norm"),
    ],
)
def test_the_residual_map_of_post_norm_holds_the_norm(
    placements: tuple[str, str], label: str
) -> None:
    base = synthetic.post(2)
    rows = [
        dataclasses.replace(row, placement=placements[row.index % 2])  # type: ignore[arg-type]
        for row in base.sublayers
    ]
    labels = set(texts(draw(dataclasses.replace(base, sublayers=rows))))
    assert labels & {"‖J_norm (aI + J)‖", "‖aI + J‖", "residual norm"} == {label}
