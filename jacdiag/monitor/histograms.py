"""Histograms of weights and gradients, one per sub-layer, for the sinks that show them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from jacdiag.monitor.optimizers import local
from jacdiag.monitor.parameter_groups import GroupMember, SublayerGroups

BINS = 64
# histc counts in float32, in which 2^24 + 1 is no number: a bin would stop there
_MOST_COUNTED = 2**24


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of the elements of some tensors.

    Attributes:
        edges: of the bins, BINS + 1 of them, ascending and symmetric around zero.
        counts: elements in each bin.
        left_out: elements that are not finite, and in no bin.
    """

    edges: list[float]
    counts: list[int]
    left_out: int = 0


def histogram_of(tensors: Sequence[Tensor]) -> Histogram:
    """Count the elements of some tensors in BINS bins of one width; waits for the device twice.

    Example:
        >>> shown = histogram_of([torch.tensor([-1.0, 0.5, 1.0, float("nan")])])
        >>> shown.edges[0], shown.edges[-1], sum(shown.counts), shown.left_out
        (-1.0, 1.0, 3, 1)
    """
    flat = [t.detach().float().flatten() for t in tensors if t.numel()]
    if not flat:
        return Histogram(edges=_edges(1.0), counts=[0] * BINS)

    # 1. The range of what is finite. If all is zero, any range will do.
    device = flat[0].device
    tops = [t.abs().nan_to_num(nan=0.0, posinf=0.0).max().to(device) for t in flat]
    top = float(torch.stack(tops).max())
    if top == 0.0:
        top = 1.0

    # 2. The counts, and how many elements are not finite. Both come in one download.
    with _counting_in_any_order():
        counts_of_each = [_counts_of(t, top).to(device) for t in flat]
    left_out_of_each = [t.isfinite().logical_not().sum().to(device) for t in flat]
    counts = torch.stack(counts_of_each).sum(0)
    left_out = torch.stack(left_out_of_each).sum(0, keepdim=True)
    numbers = torch.cat([counts, left_out]).tolist()
    return Histogram(edges=_edges(top), counts=numbers[:BINS], left_out=numbers[BINS])


def _counts_of(values: Tensor, top: float) -> Tensor:
    """Return how many values are in each bin, as integers on their device: (BINS,).

    Args:
        values: (elements,), float32. Those that are not finite are in no bin.
        top: the end of the range, which begins at -top.
    """
    counts = torch.zeros(BINS, dtype=torch.int64, device=values.device)
    for piece in values.split(_MOST_COUNTED):
        counts += torch.histc(piece, BINS, -top, top).long()
    return counts


@contextmanager
def _counting_in_any_order() -> Iterator[None]:
    """Allow histc on CUDA where only deterministic algorithms are allowed.

    It counts in any order there, so that torch refuses it. Counts of elements are the same in
    every order.
    """
    is_on = torch.are_deterministic_algorithms_enabled()
    if not is_on:
        yield
        return
    is_warning = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=is_warning)


def _edges(top: float) -> list[float]:
    return [top * (2 * k / BINS - 1) for k in range(BINS + 1)]


class Histograms:
    """Histograms that are taken at every `every`-th step.

    Args:
        every: steps between two looks; None for never.
    """

    def __init__(self, every: int | None) -> None:
        """Begin without a histogram; see the class for the arguments."""
        self.every = every
        self.gradients: dict[str, Histogram] = {}

    def is_due(self, step: int, stride: int = 1) -> bool:
        """Return whether a multiple of `every` lies in the last `stride` numbers."""
        return self.every is not None and step % self.every < stride

    def take_gradients(self, groups: SublayerGroups, stepping: set[int] | None) -> None:
        """Take the gradients as an optimizer is going to use them.

        Args:
            groups: the sub-layers.
            stepping: ids of the parameters of the optimizer that steps now; None for all.
        """
        for place, label in enumerate(groups.labels):
            gradients = _gradients_of(groups.of(place), stepping)
            # A sub-layer that another optimizer updates has its own call.
            if gradients:
                self.gradients[label] = histogram_of(gradients)

    def finish(self, groups: SublayerGroups) -> Mapping[str, Histogram]:
        """Return the histograms of this step under slash-separated names.

        Those of the weights are taken now, after the step.
        """
        # 1. Those of the gradients were taken before the step.
        shown: dict[str, Histogram] = {}
        for label, histogram in self.gradients.items():
            shown[f"jacdiag/gradients/{label}"] = histogram
        self.gradients = {}

        # 2. Those of the weights.
        for place, label in enumerate(groups.labels):
            weights = [local(member.parameter.detach()) for member in groups.of(place)]
            shown[f"jacdiag/weights/{label}"] = histogram_of(weights)
        return shown


def _gradients_of(members: Sequence[GroupMember], stepping: set[int] | None) -> list[Tensor]:
    """Return the gradients of those parameters that the optimizer steps."""
    gradients: list[Tensor] = []
    for member in members:
        parameter = member.parameter
        is_stepping = stepping is None or id(parameter) in stepping
        if not is_stepping:
            continue
        if parameter.grad is not None:
            gradients.append(local(parameter.grad))
    return gradients


def moments(shown: Histogram) -> tuple[float, float]:
    """Return the sum and the sum of squares of the elements, with each at the middle of its bin."""
    sums: list[float] = []
    squares: list[float] = []
    bins = zip(shown.counts, shown.edges, shown.edges[1:], strict=False)
    for count, lower, upper in bins:
        middle = (lower + upper) / 2
        sums.append(count * middle)
        squares.append(count * middle * middle)
    return math.fsum(sums), math.fsum(squares)
