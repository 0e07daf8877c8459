"""One comparison of gradients across ranks, at the first step.

A trainer may average gradients inside the optimizer, or not at all. If no weight is sharded, every
rank is expected to hold the same gradients when the optimizer steps, and the leading rank logs
them for all. Each rank leaves three numbers of its first step in the store of the process group. No
rank waits for another there: a watch that runs on one rank alone compares nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from jacdiag.distributed.training_group import Together
from jacdiag.monitor.optimizers import OptimizerTree, held_parameters, local
from jacdiag.monitor.square_sums import square_sums
from jacdiag.monitor.step_hooks import StepHooks

# relative; sums in float32 of the same gradients differ by less than 1e-6, other batches by
# percents
_SAME = 1e-4
_ELEMENTS = 4096  # of each weight that are compared bit by bit
_PATIENCE = 50  # steps that the other ranks have for their first one

_created = 0


class RankComparison:
    """A comparison of this rank's first step with that of the others.

    Args:
        together: the ranks.
        leaves: the optimizers.
        warn: called with (topic, text) on the leading rank.
        store: of the process group, in which each rank leaves its numbers.
        attach: put hooks on the optimizers; otherwise the caller calls `see` before each step.
    """

    def __init__(
        self,
        together: Together,
        leaves: Sequence[Any],
        warn: Callable[[str, str], None],
        store: Any,
        *,
        attach: bool,
    ) -> None:
        """Begin before the first step; see the class for the arguments."""
        # 1. A name in the store that the other ranks give the same comparison.
        global _created
        _created += 1
        self.together = together
        self.warn = warn
        self.store = store
        self.prefix = f"jacdiag/gradients/{_created}"

        # 2. What is compared: each parameter once.
        by_id: dict[int, Tensor] = {}
        for leaf in leaves:
            for parameter in held_parameters(leaf):
                by_id[id(parameter)] = parameter
        self.parameters = list(by_id.values())
        self.gradient: Tensor | None = None
        self.before: Tensor | None = None
        self.steps = 0
        self.sent: list[float] | None = None
        self.hooks: StepHooks | None = None
        if attach:
            self.hooks = StepHooks(OptimizerTree(leaves=list(leaves)), self._before, _ignore)

    @classmethod
    def begin(
        cls,
        together: Together,
        leaves: Sequence[Any],
        warn: Callable[[str, str], None],
        *,
        attach: bool,
    ) -> RankComparison | None:
        """Return a comparison if there are other ranks to compare with, or None."""
        if together.size < 2 or together.sharded:
            return None
        try:
            from torch.distributed.distributed_c10d import _get_default_store

            return cls(together, leaves, warn, _get_default_store(), attach=attach)
        except Exception:  # a store that is not there: there is nothing to compare with
            return None

    def _before(self, _optimizer: Any, closure: bool) -> None:
        self.see(closure)

    def see(self, closure: bool) -> None:
        """Take the numbers before the first step of the first optimizer.

        Args:
            closure: whether the step has one, so that there are no gradients yet.
        """
        if self.before is not None:
            return
        try:
            gradients: list[Tensor | None] = []
            for parameter in self.parameters:
                gradient = parameter.grad
                gradients.append(local(gradient) if gradient is not None else None)
            self.before = _fingerprint(self.parameters)
            if not closure:
                self.gradient = square_sums(gradients, local(self.parameters[0]).device).sum()
        except Exception:  # the training goes on, and nothing is compared
            self.gradient = None

    def step_ended(self) -> bool:
        """Take the next step of the comparison; return whether it is over."""
        self.steps += 1
        is_over = self._advance()
        if is_over:
            self.remove()
        return is_over

    def _advance(self) -> bool:
        """Send this rank's numbers, then compare those of all ranks; return whether it is over."""
        # 1. Send the numbers of the first step.
        is_late = self.steps > _PATIENCE
        if self.sent is None:
            if self.before is None:
                return is_late
            self._remove_hooks()
            if self.gradient is None:
                return True
            self._send()

        # 2. The leading rank compares them, once they have all arrived.
        if not self.together.lead:
            return True
        keys = [self._key(rank) for rank in range(self.together.size) if rank != self.together.rank]
        if not self.store.check(keys):
            return is_late
        self._judge([json.loads(self.store.get(key)) for key in keys])
        return True

    def _send(self) -> None:
        """Leave this rank's numbers in the store: the gradient, the weights before and after."""
        assert self.gradient is not None and self.before is not None
        gradient = float(self.gradient)
        before = int(self.before)
        after = int(_fingerprint(self.parameters))
        self.sent = [gradient, before, after]
        self.store.set(self._key(self.together.rank), json.dumps(self.sent))

    def _judge(self, others: list[list[float]]) -> None:
        """Warn if the gradients differ; the weights show why."""
        assert self.sent is not None
        gradient, before, after = self.sent
        # 1. Whether the gradients differ.
        tolerance = _SAME * abs(gradient)
        if all(abs(other[0] - gradient) <= tolerance for other in others):
            return

        # 2. Why, as the weights show it.
        if any(other[1] != before for other in others):
            cause = "the ranks hold different weights"
        elif any(other[2] != after for other in others):
            cause = (
                "the weights differ between the ranks after the step as well: nobody averages "
                "the gradients"
            )
        else:
            cause = (
                "the weights are the same after it: the gradients are averaged inside the optimizer"
            )
        self.warn(
            "ranks",
            f"the gradients of the ranks differ before the optimizer's step, and {cause}. "
            "Gradient norms are those of "
            "rank 0 alone; update norms are those of its weights",
        )

    def _key(self, rank: int) -> str:
        return f"{self.prefix}/{rank}"

    def _remove_hooks(self) -> None:
        if self.hooks is not None:
            self.hooks.remove()
            self.hooks = None

    def remove(self) -> None:
        """Let go of the model."""
        self._remove_hooks()
        self.parameters = []
        self.gradient = None
        self.before = None


def _fingerprint(parameters: Sequence[Tensor]) -> Tensor:
    """Return a number that differs if a bit of the weights does.

    It is a sum over the first elements of each weight, each multiplied by its place.
    """
    total = torch.zeros((), dtype=torch.int64, device=local(parameters[0]).device)
    for place, parameter in enumerate(parameters):
        values = local(parameter.detach()).reshape(-1)[:_ELEMENTS]
        if values.is_complex():
            values = torch.view_as_real(values).reshape(-1)
        bits = values.float().view(torch.int32).long()
        weights = torch.arange(1, len(bits) + 1, device=bits.device) + 7919 * place
        total += (bits * weights).sum().to(total.device)
    return total


def _ignore(optimizer: Any, closure: bool) -> None:
    """Do nothing after a step."""
