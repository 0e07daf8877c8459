"""From a model and its inputs to its sub-layers: record, find, capture, dissect."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jacdiag.errors import SourceError, TraceError
from jacdiag.records.report import Placement
from jacdiag.sources.foreign_code import model_code, own_frames
from jacdiag.sources.module_wrappers import unwrap
from jacdiag.sources.python_source import check_module
from jacdiag.trace.discovery.coverage import cover
from jacdiag.trace.discovery.declarations import (
    Declaration,
    declarations,
    declared_sites,
    hidden_lines,
)
from jacdiag.trace.discovery.matrix_order import ACTIVATIONS, roles_of
from jacdiag.trace.discovery.naming import depths_of, home_of, kind_of, names_of
from jacdiag.trace.discovery.norms import Anatomist, Norm
from jacdiag.trace.discovery.norms_by_structure import looks_token_wise
from jacdiag.trace.discovery.residual import Finder, Site
from jacdiag.trace.discovery.residual_stream import Streams, owner_of
from jacdiag.trace.discovery.unlisted_sums import left_out
from jacdiag.trace.execution.determinism import culprit, same_output
from jacdiag.trace.execution.hook_parity import Guest
from jacdiag.trace.execution.module_call import Call, prepared
from jacdiag.trace.execution.replay import Replayer
from jacdiag.trace.execution.rng_state import another_draw, borrowed
from jacdiag.trace.execution.skeleton import Skeleton
from jacdiag.trace.execution.tap import Spot, Where
from jacdiag.trace.execution.tensors import collect_deep, device_of
from jacdiag.trace.execution.wrappers import has_foreign_hooks, refuse_flat_shards
from jacdiag.trace.graph.graph import Graph
from jacdiag.trace.graph.recorder import Recorder, observe, record
from jacdiag.trace.site_list import Sites
from jacdiag.trace.sublayer import Map, Sublayer


def sites(
    model: nn.Module,
    *args: Any,
    dtype: torch.dtype | None = None,
    declared: Iterable[Declaration] | Mapping[str, Any] = (),
    weights: Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> Sites:
    """Records `model(*args, **kwargs)` once and returns its residual sub-layers.

    The model is not touched: its code runs on a structural copy, in eval mode, with its weights by
    reference.

    Args:
        model: any module; wrappers (compile, DDP, activation checkpointing) are seen through.
        *args, **kwargs: the inputs of its forward. KV caches are switched off where the forward
            takes `use_cache`.
        dtype: precision of the run, float32 (default) or float64; lower-precision weights are
            raised call by call.
        declared: sub-layers that the dataflow does not show, from `jacdiag.declare`.
        weights: the values of a model whose parameters are on the meta device, by name: each is
            asked for whenever a call reads it, and dropped after it, so that the model may be
            larger than the memory.

    Raises:
        TraceError: the forward raises (the model's own error is the cause), or nothing could be
            recorded.

    Example:
        >>> import torch, jacdiag
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)
        >>> [site.kind for site in jacdiag.sites(layer, torch.randn(2, 4, 8))]
        ['attention', 'mlp']
    """
    return Tracer(
        model, args, kwargs, dtype or torch.float32, declarations(declared), weights
    ).trace()


def _check_inputs(model: nn.Module, inputs: Any) -> None:
    """Raise for what cannot be recorded: parameters without a shape, inputs without an element."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            hint = "run the model once on an input: lazy modules take their shape from it"
            raise TraceError(f"parameter '{name}' has no shape yet", hint=hint)
    tensors: list[Tensor] = []
    collect_deep(inputs, tensors)
    if tensors and not tensors[0].numel():
        got = f"a tensor of shape {tuple(tensors[0].shape)}"
        raise TraceError("the input is empty", got=got, hint="at least one sequence of one token")


class Tracer:
    """The steps of `sites`, in order; each leaves what it found in an attribute."""

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dtype: torch.dtype,
        declared: Sequence[Declaration] = (),
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        check_module(model, "jacdiag.sites")
        refuse_flat_shards(model)  # before unwrapping: only the wrapper knows
        self.model, self.declared = unwrap(model), declared
        _check_inputs(self.model, (args, kwargs))
        doubles = any(p.dtype is torch.float64 for p in self.model.parameters())
        self.dtype = torch.float64 if doubles else dtype
        self.notes: list[str] = []
        self.culprit = self.stray = ""
        hooked = has_foreign_hooks(self.model)
        # A guest without values cannot be asked what it computes: its hooks are then its own.
        self.compare = hooked and weights is None
        self.skeleton = Skeleton(
            self.model,
            keep_hooks=hooked and not self.compare,
            weights=weights,
            device=device_of((args, kwargs)),
        )
        self.args, self.kwargs = prepared(self.model, args, kwargs, self.dtype)

    def trace(self) -> Sites:
        with model_code(), torch.inference_mode(False), torch.no_grad(), borrowed():
            self._record()
            if self.compare:
                self._follow_guest()
            self.sites = self._find()
            self.homes = [home_of(self.graph, self.finder, site, self.sites) for site in self.sites]
            self.streams = Streams(self.graph, self.finder, self.sites)
            self.coverage = cover(self.graph, self.finder, self.sites, self.homes, self.skeleton)
            self.left_out = left_out(self.graph, self.finder, self.sites)
            self._capture_or_blame()
            return Sites(self._assemble(), self)

    def _find(self) -> list[Site]:
        found = self.finder.find()
        declared = declared_sites(self.graph, self.finder, self.declared, found)
        self.hidden = hidden_lines(self.graph, self.finder, declared)
        return [site for site in self.finder.arrange([*found, *declared]) if not self._strays(site)]

    def _record(self) -> None:
        try:
            self.graph, self.output = record(self.skeleton, self.args, self.kwargs, self.dtype)
        except SourceError:  # the weights could not be read: not the model's doing
            raise
        except Exception as error:
            hint = (
                "its code may need values: the meta device has none"
                if self.skeleton.valueless
                else None
            )
            raise TraceError(
                "the model's forward raised", got=own_frames(error), hint=hint
            ) from error
        self.finder = Finder(self.graph)
        tensors: list[Tensor] = []
        collect_deep((self.args, self.kwargs), tensors)
        root = Call.take("", self.args, self.kwargs, tuple(range(-1, -1 - len(tensors), -1)), set())
        self.replayer = Replayer(self.skeleton, self.graph, self.dtype, root)

    def _follow_guest(self) -> None:
        """Compares the copy's output with the guest's; takes the hooks along if it must, or names
        who strays.
        """
        guest = Guest(self.model, self.replayer.root)
        if guest.agrees(self.output):
            return
        self.skeleton = Skeleton(self.model, keep_hooks=True)
        self._record()
        if guest.agrees(self.output):
            self.notes.append(
                "forward hooks change the model's output: they are part of what is measured"
            )
            return
        self.stray = guest.first_stray(
            self.skeleton.root, lambda: self.replayer.tapped([], lambda _, t: t)
        )
        where = f"in '{self.stray}'" if self.stray else "in its own forward"
        self.notes.append(
            f"outside its hooks the model computes something else, first {where}: that is not "
            "covered"
        )

    # -- second run --------------------------------------------------------------------------------
    def _capture(self) -> None:
        """Runs once more: snapshots the owners' arguments, keeps shortcuts and branches, compares
        the outputs.
        """
        self.owners = [self._owner(site) for site in self.sites]
        self.group_of = {k: g for g, group in enumerate(self.streams.groups) for k in group.sites}
        self.after_owner = {g: self._after_owner(g) for g in range(len(self.streams.groups))}
        values = {s.shortcut for s in self.sites} | {g.output for g in self.streams.groups}
        spots = {v: self.replayer.spot_of(v, 0) for v in values}
        results = {v: spot for v, spot in spots.items() if spot.where is not Where.ARGUMENT}
        terms = {("term", k): self.replayer.end_of(site, 0) for k, site in enumerate(self.sites)}
        owners = {0, *self.owners, *self.after_owner.values()}
        output, self.kept = self.replayer.capture(owners, results, terms)
        self.kept |= self.replayer.calls[0].tensors
        self.deterministic = same_output(output, self.output) and self._same_with_other_numbers()

    def _same_with_other_numbers(self) -> bool:
        """Whether the random numbers that the model drew, if any, do not matter. Re-runs are given
        the same ones.
        """
        if self.graph.start is None:
            return True
        another_draw()
        args, kwargs = self.replayer.root.arguments()
        return same_output(
            observe(Recorder, self.skeleton, args, kwargs, self.dtype)[1], self.output
        )

    def _strays(self, site: Site) -> bool:
        """Whether a site has to do with a module whose copy computes something else."""
        if not self.stray:
            return False
        inside = {
            self.graph.path(i)
            for n in (*site.cone, site.addition)
            for i in self.graph.ancestors(self.graph.nodes[n].invocation)
        }
        return any(path == self.stray or path.startswith(f"{self.stray}.") for path in inside)

    def _capture_or_blame(self) -> None:
        try:
            self._capture()
        except (TraceError, LookupError) as error:
            self.culprit = culprit(self.skeleton, self.replayer.root, self.dtype)
            if not self.culprit:
                raise
            raise TraceError(
                "two runs on the same input do not make the same calls",
                got=self.culprit,
                hint="model.eval(), or a fixed seed inside the forward",
            ) from error
        if not self.deterministic:
            named = culprit(self.skeleton, self.replayer.root, self.dtype)
            self.culprit = named or "two more runs agreed: it comes and goes"

    def _owner(self, site: Site) -> int:
        innermost = self.graph.nodes[site.addition].invocation
        return owner_of(self.graph, innermost, site.cone[0], site.addition, site.shortcut)

    def _after_owner(self, group: int) -> int:
        members = self.streams.groups[group]
        made, node = self.graph.values[members.output].node, self.graph.values[members.after].node
        innermost = self.graph.nodes[made].invocation
        return owner_of(self.graph, innermost, made, max(made, node), members.output)

    # -- dissection --------------------------------------------------------------------------------
    def _assemble(self) -> list[Sublayer]:
        anatomist = Anatomist(self.replayer, self.finder)
        self.post_groups: set[int] = set()
        groups = [site.group for site in self.sites]
        made = [self._sublayer(k, anatomist) for k in range(len(self.sites))]
        depths = depths_of(self.graph, self.homes, groups, [site.kind for site in made])
        for site, name in zip(
            made, names_of(self.graph, self.homes, [s.kind for s in made]), strict=True
        ):
            site.name = name
        for site, depth in zip(made, depths, strict=True):
            site.depth = depth
        return made

    def _core(self, owner: int, norm: Norm, end: Spot) -> Callable[[Tensor], Tensor]:
        """Return the branch behind its input norm as a function of z, the learned gain included."""
        segment = self.replayer.segment(owner, norm.spot, end)
        if norm.gain_before is None:
            return segment
        return lambda z: segment(norm.with_gain(z))

    def _sublayer(self, k: int, anatomist: Anatomist) -> Sublayer:
        site, owner = self.sites[k], self.owners[k]
        x = self.kept[site.shortcut]
        source = self.replayer.spot_of(site.shortcut, owner)
        end = self.replayer.end_of(site, owner)
        entry = anatomist.input_norm(site, owner, x)
        exit_ = anatomist.output_norm(site, owner, x)
        group = self.group_of.get(k)
        behind, after = (
            (None, None) if entry or exit_ or group is None else self._behind(group, anatomist)
        )
        products = [n for n in site.calls if self.finder.is_product(n)]
        conv = bool(products) and self._channels_first(site, products[0])
        made = Sublayer(
            name="",
            index=k,
            depth=0,
            group=site.group,
            kind="other",
            placement=_placement(entry, exit_ and exit_[0], behind),
            parallel=sum(s.group == site.group for s in self.sites) > 1,
            nested=site.nested,
            shortcut=x,
            value=self.kept["term", k],
            branch=self.replayer.segment(owner, source, end),
            carry=self._carry(site, owner, source) if site.scaled else None,
            input_norm=entry,
            core_of_norm=None if entry is None else self._core(owner, entry, end),
            output_norm=exit_[0] if exit_ else None,
            before_output_norm=self.replayer.segment(owner, source, exit_[1]) if exit_ else None,
            heads=None,
            post_norm=behind,
            after=after,
            total=None if group is None else self.kept.get(self.streams.groups[group].output),
            parameters=self.coverage.sublayers[k],
            products=_weights(self.graph, products, self.skeleton),
            roles={},
            activations=sorted({self.graph.nodes[n].name for n in site.cone} & ACTIVATIONS),
            feature_dim=entry.feature_dim
            if entry is not None
            else 1
            if conv and x.dim() > 2
            else -1,
            stream_dim=-2 if site.mixed else None,
            functions=tuple(sorted({self.graph.nodes[n].function for n in site.cone} - {""})),
            line=self.graph.nodes[site.addition].line,
        )
        if x.is_meta:
            made.notes["placement"] = (
                "found by the operations alone: there are no values on the meta device"
            )
            made.valueless = True
        if x.is_meta or not made.finite:
            made.looks_token_wise = looks_token_wise(self.graph, site.cone, tuple(x.shape))
        made.kind = kind_of(self.graph, self.finder, site, self.homes[k], lambda: made.token_wise)
        made.roles = roles_of(made.kind, made.products)
        if made.kind == "attention" and entry is not None and products:
            made.heads = self._heads(owner, entry.spot, products[-1])
        return made

    def _channels_first(self, site: Site, product: int) -> bool:
        """Whether the branch begins with a convolution of the shortcut as it stands, not of a
        transposed one.
        """
        turned = {
            "transpose",
            "permute",
            "swapaxes",
            "swapdims",
            "movedim",
            "moveaxis",
            "T",
            "mT",
            "adjoint",
        }
        before = {self.graph.nodes[n].name for n in site.cone if n < product}
        return self.graph.nodes[product].name.startswith("conv") and not before & turned

    def _heads(self, owner: int, source: Spot, last_product: int) -> Map | None:
        read = list(self.graph.float_inputs(last_product))
        if len(read) != 1:
            return None
        return self.replayer.segment(owner, source, self.replayer.spot_of(read[0].index, owner))

    def _carry(self, site: Site, owner: int, source: Spot) -> Map:
        addition, position = site.carrier
        return self.replayer.segment(
            owner, source, self.replayer.spot_at(Where.TERM, addition, owner, position)
        )

    def _behind(self, index: int, anatomist: Anatomist) -> tuple[Norm | None, Map | None]:
        """A norm between a sum and the next shortcut, and the map that it makes with its gain."""
        group, owner = self.streams.groups[index], self.after_owner[index]
        y = self.kept.get(group.output)
        if group.after == group.output or y is None or not self._norm_is_the_layers(index):
            return None, None
        norm = anatomist.norm_after(group.output, (group.after,), owner, y)
        if norm is None:
            return None, None
        self.post_groups.add(index)
        source, sink = (
            self.replayer.spot_of(group.output, owner),
            self.replayer.spot_of(group.after, owner),
        )
        return norm, self.replayer.segment(owner, source, sink)

    def _norm_is_the_layers(self, index: int) -> bool:
        """Whether a norm behind a sum can be the sub-layer's own: behind the last sum it may be the
        model's final norm.

        The last sum is post-norm if the one before it is, or, alone on its stream, if its module
        makes both.
        """
        group = self.streams.groups[index]
        if group.following is not None:
            return True
        if group.preceding is not None:
            return group.preceding in self.post_groups
        module = self.graph.nodes[self.graph.values[group.output].node].invocation
        return module != 0 and self.after_owner[index] == module


def _placement(entry: Norm | None, exit_: Norm | None, behind: Norm | None) -> Placement:
    if entry is not None:
        return "sandwich" if exit_ is not None else "pre"
    if exit_ is not None:
        return "reordered"
    return "post" if behind is not None else "none"


def _weights(graph: Graph, products: list[int], skeleton: Skeleton) -> list[str]:
    """Names of the weight matrices of matrix products, in order of use; biases left out."""
    from jacdiag.trace.discovery.coverage import parameters_of

    names = [
        n
        for node in products
        for n in parameters_of(graph, (node,), skeleton)
        if skeleton.outlines[n].dim() >= 2
    ]
    return list(dict.fromkeys(names))
