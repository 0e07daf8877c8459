"""What `jacdiag.sites` returns: the sub-layers of one recorded forward, and what surrounds them."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, overload

import torch

from jacdiag.errors import TraceError
from jacdiag.trace.discovery.coverage import Coverage
from jacdiag.trace.discovery.missing_shortcuts import MissingShortcut
from jacdiag.trace.discovery.residual import Finder, Site
from jacdiag.trace.discovery.residual_stream import Streams
from jacdiag.trace.discovery.unlisted_sums import LeftOut
from jacdiag.trace.execution.replay import Replayer
from jacdiag.trace.execution.skeleton import Skeleton
from jacdiag.trace.graph.graph import Graph
from jacdiag.trace.stages import Captured
from jacdiag.trace.sublayer import Sublayer

_PRINTED = 24  # sub-layers that `print(sites)` lists


class Sites(Sequence[Sublayer]):
    """The sub-layers of one recorded forward, in the order of the stream, and what surrounds them.

    Attributes:
        graph, replayer, streams: the record, and how to run parts of it again.
        coverage: which parameter belongs where.
        output: the model's output in the recorded run.
        deterministic: two runs gave the same output bit for bit.
        culprit: the call at which two runs begin to differ, "" if they do not.
        notes: what had to be done to run the model outside its wrappers.
        left_out: residual sums that are not sub-layers, each with its module, source line and
            reason.
        missing_shortcuts: parts of layers that no shortcut leads around, as one does in other
            layers.
        hidden: additions that autograd does not see, each with the way to declare it.
    """

    def __init__(self, sublayers: list[Sublayer], captured: Captured) -> None:
        residuals = captured.residuals
        recording = residuals.recording
        self._sublayers = sublayers
        self.graph: Graph = recording.graph
        self.replayer: Replayer = recording.replayer
        self.skeleton: Skeleton = recording.skeleton
        self.output: Any = recording.output
        self.dtype: torch.dtype = recording.dtype
        self.notes: list[str] = list(recording.notes)
        self.finder: Finder = residuals.finder
        self.streams: Streams = residuals.streams
        self.coverage: Coverage = residuals.coverage
        self.raw: list[Site] = residuals.sites
        self.hidden: list[str] = residuals.hidden
        self.left_out: list[LeftOut] = residuals.left_out
        self.missing_shortcuts: list[MissingShortcut] = residuals.missing
        self.deterministic: bool = captured.deterministic
        self.culprit: str = captured.culprit

    def __str__(self) -> str:
        """Return one line for each sub-layer; of a long model, for the first ones."""
        # 1. How many there are.
        count = len(self)
        noun = "sub-layer" if count == 1 else "sub-layers"
        lines = [f"{count} {noun}, {self.layers} deep"]

        # 2. The first of them.
        for site in self._sublayers[:_PRINTED]:
            lines.append(f"  {site}")

        # 3. How many are not listed.
        if count > _PRINTED:
            lines.append(f"  ... and {count - _PRINTED} more")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: a table with one row for each sub-layer."""
        titles = ("depth", "sub-layer", "kind", "placement", "parameters")
        head = "".join(f"<th>{title}</th>" for title in titles)
        rows = "".join(_html_row(site) for site in self)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"

    def __repr__(self) -> str:
        noun = "sub-layer" if len(self) == 1 else "sub-layers"
        return f"<Sites: {len(self)} {noun}, {self.layers} deep>"

    @overload
    def __getitem__(self, index: int) -> Sublayer: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sublayer]: ...
    def __getitem__(self, index: int | slice) -> Sublayer | list[Sublayer]:
        return self._sublayers[index]

    def __len__(self) -> int:
        return len(self._sublayers)

    def __iter__(self) -> Iterator[Sublayer]:
        return iter(self._sublayers)

    @property
    def layers(self) -> int:
        """Number of depths that have a sub-layer on the stream."""
        return len({site.depth for site in self if not site.nested})

    def by_shortcut(self) -> list[list[Sublayer]]:
        """Return the sub-layers in groups; parallel branches share a shortcut."""
        groups: dict[int, list[Sublayer]] = {}
        for site in self:
            members = groups.setdefault(site.group, [])
            members.append(site)
        return list(groups.values())

    def named(self, name: str) -> Sublayer:
        """Return the sub-layer of that name.

        Args:
            name: such as "transformer.h.0.attn".

        Raises:
            TraceError: no sub-layer has the name; the hint lists the closest ones.
        """
        for site in self._sublayers:
            if site.name == name:
                return site

        # Names that a typing error may have meant.
        names = [site.name for site in self._sublayers]
        close = get_close_matches(name, names, n=3)
        hint = None
        if close:
            hint = f"closest: {', '.join(close)}"
        raise TraceError(f"no sub-layer is called '{name}'", hint=hint)


def _html_row(site: Sublayer) -> str:
    """Return the row of a sub-layer. Names come from the model, so they are escaped."""
    cells = (site.depth, site.name, site.kind, site.placement, len(site.parameters))
    return f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in cells)}</tr>"
