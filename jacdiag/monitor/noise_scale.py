"""The gradient noise scale of runs that accumulate gradients over micro-batches.

B_simple = tr(Sigma) / |G|^2 of McCandlish et al., "An Empirical Model of Large-Batch Training"
(arXiv 1812.06162), appendix A.1: the batch size, in sequences, below which a larger batch cuts the
number of steps in proportion. The gradient of one micro-batch and the mean over several of the same
step give it without a second backward. Both are read off `.grad` while it accumulates, when the
next forward begins: before clipping, unscaling and the optimizer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jacdiag.monitor.optimizers import local
from jacdiag.monitor.square_sums import square_sums
from jacdiag.trace.execution.precision import map_leaves

LEAST = 3  # micro-batches in a step: one is the small batch, all but the last are the large one
# Steps that are averaged. Numerator and denominator are averaged apart, as the paper does
WINDOW = 50
LEAST_LOOKS = 10


@dataclass(frozen=True, kw_only=True)
class MicroBatchNorms:
    """Squared gradient norms of one step.

    Attributes:
        first: of the gradient of the first micro-batch.
        summed: of the sum over `count` micro-batches.
        count: how many micro-batches are summed.
        rows: sequences in a micro-batch.
    """

    first: float
    summed: float
    count: int
    rows: int

    @property
    def squared_mean(self) -> float:
        """The unbiased estimate of |G|^2, the squared norm of the true gradient."""
        return (self.summed / self.count - self.first) / (self.count - 1)

    @property
    def variance(self) -> float:
        """The unbiased estimate of tr(Sigma).

        That is the variance of the gradient of one sequence, summed over parameters.
        """
        mean = self.summed / self.count**2
        return self.rows * (self.first - mean) / (1 - 1 / self.count)


class NoiseScale:
    """The noise scale B_simple, averaged over steps.

    Example:
        >>> noise = NoiseScale()
        >>> for _ in range(10):
        ...     noise.add(MicroBatchNorms(first=5.0, summed=32.0, count=4, rows=2))
        >>> noise.value  # |G|^2 = (8 - 5) / 3 = 1, tr(Sigma) = 2 (5 - 2) / (3 / 4) = 8
        8.0
    """

    def __init__(self) -> None:
        """Begin without a step."""
        self.looks: deque[MicroBatchNorms] = deque(maxlen=WINDOW)

    def add(self, norms: MicroBatchNorms) -> None:
        """Add the norms of a step."""
        self.looks.append(norms)

    @property
    def value(self) -> float | None:
        """B_simple in sequences.

        None before LEAST_LOOKS steps, or while the noise hides the gradient.
        """
        if len(self.looks) < LEAST_LOOKS:
            return None

        # Both are summed first: the mean of ratios would be biased.
        squared_mean = sum(norms.squared_mean for norms in self.looks)
        variance = sum(norms.variance for norms in self.looks)
        # The noise may hide the gradient.
        if squared_mean <= 0:
            return None
        return variance / squared_mean


class MicroBatches:
    """Gradients that accumulate between two optimizer steps, read at every `every`-th step.

    Nothing is read from the device: the sums stay there until the log is written.

    Args:
        model: the module that the loop calls, wrapped or not.
        parameters: whose gradients count.
        every: steps between two readings; each costs a pass over the gradients for every
            micro-batch.
    """

    def __init__(
        self, model: nn.Module, parameters: Callable[[], Sequence[Tensor]], every: int
    ) -> None:
        """Begin before the first step; see the class for the arguments."""
        self.model = model
        self.parameters = parameters
        self.every = every
        self.step = 0
        self._begin()

    def _begin(self) -> None:
        """Begin a step without a micro-batch."""
        self.forwards = 0
        self.rows = 0  # sequences in each micro-batch
        self.is_known = True  # the gradients are those of micro-batches of one size
        self.first: Tensor | None = None
        self.summed: Tensor | None = None

    def forward_begins(self, args: Any, kwargs: Any) -> None:
        """Take note of a micro-batch, and of the gradients of those before it."""
        if self.step % self.every:
            return
        self._count_micro_batch(args, kwargs)

        # Read what has accumulated so far. Before the first backward that is nothing.
        if not self.is_known or self.forwards < 2:
            return
        gradients = [local(p.grad) for p in self.parameters() if p.grad is not None]
        if not gradients:  # two forwards before a backward: these are no micro-batches
            self.is_known = False
            return
        self.summed = square_sums(gradients).sum()
        if self.forwards == 2:
            self.first = self.summed

    def _count_micro_batch(self, args: Any, kwargs: Any) -> None:
        """Count a micro-batch, and check that its gradients can be compared with the others'."""
        # 1. Check that the gradients are those of this rank alone. DistributedDataParallel averages
        # them over ranks in the backward, except inside of `no_sync`.
        averages_over_ranks = getattr(self.model, "require_backward_grad_sync", False)
        if averages_over_ranks and self.forwards:
            self.is_known = False

        # 2. Check that all micro-batches have one size.
        rows = _count_rows(args, kwargs)
        has_other_size = self.rows != 0 and rows != self.rows
        if rows is None or has_other_size:
            self.is_known = False
        self.rows = rows or 0
        self.forwards += 1

    def step_ended(self) -> tuple[Tensor, int, int] | None:
        """End the step at hand.

        Returns:
            The two sums of squares as a tensor (first, summed) on their device, the number of
            micro-batches that are summed, and the sequences in each. None if the step was not read,
            or had fewer than LEAST micro-batches.
        """
        # 1. What was read of it.
        reading = None
        first, summed = self.first, self.summed
        has_enough = self.is_known and self.forwards >= LEAST
        if has_enough and first is not None and summed is not None:
            reading = (torch.stack([first, summed]), self.forwards - 1, self.rows)

        # 2. Begin the next one.
        self.step += 1
        self._begin()
        return reading


def _count_rows(args: Any, kwargs: Any) -> int | None:
    """Return the sequences in a batch: the first dimension of its first tensor."""
    sizes: list[int] = []

    def note(leaf: Any) -> Any:
        has_rows = isinstance(leaf, Tensor) and leaf.dim() > 0
        if has_rows:
            sizes.append(leaf.shape[0])
        return leaf

    map_leaves(note, (list(args), dict(kwargs)))
    if not sizes:
        return None
    return sizes[0]
