"""From captured residual sums to sub-layers: norms, maps, weights, kind, name and depth of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from jacdiag.records.report import Placement
from jacdiag.trace.discovery.coverage import parameters_of
from jacdiag.trace.discovery.independence import independent_by_dataflow
from jacdiag.trace.discovery.matrix_order import roles_of
from jacdiag.trace.discovery.naming import depths_of, kind_of, names_of
from jacdiag.trace.discovery.norms import Anatomist, Norm
from jacdiag.trace.discovery.norms_by_structure import looks_token_wise
from jacdiag.trace.discovery.residual import Site
from jacdiag.trace.execution.routes import Endpoint
from jacdiag.trace.execution.skeleton import Skeleton
from jacdiag.trace.execution.tap import Where
from jacdiag.trace.graph.graph import Graph
from jacdiag.trace.graph.ops import ACTIVATIONS, PARTS_OF_NORMS, TRANSPOSITIONS
from jacdiag.trace.stages import Captured
from jacdiag.trace.sublayer import Map, Sublayer


def assemble(captured: Captured) -> list[Sublayer]:
    """Return the sub-layers of captured residual sums, in the order of the stream."""
    return _Assembler(captured).sublayers()


@dataclass(frozen=True)
class _Norms:
    """The norms around one branch.

    Attributes:
        entry: the norm at its beginning.
        exit: the norm at its end, and `before_exit`, where the norm's input is met.
        post: the norm after the sum, and `after`, the map from the sum to the next shortcut.
    """

    entry: Norm | None
    exit: Norm | None = None
    before_exit: Endpoint | None = None
    post: Norm | None = None
    after: Map | None = None

    @property
    def placement(self) -> Placement:
        """Where the norms stand, as reports name it."""
        # 1. At both ends of the branch, or at one.
        has_entry = self.entry is not None
        has_exit = self.exit is not None
        if has_entry and has_exit:
            return "sandwich"
        if has_entry:
            return "pre"
        if has_exit:
            return "reordered"

        # 2. After the sum.
        if self.post is not None:
            return "post"
        return "none"


class _Assembler:
    """Builds the sub-layers of one model."""

    def __init__(self, captured: Captured) -> None:
        residuals = captured.residuals
        self.captured = captured
        self.graph = residuals.recording.graph
        self.replayer = residuals.recording.replayer
        self.skeleton = residuals.recording.skeleton
        self.finder = residuals.finder
        self.sites = residuals.sites
        self.homes = residuals.homes
        self.groups = residuals.streams.groups
        self.coverage = residuals.coverage
        self.anatomist = Anatomist(self.replayer, self.finder)
        self.group_of = {site: k for k, group in enumerate(self.groups) for site in group.sites}
        self.groups_with_post_norm: set[int] = set()

    def sublayers(self) -> list[Sublayer]:
        """Build every sub-layer, then give names and depths, which depend on all of them."""
        # 1. The sub-layers one by one.
        sublayers = [self._sublayer(index) for index in range(len(self.sites))]

        # 2. Depths and names.
        kinds = [sublayer.kind for sublayer in sublayers]
        groups = [site.group for site in self.sites]
        depths = depths_of(self.graph, self.homes, groups, kinds)
        names = names_of(self.graph, self.homes, kinds)

        # 3. Each takes its own.
        for sublayer, name, depth in zip(sublayers, names, depths, strict=True):
            sublayer.name = name
            sublayer.depth = depth
        return sublayers

    def _sublayer(self, index: int) -> Sublayer:
        """Build one sub-layer, still without a name and a depth."""
        # 1. Where its branch begins and ends, and the module call that holds it.
        site, owner = self.sites[index], self.captured.owners[index]
        x = self.captured.values[site.shortcut]
        source = Endpoint.of_value(self.graph, site.shortcut)
        end = self.replayer.endpoint_of(site)

        # 2. Its norms, products and operations.
        norms = self._norms_of(index, x)
        products = self.finder.products_among(site.calls)
        records = [self.graph.nodes[node] for node in site.cone]
        operations = {record.name for record in records}
        custom_functions = {record.function for record in records} - {""}
        same_group = [other for other in self.sites if other.group == site.group]
        branch = self.captured.branches[index]
        feature_dim = self._feature_dim(site, norms.entry, products, x)
        dims = independent_by_dataflow(self.graph, site, feature_dim, tuple(branch.shape))

        # 3. The sub-layer, then what depends on its kind.
        sublayer = Sublayer(
            name="",
            index=index,
            depth=0,
            group=site.group,
            kind="other",
            placement=norms.placement,
            parallel=len(same_group) > 1,
            nested=site.nested,
            shortcut=x,
            value=branch,
            branch=self.replayer.between(owner, source, end),
            carry=self._carry(site, owner, source),
            input_norm=norms.entry,
            core_of_norm=self._core(owner, norms.entry, end),
            output_norm=norms.exit,
            before_output_norm=self._before_exit(owner, source, norms),
            heads=None,
            post_norm=norms.post,
            after=norms.after,
            total=self._sum_of_group(self.group_of.get(index)),
            parameters=self.coverage.sublayers[index],
            products=_weights(self.graph, products, self.skeleton),
            roles={},
            activations=sorted(operations & ACTIVATIONS),
            norm_inside=not operations.isdisjoint(PARTS_OF_NORMS),
            feature_dim=feature_dim,
            stream_dim=-2 if site.mixed else None,
            functions=tuple(sorted(custom_functions)),
            line=self.graph.nodes[site.addition].line,
            dims=dims,
        )
        self._classify(sublayer, site, self.homes[index])
        if sublayer.kind == "attention" and norms.entry is not None and products:
            sublayer.heads = self._heads(owner, norms.entry.endpoint, products[-1])
        return sublayer

    # -- norms -------------------------------------------------------------------------------------
    def _norms_of(self, index: int, x: Tensor) -> _Norms:
        """Return the norms around a branch; a post-norm is looked for only if it has no other."""
        # 1. The norms in the branch.
        site, owner = self.sites[index], self.captured.owners[index]
        entry = self.anatomist.input_norm(site, owner, x)
        exit_norm = self.anatomist.output_norm(site, owner, x)
        if exit_norm is not None:
            norm, before_norm = exit_norm
            return _Norms(entry, exit=norm, before_exit=before_norm)

        # 2. The norm after the sum.
        group = self.group_of.get(index)
        if entry is not None or group is None:
            return _Norms(entry)
        return self._post_norm(group)

    def _post_norm(self, index: int) -> _Norms:
        """Return a norm between a sum and the next shortcut, with the map that it makes."""
        # 1. Whether there may be one.
        group, owner = self.groups[index], self.captured.owners_after[index]
        y = self.captured.values.get(group.output)
        has_nothing_after = group.after == group.output
        if has_nothing_after or y is None:
            return _Norms(None)
        if not self._norm_belongs_to_sublayer(index):
            return _Norms(None)

        # 2. The norm and the map.
        norm = self.anatomist.norm_after(group.output, (group.after,), owner, y)
        if norm is None:
            return _Norms(None)
        self.groups_with_post_norm.add(index)
        source = Endpoint.of_value(self.graph, group.output)
        sink = Endpoint.of_value(self.graph, group.after)
        return _Norms(None, post=norm, after=self.replayer.between(owner, source, sink))

    def _norm_belongs_to_sublayer(self, index: int) -> bool:
        """Return whether a norm after a sum is the sub-layer's own, not the model's final norm.

        Only after the last sum is there a doubt. That sum is post-norm if the one before it is,
        or, if it is alone on its stream, if its module makes both.
        """
        # 1. A sum that another follows.
        group = self.groups[index]
        if group.following is not None:
            return True

        # 2. The last sum of several.
        if group.preceding is not None:
            return group.preceding in self.groups_with_post_norm

        # 3. The only sum of its stream.
        module = self.graph.nodes[self.graph.values[group.output].node].invocation
        is_made_by_part = module != 0
        return is_made_by_part and self.captured.owners_after[index] == module

    # -- maps --------------------------------------------------------------------------------------
    def _core(self, owner: int, norm: Norm | None, end: Endpoint) -> Map | None:
        """Return the branch after its input norm as a function of z, the learned gain included."""
        if norm is None:
            return None

        # A gain that comes before z is applied to it first.
        segment = self.replayer.between(owner, norm.endpoint, end)
        if norm.gain_before is None:
            return segment
        return lambda z: segment(norm.with_gain(z))

    def _before_exit(self, owner: int, source: Endpoint, norms: _Norms) -> Map | None:
        """Return the branch up to the norm at its end; None if it has no such norm."""
        sink = norms.before_exit
        if sink is None:
            return None
        return self.replayer.between(owner, source, sink)

    def _carry(self, site: Site, owner: int, source: Endpoint) -> Map | None:
        """Return the shortcut's way into the sum; None if the sum adds the shortcut itself."""
        if not site.scaled:
            return None
        addition, position = site.carrier
        sink = Endpoint(Where.TERM, addition, position)
        return self.replayer.between(owner, source, sink)

    def _heads(self, owner: int, source: Endpoint, last_product: int) -> Map | None:
        """Return the map from z to what the last product (W_O) reads."""
        read = self.graph.float_indices(last_product)
        if len(read) != 1:
            return None

        # The concatenated heads.
        sink = Endpoint.of_value(self.graph, read[0])
        return self.replayer.between(owner, source, sink)

    def _sum_of_group(self, group: int | None) -> Tensor | None:
        """Return the sum of a group as captured; None for a sub-layer that is on no stream."""
        if group is None:
            return None
        output = self.groups[group].output
        return self.captured.values.get(output)

    # -- layout and kind ---------------------------------------------------------------------------
    def _feature_dim(
        self, site: Site, entry: Norm | None, products: Sequence[int], x: Tensor
    ) -> int:
        """Return the dimension of x that holds the features."""
        # 1. The norm at the beginning shows it.
        if entry is not None:
            return entry.feature_dim

        # 2. So does a convolution. Tokens (T, d) have no channels.
        may_have_channels = x.dim() > 2 and len(products) > 0
        if may_have_channels and self._channels_first(site, products[0]):
            return 1
        return -1

    def _channels_first(self, site: Site, product: int) -> bool:
        """Return whether the branch begins with a convolution of the shortcut, not transposed."""
        if not self.graph.nodes[product].name.startswith("conv"):
            return False

        # A transposition before it would have put the channels first.
        calls_before = [node for node in site.cone if node < product]
        names_before = {self.graph.nodes[node].name for node in calls_before}
        return names_before.isdisjoint(TRANSPOSITIONS)

    def _classify(self, sublayer: Sublayer, site: Site, home: int) -> None:
        """Fill in what a sub-layer's kind depends on, its kind, and the roles of its weights."""
        # 1. Without values, or with NaN among them, the operations have to do.
        x = sublayer.shortcut
        if x.is_meta:
            sublayer.notes["placement"] = (
                "found by the operations alone: there are no values on the meta device"
            )
            sublayer.valueless = True
        if x.is_meta or not sublayer.finite:
            sublayer.looks_token_wise = looks_token_wise(self.graph, site.cone, tuple(x.shape))

        # 2. The kind, and what depends on it.
        sublayer.kind = kind_of(self.graph, self.finder, site, home, lambda: sublayer.token_wise)
        sublayer.roles = roles_of(sublayer.kind, sublayer.products)


def _weights(graph: Graph, products: Sequence[int], skeleton: Skeleton) -> list[str]:
    """Return the names of the weight matrices of products, in order of use, without biases."""
    names: dict[str, None] = {}
    for node in products:
        read = parameters_of(graph, (node,), skeleton)
        names.update(dict.fromkeys(read))

    # A bias has one dimension.
    return [name for name in names if skeleton.outlines[name].dim() >= 2]
