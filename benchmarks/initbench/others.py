"""Other shapes: a diffusion transformer, a state-space model, residual networks, adapters."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.initbench.decoders import RMSNorm
from benchmarks.initbench.encoders import ViTAttention, ViTFeedForward


# -- diffusion transformer ----------
class DiTBlock(nn.Module):
    """Pre-norm block whose shifts, scales and gates are computed from the condition."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attn = ViTAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = ViTFeedForward(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(condition).unsqueeze(1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    """The last norm and projection, modulated too."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False)
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class DiT(nn.Module):
    """Diffusion transformer on patches of (batch, length, channels) and a time. Weights keep the
    defaults of torch.
    """

    def __init__(
        self, *, layers: int = 4, width: int = 64, heads: int = 4, channels: int = 16
    ) -> None:
        super().__init__()
        self.width = width
        self.x_embedder = nn.Linear(channels, width)
        self.t_embedder = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(layers))
        self.final_layer = FinalLayer(width, channels)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        frequencies = 10000.0 ** (-torch.arange(self.width // 2).float() / (self.width // 2))
        angles = t[:, None] * frequencies
        condition = self.t_embedder(torch.cat([angles.cos(), angles.sin()], dim=1))
        x = self.x_embedder(x)
        for block in self.blocks:
            x = block(x, condition)
        return self.final_layer(x, condition)


# -- state-space model ----------
class Mixer(nn.Module):
    """Selective state-space mixer, one step after the other."""

    def __init__(self, width: int, states: int, rank: int) -> None:
        super().__init__()
        inner = 2 * width
        self.states, self.rank = states, rank
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.x_proj = nn.Linear(inner, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1, states + 1).float().repeat(inner, 1).log())
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        signal, gate = self.in_proj(x).chunk(2, dim=-1)
        signal = F.silu(self.conv1d(signal.transpose(1, 2))[..., :length].transpose(1, 2))
        parts = self.x_proj(signal).split([self.rank, self.states, self.states], dim=-1)
        step = F.softplus(self.dt_proj(parts[0]))
        decay = torch.exp(step[..., None] * -torch.exp(self.A_log))
        drive = (step * signal)[..., None] * parts[1][:, :, None]
        state = torch.zeros_like(drive[:, 0])
        outputs = []
        for index in range(length):
            state = decay[:, index] * state + drive[:, index]
            outputs.append((state * parts[2][:, index, None]).sum(-1))
        mixed = torch.stack(outputs, dim=1) + self.D * signal
        return self.out_proj(mixed * F.silu(gate))


class MambaBlock(nn.Module):
    """Pre-norm block with one mixer."""

    def __init__(self, width: int, states: int, rank: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.mixer = Mixer(width, states, rank)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


class Mamba(nn.Module):
    """Mamba-like decoder. Weights keep the defaults of torch; the decay rates are those of the
    paper.
    """

    def __init__(
        self,
        *,
        layers: int = 4,
        width: int = 64,
        states: int = 8,
        rank: int = 4,
        vocabulary: int = 256,
    ) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(MambaBlock(width, states, rank) for _ in range(layers))
        self.norm_f = RMSNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.embeddings.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm_f(x))


@torch.no_grad()
def init_time_steps(model: nn.Module) -> None:
    """Draw the time steps as the paper does: log-uniform in [0.001, 0.1], through the inverse of
    softplus.
    """
    for module in model.modules():
        if isinstance(module, Mixer):
            bound = module.rank**-0.5
            nn.init.uniform_(module.dt_proj.weight, -bound, bound)
            low, high = math.log(0.001), math.log(0.1)
            step = torch.exp(low + (high - low) * torch.rand_like(module.dt_proj.bias))
            module.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))


# -- residual networks ----------
class ConvBlock(nn.Module):
    """Two convolutions with batch norm around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    """Residual network on images of (3, 8, 8). Weights keep the defaults of torch."""

    def __init__(self, *, layers: int = 4, width: int = 24, classes: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layers = nn.ModuleList(ConvBlock(width) for _ in range(layers))
        self.fc = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.mean((2, 3)))


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, norm, two pointwise layers, and a factor per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.pwconv2 = nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        inner = self.gamma * self.pwconv2(F.gelu(self.pwconv1(inner)))
        return x + inner.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """ConvNeXt on images of (3, 8, 8). Weights keep the defaults of torch."""

    def __init__(self, *, layers: int = 4, width: int = 32, classes: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 2, stride=2)
        self.blocks = nn.ModuleList(ConvNeXtBlock(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.mean((2, 3))))


class ResidualMLPBlock(nn.Module):
    """Two linear layers around a shortcut, which a learned factor can multiply by mistake."""

    def __init__(self, width: int, hidden: int, *, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        self.norm = nn.LayerNorm(width)
        shapes = (
            ((width, hidden), (hidden, width)) if transposed else ((hidden, width), (width, hidden))
        )
        self.w1 = nn.Parameter(torch.zeros(shapes[0]))
        self.w2 = nn.Parameter(torch.zeros(shapes[1]))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(x)
        if self.transposed:
            return x + F.relu(inner @ self.w1) @ self.w2
        return x + F.linear(F.relu(F.linear(inner, self.w1)), self.w2)


class ResidualMLP(nn.Module):
    """Residual stack of feed-forward networks on vectors of 32. The blocks' matrices are zero until
    they are drawn.

    Args:
        layers, width, hidden: sizes.
        transposed: whether matrices are stored as (in, out) and multiplied from the right.
    """

    def __init__(
        self, *, layers: int = 4, width: int = 64, hidden: int = 256, transposed: bool = False
    ) -> None:
        super().__init__()
        self.stem = nn.Linear(32, width)
        self.blocks = nn.ModuleList(
            ResidualMLPBlock(width, hidden, transposed=transposed) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 16)

    def forward(self, features: Tensor) -> Tensor:
        x = self.stem(features)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class ReZeroBlock(nn.Module):
    """ReZero: x + alpha f(x), with alpha zero at the start; `on_shortcut` multiplies x in place of
    f(x).
    """

    def __init__(self, width: int, heads: int, on_shortcut: bool) -> None:
        super().__init__()
        self.on_shortcut = on_shortcut
        self.attn = ViTAttention(width, heads)
        self.mlp = ViTFeedForward(width)
        self.alpha_attn = nn.Parameter(torch.zeros(1))
        self.alpha_mlp = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.on_shortcut:
            x = self.alpha_attn * x + self.attn(x)
            return self.alpha_mlp * x + self.mlp(x)
        x = x + self.alpha_attn * self.attn(x)
        return x + self.alpha_mlp * self.mlp(x)


class ReZero(nn.Module):
    """Encoder of tokens without norms."""

    def __init__(
        self,
        *,
        layers: int = 4,
        width: int = 64,
        heads: int = 4,
        vocabulary: int = 256,
        on_shortcut: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(ReZeroBlock(width, heads, on_shortcut) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


# -- adapters ----------
class LoRALinear(nn.Module):
    """A linear layer and a low-rank addition to it."""

    def __init__(self, base: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * F.linear(F.linear(x, self.lora_A), self.lora_B)
