"""Norms and token-wise branches by their operations alone, for models without values."""

from __future__ import annotations

from jacdiag.trace.graph.graph import Graph
from jacdiag.trace.graph.ops import REDUCTIONS, ROOTS, SCALINGS, TOKEN_WISE, WITHIN_A_NORM

_MOST_STEPS = 12  # the statistics of a norm are a few calls away


def looks_like_norm(graph: Graph, node: int) -> tuple[bool, bool]:
    """Return whether a call is the last one of a norm, and whether that norm is centred.

    Such a call scales its operand by a root of a mean, one number per token.
    """
    record = graph.nodes[node]
    read = [graph.values[v] for v in record.inputs]
    read = [value for value in read if value.live and value.is_float]
    if record.name not in SCALINGS or len(read) != 2:
        return False, False
    small, large = sorted((value.shape for value in read), key=lambda shape: shape[-1:])
    if small != (*large[:-1], 1):
        return False, False
    names = _names_before(graph, [value.index for value in read])
    is_norm = bool(names & REDUCTIONS) and bool(names & ROOTS)
    return is_norm, any("sub" in name for name in names)


def _names_before(graph: Graph, values: list[int]) -> set[str]:
    """Return the names of the calls that lead to values by the steps of a norm."""
    names: set[str] = set()
    steps_of_a_norm = REDUCTIONS | ROOTS | WITHIN_A_NORM
    for _ in range(_MOST_STEPS):
        makers = {graph.values[v].node for v in values if graph.values[v].node >= 0}
        names |= {graph.nodes[n].name for n in makers}
        values = []
        for n in makers:
            if graph.nodes[n].name in steps_of_a_norm:
                values += [v for v in graph.nodes[n].inputs if graph.values[v].live]
    return names


def looks_token_wise(graph: Graph, cone: tuple[int, ...], shape: tuple[int, ...]) -> bool | None:
    """Return True if every call of a branch treats tokens one by one, None if one may not."""
    token_wise = TOKEN_WISE | SCALINGS | REDUCTIONS | ROOTS | {"reciprocal"}
    for node in cone:
        record = graph.nodes[node]
        keeps_tokens = all(graph.values[v].shape[:-1] == shape[:-1] for v in record.outputs)
        if not keeps_tokens or record.name not in token_wise:
            return None
    return True
