"""Room for text in a picture: its width, lines that fit, and labels next to a panel.

A label stands outside the data, so that it covers no line. A panel's labels stand to its right,
each with a piece of the line that it names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jacdiag.render.content.depth_curves import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import RendererAgg

_MARGIN = 0.2  # inches: after the labels
_DPI = 200  # at which texts are measured
LABEL_SIZE = 9.5  # points
_HANDLE, _GAP = 0.30, 0.09  # inches: of the piece of a line, and on both sides of it
_HEADLINE, _LEAST_HEADLINE = 14.5, 12.0  # points
_MOST_HEADLINES = 3  # lines
_LONGEST_WORD = 0.75  # of a line
_LEAST_APART = 0.19  # inches: between two labels


@dataclass(frozen=True)
class SideLabel:
    """A label to the right of a panel.

    Attributes:
        height: where it would stand, as a fraction of the panel's height.
        text: one line.
        handle: how the piece of a line before it is drawn, as `Line2D` takes it; none if empty.
    """

    height: float
    text: str
    handle: Mapping[str, Any] = field(default_factory=dict)


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Return how wide a text is, in inches.

    Args:
        text: one line.
        size: of its font, in points.
        weight: of its font.
    """
    from matplotlib.font_manager import FontProperties

    font = FontProperties(size=size, weight=weight)
    width, _, _ = _renderer().get_text_width_height_descent(text, font, ismath=False)
    return float(width) / _DPI


@functools.cache
def _renderer() -> RendererAgg:
    """Return what measures texts. It draws nothing."""
    from matplotlib.backends.backend_agg import RendererAgg

    return RendererAgg(8, 8, _DPI)


def fit_lines(
    pieces: Sequence[str], joint: str, fits: Callable[[str], bool], most: int
) -> list[str]:
    """Join pieces to lines that fit. What has no room on the last line is left out, after a "…".

    A piece is never cut, so that no bracket stays open.

    Args:
        pieces: words, or parts of a line.
        joint: between two of them on a line.
        fits: whether a line has room.
        most: how many lines there may be.
    """
    lines: list[str] = []
    line = ""
    for piece in pieces:
        # 1. One piece more on this line, or the first of the next.
        longer = piece
        if line:
            longer = f"{line}{joint}{piece}"
        if not line or fits(longer):
            line = longer
            continue
        lines.append(line)
        line = piece

        # 2. No room for another line.
        if len(lines) == most:
            lines[-1] += " …"
            return lines
    if line:
        lines.append(line)
    return lines


def shorten(text: str, fits: Callable[[str], bool]) -> str:
    """Shorten a text in its middle until it fits: a name's end says which one it is.

    Args:
        text: such as the name of a sub-layer.
        fits: whether there is room for it.
    """
    if fits(text):
        return text

    # The longest that fits: each try halves what is left.
    least, most = 0, len(text)
    while most - least > 1:
        middle = (least + most) // 2
        if fits(_without_middle(text, middle)):
            least = middle
        else:
            most = middle
    return _without_middle(text, least)


def _without_middle(text: str, length: int) -> str:
    """Return both ends of a text, of some characters together, with a "…" between them."""
    tail = length // 2
    return f"{text[: length - tail]}…{text[len(text) - tail :]}"


def fit_headline(text: str, room: float) -> tuple[list[str], float]:
    """Return the lines of a headline, and the size of their bold font in points.

    One that nearly fits on a line is set a little smaller. A long name in it is shortened in its
    middle.

    Args:
        text: the headline.
        room: how wide a line may be, in inches.
    """
    # 1. The size.
    width = text_width(text, _HEADLINE, "bold")
    size = max(min(_HEADLINE, _HEADLINE * room / width), _LEAST_HEADLINE)
    if width * _LEAST_HEADLINE > room * _HEADLINE:
        size = _HEADLINE  # it takes two lines at any size

    # 2. The lines.
    def fits(line: str, share: float = 1.0) -> bool:
        return text_width(line, size, "bold") <= share * room

    words = [shorten(word, lambda shorter: fits(shorter, _LONGEST_WORD)) for word in text.split()]
    return fit_lines(words, " ", fits, _MOST_HEADLINES), size


def label_room(labels: Sequence[SideLabel]) -> float:
    """Return how much room the labels of a panel need to its right, in inches."""
    if not labels:
        return _HANDLE
    widths = [text_width(label.text, LABEL_SIZE) for label in labels]
    return 2 * _GAP + _HANDLE + max(widths) + _MARGIN


def draw_side_labels(axes: Axes, labels: Sequence[SideLabel], width: float, height: float) -> None:
    """Draw the labels of a panel, moved apart where two would overlap.

    Args:
        axes: of the panel.
        labels: in any order.
        width: of the panel, in inches.
        height: of the panel, in inches.
    """
    from matplotlib.lines import Line2D

    ordered = sorted(labels, key=lambda label: label.height)
    heights = moved_apart([label.height for label in ordered], _LEAST_APART / height)
    begin, end = 1 + _GAP / width, 1 + (_GAP + _HANDLE) / width
    for label, place in zip(ordered, heights, strict=True):
        # 1. The piece of a line, with its marker in the middle.
        if label.handle:
            piece = Line2D(
                [begin, (begin + end) / 2, end],
                [place] * 3,
                markevery=[1],
                transform=axes.transAxes,
                clip_on=False,
                **label.handle,
            )
            axes.figure.add_artist(piece)

        # 2. Its name.
        axes.text(
            end + _GAP / width,
            place,
            label.text,
            transform=axes.transAxes,
            color=INK,
            fontsize=LABEL_SIZE,
            va="center",
            parse_math=False,
        )


def moved_apart(heights: Sequence[float], least: float) -> list[float]:
    """Move sorted heights apart until neighbours differ by `least`, within 0 to 1 if they can.

    >>> [round(height, 2) for height in moved_apart([0.95, 0.96, 0.97], 0.1)]
    [0.8, 0.9, 1.0]
    """
    # 1. Groups of labels that touch; each is spread around the mean of its heights.
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _touch(groups[-2], groups[-1], least):
            last = groups.pop()
            groups[-1] += last

    # 2. The heights.
    moved: list[float] = []
    for group in groups:
        low = _lowest(group, least)
        moved += [low + least * place for place in range(len(group))]
    return moved


def _touch(below: Sequence[float], above: Sequence[float], least: float) -> bool:
    """Return whether two groups of labels would overlap."""
    top = _lowest(below, least) + least * (len(below) - 1)
    return _lowest(above, least) - top < least - 1e-9


def _lowest(group: Sequence[float], least: float) -> float:
    """Return where the lowest label of a group stands: centred on its heights, within the panel."""
    extent = least * (len(group) - 1)
    centred = sum(group) / len(group) - extent / 2
    return max(min(centred, 1 - extent), 0.0)
