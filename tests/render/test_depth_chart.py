"""The charts of a page: labels beside the data, kinds named once, and texts under the mouse."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
from render import synthetic

from jacdiag.records import Report
from jacdiag.render.content.depth_view import build_depth_view
from jacdiag.render.html.depth_chart import HEIGHT, WIDTH, Chart, charts_of
from jacdiag.render.html.pages import report_page

KINDS: dict[str, Callable[[int], Report]] = {
    name: getattr(synthetic, name)
    for name in ("vanilla", "clean", "post", "trained", "weights_tier", "undecided", "broken")
}


def charts(report: Report) -> list[Chart]:
    return charts_of(build_depth_view(report))


@pytest.mark.parametrize("layers", [2, 126])
@pytest.mark.parametrize("name", KINDS)
def test_labels_stand_beside_the_data_and_apart(name: str, layers: int) -> None:
    for chart in charts(KINDS[name](layers)):
        # 1. All data end before the labels begin.
        begin = chart.right + chart.gap
        for line in chart.lines:
            assert all(chart.left <= point.x < chart.right for point in line.points)

        # 2. The labels end within the chart: a bold character is at most 0.6 of 12 pixels wide.
        text = begin + chart.handle + chart.gap
        for label in chart.labels:
            assert text + 6.5 * len(label.text) <= WIDTH
            assert 0 < label.y < HEIGHT
        heights = sorted(label.y for label in chart.labels)
        assert all(above - below >= 14.9 for below, above in itertools.pairwise(heights))


def test_kinds_are_named_once() -> None:
    for report in (synthetic.vanilla(4), synthetic.weights_tier(4), synthetic.post(4)):
        labels = [label.text for chart in charts(report) for label in chart.labels]
        assert labels.count("attention") == labels.count("FFN") == 1
        assert all("unit" in chart.title for chart in charts(report))


def test_rings_and_their_meaning_are_there_only_where_a_condition_is_missed() -> None:
    gains, cores, shortcut = charts(synthetic.vanilla(12))
    assert len(shortcut.rings) == 6 and "A ring" in shortcut.note
    for chart in (gains, cores, *charts(synthetic.clean(12)), *charts(synthetic.trained(12))):
        assert not chart.rings and "ring" not in chart.note


def test_what_has_no_finite_value_is_said() -> None:
    signs = charts(synthetic.broken(4))[0].signs
    assert len(signs) == 2
    assert "no finite value" in report_page(synthetic.broken(4))
    assert "no finite value" not in report_page(synthetic.clean(4))

    # One that no product can measure is another thing.
    base = synthetic.clean(4)
    rows = [dataclasses.replace(base.sublayers[0], branch_norm=None), *base.sublayers[1:]]
    unmeasured = dataclasses.replace(base, sublayers=rows)
    assert "not measured" in [text.text for text in charts(unmeasured)[0].labels]


def test_points_of_the_weights_alone_have_markers_and_those_of_a_bound_have_none() -> None:
    [alone] = charts(synthetic.weights_tier(4))
    assert {line.dashes for line in alone.lines} == {"dashed"}
    assert {line.dashes for line in charts(synthetic.vanilla(4))[0].lines} == {"", "dashed bare"}


def test_a_shared_layer_is_named_by_its_depth() -> None:
    base = synthetic.vanilla(5)
    rows = []
    for row in base.sublayers:
        call = f"@{row.depth + 1}" if row.depth else ""
        rows.append(dataclasses.replace(row, name=f"{row.kind}{call}"))
    shown = [
        point.text
        for line in charts(dataclasses.replace(base, sublayers=rows))[0].lines
        for point in line.points
    ]
    assert any(text.startswith("attention at depth 4 (call 5): ") for text in shown)
    assert not any("@" in text for text in shown)


def test_a_percentile_over_tokens_is_not_called_an_interval() -> None:
    row = synthetic.vanilla(2).sublayers[0]
    assert row.norm_gain is not None and row.norm_gain.per_token is not None
    point = charts(synthetic.vanilla(2))[2].lines[0].points[0]
    assert "median to largest token" in point.text
    assert f"1/σ {row.norm_gain.per_token.p99:.1f}" in point.text
