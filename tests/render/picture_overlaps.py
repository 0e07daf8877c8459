"""What lies on what in a figure: texts on each other, on lines, and beyond the picture's edge."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

_SLACK = 1.0  # pixels: the rounding of a box


def overlaps(figure: Any) -> list[tuple[str, str]]:
    """Return every pair of a text and what it touches: a text, a line, or the picture's edge."""
    # 1. All that is drawn.
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    texts = []
    for text in _texts(figure):
        if text.get_visible() and text.get_text().strip():
            box = text.get_window_extent(renderer)
            texts.append((text.get_text(), box.padded(-_SLACK)))
    lines = list(_lines(figure))

    # 2. What each text touches.
    pairs = []
    for place, (text, box) in enumerate(texts):
        if not _holds(figure.bbox, box):
            pairs.append((text, "edge"))
        for other, other_box in texts[:place]:
            if box.overlaps(other_box):
                pairs.append((text, other))
        for points in lines:
            inside = (points > box.min).all(axis=1) & (points < box.max).all(axis=1)
            if inside.any():
                pairs.append((text, "line"))
    return pairs


def _texts(figure: Any) -> Iterator[Any]:
    """Yield every text of a figure: titles, labels, and the labels of ticks that are in view."""
    yield from figure.texts
    for axes in figure.axes:
        yield from axes.texts
        yield from (axes.title, axes.xaxis.label, axes.yaxis.label)
        legend = axes.get_legend()
        if legend is not None:
            yield from legend.get_texts()
        for side, axis in enumerate((axes.xaxis, axes.yaxis)):
            yield from _tick_labels(axis, axes.bbox.padded(1), side)


def _tick_labels(axis: Any, frame: Bbox, side: int) -> Iterator[Any]:
    """Yield the labels of ticks within the frame; the others are not drawn."""
    for tick in axis.get_major_ticks():
        anchor = tick.label1.get_transform().transform(tick.label1.get_position())
        if frame.min[side] <= anchor[side] <= frame.max[side]:
            yield tick.label1


def _lines(figure: Any) -> Iterator[np.ndarray]:
    """Yield the points of every line that has a stroke, curves and grid lines alike."""
    everywhere = Bbox.from_bounds(-1e6, -1e6, 2e6, 2e6)
    for artist in [*figure.lines, *figure.artists]:
        if isinstance(artist, Line2D) and _is_drawn(artist):
            yield _points(artist, everywhere)
    for axes in figure.axes:
        for line in [*axes.lines, *axes.xaxis.get_gridlines(), *axes.yaxis.get_gridlines()]:
            if _is_drawn(line):
                frame = axes.bbox
                if not line.get_clip_on():
                    frame = everywhere
                yield _points(line, frame)


def _is_drawn(line: Line2D) -> bool:
    """Return whether a line has a stroke: markers alone have none."""
    return line.get_visible() and line.get_linestyle() not in ("None", "none", "", " ")


def _points(line: Line2D, frame: Bbox) -> np.ndarray:
    """Return points along a line, a pixel apart, as far as they lie in a frame."""
    corners = line.get_transform().transform(line.get_xydata())
    corners = corners[np.isfinite(corners).all(axis=1)]
    pieces = [np.empty((0, 2))]
    for begin, end in itertools.pairwise(corners):
        steps = int(min(np.abs(end - begin).max(), 20_000)) + 2
        pieces.append(np.linspace(begin, end, steps))
    points = np.concatenate(pieces)
    inside = (points >= frame.min).all(axis=1) & (points <= frame.max).all(axis=1)
    return points[inside]


def _holds(outer: Bbox, inner: Bbox) -> bool:
    """Return whether a box lies within another."""
    return bool((inner.min >= outer.min).all() and (inner.max <= outer.max).all())
