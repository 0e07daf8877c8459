"""Walks through a record: what is a matrix product, what reaches what, and what lies between."""

from __future__ import annotations

import math
from collections.abc import Iterable

from jacdiag.trace.graph.graph import Graph

PRODUCTS = frozenset(
    {
        "linear",
        "matmul",
        "mm",
        "bmm",
        "addmm",
        "addmm_",
        "baddbmm",
        "baddbmm_",
        "einsum",
        "__matmul__",
        "__rmatmul__",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "bilinear",
        "multi_head_attention_forward",
        "_grouped_mm",
        "grouped_mm",
        "_scaled_mm",
        "tensordot",
        "inner",
        "mv",
        "addmv",
        "gru_cell",
        "lstm_cell",
        "rnn_tanh_cell",
        "rnn_relu_cell",
        "gru",
        "lstm",
        "chain_matmul",
        "multi_dot",
    }
)
# Mix positions without any parameter, as attention would: a branch of their own.
MIXERS = frozenset(f"fft_{kind}fft{n}" for kind in ("", "i", "r", "ir") for n in ("", "2", "n"))
REDUCTIONS = frozenset(
    "mean var std sum norm vector_norm linalg_vector_norm var_mean std_mean".split()
)


class Walks:
    """Questions about one graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def is_product(self, node: int) -> bool:
        """Whether a call is a matrix product of the stream with something made of parameters
        alone.
        """
        record = self.graph.nodes[node]
        if record.name in MIXERS:
            return True
        if record.name not in PRODUCTS:
            return False
        values = [self.graph.values[v] for v in record.inputs]
        return any(v.from_state and not v.live for v in values) and any(
            v.live and v.is_float for v in values
        )

    def reaches(
        self,
        ancestor: int,
        values: Iterable[int],
        *,
        through_products: bool,
        statistics: bool = True,
    ) -> bool:
        """Whether a differentiable path leads from a value to one of `values` (optionally with no
        product on it).

        Without `statistics`, paths through a mean or norm of one number per token do not count: no
        shortcut fits there.
        """
        floor = self.graph.values[ancestor].node
        shape = self.graph.values[ancestor].shape
        least = -1 if statistics or not shape else math.prod(shape) // max(1, shape[-1])
        stack, seen = list(values), set()
        while stack:
            index = stack.pop()
            if index == ancestor:
                return True
            node = self.graph.values[index].node
            if node <= floor or node < 0 or node in seen:
                continue
            if (
                self.graph.nodes[node].name in REDUCTIONS
                and math.prod(self.graph.values[index].shape) <= least
            ):
                continue
            seen.add(node)
            if not through_products and self.is_product(node):
                continue
            stack.extend(v.index for v in self.graph.float_inputs(node))
        return False

    def cone(self, ancestor: int, values: Iterable[int]) -> tuple[int, ...]:
        """Returns the calls that depend on `ancestor` and lead to `values`, ascending."""
        floor = self.graph.values[ancestor].node
        behind: set[int] = set()
        stack = list(values)
        while stack:
            node = self.graph.values[stack.pop()].node
            if node > floor and node >= 0 and node not in behind:
                behind.add(node)
                stack.extend(v.index for v in self.graph.float_inputs(node))
        live = {ancestor}
        cone = []
        for node in sorted(behind):
            if any(v.index in live for v in self.graph.float_inputs(node)):
                cone.append(node)
                live.update(self.graph.nodes[node].outputs)
        return tuple(cone)
