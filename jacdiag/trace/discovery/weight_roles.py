"""The role of every parameter, from what the forward does with it.

No name of any architecture is used. The matrices of a sub-layer have their roles from the products
that read them (`matrix_roles`), vectors from the first call that reads them (`vector_roles`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from jacdiag.trace.discovery.coverage import parameters_of
from jacdiag.trace.discovery.matrix_roles import BranchMatrices
from jacdiag.trace.discovery.parameter_use import ParameterUse
from jacdiag.trace.discovery.residual import Site
from jacdiag.trace.discovery.vector_roles import (
    first_use,
    length_divided_by,
    lookups_in,
    use_of_vector,
)
from jacdiag.trace.graph.graph import Graph
from jacdiag.trace.graph.ops import JOINS
from jacdiag.trace.site_list import Sites
from jacdiag.trace.sublayer import Sublayer

__all__ = ["NUMBER", "ParameterUse", "length_divided_by", "pattern", "tied_to_head", "uses_of"]

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def uses_of(sites: Sites) -> dict[str, ParameterUse]:
    """Return the use of every parameter of a recorded model, in the order of the parameters.

    A parameter that this forward did not read (an expert without tokens) takes the role of one
    whose name differs from its own in numbers only.

    Args:
        sites: the sub-layers of the model.

    Returns:
        The use by name of the parameter.

    Example:
        >>> import torch, jacdiag
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)
        >>> uses = uses_of(jacdiag.sites(layer, torch.randn(2, 4, 8)))
        >>> names = ("self_attn.in_proj_weight", "linear1.weight", "norm1.weight")
        >>> [uses[name].role for name in names]
        ['W_QKV', 'W_1', 'norm_gain']
    """
    # 1. Parameters that sub-layers read, each by the first that reads it.
    uses: dict[str, ParameterUse] = {}
    for site, raw in zip(sites, sites.raw, strict=True):
        for name, use in _uses_in_sublayer(sites, site, raw).items():
            uses.setdefault(name, use)

    # 2. Parameters outside all sub-layers.
    for name, use in _outside(sites).items():
        uses.setdefault(name, use)

    # 3. Parameters that this forward did not read.
    outlines = sites.skeleton.outlines
    ranks = {name: outline.dim() for name, outline in outlines.items()}
    return {name: uses.get(name) or _like(name, uses, ranks) for name in outlines}


def _uses_in_sublayer(sites: Sites, site: Sublayer, raw: Site) -> dict[str, ParameterUse]:
    """Return the uses of the parameters that a sub-layer reads."""
    # 1. Matrices, from the products of the branch.
    uses_of_matrices = BranchMatrices(sites, site, raw).roles()

    # 2. All parameters, in order. A vector has its role from the first call that reads it.
    uses: dict[str, ParameterUse] = {}
    for name in site.parameters:
        use = uses_of_matrices.get(name) or use_of_vector(sites, name)
        uses[name] = replace(use, layer=site.depth, sublayer=site.name)
    return uses


def pattern(name: str) -> str:
    """Return a parameter's name with its layer number, the first number in it, as "*".

    >>> pattern("model.layers.3.mlp.experts.0.w1.weight")
    'model.layers.*.mlp.experts.0.w1.weight'
    """
    return NUMBER.sub("*", name, count=1)


def tied_to_head(sites: Sites) -> set[str]:
    """Return the embeddings that a product after the last sub-layer reads too.

    Args:
        sites: the sub-layers of the model.

    Returns:
        Names of the parameters.
    """
    # 1. The call that makes the last sum on the stream.
    graph = sites.graph
    last_sum = -1
    for site in sites.raw:
        if not site.nested:
            last_sum = max(last_sum, graph.values[site.output].node)

    # 2. What a product after the last sub-layer reads is the head's.
    calls_after = range(last_sum + 1, len(graph.nodes))
    products = sites.finder.products_among(calls_after)
    read_by_head = set(parameters_of(graph, products, sites.skeleton))
    return read_by_head & set(sites.coverage.embedding)


def _like(name: str, uses: Mapping[str, ParameterUse], ranks: Mapping[str, int]) -> ParameterUse:
    """Return the use of a parameter of the same rank whose name differs in numbers only."""
    own_pattern = NUMBER.sub("*", name)
    for other, use in uses.items():
        # A parameter of another rank has another role.
        if ranks.get(other) != ranks[name]:
            continue

        # The other's layer is not its own.
        if NUMBER.sub("*", other) == own_pattern:
            layer = _layer_in_name(name, use.layer)
            return replace(use, layer=layer, sublayer="")

    # Nothing in this forward shows its role.
    return ParameterUse("")


def _layer_in_name(name: str, layer_of_other: int | None) -> int | None:
    """Return the layer that a parameter's name says, if a similar one belongs to a layer.

    Args:
        name: of the parameter.
        layer_of_other: the layer of a parameter whose name differs in numbers only.
    """
    # A parameter outside all layers may have a number in its name even so.
    if layer_of_other is None:
        return None

    # The first number is that of the layer.
    number = NUMBER.search(name)
    if number is None:
        return layer_of_other
    return int(number[0])


def _outside(sites: Sites) -> dict[str, ParameterUse]:
    """Return the uses of parameters outside all sub-layers: tables, head, what lies between."""
    coverage = sites.coverage
    outside = (*coverage.embedding, *coverage.head, *coverage.norms, *coverage.uncovered)

    # 1. Tables that a lookup reads.
    uses = _lookup_tables(sites)

    # 2. The other parameters.
    for name in outside:
        if name in uses or name not in sites.skeleton.outlines:
            continue
        use = _outer_use(sites, name)
        if use is not None:
            uses[name] = use
    return uses


def _outer_use(sites: Sites, name: str) -> ParameterUse | None:
    """Return the use of a parameter outside all sub-layers; None for one without a place."""
    # 1. A token of its own, such as a class token.
    if _joins_the_input(sites, name):
        return ParameterUse("cls")

    # 2. A vector, or a matrix that has a place.
    is_vector = sites.skeleton.outlines[name].dim() < 2
    if is_vector:
        return use_of_vector(sites, name)
    if name in sites.coverage.uncovered:
        return None
    return _outer_matrix(sites, name)


def _lookup_tables(sites: Sites) -> dict[str, ParameterUse]:
    """Return the uses of lookup tables: the embedding is the longest that the input indexes."""
    # 1. All tables, and those that the input indexes.
    outlines = sites.skeleton.outlines
    uses: dict[str, ParameterUse] = {}
    indexed_by_input: set[str] = set()
    for lookup in lookups_in(sites.graph):
        tables = _tables_read(sites, lookup)
        for name in tables:
            shape = outlines[name].shape
            uses[name] = ParameterUse("positions", fan_in=shape[0], fan_out=shape[-1])
        if _depends_on_input(sites.graph, lookup):
            indexed_by_input.update(tables)

    # 2. The longest of them is the embedding.
    if indexed_by_input:
        longest = max(sorted(indexed_by_input), key=lambda name: outlines[name].shape[0])
        uses[longest] = replace(uses[longest], role="embedding")
    return uses


def _tables_read(sites: Sites, lookup: int) -> list[str]:
    """Return the parameters that a lookup reads."""
    names = parameters_of(sites.graph, (lookup,), sites.skeleton)
    return [name for name in names if name in sites.skeleton.outlines]


def _depends_on_input(graph: Graph, node: int) -> bool:
    """Return whether a call reads a value, or an index, that comes from the model's input."""
    return any(value.live or value.routed for value in graph.values_read(node))


def _outer_matrix(sites: Sites, name: str) -> ParameterUse:
    """Return the use of a matrix outside all sub-layers, by the first product that reads it."""
    # 1. The first product that reads the matrix.
    graph = sites.graph
    products = sites.finder.products_among(range(len(graph.nodes)))
    reader = _first_reader_of(sites, products, name)

    # 2. A matrix that no product reads. Before the first sub-layer, it is added.
    if reader is None and name in sites.coverage.embedding:
        return ParameterUse("positions")
    if reader is None:
        return ParameterUse("")

    # 3. The last product of all is the head.
    is_last_product = reader == products[-1]
    role = "head" if is_last_product else "projection"

    # 4. How many features go in and come out.
    value_in = graph.float_inputs(reader)[0]
    value_out = graph.values[graph.nodes[reader].outputs[0]]
    return ParameterUse(role, fan_in=value_in.features, fan_out=value_out.features)


def _first_reader_of(sites: Sites, calls: Iterable[int], name: str) -> int | None:
    """Return the first of some calls that reads a parameter; None if none does."""
    for node in calls:
        # Through values made of parameters alone, too.
        read = parameters_of(sites.graph, (node,), sites.skeleton)

        # The first one decides.
        if name in read:
            return node
    return None


def _joins_the_input(sites: Sites, name: str) -> bool:
    """Return whether a parameter is a token of its own, joined to those of the input."""
    # 1. The first call that reads it joins tensors.
    graph = sites.graph
    use = first_use(graph, name)
    if use is None or graph.nodes[use.node].name not in JOINS:
        return False

    # 2. What it is joined to has tokens.
    joined = graph.values[graph.nodes[use.node].outputs[0]].shape
    if len(joined) < 3:
        return False

    # 3. A token has the features of those that it joins.
    shape = sites.skeleton.outlines[name].shape
    return tuple(shape[-1:]) == joined[-1:]
