"""Bugs of computed tables, ties, adapters and cut paths, with the small models that they need.

These cases were written before any check that judges them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.initbench.bugs_gains import adapted_gpt
from benchmarks.initbench.catalogue import bug, images
from benchmarks.initbench.decoders import GPT, GPTFeedForward, RMSNorm, split_heads
from benchmarks.initbench.draws import draw, leftover, linear_default, normal, ones, zeros

LAYERS = 4
DEPTH = math.sqrt(2 * LAYERS)


# -- a decoder whose attention reads a table ----------
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return (batch, heads, length, width) rotated by angles of (length, width / 2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class TableAttention(nn.Module):
    """Attention by hand: scores, an additive bias or mask from outside, softmax."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        query, key, value = (split_heads(part, self.heads) for part in self.c_attn(x).chunk(3, -1))
        if angles is not None:
            query, key = rotate(query, *angles), rotate(key, *angles)
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1]) + bias
        return self.c_proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


class TableBlock(nn.Module):
    """Pre-norm block whose attention is given tables."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = RMSNorm(width)
        self.attn = TableAttention(width, heads)
        self.ln_2 = RMSNorm(width)
        self.mlp = GPTFeedForward(width, bias=False)

    def forward(self, x: Tensor, bias: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), bias, angles)
        return x + self.mlp(self.ln_2(x))


class TableDecoder(nn.Module):
    """Decoder whose positions come from one table.

    Args:
        positions: "rotary" (tables of cosines and sines), "alibi" (slopes of the heads) or
            "sinusoid".
        heads: number of heads.
    """

    causal_mask: Tensor
    cos: Tensor
    sin: Tensor
    alibi_slopes: Tensor
    position_embeddings: Tensor

    def __init__(
        self, positions: str, *, heads: int = 4, width: int = 64, length: int = 32, layers: int = 4
    ) -> None:
        super().__init__()
        self.positions = positions
        self.wte = nn.Embedding(256, width)
        self.h = nn.ModuleList(TableBlock(width, heads) for _ in range(layers))
        self.ln_f = RMSNorm(width)
        self.lm_head = nn.Linear(width, 256, bias=False)
        mask = torch.full((length, length), -math.inf).triu(1)
        self.register_buffer("causal_mask", mask, persistent=False)
        if positions == "rotary":
            powers = torch.arange(0, width // heads, 2).float() / (width // heads)
            angles = torch.outer(torch.arange(length).float(), 10000.0**-powers)
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)
        if positions == "alibi":
            self.register_buffer("alibi_slopes", slopes_of(heads), persistent=False)
        if positions == "sinusoid":
            table = sinusoids(length, width)
            self.register_buffer("position_embeddings", table, persistent=False)
        draw(self, ("ln_", ones), (r"c_proj", normal(0.02 / DEPTH)), ("weight", normal(0.02)))

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        x = self.wte(input_ids)
        bias = self.causal_mask[:length, :length]
        angles = None
        if self.positions == "sinusoid":
            x = x + self.position_embeddings[:length]
        if self.positions == "alibi":
            distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
            bias = bias + self.alibi_slopes[:, None, None] * distance
        if self.positions == "rotary":
            angles = self.cos[:length], self.sin[:length]
        for block in self.h:
            x = block(x, bias, angles)
        return self.lm_head(self.ln_f(x))


def slopes_of(heads: int) -> Tensor:
    """Return the slopes of ALiBi: powers of 2^(-8/n), and for other counts every second one of
    twice as many.
    """
    nearest = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (index + 1) / nearest) for index in range(nearest)]
    finer = [2 ** (-4 * (index + 1) / nearest) for index in range(2 * nearest)]
    return torch.tensor(slopes + finer[0::2][: heads - nearest])


def sinusoids(length: int, width: int) -> Tensor:
    """Return the table of sines and cosines of "Attention Is All You Need"."""
    frequencies = 10000.0 ** (-torch.arange(0, width, 2).float() / width)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


@bug("buffer erased", blames=(r"^cos$", r"^sin$"))
def nanochat_tables_left_on_meta(fixed: bool) -> nn.Module:
    """The tables of cosines and sines are computed on the meta device, and init_weights fills them
    no more.
    """
    model = TableDecoder("rotary")
    if not fixed:
        leftover(20)(model.cos)
        leftover(21)(model.sin)
    return model


@bug("buffer erased", blames=(r"position_embeddings",))
def multimolecule_sinusoids_altered(fixed: bool) -> nn.Module:
    """Sinusoids are no part of the state dict, and loading leaves other numbers in them."""
    model = TableDecoder("sinusoid")
    if not fixed:
        leftover(22)(model.position_embeddings)
    return model


@bug("buffer erased", blames=(r"causal_mask",))
def mosaic_causal_mask_zeroed(fixed: bool) -> nn.Module:
    """The causal mask comes from the meta device as zeros, so every token sees those after it."""
    model = TableDecoder("rotary")
    if not fixed:
        model.causal_mask.zero_()
    return model


@bug("wrong table", blames=(r"alibi_slopes",))
def aprender_slopes_start_at_one(fixed: bool) -> nn.Module:
    """The exponent of the slopes counts heads from zero: 2^(-8 h / n), so that the first slope is
    one.
    """
    model = TableDecoder("alibi", heads=8)
    if not fixed:
        model.alibi_slopes.copy_(2.0 ** -torch.arange(8).float())
    return model


# -- batch norms ----------
class MovingBatchNorm(nn.Module):
    """Batch norm written by hand, with moving statistics as buffers."""

    moving_mean: Tensor
    moving_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width))
        self.register_buffer("moving_mean", torch.zeros(width))
        self.register_buffer("moving_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.moving_mean, self.moving_var
        normed = (x - mean[:, None, None]) / torch.sqrt(variance[:, None, None] + 1e-5)
        return self.gamma[:, None, None] * normed + self.beta[:, None, None]


class MovingResNet(nn.Module):
    """Pre-activation residual network on images of (3, 8, 8)."""

    def __init__(self, *, layers: int = 4, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norms = nn.ModuleList(MovingBatchNorm(width) for _ in range(layers))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(layers))
        self.head = nn.Linear(width, 16)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = x + conv(F.relu(norm(x)))
        return self.head(x.mean((2, 3)))


@bug("buffer of zeros", blames=(r"moving_var",), allows=(r"norms",), probe=images(8))
def d2l_moving_variance_of_zero(fixed: bool) -> nn.Module:
    """The moving variance starts at zero in place of one."""
    model = MovingResNet(layers=LAYERS)
    if not fixed:
        for norm in model.norms:
            norm.moving_var.zero_()
    return model


# -- state space ----------
class HeadMixer(nn.Module):
    """State-space mixer with one decay rate and one time step per head, as in Mamba-2."""

    def __init__(self, width: int, heads: int, states: int) -> None:
        super().__init__()
        self.heads, self.states, self.inner = heads, states, 2 * width
        self.in_proj = nn.Linear(width, 2 * self.inner + 2 * states + heads, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(self.inner)
        self.out_proj = nn.Linear(self.inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        sizes = [self.inner, self.inner, self.states, self.states, self.heads]
        gate, signal, write, read, step = self.in_proj(x).split(sizes, dim=-1)
        signal = F.silu(signal).unflatten(2, (self.heads, -1))
        step = F.softplus(step + self.dt_bias)
        decay = torch.exp(-torch.exp(self.A_log) * step)
        state = torch.zeros_like(signal[:, 0])[..., None] * write[:, 0, None, None]
        outputs = []
        for index in range(x.shape[1]):
            drive = (step[:, index, :, None] * signal[:, index])[..., None]
            state = decay[:, index, :, None, None] * state + drive * write[:, index, None, None]
            outputs.append((state * read[:, index, None, None]).sum(-1))
        mixed = torch.stack(outputs, 1) + self.D[:, None] * signal
        return self.out_proj(self.norm(mixed.flatten(2) * F.silu(gate)))


class HeadBlock(nn.Module):
    """Pre-norm block with one mixer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.mixer = HeadMixer(width, heads=8, states=8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


class Mamba2(nn.Module):
    """Decoder of Mamba-2 mixers with the time steps of the paper: log-uniform in [0.001, 0.1]."""

    def __init__(self, *, layers: int = 4, width: int = 64) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(256, width)
        self.layers = nn.ModuleList(HeadBlock(width) for _ in range(layers))
        self.norm_f = RMSNorm(width)
        self.lm_head = nn.Linear(width, 256, bias=False)
        draw(self, ("norm", ones), ("embeddings|lm_head", normal(0.02)), ("proj", linear_default))
        with torch.no_grad():
            for layer in self.layers:
                bias = layer.mixer.dt_bias
                step = torch.exp(torch.empty_like(bias).uniform_(math.log(0.001), math.log(0.1)))
                bias.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm_f(x))


@bug("special init lost", blames=(r"dt_bias",))
def fla_time_steps_of_one(fixed: bool) -> nn.Module:
    """The biases of Mamba-2's time steps are ones in all heads."""
    model = Mamba2(layers=LAYERS)
    if not fixed:
        draw(model, ("dt_bias", ones))
    return model


# -- ties ----------
def plain_gpt(*, tied: bool, config_says: bool) -> GPT:
    """Return a GPT by the init of GPT-2 with a config that says whether it is tied."""
    model = GPT(layers=LAYERS, tied=tied, model_type="gpt_bigcode")
    model.config.tie_word_embeddings = config_says
    draw(
        model,
        ("bias", zeros),
        ("ln_", ones),
        (r"c_proj\.weight", normal(0.02 / DEPTH)),
        ("weight", normal(0.02)),
    )
    return model


@bug("tie denied", blames=(r"wte",), or_blames=(r"lm_head",), allows=(r"wte|lm_head",))
def fms_config_denies_the_tie(fixed: bool) -> nn.Module:
    """The wrapper's config says that head and embedding are two tensors, and the model inside ties
    them.
    """
    return plain_gpt(tied=True, config_says=fixed)


@bug("tie lost", blames=(r"lm_head",), allows=(r"wte",))
def mlx_head_is_a_copy(fixed: bool) -> nn.Module:
    """The head is given the numbers of the embedding, not the embedding itself."""
    model = plain_gpt(tied=fixed, config_says=True)
    if not fixed:
        with torch.no_grad():
            model.lm_head.weight.copy_(model.wte.weight)
    return model


# -- adapters ----------
class LinearAdapter(nn.Module):
    """A linear layer and two small ones next to it, as modules."""

    def __init__(self, base: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 2.0 * self.lora_B(self.lora_A(x))


@bug("adapter dead", blames=(r"lora_A",), or_blames=(r"lora_A", r"lora_B"))
def relora_both_factors_zero(fixed: bool) -> nn.Module:
    """When a model is wrapped, both factors of the low-rank addition are set to zero."""
    model = adapted_gpt()
    for block in model.h:
        block.attn.c_attn = LinearAdapter(block.attn.c_attn.base)
        if not fixed:
            nn.init.zeros_(block.attn.c_attn.lora_A.weight)
    return model


@bug("adapter not zero", blames=(r"lora_B",), allows=(r"lora_A",))
def mflux_both_factors_drawn(fixed: bool) -> nn.Module:
    """Both factors are drawn from U(-1/sqrt(in), 1/sqrt(in))."""
    model = adapted_gpt()
    for block in model.h:
        block.attn.c_attn = LinearAdapter(block.attn.c_attn.base)
        if not fixed:
            nn.init.uniform_(block.attn.c_attn.lora_B.weight, -1 / 8, 1 / 8)
    return model


# -- paths that carry no gradient ----------
class ControlledBlock(nn.Module):
    """Pre-norm block with a branch that ends in a zero projection and then in another one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.mlp = GPTFeedForward(width, bias=False)
        self.zero_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, detached: str) -> Tensor:
        if detached == "shortcut":
            return x.detach() + self.zero_proj(self.mlp(self.norm(x)))
        branch = self.zero_proj(self.mlp(self.norm(x)))
        return x + (branch.detach() if detached == "branch" else branch)


class Controlled(nn.Module):
    """Decoder of such blocks. `detached` names the operand of the addition that loses its gradient,
    or is empty.
    """

    def __init__(self, *, layers: int = 4, width: int = 64, detached: str = "") -> None:
        super().__init__()
        self.detached = detached
        self.wte = nn.Embedding(256, width)
        self.h = nn.ModuleList(ControlledBlock(width) for _ in range(layers))
        self.ln_f = RMSNorm(width)
        self.lm_head = nn.Linear(width, 256, bias=False)
        draw(self, ("bias", zeros), ("norm|ln_", ones), ("weight", normal(0.02)))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.wte(input_ids)
        for block in self.h:
            x = block(x, self.detached)
        return self.lm_head(self.ln_f(x))


@bug(
    "branch dead for ever",
    blames=(r"mlp\.c_proj", r"zero_proj\.weight"),
    allows=(r"^h\.",),
)
def controlnet_two_zero_projections(fixed: bool) -> nn.Module:
    """A branch's own last projection is zero, and so is the projection that follows it."""
    model = Controlled(layers=LAYERS)
    draw(model, (r"zero_proj", zeros))
    if not fixed:
        draw(model, (r"mlp\.c_proj", zeros))
    return model


@bug("gradient cut off", blames=(r"^h\.",))
def coca_branch_loses_its_gradient(fixed: bool) -> nn.Module:
    """A part's output is detached before it is added, so that the part never learns."""
    return Controlled(layers=LAYERS, detached="" if fixed else "branch")


@bug("gradient cut off", blames=(), allows=(r"^h\.|^wte",), one_is_enough=True)
def entrenar_shortcut_without_gradient(fixed: bool) -> nn.Module:
    """The backward of the second addition forgets the shortcut: the gradient passes through
    branches alone.
    """
    return Controlled(layers=LAYERS, detached="" if fixed else "shortcut")
