"""Norms and token-wise branches by their operations alone, for models without values."""

from __future__ import annotations

from jacdiag.trace.graph.graph import Graph, Node
from jacdiag.trace.graph.ops import REDUCTIONS, ROOTS, SCALINGS, TOKEN_WISE, WITHIN_A_NORM

_MOST_STEPS = 12  # the statistics of a norm are a few calls away
_CALLS_OF_ONE_TOKEN = TOKEN_WISE | SCALINGS | REDUCTIONS | ROOTS | {"reciprocal"}


def looks_like_norm(graph: Graph, node: int) -> tuple[bool, bool]:
    """Return whether a call is the last one of a norm, and whether that norm is centred.

    Such a call scales its operand by a root of a mean, one number per token.

    Args:
        graph: what one forward did.
        node: the call.
    """
    # 1. The call scales, and has two factors.
    factors = graph.values_read(node)
    factors = [value for value in factors if value.is_differentiable]
    if graph.nodes[node].name not in SCALINGS or len(factors) != 2:
        return False, False

    # 2. One of them holds one number per token.
    small, large = sorted((value.shape for value in factors), key=lambda shape: shape[-1:])
    if small != (*large[:-1], 1):
        return False, False

    # 3. A mean and a root lead to it.
    names = _names_before(graph, [value.index for value in factors])
    has_mean = not names.isdisjoint(REDUCTIONS)
    has_root = not names.isdisjoint(ROOTS)

    # 4. If the mean is taken off, the norm is centred.
    is_centred = any("sub" in name for name in names)
    return has_mean and has_root, is_centred


def _names_before(graph: Graph, values: list[int]) -> set[str]:
    """Return the names of the calls that lead to values by the steps of a norm."""
    names: set[str] = set()
    steps_of_a_norm = REDUCTIONS | ROOTS | WITHIN_A_NORM
    for _ in range(_MOST_STEPS):
        calls = _makers_of(graph, values)
        names.update(call.name for call in calls)

        # Go on from the calls that belong to a norm.
        values = []
        for call in calls:
            if call.name in steps_of_a_norm:
                values += graph.live_inputs(call.index)
    return names


def _makers_of(graph: Graph, values: list[int]) -> list[Node]:
    """Return the calls that made values, each once."""
    makers = {graph.values[index].node for index in values}
    return [graph.nodes[maker] for maker in makers if maker >= 0]


def looks_token_wise(graph: Graph, cone: tuple[int, ...], shape: tuple[int, ...]) -> bool | None:
    """Return True if every call of a branch treats tokens one by one, None if one may not.

    Args:
        graph: what one forward did.
        cone: the calls of the branch.
        shape: of its shortcut, features last.
    """
    tokens = shape[:-1]
    for node in cone:
        record = graph.nodes[node]
        if record.name not in _CALLS_OF_ONE_TOKEN:
            return None

        # A result of another shape may have joined tokens.
        shapes = [graph.values[index].shape for index in record.outputs]
        if any(result[:-1] != tokens for result in shapes):
            return None
    return True
