"""Which weight matrix plays which part in a branch, from the order in which the dataflow uses
them.
"""

from __future__ import annotations

from collections.abc import Sequence

ACTIVATIONS = {
    "relu",
    "gelu",
    "silu",
    "tanh",
    "sigmoid",
    "relu6",
    "leaky_relu",
    "elu",
    "selu",
    "mish",
    "softplus",
    "hardswish",
    "quick_gelu",
    "erf",
    "celu",
    "hardtanh",
    "prelu",
}


def roles_of(kind: str, products: Sequence[str]) -> dict[str, str]:
    """Maps roles to parameter names.

    Attention: W_Q, W_K, W_V and W_O for four products, W_QKV and W_O for two. MLP: W_1 and W_2 for
    two, W_gate, W_1 and W_2 for three. Anything else is numbered in order of use, with the last as
    W_O (attention) or W_2 (MLP).

    >>> roles_of("mlp", ["up", "down"])
    {'W_1': 'up', 'W_2': 'down'}
    """
    count = len(products)
    if not count:
        return {}
    if kind == "attention":
        known = {
            4: ["W_Q", "W_K", "W_V", "W_O"],
            2: ["W_QKV", "W_O"],
            3: ["W_Q", "W_KV", "W_O"],
            1: ["W_O"],
        }
        names = known.get(count) or [*(f"W_{k}" for k in range(1, count)), "W_O"]
    elif kind == "mlp":
        known = {2: ["W_1", "W_2"], 3: ["W_gate", "W_1", "W_2"], 1: ["W_2"]}
        names = known.get(count) or [f"W_{k}" for k in range(1, count + 1)]
    else:
        names = [f"W_{k}" for k in range(1, count + 1)]
    return dict(zip(names, products, strict=True))
