"""Bugs of gains, biases, padding rows and copies, and correct inits that come close to them."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from benchmarks.initbench.catalogue import bug, images, recipe
from benchmarks.initbench.decoders import GPT, Llama, ScaleNorm
from benchmarks.initbench.draws import (
    Draw,
    constant,
    draw,
    leftover,
    normal,
    ones,
    uniform,
    zeros,
)
from benchmarks.initbench.encoders import PooledEncoder, ViT
from benchmarks.initbench.others import ConvNeXt, ResNet

LAYERS = 4
WIDTH = 64
DEPTH = math.sqrt(2 * LAYERS)
MATRICES = r"_proj\.weight|embed_tokens|lm_head"


def plain_llama(**options: object) -> Llama:
    """Return a Llama of N(0, 0.02), its gains as they are built."""
    model = Llama(layers=LAYERS, **options)  # type: ignore[arg-type]
    draw(model, (MATRICES, normal(0.02)))
    return model


def plain_gpt(**options: object) -> GPT:
    """Return a GPT by the init of GPT-2."""
    model = GPT(layers=LAYERS, **options)  # type: ignore[arg-type]
    draw(
        model,
        ("bias", zeros),
        ("ln_", ones),
        (r"c_proj\.weight", normal(0.02 / DEPTH)),
        ("weight", normal(0.02)),
    )
    return model


# -- gains ----------
@bug("gains drawn at random", blames=(r"bn\d\.weight",), probe=images(8))
def keras_batch_norm_gains_uniform(fixed: bool) -> nn.Module:
    """The gains of batch norms are U(-0.05, 0.05), the uniform draw of the library's other
    weights.
    """
    model = ResNet(layers=LAYERS)
    if not fixed:
        draw(model, (r"bn\d\.weight", uniform(0.05)))
    return model


@bug("wrong size of a gain", blames=(r"norm\.g$",))
def neox_scalenorm_of_one(fixed: bool) -> nn.Module:
    """The length that every vector gets is one, where the paper starts from the root of the
    width.
    """
    model = plain_llama(norm=lambda: ScaleNorm(WIDTH))
    if not fixed:
        draw(model, (r"norm\.g$", ones))
    return model


# -- biases and rows ----------
@bug(
    "biases not zero",
    blames=(r"blocks.*conv\d?\.bias",),
    allows=(r"(stem|head)\.bias",),
    probe=images(8),
)
def dlwpt_biases_around_a_bound(fixed: bool) -> nn.Module:
    """Biases are drawn with the bound as std and its negative as mean, left from a uniform draw."""
    model = ConvNeXt(layers=LAYERS)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            bound = 1 / math.sqrt(module.weight[0].numel())
            if fixed:
                nn.init.zeros_(module.bias)
            else:
                nn.init.normal_(module.bias, -bound, bound)
    return model


@bug("padding row not zero", blames=(r"embed_tokens",))
def graphormer_padding_row_redrawn(fixed: bool) -> nn.Module:
    """The model's own init draws the whole table again, the row of zeros for padding included."""
    model = plain_llama()
    model.embed_tokens.padding_idx = 0
    if fixed:
        with torch.no_grad():
            model.embed_tokens.weight[0].zero_()
    return model


# -- copies ----------
@bug("cloned layers", blames=(r"h\.[1-9]\..*(attn|mlp)\.\w+\.weight",), allows=(r"^h\.",))
def retnet_layers_deep_copied(fixed: bool) -> nn.Module:
    """The decoder copies the one layer that it is given."""
    model = plain_gpt()
    if not fixed:
        model.h = nn.ModuleList(copy.deepcopy(model.h[0]) for _ in range(LAYERS))
    return model


@bug("shards are clones", blames=(MATRICES,))
def olmo_core_shards_of_one_seed(fixed: bool) -> nn.Module:
    """Each of four ranks draws its rows of every matrix from the same seed."""
    model = plain_llama()
    if not fixed:
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() == 2:
                    first, *others = weight.chunk(4)
                    for shard in others:
                        shard.copy_(first)
    return model


@bug("cloned layers", blames=(r"layers\.[23]\..*_proj",), allows=(r"layers\.1",))
def modalities_pipeline_stages_of_one_seed(fixed: bool) -> nn.Module:
    """Every stage of a pipeline starts from one seed; the first stage draws its embedding before
    its layer.
    """
    model = plain_llama()
    if not fixed:
        parts: list[list[nn.Module]] = [[layer] for layer in model.layers]
        parts[0].insert(0, model.embed_tokens)
        parts[-1].append(model.lm_head)
        for stage in parts:
            torch.manual_seed(42)
            for part in stage:
                draw(part, (r"_proj|^weight", normal(0.02)))
    return model


@bug(
    "every draw is the same",
    blames=(r"h\.[1-9]\.(attn|mlp)\.\w+\.weight",),
    allows=(r"h\.0|wte|wpe",),
)
def nntile_every_weight_of_one_seed(fixed: bool) -> nn.Module:
    """One seed is used for every weight, whose shapes and spreads differ."""
    model = plain_gpt()
    if not fixed:
        draw(model, (r"c_proj\.weight", restarted(0.02 / DEPTH)))
        draw(model, (r"(wte|wpe|c_attn|c_fc)\.weight", restarted(0.02)))
    return model


def restarted(std: float) -> Draw:
    """N(0, std) from a generator that always starts at one seed."""

    @torch.no_grad()
    def fill(weight: Tensor) -> object:
        generator = torch.Generator().manual_seed(3)
        return weight.normal_(0.0, std, generator=generator)

    return fill


# -- memory that nothing wrote ----------
@bug("memory never written", blames=(r"wpe\.weight", r"lm_head\.weight"))
def clip_positions_and_projection_empty(fixed: bool) -> nn.Module:
    """The learned positions and the last projection are `torch.empty` in a model that is trained
    from scratch.
    """
    model = plain_gpt(tied=False)
    if not fixed:
        draw(model, (r"wpe|lm_head", leftover(21)))
    return model


@bug("memory never written", blames=(r"^head\.",))
def bionemo_contact_head_never_written(fixed: bool) -> nn.Module:
    """The head is whatever `torch.empty` left, weight and bias."""
    model = PooledEncoder(layers=LAYERS)
    draw(model, ("attention_vector", uniform(0.05)))
    if not fixed:
        draw(model, (r"^head\.", leftover(22)))
    return model


# -- correct inits ----------
class BiasNorm(nn.Module):
    """x / rms(x - bias) * exp(log_scale), the norm of Zipformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(1e-4 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        square = (x - self.bias).square().mean(-1, keepdim=True)
        return x * square.rsqrt() * self.log_scale.exp()


@recipe()
def zipformer_bias_norm() -> nn.Module:
    return plain_llama(norm=lambda: BiasNorm(WIDTH))


@recipe(probe=images(8))
def dcgan_gains_around_one() -> nn.Module:
    model = ResNet(layers=LAYERS)
    draw(model, (r"bn\d\.weight", lambda gain: nn.init.normal_(gain, 1.0, 0.02)))
    draw(model, (r"bn\d\.bias", zeros), ("conv", normal(0.02)))
    return model


@recipe(probe=images(16))
def retinanet_prior_on_the_head() -> nn.Module:
    model = ViT(layers=LAYERS)
    draw(model, (r"head\.bias", constant(-math.log(99.0))), ("bias", zeros), ("norm", ones))
    draw(model, ("norm", ones), ("weight|cls_token|pos_embed", normal(0.02)))
    return model


@recipe(probe=images(8))
def dlrm_biases_by_the_outputs() -> nn.Module:
    model = ConvNeXt(layers=LAYERS)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, math.sqrt(2 / sum(module.weight.shape)))
            nn.init.normal_(module.bias, 0.0, math.sqrt(1 / module.out_features))
    return model
