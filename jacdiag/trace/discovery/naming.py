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

    Args:
        graph: what one forward did.
        finder: of the same graph.
        site: the sub-layer.
        sites: all sub-layers.
    """
    own_calls = finder.own_calls(site, sites)
    products = [node for node in own_calls if finder.is_product(node)]
    first, *others = products or site.cone

    # The module calls around the first product, without those that do not hold the others.
    around_all = list(graph.ancestors(graph.nodes[first].invocation))
    for node in others:
        around = set(graph.ancestors(graph.nodes[node].invocation))
        around_all = [invocation for invocation in around_all if invocation in around]
    if not around_all:
        return 0
    return around_all[0]


def names_of(graph: Graph, homes: Sequence[int], kinds: Sequence[str]) -> list[str]:
    """Return the names of sub-layers, from their modules.

    The kind and a running number are added if the module alone is not unique.

    Args:
        graph: what one forward did.
        homes: for each sub-layer, the innermost module call that makes its products.
        kinds: their kinds.
    """
    # 1. The module, and which call of it.
    names = [_name_of_call(graph, home) for home in homes]

    # 2. The kind, where names repeat.
    counts = Counter(names)
    for index, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        if counts[name] > 1:
            names[index] = f"{name}:{kind}"

    # 3. A running number, where names repeat even so.
    counts = Counter(names)
    seen: Counter[str] = Counter()
    for index, name in enumerate(names):
        if counts[name] > 1:
            seen[name] += 1
            names[index] = f"{name}.{seen[name]}"
    return names


def _name_of_call(graph: Graph, home: int) -> str:
    """Return the name of a module call: its module, and which call of it unless the first."""
    name = graph.path(home) or graph.invocations[home].cls
    call = _repeat(graph, home)
    if call == 1:
        return name
    return f"{name}@{call}"


def _repeat(graph: Graph, home: int) -> int:
    """Return which call of its module this is; shared layers run several times."""
    path = graph.path(home)
    calls = [call for call in graph.invocations[: home + 1] if call.module == path]
    return len(calls)


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
    # 1. By the operations.
    calls = finder.inner_calls(site)
    if _is_attention(graph, calls):
        return "attention"
    if _is_convolution(graph, finder, site):
        return "conv"

    # 2. By whether tokens are mixed. A router alone does not show it.
    is_token_wise = token_wise()
    is_routed = _is_routed(graph, site, calls, home)
    if is_token_wise is False:
        return "mixer"
    if is_routed:
        return "moe"
    return "mlp" if is_token_wise else "other"


def _is_attention(graph: Graph, calls: Sequence[int]) -> bool:
    """Return whether a branch has fused attention, or a softmax and a product of two values."""
    names = {graph.nodes[node].name for node in calls}
    if names & FUSED_ATTENTION:
        return True
    if "softmax" not in names:
        return False
    return any(_is_bilinear(graph, node) for node in calls)


def _is_convolution(graph: Graph, finder: Finder, site: Site) -> bool:
    """Return whether all products are convolutions, and one sees more than one position."""
    products = [node for node in site.calls if finder.is_product(node)]
    names = {graph.nodes[node].name for node in products}
    if not names or not names <= CONVOLUTIONS:
        return False

    # Pointwise convolutions alone are linear maps of each token.
    return not all(_is_pointwise(graph, node) for node in products)


def _is_routed(graph: Graph, site: Site, calls: Sequence[int], home: int) -> bool:
    """Return whether a call of the branch, or of its module meanwhile, routes tokens to experts."""
    # 1. A call of the branch.
    if any(graph.nodes[node].name in ROUTING for node in calls):
        return True

    # 2. A call that the module makes between the branch's first call and the sum.
    for node in range(site.cone[0], site.addition):
        record = graph.nodes[node]
        if record.name not in ROUTING:
            continue
        if home in graph.ancestors(record.invocation):
            return True
    return False


def _is_pointwise(graph: Graph, node: int) -> bool:
    """Return whether a convolution has a kernel of one position.

    It is then a linear map of each token, written channels first.
    """
    for index in graph.nodes[node].inputs:
        value = graph.values[index]
        is_kernel = not value.live and len(value.shape) >= 3
        if is_kernel and set(value.shape[2:]) == {1}:
            return True
    return False


def _is_bilinear(graph: Graph, node: int) -> bool:
    """Return whether a call multiplies two values that depend on the input."""
    if graph.nodes[node].name not in BILINEAR:
        return False
    factors = {value.index for value in graph.float_inputs(node)}
    return len(factors) >= 2


def depths_of(
    graph: Graph, homes: Sequence[int], groups: Sequence[int], kinds: Sequence[str]
) -> list[int]:
    """Return the layer number of every sub-layer.

    Layers are the numbered modules of the level at which most of them hold two sub-layers or more.
    A sub-layer in no numbered module counts as a layer with all that share its shortcut. If no
    layer would hold two (a loop over lists of attentions and of MLPs, parameters stacked in one
    tensor), a layer is one period of the repeating kinds.

    Args:
        graph: what one forward did.
        homes: for each sub-layer, the innermost module call that makes its products.
        groups: for each, the index of its set of parallel branches.
        kinds: their kinds.
    """
    # 1. The level of numbered modules at which most layers hold two sub-layers.
    keys: list[tuple[object, ...]] = []
    most_shared = -1
    for level in range(3):
        keys_of_level = [
            _layer_key(graph, home, group, level) for home, group in zip(homes, groups, strict=True)
        ]
        shared = [key for key, count in Counter(keys_of_level).items() if count >= 2]
        if len(shared) > most_shared:
            keys, most_shared = keys_of_level, len(shared)

    # 2. If there is no such level: the period of the kinds.
    if keys and not most_shared:
        keys = _periods(keys, kinds)

    # 3. Numbers in the order of the stream.
    order = {key: depth for depth, key in enumerate(dict.fromkeys(keys))}
    return [order[key] for key in keys]


def _periods(keys: list[tuple[object, ...]], kinds: Sequence[str]) -> list[tuple[object, ...]]:
    """Return layer keys from the shortest pattern that the kinds repeat.

    All sub-layers are one layer if no kind comes twice. The keys are left as they are if there is
    one kind only, or no pattern.
    """
    count = len(kinds)
    different = len(set(kinds))
    if different == count:
        return [("layer", 0)] * count
    period = _shortest_period(kinds)
    if period is None or different == 1:
        return keys
    return [("layer", index // period) for index in range(count)]


def _shortest_period(kinds: Sequence[str]) -> int | None:
    """Return the length of the shortest pattern of two sub-layers or more that repeats."""
    count = len(kinds)
    for period in range(2, count // 2 + 1):
        if count % period:
            continue
        if list(kinds) == list(kinds[:period]) * (count // period):
            return period
    return None


def _layer_key(graph: Graph, home: int, group: int, level: int) -> tuple[object, ...]:
    """Return what two sub-layers of one layer have in common, if layers are of this level."""
    # 1. The paths up to a number, as "layers.3" of "layers.3.mlp".
    parts = graph.path(home).split(".")
    numbered = [".".join(parts[: k + 1]) for k, part in enumerate(parts) if part.isdigit()]
    if not numbered:
        return ("sum", group)

    # 2. The module at that level, and the call of it; a layer may run several times.
    prefix = numbered[min(level, len(numbered) - 1)]
    calls = [call for call in graph.ancestors(home) if graph.path(call) == prefix]
    if not calls:
        return (prefix, ("call", _repeat(graph, home)))
    return (prefix, calls[-1])
