"""The figures of two models as curves over depth, for the charts of their page."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from jacdiag.comparison.match import Ends, Pair
from jacdiag.render.content.depth_curves import (
    LOOKS,
    DepthCurve,
    Look,
    drawable_curves,
    is_drawable,
)
from jacdiag.render.content.sentences import legible

_FIGURES = {
    "branch_norm": "branch norm ‖J‖",
    "core_norm": "core norm",
    "norm_gain": "norm gain 1/σ",
    "shortcut_std": "shortcut std",
}


@dataclass(frozen=True)
class ComparedPanel:
    """One figure of both models over depth.

    Attributes:
        title: what the figure is.
        has_unit: it is in the unit of the residual stream. The other figures are factors.
        curves: of A in dashes, of B solid; per kind of sub-layer.
        changed: place and value of B where the two intervals are apart.
    """

    title: str
    has_unit: bool
    curves: list[DepthCurve]
    changed: list[tuple[float, float]]


@dataclass(frozen=True)
class ComparedCurves:
    """All panels of a comparison.

    Attributes:
        panels: one for each figure that a sub-layer of either model has.
        last: the largest place on the depth axis.
        names: place on the depth axis -> name of the sub-layer.
    """

    panels: list[ComparedPanel]
    last: float
    names: dict[float, str]


def compared_curves(pairs: Sequence[Pair]) -> ComparedCurves:
    """Return the figures of sub-layers as curves over depth.

    Args:
        pairs: every pair of figures, in the order of depth.
    """
    # 1. Where each sub-layer stands: evenly spread within its depth.
    of_sublayers = []
    for pair in pairs:
        is_of_sublayer = pair.figure in _FIGURES
        if is_of_sublayer:
            of_sublayers.append(pair)
    at = _places(of_sublayers)

    # 2. A panel for each figure.
    panels = []
    for figure in _FIGURES:
        of_figure = [pair for pair in of_sublayers if pair.figure == figure]
        panel = _panel(figure, of_figure, at)
        if panel.curves:
            panels.append(panel)

    # 3. What each place is called.
    names = {}
    for pair in of_sublayers:
        place = at[_key(pair)]
        names[place] = legible(pair.b or pair.a)
    return ComparedCurves(panels, max(names, default=1.0), names)


def _key(pair: Pair) -> tuple[str, str]:
    """Return what identifies the sub-layer of a pair: its name in both models."""
    return pair.a, pair.b


def _places(pairs: Sequence[Pair]) -> dict[tuple[str, str], float]:
    """Return where each sub-layer stands on the depth axis."""
    # 1. The sub-layers of each depth, each once.
    by_depth: dict[int, dict[tuple[str, str], None]] = {}
    for pair in pairs:
        assert pair.depth is not None
        by_depth.setdefault(pair.depth, {})[_key(pair)] = None

    # 2. Their places from this depth to the next.
    at = {}
    for depth, keys in by_depth.items():
        for k, key in enumerate(keys):
            at[key] = depth + k / len(keys)
    return at


def _panel(figure: str, pairs: Sequence[Pair], at: dict[tuple[str, str], float]) -> ComparedPanel:
    """Return the panel of one figure.

    Args:
        figure: such as "core_norm".
        pairs: of this figure.
        at: where each sub-layer stands.
    """
    # 1. The curves of both models, per kind of sub-layer.
    curves = []
    for look in LOOKS:
        curves += _curves_of_kind(look, pairs, at)

    # 2. Where the intervals are apart.
    changed = []
    for pair in pairs:
        has_point = pair.new is not None and is_drawable(pair.new[1])
        if pair.parts and has_point:
            assert pair.new is not None
            changed.append((at[_key(pair)], pair.new[1]))
    has_unit = figure == "shortcut_std"
    return ComparedPanel(_FIGURES[figure], has_unit, drawable_curves(curves), changed)


def _curves_of_kind(
    look: Look, pairs: Sequence[Pair], at: dict[tuple[str, str], float]
) -> list[DepthCurve]:
    """Return one figure of one kind of sub-layer: A in dashes, B solid."""
    # 1. Where its sub-layers stand, and the ends of their intervals in both models.
    places: list[float] = []
    ends_in_a: list[Ends | None] = []
    ends_in_b: list[Ends | None] = []
    for pair in pairs:
        if pair.part in look.kinds:
            places.append(at[_key(pair)])
            ends_in_a.append(pair.old)
            ends_in_b.append(pair.new)

    # 2. The curves.
    first = _curve(look, f"{look.label}, A", places, ends_in_a)
    second = _curve(look, f"{look.label}, B", places, ends_in_b)

    # The style of an earlier model. Points and intervals stay.
    first = dataclasses.replace(first, dashed=True, earlier=True)
    return [first, second]


def _curve(
    look: Look, label: str, places: list[float], ends_of_all: Sequence[Ends | None]
) -> DepthCurve:
    """Return one figure of one model and kind; a gap where a log scale has no place for it."""
    y, low, high = [], [], []
    for ends in ends_of_all:
        lower, middle, upper = ends or (math.nan, math.nan, math.nan)
        if not is_drawable(middle):
            lower, middle, upper = math.nan, math.nan, math.nan
        y.append(middle)
        # 0 has no place on a log scale.
        low.append(max(lower, 1e-3 * middle))
        high.append(upper)
    return DepthCurve(label, places, y, look.colour, look.marker, low=low, high=high)
