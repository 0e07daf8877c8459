"""Makes a default config tiny: few layers, small widths, small vocabulary, few experts, by what its
attributes mean.
"""

from __future__ import annotations

import re
from typing import Any

VOCAB, LONGEST = 128, 64
WIDTH, HEADS, HEAD_DIM, FFN, LAYERS, EXPERTS, ACTIVE = 32, 4, 8, 48, 2, 4, 2
MOST_LAYERS = 6

# The first pattern that matches the whole attribute name gives the value.
RULES: list[tuple[str, int]] = [
    (r"num_encoder_blocks", 4),
    (r"(moe_)?num_(shared_experts)|n_shared_experts|zero_expert_num|num_shared_experts", 1),
    (r"n_group|n_groups|topk_group|num_expert_group|mamba_n_groups|mamba_ngroups|o_groups", 1),
    (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_expert", EXPERTS),
    (
        r"num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k|top_k_experts|num_selected_experts|router_topk",
        ACTIVE,
    ),
    (
        r"(num_|n_)?(encoder_|decoder_|t2u_encoder_|t2u_decoder_|speech_encoder_|text_|vision_)?(hid"
        r"den_)?(layers?|blocks)",
        LAYERS,
    ),
    (
        r"depth|num_layers_per_stack|(num_)?hidden_layers|conf_num_hidden_layers|n_(input|recurrent|"
        r"output)_layers",
        LAYERS,
    ),
    (
        r"num_global_layers|num_(en|de)coder_layers|num_lstm_layers|decoder_num_hidden_layers",
        LAYERS,
    ),
    (r"(swa_|linear_)?num_key_value_heads|num_kv_heads|num_key_value_heads_\w+", 2),
    (r"(linear_num_(key|value)_heads|linear_num_heads)", 4),
    (r"(\w+_)?(attention_heads|num_heads|n_heads?|num_attention_heads)", HEADS),
    (
        r"query_pre_attn_scalar|(\w+_)?head_dim|d_head|d_kv|dim_head|kv_channels|qk_head_dim|mamba_d"
        r"_head|dim_kv",
        HEAD_DIM,
    ),
    (r"linear_(key|value)_head_dim|linear_head_dim", HEAD_DIM),
    (r"(kv_|q_|o_)lora_rank|laurel_rank|hc_lowrank|loop_gate_rank|gated_norm_rank", 16),
    (r"(\w+_)?vocab_size|(\w+_)?vocab|vocab_size_per_layer_input", VOCAB),
    (
        r"(\w+_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_leng"
        r"th|max_\w+_positions",
        LONGEST,
    ),
    (
        r"(\w+_)?(sliding_window(_size)?|attention_window)|local_attention(_window_len)?|window_size"
        r"|attention_chunk_size",
        4,
    ),
    (
        r"(\w+_)?(intermediate_size\w*|ffn_dim|ffn_hidden_size)|d_ff|dff|dim_ff|n_inner|d_inner|mlp_dim|hidden_dim",
        FFN,
    ),
    (
        r"(hidden_size|d_model|n_embd|embed_dim|emb_dim|embedding_(dim|size)|dim|dim_model|word_embe"
        r"d_proj_dim)(_global)?",
        WIDTH,
    ),
    (
        r"(\w+_)?hidden_size|(\w+_)?projection_(dim|size)|pooler_output_size|rnn_width|lru_width|att"
        r"ention_hidden_size",
        WIDTH,
    ),
    (r"hidden_size_per_layer_input", 8),
    (r"mamba_d_state|ssm_state_size|state_size", 8),
    (r"(mamba_)?chunk_size", 4),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"rotary_dim", 4),
    (r"index_topk|index_topk_blocks|index_block_size", 4),
]
_COMPILED = [(re.compile(pattern), value) for pattern, value in RULES]
_LEFT_OPEN = {
    "head_dim",
    "num_experts_per_tok",
    "n_routed_experts",
    "num_key_value_heads",
    "vocab_size",
}
_TOKEN = re.compile(r"\w+_(token_id|token_index|index)")


def shrink(defaults: dict[str, Any]) -> dict[str, Any]:
    """Returns the constructor arguments that make the config of these defaults tiny, sub-configs
    included.
    """
    small: dict[str, Any] = {}
    for name, value in defaults.items():
        if isinstance(value, dict) and "model_type" in value:
            small[name] = {"model_type": value["model_type"], **shrink(value)}
        elif isinstance(value, int) and not isinstance(value, bool):
            new = _number(name, value)
            if new is not None and new < value:
                small[name] = new
        elif isinstance(value, (list, tuple)) and _TOKEN.fullmatch(name):
            small[name] = VOCAB - 2
        elif value is None and name in _LEFT_OPEN:
            small[name] = _number(name, 0)
    _keep_equal_heads(defaults, small)
    small.update(_layers(defaults))
    return small


def _number(name: str, value: int) -> int | None:
    if _TOKEN.fullmatch(name):
        return VOCAB - 2 if value >= VOCAB else None
    return next((new for pattern, new in _COMPILED if pattern.fullmatch(name)), None)


def _keep_equal_heads(defaults: dict[str, Any], small: dict[str, Any]) -> None:
    """A config without grouped queries stays without."""
    for name in ("num_key_value_heads", "num_kv_heads"):
        if name in small and defaults[name] in (None, defaults.get("num_attention_heads")):
            small[name] = HEADS


def _layers(defaults: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind, where the config lists a kind per layer: as few as show all
    combinations.
    """
    count = defaults.get("num_hidden_layers", defaults.get("num_layers", defaults.get("n_layer")))
    lists = {
        k: v
        for k, v in defaults.items()
        if isinstance(v, (list, tuple)) and len(v) == count and count > 1
    }
    if not lists:
        return {}
    first: dict[Any, int] = {}
    for index, kinds in enumerate(zip(*lists.values(), strict=True)):
        if all(isinstance(k, (str, bool, int)) for k in kinds):
            first.setdefault(tuple(k for k in kinds if isinstance(k, str)), index)
    chosen = sorted(first.values())[:MOST_LAYERS] or [0]
    while len(chosen) < LAYERS:
        chosen.append(min(chosen[-1] + 1, count - 1))
    small = {name: [value[k] for k in chosen] for name, value in lists.items()}
    return {
        **small,
        **{n: len(chosen) for n in ("num_hidden_layers", "num_layers", "n_layer") if n in defaults},
    }
