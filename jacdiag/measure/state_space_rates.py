"""Time steps and decay rates of state-space layers, found by their use in the model."""

from __future__ import annotations

import re
from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn.functional import softplus

from jacdiag.devices.accelerators import in_float64
from jacdiag.records.structure import RateRecord
from jacdiag.trace import Sites
from jacdiag.trace.graph.graph import STATE, Graph, Node

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
    if sites.skeleton.stored is not None:
        return []

    # 1. Decay rates, by their names.
    params = sites.skeleton.params
    decays = [name for name in params if _DECAY.search(name)]
    records = [decay_of(name, params[name]) for name in decays]

    # 2. Time steps in the same modules, or in a module inside one of them.
    homes = {_parent(name) for name in decays}
    for name in time_step_biases(sites.graph, params):
        module = _parent(name)
        if not homes.isdisjoint((module, _parent(module))):
            records.append(time_step_of(name, params[name]))

    return records


def _parent(name: str) -> str:
    """Return the path of the module around a parameter or a module."""
    path, _, _ = name.rpartition(".")
    return path


def decay_of(name: str, logarithm: Tensor) -> RateRecord:
    """Return the record of the logarithm of decay rates."""
    rates = in_float64(logarithm.detach()).exp()
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
    steps = softplus(in_float64(bias.detach()))
    finite = steps[torch.isfinite(steps)]
    is_usual = (finite >= SHORTEST * (1 - _SLACK)) & (finite <= LONGEST * (1 + _SLACK))
    share = None
    if finite.numel():
        share = float(is_usual.double().mean())
    return RateRecord(name, "time step", *_ends(finite), share, bias.numel() - finite.numel())


def _ends(values: Tensor) -> tuple[float | None, float | None]:
    """Return the least and the largest of some numbers; None twice if there are none."""
    if values.numel() == 0:
        return None, None

    return float(values.min()), float(values.max())


def time_step_biases(graph: Graph, params: Collection[str]) -> list[str]:
    """Return the vectors that are added to what enters the softplus of a time step.

    The result of such a softplus multiplies two things.

    Args:
        graph: of one recorded forward.
        params: names of the parameters.
    """
    softpluses = [node for node in graph.nodes if node.name == "softplus"]
    biases = []
    for node in softpluses:
        if _count_products(graph, node.outputs[0]) < 2:
            continue

        bias = _bias_before(graph, node.inputs[0], params)
        if bias:
            biases.append(bias)

    # A layer that is called twice has its bias once.
    return list(dict.fromkeys(biases))


def _count_products(graph: Graph, value: int) -> int:
    """Return how many calls multiply a value, by itself or in another shape."""
    waiting = [value]
    products = set()
    while waiting:
        for number in graph.values[waiting.pop()].consumers:
            node = graph.nodes[number]
            if node.name in _TIMES:
                products.add(number)
            # The same numbers in another shape.
            elif node.name in _SHAPES:
                waiting += node.outputs

    return len(products)


def _bias_before(graph: Graph, value: int, params: Collection[str]) -> str:
    """Return the vector that the last addition or linear map before a value adds, "" for none."""
    node = _last_call_before(graph, value)
    if node is None:
        return ""

    # Only an addition or a linear map adds a vector, and reads it last.
    adds = node.name in _ADDS or node.name == "linear"
    if not adds:
        return ""

    for index in reversed(node.inputs):
        name = _vector_of(graph, index)
        if name in params:
            return name

    return ""


def _last_call_before(graph: Graph, value: int) -> Node | None:
    """Return the call that made a value, before at most eight calls that only change its shape."""
    for _ in range(8):
        call = graph.values[value].node
        # An input or a weight of the model.
        if call < 0:
            return None

        node = graph.nodes[call]
        if node.name not in _SHAPES:
            return node

        value = node.inputs[0]

    return None


def _vector_of(graph: Graph, value: int) -> str:
    """Return the name of the parameter of one dimension that a value is, else "".

    The value may have another shape or type.
    """
    # 1. Go back to where it was made.
    record = graph.values[value]
    while record.node >= 0:
        node = graph.nodes[record.node]
        if node.name not in _SHAPES:
            return ""

        record = graph.values[node.inputs[0]]

    # 2. It must be a weight, with one side that is wider than 1.
    wide_sides = [size for size in record.shape if size > 1]
    if record.node != STATE or len(wide_sides) > 1:
        return ""

    return record.name
