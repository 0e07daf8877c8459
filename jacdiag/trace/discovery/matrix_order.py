"""The role of each weight matrix of a branch, from the order in which the dataflow uses them."""

from __future__ import annotations

from collections.abc import Sequence

# Roles by kind and number of matrices, in order of use.
_ROLES = {
    ("attention", 1): ["W_O"],
    ("attention", 2): ["W_QKV", "W_O"],
    ("attention", 3): ["W_Q", "W_KV", "W_O"],
    ("attention", 4): ["W_Q", "W_K", "W_V", "W_O"],
    ("mlp", 1): ["W_2"],
    ("mlp", 2): ["W_1", "W_2"],
    ("mlp", 3): ["W_gate", "W_1", "W_2"],
}


def roles_of(kind: str, products: Sequence[str]) -> dict[str, str]:
    """Return the names of parameters by role.

    Attention has W_Q, W_K, W_V and W_O for four products, W_QKV and W_O for two. An MLP has W_1 and
    W_2 for two, W_gate, W_1 and W_2 for three. Anything else is numbered in order of use, with the
    last one of an attention as W_O.

    Args:
        kind: of the sub-layer.
        products: names of the parameters of its matrix products, in order of use.

    >>> roles_of("mlp", ["up", "down"])
    {'W_1': 'up', 'W_2': 'down'}
    """
    count = len(products)
    roles = _ROLES.get((kind, count))
    if roles is None:
        roles = _numbered(kind, count)
    return dict(zip(roles, products, strict=True))


def _numbered(kind: str, count: int) -> list[str]:
    """Return roles by number, W_1 to the number of matrices."""
    roles = [f"W_{k}" for k in range(1, count + 1)]

    # Whatever else an attention has, its last product makes the output.
    if kind == "attention" and roles:
        roles[-1] = "W_O"
    return roles
