"""Products with several operators at once, so that those which share a Jacobian share its matrix
products too.

The norms of one sub-layer (core, branch, residual) all lead through one linearised branch. A probe
of one short sequence gives matrix products of few rows, which keep a processor half idle: on a CPU
three vectors of 64 tokens cost as much as two one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from jacdiag.spectra.operator import JacobianOperator, Operator, Steps, Way


def products_together(
    way: Way, operators: Sequence[Operator], vectors: Sequence[Tensor]
) -> list[Tensor]:
    """One product with each of several operators; vectors that meet at the same Jacobian pass it in
    one call.

    Args:
        way: "push" for J u, "pull" for J^T w.
        operators, vectors: as many of the one as of the other.
    """
    held = Counter(leaf for operator in operators for leaf in dict.fromkeys(operator.jacobians))
    results: list[Tensor | None] = [None] * len(operators)
    waiting: dict[int, tuple[JacobianOperator, Tensor, Steps]] = {}

    def resume(k: int, steps: Steps, answer: Tensor | None) -> None:
        try:
            leaf, vector = next(steps) if answer is None else steps.send(answer)
            waiting[k] = leaf, vector, steps
        except StopIteration as end:
            results[k] = end.value
            waiting.pop(k, None)

    for k, (operator, vector) in enumerate(zip(operators, vectors, strict=True)):
        operator.products += operator not in operator.jacobians  # a Jacobian counts for itself
        resume(k, operator.steps(way, vector), None)
    while waiting:
        # What few operators hold comes first: the others then meet at what they have in common.
        leaf = min((entry[0] for entry in waiting.values()), key=lambda leaf: held[leaf])
        here = [k for k, entry in waiting.items() if entry[0] is leaf]
        answers = leaf.products_of(way, [waiting[k][1] for k in here])
        for k, answer in zip(here, answers, strict=True):
            resume(k, waiting[k][2], answer)
    return [result for result in results if result is not None]
