"""How every parameter was initialised, as plain data: role, family, std with its interval."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from jacdiag.devices.accelerators import in_float64
from jacdiag.measure.attention import FUSED as FUSED_ATTENTION
from jacdiag.measure.attention import SOFTMAX, is_attention
from jacdiag.measure.fused_sections import is_sinusoid, sections_of, widths_of_heads
from jacdiag.measure.init_distribution import Draws, FittedDraw, copies_of, pieces_of
from jacdiag.measure.padding_rows import padding_rows
from jacdiag.measure.repeated_draws import streams_of
from jacdiag.records.init_contract import FUSED, ContractRecord, WeightRecord
from jacdiag.trace.discovery.coverage import parameters_of
from jacdiag.trace.discovery.low_rank import find_low_rank_pairs
from jacdiag.trace.discovery.weight_roles import (
    ParameterUse,
    length_divided_by,
    pattern,
    tied_to_head,
    uses_of,
)
from jacdiag.trace.graph.graph import Graph, Node, Value
from jacdiag.trace.graph.ops import PRODUCTS
from jacdiag.trace.site_list import Sites

TABLES = ("embedding", "positions")
_CONSTANT = ("zero", "constant")  # families without a draw
_CUTS = {"split", "split_with_sizes", "chunk", "tensor_split"}
_PACKED = ("W_Q", "W_K", "W_V", "W_KV", "W_QKV")
# Where an adapter stands next to the weight that it adapts: peft keeps that one as `base_layer`,
# loralib and its descendants name their factors lora_A and lora_B.
_BASE = ".base_layer."
_ADAPTER = re.compile(r"(^|\.)lora_\w+(\.|$)")
_FROM_CONFIG = {  # variable -> what configs call it
    "initializer_range": ("initializer_range", "init_std"),
    "initializer_factor": ("initializer_factor",),
    "H": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "d_head": ("head_dim", "d_kv"),
}


def contract_of(
    sites: Sites,
    draws: Draws,
    model: nn.Module,
    layers: int,
    width: int,
    vocabulary: int | None,
    pinned: Mapping[str, str] | None = None,
    decayed: Iterable[str] | None = None,
) -> ContractRecord:
    """Return the record of a traced model.

    Weights are read one at a time, wherever they lie.

    Args:
        sites: of the model.
        draws: of its weights, as far as they are known already.
        model: only its config and its class are read.
        layers: N of formulas.
        width: d of formulas.
        vocabulary: V of formulas; None if the model has none.
        pinned: the user's own contract, role or name pattern -> formula.
        decayed: names of the parameters that an optimizer lets decay.
    """
    outlines, aliases = sites.skeleton.outlines, sites.skeleton.aliases
    decay = None
    if decayed is not None:
        decay = {aliases.get(name, name) for name in decayed}
    sizes = sizes_of(model, layers, width, vocabulary)
    head_width = head_width_of(sites)
    if head_width is not None:
        sizes["d_head"] = head_width

    # 1. How each weight was drawn, and which numbers it shares with another.
    factors: set[str] = set()
    for pair in find_low_rank_pairs(sites):
        factors.update((pair.first, pair.second))
    uses = without_adapters(uses_of(sites), factors)
    kinds = {site.name: site.kind for site in sites}
    draw_by_name = draws.of_all({name: use.role in TABLES for name, use in uses.items()})
    copies = copies_of(draw_by_name, draws.params)
    pieces = pieces_of(_unexplained(uses, draw_by_name), draws.params)
    streams = streams_of(draw_by_name, draws.params)
    padding = padding_rows(model, aliases)

    # 2. One record for each.
    weights = []
    for name, use in uses.items():
        shape = outlines[name].shape
        use = whole_map(use, shape)
        kind = kinds.get(use.sublayer, "")
        record = record_of(name, shape, use, draw_by_name[name], decay, kind)
        record = replace(
            record,
            same_as=copies.get(name, ""),
            piece_of=pieces.get(name, ""),
            stream_of=streams.get(name, ""),
        )
        if name in padding:
            row = padding[name]
            record = replace(record, padding_row=row.index, padding_size=row.largest)
        if use.role == "norm_gain":
            record = _with_gain(record, draws.params[name], sites.graph)
        weights.append(record)

    # 3. The sections of fused matrices.
    weights = with_sections(weights, draws.params, sizes.get("d_head"), cuts_of(sites, weights))
    return ContractRecord(
        family=family_of(model),
        sizes=sizes,
        weights=weights,
        tied=sorted(tied_to_head(sites)),
        logits_std=_logits_std(sites.output, vocabulary),
        pinned=dict(pinned or {}),
    )


def _with_gain(record: WeightRecord, gain: Tensor, graph: Graph) -> WeightRecord:
    """Return the record of the gain of a norm with what is read from its values and its use."""
    # A vector that rises from end to end was computed, and not drawn.
    if is_sorted(gain):
        record = replace(record, family="other")

    # A single gain says nothing about how many numbers are normed.
    if math.prod(record.shape) == 1:
        record = replace(record, norm_length=length_divided_by(graph, record.parameter))

    return record


def record_of(
    name: str,
    shape: Sequence[int],
    use: ParameterUse,
    draw: FittedDraw | None,
    decayed: set[str] | None = None,
    kind: str = "",
) -> WeightRecord:
    """Return the record of one parameter.

    Args:
        name: Of the parameter.
        shape: Of the parameter.
        use: What the model does with it.
        draw: How it was drawn; None if that is not known.
        decayed: Names of the parameters that an optimizer lets decay; None without an optimizer.
        kind: Of the sub-layer that reads it.
    """
    # 1. What the model does with it.
    name_pattern = name
    if use.layer is not None:
        name_pattern = pattern(name)
    is_decayed = None
    if decayed is not None:
        is_decayed = name in decayed
    record = WeightRecord(
        name,
        list(shape),
        use.role,
        name_pattern,
        use.layer,
        use.sublayer,
        use.fan_in,
        use.fan_out,
        decayed=is_decayed,
        kind=kind,
        offset=use.offset,
    )

    # 2. How it was drawn.
    if draw is None:
        return record

    return replace(
        record,
        family=draw.family,
        std=draw.std,
        lower=draw.lower,
        upper=draw.upper,
        mean=draw.mean,
        truncation=draw.truncation,
        zero_rows=draw.zero_rows,
        largest=draw.largest,
        tiny=draw.tiny,
        outliers=draw.outliers,
        core_std=draw.core_std,
    )


def whole_map(use: ParameterUse, shape: Sequence[int]) -> ParameterUse:
    """Return the use of all rows of a packed matrix of which one call reads only some.

    The packed matrix of a cross-attention makes the queries in one call, keys and values in
    another.

    Example:
        >>> whole_map(ParameterUse("W_Q", fan_in=64, fan_out=64), (192, 64))
        ParameterUse(role='W_QKV', layer=None, sublayer='', fan_in=64, fan_out=192, offset=0.0)
    """
    may_be_packed = len(shape) == 2 and use.role in _PACKED
    if not may_be_packed or use.fan_out is None:
        return use

    rows, columns = shape
    if use.fan_in != columns:
        return use

    # The call reads some of the rows, and others read as many each.
    reads_all = use.fan_out >= rows
    if reads_all or rows % use.fan_out:
        return use

    return replace(use, role="W_QKV", fan_out=rows)


def is_sorted(vector: Tensor) -> bool:
    """Return whether the numbers of a vector rise or fall from end to end.

    Such a vector was computed, as RWKV's mixing factors are.

    Sixteen numbers that were drawn stand in order with a chance below 1e-13.

    Example:
        >>> import torch
        >>> is_sorted(torch.linspace(0, 1, 16)), is_sorted(torch.ones(16))
        (True, False)
    """
    flat = vector.detach().reshape(-1)
    if flat.numel() < 16:
        return False

    # A constant vector was not computed.
    is_level = bool(flat[0] == flat[-1])
    if is_level:
        return False

    steps = flat.diff()
    rises, falls = bool((steps >= 0).all()), bool((steps <= 0).all())
    return rises or falls


def without_adapters(
    uses: Mapping[str, ParameterUse], factors: Collection[str] = ()
) -> dict[str, ParameterUse]:
    """Return the uses, with the role "adapter" for low-rank additions to a weight.

    An adapter has an init of its own (one factor zero, so that it changes nothing at first), and no
    scheme of the model covers it.

    Args:
        uses: Of all parameters.
        factors: Names of the parameters that are factors of an addition by their use.
    """
    # 1. The modules whose weight is adapted.
    adapted = []
    for name in uses:
        module, base, _ = name.partition(_BASE)
        if base:
            adapted.append(f"{module}.")

    # 2. What else stands in them, and what is named as an adapter.
    result = dict(uses)
    for name, use in uses.items():
        stands_next_to_base = _BASE not in name and name.startswith(tuple(adapted))
        is_named_so = _ADAPTER.search(name) is not None
        if stands_next_to_base or is_named_so or name in factors:
            result[name] = replace(use, role="adapter")

    return result


def cuts_of(sites: Sites, weights: Iterable[WeightRecord]) -> dict[str, list[int]]:
    """Return the sizes into which the model cuts the result of each fused matrix.

    Only a cut by the next call counts.

    Args:
        sites: of one recorded forward.
        weights: every parameter; only fused matrices are read.
    """
    fused = {weight.parameter for weight in weights if weight.role in FUSED}
    graph = sites.graph
    cuts: dict[str, list[int]] = {}
    for node in graph.nodes:
        if not sites.finder.is_product(node.index):
            continue

        names = fused.intersection(parameters_of(graph, (node.index,), sites.skeleton))
        if not names:
            continue

        # The first product that reads a matrix says how its result is cut.
        sizes = _sizes_after_cut(graph, node.outputs[0])
        if sizes is not None:
            for name in names:
                cuts.setdefault(name, sizes)

    return cuts


def _sizes_after_cut(graph: Graph, value: int) -> list[int] | None:
    """Return the last sizes of the pieces into which the first call of its kind cuts a value."""
    for consumer in graph.values[value].consumers:
        node = graph.nodes[consumer]
        if node.name not in _CUTS:
            continue

        # A scalar has no last size.
        shapes = [graph.values[output].shape for output in node.outputs]
        if all(shapes):
            return [shape[-1] for shape in shapes]

    return None


def with_sections(
    weights: Sequence[WeightRecord],
    tensors: Mapping[str, Tensor],
    head: float | None = None,
    cuts: Mapping[str, Sequence[int]] | None = None,
) -> list[WeightRecord]:
    """Return the records with sections of fused matrices and with tables of sinusoids.

    Args:
        weights: Every parameter.
        tensors: Their values by name; only those of fused matrices and positions are read.
        head: Width of one head, if known.
        cuts: Name of a fused matrix -> the sizes into which the model cuts its result.
    """
    if cuts is None:
        cuts = {}
    widths = widths_of_heads([(w.role, w.sublayer, w.fan_in) for w in weights])
    result = []
    for weight in weights:
        # 1. A constant has neither sections nor waves.
        if not weight.std:
            result.append(weight)
            continue

        # 2. Fused matrices.
        if weight.role in FUSED:
            sections = sections_of(
                tensors[weight.parameter],
                weight.role,
                weight.fan_out,
                heads_width=widths.get(weight.sublayer),
                head=head,
                splits=cuts.get(weight.parameter, ()),
            )
            weight = replace(weight, sections=sections)

        # 3. Tables of positions.
        if weight.role == "positions" and is_sinusoid(tensors[weight.parameter]):
            weight = replace(weight, family="sinusoid")
        result.append(weight)

    return result


def _unexplained(
    uses: Mapping[str, ParameterUse], draws: Mapping[str, FittedDraw | None]
) -> list[str]:
    """Return gains, scales and biases that are not constant, where most of their role are."""
    names: list[str] = []
    for role in ("norm_gain", "scale", "bias"):
        # 1. The families of the weights of this role.
        families: dict[str, str] = {}
        for name, use in uses.items():
            draw = draws[name]
            if use.role == role and draw is not None:
                families[name] = draw.family

        # 2. Those that vary. Where most do, the model means it so.
        varying = [name for name, family in families.items() if family not in _CONSTANT]
        if len(varying) < len(families) / 2:
            names += varying

    return names


def family_of(model: nn.Module) -> str:
    """Return the model type of a Hugging Face config, else the name of the class."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    # The config of a model of one's own may have any type there, or none.
    is_named = isinstance(kind, str) and kind != ""
    if is_named:
        return str(kind)

    return type(model).__name__


def sizes_of(model: nn.Module, layers: int, width: int, vocabulary: int | None) -> dict[str, float]:
    """Return the variables of formulas that a model has, in the order of display.

    Args:
        model: only its config is read.
        layers: N.
        width: d.
        vocabulary: V; None if the model has none.
    """
    # 1. What was counted.
    sizes: dict[str, float] = {"N": layers, "d": width}
    if vocabulary:
        sizes["V"] = vocabulary

    # 2. What the config says.
    config = getattr(model, "config", None)
    for variable, names in _FROM_CONFIG.items():
        number = _first_number(config, names)
        if number is not None:
            sizes[variable] = number

    # 3. The width of a head, if only the number of heads is known.
    heads = sizes.get("H", 0)
    if "d_head" not in sizes and heads > 0:
        sizes["d_head"] = width / heads
    return sizes


def _first_number(config: Any, names: Iterable[str]) -> float | None:
    """Return the number that a config has under the first of several names; None if it has none."""
    for name in names:
        setting = _setting(config, name)
        # A setting may be there without a number, as None.
        if _is_number(setting):
            number: float = setting
            return number

    return None


def head_width_of(sites: Sites) -> int | None:
    """Return the width of one head, by the products of queries with keys.

    None if the heads differ.
    """
    graph = sites.graph
    widths: set[int] = set()
    for node in graph.nodes:
        if not _reads_heads(graph, node):
            continue

        # 1. Find the call that reads the queries.
        product = node
        if node.name in SOFTMAX:
            product = graph.nodes[_product_before(graph, node.index)]

        # 2. The last dimension of its first operand is summed over.
        queries = _live_operands(graph, product)[:1]
        widths.update(value.shape[-1] for value in queries if value.shape)

    if len(widths) != 1:
        return None

    return widths.pop()


def _reads_heads(graph: Graph, node: Node) -> bool:
    """Return whether a call is attention of queries and keys that are split into heads."""
    if node.name not in FUSED_ATTENTION | SOFTMAX:
        return False

    # torch's own multi-head attention reads the stream, and not heads.
    if node.name == "multi_head_attention_forward":
        return False

    return is_attention(graph, node.index)


def _live_operands(graph: Graph, node: Node) -> list[Value]:
    """Return the operands of a call that depend on the input of the model."""
    operands = [graph.values[value] for value in node.operands]
    return [value for value in operands if value.live]


def _product_before(graph: Graph, node: int) -> int:
    """Return the nearest product of two live tensors before a softmax.

    If there is none, return the softmax itself.
    """
    for candidate in range(node, -1, -1):
        record = graph.nodes[candidate]
        if record.name not in PRODUCTS:
            continue

        # A product with a weight has one live operand.
        if len(_live_operands(graph, record)) >= 2:
            return candidate

    return node


def _setting(config: Any, name: str) -> Any:
    """Return a number of a config; None where it has none.

    A config with one number for each layer raises an error of its own, which counts as none.
    """
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def _is_number(value: Any) -> bool:
    """Return whether a setting is a finite number."""
    # True is an int, too.
    if isinstance(value, bool):
        return False

    return isinstance(value, int | float) and math.isfinite(value)


def decayed_by(model: nn.Module, optimizer: Any) -> list[str]:
    """Return the names of the parameters in groups with weight decay.

    Args:
        model: whose parameters the optimizer holds.
        optimizer: a torch optimizer, or its list of parameter groups.
    """
    # 1. The groups with decay.
    groups = getattr(optimizer, "param_groups", optimizer)
    decayed: set[int] = set()
    for group in groups:
        if group.get("weight_decay", 0):
            decayed.update(id(parameter) for parameter in group["params"])

    # 2. Every name of what they hold: a tied parameter has several.
    names = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in decayed:
            names.append(name)

    return names


def _logits_std(output: Any, vocabulary: int | None) -> float | None:
    """Return the std of the logits in a model's output; None if there are none."""
    # 1. The logits, which come first in a tuple.
    logits = getattr(output, "logits", output)
    if isinstance(logits, tuple | list) and logits:
        logits = logits[0]
    if not isinstance(logits, Tensor) or logits.is_meta:
        return None

    # 2. They must be over the vocabulary, and several.
    if not vocabulary or logits.shape[-1:] != (vocabulary,):
        return None
    if logits.numel() <= 1:
        return None

    # 3. Their std, if they are finite.
    std = float(in_float64(logits.detach()).std(correction=0))
    if not math.isfinite(std):
        return None

    return std
