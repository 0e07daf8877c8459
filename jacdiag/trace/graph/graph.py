"""What one forward did, as data: values, the calls that made them, the modules they ran in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch

from jacdiag.trace.execution.rng_state import RandomState
from jacdiag.trace.graph.additions import Term

INPUT, STATE, CONSTANT = -1, -2, -3
CallKey = tuple[str, str, int]

# Calls through which no gradient passes.
CUTS = {
    "detach",
    "detach_",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "rand_like",
    "randn_like",
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
    "new_tensor",
    "bernoulli",
    "sign",
    "argmax",
    "argmin",
    "isnan",
    "isinf",
    "isfinite",
}


@dataclass(slots=True)
class Value:
    """One version of one tensor.

    `node` is the call that made it, or INPUT, STATE, CONSTANT; `position` tells it from the call's
    other results, and is negative (-1 - k) for an argument that was written to and not returned.
    `live` values depend on the model's input; a `routed` one is an index or a mask that was
    computed from live floats.
    """

    index: int
    node: int
    position: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str = ""
    live: bool = False
    from_state: bool = False
    routed: bool = False
    mutated: bool = False
    consumers: list[int] = field(default_factory=list)

    @property
    def is_float(self) -> bool:
        return self.dtype.is_floating_point or self.dtype.is_complex


@dataclass(slots=True)
class Node:
    """One torch call: what it read (value indices), what it made, where it stood.

    `operands` are the tensors among its arguments, in order. `function` names the custom
    autograd.Function whose forward made the call: autograd does not see what happens there, so that
    no value inside can be replaced. `added` is the number that an addition adds to a tensor, 1 in
    `1 + weight`.
    """

    index: int
    name: str
    key: CallKey
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    invocation: int
    terms: tuple[Term, ...] | None = None
    line: str = ""
    operands: tuple[int, ...] = ()
    function: str = ""
    added: float = 0.0


@dataclass(slots=True)
class Invocation:
    """One call of one module: its name, the calls [start, end) it made, and the call that made
    it.
    """

    index: int
    module: str
    parent: int
    start: int
    end: int = -1
    arguments: tuple[int, ...] = ()
    cls: str = ""
    outputs: tuple[int, ...] = ()


@dataclass
class Graph:
    """What one forward did. `foreign` says where tensors came in that no recorded call made."""

    nodes: list[Node]
    values: list[Value]
    invocations: list[Invocation]
    outputs: tuple[int, ...]
    used_state: set[str]
    foreign: list[str] = field(default_factory=list)
    start: RandomState | None = None  # where the generators stood; None if the forward drew nothing

    @cached_property
    def calls_by_key(self) -> dict[CallKey, list[int]]:
        """Node numbers by call key, ascending."""
        found: dict[CallKey, list[int]] = {}
        for node in self.nodes:
            found.setdefault(node.key, []).append(node.index)
        return found

    def ancestors(self, invocation: int) -> Iterator[int]:
        """Yields an invocation and those around it, innermost first; 0 is the whole model."""
        while invocation >= 0:
            yield invocation
            invocation = self.invocations[invocation].parent

    def float_inputs(self, node: int) -> Iterator[Value]:
        """Yields the differentiable live values that a call reads."""
        if self.nodes[node].name in CUTS:
            return
        for index in self.nodes[node].inputs:
            value = self.values[index]
            if value.live and value.is_float:
                yield value

    def path(self, invocation: int) -> str:
        return self.invocations[invocation].module
