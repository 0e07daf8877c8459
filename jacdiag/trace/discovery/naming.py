"""Readable names, kinds and depths, from the modules and operations of a branch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from jacdiag.records.report import Kind
from jacdiag.trace.discovery.residual import Finder, Site
from jacdiag.trace.graph.graph import Graph
from jacdiag.trace.graph.ops import BILINEAR, CONVOLUTIONS, FUSED_ATTENTION, ROUTING


def home_of(graph: Graph, finder: Finder, site: Site, sites: Sequence[Site] = ()) -> int:
    """Return the innermost module call that makes all matrix products of a branch.

    Products that only update another stream on the way (an edge stream that the branch reads) are
    not the branch's.
    """
    products = [n for n in finder.own_calls(site, sites) if finder.is_product(n)] or list(site.cone)
    shared: list[int] | None = None
    for node in products:
        line = list(graph.ancestors(graph.nodes[node].invocation))
        shared = line if shared is None else [i for i in shared if i in set(line)]
    return shared[0] if shared else 0


def names_of(graph: Graph, homes: Sequence[int], kinds: Sequence[str]) -> list[str]:
    """Return the names of sub-layers, from their modules.

    The kind and a running number are added if the module alone is not unique.
    """
    # 1. The module, and which call of it.
    names = [graph.path(home) or graph.invocations[home].cls for home in homes]
    calls = [_repeat(graph, home) for home in homes]
    names = [
        f"{name}@{call}" if call > 1 else name for name, call in zip(names, calls, strict=True)
    ]

    # 2. The kind, where names repeat.
    counts = Counter(names)
    names = [f"{n}:{kind}" if counts[n] > 1 else n for n, kind in zip(names, kinds, strict=True)]

    # 3. A running number, where names repeat even so.
    counts = Counter(names)
    seen: Counter[str] = Counter()
    for i, name in enumerate(names):
        if counts[name] > 1:
            seen[name] += 1
            names[i] = f"{name}.{seen[name]}"
    return names


def _repeat(graph: Graph, home: int) -> int:
    """Return which call of its module this is; shared layers run several times."""
    path = graph.path(home)
    return sum(i.module == path for i in graph.invocations[: home + 1])


def kind_of(
    graph: Graph, finder: Finder, site: Site, home: int, token_wise: Callable[[], bool | None]
) -> Kind:
    """Return the kind of a sub-layer by what its branch computes.

    Args:
        graph: what one forward did.
        finder: of the same graph.
        site: the sub-layer.
        home: the innermost module call that makes its products.
        token_wise: measures whether the branch treats tokens one by one; None if that is unknown.
    """
    calls = finder.inner_calls(site)
    if _is_attention(graph, calls):
        return "attention"
    if _is_convolution(graph, finder, site):
        return "conv"
    wise = token_wise()
    if _is_routed(graph, site, calls, home):
        return "mixer" if wise is False else "moe"
    if wise is None:
        return "other"
    return "mlp" if wise else "mixer"


def _is_attention(graph: Graph, calls: Sequence[int]) -> bool:
    """Return whether a branch has fused attention, or a softmax and a product of two values."""
    names = {graph.nodes[n].name for n in calls}
    if names & FUSED_ATTENTION:
        return True
    return "softmax" in names and any(_is_bilinear(graph, n) for n in calls)


def _is_convolution(graph: Graph, finder: Finder, site: Site) -> bool:
    """Return whether all products are convolutions, and one sees more than one position."""
    products = [n for n in site.calls if finder.is_product(n)]
    if not products or any(graph.nodes[n].name not in CONVOLUTIONS for n in products):
        return False
    return not all(_is_pointwise(graph, n) for n in products)


def _is_routed(graph: Graph, site: Site, calls: Sequence[int], home: int) -> bool:
    """Return whether a call of the branch, or of its module meanwhile, routes tokens to experts."""
    if any(graph.nodes[n].name in ROUTING for n in calls):
        return True
    for n in range(site.cone[0], site.addition):
        node = graph.nodes[n]
        if node.name in ROUTING and home in set(graph.ancestors(node.invocation)):
            return True
    return False


def _is_pointwise(graph: Graph, node: int) -> bool:
    """Return whether a convolution has a kernel of one position.

    It is then a linear map of each token, written channels first.
    """
    for value in graph.nodes[node].inputs:
        shape = graph.values[value].shape
        if not graph.values[value].live and len(shape) >= 3 and set(shape[2:]) == {1}:
            return True
    return False


def _is_bilinear(graph: Graph, node: int) -> bool:
    """Return whether a call multiplies two values that depend on the input."""
    if graph.nodes[node].name not in BILINEAR:
        return False
    return len({v.index for v in graph.float_inputs(node)}) >= 2


def depths_of(
    graph: Graph, homes: Sequence[int], groups: Sequence[int], kinds: Sequence[str]
) -> list[int]:
    """Return the layer number of every sub-layer.

    Layers are the numbered modules of the level at which most of them hold two sub-layers or more.
    A sub-layer in no numbered module counts as a layer with all that share its shortcut. If no
    layer would hold two (a loop over lists of attentions and of MLPs, parameters stacked in one
    tensor), a layer is one period of the repeating kinds.
    """
    keys_by_level: list[list[tuple[object, ...]]] = [
        [_layer_key(graph, home, group, level) for home, group in zip(homes, groups, strict=True)]
        for level in range(3)
    ]
    score = [sum(n >= 2 for n in Counter(keys).values()) for keys in keys_by_level]
    best = max(score)
    keys = keys_by_level[score.index(best)]
    if keys and not best:
        keys = _periods(keys, kinds)
    order = {key: depth for depth, key in enumerate(dict.fromkeys(keys))}
    return [order[key] for key in keys]


def _periods(keys: list[tuple[object, ...]], kinds: Sequence[str]) -> list[tuple[object, ...]]:
    """Return layer keys from the shortest pattern that the kinds repeat.

    All sub-layers are one layer if no kind comes twice.
    """
    count = len(kinds)
    if len(set(kinds)) == count:
        return [("layer", 0)] * count
    for period in range(2, count // 2 + 1):
        if count % period == 0 and all(kinds[i] == kinds[i % period] for i in range(count)):
            break
    else:
        return keys
    if len(set(kinds)) == 1:
        return keys
    return [("layer", i // period) for i in range(count)]


def _layer_key(graph: Graph, home: int, group: int, level: int) -> tuple[object, ...]:
    """Return what two sub-layers of one layer have in common, if layers are of this level."""
    parts = graph.path(home).split(".")
    numbered = [".".join(parts[: k + 1]) for k, part in enumerate(parts) if part.isdigit()]
    if not numbered:
        return ("sum", group)
    prefix = numbered[min(level, len(numbered) - 1)]
    calls = [i for i in graph.ancestors(home) if graph.path(i) == prefix]
    return (prefix, calls[-1] if calls else ("call", _repeat(graph, home)))
