"""Roles by name: other code bases' names, names that say nothing, and agreement with the
dataflow.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

import jacdiag
from benchmarks.roles import DIFFERENCES, FACTS, FAMILIES, compare_family
from jacdiag.measure.roles_by_name import NamedModel, read_names

D, F, V = 32, 96, 64  # width, inner features of an FFN, vocabulary
FAST = (
    ("causal-lm", "llama"),
    ("causal-lm", "gpt_neox"),
    ("causal-lm", "gpt2"),
    ("causal-lm", "qwen2_moe"),
    ("causal-lm", "deepseek_v3"),
    ("causal-lm", "mamba"),
    ("masked-lm", "bert"),
    ("masked-lm", "modernbert"),
    ("seq2seq", "t5"),
    ("image", "vit"),
)

# name of a code base -> {weight of layer N: (shape, role)}; N becomes 0 and 1.
NAMINGS: dict[str, dict[str, tuple[tuple[int, ...], str]]] = {
    "nanogpt": {
        "transformer.wte.weight": ((V, D), "embedding"),
        "transformer.wpe.weight": ((48, D), "positions"),
        "transformer.h.N.attn.c_attn.weight": ((3 * D, D), "W_QKV"),
        "transformer.h.N.attn.c_proj.weight": ((D, D), "W_O"),
        "transformer.h.N.mlp.c_fc.weight": ((F, D), "W_1"),
        "transformer.h.N.mlp.c_proj.weight": ((D, F), "W_2"),
        "lm_head.weight": ((V, D), "head"),
    },
    "meta-llama": {
        "tok_embeddings.weight": ((V, D), "embedding"),
        "layers.N.attention.wq.weight": ((D, D), "W_Q"),
        "layers.N.attention.wk.weight": ((8, D), "W_K"),
        "layers.N.attention.wv.weight": ((8, D), "W_V"),
        "layers.N.attention.wo.weight": ((D, D), "W_O"),
        "layers.N.feed_forward.w1.weight": ((F, D), "W_gate"),
        "layers.N.feed_forward.w2.weight": ((D, F), "W_2"),
        "layers.N.feed_forward.w3.weight": ((F, D), "W_1"),
        "output.weight": ((V, D), "head"),
    },
    "litgpt": {
        "transformer.wte.weight": ((V, D), "embedding"),
        "transformer.h.N.attn.qkv.weight": ((3 * D, D), "W_QKV"),
        "transformer.h.N.attn.proj.weight": ((D, D), "W_O"),
        "transformer.h.N.mlp.fc_1.weight": ((F, D), "W_gate"),
        "transformer.h.N.mlp.fc_2.weight": ((F, D), "W_1"),
        "transformer.h.N.mlp.proj.weight": ((D, F), "W_2"),
    },
    "litgpt, older, two matrices": {
        "transformer.h.N.attn.attn.weight": ((3 * D, D), "W_QKV"),
        "transformer.h.N.attn.proj.weight": ((D, D), "W_O"),
        "transformer.h.N.mlp.fc.weight": ((F, D), "W_1"),
        "transformer.h.N.mlp.proj.weight": ((D, F), "W_2"),
    },
    "megatron-core, gated": {
        "embedding.word_embeddings.weight": ((V, D), "embedding"),
        "decoder.layers.N.self_attention.linear_qkv.weight": ((3 * D, D), "W_QKV"),
        "decoder.layers.N.self_attention.linear_proj.weight": ((D, D), "W_O"),
        "decoder.layers.N.mlp.linear_fc1.weight": ((2 * F, D), "W_gate_up"),
        "decoder.layers.N.mlp.linear_fc2.weight": ((D, F), "W_2"),
        "output_layer.weight": ((V, D), "head"),
    },
    "megatron-core": {
        "decoder.layers.N.mlp.linear_fc1.weight": ((F, D), "W_1"),
        "decoder.layers.N.mlp.linear_fc2.weight": ((D, F), "W_2"),
        "decoder.layers.N.self_attention.linear_qkv.weight": ((3 * D, D), "W_QKV"),
        "decoder.layers.N.self_attention.linear_proj.weight": ((D, D), "W_O"),
    },
    "megatron-lm, older": {
        "language_model.embedding.word_embeddings.weight": ((V, D), "embedding"),
        "language_model.embedding.position_embeddings.weight": ((48, D), "positions"),
        "language_model.encoder.layers.N.self_attention.query_key_value.weight": (
            (3 * D, D),
            "W_QKV",
        ),
        "language_model.encoder.layers.N.self_attention.dense.weight": ((D, D), "W_O"),
        "language_model.encoder.layers.N.mlp.dense_h_to_4h.weight": ((F, D), "W_1"),
        "language_model.encoder.layers.N.mlp.dense_4h_to_h.weight": ((D, F), "W_2"),
    },
    "transformer engine": {
        "layers.N.self_attention.layernorm_qkv.weight": ((3 * D, D), "W_QKV"),
        "layers.N.self_attention.proj.weight": ((D, D), "W_O"),
        "layers.N.layernorm_mlp.fc1_weight": ((F, D), "W_1"),
        "layers.N.layernorm_mlp.fc2_weight": ((D, F), "W_2"),
    },
    "fairseq": {
        "decoder.embed_tokens.weight": ((V, D), "embedding"),
        "decoder.layers.N.self_attn.k_proj.weight": ((D, D), "W_K"),
        "decoder.layers.N.self_attn.v_proj.weight": ((D, D), "W_V"),
        "decoder.layers.N.self_attn.q_proj.weight": ((D, D), "W_Q"),
        "decoder.layers.N.self_attn.out_proj.weight": ((D, D), "W_O"),
        "decoder.layers.N.fc1.weight": ((F, D), "W_1"),
        "decoder.layers.N.fc2.weight": ((D, F), "W_2"),
        "decoder.output_projection.weight": ((V, D), "head"),
    },
    "torch.nn": {
        "encoder.layers.N.self_attn.in_proj_weight": ((3 * D, D), "W_QKV"),
        "encoder.layers.N.self_attn.out_proj.weight": ((D, D), "W_O"),
        "encoder.layers.N.linear1.weight": ((F, D), "W_1"),
        "encoder.layers.N.linear2.weight": ((D, F), "W_2"),
    },
    "timm": {
        "pos_embed": ((1, 5, D), "positions"),
        "patch_embed.proj.weight": ((D, 3, 8, 8), "projection"),
        "blocks.N.attn.qkv.weight": ((3 * D, D), "W_QKV"),
        "blocks.N.attn.proj.weight": ((D, D), "W_O"),
        "blocks.N.mlp.fc1.weight": ((F, D), "W_1"),
        "blocks.N.mlp.fc2.weight": ((D, F), "W_2"),
        "head.weight": ((10, D), "head"),
    },
    "torchvision": {
        "conv_proj.weight": ((D, 3, 8, 8), "projection"),
        "encoder.pos_embedding": ((1, 5, D), "positions"),
        "encoder.layers.encoder_layer_N.self_attention.in_proj_weight": ((3 * D, D), "W_QKV"),
        "encoder.layers.encoder_layer_N.self_attention.out_proj.weight": ((D, D), "W_O"),
        "encoder.layers.encoder_layer_N.mlp.0.weight": ((F, D), "W_1"),
        "encoder.layers.encoder_layer_N.mlp.3.weight": ((D, F), "W_2"),
    },
    "vit-pytorch": {
        "transformer.layers.N.0.to_qkv.weight": ((3 * D, D), "W_QKV"),
        "transformer.layers.N.0.to_out.0.weight": ((D, D), "W_O"),
        "transformer.layers.N.1.net.1.weight": ((F, D), "W_1"),
        "transformer.layers.N.1.net.4.weight": ((D, F), "W_2"),
    },
    "diffusers": {
        "transformer_blocks.N.attn1.to_q.weight": ((D, D), "W_Q"),
        "transformer_blocks.N.attn1.to_k.weight": ((D, D), "W_K"),
        "transformer_blocks.N.attn1.to_v.weight": ((D, D), "W_V"),
        "transformer_blocks.N.attn1.to_out.0.weight": ((D, D), "W_O"),
        "transformer_blocks.N.attn2.to_k.weight": ((D, 48), "W_K"),
        "transformer_blocks.N.attn2.to_out.0.weight": ((D, D), "W_O"),
        "transformer_blocks.N.ff.net.0.proj.weight": ((2 * F, D), "W_gate_up"),
        "transformer_blocks.N.ff.net.2.weight": ((D, F), "W_2"),
    },
    "olmo, older": {
        "model.transformer.wte.weight": ((V, D), "embedding"),
        "model.transformer.blocks.N.att_proj.weight": ((3 * D, D), "W_QKV"),
        "model.transformer.blocks.N.attn_out.weight": ((D, D), "W_O"),
        "model.transformer.blocks.N.ff_proj.weight": ((2 * F, D), "W_gate_up"),
        "model.transformer.blocks.N.ff_out.weight": ((D, F), "W_2"),
    },
    "mixtral, experts one by one": {
        "model.layers.N.self_attn.q_proj.weight": ((D, D), "W_Q"),
        "model.layers.N.self_attn.o_proj.weight": ((D, D), "W_O"),
        "model.layers.N.block_sparse_moe.gate.weight": ((2, D), "router"),
        "model.layers.N.block_sparse_moe.experts.0.w1.weight": ((F, D), "W_gate"),
        "model.layers.N.block_sparse_moe.experts.0.w2.weight": ((D, F), "W_2"),
        "model.layers.N.block_sparse_moe.experts.0.w3.weight": ((F, D), "W_1"),
        "model.layers.N.block_sparse_moe.experts.3.w1.weight": ((F, D), "W_gate"),
        "model.layers.N.block_sparse_moe.experts.3.w2.weight": ((D, F), "W_2"),
        "model.layers.N.block_sparse_moe.experts.3.w3.weight": ((F, D), "W_1"),
    },
    "deepseek, experts one by one": {
        "model.layers.N.self_attn.q_a_proj.weight": ((16, D), "W_Q_a"),
        "model.layers.N.self_attn.q_b_proj.weight": ((80, 16), "W_Q"),
        "model.layers.N.self_attn.kv_a_proj_with_mqa.weight": ((24, D), "W_KV_a"),
        "model.layers.N.self_attn.kv_b_proj.weight": ((80, 16), "W_KV"),
        "model.layers.N.self_attn.o_proj.weight": ((D, 40), "W_O"),
        "model.layers.N.mlp.gate.weight": ((4, D), "router"),
        "model.layers.N.mlp.experts.7.gate_proj.weight": ((48, D), "W_gate"),
        "model.layers.N.mlp.experts.7.up_proj.weight": ((48, D), "W_1"),
        "model.layers.N.mlp.experts.7.down_proj.weight": ((D, 48), "W_2"),
        "model.layers.N.mlp.shared_experts.gate_proj.weight": ((F, D), "W_gate"),
        "model.layers.N.mlp.shared_experts.up_proj.weight": ((F, D), "W_1"),
        "model.layers.N.mlp.shared_experts.down_proj.weight": ((D, F), "W_2"),
    },
    "qwen": {
        "transformer.h.N.attn.c_attn.weight": ((3 * D, D), "W_QKV"),
        "transformer.h.N.attn.c_proj.weight": ((D, D), "W_O"),
        "transformer.h.N.mlp.w1.weight": ((F, D), "W_1"),
        "transformer.h.N.mlp.w2.weight": ((F, D), "W_gate"),
        "transformer.h.N.mlp.c_proj.weight": ((D, F), "W_2"),
    },
    "internlm2": {
        "model.tok_embeddings.weight": ((V, D), "embedding"),
        "model.layers.N.attention.wqkv.weight": ((3 * D, D), "W_QKV"),
        "model.layers.N.attention.wo.weight": ((D, D), "W_O"),
        "model.layers.N.feed_forward.w1.weight": ((F, D), "W_gate"),
        "model.layers.N.feed_forward.w2.weight": ((D, F), "W_2"),
        "model.layers.N.feed_forward.w3.weight": ((F, D), "W_1"),
    },
    "baichuan": {
        "model.layers.N.self_attn.W_pack.weight": ((3 * D, D), "W_QKV"),
        "model.layers.N.self_attn.o_proj.weight": ((D, D), "W_O"),
        "model.layers.N.mlp.gate_proj.weight": ((F, D), "W_gate"),
        "model.layers.N.mlp.up_proj.weight": ((F, D), "W_1"),
        "model.layers.N.mlp.down_proj.weight": ((D, F), "W_2"),
    },
    "rwkv-lm": {
        "emb.weight": ((V, D), "embedding"),
        "blocks.N.att.key.weight": ((D, D), "W_1"),
        "blocks.N.att.value.weight": ((D, D), "W_1"),
        "blocks.N.att.receptance.weight": ((D, D), "W_gate"),
        "blocks.N.att.output.weight": ((D, D), "W_O"),
        "blocks.N.ffn.key.weight": ((F, D), "W_1"),
        "blocks.N.ffn.receptance.weight": ((D, D), "W_gate"),
        "blocks.N.ffn.value.weight": ((D, F), "W_O"),
    },
    "wrapped by DDP and torch.compile": {
        "module._orig_mod.layers.N.attention.wqkv.weight": ((3 * D, D), "W_QKV"),
        "module._orig_mod.layers.N.attention.wo.weight": ((D, D), "W_O"),
        "module._orig_mod.layers.N.feed_forward.w1.weight": ((F, D), "W_1"),
        "module._orig_mod.layers.N.feed_forward.w2.weight": ((D, F), "W_2"),
    },
}
NO_SUBLAYERS = {"embedding", "positions", "projection", "head"}


def numbered(name: str, layer: int) -> str:
    """Return a name of a naming with the number of a layer."""
    return name.replace(".N.", f".{layer}.").replace("_N.", f"_{layer}.")


def shapes_of(
    naming: Mapping[str, tuple[tuple[int, ...], str]], layers: int = 2
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a naming with two layers, and the gain of a norm so that the width
    shows.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        for name, (shape, _) in naming.items():
            shapes[numbered(name, layer)] = shape
    return {**shapes, "final_norm.weight": (D,)}


def expected_of(
    naming: Mapping[str, tuple[tuple[int, ...], str]],
) -> dict[str, tuple[str, int | None]]:
    """Return the role and the layer of each weight."""
    expected: dict[str, tuple[str, int | None]] = {}
    for name, (_, role) in naming.items():
        for layer in range(2):
            if role in NO_SUBLAYERS:
                expected[name] = (role, None)
            else:
                expected[numbered(name, layer)] = (role, layer)
    return expected


@pytest.mark.parametrize("code_base", NAMINGS)
def test_names_of_other_code_bases(code_base: str) -> None:
    naming = NAMINGS[code_base]
    model = read_names(shapes_of(naming))
    found = {
        name: (weight.role, weight.layer)
        for name, weight in model.weights.items()
        if name in expected_of(naming)
    }
    assert found == expected_of(naming)
    assert (model.layers, model.width) == (2, D)
    writers = [name for name in expected_of(naming) if model.weights[name].role == "W_2"]
    assert all(model.weights[name].fan_out == D for name in writers)


@pytest.mark.parametrize("code_base", NAMINGS)
def test_the_order_in_the_file_does_not_matter(code_base: str) -> None:
    """A safetensors file is sorted by name: decoders come before encoders, layer 10 before layer
    2.
    """
    shapes = shapes_of(NAMINGS[code_base], layers=11)
    as_built, as_sorted = read_names(shapes), read_names(dict(sorted(shapes.items())))
    assert as_built.weights == as_sorted.weights and as_built.layers == as_sorted.layers == 11
    assert [sublayer.name for sublayer in as_built.sublayers] == [
        sublayer.name for sublayer in as_sorted.sublayers
    ]


def test_x_transformers_numbers_its_sublayers() -> None:
    """`layers.0.1` is the first sub-layer, `layers.1.1` the second: two of them are a layer."""
    shapes: dict[str, tuple[int, ...]] = {"token_emb.emb.weight": (V, D)}
    for index in range(0, 4, 2):
        attention, ffn = f"attn_layers.layers.{index}", f"attn_layers.layers.{index + 1}"
        shapes[f"{attention}.0.0.g"] = (D,)
        shapes |= {f"{attention}.1.to_{name}.weight": (D, D) for name in ("q", "k", "v", "out")}
        shapes |= {
            f"{ffn}.0.0.g": (D,),
            f"{ffn}.1.ff.0.0.weight": (F, D),
            f"{ffn}.1.ff.2.weight": (D, F),
        }
    model = read_names(shapes)
    assert [sublayer.kind for sublayer in model.sublayers] == ["attention", "mlp"] * 2
    assert [sublayer.layer for sublayer in model.sublayers] == [0, 0, 1, 1]
    assert (model.layers, model.width) == (2, D)
    assert model.weights["attn_layers.layers.1.1.ff.0.0.weight"].role == "W_1"
    assert model.weights["attn_layers.layers.3.1.ff.2.weight"].role == "W_2"
    assert model.weights["token_emb.emb.weight"].role == "embedding"


def test_encoder_and_decoder_layers_are_counted_together() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(D, 4, 2, 3, F)
    named = read_names({name: tuple(t.shape) for name, t in model.state_dict().items()})
    assert (named.layers, named.width) == (5, D)
    kinds = [sublayer.kind for sublayer in named.sublayers]
    assert kinds == ["attention", "mlp"] * 2 + ["attention", "cross-attention", "mlp"] * 3
    assert named.weights["decoder.layers.0.multihead_attn.in_proj_weight"].layer == 2


def test_a_single_layer_has_no_numbers() -> None:
    layer = nn.TransformerEncoderLayer(D, 4, F)
    named = read_names({name: tuple(t.shape) for name, t in layer.state_dict().items()})
    assert (named.layers, named.width, len(named.sublayers)) == (1, D, 2)
    assert (
        named.weights["linear1.weight"].role == "W_1"
        and named.weights["self_attn.in_proj_weight"].role == "W_QKV"
    )


@pytest.mark.parametrize(
    "name, shape",
    [
        ("layers.0.attn.bias", (1, 1, 48, 48)),  # a causal mask kept as a buffer
        ("layers.0.attn.q_proj.lora_A.default.weight", (4, D)),
        ("layers.0.attn.q_proj.lora_B.weight", (D, 4)),
        ("layers.0.attn.strange.weight", (D, D)),
        ("layers.0.mlp.adapter.weight", (D, D)),
        ("layers.0.mystery.weight", (D, D)),
        ("mystery.weight", (D, D)),
        ("layers.0.mystery.output.conv.weight", (D, D, 1, 1)),
        ("rotary_emb.cos_cached", (48, 8)),
    ],
)
def test_an_unknown_name_gets_no_role(name: str, shape: tuple[int, ...]) -> None:
    known = shapes_of(NAMINGS["nanogpt"])
    names = {key.replace("transformer.h.", "layers."): value for key, value in known.items()}
    model = read_names({**names, name: shape})
    assert model.weights[name].role == ""
    assert (model.layers, model.width, len(model.sublayers)) == (2, D, 4)


def test_gate_is_a_router_only_next_to_experts() -> None:
    gated = {
        "h.0.mlp.gate.weight": (F, D),
        "h.0.mlp.up.weight": (F, D),
        "h.0.mlp.down.weight": (D, F),
    }
    assert [weight.role for weight in read_names(gated).weights.values()] == [
        "W_gate",
        "W_1",
        "W_2",
    ]
    routed = {
        "h.0.mlp.gate.weight": (4, D),
        "h.0.mlp.experts.0.fc1.weight": (F, D),
        "h.0.mlp.experts.0.fc2.weight": (D, F),
    }
    assert [weight.role for weight in read_names(routed).weights.values()] == [
        "router",
        "W_1",
        "W_2",
    ]
    assert read_names(routed).sublayers[0].kind == "moe"


# -- the width -------------------------------------------------------------------------------------
def albert(embedding: int) -> NamedModel:
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    shapes = {"albert.embeddings.word_embeddings.weight": (V, embedding)}
    shapes |= {"albert.encoder.embedding_hidden_mapping_in.weight": (D, embedding)}
    shapes |= {
        f"{layer}.attention.{name}.weight": (D, D) for name in ("query", "key", "value", "dense")
    }
    return read_names(
        {**shapes, f"{layer}.ffn.weight": (F, D), f"{layer}.ffn_output.weight": (D, F)}
    )


def test_a_factorised_embedding_does_not_give_the_width() -> None:
    assert albert(8).width == D
    assert (
        albert(8).weights["albert.encoder.embedding_hidden_mapping_in.weight"].role == "projection"
    )


def test_adaptive_embeddings_are_no_layers() -> None:
    naming = {
        name: shape
        for name, shape in shapes_of(NAMINGS["fairseq"]).items()
        if "embed_tokens" not in name
    }
    parts = {f"decoder.embed_tokens.embeddings.{k}.0.weight": (V, D // 2**k) for k in range(3)}
    parts |= {f"decoder.embed_tokens.embeddings.{k}.1.weight": (D, D // 2**k) for k in range(3)}
    model = read_names({**parts, **naming})
    assert (model.layers, model.width) == (2, D)
    assert {model.weights[name].role for name in parts if ".0.weight" in name} == {"embedding"}
    assert {model.weights[name].role for name in parts if ".1.weight" in name} == {"projection"}


@pytest.mark.parametrize(
    "module", ["posEmbedBuilder", "pos_embed", "time_embedder", "t_embed", "timeEmbedding"]
)
def test_the_mlp_of_an_embedding_is_no_layer(module: str) -> None:
    parts = {f"{module}.mlp.0.weight": (4 * D, 3), f"{module}.mlp.2.weight": (D, 4 * D)}
    alone = read_names({**parts, "layers.0.unknown.weight": (D, D)})
    assert (alone.layers, alone.sublayers) == (0, [])

    model = read_names({**parts, **shapes_of(NAMINGS["fairseq"])})
    assert model.layers == 2
    assert not [sublayer for sublayer in model.sublayers if module in sublayer.name]


@pytest.mark.parametrize("prefix", ["embedder.", "text_embedding_model.", "remembered.", ""])
def test_layers_of_an_embedding_model_are_layers(prefix: str) -> None:
    named = {f"{prefix}{name}": shape for name, shape in shapes_of(NAMINGS["fairseq"]).items()}
    assert read_names(named).layers == 2


def test_sizes_that_do_not_agree_give_no_width() -> None:
    """Two matrices, each of which could write to the stream."""
    assert read_names({"h.0.mlp.fc1.weight": (F, D), "h.0.mlp.fc2.weight": (D, F)}).width is None


def test_patch_embeddings_are_no_embedding_of_tokens() -> None:
    model = read_names(shapes_of(NAMINGS["timm"]))
    assert model.with_role("embedding") == [] and model.width == D


# -- the dataflow ----------------------------------------------------------------------------------
@pytest.mark.parametrize("task, family", FAST)
def test_names_and_dataflow_agree(task: str, family: str) -> None:
    outcome = compare_family(task, family)
    assert outcome.wrong == [] and outcome.compared > 8


@pytest.mark.long
def test_names_and_dataflow_agree_on_all_families() -> None:
    outcomes = [
        compare_family(task, family) for task, families in FAMILIES.items() for family in families
    ]
    assert len(outcomes) >= 100
    assert [sentence for outcome in outcomes for sentence in outcome.wrong] == []
    # A difference that no family shows any longer leaves the tables.
    reasons = {reason for outcome in outcomes for reason in outcome.reasons}
    unused = {known.why for known in DIFFERENCES} | {
        f"{fact}: {why}" for (_, fact), why in FACTS.items()
    }
    assert unused - reasons == set()


# -- the weights-only tier against the measured tier -----------------------------------------------
CONFIGS = {
    "llama": ("LlamaConfig", {"intermediate_size": 96, "num_key_value_heads": 2}),
    "gpt_neox": ("GPTNeoXConfig", {"intermediate_size": 128}),
    "bert": ("BertConfig", {"intermediate_size": 96}),
    "gpt2": ("GPT2Config", {"n_positions": 32}),
    "mixtral": (
        "MixtralConfig",
        {"intermediate_size": 48, "num_local_experts": 4, "num_key_value_heads": 2},
    ),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_both_tiers_report_the_same_facts(family: str, tmp_path: Path) -> None:
    """The same model: its state dict alone, and with the model that runs."""
    transformers = pytest.importorskip("transformers")
    kind, more = CONFIGS[family]
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    config = getattr(transformers, kind)(**sizes, **more, attn_implementation="eager")
    torch.manual_seed(0)
    auto = (
        transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    )
    model = auto.from_config(config).eval()
    path = tmp_path / "weights.pt"
    torch.save(model.state_dict(), path)
    alone = jacdiag.audit(str(path))
    measured = jacdiag.audit(model, {"input_ids": torch.randint(0, 64, (1, 8))}, products=False)
    assert alone.tier == "weights" and measured.tier == "measured"
    assert alone.contract is not None and measured.contract is not None

    assert (alone.model.width, alone.model.layers) == (32, 3)
    assert measured.model.layers == 3 and measured.contract.sizes["d"] == 32
    roles = {weight.parameter: weight.role for weight in alone.contract.weights}
    differs = {
        weight.parameter: (roles.get(weight.parameter), weight.role)
        for weight in measured.contract.weights
        if weight.role and roles.get(weight.parameter) != weight.role
    }
    assert differs == {}
    homes = {weight.sublayer for weight in measured.contract.weights if weight.sublayer}
    assert {row.name for row in alone.sublayers} == homes
    for row in alone.sublayers:  # the table and the contract of one report say the same
        assert {stats.parameter: roles[stats.parameter] for stats in row.weights.values()} == {
            stats.parameter: role for role, stats in row.weights.items()
        }


# -- Eq. 15 at the first FFN -----------------------------------------------------------------------
def audit_alone(tmp_path: Path, shapes: Mapping[str, tuple[int, ...]]) -> jacdiag.Report:
    """Audit a state dict of random weights with these shapes."""
    generator = torch.Generator().manual_seed(0)
    state = {
        name: 0.02 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
        if len(shape) > 1
    }
    state |= {name: torch.ones(shape) for name, shape in shapes.items() if len(shape) == 1}
    torch.save(state, tmp_path / "weights.pt")
    return jacdiag.audit(str(tmp_path / "weights.pt"), state="init")


def first_ffn(report: jacdiag.Report) -> tuple[float | None, str]:
    row = next(row for row in report.sublayers if row.kind == "mlp")
    return row.bound, row.notes.get("bound", "")


def test_the_bound_is_given_for_two_matrices_only(tmp_path: Path) -> None:
    bound, why = first_ffn(audit_alone(tmp_path, shapes_of(NAMINGS["nanogpt"])))
    assert bound is not None and bound > 1 and why == ""
    bound, why = first_ffn(audit_alone(tmp_path, shapes_of(NAMINGS["meta-llama"])))
    assert bound is None and "two matrices" in why


def test_no_bound_where_the_embedding_is_not_the_stream(tmp_path: Path) -> None:
    shapes = shapes_of(NAMINGS["nanogpt"])
    bound, why = first_ffn(audit_alone(tmp_path, {**shapes, "transformer.wte.weight": (V, 8)}))
    assert bound is None and "8 features" in why
    bound, why = first_ffn(audit_alone(tmp_path, {**shapes, "transformer.emb_norm.weight": (D,)}))
    assert bound is None and "a norm follows the embedding: transformer.emb_norm.weight" in why
    bound, why = first_ffn(
        audit_alone(tmp_path, {k: v for k, v in shapes.items() if "wte" not in k})
    )
    assert bound is None and "no weight's name is that of an embedding" in why


def test_experts_share_their_roles(tmp_path: Path) -> None:
    report = audit_alone(tmp_path, shapes_of(NAMINGS["mixtral, experts one by one"]))
    row = next(row for row in report.sublayers if row.kind == "moe")
    assert set(row.weights) == {"router", "W_gate", "W_1", "W_2"} and len(row.parameters) == 7
    assert "W_gate" in row.notes["weights"] and "router" not in row.notes["weights"]
    assert all(
        "weights" not in other.notes for other in report.sublayers if other.kind == "attention"
    )


def test_a_mask_is_no_weight(tmp_path: Path) -> None:
    shapes = {
        **shapes_of(NAMINGS["nanogpt"]),
        "transformer.h.0.attn.bias": (1, 1, 8, 8),
        "mystery.weight": (D, 7),
    }
    report = audit_alone(tmp_path, shapes)
    assert "mask" in report.model.uncovered_reasons["transformer.h.0.attn.bias"]
    assert "no role" in report.model.uncovered_reasons["mystery.weight"]
    assert set(report.model.uncovered) == {"transformer.h.0.attn.bias", "mystery.weight"}


def test_layers_that_share_weights_are_named(tmp_path: Path) -> None:
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    shapes = {
        f"{layer}.attention.{name}.weight": (D, D) for name in ("query", "key", "value", "dense")
    }
    shared = audit_alone(
        tmp_path, {**shapes, f"{layer}.ffn.weight": (F, D), f"{layer}.ffn_output.weight": (D, F)}
    )
    assert any("share their weights" in note for note in shared.notes)
    assert not any(
        "share their weights" in note
        for note in audit_alone(tmp_path, shapes_of(NAMINGS["timm"])).notes
    )
