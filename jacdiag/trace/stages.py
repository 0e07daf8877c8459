"""The steps from a model to its sub-layers, each as the data that it leaves to the next one.

`Recording` -> `Residuals` -> `Captured` -> `Sites`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from jacdiag.trace.discovery.coverage import Coverage
from jacdiag.trace.discovery.missing_shortcuts import MissingShortcut
from jacdiag.trace.discovery.residual import Finder, Site
from jacdiag.trace.discovery.residual_stream import Streams
from jacdiag.trace.discovery.unlisted_sums import LeftOut
from jacdiag.trace.execution.replay import Replayer
from jacdiag.trace.execution.skeleton import Skeleton
from jacdiag.trace.graph.graph import Graph


@dataclass(frozen=True)
class Recording:
    """One forward of the model, as data.

    Attributes:
        skeleton: the model's code, which ran.
        graph: what the forward did.
        output: the model's output.
        replayer: runs parts of the forward again.
        dtype: precision of the run.
        notes: what had to be done to run the model outside its wrappers.
        stray: the first module whose copy computes something else than the model, "" if none does.
    """

    skeleton: Skeleton
    graph: Graph
    output: Any
    replayer: Replayer
    dtype: torch.dtype
    notes: tuple[str, ...] = ()
    stray: str = ""

    def with_note(self, note: str, stray: str = "") -> Recording:
        """Return the same recording with one more note."""
        return replace(self, notes=(*self.notes, note), stray=stray)


@dataclass(frozen=True)
class Residuals:
    """The residual sums of a recording.

    Attributes:
        recording: where they were found.
        finder: answers questions about paths through the record.
        sites: the (shortcut, branch) pairs, in the order of the stream.
        homes: for each site, the innermost module call that makes its products.
        streams: which sums follow which.
        coverage: which parameter belongs where.
        left_out: residual sums that are not sub-layers.
        missing: parts of layers that no shortcut leads around, as one does in other layers.
        hidden: additions that autograd does not see, each with the way to declare it.
    """

    recording: Recording
    finder: Finder
    sites: list[Site]
    homes: list[int]
    streams: Streams
    coverage: Coverage
    left_out: list[LeftOut]
    missing: list[MissingShortcut]
    hidden: list[str]


@dataclass(frozen=True)
class Captured:
    """Residual sums with the tensors that a second run of the model showed.

    Attributes:
        residuals: the sums.
        owners: for each site, the module call that holds its branch and the sum.
        owners_after: for each group of the streams, the call that holds the sum and what follows.
        values: shortcuts, sums and arguments by value index.
        branches: f(x) of each site.
        deterministic: two runs gave the same output bit for bit.
        culprit: the call at which two runs begin to differ, "" if they do not.
    """

    residuals: Residuals
    owners: Sequence[int]
    owners_after: Sequence[int]
    values: Mapping[int, Tensor]
    branches: Sequence[Tensor]
    deterministic: bool
    culprit: str = ""

    def as_deterministic(self, note: str) -> Captured:
        """Return the same, two runs of which are to count as one, with a note on the reason."""
        recording = self.residuals.recording
        noted = recording.with_note(note, recording.stray)
        return replace(self, residuals=replace(self.residuals, recording=noted), deterministic=True)
