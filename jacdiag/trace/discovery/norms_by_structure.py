"""Norms and token-wise branches by their operations alone, for models without values."""

from __future__ import annotations

from jacdiag.trace.graph.graph import Graph
from jacdiag.trace.graph.ops import REDUCTIONS, ROOTS, SCALINGS, TOKEN_WISE, WITHIN_A_NORM

_MOST_STEPS = 12  # the statistics of a norm are a few calls away


def looks_like_norm(graph: Graph, node: int) -> tuple[bool, bool]:
    """Return whether a call is the last one of a norm, and whether that norm is centred.

    Such a call scales its operand by a root of a mean, one number per token.
    """
    # 1. The call has two factors.
    record = graph.nodes[node]
    values = [graph.values[index] for index in record.inputs]
    factors = [value for value in values if value.is_differentiable]
    if record.name not in SCALINGS or len(factors) != 2:
        return False, False

    # 2. One of them holds one number per token.
    shapes = sorted((value.shape for value in factors), key=lambda shape: shape[-1:])
    small, large = shapes
    if small != (*large[:-1], 1):
        return False, False

    # 3. A mean and a root lead to it. If the mean is taken off, the norm is centred.
    names = _names_before(graph, [value.index for value in factors])
    is_norm = bool(names & REDUCTIONS) and bool(names & ROOTS)
    is_centred = any("sub" in name for name in names)
    return is_norm, is_centred


def _names_before(graph: Graph, values: list[int]) -> set[str]:
    """Return the names of the calls that lead to values by the steps of a norm."""
    names: set[str] = set()
    steps_of_a_norm = REDUCTIONS | ROOTS | WITHIN_A_NORM
    for _ in range(_MOST_STEPS):
        makers = {graph.values[index].node for index in values}
        calls = [graph.nodes[maker] for maker in makers if maker >= 0]
        names.update(call.name for call in calls)

        # Go on from the calls that belong to a norm.
        values = []
        for call in calls:
            if call.name in steps_of_a_norm:
                values += graph.live_inputs(call.index)
    return names


def looks_token_wise(graph: Graph, cone: tuple[int, ...], shape: tuple[int, ...]) -> bool | None:
    """Return True if every call of a branch treats tokens one by one, None if one may not.

    Args:
        graph: what one forward did.
        cone: the calls of the branch.
        shape: of its shortcut, features last.
    """
    token_wise = TOKEN_WISE | SCALINGS | REDUCTIONS | ROOTS | {"reciprocal"}
    for node in cone:
        record = graph.nodes[node]
        leads = {graph.values[index].shape[:-1] for index in record.outputs}
        keeps_tokens = leads <= {shape[:-1]}
        if not keeps_tokens or record.name not in token_wise:
            return None
    return True
