"""Find what no gradient reaches, branches that are exactly zero, and the cause of each.

A cause is proved by a trial. For calls without a derivative, the trial is a run in which the input
has a gradient and all that leads from it to the other end has none after these calls. For
parameters, the trial is a run in which they hold other values and the gradient arrives. If neither
trial succeeds, the cause is unknown.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from jacdiag.errors import JacdiagError
from jacdiag.measure.gradients import GradientProfile, loss_input, run_backward, stream_values
from jacdiag.records.report import Interval, SublayerRecord
from jacdiag.records.signal_propagation import NEGLIGIBLE, DeadBranch, DeadPath
from jacdiag.trace import Sites, Sublayer
from jacdiag.trace.discovery.blocking_calls import find_blocking_calls, name_call
from jacdiag.trace.discovery.coverage import parameters_of
from jacdiag.trace.discovery.detached import cut_off_parts
from jacdiag.trace.discovery.residual import Site
from jacdiag.trace.execution.skeleton import Skeleton
from jacdiag.trace.execution.tap import Spot, Where
from jacdiag.trace.execution.tensors import collect, collect_deep, is_float
from jacdiag.trace.graph.graph import STATE, Graph
from jacdiag.trace.graph.ops import FLAT

_PACKAGE = __file__.rsplit("/", 2)[0]
_PLUMBING = (torch.__path__[0], f"{_PACKAGE}/trace/", f"{_PACKAGE}/measure/")
_MOST = 12  # parameters that are tried one by one
# Products outside all sub-layers for which the cutting calls are searched, each by a run.
_MOST_UNCOVERED = 24
# Weight and bias of what computes a gate outside a branch. Each trial is a run of the model.
_GATES = 2
Alive = Callable[[], bool]


def find_dead_paths(
    sites: Sites, token_ids: Tensor | None, profile: GradientProfile, frozen: Collection[str] = ()
) -> list[DeadPath] | None:
    """Return the parts of the model that no gradient of the loss reaches.

    Args:
        sites: of one recorded forward.
        token_ids: targets of the loss.
        profile: of the same model.
        frozen: names of parameters that are frozen in the model that was passed.

    Returns:
        One entry for the stream below a break, one for each other sub-layer whose parameters get no
        gradient. None if the record does not show that the loss depends on the stream.
    """
    sink = loss_value(sites)
    values = stream_values(sites)
    if sink is None or not leads(sites, values[-1], sink):
        return None

    dead = _sublayers_without_gradient(sites, profile)
    paths = []

    # 1. The main stream, up to the last point that gets nothing.
    broken = _break_in(profile.norms)
    if broken is not None:
        below = _sublayers_before(sites, values, broken, dead)
        next_value = values[broken + 1] if broken + 1 < len(values) else sink
        ends = (values[broken], next_value)
        paths.append(_stream_path(sites, token_ids, profile, ends, below, frozen))
        dead -= below

    # 2. Embeddings that are cut off before the first shortcut.
    if broken is None:
        paths += _embeddings_cut_off(sites, profile, sink, frozen)

    # 3. Sub-layers after which the stream is cut off, by the calls that do it.
    by_calls = _by_cutting_calls(sites, dead, sink)
    uncut = by_calls.pop((), [])
    for calls, members in by_calls.items():
        paths.append(_cut_off(sites, members, list(calls), frozen))

    # 4. Single sub-layers.
    paths += [_branch_path(sites, token_ids, index, frozen) for index in uncut]

    # 5. Sub-layers that read zeros, so that at most their biases get a gradient.
    paths += _fed_with_zeros(sites, profile, dead, frozen)

    # 6. Matrices outside all sub-layers: the tracer sees no branch where an entire branch is
    #    detached.
    return paths + _uncovered_cut_off(sites, profile, sink, frozen)


def _sublayers_without_gradient(sites: Sites, profile: GradientProfile) -> set[int]:
    """Return the indices of the sub-layers whose parameters get no gradient."""
    gradients = profile.parameters
    dead = set()
    for index, site in enumerate(sites):
        gets_nothing = _without_gradient(site.parameters, gradients)
        if gets_nothing:
            dead.add(index)

    return dead


def _fed_with_zeros(
    sites: Sites, profile: GradientProfile, dead: Collection[int], frozen: Collection[str]
) -> list[DeadPath]:
    """Return the sub-layers that read a stream of zeros and whose matrices get no gradient.

    A norm makes its bias of the zeros, which gets a gradient. Its matrices get none.

    Args:
        sites: of one recorded forward.
        profile: of the same model.
        dead: indices of the sub-layers without any gradient, which are named already.
        frozen: names of parameters that are frozen.
    """
    # 1. The sub-layers.
    names: list[str] = []
    matrices: set[str] = set()
    outlines = sites.skeleton.outlines
    for index, site in enumerate(sites):
        is_named_already = site.nested or index in dead
        if is_named_already:
            continue

        # The gradients are known. An accelerator is waited for only to look at the stream.
        own_matrices = [name for name in site.parameters if outlines[name].dim() >= 2]
        if not _without_gradient(own_matrices, profile.parameters):
            continue

        reads_zeros = not bool(site.shortcut.any())
        if reads_zeros:
            names.append(site.name)
            matrices.update(own_matrices)
    if not names:
        return []

    # 2. All of them have one cause.
    is_frozen = matrices <= set(frozen)
    return [DeadPath(names, False, "input", frozen=is_frozen, matrices_only=True)]


def _by_cutting_calls(
    sites: Sites, indices: Iterable[int], sink: int
) -> dict[tuple[str, ...], list[int]]:
    """Return sub-layers by the calls that cut their output off from the loss.

    Sub-layers with a way that has a gradient come under the key ().

    Args:
        sites: of one recorded forward.
        indices: of the sub-layers. Nested ones, and those that do not lead to the loss, are left
            out.
        sink: value that the loss is computed from.
    """
    by_calls: dict[tuple[str, ...], list[int]] = {}
    outer = [index for index in sorted(indices) if not sites[index].nested]
    for index in outer:
        output = sites.raw[index].output
        if not leads(sites, output, sink):
            continue

        # Each costs a run of the model.
        calls = tuple(cutting_calls(sites, output, sink))
        by_calls.setdefault(calls, []).append(index)

    return by_calls


def _uncovered_cut_off(
    sites: Sites, profile: GradientProfile, sink: int, frozen: Collection[str]
) -> list[DeadPath]:
    """Return the parts outside all sub-layers that are cut off from the loss.

    Their products lead to the loss through calls without a derivative.
    """
    if profile.parameters is None:
        return []

    # 1. Group the products by the calls that cut them off.
    readers = _silent_products(sites, profile.parameters)
    by_calls = _readers_by_cutting_calls(sites, readers, sink)
    if not by_calls:
        return []

    # 2. Add the gains and biases of the same parts, unless all of a group is frozen.
    silent = {name for name, norm in profile.parameters.items() if norm == 0}
    parts = cut_off_parts(sites.graph, silent)
    paths = []
    for calls, members in by_calls.items():
        is_frozen = set(members) <= set(frozen)
        names = members
        if not is_frozen:
            names = _with_their_parts(members, parts, frozen)
        paths.append(DeadPath(names, stream=True, cause="cut", calls=list(calls), frozen=is_frozen))

    return paths


def _readers_by_cutting_calls(
    sites: Sites, readers: Mapping[int, list[str]], sink: int
) -> dict[tuple[str, ...], list[str]]:
    """Return parameters of products by the calls that cut their result off from the loss.

    Args:
        sites: of one recorded forward.
        readers: product -> the parameters that it reads. Those that do not lead to the loss, and
            those with a way that has a gradient, are left out.
        sink: value that the loss is computed from.
    """
    by_calls: dict[tuple[str, ...], list[str]] = {}
    # Each costs a run. A model has few products outside its sub-layers.
    for index in list(readers)[:_MOST_UNCOVERED]:
        result = _first_live_output(sites, index)
        if result is None or not leads(sites, result, sink):
            continue

        calls = tuple(cutting_calls(sites, result, sink))
        if calls:
            by_calls.setdefault(calls, []).extend(readers[index])

    return by_calls


def _silent_products(sites: Sites, gradients: Mapping[str, float]) -> dict[int, list[str]]:
    """Return the products that read uncovered parameters without a gradient, with their names."""
    silent = {name for name in sites.coverage.uncovered if gradients.get(name) == 0}
    readers: dict[int, list[str]] = {}
    for node in sites.graph.nodes:
        if not sites.finder.is_product(node.index):
            continue

        # Any other product has a gradient, or lies in a sub-layer.
        read = parameters_of(sites.graph, (node.index,), sites.skeleton)
        names = [name for name in read if name in silent]
        if names:
            readers[node.index] = names

    return readers


def _first_live_output(sites: Sites, node: int) -> int | None:
    """Return the first result of a call that depends on the input of the model."""
    graph = sites.graph
    for value in graph.nodes[node].outputs:
        is_live = graph.values[value].live
        if is_live:
            return value

    # All were computed from weights alone.
    return None


def _with_their_parts(
    members: Sequence[str], parts: Sequence[Sequence[str]], frozen: Collection[str]
) -> list[str]:
    """Return the trained parameters of the parts that hold some of `members`.

    These include gains and biases.
    """
    # 1. All of these parts.
    names = dict.fromkeys(members)
    for part in parts:
        holds_some = not set(members).isdisjoint(part)
        if holds_some:
            names |= dict.fromkeys(part)

    # 2. What is frozen has no gradient for another reason.
    return [name for name in names if name not in frozen]


def _embeddings_cut_off(
    sites: Sites, profile: GradientProfile, sink: int, frozen: Collection[str]
) -> list[DeadPath]:
    """Return the embeddings without a gradient that calls without a derivative cut off."""
    if profile.parameters is None:
        return []

    paths = []
    outlines = sites.skeleton.outlines
    tables = [name for name in sites.coverage.embedding if outlines[name].dim() >= 2]
    for name in tables:
        # 1. One that gets nothing, and leads to the loss.
        if profile.parameters.get(name) != 0:
            continue

        result = _first_value_made_from(sites, name)
        if result is None or not leads(sites, result, sink):
            continue

        # 2. The calls that cut it off.
        is_frozen = name in frozen
        calls = cutting_calls(sites, result, sink)
        if calls:
            path = DeadPath([name], stream=True, cause="cut", calls=calls, frozen=is_frozen)
            paths.append(path)

        # 3. A stream of zeros shows that something takes the table away.
        elif not is_frozen and _begins_with_zeros(sites):
            paths.append(DeadPath([name], stream=True, cause="unknown"))

    return paths


def _begins_with_zeros(sites: Sites) -> bool:
    """Return whether the first shortcut is zero for every token."""
    outer = [site for site in sites if not site.nested]
    return bool(outer) and not bool(outer[0].shortcut.any())


def _first_value_made_from(sites: Sites, parameter: str) -> int | None:
    """Return the first live value that a call makes from a parameter."""
    graph = sites.graph
    for node in graph.nodes:
        read = parameters_of(graph, (node.index,), sites.skeleton)
        if parameter not in read:
            continue

        # A call may read it before the input does.
        result = _first_live_output(sites, node.index)
        if result is not None:
            return result

    return None


def _cut_off(
    sites: Sites, members: Sequence[int], calls: list[str], frozen: Collection[str]
) -> DeadPath:
    """Return the dead path of sub-layers that the same calls cut off."""
    names = []
    parameters: set[str] = set()
    for index in members:
        names.append(sites[index].name)
        parameters.update(sites[index].parameters)

    is_frozen = parameters <= set(frozen)
    return DeadPath(names, stream=True, cause="cut", calls=calls, frozen=is_frozen)


def _break_in(norms: Sequence[float]) -> int | None:
    """Return the last of the leading points that have no gradient; None if the first has one."""
    # NaN is not zero.
    leading = list(takewhile(lambda norm: norm == 0, norms))
    if not leading:
        return None

    return len(leading) - 1


def _without_gradient(names: Sequence[str], gradients: Mapping[str, float] | None) -> bool:
    """Return whether none of the parameters gets a gradient, as far as it was measured."""
    if gradients is None:
        return False

    # Without one that was measured, nothing is known.
    measured = {gradients[name] for name in names if name in gradients}
    return measured == {0.0}


def _sublayers_before(
    sites: Sites, values: Sequence[int], place: int, dead: Collection[int]
) -> set[int]:
    """Return the sub-layers of the main stream up to a point.

    Those that read the last point itself are among them only if their parameters get nothing: the
    break lies after the point, and what reads it may be past the break.

    Args:
        sites: of one recorded forward.
        values: the points of the stream.
        place: of the point among them.
        dead: indices of the sub-layers whose parameters get nothing.
    """
    before: set[int] = set()
    at_the_point: set[int] = set()
    groups = [sites.streams.groups[index] for index in sites.streams.main]
    for group in groups:
        if group.shortcut in values[:place]:
            before.update(group.sites)
        # Parallel branches read one point.
        if group.shortcut == values[place]:
            at_the_point.update(group.sites)

    return before | at_the_point.intersection(dead)


def _stream_path(
    sites: Sites,
    token_ids: Tensor | None,
    profile: GradientProfile,
    ends: tuple[int, int],
    below: set[int],
    frozen: Collection[str],
) -> DeadPath:
    """Return the dead path of the main stream below a break, with its cause if it can be proved.

    Args:
        sites: of one recorded forward.
        token_ids: targets of the loss.
        profile: of the same model.
        ends: values of the stream before and after the break.
        below: indices of the sub-layers before the break.
        frozen: names of parameters that are frozen.
    """
    source, sink = ends
    path = _undescribed_stream_path(sites, profile.parameters, below, frozen)

    def alive() -> bool:
        return run_backward(sites, token_ids, [source]).norms.get(source, 0.0) > 0

    # 1. Try calls without a derivative, then parameters.
    try:
        calls = cutting_calls(sites, source, sink)
        if calls:
            return replace(path, cause="cut", calls=calls)
        zone = calls_between(sites, source, sink)
        suspects = parameters_of(sites.graph, zone, sites.skeleton)
        causes, together = reviving(sites.skeleton, suspects, alive)
    except (JacdiagError, RuntimeError):
        return path
    if not causes:
        return path

    # 2. Describe the parameters that are the cause.
    is_head = not together and all(_is_head(sites, name) for name in causes)
    return replace(
        path,
        cause="zero",
        parameters=causes,
        values=constants(sites.skeleton, causes),
        together=together,
        head=is_head,
        own_gradient=_joint_norm(causes, profile.parameters),
    )


def _undescribed_stream_path(
    sites: Sites,
    gradients: Mapping[str, float] | None,
    below: Collection[int],
    frozen: Collection[str],
) -> DeadPath:
    """Return the dead path of the main stream below a break, without a cause."""
    names = [sites[index].name for index in sorted(below)]
    inside = set(chain.from_iterable(sites[index].parameters for index in below))

    # 1. Whether the gradient reaches the parameters by another way.
    elsewhere = False
    if inside and gradients is not None:
        elsewhere = all(gradients.get(name) for name in inside)

    # 2. Whether all that is cut off is frozen.
    affected = inside.union(sites.coverage.embedding)
    is_frozen = bool(affected) and affected <= set(frozen)
    return DeadPath(names, stream=True, cause="unknown", elsewhere=elsewhere, frozen=is_frozen)


def _joint_norm(names: Sequence[str], gradients: Mapping[str, float] | None) -> float | None:
    """Return the norm of the gradient of several parameters; None unless each was measured."""
    if gradients is None:
        return None

    # A norm of some of them would be too small.
    was_measured = gradients.keys() >= set(names)
    if not was_measured:
        return None

    squares = [gradients[name] ** 2 for name in names]
    return sum(squares) ** 0.5


def _is_head(sites: Sites, name: str) -> bool:
    """Return whether a parameter is a matrix of the head."""
    if name not in sites.coverage.head:
        return False

    return sites.skeleton.outlines[name].dim() >= 2


def _branch_path(
    sites: Sites, token_ids: Tensor | None, index: int, frozen: Collection[str]
) -> DeadPath:
    """Return the dead path of one sub-layer, with its cause if it can be proved."""
    site, raw, skeleton = sites[index], sites.raw[index], sites.skeleton
    is_frozen = set(site.parameters) <= set(frozen)
    path = DeadPath([site.name], stream=False, cause="unknown", frozen=is_frozen)
    reads_zeros = not bool(site.shortcut.any())
    if reads_zeros:
        return replace(path, cause="input")

    # 1. Try calls without a derivative, then parameters.
    watched = [name for name in site.parameters if skeleton.params[name].is_floating_point()]

    def alive() -> bool:
        return any(run_backward(sites, token_ids, [], watched).parameters.values())

    try:
        calls = _calls_cutting_branch(sites, raw)
        if calls:
            return replace(path, cause="cut", calls=calls)
        causes, together = reviving(skeleton, suspects_of(sites, index), alive)
    except (JacdiagError, RuntimeError):
        return path
    if not causes:
        return path

    # 2. Describe the parameters that are the cause. A buffer has no gradient.
    learned = all(name in skeleton.params for name in causes)
    own_gradient = None
    if learned:
        own_gradient = 0.0
    return replace(
        path,
        cause="zero",
        parameters=causes,
        values=constants(skeleton, causes),
        together=together,
        own_gradient=own_gradient,
        learned=learned,
    )


def _calls_cutting_branch(sites: Sites, raw: Site) -> list[str]:
    """Return the calls that take the gradient on every way through a branch."""
    end = raw.result
    if end is None:
        end = raw.term.operand

    # A term without a value of its own cannot be looked at.
    if end is None:
        return []

    return cutting_calls(sites, raw.shortcut, end)


# -- from one value to another ---------------------------------------------
def loss_value(sites: Sites) -> int | None:
    """Return the index of the value that the loss is computed from.

    None if that value is no output of the model as it stands.
    """
    target = loss_input(sites.output)
    tensors: list[Tensor] = []
    collect_deep(sites.output, tensors)
    # The graph lists its outputs in the same order.
    for tensor, value in zip(tensors, sites.graph.outputs, strict=False):
        if tensor is target:
            return value

    return None


def leads(sites: Sites, source: int, sink: int) -> bool:
    """Return whether a value reaches another, also through calls that have no derivative."""
    if source == sink:
        return True

    return len(calls_between(sites, source, sink)) > 0


def calls_between(sites: Sites, source: int, sink: int) -> list[int]:
    """Return the calls that lead from one value to another, in ascending order.

    Calls without a derivative are among them.

    Args:
        sites: of one recorded forward.
        source: value to start from.
        sink: value to arrive at.
    """
    graph = sites.graph
    upstream = _calls_upstream(graph, sink, after=graph.values[source].node)
    # Of what leads to the sink, what the source reaches.
    reached = {source}
    between = []
    for node in sorted(upstream):
        if reached.intersection(graph.nodes[node].inputs):
            between.append(node)
            reached.update(graph.nodes[node].outputs)

    return between


def _calls_upstream(graph: Graph, sink: int, after: int) -> set[int]:
    """Return the calls that lead to a value, of those that come after a given one."""
    upstream: set[int] = set()
    stack = [sink]
    while stack:
        node = graph.values[stack.pop()].node
        # Inputs and weights of the model have negative numbers.
        is_later = node > max(after, -1)
        is_new = node not in upstream
        if is_later and is_new:
            upstream.add(node)
            stack += _live_inputs(graph, node)

    return upstream


class Cuts(TorchFunctionMode):
    """Follows what lost its gradient through a forward: tensor -> the calls that took it.

    A call takes the gradient if it reads a float that has one, or had one, and returns a float that
    has none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lost: dict[int, tuple[weakref.ref[Tensor], frozenset[str]]] = {}

    def calls_before(self, tensor: Tensor) -> frozenset[str]:
        """Return the calls that took the gradient from what leads to a tensor."""
        entry = self.lost.get(id(tensor))
        if entry is None:
            return frozenset()

        # Another tensor may have been at this address before.
        reference, calls = entry
        if reference() is not tensor:
            return frozenset()

        return calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # 1. Run the call.
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs: list[Tensor] = []
        collect(result, outputs)
        if not outputs:
            return result

        # 2. What lost its gradient before passes the loss on to its results.
        inputs: list[Tensor] = []
        collect((args, kwargs), inputs)
        inherited = frozenset().union(*(self.calls_before(tensor) for tensor in inputs))
        had_gradient = any(tensor.requires_grad for tensor in inputs)

        # 3. A float that lost its gradient in this call lost it by this call.
        new = [tensor for tensor in outputs if not _holds(inputs, tensor)]
        for tensor in filter(is_float, new):
            calls = inherited
            if had_gradient and not tensor.requires_grad:
                calls = calls | {_name_cut(func)}
            if calls:
                self.lost[id(tensor)] = (weakref.ref(tensor), calls)

        return result


def _holds(tensors: Iterable[Tensor], tensor: Tensor) -> bool:
    """Return whether a tensor itself is among others."""
    return any(tensor is other for other in tensors)


def _name_cut(func: Any) -> str:
    """Return what took the gradient, and where: "detach in model.py:12"."""
    name = getattr(func, "__name__", str(func))
    # The getter of an attribute, such as `tensor.data`.
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "an attribute")

    # Under no_grad any call takes the gradient.
    if not torch.is_grad_enabled():
        name = "no_grad"
    return f"{name} in {_line_of_the_model()}"


def _line_of_the_model() -> str:
    """Return "file.py:12" of the innermost frame of the model's own code.

    Frames of torch and of the code that runs the model again are skipped.
    """
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PLUMBING):
        frame = frame.f_back

    return f"{_readable_path(frame.f_code.co_filename)}:{frame.f_lineno}"


def _readable_path(file: str) -> str:
    """Return a file's path inside its installed package or below the current folder.

    Any other path is returned in full.
    """
    _, installed, inside = file.rpartition("site-packages/")
    if installed:
        return inside

    return file.removeprefix(f"{Path.cwd()}/")


def cutting_calls(sites: Sites, source: int, sink: int) -> list[str]:
    """Return the calls that take the gradient on every way from one value to another.

    Args:
        sites: of one recorded forward.
        source: value that is given a gradient. Nothing before it has one.
        sink: value that is looked at: a point of the run, or the loss's input.

    Returns:
        The calls in alphabetical order; [] if a way with a gradient is left.
    """
    # 1. The loss's input.
    cuts = Cuts()
    if sink == loss_value(sites):
        result = _output_of_run(sites, source, cuts)
        if result.requires_grad:
            return []
        return sorted(cuts.calls_before(result))

    # 2. A point of the run.
    has_gradient: list[bool] = []
    calls: list[frozenset[str]] = []

    def visit(value: int, tensor: Tensor) -> None:
        if value == sink:
            has_gradient.append(tensor.requires_grad)
            calls.append(cuts.calls_before(tensor))

    run_backward(sites, None, [source, sink], watch=cuts, visit=visit, backward=False)
    if any(has_gradient) or not calls:
        return []

    return sorted(calls[-1])


def _output_of_run(sites: Sites, source: int, cuts: Cuts) -> Tensor:
    """Return the loss's input of a run in which `source` alone has a gradient."""
    # 1. Where the source gets its gradient: an input of the model is replaced before it runs.
    spot = sites.replayer.spot_of(source, 0)

    def visit(_spot: Any, tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_().clone()

    replaced = {}
    spots = [spot]
    if spot.key is None:
        replaced[source] = visit(spot, sites.replayer.calls[0].tensors[source].detach().clone())
        spots = []

    # 2. The run.
    with torch.enable_grad(), sites.replayer.whole_graph(), cuts:
        output = sites.replayer.tapped(spots, visit, replaced=replaced)
    result = loss_input(output)
    assert result is not None
    return result


# -- other values in parameters ---------------------------------------------
def reviving(skeleton: Skeleton, names: Iterable[str], alive: Alive) -> tuple[list[str], bool]:
    """Return the constant parameters that are the cause, and whether only all of them together are.

    Args:
        skeleton: of the model. Its tensors are swapped for others and put back; the model's own are
            not touched.
        names: parameters and buffers that may be the cause. Those with two different elements are
            left out, unless all are below `NEGLIGIBLE`: two factors of that size vanish in float32.
        alive: whether the gradient arrives now, or the branch is not zero now.
    """
    if skeleton.stored is not None:
        return [], False

    # 1. A weight that was drawn is no suspect: it has two different elements of a usual size.
    suspects = [name for name in dict.fromkeys(names) if _can_block(tensor_of(skeleton, name))]
    if not suspects:
        return [], False
    if not _alive_with(skeleton, suspects, alive):
        return [], False

    # 2. One alone may be enough. Zeros are tried first; the order is kept otherwise.
    suspects.sort(key=lambda name: bool(tensor_of(skeleton, name).flatten()[0]))
    alone = [name for name in suspects[:_MOST] if _alive_with(skeleton, [name], alive)]
    if alone:
        return alone, False

    # 3. Else take away what is not needed. If there are too many to try, no cause is named.
    are_too_many = len(suspects) > 2 * _MOST
    if are_too_many:
        return [], False

    needed = _without_unneeded(skeleton, suspects, alive)
    return needed, len(needed) > 1


def _without_unneeded(skeleton: Skeleton, suspects: Sequence[str], alive: Alive) -> list[str]:
    """Return the suspects without those that need no other value for the gradient to arrive.

    The last ones are tried first, since zeros come first.
    """
    needed = list(suspects)
    for name in reversed(suspects):
        # The last one that is left is needed.
        fewer = [other for other in needed if other != name]
        if not fewer:
            break

        if _alive_with(skeleton, fewer, alive):
            needed = fewer

    return needed


def _can_block(tensor: Tensor) -> bool:
    """Return whether a tensor may stop a signal: it holds one number, or numbers near zero."""
    if _is_constant(tensor):
        return True
    if not tensor.is_floating_point():
        return False

    largest = tensor.detach().abs().max()
    return bool(largest < NEGLIGIBLE)


def _is_constant(tensor: Tensor) -> bool:
    """Return whether all elements of a floating tensor are one number."""
    has_numbers = tensor.is_floating_point() and tensor.numel() > 0
    if not has_numbers:
        return False

    flat = tensor.detach().reshape(-1)
    return bool((flat == flat[0]).all())


def _alive_with(skeleton: Skeleton, names: Sequence[str], alive: Alive) -> bool:
    """Return whether the gradient arrives if some parameters hold other values."""
    with other_values(skeleton, names):
        return alive()


@contextmanager
def other_values(skeleton: Skeleton, names: Sequence[str]) -> Iterator[None]:
    """Let random numbers stand in for parameters and buffers of the skeleton.

    Those of buffers are positive: a variance below zero would make a branch NaN, which is not zero
    either.
    """
    # 1. What they hold now.
    assert isinstance(skeleton.params, dict)
    params = {name: skeleton.params[name] for name in names if name in skeleton.params}
    buffers = {name: skeleton.buffers[name] for name in names if name not in params}

    # 2. Other values for the time of the block.
    generator = torch.Generator().manual_seed(0)
    try:
        for name in names:
            if name in params:
                drawn = torch.randn(params[name].shape, generator=generator)
                skeleton.params[name] = drawn.to(params[name])
            else:
                drawn = 0.5 + torch.rand(buffers[name].shape, generator=generator)
                skeleton.buffers[name] = drawn.to(buffers[name])
        yield
    finally:
        skeleton.params.update(params)
        skeleton.buffers.update(buffers)


def tensor_of(skeleton: Skeleton, name: str) -> Tensor:
    """Return a parameter or a buffer of the skeleton."""
    if name in skeleton.params:
        return skeleton.params[name]

    return skeleton.buffers[name]


def suspects_of(sites: Sites, index: int) -> list[str]:
    """Return the parameters of a branch and the buffers that its calls read."""
    buffers: dict[str, None] = {}
    for call in sites.raw[index].calls:
        read = sites.graph.nodes[call].inputs
        buffers |= dict.fromkeys(_floating_buffers(sites, read))

    return [*sites[index].parameters, *buffers]


def _floating_buffers(sites: Sites, values: Iterable[int]) -> list[str]:
    """Return the names of the values that are buffers. Those of integers are left out."""
    buffers = sites.skeleton.buffers
    names = []
    for value in values:
        record = sites.graph.values[value]
        if record.node != STATE or record.name not in buffers:
            continue

        # Positions and masks block no signal.
        if buffers[record.name].is_floating_point():
            names.append(record.name)

    return names


# -- branches that are zero ---------------------------------------------
def find_dead_branches(
    sites: Sites, records: Sequence[SublayerRecord], profile: GradientProfile | None = None
) -> dict[int, DeadBranch]:
    """Return the branches that have parameters and do not depend on their input at all, by index.

    Args:
        sites: of one recorded forward.
        records: their figures. A branch whose norm was not measured is left out, and one that reads
            a stream of zeros.
        profile: gradients of the same model, as far as they were measured.
    """
    norms = {record.index: record.branch_norm for record in records}
    gradients = None
    if profile is not None:
        gradients = profile.parameters

    branches = {}
    for position, site in enumerate(sites):
        # One inside another branch, or without parameters, is computed so.
        if site.nested or not site.parameters:
            continue

        interval = norms.get(site.index)
        if _is_zero_map(site, interval):
            branches[site.index] = _with_gradient(_dead_branch(sites, position), gradients)

    return branches


def _is_zero_map(site: Sublayer, norm: Interval | None) -> bool:
    """Return whether the Jacobian of a branch is zero although its input is not."""
    if norm is None or norm.upper != 0:
        return False

    return bool(site.shortcut.any())


def _with_gradient(branch: DeadBranch, gradients: Mapping[str, float] | None) -> DeadBranch:
    """Return a dead branch with the norm of the gradient of its causes, where it was measured."""
    if not branch.parameters:
        return branch

    norm = _joint_norm(branch.parameters, gradients)
    if norm is None:
        return branch

    return replace(branch, own_gradient=norm)


def _dead_branch(sites: Sites, position: int) -> DeadBranch:
    """Return the record of a branch that does not depend on its input, with the cause."""
    skeleton, site = sites.skeleton, sites[position]
    is_zero = not bool(site.value.any())

    # 1. Search the branch's own parameters, then a gate outside it, computed from a condition.
    inside = True
    try:
        causes, together = reviving(
            skeleton, suspects_of(sites, position), lambda: _branch_depends(site)
        )
        if not causes:
            inside = False
            causes, together = reviving(
                skeleton, _gates_outside(sites, position), lambda: _depends(sites, position)
            )
    except (JacdiagError, RuntimeError):
        return DeadBranch(is_zero)

    # 2. Calls whose derivative is zero.
    if not causes:
        return DeadBranch(is_zero, calls=_flat_calls(sites, position))

    # 3. Whether the cause is the same in every layer.
    pool = set(skeleton.params)
    if inside:
        pool = _parameters_elsewhere(sites, site)
    learned = all(name in skeleton.params for name in causes)
    alike = False
    if learned:
        alike = all(_zero_in_every_layer(skeleton, name, pool) for name in causes)
    return DeadBranch(
        is_zero, causes, constants(skeleton, causes), together, alike, learned=learned
    )


def _flat_calls(sites: Sites, position: int) -> list[str]:
    """Return the calls of zero derivative that every way through a branch passes."""
    raw = sites.raw[position]
    values = raw.term.values
    if raw.result is not None:
        values = (raw.result,)
    calls = find_blocking_calls(sites.graph, raw.shortcut, values, FLAT)
    return list(dict.fromkeys(name_call(sites.graph, call) for call in calls))


def _branch_depends(site: Sublayer) -> bool:
    """Return whether a branch depends on its input with the weights of this moment.

    A bias at its end makes a branch no less dead.
    """
    with torch.enable_grad():
        x = site.shortcut.detach().clone().requires_grad_()
        value = site.branch(x)
        if not value.requires_grad:
            return False

        return _has_derivative(value, x)


def _parameters_elsewhere(sites: Sites, site: Sublayer) -> set[str]:
    """Return the parameters of all other sub-layers that are not this one's too."""
    others = [other for other in sites if other is not site]
    names: set[str] = set()
    for other in others:
        names.update(other.parameters)

    return names.difference(site.parameters)


def _gates_outside(sites: Sites, position: int) -> list[str]:
    """Return the nearest constant parameters of what a branch reads besides its shortcut.

    At most `_GATES` are returned.
    """
    names: dict[str, None] = {}
    for call in sorted(_calls_feeding(sites, position), reverse=True):
        names |= dict.fromkeys(_gates_of_call(sites, call))
        # The nearest call comes first.
        if len(names) >= _GATES:
            break

    return list(names)[:_GATES]


def _gates_of_call(sites: Sites, call: int) -> list[str]:
    """Return the parameters of a call that may stop a signal."""
    names = parameters_of(sites.graph, (call,), sites.skeleton)
    return [name for name in names if _can_block(sites.skeleton.params[name])]


def _calls_feeding(sites: Sites, position: int) -> set[int]:
    """Return the calls outside a branch whose results it reads, apart from its shortcut."""
    # 1. What the branch reads.
    graph, raw = sites.graph, sites.raw[position]
    own_calls = set(raw.calls)
    inputs = chain.from_iterable(_live_inputs(graph, call) for call in own_calls)
    stack = [value for value in inputs if value != raw.shortcut]

    # 2. Everything before that.
    feeding: set[int] = set()
    while stack:
        call = graph.values[stack.pop()].node
        is_outside = call >= 0 and call not in own_calls
        if is_outside and call not in feeding:
            feeding.add(call)
            stack += _live_inputs(graph, call)

    return feeding


def _live_inputs(graph: Graph, call: int) -> list[int]:
    """Return the values that a call reads and that depend on the input of the model."""
    return [value for value in graph.nodes[call].inputs if graph.values[value].live]


def _depends(sites: Sites, position: int) -> bool:
    """Return whether a branch depends on its shortcut in a run of the entire model.

    The run uses the weights of this moment.
    """
    raw, replayer = sites.raw[position], sites.replayer
    source, end = replayer.spot_of(raw.shortcut, 0), replayer.end_of(raw, 0)
    if source.where is Where.ARGUMENT:
        return False

    leaves: list[Tensor] = []
    depends = False

    def visit(spot: Spot, tensor: Tensor) -> Tensor:
        nonlocal depends
        # 1. The shortcut becomes a leaf.
        if spot is source:
            leaves.append(tensor.detach().requires_grad_())
            return leaves[-1].clone()

        # 2. The end of the branch is differentiated by it.
        if leaves and tensor.requires_grad:
            depends = depends or _has_derivative(tensor, leaves[-1])
        return tensor

    with torch.enable_grad(), replayer.whole_graph():
        replayer.tapped([source, end], visit)

    return depends


def _has_derivative(value: Tensor, leaf: Tensor) -> bool:
    """Return whether the derivative of a value by a leaf is anything but zero.

    The sum alone would not do: the sum over a softmax does not depend on its input.
    """
    total = value.square().sum() + value.sum()
    (gradient,) = torch.autograd.grad(total, leaf, retain_graph=True, allow_unused=True)
    if gradient is None:
        return False

    return bool((gradient != 0).any())


def constants(skeleton: Skeleton, names: Iterable[str]) -> list[float]:
    """Return the value of each constant parameter or buffer.

    For one that is not constant, its largest magnitude stands in.
    """
    values = []
    for name in names:
        tensor = tensor_of(skeleton, name).detach()
        if _is_constant(tensor):
            values.append(float(tensor.flatten()[0]))
        else:
            values.append(float(tensor.abs().max()))

    return values


def _zero_in_every_layer(skeleton: Skeleton, name: str, elsewhere: Iterable[str]) -> bool:
    """Return whether a parameter and its namesakes in the other sub-layers are all zero.

    Namesakes differ in one number of their name: "layers.3.w2" and "layers.4.w2", not
    "layers.4.w1".
    """
    namesakes = [other for other in elsewhere if _one_number_apart(name, other)]
    return all(_is_zero(skeleton.params[other]) for other in (name, *namesakes))


def _one_number_apart(first: str, second: str) -> bool:
    """Return whether two names differ in one part, which is a number in both."""
    first_parts, second_parts = first.split("."), second.split(".")
    if len(first_parts) != len(second_parts):
        return False

    # The parts that differ.
    pairs = zip(first_parts, second_parts, strict=True)
    different = [pair for pair in pairs if pair[0] != pair[1]]
    if len(different) != 1:
        return False

    return all(part.isdigit() for part in different[0])


def _is_zero(tensor: Tensor) -> bool:
    """Return whether all elements of a floating tensor are zero."""
    return tensor.is_floating_point() and not bool(tensor.detach().any())
