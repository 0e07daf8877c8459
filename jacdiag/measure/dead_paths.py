"""Parts of a model that no gradient reaches, branches that are exactly zero, and the cause where it
can be proved.

A cause is proved by trying it. Calls without a derivative: a run in which the part's input has a
gradient, and all that leads from it to the other end has none behind these calls. Parameters: a run
in which they hold other values, and the gradient arrives. Where neither does, the cause is unknown.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from jacdiag.errors import JacdiagError
from jacdiag.measure.gradients import GradientProfile, loss_input, run_backward, stream_values
from jacdiag.records.report import SublayerRecord
from jacdiag.records.signal_propagation import NEGLIGIBLE, DeadBranch, DeadPath
from jacdiag.trace import Sites
from jacdiag.trace.discovery.coverage import parameters_of
from jacdiag.trace.discovery.detached import cut_off_parts
from jacdiag.trace.execution.skeleton import Skeleton
from jacdiag.trace.execution.tap import Spot, Where
from jacdiag.trace.execution.tensors import collect, collect_deep, is_float
from jacdiag.trace.graph.graph import STATE

_PACKAGE = __file__.rsplit("/", 2)[0]
_PLUMBING = (torch.__path__[0], f"{_PACKAGE}/trace/", f"{_PACKAGE}/measure/")
_MOST = 12  # parameters that are tried one by one
_MOST_UNCOVERED = 24  # products outside all sub-layers that are asked what cuts them off
# weight and bias of what computes a gate outside a branch; each try is a run of the whole model
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
    dead = {
        k for k, site in enumerate(sites) if _without_gradient(site.parameters, profile.parameters)
    }
    found = []

    # 1. The main stream, up to the last point that gets nothing.
    broken = _break_in(profile.norms)
    if broken is not None:
        below = _sublayers_before(sites, values, broken, dead)
        ends = (values[broken], values[broken + 1] if broken + 1 < len(values) else sink)
        found.append(_stream_path(sites, token_ids, profile, ends, below, frozen))
        dead -= below

    # 2. Embeddings that are cut off before the first shortcut.
    if broken is None:
        found += _embeddings_cut_off(sites, profile, sink, frozen)

    # 3. Sub-layers behind which the stream is cut off, by the calls that do it.
    rest = [
        k for k in sorted(dead) if not sites[k].nested and leads(sites, sites.raw[k].output, sink)
    ]
    groups: dict[tuple[str, ...], list[int]] = {}
    for index in rest:
        groups.setdefault(tuple(cutting_calls(sites, sites.raw[index].output, sink)), []).append(
            index
        )
    for calls, members in groups.items():
        if calls:
            found.append(_cut_off(sites, members, list(calls), frozen))

    # 4. Single sub-layers.
    found += [_branch_path(sites, token_ids, index, frozen) for index in groups.get((), [])]

    # 5. Matrices outside all sub-layers: a branch that is detached as a whole is none to the
    # tracer.
    return found + _uncovered_cut_off(sites, profile, sink, frozen)


def _uncovered_cut_off(
    sites: Sites, profile: GradientProfile, sink: int, frozen: Collection[str]
) -> list[DeadPath]:
    """Return the parts outside all sub-layers whose products lead to the loss through calls without
    a derivative.
    """
    if profile.parameters is None:
        return []
    graph, finder = sites.graph, sites.finder
    names = [name for name in sites.coverage.uncovered if profile.parameters.get(name) == 0]
    readers: dict[int, list[str]] = {}
    for node in graph.nodes:
        mine = [
            name for name in parameters_of(graph, (node.index,), sites.skeleton) if name in names
        ]
        if mine and finder.is_product(node.index):
            readers[node.index] = mine
    # One run for each product; a model has few outside its sub-layers.
    groups: dict[tuple[str, ...], list[str]] = {}
    for index in list(readers)[:_MOST_UNCOVERED]:
        made = next(
            (value for value in graph.nodes[index].outputs if graph.values[value].live), None
        )
        if made is not None and leads(sites, made, sink):
            groups.setdefault(tuple(cutting_calls(sites, made, sink)), []).extend(readers[index])
    found = []
    silent = {name for name, norm in profile.parameters.items() if norm == 0}
    parts = cut_off_parts(graph, silent) if any(groups) else []
    for calls, members in groups.items():
        if calls:
            is_frozen = set(members) <= set(frozen)
            where = members if is_frozen else _whole_part(members, parts, frozen)
            found.append(
                DeadPath(where, stream=True, cause="cut", calls=list(calls), frozen=is_frozen)
            )
    return found


def _whole_part(
    members: Sequence[str], parts: Sequence[Sequence[str]], frozen: Collection[str]
) -> list[str]:
    """Return the parameters in training of the parts that hold some of `members`: also their gains
    and biases.
    """
    known = set(members)
    inside = [name for part in parts if known.intersection(part) for name in part]
    return [name for name in dict.fromkeys([*members, *inside]) if name not in frozen]


def _embeddings_cut_off(
    sites: Sites, profile: GradientProfile, sink: int, frozen: Collection[str]
) -> list[DeadPath]:
    found = []
    graph = sites.graph
    for name in sites.coverage.embedding:
        if (
            profile.parameters is None
            or profile.parameters.get(name) != 0
            or sites.skeleton.outlines[name].dim() < 2
        ):
            continue
        readers = [
            node
            for node in graph.nodes
            if name in parameters_of(graph, (node.index,), sites.skeleton)
        ]
        made = [value for node in readers for value in node.outputs if graph.values[value].live]
        if not made or not leads(sites, made[0], sink):
            continue
        calls = cutting_calls(sites, made[0], sink)
        if calls:
            found.append(
                DeadPath([name], stream=True, cause="cut", calls=calls, frozen=name in frozen)
            )
    return found


def _cut_off(
    sites: Sites, members: Sequence[int], calls: list[str], frozen: Collection[str]
) -> DeadPath:
    part = {name for index in members for name in sites[index].parameters}
    names = [sites[index].name for index in members]
    return DeadPath(names, stream=True, cause="cut", calls=calls, frozen=part <= set(frozen))


def _break_in(norms: Sequence[float]) -> int | None:
    """Return the last of the points from the first on that have no gradient; None if the first one
    has.
    """
    last = None
    for place, value in enumerate(norms):
        if value != 0:  # NaN is not zero
            break
        last = place
    return last


def _without_gradient(names: Sequence[str], gradients: Mapping[str, float] | None) -> bool:
    if gradients is None:
        return False
    known = [gradients[name] for name in names if name in gradients]
    return bool(known) and all(value == 0 for value in known)


def _sublayers_before(
    sites: Sites, values: Sequence[int], place: int, dead: Collection[int]
) -> set[int]:
    """Return the sub-layers of the main stream up to a point.

    Those that read the last point itself are among them only if their parameters get nothing: the
    break lies behind the point, and what reads it may be past the break.
    """
    groups = [sites.streams.groups[k] for k in sites.streams.main]
    surely = values[:place]
    found = {index for group in groups if group.shortcut in surely for index in group.sites}
    last = {index for group in groups if group.shortcut == values[place] for index in group.sites}
    return found | last.intersection(dead)


def _stream_path(
    sites: Sites,
    token_ids: Tensor | None,
    profile: GradientProfile,
    ends: tuple[int, int],
    below: set[int],
    frozen: Collection[str],
) -> DeadPath:
    source, sink = ends
    names = [sites[index].name for index in sorted(below)]
    inside = {name for index in below for name in sites[index].parameters}
    part = inside | set(sites.coverage.embedding)
    elsewhere = (
        bool(inside)
        and profile.parameters is not None
        and all(profile.parameters.get(n) for n in inside)
    )
    is_frozen = bool(part) and part <= set(frozen)
    path = DeadPath(names, stream=True, cause="unknown", elsewhere=elsewhere, frozen=is_frozen)
    try:
        calls = cutting_calls(sites, source, sink)
        if calls:
            return replace(path, cause="cut", calls=calls)

        def alive() -> bool:
            return run_backward(sites, token_ids, [source]).norms.get(source, 0.0) > 0

        zone = calls_between(sites, source, sink)
        causes, together = reviving(
            sites.skeleton, parameters_of(sites.graph, zone, sites.skeleton), alive
        )
    except (JacdiagError, RuntimeError):
        return path
    if not causes:
        return path
    head = not together and all(_is_head(sites, name) for name in causes)
    own = None
    if profile.parameters is not None and all(name in profile.parameters for name in causes):
        own = sum(profile.parameters[name] ** 2 for name in causes) ** 0.5
    values = constants(sites.skeleton, causes)
    return replace(
        path,
        cause="zero",
        parameters=causes,
        values=values,
        together=together,
        head=head,
        own_gradient=own,
    )


def _is_head(sites: Sites, name: str) -> bool:
    return name in sites.coverage.head and sites.skeleton.outlines[name].dim() >= 2


def _branch_path(
    sites: Sites, token_ids: Tensor | None, index: int, frozen: Collection[str]
) -> DeadPath:
    site = sites[index]
    is_frozen = set(site.parameters) <= set(frozen)
    path = DeadPath([site.name], stream=False, cause="unknown", frozen=is_frozen)
    if not bool(site.shortcut.any()):
        return replace(path, cause="input")
    raw = sites.raw[index]
    term = raw.result if raw.result is not None else raw.term.operand
    watched = [name for name in site.parameters if sites.skeleton.params[name].is_floating_point()]
    try:
        calls = [] if term is None else cutting_calls(sites, raw.shortcut, term)
        if calls:
            return replace(path, cause="cut", calls=calls)

        def alive() -> bool:
            return any(run_backward(sites, token_ids, [], watched).parameters.values())

        causes, together = reviving(sites.skeleton, suspects_of(sites, index), alive)
    except (JacdiagError, RuntimeError):
        return path
    if not causes:
        return path
    values = constants(sites.skeleton, causes)
    learned = all(name in sites.skeleton.params for name in causes)
    return replace(
        path,
        cause="zero",
        parameters=causes,
        values=values,
        together=together,
        own_gradient=0.0 if learned else None,
        learned=learned,
    )


# -- from one value to another ---------------------------------------------
def loss_value(sites: Sites) -> int | None:
    """Return the index of the value that the loss is computed from; None if it is not an output as
    it stands.
    """
    target = loss_input(sites.output)
    made: list[Tensor] = []
    collect_deep(sites.output, made)
    for tensor, value in zip(made, sites.graph.outputs, strict=False):
        if tensor is target:
            return value
    return None


def leads(sites: Sites, source: int, sink: int) -> bool:
    """Return whether a value reaches another, also through calls that have no derivative."""
    return source == sink or bool(calls_between(sites, source, sink))


def calls_between(sites: Sites, source: int, sink: int) -> list[int]:
    """Return the calls that lead from one value to another, also those without a derivative,
    ascending.
    """
    # 1. All that leads to the sink.
    graph = sites.graph
    floor = graph.values[source].node
    behind: set[int] = set()
    stack = [sink]
    while stack:
        node = graph.values[stack.pop()].node
        if node > floor and node >= 0 and node not in behind:
            behind.add(node)
            stack += [value for value in graph.nodes[node].inputs if graph.values[value].live]
    # 2. Of that, what the source reaches.
    reached = {source}
    between = []
    for node in sorted(behind):
        if reached.intersection(graph.nodes[node].inputs):
            between.append(node)
            reached.update(graph.nodes[node].outputs)
    return between


class Cuts(TorchFunctionMode):
    """Follows what lost its gradient through a forward: tensor -> the calls that took it.

    A call takes the gradient if it reads a float that has one, or had one, and makes a float that
    has none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lost: dict[int, tuple[weakref.ref[Tensor], frozenset[str]]] = {}

    def calls_behind(self, tensor: Tensor) -> frozenset[str]:
        """Return the calls that took the gradient from what leads to a tensor."""
        reference, calls = self.lost.get(id(tensor), (None, frozenset()))
        return calls if reference is not None and reference() is tensor else frozenset()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        read: list[Tensor] = []
        collect((args, kwargs), read)
        made: list[Tensor] = []
        collect(result, made)
        if not made:
            return result
        # What lost its gradient before passes the loss on to its results.
        inherited = frozenset().union(*(self.calls_behind(tensor) for tensor in read))
        had_gradient = any(tensor.requires_grad for tensor in read)
        for tensor in made:
            if not is_float(tensor) or any(tensor is other for other in read):
                continue
            calls = inherited
            if had_gradient and not tensor.requires_grad:
                calls = calls | {_name_cut(func)}
            if calls:
                self.lost[id(tensor)] = (weakref.ref(tensor), calls)
        return result


def _name_cut(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "an attribute")
    if not torch.is_grad_enabled():
        name = "no_grad"
    return f"{name} in {_line_of_the_model()}"


def _line_of_the_model() -> str:
    """Return "file.py:12" of the innermost frame outside torch and the code that runs the model
    again.
    """
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PLUMBING):
        frame = frame.f_back
    return f"{_readable_path(frame.f_code.co_filename)}:{frame.f_lineno}"


def _readable_path(file: str) -> str:
    """Return a file's path inside its installed package, or below the current folder; else the
    whole path.
    """
    _, installed, inside = file.rpartition("site-packages/")
    return inside if installed else file.removeprefix(f"{Path.cwd()}/")


def cutting_calls(sites: Sites, source: int, sink: int) -> list[str]:
    """Return the calls that take the gradient on every way from one value to another; [] if a way
    is left.

    Args:
        sites: of one recorded forward.
        source: value that is given a gradient. Nothing before it has one.
        sink: value that is looked at: a point of the run, or the loss's input.
    """
    cuts = Cuts()
    found: list[frozenset[str]] = []
    left = False
    at_loss = sink == loss_value(sites)

    def visit(value: int, tensor: Tensor) -> None:
        nonlocal left
        if value == sink:
            left = left or tensor.requires_grad
            found.append(cuts.calls_behind(tensor))

    if at_loss:
        result = _output_of_run(sites, source, cuts)
        left = result.requires_grad
        found.append(cuts.calls_behind(result))
    else:
        run_backward(sites, None, [source, sink], watch=cuts, visit=visit, backward=False)
    if left or not found:
        return []
    return sorted(found[-1])


def _output_of_run(sites: Sites, source: int, cuts: Cuts) -> Tensor:
    """Return the loss's input of a run in which `source` alone has a gradient."""
    spot = sites.replayer.spot_of(source, 0)

    def visit(_spot: Any, tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_().clone()

    replaced = {}
    spots = [spot]
    if spot.key is None:
        replaced[source] = visit(spot, sites.replayer.calls[0].tensors[source].detach().clone())
        spots = []
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
    # A weight that was drawn is no suspect: it has two different elements of a usual size.
    suspects = [name for name in dict.fromkeys(names) if _can_block(tensor_of(skeleton, name))]
    if not suspects or not _alive_with(skeleton, suspects, alive):
        return [], False

    # 1. One alone may be enough.
    # zeros first; the order is kept
    suspects.sort(key=lambda name: bool(tensor_of(skeleton, name).flatten()[0]))
    alone = [name for name in suspects[:_MOST] if _alive_with(skeleton, [name], alive)]
    if alone:
        return alone, False

    # 2. Else take away what is not needed. Too many to try all: no cause is named.
    if len(suspects) > 2 * _MOST:
        return [], False
    needed = list(suspects)
    for name in reversed(suspects):
        fewer = [other for other in needed if other != name]
        if fewer and _alive_with(skeleton, fewer, alive):
            needed = fewer
    return needed, len(needed) > 1


def _can_block(tensor: Tensor) -> bool:
    """Return whether a tensor may stop a signal: it holds one number, or numbers next to
    nothing.
    """
    if _is_constant(tensor):
        return True
    return tensor.is_floating_point() and bool(tensor.detach().abs().max() < NEGLIGIBLE)


def _is_constant(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return False
    flat = tensor.detach().reshape(-1)
    return bool((flat == flat[0]).all())


def _alive_with(skeleton: Skeleton, names: Sequence[str], alive: Alive) -> bool:
    with other_values(skeleton, names):
        return alive()


@contextmanager
def other_values(skeleton: Skeleton, names: Sequence[str]) -> Iterator[None]:
    """Let random numbers stand in for parameters and buffers of the skeleton.

    Those of buffers are positive: a variance below zero would make a branch NaN, which is not zero
    either.
    """
    assert isinstance(skeleton.params, dict)
    params = {name: skeleton.params[name] for name in names if name in skeleton.params}
    buffers = {name: skeleton.buffers[name] for name in names if name not in params}
    generator = torch.Generator().manual_seed(0)
    try:
        for name in names:
            if name in params:
                tensor = params[name]
                skeleton.params[name] = torch.randn(tensor.shape, generator=generator).to(tensor)
            else:
                tensor = buffers[name]
                skeleton.buffers[name] = (0.5 + torch.rand(tensor.shape, generator=generator)).to(
                    tensor
                )
        yield
    finally:
        skeleton.params.update(params)
        skeleton.buffers.update(buffers)


def tensor_of(skeleton: Skeleton, name: str) -> Tensor:
    """Return a parameter or a buffer of the skeleton."""
    return skeleton.params[name] if name in skeleton.params else skeleton.buffers[name]


def suspects_of(sites: Sites, index: int) -> list[str]:
    """Return the parameters of a branch and the buffers that its calls read."""
    graph, skeleton = sites.graph, sites.skeleton
    read = [value for call in sites.raw[index].calls for value in graph.nodes[call].inputs]
    names = {graph.values[value].name: None for value in read if graph.values[value].node == STATE}
    buffers = [
        name
        for name in names
        if name in skeleton.buffers and skeleton.buffers[name].is_floating_point()
    ]
    return [*sites[index].parameters, *buffers]


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
    gradients = profile.parameters if profile is not None else None
    found = {}
    for position, site in enumerate(sites):
        interval = norms.get(site.index)
        if site.nested or not site.parameters or interval is None or interval.upper != 0:
            continue
        if bool(site.shortcut.any()):
            found[site.index] = _with_gradient(_dead_branch(sites, position), gradients)
    return found


def _with_gradient(branch: DeadBranch, gradients: Mapping[str, float] | None) -> DeadBranch:
    """Return a dead branch with the norm of the gradient of its causes, where it was measured."""
    if (
        not branch.parameters
        or gradients is None
        or any(name not in gradients for name in branch.parameters)
    ):
        return branch
    return replace(
        branch, own_gradient=sum(gradients[name] ** 2 for name in branch.parameters) ** 0.5
    )


def _dead_branch(sites: Sites, position: int) -> DeadBranch:
    skeleton, site = sites.skeleton, sites[position]

    def alive() -> bool:
        """Return whether the branch depends on its input now; a bias at its end makes it no less
        dead.
        """
        with torch.enable_grad():
            x = site.shortcut.detach().clone().requires_grad_()
            value = site.branch(x)
            if not value.requires_grad:
                return False
            (gradient,) = torch.autograd.grad(
                value.square().sum() + value.sum(), x, allow_unused=True
            )
        return gradient is not None and bool((gradient != 0).any())

    is_zero = not bool(site.value.any())
    inside = True
    try:
        causes, together = reviving(skeleton, suspects_of(sites, position), alive)
        if not causes:
            # A gate may be computed outside the branch, from a condition.
            inside = False
            causes, together = reviving(
                skeleton, _gates_outside(sites, position), lambda: _depends(sites, position)
            )
    except (JacdiagError, RuntimeError):
        return DeadBranch(is_zero)
    names = {name for other in sites if other is not site for name in other.parameters} - set(
        site.parameters
    )
    pool = names if inside else set(skeleton.params)
    learned = all(name in skeleton.params for name in causes)
    alike = (
        bool(causes)
        and learned
        and all(_zero_in_every_layer(skeleton, name, pool) for name in causes)
    )
    return DeadBranch(
        is_zero, causes, constants(skeleton, causes), together, alike, learned=learned
    )


def _gates_outside(sites: Sites, position: int) -> list[str]:
    """Return the nearest constant parameters of what a branch reads besides its shortcut, at most
    `_GATES`.
    """
    graph, raw = sites.graph, sites.raw[position]
    cone = set(raw.calls)
    read = {
        value for call in cone for value in graph.nodes[call].inputs if graph.values[value].live
    }
    stack = [
        value for value in read if value != raw.shortcut and graph.values[value].node not in cone
    ]
    behind: set[int] = set()
    while stack:
        call = graph.values[stack.pop()].node
        if call >= 0 and call not in behind and call not in cone:
            behind.add(call)
            stack += [value for value in graph.nodes[call].inputs if graph.values[value].live]
    names: list[str] = []
    for call in sorted(behind, reverse=True):
        for name in parameters_of(graph, (call,), sites.skeleton):
            if name not in names and _can_block(sites.skeleton.params[name]):
                names.append(name)
        if len(names) >= _GATES:
            break
    return names[:_GATES]


def _depends(sites: Sites, position: int) -> bool:
    """Return whether a branch depends on its shortcut in a run of the whole model with the weights
    of this moment.
    """
    raw, replayer = sites.raw[position], sites.replayer
    source, end = replayer.spot_of(raw.shortcut, 0), replayer.end_of(raw, 0)
    if source.where is Where.ARGUMENT:
        return False
    leaves: list[Tensor] = []
    depends = False

    def visit(spot: Spot, tensor: Tensor) -> Tensor:
        nonlocal depends
        if spot is source:
            leaves.append(tensor.detach().requires_grad_())
            return leaves[-1].clone()
        if leaves and tensor.requires_grad:
            total = tensor.square().sum() + tensor.sum()
            (gradient,) = torch.autograd.grad(
                total, leaves[-1], retain_graph=True, allow_unused=True
            )
            depends = depends or (gradient is not None and bool((gradient != 0).any()))
        return tensor

    with torch.enable_grad(), replayer.whole_graph():
        replayer.tapped([source, end], visit)
    return depends


def constants(skeleton: Skeleton, names: Iterable[str]) -> list[float]:
    """Return the value of each constant parameter or buffer, and the largest magnitude of one that
    is not constant.
    """
    values = []
    for name in names:
        tensor = tensor_of(skeleton, name).detach()
        values.append(float(tensor.flatten()[0] if _is_constant(tensor) else tensor.abs().max()))
    return values


def _zero_in_every_layer(skeleton: Skeleton, name: str, elsewhere: Iterable[str]) -> bool:
    """Return whether a parameter and its namesakes in the other sub-layers are all zero.

    Namesakes differ in one number of their name: "layers.3.w2" and "layers.4.w2", not
    "layers.4.w1".
    """
    namesakes = [other for other in elsewhere if _one_number_apart(name, other)]
    return all(_is_zero(skeleton.params[other]) for other in (name, *namesakes))


def _one_number_apart(first: str, second: str) -> bool:
    pairs = list(zip(first.split("."), second.split("."), strict=False))
    different = [(a, b) for a, b in pairs if a != b]
    same_length = first.count(".") == second.count(".")
    return same_length and len(different) == 1 and all(part.isdigit() for part in different[0])


def _is_zero(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not bool(tensor.detach().any())
