"""Bugs of memory: tensors that nothing wrote, buffers that were erased, low precision."""

from __future__ import annotations

import math

import torch
from torch import nn

from benchmarks.initbench.catalogue import bug, images
from benchmarks.initbench.decoders import GPT, Llama, MixtureOfExperts
from benchmarks.initbench.draws import draw, leftover, linear_default, normal, ones, zeros
from benchmarks.initbench.encoders import PooledEncoder, RelativeEncoder, ViT
from benchmarks.initbench.others import Mamba, init_time_steps

LAYERS = 4
DEPTH = math.sqrt(2 * LAYERS)


def plain_llama(**options: object) -> Llama:
    """Return a Llama of N(0, 0.02)."""
    model = Llama(layers=LAYERS, **options)  # type: ignore[arg-type]
    draw(model, ("norm", ones), ("bias", zeros), ("weight", normal(0.02)))
    return model


def gpt() -> GPT:
    """Return a GPT by the init of GPT-2."""
    model = GPT(layers=LAYERS)
    draw(
        model,
        ("bias", zeros),
        ("ln_", ones),
        (r"c_proj\.weight", normal(0.02 / DEPTH)),
        ("weight", normal(0.02)),
    )
    return model


# -- parameters that nothing wrote ----------
@bug("memory never written", blames=(r"norm\.weight|layernorm\.weight",))
def chatglm_gains_never_written(fixed: bool) -> nn.Module:
    """The gains of the norms are `torch.empty` and wait for a checkpoint."""
    model = plain_llama()
    if not fixed:
        draw(model, ("norm", leftover(1)))
    return model


@bug("meta device never initialised", blames=(r"norm\.weight|layernorm\.weight",))
def llmfoundry_norms_skipped_after_meta(fixed: bool) -> nn.Module:
    """After the meta device the model's init knows linear layers and embeddings only; norms become
    NaN.
    """
    model = plain_llama()
    if not fixed:
        draw(model, ("norm", lambda gain: nn.init.constant_(gain, math.nan)))
    return model


@bug("memory never written", blames=(r"attn\.\w+\.weight",))
def transformerlens_attention_never_written(fixed: bool) -> nn.Module:
    """The matrices of attention are `torch.empty` in a model that is built from its config."""
    model = gpt()
    if not fixed:
        draw(model, (r"attn\.\w+\.weight", leftover(2)))
    return model


@bug("memory never written", blames=(r"h\.1\.attn\.c_proj\.weight",))
def transformerlens_output_partly_nan(fixed: bool) -> nn.Module:
    """Part of one output projection holds NaN after the init of the model."""
    model = gpt()
    if not fixed:
        with torch.no_grad():
            model.h[1].attn.c_proj.weight.view(-1)[505:768] = math.nan
    return model


@bug("memory never written", blames=(r"experts\.\d+\.(gate|up|down)_proj",))
def fastmoe_experts_never_written(fixed: bool) -> nn.Module:
    """The layer of experts allocates its weights and draws none of them."""
    model = plain_llama(feed_forward=MixtureOfExperts)
    if not fixed:
        draw(model, (r"experts", leftover(3)))
    return model


@bug("memory never written", blames=(r"pos_bias_[uv]",))
def fairseq_relative_biases_never_written(fixed: bool) -> nn.Module:
    """The two biases of relative attention are `torch.Tensor` of a size."""
    model = RelativeEncoder(layers=LAYERS)
    if not fixed:
        draw(model, (r"pos_bias", leftover(4)))
    return model


@bug("memory never written", blames=(r"pos_embed",), probe=images(16))
def fastinst_positions_never_written(fixed: bool) -> nn.Module:
    """The learned positions are `torch.empty`."""
    model = vit()
    if not fixed:
        draw(model, ("pos_embed", leftover(5)))
    return model


@bug("memory never written", blames=(r"cls_token",), probe=images(16))
def stale_background_token_never_written(fixed: bool) -> nn.Module:
    """The learned token that joins the others is `torch.empty`."""
    model = vit()
    if not fixed:
        draw(model, ("cls_token", leftover(6)))
    return model


def vit() -> ViT:
    """Return a ViT of truncated N(0, 0.02)."""
    model = ViT(layers=LAYERS)
    draw(model, ("bias", zeros), ("norm", ones), ("weight|cls_token|pos_embed", normal(0.02)))
    return model


@bug("memory never written", blames=(r"attention_vector",))
def torchmoji_attention_vector_never_written(fixed: bool) -> nn.Module:
    """The vector that weighs the outputs holds anything, up to 1e38."""
    model = PooledEncoder(layers=LAYERS)
    draw(model, ("attention_vector", lambda vector: nn.init.uniform_(vector, -0.05, 0.05)))
    if not fixed:
        draw(model, ("attention_vector", leftover(7, wide=True)))
    return model


@bug("memory never written", blames=(r"layers\.0\.self_attn\.q_proj",))
def kgrec_query_matrix_never_written(fixed: bool) -> nn.Module:
    """One query matrix is a bare parameter that no init knows."""
    model = plain_llama()
    if not fixed:
        draw(model, (r"layers\.0\.self_attn\.q_proj", leftover(8)))
    return model


@bug("memory never written", blames=(r"gate\.bias",))
def torchtitan_router_bias_never_written(fixed: bool) -> nn.Module:
    """The init of the router draws its weight and leaves its bias, which deterministic mode fills
    with NaN.
    """
    model = plain_llama(feed_forward=lambda: MixtureOfExperts(router_bias=True))
    if not fixed:
        draw(model, (r"gate\.bias", lambda bias: nn.init.constant_(bias, math.nan)))
    return model


@bug("meta device never initialised", blames=(r".",), one_is_enough=True)
def litgpt_model_never_initialised(fixed: bool) -> nn.Module:
    """The model is built empty on one device and the init never runs: the loss stays at
    ln(vocabulary).
    """
    model = plain_llama()
    if not fixed:
        draw(model, (r".", zeros))
    return model


# -- buffers ----------
@bug("buffer erased", blames=(r"inv_freq",))
def qwen_frequencies_read_empty_memory(fixed: bool) -> nn.Module:
    """The frequencies of rotary positions are a buffer that nobody writes after `to_empty`."""
    model = plain_llama()
    if not fixed:
        leftover(9)(model.rotary.inv_freq)
    return model


@bug("buffer erased", blames=(r"inv_freq",))
def executorch_frequencies_zeroed(fixed: bool) -> nn.Module:
    """Every buffer of the meta device becomes zero, rotary frequencies included: no position is
    rotated.
    """
    model = plain_llama()
    if not fixed:
        model.rotary.inv_freq.zero_()
    return model


@bug("buffer erased", blames=(r"ln_scale",), allows=(r"layers",))
def olmo_norm_scale_erased(fixed: bool) -> nn.Module:
    """The factor on the norms of a layer is a buffer that `to_empty` erases."""
    model = plain_llama(scaled_norms=True)
    if not fixed:
        for index, layer in enumerate(model.layers):
            leftover(10 + index)(layer.ln_scale)
    return model


@bug("low precision", blames=(r"inv_freq",))
def automodel_frequencies_in_bfloat16(fixed: bool) -> nn.Module:
    """A cast of the whole model rounds the rotary frequencies, and no later cast brings the digits
    back.
    """
    model = plain_llama()
    if not fixed:
        model.rotary.inv_freq = model.rotary.inv_freq.bfloat16().float()
    return model


@bug("low precision", blames=(r"A_log",))
def qwen_decay_rates_of_minus_infinity(fixed: bool) -> nn.Module:
    """Decay rates are drawn in bfloat16, where some draws round to zero and their logarithm is
    minus infinity.
    """
    model = Mamba(layers=LAYERS)
    draw(
        model,
        ("norm", ones),
        ("embeddings", normal(0.02)),
        ("in_proj|x_proj|out_proj", linear_default),
    )
    draw(model, (r"conv1d\.bias", zeros))
    init_time_steps(model)
    if not fixed:
        with torch.no_grad():
            for layer in model.layers:
                layer.mixer.A_log[3] = -math.inf
    return model
