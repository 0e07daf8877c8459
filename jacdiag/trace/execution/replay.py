"""Run a module of a model again, with one value replaced, up to another.

A *segment* is the function from one value of the record to another. It is evaluated by running the
model's own code again, of a module call that holds all of it or of a few that do so together
(`routes`). The value is replaced right after the call that made it, or among the module's
arguments, and the run is stopped where the other value is known. Calls are identified by function,
source line and occurrence within the module call, so that code whose number of calls changes
(routing) is still met at the right place; a mismatch raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jacdiag.errors import TraceError
from jacdiag.trace.discovery.residual import Site
from jacdiag.trace.execution.module_call import Call
from jacdiag.trace.execution.plain_mode import first_reader, modules_with_functions, plain_run
from jacdiag.trace.execution.precision import Precision, Raisings
from jacdiag.trace.execution.rng_state import RandomState, borrowed
from jacdiag.trace.execution.routes import Endpoint, Routes, is_inside
from jacdiag.trace.execution.skeleton import Skeleton
from jacdiag.trace.execution.tap import SinkReached, Spot, Tap, Visit, Where
from jacdiag.trace.graph.graph import CallKey, Graph


class _LegRun(NamedTuple):
    """A leg of a route, with its places as the run of its module call meets them."""

    invocation: int
    source: Spot
    sink: Spot


@dataclass
class Replayer:
    """Makes segments of one recorded model, and entire runs with taps."""

    skeleton: Skeleton
    graph: Graph
    dtype: torch.dtype
    root: Call
    calls: dict[int, Call] = field(default_factory=dict)
    # of calls, where the model draws random numbers
    starts: dict[int, RandomState] = field(default_factory=dict)
    raisings: Raisings = field(default_factory=Raisings)

    @cached_property
    def with_functions(self) -> set[str]:
        """Names of the modules in whose run a custom autograd.Function makes a call."""
        return modules_with_functions(self.graph)

    @cached_property
    def with_modules_from_outside(self) -> set[str]:
        """Modules that call modules which are registered elsewhere.

        Those come as arguments, or in closures.
        """
        names: set[str] = set()
        for invocation in self.graph.invocations:
            for path in self.graph.paths_around(invocation.index):
                # It runs inside that module, and is not registered in it.
                is_registered = is_inside(invocation.module, path)
                if not is_registered:
                    names.add(path)
        return names

    @cached_property
    def routes(self) -> Routes:
        """The module calls through which segments are run."""
        return Routes(self.graph, self.skeleton.aliases, self.with_modules_from_outside)

    # -- places ------------------------------------------------------------------------------------
    def spot(self, endpoint: Endpoint, invocation: int) -> Spot:
        """Return where a place of the record is met when the given module call is run again."""
        if endpoint.value is not None:
            return self.spot_of(endpoint.value, invocation)
        return self.spot_at(endpoint.where, endpoint.node, invocation, endpoint.position)

    def spot_of(self, value: int, invocation: int) -> Spot:
        """Return where a value is met when the given module call is run again.

        Args:
            value: index of the value.
            invocation: index of the module call.
        """
        # 1. Among the arguments of the module call.
        record = self.graph.values[value]
        maker = record.node
        if maker < self.graph.invocations[invocation].start:
            return Spot(Where.ARGUMENT, position=value, shape=record.shape)

        # 2. Inside a custom autograd.Function nothing can be replaced: the first reader after it
        # can.
        reader = None
        if self.graph.nodes[maker].function:
            reader = first_reader(self.graph, value, invocation)
        if reader is not None:
            position = self.graph.nodes[reader].operands.index(value)
            return Spot(Where.READ, *self.occurrence(reader, invocation), position, record.shape)

        # 3. As the result of a call.
        key, occurrence = self.occurrence(maker, invocation)
        return Spot(Where.RESULT, key, occurrence, record.position, record.shape)

    def spot_at(self, where: Where, node: int, invocation: int, position: int = 0) -> Spot:
        """Return a place at a call, for the run of the given module call.

        Args:
            where: what of the call.
            node: the call.
            invocation: index of the module call that is run again.
            position: among the operands or terms.
        """
        return Spot(where, *self.occurrence(node, invocation), position)

    def endpoint_of(self, site: Site) -> Endpoint:
        """Return where a site's branch ends: a term of its addition.

        A declared branch ends where it is made.

        Args:
            site: the residual sum.
        """
        if site.result is not None:
            return Endpoint.of_value(self.graph, site.result)

        # The addition need not be run: the re-run computes the term alone.
        return Endpoint(Where.TERM, site.addition, site.position)

    def end_of(self, site: Site, invocation: int) -> Spot:
        """Return where the end of a site's branch is met when a module call is run again.

        Args:
            site: the residual sum.
            invocation: index of the module call.
        """
        return self.spot(self.endpoint_of(site), invocation)

    def occurrence(self, node: int, invocation: int) -> tuple[CallKey, int]:
        """Return a call's key, and how many calls of the module call with that key come before."""
        key = self.graph.nodes[node].key
        calls = self.graph.calls_by_key[key]

        # The number is that of the run of the module call, which begins with none.
        start = self.graph.invocations[invocation].start
        count = sum(start <= other < node for other in calls)
        return key, count

    # -- runs --------------------------------------------------------------------------------------
    def whole_graph(self) -> AbstractContextManager[None]:
        """Return a context in which a graph through the model holds no raised copy of it."""
        if self.skeleton.light:
            return self.raisings.not_kept()

        # The weights themselves are what the graph keeps.
        return nullcontext()

    def between(self, owner: int, source: Endpoint, sink: Endpoint) -> Callable[[Tensor], Tensor]:
        """Return the function from one place of the record to another.

        It runs the module calls of a route again.

        Args:
            owner: index of the module call that holds all of it.
            source: where its argument takes the place of the recorded value.
            sink: where its value is met.
        """
        legs: list[_LegRun] = []
        for leg in self.routes.find(owner, source, sink, self.calls).legs:
            start = self.spot(leg.source, leg.invocation)
            end = self.spot(leg.sink, leg.invocation)
            legs.append(_LegRun(leg.invocation, start, end))
        return lambda x: self._run(legs, x)

    def segment(self, invocation: int, source: Spot, sink: Spot) -> Callable[[Tensor], Tensor]:
        """Return the function from the source's value to the sink's.

        It runs one module call again.
        """
        leg = _LegRun(invocation, source, sink)
        return lambda x: self._run([leg], x)

    def _run(self, legs: Sequence[_LegRun], x: Tensor) -> Tensor:
        """Run module calls with `x` at the source of the first; return what the last one meets.

        Args:
            legs: the module calls, each of which goes on where the one before it ends.
            x: of the shape of the value at the source.

        Raises:
            TraceError: a run does not meet its sink.
        """
        y = self._run_each(legs, x)

        # No graph leads from x to y: the model's code ran it under no_grad.
        needs_graph = x.requires_grad and torch.is_grad_enabled()
        if needs_graph and not y.requires_grad:
            return self._run_each(legs, x, grad=True)
        return y

    def _run_each(self, legs: Sequence[_LegRun], x: Tensor, grad: bool = False) -> Tensor:
        """Run module calls as `_run` does, with `grad` also what the model puts under no_grad."""
        # The model may write in place, and a leaf must not be written to.
        self.skeleton.restore()
        value = x if _expanded(x) else x.clone()

        # Nobody writes to a value between two module calls: to copy it could change its strides,
        # and with them the digits of products.
        for leg in legs:
            value = self._run_one(leg, value, grad)
        return value

    def _run_one(self, leg: _LegRun, value: Tensor, grad: bool) -> Tensor:
        """Run a module call with a value at its source; return the value at its sink."""
        invocation, source, sink = leg
        call = self.calls[invocation]

        # 1. Where the value is put in.
        met = source.where is Where.ARGUMENT
        replaced = {source.position: value} if met else None
        args, kwargs = call.arguments(replaced)

        def visit(spot: Spot, tensor: Tensor) -> Tensor:
            nonlocal met
            if spot is sink:
                raise SinkReached(tensor)
            met = True
            return value

        # 2. The run, up to the sink.
        start = self.starts.get(invocation)
        try:
            self._execute(call.module, args, kwargs, (source, sink), visit, grad, start)
        except SinkReached as reached:
            if met:
                return reached.value

        # 3. The sink was not met, or was met before the source.
        raise TraceError(
            f"a re-run of '{call.module or 'the model'}' did not meet {sink} again",
            hint="the model's control flow depends on the values; try another --seed",
        )

    def tapped(
        self,
        spots: Iterable[Spot],
        visit: Visit,
        hook: Callable[..., None] | None = None,
        replaced: Mapping[int, Tensor] | None = None,
        grad: bool = False,
    ) -> Any:
        """Run the model once with taps and return its output.

        Args:
            spots: the places that are shown.
            visit: is shown the tensor at each; what it returns takes the tensor's place.
            hook: sees (module, args, kwargs) of every module call.
            replaced: value -> tensor: inputs of the model to replace.
            grad: differentiate also what the model's code runs under no_grad.
        """
        self.skeleton.restore()
        root = self.calls.get(0, self.root)
        args, kwargs = root.arguments(replaced)
        handles = []
        try:
            if hook is not None:
                handles = [
                    module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
                    for module in self.skeleton.root.modules()
                ]
            return self._execute("", args, kwargs, spots, visit, grad, self.graph.start)
        finally:
            for handle in handles:
                handle.remove()

    def _execute(
        self,
        module: str,
        args: Any,
        kwargs: Any,
        spots: Iterable[Spot],
        visit: Visit,
        grad: bool = False,
        start: RandomState | None = None,
    ) -> Any:
        """Run a module once, with its weights in place and taps at the spots."""
        # 1. The module. One that calls other modules of the model needs the weights of all.
        part = self.skeleton.module(module)
        prefix = module
        if module in self.with_modules_from_outside:
            part, prefix = _Part(self.skeleton.root, module), ""

        # 2. The weights. The backwards of custom Functions read them as they were given to them.
        if module in self.with_functions:
            state = self.skeleton.filled_state_of(prefix, self.dtype)
        else:
            state = self.skeleton.fresh_state_of(prefix)
        names = {id(tensor): name for name, tensor in state.items()}
        precision = Precision(
            self.dtype, names, self.raisings, self.skeleton.valueless, self.skeleton.stored
        )

        # 3. The run.
        with ExitStack() as stack:
            stack.enter_context(plain_run())
            stack.enter_context(borrowed(start))
            if grad:
                stack.enter_context(torch.enable_grad())  # also puts the mode back
            stack.enter_context(Tap(precision, spots, visit, grad))
            if isinstance(part, _Part):
                state = {f"model.{name}": tensor for name, tensor in state.items()}
            return torch.func.functional_call(part, state, args, kwargs, strict=False)

    def capture(
        self, invocations: set[int], values: dict[int, Spot], terms: dict[Any, Spot]
    ) -> tuple[Any, dict[Any, Tensor]]:
        """Run the model again; take a snapshot of module calls and keep values.

        Args:
            invocations: the module calls, whose arguments are kept in `calls`.
            values: where each value is met that is kept.
            terms: where each term is met that is kept, by any key.

        Returns:
            The model's output, to be compared with the first run's, and the tensors by key of
            `values` and `terms`.
        """
        graph = self.graph
        mutated = {value.index for value in graph.values if value.mutated}
        keys = {id(spot): key for key, spot in [*values.items(), *terms.items()]}
        tensors: dict[Any, Tensor] = {}
        count = 0

        # 1. Keep what is met. A tensor that is written to later has to be copied.
        def visit(spot: Spot, tensor: Tensor) -> Tensor:
            key = keys[id(spot)]
            may_be_written_to = key not in values or key in mutated
            tensors[key] = tensor.clone() if may_be_written_to else tensor
            return tensor

        # 2. Keep the arguments of module calls, numbered as in the record.
        def hook(_module: Any, args: Any, kwargs: Any) -> None:
            nonlocal count
            index = count
            count += 1
            if index not in invocations:
                return
            if graph.start is not None:
                self.starts[index] = RandomState.now()
            record = graph.invocations[index]
            with torch._C.DisableTorchFunction():
                self.calls[index] = Call.take(
                    record.module, args, kwargs, record.arguments, mutated
                )

        with torch.no_grad():
            output = self.tapped([*values.values(), *terms.values()], visit, hook)
        return output, tensors


class _Part(nn.Module):
    """Calls a submodule of a model, with the weights of the entire model in place."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model = model
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the submodule returns."""
        return self.model.get_submodule(self.name)(*args, **kwargs)


def _expanded(x: Tensor) -> bool:
    """Return whether elements share memory.

    Nobody writes to such a tensor, and products of a copy of it may round differently.
    """
    return any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))
