"""One comparison of gradients across ranks: a trainer may average them inside the optimizer, or not
at all.

Where no weight is sharded, every rank is expected to hold the same gradients when the optimizer
steps, and one rank speaks for all. Each rank leaves three numbers of its first step in the store
through which the ranks found each other. No rank waits for another there: a watch that runs on one
rank alone compares nothing.
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
    """Compares the first step of this rank with that of the others.

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
        global _created
        _created += 1
        self.together, self.warn, self.store = together, warn, store
        self.prefix = f"jacdiag/gradients/{_created}"
        self.parameters = list(
            {id(p): p for leaf in leaves for p in held_parameters(leaf)}.values()
        )
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
        """Take the numbers before the first step of the first optimizer; with a closure there are
        none yet.
        """
        if self.before is not None:
            return
        try:
            gradients = [local(p.grad) if p.grad is not None else None for p in self.parameters]
            self.before = _print_of(self.parameters)
            if not closure:
                self.gradient = square_sums(gradients, local(self.parameters[0]).device).sum()
        except Exception:  # the training goes on, and nothing is compared
            self.gradient = None

    def step_ended(self) -> bool:
        """Take the next step of the comparison; return whether it is over."""
        self.steps += 1
        if self.sent is None:
            if self.before is None:
                return self._end() if self.steps > _PATIENCE else False
            self._remove_hooks()
            if self.gradient is None:
                return self._end()
            self._send()
        if not self.together.lead:
            return self._end()
        keys = [self._key(rank) for rank in range(self.together.size) if rank != self.together.rank]
        if not self.store.check(keys):
            return self._end() if self.steps > _PATIENCE else False
        self._judge([json.loads(self.store.get(key)) for key in keys])
        return self._end()

    def _send(self) -> None:
        assert self.gradient is not None and self.before is not None
        gradient, before, after = (
            float(self.gradient),
            int(self.before),
            int(_print_of(self.parameters)),
        )
        self.sent = [gradient, before, after]
        self.store.set(self._key(self.together.rank), json.dumps(self.sent))

    def _judge(self, others: list[list[float]]) -> None:
        assert self.sent is not None
        gradient, before, after = self.sent
        if all(abs(other[0] - gradient) <= _SAME * abs(gradient) for other in others):
            return
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

    def _end(self) -> bool:
        self.remove()
        return True

    def _remove_hooks(self) -> None:
        if self.hooks is not None:
            self.hooks.remove()
            self.hooks = None

    def remove(self) -> None:
        """Let go of the model."""
        self._remove_hooks()
        self.parameters = []
        self.gradient = self.before = None


def _print_of(parameters: Sequence[Tensor]) -> Tensor:
    """A number that tells weights apart bit by bit: a sum over the first elements, each weighted by
    its place.
    """
    total = torch.zeros((), dtype=torch.int64, device=local(parameters[0]).device)
    for place, parameter in enumerate(parameters):
        values = local(parameter.detach()).reshape(-1)[:_ELEMENTS]
        values = torch.view_as_real(values).reshape(-1) if values.is_complex() else values
        bits = values.float().view(torch.int32).long()
        weights = torch.arange(1, len(bits) + 1, device=bits.device) + 7919 * place
        total += (bits * weights).sum().to(total.device)
    return total


def _ignore(optimizer: Any, closure: bool) -> None:
    """Do nothing after a step."""
