"""The picture of two models: a dumbbell for each figure that differs, and nothing on another."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
from matplotlib import style
from render import synthetic
from render.picture_overlaps import overlaps

from jacdiag.comparison import Comparison, compare
from jacdiag.comparison.match import Pair
from jacdiag.errors import JacdiagError
from jacdiag.render.content.compared_models import ComparisonView, build_comparison_view
from jacdiag.render.plots.diff_plot import _STYLE, MOST_ROWS, draw, rows_of, save

NAMES = ("main.json", "build.py:model")


def view_of(pairs: Any, names: tuple[str, str] = NAMES, *, state: str = "init") -> ComparisonView:
    """What is shown of pairs; B has that state."""
    reports = synthetic.vanilla(2), dataclasses.replace(synthetic.vanilla(2), state=state)
    return build_comparison_view(pairs, [], reports, names)


def two(layers: int) -> Comparison:
    return compare(synthetic.vanilla(layers), synthetic.clean(layers))


def pair(depth: int, old: Any, new: Any, *, parts: bool = True, b: str = "h.mlp") -> Pair:
    return Pair(depth, "mlp", "core_norm", "h.mlp", b, old, new, parts)


def texts(figure: Any) -> list[str]:
    [axes] = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    return [text.get_text() for part in (figure, axes) for text in part.texts] + labels


def points(figure: Any, *, hollow: bool) -> dict[float, float]:
    """Row to value of the points of A (hollow) or of B."""
    [axes] = figure.axes
    found = {}
    for line in axes.lines:
        is_point = line.get_marker() == "o" and len(line.get_xdata()) == 1
        if is_point and (line.get_markerfacecolor() == "white") is hollow:
            found[float(line.get_ydata()[0])] = float(line.get_xdata()[0])
    return found


@pytest.mark.parametrize("layers", [2, 4, 126])
def test_no_label_covers_a_line_or_another_label(layers: int) -> None:
    assert_clear(two(layers).pairs, NAMES)


def assert_clear(pairs: Any, names: tuple[str, str]) -> None:
    with style.context(_STYLE, after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        assert overlaps(draw(view_of(pairs, names))) == []


def test_long_and_odd_names_stay_within_the_picture() -> None:
    rows = [dataclasses.replace(p, part="x" * 80, a="$n_" * 60) for p in two(2).pairs]
    assert_clear(rows, ("注[red]$x_" * 30, "/a/very/long/path" * 20))


def test_every_figure_that_differs_has_a_row_with_both_values() -> None:
    comparison = two(4)
    figure = draw(view_of(comparison.pairs))
    old = [p.old[1] for p in comparison.parted if p.old]
    new = [p.new[1] for p in comparison.parted if p.new]
    assert list(points(figure, hollow=True).values()) == old
    assert list(points(figure, hollow=False).values()) == new
    assert figure.axes[0].get_xscale() == "log"
    shown = texts(figure)
    assert not any("left out" in text for text in shown)
    first = comparison.parted[0]
    assert first.ratio is not None and f"× {first.ratio:.3g}" in shown


def test_rows_follow_depth_and_the_most_different_stay() -> None:
    comparison = two(126)
    rows = rows_of(comparison.parted)
    assert len(rows) == MOST_ROWS
    assert [row.depth for row in rows] == sorted(row.depth or 0 for row in rows)
    beyond = len(comparison.parted) - MOST_ROWS
    assert any(
        f" {beyond} of {len(comparison.parted)} " in t
        for t in texts(draw(view_of(comparison.pairs)))
    )


def test_of_a_trained_model_the_branch_norms_stay_though_others_differ_more() -> None:
    # Forty figures differ more than the one branch norm.
    weak = dataclasses.replace(pair(41, (1.0, 1.0, 1.0), (2.0, 2.0, 2.0)), figure="branch_norm")
    pairs = [pair(k, (1.0, 1.0, 1.0), (9.0, 9.0, 9.0)) for k in range(40)] + [weak]
    assert weak not in rows_of(pairs)
    assert weak in rows_of(pairs, branch_norms_first=True)
    first = "Branch norms are drawn first, then the figures that differ most."
    assert any(first in text for text in texts(draw(view_of(pairs, state="trained"))))
    assert not any(first in text for text in texts(draw(view_of(pairs))))


def test_the_header_says_how_each_kind_changed() -> None:
    figure = draw(view_of([pair(0, (1.0, 1.5, 2.0), (4.0, 6.0, 8.0))]))
    kind = (
        "core norm: 1 grew, of 1; most: layer 0 FFN 1.00 to 2.00 -> 4.00 to 8.00, 4.00 times larger"
    )
    assert kind in texts(figure)
    same = draw(view_of([pair(0, (1.0, 1.5, 2.0), (1.0, 1.5, 2.0), parts=False)]))
    assert not any(text.startswith("core norm:") for text in texts(same))


def test_an_interval_is_drawn_from_end_to_end() -> None:
    figure = draw(view_of([pair(0, (1.0, 1.5, 2.0), (4.0, 5.0, 8.0))]))
    bars = [tuple(line.get_xdata()) for line in figure.axes[0].lines if line.get_linewidth() == 5]
    assert bars == [(1.0, 2.0), (4.0, 8.0)]


def test_what_has_no_place_is_said() -> None:
    known, zero = (1.0, 1.5, 2.0), (0.0, 0.0, 0.0)
    assert "not in B" in texts(draw(view_of([pair(0, known, None, b="")])))
    assert "B not measured" in texts(draw(view_of([pair(0, known, None)])))
    assert "A is 0" in texts(draw(view_of([pair(0, zero, known)])))
    both = draw(view_of([pair(0, known, (3.0, 4.0, 5.0)), pair(1, zero, None)]))
    assert "1 of 2 figures that differ have no value above 0 to draw." in texts(both)
    lone = Pair(2, "mlp", "sub-layer", "", "h.2.mlp", None, None, parts=True)
    alone = texts(draw(view_of([pair(0, known, (3.0, 4.0, 5.0)), lone])))
    assert "Not drawn: 1 sub-layer in one model alone." in alone
    assert not any("no value above 0" in text for text in alone)
    same = draw(view_of([pair(0, known, known, parts=False)]))
    assert "nothing to draw" in texts(same)
    assert_clear([pair(0, known, known, parts=False)], NAMES)


def test_a_wrong_suffix_is_refused_and_the_same_pairs_make_the_same_bytes(tmp_path: Path) -> None:
    view = view_of(two(2).pairs)
    with pytest.raises(JacdiagError, match=r"\.png, \.svg or \.pdf"):
        save(view, tmp_path / "diff.gif")
    for name in ("a.svg", "b.svg", "c.png", "d.pdf"):
        save(view, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
