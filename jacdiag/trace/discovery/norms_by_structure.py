"""What structure tells on the meta device, without values: norms and token-wise branches, by their
operations.
"""

from __future__ import annotations

from jacdiag.trace.graph.graph import Graph
from jacdiag.trace.graph.reachability import REDUCTIONS

_ROOTS = {
    "rsqrt",
    "sqrt",
    "norm",
    "vector_norm",
    "linalg_vector_norm",
    "std",
    "std_mean",
    "pow",
    "__pow__",
}
_SCALES = {
    "mul",
    "__mul__",
    "__rmul__",
    "mul_",
    "div",
    "__truediv__",
    "div_",
    "__imul__",
    "__itruediv__",
}
_BETWEEN = {
    "add",
    "__add__",
    "sub",
    "__sub__",
    "square",
    "to",
    "float",
    "clamp",
    "clamp_min",
    "maximum",
    "mul",
    "__mul__",
}
_WISE = {
    "linear",
    "layer_norm",
    "rms_norm",
    "dropout",
    "relu",
    "gelu",
    "silu",
    "tanh",
    "sigmoid",
    "softplus",
    "elu",
    "leaky_relu",
    "mish",
    "relu6",
    "hardswish",
    "erf",
    "exp",
    "square",
    "abs",
    "clamp",
    "where",
    "chunk",
    "split",
    "cat",
    "__getitem__",
    "to",
    "float",
    "type",
    "contiguous",
    "clone",
    "type_as",
    "neg",
    "__neg__",
    "sub",
    "__sub__",
    "add",
    "__add__",
    "__radd__",
    "add_",
    "__iadd__",
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "glu",
    "rsub",
    "__rsub__",
    "addcmul",
    "half",
    "double",
    "bfloat16",
}


def looks_like_norm(graph: Graph, node: int) -> tuple[bool, bool]:
    """Whether a call scales its operand by a root of a mean, one number per token; and whether it
    was centred.
    """
    record = graph.nodes[node]
    read = [
        graph.values[v] for v in record.inputs if graph.values[v].live and graph.values[v].is_float
    ]
    shapes = sorted((v.shape for v in read), key=lambda shape: shape[-1:])
    if record.name not in _SCALES or len(read) != 2 or shapes[0] != (*shapes[1][:-1], 1):
        return False, False
    names: set[str] = set()
    stack = [v.index for v in read]
    for _ in range(12):  # the statistics are a few calls away
        made = {graph.values[v].node for v in stack if graph.values[v].node >= 0}
        names |= {graph.nodes[n].name for n in made}
        stack = [
            v
            for n in made
            for v in graph.nodes[n].inputs
            if graph.values[v].live and graph.nodes[n].name in REDUCTIONS | _ROOTS | _BETWEEN
        ]
    return bool(names & REDUCTIONS) and bool(names & _ROOTS), any("sub" in name for name in names)


def looks_token_wise(graph: Graph, cone: tuple[int, ...], shape: tuple[int, ...]) -> bool | None:
    """Whether a branch treats tokens one by one: True if every call does, None if a call leaves it
    open.
    """
    for node in cone:
        record = graph.nodes[node]
        statistic = record.name in REDUCTIONS | _ROOTS | {"reciprocal"}
        kept = all(graph.values[v].shape[:-1] == shape[:-1] for v in record.outputs)
        if not kept or not (record.name in _WISE | _SCALES or statistic):
            return None
    return True
