"""Bugs of structure: clones, lost ties, factors on the wrong operand, paths that carry no
gradient.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from benchmarks.initbench.catalogue import bug, features
from benchmarks.initbench.decoders import Llama, MixtureOfExperts
from benchmarks.initbench.draws import draw, fan_in_normal, normal, ones, xavier_normal, zeros
from benchmarks.initbench.encoders import PostNormDecoder, TorchEncoder
from benchmarks.initbench.others import ResidualMLP, ReZero

LAYERS = 4


def plain_llama(**options: object) -> Llama:
    """Return a Llama of N(0, 0.02)."""
    model = Llama(layers=LAYERS, **options)  # type: ignore[arg-type]
    draw(model, ("norm", ones), ("bias", zeros), ("weight", normal(0.02)))
    return model


# -- clones ----------
@bug(
    "cloned layers",
    blames=(r"encoder\.layers\.[1-9]\.(self_attn\.(in_proj_|out_proj\.)|linear\d\.)weight",),
    allows=(r"encoder\.layers",),
)
def torch_encoder_layers_are_clones(fixed: bool) -> nn.Module:
    """`nn.TransformerEncoder` copies the layer that it is given, so all layers start from the same
    weights.
    """
    return TorchEncoder(layers=LAYERS, redraw=fixed)


@bug("experts are clones", blames=(r"experts\.[1-9]\.",), allows=(r"experts",))
def fastmoe_experts_share_a_seed(fixed: bool) -> nn.Module:
    """Every worker draws its expert from the same seed."""
    model = plain_llama(feed_forward=MixtureOfExperts)
    if not fixed:
        with torch.no_grad():
            for layer in model.layers:
                for expert in layer.mlp.experts:
                    for name, weight in expert.named_parameters():
                        weight.copy_(layer.mlp.experts[0].get_parameter(name))
    return model


@bug("shards are clones", blames=(r"[qkv]_proj", r"(gate|up)_proj", r"(o|down)_proj"))
def internlm_shards_share_a_seed(fixed: bool) -> nn.Module:
    """Both ranks of tensor parallelism draw their half of a matrix from the same seed."""
    model = plain_llama()
    if not fixed:
        with torch.no_grad():
            for name, weight in model.layers.named_parameters():
                if weight.dim() == 2:
                    first, second = weight.chunk(
                        2, dim=1 if "o_proj" in name or "down_proj" in name else 0
                    )
                    second.copy_(first)
    return model


@bug(
    "every draw is the same",
    blames=(r"layers\.[1-9]\.(self_attn|mlp)\.\w+_proj",),
    allows=(r"layers\.0|embed_tokens|lm_head",),
)
def torchtitan_every_draw_restarts(fixed: bool) -> nn.Module:
    """The state of the generator is restored after each draw, so matrices of one shape are
    equal.
    """
    model = plain_llama()
    if not fixed:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    generator = torch.Generator().manual_seed(7)
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


# -- ties ----------
@bug("tie lost", blames=(r"lm_head",), allows=(r"embed_tokens",))
def modalities_tie_lost_on_the_meta_device(fixed: bool) -> nn.Module:
    """The config ties head and embedding, but leaving the meta device gives either a tensor of its
    own.
    """
    model = plain_llama(model_type="gpt", tied=True, config={"tie_word_embeddings": True})
    if not fixed:
        model.lm_head.weight = nn.Parameter(
            torch.empty_like(model.lm_head.weight).normal_(0.0, 0.02)
        )
    return model


@bug("tie lost", blames=(r"lm_head",), allows=(r"embed_tokens",))
def mistral_tie_flag_not_read(fixed: bool) -> nn.Module:
    """The flag that ties the head stands in an inner config, and the outer one decides: the head is
    random.
    """
    model = plain_llama(model_type="mistral", tied=fixed, config={"tie_word_embeddings": True})
    return model


# -- factors and dead paths ----------
@bug("factor on the wrong operand", blames=(), allows=(r"layers",))
def labml_alpha_on_the_branch(fixed: bool) -> nn.Module:
    """DeepNorm's alpha multiplies the branch in place of the shortcut."""
    beta = (8 * LAYERS) ** -0.25
    model = PostNormDecoder(layers=LAYERS, alpha=(2 * LAYERS) ** 0.25, on_branch=not fixed)
    draw(model, ("q_proj|k_proj", xavier_normal()), ("v_proj|out_proj|fc", xavier_normal(beta)))
    return model


@bug("factor on the wrong operand", blames=(r"alpha_",), allows=(r"blocks",))
def rezero_factor_on_the_shortcut(fixed: bool) -> nn.Module:
    """The factor that starts at zero multiplies the shortcut in place of the branch: no stream is
    left.
    """
    model = ReZero(layers=LAYERS, on_shortcut=not fixed)
    draw(model, ("alpha", zeros), (r"bias", zeros), (r"(qkv|proj|fc\d)\.weight", xavier_normal()))
    return model


@bug("branch dead for ever", blames=(r"blocks\.\d+\.w1",), allows=(r"blocks",), probe=features)
def naivegaflux_branch_all_zero(fixed: bool) -> nn.Module:
    """All layers of a residual branch are zero, so none of them ever gets a gradient."""
    model = ResidualMLP(layers=LAYERS)
    draw(model, (r"\.w1$", fan_in_normal(math.sqrt(2)) if fixed else zeros), (r"\.w2$", zeros))
    return model
