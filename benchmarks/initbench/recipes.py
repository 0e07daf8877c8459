"""Correct inits: published recipes, each written onto a model of its shape."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from benchmarks.initbench.catalogue import features, images, noisy_patches, recipe, token_pairs
from benchmarks.initbench.decoders import GPT, GroupedExperts, Llama, MixtureOfExperts
from benchmarks.initbench.draws import (
    draw,
    fan_in_normal,
    fan_out_normal,
    linear_default,
    normal,
    ones,
    truncated,
    uniform,
    xavier_normal,
    xavier_uniform,
    zeros,
)
from benchmarks.initbench.encoders import (
    T5,
    Bert,
    PostNormDecoder,
    RelativeEncoder,
    TorchEncoder,
    TorchSeq2Seq,
    ViT,
    sinusoids,
)
from benchmarks.initbench.others import (
    ConvNeXt,
    DiT,
    LoRALinear,
    Mamba,
    ResidualMLP,
    ResNet,
    ReZero,
    init_time_steps,
)

LAYERS = 4
WIDTH = 64
DEPTH = math.sqrt(2 * LAYERS)
SMALL = math.sqrt(2 / (5 * WIDTH))


def gpt(residual: float, rest: float, **options: object) -> GPT:
    """Return a GPT whose output projections have one spread and whose other matrices have
    another.
    """
    model = GPT(layers=LAYERS, width=WIDTH, **options)  # type: ignore[arg-type]
    draw(
        model,
        ("bias", zeros),
        (r"ln_", ones),
        (r"c_proj", normal(residual)),
        ("weight", normal(rest)),
    )
    return model


def llama(*rules: tuple[str, object], **options: object) -> Llama:
    """Return a Llama drawn by rules; its gains are those of the norms."""
    model = Llama(layers=LAYERS, width=WIDTH, **options)  # type: ignore[arg-type]
    draw(model, (r"norm", lambda gain: gain), ("bias", zeros), *rules)  # type: ignore[arg-type]
    return model


# -- GPTs ----------
@recipe()
def nanogpt() -> nn.Module:
    return gpt(0.02 / DEPTH, 0.02, bias=False)


@recipe()
def gpt2_with_biases() -> nn.Module:
    return gpt(0.02 / DEPTH, 0.02)


@recipe()
def gpt2_of_openai() -> nn.Module:
    model = gpt(0.02, 0.02)
    draw(model, ("wpe", normal(0.01)))
    return model


@recipe()
def mingpt_with_zero_positions() -> nn.Module:
    model = gpt(0.02, 0.02, tied=False)
    draw(model, ("wpe", zeros))
    return model


@recipe()
def megatron_scaled_outputs() -> nn.Module:
    return gpt(0.02 / DEPTH, 0.02, tied=False)


@recipe()
def gpt_neox_20b() -> nn.Module:
    return gpt(2 / (LAYERS * math.sqrt(WIDTH)), SMALL, tied=False, parallel=True)


@recipe()
def gpt_j() -> nn.Module:
    vocabulary = 256
    model = GPT(layers=LAYERS, width=WIDTH, vocabulary=vocabulary, tied=False, parallel=True)
    draw(model, ("bias", zeros), ("ln_", ones), ("wte", truncated(vocabulary**-0.5, 2.0)))
    draw(
        model,
        ("wpe", truncated(0.02, 2.0)),
        (r"(c_attn|c_fc|lm_head)\.weight", truncated(WIDTH**-0.5, 2.0)),
    )
    draw(model, (r"c_proj\.weight", truncated(2 / (LAYERS * math.sqrt(WIDTH)), 2.0)))
    return model


@recipe()
def opt_of_metaseq() -> nn.Module:
    return gpt(0.006 / DEPTH, 0.006, tied=True)


@recipe()
def opt_of_transformers() -> nn.Module:
    return gpt(0.02, 0.02)


@recipe()
def bloom_with_embedding_norm() -> nn.Module:
    model = gpt(0.02, 0.02, embedding_norm=True)
    return model


@recipe()
def gpt_small_init_and_scaled_outputs() -> nn.Module:
    return gpt(SMALL / DEPTH, SMALL)


@recipe()
def mpt_kaiming_normal() -> nn.Module:
    model = GPT(layers=LAYERS, width=WIDTH, bias=False)
    gain = math.sqrt(2)
    draw(model, ("ln_", ones), ("wte|wpe", normal(0.02)))
    draw(model, ("c_proj", fan_in_normal(gain / DEPTH)), ("c_fc|c_attn", fan_in_normal(gain)))
    return model


@recipe()
def torch_defaults_in_a_gpt() -> nn.Module:
    return GPT(layers=LAYERS, width=WIDTH, tied=False)


@recipe()
def modded_nanogpt_zero_projections() -> nn.Module:
    bound = math.sqrt(3) * 0.5 * WIDTH**-0.5
    model = GPT(layers=LAYERS, width=WIDTH, tied=False, bias=False)
    draw(
        model,
        ("ln_", ones),
        ("c_proj|lm_head", zeros),
        ("c_attn|c_fc", uniform(bound)),
        ("wte", normal(1.0)),
    )
    return model


@recipe()
def nanochat() -> nn.Module:
    model = GPT(layers=LAYERS, width=WIDTH, tied=False, bias=False)

    def spectral(weight: Tensor) -> object:
        fan_out, fan_in = weight.shape
        return nn.init.normal_(weight, 0.0, fan_in**-0.5 * min(1.0, math.sqrt(fan_out / fan_in)))

    draw(
        model,
        ("ln_", ones),
        ("c_proj|lm_head|wpe", zeros),
        ("c_attn|c_fc", spectral),
        ("wte", normal(1.0)),
    )
    return model


@recipe()
def mup_transformer() -> nn.Module:
    model = GPT(layers=LAYERS, width=WIDTH, tied=False)
    draw(
        model,
        ("bias|lm_head", zeros),
        ("ln_", ones),
        ("wte|wpe", normal(1.0)),
        ("weight", fan_in_normal()),
    )
    with torch.no_grad():
        for block in model.h:
            block.attn.c_attn.weight[:WIDTH] = 0.0
    return model


# -- Llamas ----------
@recipe()
def llama_of_transformers() -> nn.Module:
    return llama(("weight", normal(0.02)))


@recipe()
def llama2c() -> nn.Module:
    return llama(("o_proj|down_proj", normal(0.02 / DEPTH)), ("weight", normal(0.02)), tied=True)


@recipe()
def tinyllama_of_litgpt() -> nn.Module:
    return llama(("o_proj|down_proj", normal(WIDTH**-0.5 / LAYERS)), ("weight", normal(SMALL)))


@recipe()
def torchtitan_by_the_layer() -> nn.Module:
    model = llama(
        ("embed_tokens", normal(1.0)),
        ("lm_head", truncated(WIDTH**-0.5)),
        ("weight", truncated(0.02)),
    )
    for index, layer in enumerate(model.layers):
        draw(layer, ("o_proj|up_proj|down_proj", truncated(0.02 / math.sqrt(2 * (index + 1)))))
    return model


@recipe()
def torchtitan_by_the_depth() -> nn.Module:
    return llama(
        ("embed_tokens", normal(1.0)),
        ("lm_head", truncated(WIDTH**-0.5)),
        ("o_proj|up_proj|down_proj", truncated(0.02 / DEPTH)),
        ("weight", truncated(0.02)),
    )


@recipe()
def olmo2_normal() -> nn.Module:
    return llama(("weight", truncated(0.02)), qk_norm=True)


@recipe()
def olmo_mitchell() -> nn.Module:
    model = llama(("weight", truncated(WIDTH**-0.5)))
    for index, layer in enumerate(model.layers):
        draw(layer, ("o_proj", truncated(1 / math.sqrt(2 * WIDTH * (index + 1)))))
        draw(layer, ("down_proj", truncated(1 / math.sqrt(2 * 176 * (index + 1)))))
    return model


@recipe()
def olmo_full_megatron() -> nn.Module:
    return llama(
        ("o_proj|down_proj", truncated(0.02 / DEPTH)),
        ("lm_head", truncated(WIDTH**-0.5)),
        ("weight", truncated(0.02)),
    )


@recipe()
def lingua_current_depth() -> nn.Module:
    model = llama(("weight", truncated(WIDTH**-0.5)))
    for index, layer in enumerate(model.layers):
        factor = math.sqrt(2 * (index + 1))
        draw(
            layer,
            ("o_proj", truncated(WIDTH**-0.5 / factor)),
            ("down_proj", truncated(176**-0.5 / factor)),
        )
    return model


@recipe()
def lingua_without_depth() -> nn.Module:
    return llama(("down_proj", truncated(176**-0.5)), ("weight", truncated(WIDTH**-0.5)))


@recipe()
def gemma() -> nn.Module:
    return llama(
        ("weight", normal(0.02)), centred=True, tied=True, embedding_scale=math.sqrt(WIDTH)
    )


@recipe()
def qwen2_with_biases() -> nn.Module:
    return llama(("weight", normal(0.02)), bias=True)


@recipe()
def qwen3_with_qk_norm() -> nn.Module:
    return llama(("weight", normal(0.02)), qk_norm=True, tied=True)


@recipe()
def deepseek_llm() -> nn.Module:
    return llama(("weight", normal(0.006)))


@recipe()
def layernorm_scaling() -> nn.Module:
    return llama(("weight", normal(0.02)), scaled_norms=True)


@recipe()
def torch_defaults_in_a_llama() -> nn.Module:
    return Llama(layers=LAYERS, width=WIDTH)


# -- mixtures of experts ----------
@recipe()
def mixtral() -> nn.Module:
    return llama(("weight", normal(0.02)), feed_forward=MixtureOfExperts)


@recipe()
def deepseek_v3() -> nn.Module:
    return llama(("weight", normal(0.006)), feed_forward=MixtureOfExperts)


@recipe()
def megatron_grouped_experts() -> nn.Module:
    return llama(
        ("o_proj|weight2", normal(0.02 / DEPTH)),
        ("weight", normal(0.02)),
        feed_forward=GroupedExperts,
    )


@recipe()
def switch_transformer() -> nn.Module:
    def scaled(weight: Tensor) -> object:
        std = math.sqrt(0.1 / weight.shape[-1])
        return nn.init.trunc_normal_(weight, 0.0, std, -2 * std, 2 * std)

    return llama(("embed_tokens", normal(1.0)), ("weight", scaled), feed_forward=MixtureOfExperts)


@recipe()
def gpt_oss_with_router_bias() -> nn.Module:
    return llama(("weight", normal(0.02)), feed_forward=lambda: MixtureOfExperts(router_bias=True))


# -- encoders ----------
@recipe()
def bert() -> nn.Module:
    model = Bert(layers=LAYERS, width=WIDTH)
    draw(model, ("norm", lambda gain: gain), ("bias", zeros), ("weight", truncated(0.02, 2.0)))
    return model


@recipe()
def bert_with_a_padding_row() -> nn.Module:
    model = Bert(layers=LAYERS, width=WIDTH, padding=0)
    draw(model, ("norm", lambda gain: gain), ("bias", zeros), ("weight", normal(0.02)))
    with torch.no_grad():
        model.word_embeddings.weight[0] = 0.0
    return model


@recipe()
def albert_with_one_layer() -> nn.Module:
    model = Bert(layers=LAYERS, width=WIDTH, shared=True)
    draw(model, ("norm", lambda gain: gain), ("bias", zeros), ("weight", truncated(0.02, 2.0)))
    return model


@recipe()
def torch_encoder_pre_norm() -> nn.Module:
    return TorchEncoder(layers=LAYERS, width=WIDTH, norm_first=True)


@recipe()
def torch_encoder_post_norm() -> nn.Module:
    return TorchEncoder(layers=LAYERS, width=WIDTH, norm_first=False)


@recipe(probe=token_pairs)
def torch_transformer() -> nn.Module:
    return TorchSeq2Seq(width=WIDTH)


@recipe(probe=token_pairs)
def annotated_transformer() -> nn.Module:
    model = TorchSeq2Seq(width=WIDTH)
    draw(model, (r"(embedding|head|linear\d|out_proj)\.weight|in_proj_weight", xavier_uniform()))
    return model


@recipe()
def transformer_xl_relative() -> nn.Module:
    return RelativeEncoder(layers=LAYERS, width=WIDTH)


# -- vision ----------
@recipe(probe=images(16))
def vit_of_timm() -> nn.Module:
    model = ViT(layers=LAYERS, width=WIDTH)
    draw(model, (r"(norm\d?)\.", lambda gain: gain), (r"(qkv|proj|fc\d)\.bias", zeros))
    draw(
        model,
        (r"(qkv|proj|fc\d)\.weight|pos_embed", truncated(0.02, 2.0)),
        ("cls_token", normal(1e-6)),
    )
    draw(model, ("head", zeros))
    return model


@recipe(probe=images(16))
def vit_of_google() -> nn.Module:
    model = ViT(layers=LAYERS, width=WIDTH)
    draw(model, (r"fc\d\.bias", normal(1e-6)), (r"(qkv|proj|patch_embed)\.bias", zeros))
    draw(
        model,
        (r"(fc\d|proj)\.weight", xavier_uniform()),
        ("pos_embed", normal(0.02)),
        ("cls_token|head", zeros),
    )
    for block in model.blocks:
        for part in block.attn.qkv.weight.data.chunk(3):
            nn.init.xavier_uniform_(part)
    draw(model, (r"patch_embed\.weight", fan_in_normal()))
    return model


@recipe(probe=images(16))
def deit() -> nn.Module:
    model = ViT(layers=LAYERS, width=WIDTH)
    draw(model, (r"(qkv|proj|fc\d|head)\.bias", zeros))
    draw(model, (r"(qkv|proj|fc\d|head)\.weight|pos_embed|cls_token", truncated(0.02, 100.0)))
    return model


@recipe(probe=images(16))
def mae() -> nn.Module:
    model = ViT(layers=LAYERS, width=WIDTH)
    draw(
        model,
        (r"(qkv|proj|fc\d|head)\.bias", zeros),
        (r"(qkv|proj|fc\d|head|patch_embed)\.weight", xavier_uniform()),
    )
    draw(model, ("cls_token", normal(0.02)))
    with torch.no_grad():
        model.pos_embed.copy_(torch.cat([torch.zeros(1, WIDTH), sinusoids(16, WIDTH)])[None])
    model.pos_embed.requires_grad_(False)
    return model


@recipe(probe=images(16))
def vit_of_torchvision() -> nn.Module:
    model = ViT(layers=LAYERS, width=WIDTH)
    draw(
        model,
        (r"fc\d\.bias", normal(1e-6)),
        (r"(qkv|proj|patch_embed)\.bias", zeros),
        ("head", zeros),
    )
    draw(model, (r"fc\d\.weight|qkv\.weight", xavier_uniform()), ("pos_embed", normal(0.02)))
    draw(model, (r"patch_embed\.weight", truncated(math.sqrt(1 / 48), 100.0)))
    return model


@recipe(probe=images(16))
def cait_with_layer_scale() -> nn.Module:
    model = ViT(layers=LAYERS, width=WIDTH, layer_scale=1e-5)
    draw(model, (r"(qkv|proj|fc\d|head)\.bias", zeros))
    draw(model, (r"(qkv|proj|fc\d|head)\.weight|pos_embed|cls_token", truncated(0.02, 100.0)))
    return model


@recipe(probe=images(16))
def beit_rescaled_by_the_layer() -> nn.Module:
    model = ViT(layers=LAYERS, width=WIDTH, layer_scale=0.1)
    draw(model, (r"(qkv|proj|fc\d|head)\.bias", zeros))
    draw(model, (r"(qkv|proj|fc\d|head)\.weight|pos_embed|cls_token", truncated(0.02, 100.0)))
    for index, block in enumerate(model.blocks):
        factor = math.sqrt(2 * (index + 1))
        draw(block, (r"attn\.proj\.weight|fc2\.weight", truncated(0.02 / factor, 100.0)))
    return model


@recipe(probe=images(16))
def dinov2() -> nn.Module:
    model = ViT(layers=LAYERS, width=WIDTH, layer_scale=1e-5)
    draw(model, (r"(qkv|proj|fc\d|head)\.bias", zeros), ("cls_token", normal(1e-6)))
    draw(model, (r"(qkv|proj|fc\d|head)\.weight|pos_embed", truncated(0.02, 100.0)))
    return model


@recipe(probe=images(16))
def clip_vision() -> nn.Module:
    model = ViT(layers=LAYERS, width=WIDTH)
    draw(
        model,
        (r"(qkv|proj|fc\d|head)\.bias", zeros),
        (r"cls_token|pos_embed|head\.weight", normal(WIDTH**-0.5)),
    )
    draw(
        model, (r"qkv\.weight", normal(WIDTH**-0.5)), (r"fc1\.weight", normal((2 * WIDTH) ** -0.5))
    )
    draw(
        model,
        (r"(attn\.proj|fc2)\.weight", normal(WIDTH**-0.5 / DEPTH)),
        (r"patch_embed\.weight", normal(0.02)),
    )
    return model


@recipe(probe=images(8))
def resnet_of_torchvision() -> nn.Module:
    model = ResNet(layers=LAYERS)
    draw(model, (r"conv\d", fan_out_normal(math.sqrt(2))))
    return model.eval()


@recipe(probe=images(8))
def resnet_zero_last_gain() -> nn.Module:
    model = ResNet(layers=LAYERS)
    draw(model, (r"conv\d", fan_out_normal(math.sqrt(2))), (r"layers\.\d+\.bn2\.weight", zeros))
    return model.eval()


@recipe(probe=images(8))
def convnext() -> nn.Module:
    model = ConvNeXt(layers=LAYERS)
    draw(
        model,
        (r"(stem|dwconv|pwconv\d|head)\.bias", zeros),
        (r"(stem|dwconv|pwconv\d|head)\.weight", truncated(0.02, 100.0)),
    )
    return model


@recipe(probe=noisy_patches)
def dit_adaln_zero() -> nn.Module:
    model = DiT(layers=LAYERS, width=WIDTH)
    draw(
        model,
        ("bias", zeros),
        ("t_embedder", normal(0.02)),
        ("adaLN_modulation|final_layer", zeros),
    )
    draw(model, (r"(x_embedder|qkv|proj|fc\d)\.weight", xavier_uniform()))
    return model


# -- encoder-decoders ----------
def t5_weights(model: T5, head: float | None = None) -> T5:
    """Draw a T5-like model as Mesh TensorFlow does."""
    draw(
        model,
        ("norm", ones),
        (r"(attention|cross)\.q\.", normal((WIDTH * 24) ** -0.5)),
        (r"(attention|cross)\.[kv]\.", normal(WIDTH**-0.5)),
        (r"(attention|cross)\.o\.", normal((4 * 24) ** -0.5)),
        (r"\.wi", normal(WIDTH**-0.5)),
        (r"\.wo", normal(160**-0.5)),
        ("shared", normal(1.0)),
    )
    if head is not None:
        draw(model, ("lm_head", normal(head)))
    return model


@recipe(probe=token_pairs)
def t5() -> nn.Module:
    return t5_weights(T5(width=WIDTH))


@recipe(probe=token_pairs)
def t5_gated() -> nn.Module:
    return t5_weights(T5(width=WIDTH, gated=True, tied=False, model_type=None), head=WIDTH**-0.5)


@recipe(probe=token_pairs)
def bart() -> nn.Module:
    model = TorchSeq2Seq(width=WIDTH)
    draw(model, ("norm", lambda gain: gain), ("bias", zeros), ("weight", normal(0.02)))
    return model


# -- post-norm and no norm ----------
def deepnorm_decoder(fused: bool) -> PostNormDecoder:
    """Return a decoder by DeepNorm."""
    beta = (8 * LAYERS) ** -0.25
    model = PostNormDecoder(layers=LAYERS, width=WIDTH, alpha=(2 * LAYERS) ** 0.25, fused=fused)
    draw(model, ("q_proj|k_proj", xavier_normal()), ("v_proj|out_proj|fc", xavier_normal(beta)))
    if fused:
        for layer in model.layers:
            query, key, value = layer.in_proj.weight.data.chunk(3)
            nn.init.xavier_normal_(query)
            nn.init.xavier_normal_(key)
            nn.init.xavier_normal_(value, gain=beta)
    draw(model, ("embedding|head", normal(WIDTH**-0.5)))
    return model


@recipe()
def deepnorm() -> nn.Module:
    return deepnorm_decoder(fused=False)


@recipe()
def deepnorm_fused() -> nn.Module:
    return deepnorm_decoder(fused=True)


@recipe()
def fairseq_post_norm() -> nn.Module:
    model = PostNormDecoder(layers=LAYERS, width=WIDTH)
    draw(model, ("[qkv]_proj", xavier_uniform(1 / math.sqrt(2))), ("out_proj|fc", xavier_uniform()))
    draw(model, ("embedding|head", normal(WIDTH**-0.5)))
    return model


@recipe()
def retnet_of_torchscale() -> nn.Module:
    return llama(
        ("[qkv]_proj", xavier_uniform(2**-2.5)),
        ("o_proj", xavier_uniform(2**-1)),
        ("embed_tokens|lm_head", normal(WIDTH**-0.5)),
        embedding_scale=math.sqrt(WIDTH),
    )


@recipe()
def rezero() -> nn.Module:
    model = ReZero(layers=LAYERS, width=WIDTH)
    draw(model, (r"(qkv|proj|fc\d)\.weight", xavier_normal()), (r"(qkv|proj|fc\d)\.bias", zeros))
    return model


@recipe(probe=features)
def fixup_residual_stack() -> nn.Module:
    model = ResidualMLP(layers=LAYERS)
    draw(model, (r"\.w1$", fan_in_normal(math.sqrt(2) * LAYERS**-0.5)), (r"\.w2$|^head", zeros))
    return model


@recipe(probe=features)
def he_residual_stack() -> nn.Module:
    model = ResidualMLP(layers=LAYERS)
    draw(model, (r"\.w1$", fan_in_normal(math.sqrt(2))), (r"\.w2$", fan_in_normal(math.sqrt(2))))
    return model


# -- state space and adapters ----------
@recipe()
def mamba() -> nn.Module:
    model = Mamba(layers=LAYERS, width=WIDTH)
    draw(
        model,
        ("embeddings", normal(0.02)),
        (r"conv1d\.bias", zeros),
        ("in_proj|x_proj", linear_default),
    )
    bound = 1 / math.sqrt(2 * WIDTH) / math.sqrt(LAYERS)
    draw(model, ("out_proj", uniform(bound)))
    init_time_steps(model)
    return model


@recipe()
def mamba_of_transformers() -> nn.Module:
    model = Mamba(layers=LAYERS, width=WIDTH)
    draw(model, ("embeddings|in_proj|x_proj|out_proj", normal(0.1)), (r"conv1d\.bias", zeros))
    draw(model, ("out_proj", uniform(1 / math.sqrt(2 * WIDTH))))
    init_time_steps(model)
    return model


@recipe()
def lora_on_a_gpt() -> nn.Module:
    model = gpt(0.02 / DEPTH, 0.02)
    for block in model.h:
        block.attn.c_attn = LoRALinear(block.attn.c_attn)
    return model


@recipe()
def gaussian_adapter_on_a_gpt() -> nn.Module:
    model = gpt(0.02 / DEPTH, 0.02)
    for block in model.h:
        block.attn.c_attn = LoRALinear(block.attn.c_attn)
    draw(model, ("lora_A", normal(1 / 8)))
    return model


# -- one formula for each role ----------
@recipe()
def esm_protein_model() -> nn.Module:
    model = llama(
        ("[qkv]_proj", xavier_uniform(1 / math.sqrt(2))),
        ("o_proj", xavier_uniform()),
        ("gate_proj|up_proj|down_proj|lm_head", linear_default),
        ("embed_tokens", normal(1.0)),
    )
    return model


@recipe()
def transformers_without_tears() -> nn.Module:
    model = gpt(SMALL, SMALL, tied=False)
    draw(model, (r"mlp\.\w+\.weight", xavier_normal()), ("wte", normal(WIDTH**-0.5)))
    return model


@recipe()
def haiku_transformer() -> nn.Module:
    model = gpt(0.02, 0.02, tied=False)

    def scaled(weight: Tensor) -> object:
        return truncated(math.sqrt(2 / LAYERS / weight.shape[1]), 2.0)(weight)

    draw(model, (r"(c_attn|c_fc|c_proj)\.weight", scaled))
    draw(model, ("lm_head", truncated(WIDTH**-0.5, 2.0)), ("wte|wpe", truncated(0.02, 2.0)))
    return model


@recipe()
def openfold_attention_and_transition() -> nn.Module:
    model = GPT(layers=LAYERS, width=WIDTH, tied=False)
    draw(
        model,
        (r"c_\w+\.bias", zeros),
        (r"c_proj\.weight", zeros),
        (r"c_fc\.weight", fan_in_normal(math.sqrt(2))),
        ("lm_head", fan_in_normal()),
    )
    for block in model.h:
        for part in block.attn.c_attn.weight.data.chunk(3):
            nn.init.xavier_uniform_(part)
    return model


@recipe()
def fla_rescaled_outputs() -> nn.Module:
    def rescaled(weight: Tensor) -> object:
        linear_default(weight)
        return weight.data.div_(DEPTH)

    return llama(("o_proj|down_proj", rescaled), ("weight", normal(0.02)))


@recipe()
def mpt_xavier_normal() -> nn.Module:
    model = gpt(0.02, 0.02, bias=False)
    draw(
        model,
        (r"c_proj\.weight", xavier_normal(1 / DEPTH)),
        (r"c_fc\.weight", xavier_normal()),
        ("wte|wpe", xavier_normal()),
    )
    for block in model.h:
        for part in block.attn.c_attn.weight.data.chunk(3):
            nn.init.xavier_normal_(part)
    return model


@recipe()
def rwkv_of_transformers() -> nn.Module:
    def orthogonal(weight: Tensor) -> object:
        return nn.init.orthogonal_(weight, max(1.0, math.sqrt(weight.shape[0] / weight.shape[1])))

    def head(weight: Tensor) -> object:
        return nn.init.orthogonal_(weight, 0.5 * math.sqrt(weight.shape[0] / weight.shape[1]))

    def table(weight: Tensor) -> object:
        return nn.init.orthogonal_(weight, 1e-4 * math.sqrt(max(weight.shape)))

    return llama(("embed_tokens", table), ("lm_head", head), ("weight", orthogonal))
