"""Keep the last batches of a run for the flight recorder.

They are kept while they are small, or as many as were requested.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import torch

from jacdiag.rules.flight_replay import LONGEST_ONSET
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
        bytes: of the tensors among the arguments.
    """

    step: int
    arguments: dict[str, Any]
    random_state: RandomState
    bytes: int


class KeptBatches:
    """A queue of the last batches, on the device that they are on.

    Args:
        count: how many forwards to keep; None keeps those of the last steps as long as they are
            small.
        log_every: steps between two looks of the live rules. An alert may be about any step since
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

    def add(self, step: int, arguments: dict[str, Any]) -> KeptBatch | None:
        """Keep a copy of a batch and the random states; the oldest go.

        Returns:
            The copy, if it stays until the live rules have looked at its step.
        """
        size = _size(arguments)
        if not self.automatic:
            self.queue.append(_copy_of(step, arguments, size))
            return None
        if self.step_bytes is not None:
            return None

        # 1. Drop steps that no alert can speak of any more.
        while self.queue and self.queue[0].step <= step - 2 * self.log_every * self.stride:
            self.bytes -= self.queue.popleft().bytes

        # 2. Give up if one interval of the live rules does not fit.
        of_this_step = size + self._bytes_of(step)
        if of_this_step * self.log_every > SMALL:
            self.step_bytes = of_this_step
            self.queue.clear()
            self.bytes = 0
            return None

        # 3. Keep it; within the room, what is oldest goes first.
        batch = _copy_of(step, arguments, size)
        self.queue.append(batch)
        self.bytes += size
        while self.bytes > SMALL:
            self.bytes -= self.queue.popleft().bytes
        return batch

    def renumber(self, old: int, new: int) -> None:
        """Give the latest batches, those of step `old`, the number `new`."""
        for place in reversed(range(len(self.queue))):
            if self.queue[place].step != old:
                return
            self.queue[place] = replace(self.queue[place], step=new)

    def drop_between(self, base: int, current: int) -> None:
        """Drop the batches of steps after `base`, but those of the step at hand."""
        # 1. The batches that stay.
        batches = []
        for batch in self.queue:
            is_at_hand = batch.step == current
            if is_at_hand or batch.step <= base:
                batches.append(batch)

        # 2. They take the place of all.
        self.queue = deque(batches, maxlen=self.queue.maxlen)
        if self.automatic:
            self.bytes = sum(batch.bytes for batch in batches)

    def _bytes_of(self, step: int) -> int:
        """The bytes of the latest batches, as far as they belong to a step."""
        total = 0
        for batch in reversed(self.queue):
            if batch.step != step:
                break
            total += batch.bytes
        return total

    def chosen(self, step: int) -> list[KeptBatch]:
        """Return what a flight about a step holds, in order: the batch of that step comes last.

        Left to this class, these are the batches of the step and of those in which its cause may
        lie. They are also what `--replay` compares it with. If only later batches are left, all of
        them are returned.
        """
        # 1. The batches up to the step.
        entries = [batch for batch in self.queue if batch.step <= step]
        if not entries:
            return list(self.queue)

        # 2. The user's own number of batches is written in full.
        if not self.automatic:
            return entries

        # 3. Else those in which the cause may lie, if the batch of the step itself is there.
        has_step = any(batch.step == step for batch in entries)
        if not has_step:
            return entries
        too_early = step - (LONGEST_ONSET + 1) * self.stride
        return [batch for batch in entries if batch.step > too_early]

    def after(self, step: int) -> list[KeptBatch]:
        """Return the batches of the step that began after `step` and has not ended, in order."""
        return [batch for batch in self.queue if batch.step > step]


def _copy_of(step: int, arguments: dict[str, Any], size: int) -> KeptBatch:
    """Return a batch with copies of its tensors, and the random state that the step began with."""
    if _is_flat(arguments):
        copies = {name: _copy_leaf(value) for name, value in arguments.items()}
    else:
        copies = map_leaves(_copy_leaf, arguments)
    return KeptBatch(step, copies, RandomState.now(), size)


def _copy_leaf(leaf: Any) -> Any:
    """Return a copy of a tensor; anything else as it is."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.detach().clone()


def _size(arguments: dict[str, Any]) -> int:
    """Return how many bytes the tensors of a batch take."""
    # 1. Mostly the arguments are tensors themselves.
    if _is_flat(arguments):
        tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
        return sum(map(_bytes_of, tensors))

    # 2. Any other containers.
    sizes: list[int] = []

    def note(leaf: Any) -> Any:
        """Note the bytes of a tensor."""
        if isinstance(leaf, torch.Tensor):
            sizes.append(_bytes_of(leaf))
        return leaf

    map_leaves(note, arguments)
    return sum(sizes)


def _is_flat(arguments: dict[str, Any]) -> bool:
    """Return whether no argument is a container of others."""
    return not any(isinstance(value, (tuple, list, dict)) for value in arguments.values())


def _bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
