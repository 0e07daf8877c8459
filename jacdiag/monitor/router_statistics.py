"""Statistics of the routers of a mixture of experts: entropy, and the load of each expert."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from jacdiag.devices.accelerators import in_float64
from jacdiag.trace import Sites
from jacdiag.trace.execution.tap import Spot, Where
from jacdiag.trace.graph.graph import Graph
from jacdiag.trace.graph.ops import PRODUCTS

CHOICES = frozenset({"topk", "argmax"})
_STEPS = 12  # calls between the router's product and the choice: a softmax, a bias, a mask, a cast


@dataclass(frozen=True, kw_only=True)
class RouterCalls:
    """Where a router's logits and its choice are in a record.

    Attributes:
        product: the call that computes the logits.
        choice: the call that picks experts.
        experts: how many there are.
        chosen: how many a token goes to.
    """

    product: int
    choice: int
    experts: int
    chosen: int


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What a router did with the tokens of the probe.

    Attributes:
        entropy: of the softmax of its logits, the mean over tokens, as a share of log(experts): 1
            is no preference, 0 is certainty.
        load: for each expert, the share of all choices that fell on it; the sum is 1.
    """

    entropy: float
    load: list[float]

    @property
    def unused(self) -> int:
        """How many experts got no token of the probe."""
        return sum(share == 0 for share in self.load)

    @property
    def imbalance(self) -> float:
        """The largest load over the mean one: 1 is even, the number of experts is all on one."""
        return max(self.load) * len(self.load)


def routing_of(sites: Sites) -> dict[str, Routing]:
    """Measure the routers of the sub-layers, by one more run of the model on the probe.

    Args:
        sites: what was found in the model.

    Returns:
        Sub-layer -> what its router did; a sub-layer without a choice among experts is not in it.
    """
    # 1. Find the routers.
    routers: dict[str, RouterCalls] = {}
    for site, raw in zip(sites, sites.raw, strict=True):
        if site.kind == "attention":
            continue
        calls = router_calls(sites.graph, set(raw.cone))
        if calls is not None:
            routers[site.name] = calls
    if not routers:
        return {}

    # 2. Take logits and scores while the model's own code runs.
    role_of: dict[Spot, tuple[str, str]] = {}
    for name, calls in routers.items():
        role_of[sites.replayer.spot_at(Where.RESULT, calls.product, 0)] = (name, "logits")
        role_of[sites.replayer.spot_at(Where.OPERAND, calls.choice, 0)] = (name, "scores")
    tensors: dict[tuple[str, str], Tensor] = {}

    def take(spot: Spot, tensor: Tensor) -> Tensor:
        tensors[role_of[spot]] = tensor
        return tensor

    with torch.no_grad():
        sites.replayer.tapped(list(role_of), take)

    # 3. Count the choices.
    routing: dict[str, Routing] = {}
    for name, calls in routers.items():
        logits = tensors.get((name, "logits"))
        scores = tensors.get((name, "scores"))
        if logits is not None and scores is not None:
            routing[name] = _count_choices(logits, scores, calls.chosen)
    return routing


def router_calls(graph: Graph, cone: set[int]) -> RouterCalls | None:
    """Find the choice among experts in a branch, and the product that computes its scores.

    A choice is a top-k or an argmax over the last dimension of what a product of the branch has
    computed, with nothing between that changes the number of columns. Of several choices, as in
    routing by groups of experts, the last counts.

    Args:
        graph: of the model.
        cone: the calls of the branch through which gradients pass. A choice that is only used as an
            index is none of them, but runs among them.

    Returns:
        None if the branch has no such choice.
    """
    last, first = max(cone), min(cone)
    for index in range(last, first, -1):
        calls = _calls_of_choice(graph, index)
        # Scores of another branch would make the choice somebody else's.
        if calls is not None and calls.product in cone:
            return calls
    return None


def _calls_of_choice(graph: Graph, index: int) -> RouterCalls | None:
    """Return a call as the choice of a router; None if it is none."""
    # 1. A choice by scores, among two or more.
    node = graph.nodes[index]
    if node.name not in CHOICES or not node.operands:
        return None
    scores = graph.values[node.operands[0]]
    result = graph.values[node.outputs[0]]
    if not scores.shape or not scores.is_float:
        return None
    experts = scores.shape[-1]
    if experts < 2:
        return None

    # 2. In the last dimension.
    if node.name == "topk":
        chosen = result.shape[-1]
        is_over_last = result.shape[:-1] == scores.shape[:-1]
    else:
        chosen = 1
        is_over_last = math.prod(result.shape) == math.prod(scores.shape[:-1])
    if not is_over_last:
        return None

    # 3. The product that the scores come from.
    product = _product_before(graph, node.operands[0], experts)
    if product is None:
        return None
    return RouterCalls(product=product, choice=index, experts=experts, chosen=chosen)


def _producers_of(graph: Graph, values: Iterable[int], columns: int) -> set[int]:
    """Return the calls that have computed those of the values that have as many columns."""
    producers: set[int] = set()
    for index in values:
        value = graph.values[index]
        has_columns = value.shape[-1:] == (columns,)
        is_input = value.node < 0
        if has_columns and not is_input:
            producers.add(value.node)
    return producers


def _product_before(graph: Graph, value: int, columns: int) -> int | None:
    """Return the nearest product that a value comes from.

    All values on the way to it have to have as many columns.
    """
    frontier = [value]
    for _ in range(_STEPS):
        # 1. Products among the calls that have computed these values.
        producers = _producers_of(graph, frontier, columns)
        products = [call for call in producers if graph.nodes[call].name in PRODUCTS]
        if products:
            return max(products)

        # 2. Else what they were computed from.
        frontier = []
        for call in producers:
            frontier.extend(value.index for value in graph.float_inputs(call))
    return None


def _count_choices(logits: Tensor, scores: Tensor, chosen: int) -> Routing:
    """Count the choices by the scores, and take the entropy of the logits."""
    # 1. The entropy of each token, as a share of that of no preference.
    experts = scores.shape[-1]
    probabilities = logits.detach().float().softmax(-1)
    entropy = torch.special.entr(probabilities).sum(-1).mean() / math.log(experts)

    # 2. The load of each expert.
    picked = scores.detach().topk(chosen, dim=-1).indices.flatten()
    load = in_float64(torch.bincount(picked, minlength=experts)) / picked.numel()
    return Routing(entropy=float(entropy), load=load.tolist())
