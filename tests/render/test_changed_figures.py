"""What changed between two models: counted only where both intervals are apart."""

from __future__ import annotations

import math
from typing import Any

import pytest
from jacdiag_cli.diff import _columns
from jacdiag_cli.streams import grid

from jacdiag.comparison.match import Pair, are_apart
from jacdiag.render.content.changed_figures import summarize_changes
from jacdiag.render.content.compared_curves import compared_curves
from jacdiag.render.content.compared_figures import cell_words, factor_words, verdict
from jacdiag.render.html.depth_chart import charts_of_comparison


def pair(depth: int | None, old: Any, new: Any, figure: str = "branch_norm") -> Pair:
    parts = are_apart(old, new) or old is None or new is None
    name = f"h.{depth}.mlp"
    return Pair(depth, "mlp", figure, name if old else "", name if new else "", old, new, parts)


def exact(value: float) -> tuple[float, float, float]:
    return value, value, value


def test_intervals_with_a_common_value_are_no_change() -> None:
    summary = summarize_changes([pair(0, (1.0, 1.1, 1.5), (1.4, 2.0, 2.1))])
    assert summary.lines == []


def test_growth_and_shrinking_are_counted_apart_with_the_largest_change() -> None:
    pairs = [
        pair(0, exact(1.0), exact(2.0)),
        pair(1, exact(1.0), exact(0.1)),
        pair(2, exact(1.0), exact(1.0)),
    ]
    [kind] = summarize_changes(pairs).kinds
    assert kind.kind == "branch norm"
    assert kind.text == (
        "1 grew and 1 shrank, of 3; most: layer 1 FFN 1.00 -> 0.100, 10.0 times smaller"
    )


def test_each_layer_has_the_figure_that_changed_most_in_it() -> None:
    pairs = [
        pair(0, exact(1.0), exact(2.0)),
        pair(0, exact(1.0), exact(8.0), "core_norm"),
        pair(1, exact(1.0), exact(4.0)),
        pair(2, exact(1.0), exact(1.0)),
    ]
    layers = summarize_changes(pairs).layers
    assert [(layer.where, layer.what) for layer in layers] == [
        ("layer 0", "FFN core norm"),
        ("layer 1", "FFN branch norm"),
    ]


def test_of_many_layers_those_stay_that_changed_most() -> None:
    pairs = [pair(depth, exact(1.0), exact(2.0 + depth)) for depth in range(20)]
    summary = summarize_changes(pairs)
    assert [layer.where for layer in summary.layers] == [f"layer {k}" for k in range(8, 20)]
    assert "  8 further layers changed less; the table has them" in summary.lines
    assert not summarize_changes(pairs[:12]).layers_left_out


def test_what_one_model_lacks_is_no_growth() -> None:
    summary = summarize_changes([pair(0, exact(1.0), None)])
    assert summary.kinds == [] and summary.in_one_alone == 1
    assert "  in one model alone: 1 sub-layers or weights" in summary.lines


def test_a_value_without_a_ratio_has_words() -> None:
    assert factor_words(pair(0, exact(0.0), exact(1.0))) == "0 in A"
    assert factor_words(pair(0, exact(1.0), exact(0.0))) == "0 in B"
    lost = pair(0, exact(1.0), exact(math.nan))
    assert factor_words(lost) == "not finite in one model"
    [kind] = summarize_changes([lost]).kinds
    assert kind.text.startswith("1 not a number in one model, of 1")


def test_curves_of_both_models_mark_where_intervals_are_apart() -> None:
    curves = compared_curves([pair(0, exact(1.0), exact(2.0)), pair(1, exact(1.0), exact(1.0))])
    [panel] = curves.panels
    assert [(curve.label, curve.earlier) for curve in panel.curves] == [
        ("FFN, A", True),
        ("FFN, B", False),
    ]
    assert panel.changed == [(0.0, 2.0)]
    assert curves.names == {0.0: "h.0.mlp", 1.0: "h.1.mlp"}


def test_a_std_is_no_factor_and_has_the_unit_of_the_stream() -> None:
    pairs = [pair(0, exact(1.0), exact(2.0), figure) for figure in ("branch_norm", "shortcut_std")]
    titles = [chart.title for chart in charts_of_comparison(compared_curves(pairs))]
    assert titles == [
        "branch norm ‖J‖ over depth (a factor, no unit)",
        "shortcut std over depth (in the unit of the residual stream)",
    ]


def test_a_factor_of_one_is_not_printed_as_a_factor() -> None:
    assert factor_words(pair(0, exact(1.0), exact(1.004))) == "less than 1% apart"
    assert factor_words(pair(0, exact(1.004), exact(1.0))) == "less than 1% apart"
    assert factor_words(pair(0, exact(1.0), exact(1.006))) == "1.01 times larger"
    assert factor_words(pair(0, exact(1.006), exact(1.0))) == "1.01 times smaller"


def test_the_verdict_on_one_figure_is_in_the_singular() -> None:
    assert verdict([pair(0, exact(1.0), exact(1.0))]) == (
        "the one figure does not differ beyond its interval"
    )
    same = [pair(k, exact(1.0), exact(1.0)) for k in range(2)]
    assert verdict(same) == "none of 2 figures differs beyond its interval"
    assert verdict([pair(0, exact(1.0), exact(2.0))]).endswith("; it is the only figure")
    assert verdict([*same, pair(2, exact(1.0), exact(2.0))]).endswith("; 1 of 3 figures differs")


def unmeasured(depth: int, old: Any, new: Any) -> Pair:
    """A figure that both models have, and that was not measured in one of them, or in neither."""
    name = f"h.{depth}.mlp"
    return Pair(depth, "mlp", "branch_norm", name, name, old, new, parts=False)


def test_a_figure_without_a_value_in_one_model_is_not_counted_as_compared() -> None:
    same = [pair(k, exact(1.0), exact(1.0)) for k in range(2)]
    tail = "1 more could not be compared"
    for lone in (unmeasured(2, exact(1.0), None), unmeasured(2, None, None)):
        assert verdict([*same, lone]) == f"none of 2 figures differs beyond its interval; {tail}"
        other = pair(3, exact(1.0), exact(2.0))
        assert verdict([*same, lone, other]).endswith(f"; 1 of 3 figures differs; {tail}")
        assert verdict([lone]) == f"no figure was compared; {tail}"


def test_a_sub_layer_of_one_model_alone_is_present_there() -> None:
    """It was measured, but there is nothing to compare its figures with."""
    lone = Pair(2, "mlp", "sub-layer", "", "h.2.mlp", None, None, parts=True)
    assert cell_words(lone, lone.old, lone.a) == "missing"
    assert cell_words(lone, lone.new, lone.b) == "present"
    lost = unmeasured(2, exact(1.0), None)
    assert cell_words(lost, lost.new, lost.b) == "not measured"


@pytest.mark.parametrize("width", [None, 120, 90, 70, 60])
def test_no_value_of_a_table_is_cut(width: int | None) -> None:
    """Cut to its first digit, 0.0458 would be 0."""
    pairs = [
        Pair(0, "attention", "core_norm", "a", "a", (0.75, 0.76, 0.78), (0.67, 0.68, 0.7), True),
        Pair(0, "W_2", "std", "w", "w", (0.053, 0.056, 0.06), (0.043, 0.0458, 0.0485), True),
    ]
    text = grid(_columns(pairs, width), width)
    assert "…" not in text
    assert "0.670 to 0.700" in text and "0.0458" in text
    assert ("0.0430 to 0.0485" in text) == (width is None or width > 80)
    if width is not None:
        assert max(map(len, text.splitlines())) <= width
