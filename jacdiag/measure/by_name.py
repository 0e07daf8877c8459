"""Roles of weights by their names, for a state dict whose model is not known: no dataflow can tell there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from jacdiag.measure.contract import TABLES, record_of
from jacdiag.measure.draws import draw_of
from jacdiag.report.contract import ContractRecord, WeightRecord
from jacdiag.trace.uses import Use

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_B, _E = r"(?:^|[._])", r"(?:[._]|$)"  # where a word begins and ends
_ATTENTION = (
    ("W_QKV", rf"c_attn|qkv|query_key_value|{_B}in_proj|{_B}Wqkv"),
    ("W_KV", rf"{_B}(?:kv|key_value|kv_proj){_E}"),
    ("W_Q", rf"{_B}(?:w?q|q_proj|query|to_q|linear_q){_E}"),
    ("W_K", rf"{_B}(?:w?k|k_proj|key|to_k|linear_k){_E}"),
    ("W_V", rf"{_B}(?:w?v|v_proj|value|to_v|linear_v){_E}"),
    ("W_O", rf"{_B}(?:w?o|o_proj|out_proj|c_proj|proj|dense|out_lin|to_out|output|linear_proj|out){_E}"),
)
_FFN = (
    ("router", rf"{_B}(?:router|gate){_E}(?!.*proj)"),
    ("W_gate_up", r"gate_up|gate_and_up"),
    ("W_2", r"c_proj|down_proj|dense_4h_to_h|fc2|fc_out|lin2|linear2|w2|(?:^|\.)wo(?:\.|$)|output\.dense|proj_out"),
    ("W_gate", rf"gate_proj|{_B}w1{_E}|(?:^|\.)wi_0"),
    ("W_1", r"c_fc|up_proj|dense_h_to_4h|fc1|fc_in|lin1|linear1|linear_fc1|w3|(?:^|\.)wi|intermediate|proj_in"),
)
_OUTSIDE = (
    ("positions", r"wpe|pos(?:ition)?[._]?emb|embed_positions|position_embeddings|relative_attention_bias"),
    ("head", rf"{_B}(?:lm_head|head|embed_out|output_layer|output){_E}"),
    ("embedding", rf"{_B}(?:wte|tok_embeddings|word_embeddings?|token_emb\w*|shared|embed\w*){_E}"),
)
_IS_ATTENTION = re.compile(rf"attn|attention|{_B}(?:q|k|v|o|qkv)(?:_proj)?{_E}", re.I)
_NORM = re.compile(r"norm|(?:^|[._])ln(?:[._]|$|_?\d)", re.I)


def contract_by_name(state: Mapping[str, Tensor], layers: int, width: int | None) -> ContractRecord:
    """The contract record of a state dict: roles by name, sizes by shape, nothing run.

    Args:
        state: floating tensors by name; read one at a time.
        layers, width: as the names and the embedding tell.
    """
    sizes: dict[str, float] = {"N": layers, **({"d": width} if width else {})}
    weights: list[WeightRecord] = []
    for name, tensor in state.items():
        use = use_by_name(name, tuple(tensor.shape), width)
        weights.append(record_of(name, tensor.shape, use, draw_of(tensor, table=use.role in TABLES)))
        if use.role == "embedding" and len(tensor.shape) == 2:
            sizes.setdefault("V", tensor.shape[0])
    return ContractRecord(family="", sizes=sizes, weights=weights)


def use_by_name(name: str, shape: tuple[int, ...], width: int | None) -> Use:
    """What a parameter is, as its name says.

    >>> use_by_name("decoder.layers.3.mlp.linear_fc1.weight", (256, 64), 64)
    Use(role='W_1', layer=3, sublayer='', fan_in=64, fan_out=256)
    """
    found = _LAYER.search(name)
    layer = int(found[1]) if found else None
    if len(shape) < 2:
        gain = name.endswith(("weight", "gamma", "scale")) and _NORM.search(name) is not None
        return Use("norm_gain" if gain else "bias" if name.endswith(("bias", "beta")) else "", layer)
    inner = name[found.end() :] if found else name
    inside = _ATTENTION if _IS_ATTENTION.search(inner) else _FFN
    table: Sequence[tuple[str, str]] = _OUTSIDE if layer is None else (_OUTSIDE[0], *inside)
    role = next((role for role, words in table if re.search(words, inner)), "")
    fan_in, fan_out = _fans(role, shape, width)
    return Use(role, layer, "", fan_in, fan_out)


def _fans(role: str, shape: tuple[int, ...], width: int | None) -> tuple[int | None, int | None]:
    """Both sizes, in the order that the role says: a matrix may be stored either way."""
    rows, columns = shape[-2:]
    if role in ("embedding", "positions"):
        return rows, columns
    reads = role not in ("W_O", "W_2")  # of the two sizes, this end is the width of the stream
    if width is not None and rows != columns and (rows == width) != (columns == width):
        other = columns if rows == width else rows
        return (width, other) if reads else (other, width)
    return columns, rows
