"""Correct inits with computed tables, adapters and factors: rotary scalings, ALiBi, Mamba-2,
LoRA.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from benchmarks.initbench.bugs_gains import adapted_gpt
from benchmarks.initbench.bugs_memory import plain_llama
from benchmarks.initbench.bugs_tables import (
    Controlled,
    Mamba2,
    MovingResNet,
    TableDecoder,
    slopes_of,
)
from benchmarks.initbench.catalogue import images, recipe
from benchmarks.initbench.draws import draw, normal, zeros

HEAD = 16  # width of a head of the Llama of these cases


def frequencies(base: float = 10000.0) -> Tensor:
    """Return the inverse frequencies of one head."""
    return base ** (-torch.arange(0, HEAD, 2).float() / HEAD)


def llama_with(inv_freq: Tensor) -> nn.Module:
    """Return a Llama with these inverse frequencies."""
    model = plain_llama()
    model.rotary.inv_freq.copy_(inv_freq)
    return model


# -- rotary positions ----------
@recipe()
def rotary_linear_scaling() -> nn.Module:
    return llama_with(frequencies() / 4)


@recipe()
def rotary_llama3_scaling() -> nn.Module:
    factor, low, high, length = 8.0, 1.0, 4.0, 8192
    plain = frequencies(500000.0)
    waves = 2 * math.pi / plain
    smooth = ((length / waves) - low) / (high - low)
    blended = (1 - smooth) * plain / factor + smooth * plain
    scaled = torch.where(waves > length / low, plain / factor, blended)
    return llama_with(torch.where(waves < length / high, plain, scaled))


@recipe()
def rotary_yarn_scaling() -> nn.Module:
    factor, length, base = 4.0, 4096, 10000.0
    plain = frequencies(base)

    def place(rotations: float) -> float:
        return HEAD * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = math.floor(place(32)), math.ceil(place(1))
    ramp = ((torch.arange(HEAD // 2).float() - low) / (high - low)).clamp(0, 1)
    return llama_with(plain / factor * ramp + plain * (1 - ramp))


@recipe()
def rotary_longrope_scaling() -> nn.Module:
    factors = torch.tensor([1.0, 1.05, 1.1, 1.4, 2.2, 4.1, 12.5, 30.0])
    return llama_with(frequencies() / factors)


@recipe()
def alibi_with_eight_heads() -> nn.Module:
    model = TableDecoder("alibi", heads=8)
    assert torch.equal(model.alibi_slopes, slopes_of(8))
    return model


# -- others ----------
@recipe()
def mamba2() -> nn.Module:
    return Mamba2()


@recipe()
def loralib_embedding_factors() -> nn.Module:
    model = adapted_gpt()
    draw(model, ("lora_A", zeros), ("lora_B", normal(1.0)))
    return model


@recipe()
def controlnet_zero_projections() -> nn.Module:
    model = Controlled()
    draw(model, (r"zero_proj", zeros))
    return model


@recipe(probe=images(8))
def batch_norm_by_hand() -> nn.Module:
    return MovingResNet()
