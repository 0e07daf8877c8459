"""Run a module of a model again, with one value replaced, up to another.

A *segment* is the function from one value of the record to another. It is evaluated by running the
model's own code again, of the innermost module call that holds all of it, with the value replaced
right after the call that made it (or among the module's arguments) and stopped where the other
value is known. Calls are identified by function, source line and occurrence within the module call,
so that code whose number of calls changes (routing) is still met at the right place; a mismatch
raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from jacdiag.errors import TraceError
from jacdiag.trace.discovery.residual import Site
from jacdiag.trace.execution.module_call import Call
from jacdiag.trace.execution.plain_mode import first_reader, modules_with_functions, plain_run
from jacdiag.trace.execution.precision import Precision, Raisings
from jacdiag.trace.execution.rng_state import RandomState, borrowed
from jacdiag.trace.execution.skeleton import Skeleton
from jacdiag.trace.execution.tap import SinkReached, Spot, Tap, Visit, Where
from jacdiag.trace.graph.graph import CallKey, Graph


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
                is_registered = _is_inside(invocation.module, path)
                if not is_registered:
                    names.add(path)
        return names

    # -- places ------------------------------------------------------------------------------------
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
            position: among the operands or terms. Of a result, the first one is met.
        """
        if where is Where.RESULT:
            position = self._position_of_result(node)
        return Spot(where, *self.occurrence(node, invocation), position)

    def _position_of_result(self, node: int) -> int:
        """Return the position of a call's first result; of what it wrote to, if it returns none.

        `y[:, 1:] = z` returns nothing.
        """
        outputs = self.graph.nodes[node].outputs
        if not outputs:
            return 0

        # What a call wrote to has a position below 0.
        positions = [self.graph.values[output].position for output in outputs]
        returned = [position for position in positions if position >= 0]
        if returned:
            return min(returned)
        return positions[0]

    def end_of(self, site: Site, invocation: int) -> Spot:
        """Return where a site's branch is met: as a term of its addition.

        A declared branch is met where it is made.

        Args:
            site: the residual sum.
            invocation: index of the module call that is run again.
        """
        if site.result is not None:
            return self.spot_of(site.result, invocation)

        # The addition need not be run: the re-run computes the term alone.
        return self.spot_at(Where.TERM, site.addition, invocation, site.position)

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

    def segment(self, invocation: int, source: Spot, sink: Spot) -> Callable[[Tensor], Tensor]:
        """Return the function from the source's value to the sink's.

        It runs one module call again.
        """
        return lambda x: self.run(invocation, source, x, sink)

    def run(self, invocation: int, source: Spot, x: Tensor, sink: Spot) -> Tensor:
        """Run a module call with `x` at `source` and return the value at `sink`.

        Args:
            invocation: index of the module call.
            source: where `x` takes the place of the recorded value.
            x: of the shape of that value.
            sink: where the run ends.

        Raises:
            TraceError: the run does not meet the sink.
        """
        y = self._run(invocation, source, x, sink)

        # No graph leads from x to y: the model's code ran it under no_grad.
        needs_graph = x.requires_grad and torch.is_grad_enabled()
        if needs_graph and not y.requires_grad:
            return self._run(invocation, source, x, sink, grad=True)
        return y

    def _run(
        self, invocation: int, source: Spot, x: Tensor, sink: Spot, grad: bool = False
    ) -> Tensor:
        """Run a module call as `run` does, with `grad` also what the model puts under no_grad."""
        # 1. The value to put in. The model may write in place, and a leaf must not be written to.
        call = self.calls[invocation]
        value = x if _expanded(x) else x.clone()
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
        self.skeleton.restore()
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


def _is_inside(module: str, path: str) -> bool:
    """Return whether a module is another one or lies inside it, by name; all lie in the model."""
    # The model itself has no name.
    if not path:
        return True
    return f"{module}.".startswith(f"{path}.")


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
