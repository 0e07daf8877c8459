"""From a model and its inputs to its sub-layers: record, find, capture, assemble."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from jacdiag.devices.device_choice import check_precision
from jacdiag.devices.float32_precision import full_precision
from jacdiag.errors import REPEAT_THE_FORWARD, SourceError, TraceError
from jacdiag.sources.foreign_code import model_code, own_frames
from jacdiag.sources.module_wrappers import unwrap
from jacdiag.sources.python_source import check_module
from jacdiag.trace.assembly import assemble
from jacdiag.trace.discovery.coverage import cover
from jacdiag.trace.discovery.declarations import (
    Declaration,
    declarations,
    declared_sites,
    hidden_lines,
)
from jacdiag.trace.discovery.missing_shortcuts import find_missing_shortcuts
from jacdiag.trace.discovery.naming import home_of
from jacdiag.trace.discovery.residual import Finder, Site
from jacdiag.trace.discovery.residual_stream import Streams, StreamSum, owner_of
from jacdiag.trace.discovery.unlisted_sums import left_out
from jacdiag.trace.execution.determinism import (
    close_output,
    culprit,
    repeats_with_deterministic_kernels,
    same_output,
)
from jacdiag.trace.execution.hook_parity import OriginalRun
from jacdiag.trace.execution.module_call import Call, prepared
from jacdiag.trace.execution.replay import Replayer
from jacdiag.trace.execution.rng_state import another_draw, borrowed
from jacdiag.trace.execution.routes import Endpoint
from jacdiag.trace.execution.skeleton import Skeleton
from jacdiag.trace.execution.tap import Spot, Where
from jacdiag.trace.execution.tensors import device_of, tensors_in
from jacdiag.trace.execution.wrappers import has_foreign_hooks, refuse_flat_shards
from jacdiag.trace.graph.graph import Graph
from jacdiag.trace.graph.ops import PRODUCTS
from jacdiag.trace.graph.recorder import Recorder, observe, record
from jacdiag.trace.site_list import Sites
from jacdiag.trace.stages import Captured, Recording, Residuals

_ROUNDING = 1e-4  # relative: by which two runs may differ that only round otherwise


def sites(
    model: nn.Module,
    *args: Any,
    dtype: torch.dtype | None = None,
    declared: Iterable[Declaration] | Mapping[str, Any] = (),
    weights: Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> Sites:
    """Record `model(*args, **kwargs)` once and return its residual sub-layers.

    The model is not touched: its code runs on a structural copy, in eval mode, with its weights by
    reference.

    Args:
        model: any module; wrappers (compile, DDP, activation checkpointing) are seen through.
        *args: the positional inputs of its forward.
        dtype: precision of the run, float32 (default) or float64; lower-precision weights are
            raised call by call.
        declared: sub-layers that the dataflow does not show, from `jacdiag.declare`.
        weights: the values of a model whose parameters are on the meta device, by name. Each is
            read whenever a call needs it and dropped after it, so that the model may be larger
            than the memory.
        **kwargs: the keyword inputs of its forward. KV caches are switched off where the forward
            takes `use_cache`.

    Returns:
        The sub-layers in the order of the residual stream.

    Raises:
        TraceError: the forward raises (the model's own error is the cause), or nothing could be
            recorded.
        UsageError: float64 on a device that has none.

    Example:
        >>> import torch, jacdiag
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)
        >>> [site.kind for site in jacdiag.sites(layer, torch.randn(2, 4, 8))]
        ['attention', 'mlp']
    """
    tracer = Tracer(model, args, kwargs, dtype or torch.float32, declarations(declared), weights)
    return tracer.trace()


def _check_inputs(model: nn.Module, inputs: Any) -> None:
    """Raise for what cannot be recorded: parameters without a shape, inputs without an element."""
    # 1. Lazy modules.
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            hint = "run the model once on an input: lazy modules take their shape from it"
            raise TraceError(f"parameter '{name}' has no shape yet", hint=hint)

    # 2. Empty inputs. The first tensor holds the tokens.
    tensors = tensors_in(inputs)
    is_empty = bool(tensors) and tensors[0].numel() == 0
    if is_empty:
        got = f"a tensor of shape {tuple(tensors[0].shape)}"
        raise TraceError("the input is empty", got=got, hint="at least one sequence of one token")


class Tracer:
    """The steps of `sites`, in order; each returns a stage of `jacdiag.trace.stages`.

    Args:
        model: the model, wrapped or not.
        args: the positional inputs of its forward.
        kwargs: the keyword inputs of its forward.
        dtype: precision of the run; a float64 model runs in float64 whatever this says.
        declared: sub-layers that the dataflow does not show.
        weights: the values of a model on the meta device, by name.
        keep_hooks: record the model with its hooks, without comparing it with a copy that has none.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dtype: torch.dtype,
        declared: Sequence[Declaration] = (),
        weights: Mapping[str, Tensor] | None = None,
        *,
        keep_hooks: bool = False,
    ) -> None:
        # 1. Check the model and its inputs.
        check_module(model, "jacdiag.sites")
        refuse_flat_shards(model)  # before unwrapping: only the wrapper knows
        self.model = unwrap(model)
        self.declared = declared
        self.weights = weights
        _check_inputs(self.model, (args, kwargs))

        # 2. The precision of the run.
        dtypes = {parameter.dtype for parameter in self.model.parameters()}
        self.dtype = dtype
        if torch.float64 in dtypes:
            self.dtype = torch.float64
        device = device_of((args, kwargs))
        check_precision(device, self.dtype)

        # 3. The copy that is run. Without values the model itself cannot be run to see what it
        # computes: then the copy keeps its hooks.
        has_hooks = has_foreign_hooks(self.model)
        self.compares_with_model = has_hooks and weights is None and not keep_hooks
        self.skeleton = Skeleton(
            self.model,
            keep_hooks=has_hooks and not self.compares_with_model,
            weights=weights,
            device=device,
        )
        self.args, self.kwargs = prepared(self.model, args, kwargs, self.dtype)

    def trace(self) -> Sites:
        """Run all steps and return the sub-layers."""
        with (
            model_code(),
            full_precision(),
            torch.inference_mode(False),
            torch.no_grad(),
            borrowed(),
        ):
            recording = self.record(self.skeleton)
            if self.compares_with_model:
                recording = self.follow_model(recording)
            residuals = self.find(recording)
            captured = capture_or_blame(residuals)
            return Sites(assemble(captured), captured)

    def record(self, skeleton: Skeleton) -> Recording:
        """Run the model's code once and keep what it did.

        Raises:
            TraceError: the model's code raised.
        """
        try:
            graph, output = record(skeleton, self.args, self.kwargs, self.dtype)
        except (SourceError, torch.OutOfMemoryError, MemoryError):
            # The weights could not be read, or memory is too small: not the model's doing.
            raise
        except Exception as error:
            hint = None
            if skeleton.valueless:
                hint = "its code may need values: the meta device has none"
            raise TraceError(
                "the model's forward raised", got=own_frames(error), hint=hint
            ) from error

        # The inputs are known by negative keys, since no call of the record made them.
        inputs = tensors_in((self.args, self.kwargs))
        keys = tuple(range(-1, -1 - len(inputs), -1))
        root = Call.take("", self.args, self.kwargs, keys, set())
        replayer = Replayer(skeleton, graph, self.dtype, root)
        return Recording(skeleton, graph, output, replayer, self.dtype)

    def follow_model(self, recording: Recording) -> Recording:
        """Compare the copy's output with the model's own; record with hooks if they differ.

        If they differ even so, the recording names the first module that computes something else.
        """
        original = OriginalRun(self.model, recording.replayer.root)
        if original.agrees(recording.output):
            return recording

        # 1. Take the hooks along.
        hooked = self.record(Skeleton(self.model, keep_hooks=True))
        if original.agrees(hooked.output):
            return hooked.with_note(
                "forward hooks change the model's output: they are part of what is measured"
            )

        # 2. Name the module whose output differs first.
        stray = original.first_stray(
            hooked.skeleton.root, lambda: hooked.replayer.tapped([], lambda _, t: t)
        )
        where = "in its own forward"
        if stray:
            where = f"in '{stray}'"
        return hooked.with_note(
            f"outside its hooks the model computes something else, first {where}: that is not "
            "covered",
            stray=stray,
        )

    def find(self, recording: Recording) -> Residuals:
        """Find the residual sums of a recording, and where everything else belongs."""
        # 1. The sums that the dataflow shows, and those that are declared.
        graph = recording.graph
        finder = Finder(graph)
        recognised = finder.find()
        declared = declared_sites(graph, finder, self.declared, recognised)
        hidden = hidden_lines(graph, finder, declared)

        # 2. Without those of a module whose copy computes something else.
        arranged = finder.arrange([*recognised, *declared])
        sites = [site for site in arranged if not _strays(graph, site, recording.stray)]

        # 3. Where they belong, and what is not covered.
        homes = [home_of(graph, finder, site, sites) for site in sites]
        coverage = cover(graph, finder, sites, homes, recording.skeleton)
        missing = find_missing_shortcuts(graph, finder, coverage, recording.skeleton)
        for part in missing:
            coverage.leave_out(part.parameters, "no shortcut leads around it")
        return Residuals(
            recording=recording,
            finder=finder,
            sites=sites,
            homes=homes,
            streams=Streams(graph, finder, sites),
            coverage=coverage,
            left_out=left_out(graph, finder, sites),
            missing=missing,
            hidden=hidden,
        )


def _strays(graph: Graph, site: Site, stray: str) -> bool:
    """Return whether a site has to do with a module whose copy computes something else.

    Args:
        graph: what one forward did.
        site: the residual sum.
        stray: name of the module, "" for none.
    """
    if not stray:
        return False

    # The modules in whose run a call of the branch, or the addition, is made.
    around: set[str] = set()
    for node in (*site.cone, site.addition):
        around.update(graph.paths_around(graph.nodes[node].invocation))
    return any(f"{path}.".startswith(f"{stray}.") for path in around)


def capture_or_blame(residuals: Residuals) -> Captured:
    """Run the model once more and keep its tensors; name the call if the two runs differ.

    Args:
        residuals: the residual sums of a recording.

    Raises:
        TraceError: the second run did not make the same calls.
    """
    # 1. The second run. One that makes other calls does not meet the recorded values.
    recording = residuals.recording
    root = recording.replayer.root
    try:
        captured = capture(residuals)
    except (TraceError, LookupError) as error:
        call = culprit(recording.skeleton, root, recording.dtype)
        if not call:
            raise
        raise TraceError(
            "two runs on the same input do not make the same calls",
            got=call,
            hint=REPEAT_THE_FORWARD,
        ) from error
    if captured.deterministic:
        return captured

    # 2. The call at which two runs begin to differ.
    call = culprit(recording.skeleton, root, recording.dtype)
    if not call:
        return replace(captured, culprit="two more runs agreed: it comes and goes")

    # 3. The model may do the same, by kernels that round otherwise in every run.
    if _differs_by_rounding_of_kernels(captured):
        return captured.as_deterministic(
            "two runs differ by rounding; they are the same with torch's deterministic kernels "
            f"(torch.use_deterministic_algorithms): {call}"
        )
    return replace(captured, culprit=call)


def _differs_by_rounding_of_kernels(captured: Captured) -> bool:
    """Return whether two runs differ by rounding, and not at all with deterministic kernels."""
    # 1. A run like the recorded one.
    recording = captured.residuals.recording
    root = recording.replayer.root
    with borrowed(recording.graph.start):
        args, kwargs = root.arguments()
        _, output = observe(Recorder, recording.skeleton, args, kwargs, recording.dtype)
    if not close_output(output, recording.output, _ROUNDING):
        return False

    # 2. Runs with other kernels.
    return repeats_with_deterministic_kernels(
        recording.skeleton, root, recording.dtype, recording.graph.start
    )


def capture(residuals: Residuals) -> Captured:
    """Run the model once more and keep the arguments of owners, the shortcuts and the branches.

    Args:
        residuals: the residual sums of a recording.
    """
    recording = residuals.recording
    sites = residuals.sites
    groups = residuals.streams.groups
    replayer = recording.replayer

    # 1. Which module calls are to be made again later.
    owners = [_owner(recording.graph, site) for site in sites]
    owners_after = [_owner_after(recording.graph, group) for group in groups]

    # 2. Which values are to be kept. Those among the arguments are kept with the call.
    values_to_keep = {site.shortcut for site in sites} | {group.output for group in groups}
    results: dict[int, Spot] = {}
    for value in values_to_keep:
        spot = replayer.spot_of(value, 0)
        if spot.where is not Where.ARGUMENT:
            results[value] = spot

    # 3. Smaller module calls by which a branch can be run, without what the owner does before it.
    # A norm of a value that is kept is mostly a module of its own.
    smaller = _calls_without_products(recording.graph, values_to_keep)
    for site, owner in zip(sites, owners, strict=True):
        smaller |= _calls_on_routes(replayer, site, owner)

    # 4. Where each branch is met.
    terms = {("term", k): replayer.end_of(site, 0) for k, site in enumerate(sites)}

    # 5. Run.
    calls = {0, *owners, *owners_after, *smaller}
    output, tensors = replayer.capture(calls, results, terms)
    tensors |= replayer.calls[0].tensors

    # 6. Whether the run was the same as the recorded one.
    same = same_output(output, recording.output) and _same_with_other_numbers(recording)
    return Captured(
        residuals=residuals,
        owners=owners,
        owners_after=owners_after,
        values=tensors,
        branches=[tensors[key] for key in terms],
        deterministic=same,
    )


def _same_with_other_numbers(recording: Recording) -> bool:
    """Return whether the random numbers that the model drew, if any, do not change its output.

    Re-runs are given the same numbers, so that only a run with others can show it.
    """
    if recording.graph.start is None:
        return True

    # The caller puts the generators back.
    another_draw()
    args, kwargs = recording.replayer.root.arguments()
    _, output = observe(Recorder, recording.skeleton, args, kwargs, recording.dtype)
    return same_output(output, recording.output)


def _calls_on_routes(replayer: Replayer, site: Site, owner: int) -> set[int]:
    """Return the module calls by which a branch, and its shortcut's way into the sum, are run."""
    # 1. Where both end.
    ends = [replayer.endpoint_of(site)]
    if site.scaled:
        addition, position = site.carrier
        ends.append(Endpoint(Where.TERM, addition, position))

    # 2. The routes to there.
    source = Endpoint.of_value(replayer.graph, site.shortcut)
    calls: set[int] = set()
    for end in ends:
        route = replayer.routes.find(owner, source, end)
        calls.update(leg.invocation for leg in route.legs)
    return calls


def _calls_without_products(graph: Graph, values: Set[int]) -> set[int]:
    """Return the module calls that are given one of some values and make no matrix product.

    A norm is such a call.
    """
    # 1. The products, in the order of the run.
    products = [node.index for node in graph.nodes if node.name in PRODUCTS]

    # 2. Calls between whose beginning and end there is none.
    calls: set[int] = set()
    for call in graph.invocations:
        if values.isdisjoint(call.arguments):
            continue

        # A call that has not ended has no end.
        if call.end < 0:
            continue
        if bisect_left(products, call.start) == bisect_left(products, call.end):
            calls.add(call.index)
    return calls


def _owner(graph: Graph, site: Site) -> int:
    """Return the innermost module call that holds a branch and its sum."""
    innermost = graph.nodes[site.addition].invocation
    return owner_of(graph, innermost, site.cone[0], site.addition, site.shortcut)


def _owner_after(graph: Graph, group: StreamSum) -> int:
    """Return the innermost module call that holds a sum and what the stream then becomes."""
    sum_node = graph.values[group.output].node
    after_node = graph.values[group.after].node
    innermost = graph.nodes[sum_node].invocation
    return owner_of(graph, innermost, sum_node, max(sum_node, after_node), group.output)
