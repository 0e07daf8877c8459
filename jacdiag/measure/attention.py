"""Logits and entropy of attention, from the calls that a forward makes, whatever module makes them.

Three calls are read: `scaled_dot_product_attention`, `multi_head_attention_forward`, and a softmax
that stands between two products of the stream with itself, as in attention that is written by hand.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from jacdiag.devices.accelerators import in_float64, widest
from jacdiag.devices.packed_download import download
from jacdiag.records.signal_propagation import AttentionRecord
from jacdiag.trace import Sites
from jacdiag.trace.execution.tensors import is_float
from jacdiag.trace.graph.graph import Graph
from jacdiag.trace.graph.ops import PRODUCTS

FUSED = {"scaled_dot_product_attention", "multi_head_attention_forward"}
SOFTMAX = {"softmax", "_softmax", "softmax_"}
CALLS = FUSED | SOFTMAX
MASKED = -9000.0  # masks are written as -inf, the least float, -1e9 or -1e4 plus the score
_AT_ONCE = 2**22  # scores that are held together
# calls between a softmax and the products before and after it: scale, bias, mask, cast, dropout
_STEPS = 24


# -- which calls belong to which sub-layer ---------------------------------------------
def attention_calls(sites: Sites) -> dict[int, int]:
    """Return the sub-layer of each attention call: place among all calls in `CALLS` -> index.

    A call inside two branches belongs to the inner one.
    """
    # 1. The sub-layer of each call. The largest come first, and the inner ones overwrite them.
    owners: dict[int, int] = {}
    by_size = sorted(range(len(sites.raw)), key=lambda k: -len(sites.raw[k].cone))
    for index in by_size:
        owners |= dict.fromkeys(sites.raw[index].cone, index)

    # 2. The calls that are attention.
    named = [node.index for node in sites.graph.nodes if node.name in CALLS]
    calls = {}
    for place, node in enumerate(named):
        if node in owners and is_attention(sites.graph, node):
            calls[place] = owners[node]

    return calls


def is_attention(graph: Graph, node: int) -> bool:
    """Return whether a call is attention.

    It is fused, or a softmax between two products of live values.
    """
    is_fused = graph.nodes[node].name in FUSED
    if is_fused:
        return True

    return _meets(graph, node, _makers) and _meets(graph, node, _readers)


def _meets(graph: Graph, node: int, neighbours: Callable[[Graph, int], list[int]]) -> bool:
    """Return whether one direction leads to a product of two live values.

    A product with a weight must not come first.
    """
    seen = {node}
    frontier = [node]
    for _ in range(_STEPS):
        # 1. All calls one step further, breadth first.
        reached: set[int] = set()
        for current in frontier:
            reached.update(neighbours(graph, current))
        reached -= seen
        seen |= reached

        # 2. A product of two live values is what we look for.
        if any(_mixes(graph, candidate) for candidate in reached):
            return True

        # 3. A product with a weight ends its way.
        frontier = [n for n in reached if graph.nodes[n].name not in PRODUCTS]

    return False


def _makers(graph: Graph, node: int) -> list[int]:
    """Return the calls that make the floating inputs of a call."""
    makers = []
    for value in graph.float_inputs(node):
        # Inputs and weights of the model have negative numbers.
        is_computed = value.node >= 0
        if is_computed:
            makers.append(value.node)

    return makers


def _readers(graph: Graph, node: int) -> list[int]:
    """Return the calls that read the results of a call."""
    readers: list[int] = []
    for value in graph.nodes[node].outputs:
        readers += graph.values[value].consumers

    return readers


def _mixes(graph: Graph, node: int) -> bool:
    """Return whether a call multiplies two live tensors as matrices."""
    record = graph.nodes[node]
    if record.name not in PRODUCTS:
        return False

    # A product with a weight has one.
    count = 0
    for value in record.operands:
        operand = graph.values[value]
        if operand.live and operand.is_float:
            count += 1

    return count >= 2


# -- reading them ---------------------------------------------
def attention_records(sites: Sites) -> dict[str, AttentionRecord]:
    """Read the attention of every sub-layer in one more run of the model on the probe.

    Returns:
        Sub-layer -> its figures; one whose calls could not be read is not in it.
    """
    calls = attention_calls(sites)
    if not calls:
        return {}

    # 1. One more run.
    watch = AttentionWatch(calls)
    with torch.no_grad(), watch:
        sites.replayer.tapped([], lambda _spot, tensor: tensor)

    # 2. It must have made the calls of the record.
    expected = sum(node.name in CALLS for node in sites.graph.nodes)
    records = watch.records(expected)
    return {sites[index].name: record for index, record in records.items()}


@dataclass
class Tally:
    """Sums over the rows of scores of one sub-layer."""

    largest: list[Tensor] = field(default_factory=list)  # logit, of each piece that was added
    entropy: dict[int, Tensor] = field(default_factory=dict)  # number of heads -> sum per head
    rows: dict[int, Tensor] = field(default_factory=dict)
    # number of heads -> largest score per head
    tops: dict[int, Tensor] = field(default_factory=dict)
    most: list[Tensor] = field(default_factory=list)  # what the entropies can sum up to

    def add(self, scores: Tensor) -> None:
        """Add scores (..., queries, keys) as they enter a softmax over the keys.

        Heads are kept apart where the scores are (batch, heads, queries, keys).
        """
        scores = scores.detach()
        # 1. Masked keys count for nothing.
        visible = scores > MASKED
        shown = scores.masked_fill(~visible, -math.inf)
        self.largest.append(shown.max())
        keys = visible.sum(-1)
        several = keys > 1

        # 2. Entropy per query; entr(0) is 0.
        entropy = torch.special.entr(scores.softmax(-1)).sum(-1).to(widest(scores.device))
        entropy = entropy.masked_fill(~several, 0.0)
        self.most.append(in_float64(keys.clamp_min(1)).log().sum())

        # 3. One sum per head. Other layouts (grouped heads, heads folded into the batch) count as
        # one head.
        heads = scores.shape[1] if scores.dim() == 4 else 1
        if heads > 1:
            per_head = entropy.reshape(-1, heads, entropy.shape[-1])
            top = shown.amax(dim=(0, 2, 3))
            self.tops[heads] = torch.maximum(self.tops.get(heads, top), top)
        else:
            per_head = entropy.reshape(1, 1, -1)
        counted = several.reshape(per_head.shape)
        self.entropy[heads] = self.entropy.get(heads, 0) + per_head.sum((0, 2))
        self.rows[heads] = self.rows.get(heads, 0) + counted.sum((0, 2))

    def record(self) -> AttentionRecord:
        """Return the figures of all rows."""
        # 1. The largest logit. Every score may be masked.
        self._download()
        max_logit = None
        largest = max(map(float, self.largest), default=-math.inf)
        if largest > -math.inf:
            max_logit = largest

        # 2. Over all heads. Rows with a single key have no entropy to compare with.
        rows = sum(int(count.sum()) for count in self.rows.values())
        if not rows:
            return AttentionRecord(max_logit)

        total = sum(float(part.sum()) for part in self.entropy.values())
        most = sum(map(float, self.most))
        share = None
        if most:
            share = total / most

        # 3. Head by head.
        lowest, tops = self._lowest_entropy(), self._top_logits()
        return AttentionRecord(max_logit, total / rows, share, lowest, rows, tops)

    def _download(self) -> None:
        """Bring all figures to the CPU, in one copy."""
        by_heads = (self.entropy, self.rows, self.tops)
        figures = [*self.largest, *self.most]
        for figures_of_heads in by_heads:
            figures += figures_of_heads.values()

        # They come in the order in which they were sent.
        arrived = iter(download(figures))
        self.largest = [next(arrived) for _ in self.largest]
        self.most = [next(arrived) for _ in self.most]
        for figures_of_heads in by_heads:
            for heads in figures_of_heads:
                figures_of_heads[heads] = next(arrived)

    def _only_heads(self) -> int | None:
        """Return the number of heads if it is the same in all calls."""
        if len(self.rows) != 1:
            return None

        [heads] = self.rows
        return heads

    def _lowest_entropy(self) -> float | None:
        """Return the mean entropy of the head with the least; None with a single head."""
        heads = self._only_heads()
        if heads is None or heads <= 1:
            return None

        means = self.entropy[heads] / self.rows[heads].clamp_min(1)
        return float(means.min())

    def _top_logits(self) -> list[float] | None:
        """Return the largest logit of each head; None if the heads are not apart."""
        heads = self._only_heads()
        if heads is None or heads not in self.tops:
            return None

        logits: list[float] = self.tops[heads].tolist()
        return logits


class AttentionWatch(TorchFunctionMode):
    """Reads the attention calls of a run. Enter it around `Replayer.tapped`.

    Args:
        wanted: place of a call among those named in `CALLS` -> index of its sub-layer.
    """

    def __init__(self, wanted: Mapping[int, int]) -> None:
        super().__init__()
        self.wanted = wanted
        self.count = 0
        self.tallies: dict[int, Tally] = {}
        self.why: dict[int, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        # Calls are counted in the order in which the record has them.
        if name in CALLS:
            index = self.wanted.get(self.count)
            self.count += 1
            if index is not None:
                self._read(index, name, args, kwargs)
        return func(*args, **kwargs)

    def _read(self, index: int, name: str, args: Any, kwargs: Any) -> None:
        """Add the scores of one call to those of its sub-layer."""
        tally = self.tallies.setdefault(index, Tally())
        with torch.no_grad():
            try:
                _READERS.get(name, _read_softmax)(tally, args, kwargs)
            except (NotReadable, RuntimeError, TypeError, IndexError) as error:
                self.why[index] = (
                    f"an attention call could not be read: {str(error).splitlines()[0]}"
                )

    def records(self, expected: int) -> dict[int, AttentionRecord]:
        """Return the figures by sub-layer.

        There are none if the run made another number of calls than the record has.
        """
        if self.count != expected:
            return {}

        records = {}
        for index, tally in self.tallies.items():
            # A sub-layer with a call that could not be read has no figures at all.
            if index not in self.why:
                records[index] = tally.record()

        return records


class NotReadable(Exception):
    """An attention call of a form that is not read."""


def _read_softmax(tally: Tally, args: Any, kwargs: Any) -> None:
    """Read the scores that enter a softmax, some queries at a time."""
    # 1. The arguments. A softmax over other dimensions than the last is none over keys.
    call = dict(zip(("input", "dim"), args, strict=False)) | kwargs
    scores, dim = call["input"], call.get("dim")
    if dim not in (-1, scores.dim() - 1):
        raise NotReadable(f"a softmax over dimension {dim} of {scores.dim()}")
    if not is_float(scores):
        raise NotReadable("scores that are no floats")

    # 2. A single query.
    if scores.dim() < 2:
        tally.add(scores[None])
        return

    # 3. Several, in parts that fit into memory.
    keys = max(scores.shape[-1], 1)
    per_query = max(scores.numel() // (keys * scores.shape[-2]) * keys, 1)
    for part in scores.split(max(_AT_ONCE // per_query, 1), dim=-2):
        tally.add(part)


def _read_sdpa(tally: Tally, args: Any, kwargs: Any) -> None:
    """Read a fused attention: queries and keys, and the masks."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    call = dict(zip(names, args, strict=False)) | kwargs
    query, key = call["query"], call["key"]
    # Several heads of queries share one of keys.
    if call.get("enable_gqa") and query.shape[-3] != key.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)

    mask, is_causal = call.get("attn_mask"), bool(call.get("is_causal"))
    add_products(tally, query, key, mask, is_causal, call.get("scale"))


def add_products(
    tally: Tally, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> None:
    """Add the scores of queries (..., L, E) with keys (..., S, E), some queries at a time.

    Args:
        tally: to add to.
        query: (..., L, E).
        key: (..., S, E).
        mask: to add to the scores, or True where they count; None without a mask.
        causal: a query sees no key after it.
        scale: of the products; None for 1 / sqrt(E).
    """
    # 1. How many queries fit into memory at once.
    length, keys = query.shape[-2], key.shape[-2]
    per_query = max(math.prod(query.shape[:-2]) * keys, 1)
    step = max(_AT_ONCE // per_query, 1)
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])

    # 2. Their scores, as they enter the softmax.
    columns = torch.arange(keys, device=query.device)
    for start in range(0, length, step):
        rows = torch.arange(start, min(start + step, length), device=query.device)
        scores = (query[..., rows, :] @ key.transpose(-2, -1)) * scale
        if causal:
            scores = scores.masked_fill(columns > rows[:, None], -math.inf)
        if mask is not None:
            scores = _masked(scores, _mask_of_rows(mask, rows, length))
        tally.add(scores)


def _mask_of_rows(mask: Tensor, rows: Tensor, length: int) -> Tensor:
    """Return the rows of a mask that belong to some of the queries."""
    has_rows = mask.dim() >= 2 and mask.shape[-2] == length
    # One row then serves all queries.
    if not has_rows:
        return mask

    return mask[..., rows, :]


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """Return scores with a mask: True where they count, or numbers to add."""
    if mask.dtype is torch.bool:
        return scores.masked_fill(~mask, -math.inf)

    return scores + mask


def _read_multi_head(tally: Tally, args: Any, kwargs: Any) -> None:
    """Read torch's own multi-head attention: project queries and keys, then as above."""
    # 1. The arguments. Keys of its own are none of the stream's.
    call = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    call.apply_defaults()
    options = call.arguments
    has_own_keys = options["bias_k"] is not None or options["static_k"] is not None
    if has_own_keys or options["add_zero_attn"]:
        raise NotReadable("multi-head attention with keys of its own")

    query, key, heads = options["query"], options["key"], options["num_heads"]
    if query.dim() == 2:
        query, key = query[:, None], key[:, None]

    # 2. Project, and split into heads.
    weights, biases = _projections(options)
    query = _in_heads(F.linear(query, weights[0], biases[0]), heads)
    key = _in_heads(F.linear(key, weights[1], biases[1]), heads)

    # 3. Put the masks together.
    mask = _added_mask(options["attn_mask"], query.dtype)
    if mask is not None and mask.dim() == 3:
        mask = mask.view(-1, heads, *mask.shape[-2:])
    padding = _added_mask(options["key_padding_mask"], query.dtype)
    if padding is not None:
        padding = padding.reshape(-1, 1, 1, key.shape[-2])
        mask = padding if mask is None else mask + padding
    add_products(tally, query, key, mask, False, None)


def _projections(
    options: Mapping[str, Any],
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """Return the weights of queries and keys, and their biases.

    They are weights of their own, or the first two thirds of one that holds all three.

    Args:
        options: the arguments of `multi_head_attention_forward` by name.
    """
    width = options["embed_dim_to_check"]
    if options["use_separate_proj_weight"]:
        weights = options["q_proj_weight"], options["k_proj_weight"]
    else:
        packed = options["in_proj_weight"]
        weights = packed[:width], packed[width : 2 * width]

    packed_bias = options["in_proj_bias"]
    if packed_bias is None:
        return weights, (None, None)

    return weights, (packed_bias[:width], packed_bias[width : 2 * width])


def _in_heads(projected: Tensor, heads: int) -> Tensor:
    """Return (length, batch, features) as (batch, heads, length, features of a head)."""
    length, batch, _ = projected.shape
    return projected.view(length, batch, heads, -1).permute(1, 2, 0, 3)


def _added_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a mask as numbers to add to the logits; True means masked here."""
    if mask is None or mask.dtype is not torch.bool:
        return mask

    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    # The softmax gives a key of minus infinity no weight.
    return zeros.masked_fill(mask, -math.inf)


_READERS: dict[str, Callable[[Tally, Any, Any], None]] = {
    "scaled_dot_product_attention": _read_sdpa,
    "multi_head_attention_forward": _read_multi_head,
}
