"""Time steps and decay rates of state-space layers, found by their use in the model."""

from __future__ import annotations

import re
from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn.functional import softplus

from jacdiag.records.structure import RateRecord
from jacdiag.trace import Sites
from jacdiag.trace.graph.graph import STATE, Graph

# state-spaces/mamba: dt is log-uniform between dt_min = 0.001 and dt_max = 0.1, and at least
# dt_init_floor = 0.0001.
SHORTEST, LONGEST = 1e-4, 0.1
_SLACK = 1e-3  # of float32 through softplus and its inverse
_DECAY = re.compile(r"(^|\.)A_?logs?$")
_TIMES = {"mul", "__mul__", "__rmul__", "mul_", "multiply", "einsum", "matmul", "__matmul__", "bmm"}
_ADDS = {"add", "__add__", "__radd__", "add_", "__iadd__"}
_SHAPES = {
    "__getitem__",
    "unsqueeze",
    "squeeze",
    "transpose",
    "permute",
    "view",
    "reshape",
    "to",
    "float",
    "expand",
    "contiguous",
    "type",
    "clamp",
    "clamp_",
    "clip",
    "chunk",
    "split",
    "repeat_interleave",
    "repeat",
}


def rates_of(sites: Sites) -> list[RateRecord]:
    """Return the records of the parameters that set time steps and decay rates.

    A time step is the softplus of a sum with a bias, in a module that has decay rates too. It
    multiplies two things: the rates and the input. In a gated delta rule it multiplies the rates
    alone, and no published range is known.

    Args:
        sites: of one recorded forward.
    """
    params = sites.skeleton.params
    if sites.skeleton.stored is not None:
        return []
    decays = [name for name in params if _DECAY.search(name)]
    records = [decay_of(name, params[name]) for name in decays]
    homes = {name.rpartition(".")[0] for name in decays}
    for name in time_step_biases(sites.graph, params):
        parent = name.rpartition(".")[0]
        if parent in homes or parent.rpartition(".")[0] in homes:
            records.append(time_step_of(name, params[name]))
    return records


def decay_of(name: str, logarithm: Tensor) -> RateRecord:
    """Return the record of the logarithm of decay rates."""
    rates = logarithm.detach().double().exp()
    finite = rates[torch.isfinite(rates)]
    broken = int((~torch.isfinite(logarithm)).sum())
    return RateRecord(name, "decay", *_ends(finite), not_finite=broken)


def time_step_of(name: str, bias: Tensor) -> RateRecord:
    """Return the record of a bias of time steps.

    Example:
        >>> record = time_step_of("dt_bias", torch.zeros(4))
        >>> round(record.least, 3), record.usual
        (0.693, 0.0)
    """
    steps = softplus(bias.detach().double())
    finite = steps[torch.isfinite(steps)]
    usual = (finite >= SHORTEST * (1 - _SLACK)) & (finite <= LONGEST * (1 + _SLACK))
    share = float(usual.double().mean()) if finite.numel() else None
    return RateRecord(name, "time step", *_ends(finite), share, bias.numel() - finite.numel())


def _ends(values: Tensor) -> tuple[float | None, float | None]:
    if not values.numel():
        return None, None
    return float(values.min()), float(values.max())


def time_step_biases(graph: Graph, params: Collection[str]) -> list[str]:
    """Return the vectors that are added to what enters the softplus of a time step.

    The result of such a softplus multiplies two things.
    """
    biases: dict[str, None] = {}
    for node in graph.nodes:
        if node.name != "softplus" or _count_products(graph, node.outputs[0]) < 2:
            continue
        bias = _bias_before(graph, node.inputs[0], params)
        if bias:
            biases[bias] = None
    return list(biases)


def _count_products(graph: Graph, value: int) -> int:
    """Return how many calls multiply a value, by itself or in another shape."""
    waiting, products = [value], set()
    while waiting:
        for number in graph.values[waiting.pop()].consumers:
            node = graph.nodes[number]
            if node.name in _TIMES:
                products.add(number)
            elif node.name in _SHAPES:
                waiting += node.outputs
    return len(products)


def _bias_before(graph: Graph, value: int, params: Collection[str]) -> str:
    """Return the vector that the last addition or linear map before a value adds, "" for none."""
    # 1. Go back over at most eight calls that only change the shape.
    for _ in range(8):
        made_by = graph.values[value].node
        if made_by < 0:
            return ""
        node = graph.nodes[made_by]
        if node.name not in _SHAPES:
            break
        value = node.inputs[0]
    else:
        return ""

    # 2. The last vector that the call before them adds.
    if node.name not in _ADDS and node.name != "linear":
        return ""
    for index in reversed(node.inputs):
        name = _vector_of(graph, index)
        if name in params:
            return name
    return ""


def _vector_of(graph: Graph, value: int) -> str:
    """Return the name of the parameter of one dimension that a value is, else "".

    The value may have another shape or type.
    """
    while graph.values[value].node >= 0 and graph.nodes[graph.values[value].node].name in _SHAPES:
        value = graph.nodes[graph.values[value].node].inputs[0]
    record = graph.values[value]
    is_vector = len([size for size in record.shape if size > 1]) <= 1
    return record.name if record.node == STATE and is_vector else ""
