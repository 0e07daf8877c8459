"""Readable names, kinds and depths, from the modules and operations of a branch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from jacdiag.records.report import Kind
from jacdiag.trace.discovery.residual import Finder, Site
from jacdiag.trace.graph.graph import Graph
from jacdiag.trace.graph.ops import BILINEAR, CONVOLUTIONS, FUSED_ATTENTION, ROUTING

# What two sub-layers of one layer have in common: a module and a call of it, or a sum.
_LayerKey = tuple[object, ...]


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
    # 1. The module calls around each product.
    products = finder.products_among(finder.own_calls(site, sites))
    first, *others = products or site.cone
    around_all = _calls_around(graph, first)

    # 2. Without those that do not hold all of them. The innermost comes first.
    for node in others:
        around = set(_calls_around(graph, node))
        around_all = [invocation for invocation in around_all if invocation in around]
    return next(iter(around_all), 0)


def _calls_around(graph: Graph, node: int) -> list[int]:
    """Return the module calls that a call stands in, the innermost first."""
    return list(graph.ancestors(graph.nodes[node].invocation))


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
    for index, name in enumerate(names):
        if counts[name] > 1:
            names[index] = f"{name}:{kinds[index]}"

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
    name = graph.path(home)
    if not name:
        name = graph.invocations[home].cls

    # A shared layer runs several times.
    call = _repeat(graph, home)
    if call > 1:
        name = f"{name}@{call}"
    return name


def _repeat(graph: Graph, home: int) -> int:
    """Return which call of its module this is; shared layers run several times."""
    # The calls up to this one, of any module.
    until_this = graph.invocations[: home + 1]
    modules = [call.module for call in until_this]
    return modules.count(graph.path(home))


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

    # 2. By whether tokens are mixed.
    is_token_wise = token_wise()
    if is_token_wise is False:
        return "mixer"

    # 3. A router alone does not show that they are not.
    if _is_routed(graph, site, calls, home):
        return "moe"

    # 4. Tokens are treated one by one, or it is not known.
    if is_token_wise:
        return "mlp"
    return "other"


def _is_attention(graph: Graph, calls: Sequence[int]) -> bool:
    """Return whether a branch has fused attention, or a softmax and a product of two values."""
    # 1. Attention in one call.
    names = {graph.nodes[node].name for node in calls}
    if names & FUSED_ATTENTION:
        return True

    # 2. Written out, attention weighs values by a softmax of scores.
    if "softmax" not in names:
        return False
    return any(_is_bilinear(graph, node) for node in calls)


def _is_convolution(graph: Graph, finder: Finder, site: Site) -> bool:
    """Return whether all products are convolutions, and one sees more than one position."""
    # 1. Every product is a convolution.
    products = finder.products_among(site.calls)
    names = {graph.nodes[node].name for node in products}
    if not names or not names <= CONVOLUTIONS:
        return False

    # 2. Pointwise convolutions alone are linear maps of each token. One that sees neighbours is
    # enough.
    for node in products:
        if not _is_pointwise(graph, node):
            return True
    return False


def _is_routed(graph: Graph, site: Site, calls: Sequence[int], home: int) -> bool:
    """Return whether a call of the branch, or of its module meanwhile, routes tokens to experts."""
    # 1. A call of the branch.
    if _calls_that_route(graph, calls):
        return True

    # 2. A call that the module makes between the branch's first call and the sum.
    meanwhile = range(site.cone[0], site.addition)
    for node in _calls_that_route(graph, meanwhile):
        if home in _calls_around(graph, node):
            return True
    return False


def _calls_that_route(graph: Graph, calls: Iterable[int]) -> list[int]:
    """Return those of some calls that send tokens to experts."""
    return [node for node in calls if graph.nodes[node].name in ROUTING]


def _is_pointwise(graph: Graph, node: int) -> bool:
    """Return whether a convolution has a kernel of one position.

    It is then a linear map of each token, written channels first.
    """
    for value in graph.values_read(node):
        # The kernel depends on no input. The sizes of a bias are an empty set.
        sizes = set(value.shape[2:])
        is_kernel = not value.live
        if is_kernel and sizes == {1}:
            return True
    return False


def _is_bilinear(graph: Graph, node: int) -> bool:
    """Return whether a call multiplies two values that depend on the input."""
    if graph.nodes[node].name not in BILINEAR:
        return False
    factors = graph.float_indices(node)
    return len(set(factors)) >= 2


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
    levels = [_layer_keys(graph, homes, groups, level) for level in range(3)]
    keys = max(levels, key=_count_shared)

    # 2. If there is no such level: the period of the kinds.
    if keys and not _count_shared(keys):
        keys = _periods(keys, kinds)

    # 3. Numbers in the order of the stream.
    order = {key: depth for depth, key in enumerate(dict.fromkeys(keys))}
    return [order[key] for key in keys]


def _layer_keys(
    graph: Graph, homes: Sequence[int], groups: Sequence[int], level: int
) -> list[_LayerKey]:
    """Return the layer key of every sub-layer, if layers are of a level."""
    pairs = zip(homes, groups, strict=True)
    return [_layer_key(graph, home, group, level) for home, group in pairs]


def _count_shared(keys: Iterable[_LayerKey]) -> int:
    """Return how many layers hold two sub-layers or more."""
    return sum(count >= 2 for count in Counter(keys).values())


def _periods(keys: list[_LayerKey], kinds: Sequence[str]) -> list[_LayerKey]:
    """Return layer keys from the shortest pattern that the kinds repeat.

    All sub-layers are one layer if no kind comes twice. The keys are left as they are if there is
    one kind only, or no pattern.
    """
    # 1. No kind comes twice: one layer.
    count = len(kinds)
    different = len(set(kinds))
    if different == count:
        return [("layer", 0)] * count

    # 2. One kind only has no pattern to go by.
    period = _shortest_period(kinds)
    if period is None or different == 1:
        return keys

    # 3. A layer is one period.
    return [("layer", index // period) for index in range(count)]


def _shortest_period(kinds: Sequence[str]) -> int | None:
    """Return the length of the shortest pattern of two sub-layers or more that repeats."""
    count = len(kinds)
    for period in range(2, count // 2 + 1):
        repeats, left_over = divmod(count, period)
        pattern = list(kinds[:period])

        # The pattern fills all of them.
        if not left_over and pattern * repeats == list(kinds):
            return period
    return None


def _layer_key(graph: Graph, home: int, group: int, level: int) -> _LayerKey:
    """Return what two sub-layers of one layer have in common, if layers are of this level."""
    # 1. A sub-layer in no numbered module.
    numbered = _numbered_paths(graph.path(home))
    if not numbered:
        return ("sum", group)

    # 2. The module at that level, or at the deepest one that there is.
    level_there_is = min(level, len(numbered) - 1)
    prefix = numbered[level_there_is]

    # 3. The outermost call of it around the sub-layer, since a layer may run several times.
    calls = [call for call in graph.ancestors(home) if graph.path(call) == prefix]
    if not calls:
        return (prefix, ("call", _repeat(graph, home)))
    return (prefix, calls[-1])


def _numbered_paths(path: str) -> list[str]:
    """Return the beginnings of a path that end in a number, as "layers.3" of "layers.3.mlp"."""
    parts = path.split(".")

    # A number names a layer of a list.
    beginnings: list[str] = []
    for k, part in enumerate(parts):
        if part.isdigit():
            beginnings.append(".".join(parts[: k + 1]))
    return beginnings
