"""The last batches of a run, kept for the flight recorder while they are small or as many as were
asked for.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import torch

from jacdiag.trace.execution.precision import map_leaves
from jacdiag.trace.execution.rng_state import RandomState

# bytes that are kept without being asked for: 20 steps of 192 sequences of 1,024 tokens, twice
SMALL = 64 * 2**20


@dataclass(frozen=True)
class KeptBatch:
    """A batch as the model's forward got it.

    Attributes:
        step: of the optimizer, that the batch belongs to.
        arguments: of the forward, by name.
        random_state: of every generator when the forward began.
    """

    step: int
    arguments: dict[str, Any]
    random_state: RandomState


class KeptBatches:
    """A queue of the last batches, on the device that they are on.

    Args:
        count: how many forwards to keep; None keeps those of the last steps as long as they are
            small.
        log_every: steps between two looks of the live rules. An alert may speak of any step since
            the last look.

    Attributes:
        automatic: the number was left to this class.
        bytes: of the tensors that are kept.
        step_bytes: of the batches of one step, if they are too large to be kept by themselves.
        stride: between the numbers of two steps.
    """

    def __init__(self, count: int | None, log_every: int) -> None:
        self.automatic = count is None
        self.wanted = count is None or count > 0
        self.log_every = log_every
        self.queue: deque[KeptBatch] = deque(maxlen=count)
        self.bytes = 0
        self.step_bytes: int | None = None
        self.stride = 1

    def __len__(self) -> int:
        return len(self.queue)

    def add(self, step: int, arguments: dict[str, Any]) -> None:
        """Keep a copy of a batch and the random states; the oldest go."""
        if not self.automatic:
            self.queue.append(_copy_of(step, arguments))
            return
        if self.step_bytes is not None:
            return
        # 1. Drop steps that no alert can speak of any more.
        while self.queue and self.queue[0].step <= step - 2 * self.log_every * self.stride:
            self.bytes -= _size(self.queue.popleft().arguments)
        # 2. Give up if one interval of the live rules does not fit.
        size = _size(arguments)
        of_this_step = size + sum(_size(kept.arguments) for kept in self.queue if kept.step == step)
        if of_this_step * self.log_every > SMALL:
            self.step_bytes = of_this_step
            self.queue.clear()
            self.bytes = 0
            return
        # 3. Keep it; within the room, what is oldest goes first.
        self.queue.append(_copy_of(step, arguments))
        self.bytes += size
        while self.bytes > SMALL:
            self.bytes -= _size(self.queue.popleft().arguments)

    def renumber(self, old: int, new: int) -> None:
        """Give the latest batches, those of step `old`, the number `new`."""
        for place in reversed(range(len(self.queue))):
            if self.queue[place].step != old:
                return
            self.queue[place] = replace(self.queue[place], step=new)

    def drop_between(self, base: int, current: int) -> None:
        """Drop the batches of steps after `base`, but those of the step at hand."""
        batches = [batch for batch in self.queue if batch.step <= base or batch.step == current]
        self.queue = deque(batches, maxlen=self.queue.maxlen)
        if self.automatic:
            self.bytes = sum(_size(batch.arguments) for batch in batches)

    def chosen(self, step: int) -> list[KeptBatch]:
        """Return what a flight about a step holds, in order: the batch of that step comes last.

        If only later batches are left, all of them are returned.
        """
        entries = list(self.queue)
        if self.automatic:
            own = [kept for kept in entries if kept.step == step]
            if own:
                return own
        return [kept for kept in entries if kept.step <= step] or entries


def _copy_of(step: int, arguments: dict[str, Any]) -> KeptBatch:
    return KeptBatch(step, map_leaves(_copied, arguments), RandomState.now())


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


def _size(arguments: dict[str, Any]) -> int:
    sizes: list[int] = []

    def note(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            sizes.append(leaf.numel() * leaf.element_size())
        return leaf

    map_leaves(note, arguments)
    return sum(sizes)
