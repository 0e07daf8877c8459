"""Readable names, kinds and depths, from the modules and operations of a branch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from jacdiag.records.report import Kind
from jacdiag.trace.discovery.residual import Finder, Site
from jacdiag.trace.graph.graph import Graph

_ATTENTION = {"scaled_dot_product_attention", "multi_head_attention_forward"}
_ROUTING = {"topk", "_grouped_mm", "grouped_mm", "one_hot"}
_CONV = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
_BILINEAR = {"matmul", "bmm", "einsum", "__matmul__", "baddbmm"}


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
    """Names sub-layers by module; the kind and a running number are added where that alone is not
    unique.
    """
    names = [graph.path(home) or graph.invocations[home].cls for home in homes]
    calls = [_repeat(graph, home) for home in homes]
    names = [
        f"{name}@{call}" if call > 1 else name for name, call in zip(names, calls, strict=True)
    ]
    counts = Counter(names)
    names = [f"{n}:{kind}" if counts[n] > 1 else n for n, kind in zip(names, kinds, strict=True)]
    counts = Counter(names)
    seen: Counter[str] = Counter()
    for i, name in enumerate(names):
        if counts[name] > 1:
            seen[name] += 1
            names[i] = f"{name}.{seen[name]}"
    return names


def _repeat(graph: Graph, home: int) -> int:
    """Counts which call of its module this is (shared layers run several times)."""
    path = graph.path(home)
    return sum(i.module == path for i in graph.invocations[: home + 1])


def kind_of(
    graph: Graph, finder: Finder, site: Site, home: int, token_wise: Callable[[], bool | None]
) -> Kind:
    """Tells attention, mlp, moe, conv and mixer apart by what the branch computes."""
    calls = finder.inner_calls(site)
    names = {graph.nodes[n].name for n in calls}
    span = {
        graph.nodes[n].name
        for n in range(site.cone[0], site.addition)
        if home in set(graph.ancestors(graph.nodes[n].invocation))
    }
    if names & _ATTENTION or ("softmax" in names and any(_is_bilinear(graph, n) for n in calls)):
        return "attention"
    products = [n for n in site.calls if finder.is_product(n)]
    if (
        products
        and all(graph.nodes[n].name in _CONV for n in products)
        and not all(map(_pointwise(graph), products))
    ):
        return "conv"
    wise = token_wise()
    if span & _ROUTING or names & _ROUTING:
        return "moe" if wise is not False else "mixer"
    return "other" if wise is None else "mlp" if wise else "mixer"


def _pointwise(graph: Graph) -> Callable[[int], bool]:
    """Whether a convolution has a kernel of one position: a linear map of each token, written
    channels first.
    """

    def test(node: int) -> bool:
        weights = [graph.values[v] for v in graph.nodes[node].inputs if not graph.values[v].live]
        return any(len(w.shape) >= 3 and set(w.shape[2:]) == {1} for w in weights)

    return test


def _is_bilinear(graph: Graph, node: int) -> bool:
    return (
        graph.nodes[node].name in _BILINEAR
        and len({v.index for v in graph.float_inputs(node)}) >= 2
    )


def depths_of(
    graph: Graph, homes: Sequence[int], groups: Sequence[int], kinds: Sequence[str]
) -> list[int]:
    """Numbers the layers: the level of numbered modules at which most layers hold two sub-layers or
    more.

    A sub-layer in no numbered module counts as a layer with all that share its shortcut. Where no
    layer would hold two (a loop over lists of attentions and of MLPs, parameters stacked in one
    tensor) the modules tell nothing, and a layer is one period of the repeating kinds.
    """
    keys_by_level: list[list[tuple[object, ...]]] = [
        [_layer_key(graph, home, group, level) for home, group in zip(homes, groups, strict=True)]
        for level in range(3)
    ]
    score = [sum(n >= 2 for n in Counter(keys).values()) for keys in keys_by_level]
    keys = keys_by_level[score.index(max(score))] if score else []
    if keys and not max(score):
        keys = _periods(keys, kinds)
    order = {key: depth for depth, key in enumerate(dict.fromkeys(keys))}
    return [order[key] for key in keys]


def _periods(keys: list[tuple[object, ...]], kinds: Sequence[str]) -> list[tuple[object, ...]]:
    """Layer keys from the shortest pattern that the kinds repeat; the whole is one layer if no kind
    comes twice.
    """
    count = len(kinds)
    if len(set(kinds)) == count:
        return [("layer", 0)] * count
    for period in range(2, count // 2 + 1):
        if count % period == 0 and all(kinds[i] == kinds[i % period] for i in range(count)):
            break
    else:
        return keys
    return keys if len(set(kinds)) == 1 else [("layer", i // period) for i in range(count)]


def _layer_key(graph: Graph, home: int, group: int, level: int) -> tuple[object, ...]:
    parts = graph.path(home).split(".")
    numbered = [".".join(parts[: k + 1]) for k, part in enumerate(parts) if part.isdigit()]
    if not numbered:
        return ("sum", group)
    prefix = numbered[min(level, len(numbered) - 1)]
    calls = [i for i in graph.ancestors(home) if graph.path(i) == prefix]
    return (prefix, calls[-1] if calls else ("call", _repeat(graph, home)))
