"""Bugs of gains, and inits that are overwritten by another one."""

from __future__ import annotations

import math

import torch
from torch import nn

from benchmarks.initbench.catalogue import bug, images, noisy_patches
from benchmarks.initbench.decoders import GPT, Llama, ScaleNorm
from benchmarks.initbench.draws import (
    draw,
    linear_default,
    normal,
    ones,
    uniform,
    xavier_uniform,
    zeros,
)
from benchmarks.initbench.encoders import Bert
from benchmarks.initbench.others import DiT, LoRALinear, Mamba, ResNet, init_time_steps

LAYERS = 4
DEPTH = math.sqrt(2 * LAYERS)
NORMS = r"norm(1|2)?\.weight|layernorm\.weight"


def plain_llama(**options: object) -> Llama:
    """Return a Llama of N(0, 0.02), its gains as they are built."""
    model = Llama(layers=LAYERS, **options)  # type: ignore[arg-type]
    draw(model, ("norm", lambda weight: weight), ("weight", normal(0.02)))
    return model


# -- gains ----------
@bug("(1 + w) gains at one", blames=(NORMS,))
def gemma_gains_count_from_one(fixed: bool) -> nn.Module:
    """The gain is 1 + w, and the common init sets every norm's w to one: all gains are two."""
    model = plain_llama(centred=True, tied=True, embedding_scale=8.0)
    draw(model, ("norm", zeros if fixed else ones))
    return model


@bug("gains drawn like weights", blames=(r"norm\.weight", r"norm\.bias"))
def bert_gains_drawn_like_weights(fixed: bool) -> nn.Module:
    """Gains and biases of layer norms go through the draw of the matrices."""
    model = Bert(layers=LAYERS)
    draw(model, ("norm", lambda weight: weight), ("bias", zeros), ("weight", normal(0.02)))
    if not fixed:
        draw(model, ("norm", normal(0.02)))
    return model


@bug("gains drawn like weights", blames=(r"layers.*layernorm\.weight",))
def transformer_engine_gains_redrawn(fixed: bool) -> nn.Module:
    """After the meta device, the gains that are fused with a linear layer get the draw of its
    weight.
    """
    model = plain_llama()
    if not fixed:
        draw(model, (r"layernorm", normal(0.023)))
    return model


@bug("gain and bias swapped", blames=(r"ln_\w\.weight", r"ln_\w\.bias"))
def objax_gain_and_bias_swapped(fixed: bool) -> nn.Module:
    """Gains start at zero and biases at one, so every norm returns one whatever it reads."""
    model = GPT(layers=LAYERS)
    draw(
        model, (r"ln_\w\.weight", ones), ("bias", zeros), (r"c_proj\.weight", normal(0.02 / DEPTH))
    )
    draw(model, (r"(wte|wpe|c_attn|c_fc)\.weight", normal(0.02)))
    if not fixed:
        draw(model, (r"ln_\w\.weight", zeros), (r"ln_\w\.bias", ones))
    return model


@bug("gains at zero", blames=(NORMS,))
def timesfm_gains_at_zero(fixed: bool) -> nn.Module:
    """The gains of the root-mean-square norms start at zero, so every norm returns zero."""
    model = plain_llama()
    draw(model, ("norm", ones if fixed else zeros))
    return model


@bug("gains at zero", blames=(r"^norm\.weight",))
def torchtitan_final_gain_at_zero(fixed: bool) -> nn.Module:
    """The last norm inherits the zero init of the centred norms, but its gain is the weight
    itself.
    """
    model = plain_llama(centred=True)
    model.norm.centred = False
    draw(model, (r"^norm\.weight", ones if fixed else zeros))
    return model


@bug("wrong size of a gain", blames=(r"norm\.g$",))
def scalenorm_inverse_of_its_length(fixed: bool) -> nn.Module:
    """The length that every vector gets is one over the root of the width, in place of the root."""
    width = 64
    model = Llama(layers=LAYERS, width=width, norm=lambda: ScaleNorm(width))
    draw(
        model,
        (r"norm\.g$", lambda gain: nn.init.constant_(gain, width ** (0.5 if fixed else -0.5))),
    )
    return model


@bug("gains drawn at random", blames=(r"bn\d\.weight",), probe=images(8))
def torch_batch_norm_gains_uniform(fixed: bool) -> nn.Module:
    """The gains of batch norms are U(0, 1), as torch drew them before 1.2."""
    model = ResNet(layers=LAYERS)
    draw(
        model,
        (
            r"conv\d",
            lambda weight: nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu"),
        ),
    )
    if not fixed:
        draw(model, (r"bn\d\.weight", lambda gain: nn.init.uniform_(gain)))
    return model


# -- one init overwrites another ----------
def mamba_weights(model: nn.Module) -> None:
    """Draw a Mamba-like model as its paper does."""
    draw(model, ("norm", ones), ("embeddings", normal(0.02)), ("in_proj|x_proj", linear_default))
    draw(
        model,
        ("out_proj", uniform(1 / math.sqrt(128) / math.sqrt(LAYERS))),
        (r"conv1d\.bias", zeros),
    )
    init_time_steps(model)


@bug("special init overwritten", blames=(r"dt_proj\.bias",), allows=(r"dt_proj\.weight",))
def madlab_time_steps_overwritten(fixed: bool) -> nn.Module:
    """The model's own init runs over the time steps: weights of 0.02 and zero biases, so every step
    is 0.69.
    """
    model = Mamba(layers=LAYERS)
    mamba_weights(model)
    draw(model, (r"(in_proj|x_proj|out_proj)", normal(0.02)))
    if not fixed:
        draw(model, (r"dt_proj\.weight", normal(0.02)), (r"dt_proj\.bias", zeros))
    return model


@bug("special init lost", blames=(r"dt_proj\.bias",))
def mamba_time_steps_of_one(fixed: bool) -> nn.Module:
    """The biases of the time steps are ones unless the outer model's init runs: every step is
    1.3.
    """
    model = Mamba(layers=LAYERS)
    mamba_weights(model)
    if not fixed:
        draw(model, (r"dt_proj\.bias", ones))
    return model


@bug("zero init lost", blames=(r"blocks.*adaLN_modulation\.1\.weight",), probe=noisy_patches)
def ddt_blocks_miss_the_zero_init(fixed: bool) -> nn.Module:
    """Only the last layer's modulation is set to zero; the blocks' keeps the init of the other
    layers.
    """
    model = DiT(layers=LAYERS)
    draw(model, ("bias", zeros), ("t_embedder", normal(0.02)), ("weight", xavier_uniform()))
    draw(model, (r"final_layer", zeros))
    if fixed:
        draw(model, (r"adaLN_modulation", zeros))
    return model


# -- adapters ----------
def adapted_gpt() -> GPT:
    """Return a GPT with low-rank additions to its fused projections."""
    model = GPT(layers=LAYERS)
    draw(
        model,
        ("bias", zeros),
        ("ln_", ones),
        (r"c_proj\.weight", normal(0.02 / DEPTH)),
        ("weight", normal(0.02)),
    )
    for block in model.h:
        block.attn.c_attn = LoRALinear(block.attn.c_attn)
    return model


@bug("adapter not zero", blames=(r"lora_B",))
def fastvideo_adapter_starts_at_random(fixed: bool) -> nn.Module:
    """Both factors of the low-rank addition are drawn, so the adapted model differs from its base
    at once.
    """
    model = adapted_gpt()
    if not fixed:
        draw(model, ("lora_B", linear_default))
    return model


@bug("adapter dead", blames=(r"lora_A",), or_blames=(r"lora_A", r"lora_B"))
def cosmos_adapter_zero_on_both_sides(fixed: bool) -> nn.Module:
    """The model's init runs after the adapters were added and sets the drawn factor to zero too."""
    model = adapted_gpt()
    if not fixed:
        draw(model, ("lora_A", zeros))
    return model


@bug("cloned layers", blames=(r"h\.[1-9]\..*lora_A",), allows=(r"lora_A",))
def torchtune_adapters_cloned(fixed: bool) -> nn.Module:
    """Layers are deep copies of one, adapters included, and no checkpoint overwrites the
    adapters.
    """
    model = adapted_gpt()
    if not fixed:
        with torch.no_grad():
            for block in model.h:
                block.attn.c_attn.lora_A.copy_(model.h[0].attn.c_attn.lora_A)
    return model
