"""The looks that all pictures of the reproduction share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jacdiag.render.content.depth_curves import INK, PALE

__all__ = ["INK", "LOOKS", "PALE", "Look", "band", "legend", "logarithmic"]


@dataclass(frozen=True)
class Look:
    colour: str
    marker: str


LOOKS = {
    "vanilla": Look("#b5482a", "o"),
    "xavier": Look("#e0a22e", "s"),
    "embed-detach": Look("#8a6bb1", "v"),
    "scaled-embed": Look("#17406d", "^"),
    "embed-ln": Look("#4f9a94", "D"),
}


def legend(figure: Any, recipes: Iterable[str], **more: Any) -> None:
    """One legend below all panels."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=LOOKS[r].colour, marker=LOOKS[r].marker, markersize=5, label=r)
        for r in recipes
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, **more
    )


def logarithmic(axes: Any, which: str = "y") -> None:
    """A log axis with plain numbers and a pale grid."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for name in which:
        getattr(axes, f"set_{name}scale")("log")
        axis = getattr(axes, f"{name}axis")
        low, high = sorted(getattr(axes, f"get_{name}lim")())
        axis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 1000 else (1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_formatter(NullFormatter())
        axes.grid(axis=name, color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)


def band(axes: Any, curves: Sequence[Sequence[float]], steps: int, colour: str) -> None:
    """The mean of curves over a run of so many steps, and their range."""
    columns = [[float(value) for value in column] for column in zip(*curves, strict=False)]
    x = [(k + 0.5) * steps / len(columns) for k in range(len(columns))]
    axes.plot(x, [sum(column) / len(column) for column in columns], color=colour, linewidth=1.2)
    axes.fill_between(
        x, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.18, linewidth=0
    )
