"""What one forward did, as data: values, the calls that made them, the modules they ran in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch

from jacdiag.trace.execution.rng_state import RandomState
from jacdiag.trace.graph.additions import Term
from jacdiag.trace.graph.arguments import Arguments
from jacdiag.trace.graph.ops import CUTS

INPUT, STATE, CONSTANT = -1, -2, -3
CallKey = tuple[str, str, int]


@dataclass(slots=True)
class Value:
    """One version of one tensor.

    Attributes:
        node: the call that made it, or INPUT, STATE, CONSTANT.
        position: among the call's results; negative (-1 - k) for an argument that was written to
            and not returned.
        live: it depends on the model's input.
        from_state: it depends on parameters or buffers.
        routed: it is an index or a mask that was computed from live floats.
        mutated: its memory was written to later.
        read_by_python: the model's code read numbers of it, which the record does not follow.
        consumers: the calls that read it.
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
    read_by_python: bool = False
    consumers: list[int] = field(default_factory=list)

    @property
    def is_float(self) -> bool:
        """Whether it holds real or complex floating-point numbers."""
        return self.dtype.is_floating_point or self.dtype.is_complex

    @property
    def is_differentiable(self) -> bool:
        """Whether it depends on the model's input and holds floating-point numbers."""
        return self.live and self.is_float

    @property
    def features(self) -> int | None:
        """The size of its last dimension, None for a scalar."""
        if not self.shape:
            return None

        # The last one, as in (B, T, d).
        return self.shape[-1]

    @property
    def is_weight(self) -> bool:
        """Whether it is made of parameters or buffers alone."""
        return self.from_state and not self.live


@dataclass(slots=True)
class Node:
    """One torch call: what it read (value indices), what it made, where it stood.

    Attributes:
        invocation: the module call that made it.
        terms: what it adds, None if it is no addition.
        line: "file.py:12" of the model's code, for additions.
        operands: the tensors among its arguments, in order.
        function: the custom autograd.Function whose forward made the call. Autograd does not see
            what happens there, so that no value inside can be replaced.
        added: the number that an addition adds to a tensor, 1 in `1 + weight`.
        arguments: what the call was given, without its tensors; None if the function is not torch's
            own, whatever its name.
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
    arguments: Arguments | None = None

    @property
    def operands_added(self) -> list[int]:
        """The plain operands among its terms, by value index."""
        operands = [term.operand for term in self.terms or ()]
        return [operand for operand in operands if operand is not None]

    @property
    def source_line(self) -> str:
        """The line of the model's code for an addition, else that of the call itself."""
        _, file, number = self.key
        return self.line or f"{file}:{number}"


@dataclass(slots=True)
class Invocation:
    """One call of one module: its name, the calls [start, end) it made, and the one around it.

    Attributes:
        autocast: autocast was on when it began.
    """

    index: int
    module: str
    parent: int
    start: int
    end: int = -1
    arguments: tuple[int, ...] = ()
    cls: str = ""
    outputs: tuple[int, ...] = ()
    autocast: bool = False


@dataclass
class Graph:
    """What one forward did.

    Attributes:
        foreign: where tensors came in that no recorded call made.
        unexplained: values that no recorded call made and that no module holds.
        constants_of_modules: values that modules held before the forward and after it.
        modules_written_to: names of modules whose plain attributes the forward changed.
        start: where the generators stood; None if the forward drew nothing.
    """

    nodes: list[Node]
    values: list[Value]
    invocations: list[Invocation]
    outputs: tuple[int, ...]
    used_state: set[str]
    foreign: list[str] = field(default_factory=list)
    start: RandomState | None = None
    unexplained: frozenset[int] = frozenset()
    constants_of_modules: frozenset[int] = frozenset()
    modules_written_to: frozenset[str] = frozenset()

    @cached_property
    def calls_by_key(self) -> dict[CallKey, list[int]]:
        """Node numbers by call key, ascending."""
        numbers: dict[CallKey, list[int]] = {}
        for node in self.nodes:
            numbers.setdefault(node.key, []).append(node.index)
        return numbers

    def ancestors(self, invocation: int) -> Iterator[int]:
        """Yield an invocation and those around it, innermost first; 0 is the model itself."""
        around = invocation
        while around >= 0:
            yield around
            around = self.invocations[around].parent

    def values_read(self, node: int) -> list[Value]:
        """Return the values that a call reads."""
        return [self.values[index] for index in self.nodes[node].inputs]

    def float_inputs(self, node: int) -> list[Value]:
        """Return the differentiable live values that a call reads.

        There are none if no gradient passes the call.
        """
        if self.nodes[node].name in CUTS:
            return []

        # Masks, indices and weights are left out.
        read = self.values_read(node)
        return [value for value in read if value.is_differentiable]

    def float_indices(self, node: int) -> list[int]:
        """Return the indices of the differentiable live values that a call reads."""
        return [value.index for value in self.float_inputs(node)]

    def reads_weight(self, node: int) -> bool:
        """Return whether a call reads something made of parameters or buffers alone."""
        return any(value.is_weight for value in self.values_read(node))

    def reads_stream(self, node: int) -> bool:
        """Return whether a call reads floats that depend on the model's input."""
        return any(value.is_differentiable for value in self.values_read(node))

    def live_inputs(self, node: int) -> list[int]:
        """Return the values that a call reads and that depend on the model's input."""
        return [index for index in self.nodes[node].inputs if self.values[index].live]

    def path(self, invocation: int) -> str:
        """Return the name of the module that an invocation calls."""
        return self.invocations[invocation].module

    def paths_around(self, invocation: int) -> list[str]:
        """Return the names of the modules around an invocation, its own first."""
        return [self.path(around) for around in self.ancestors(invocation)]
