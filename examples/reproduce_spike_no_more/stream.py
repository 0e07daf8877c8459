"""How the residual stream's std grows with depth, from the weights' std and sizes alone: sigma_x'
of Eq. 15.

Mean field: weights are independent normals, so that after every sub-layer the stream is described
by two numbers, the variance q of a feature and the covariance c of that feature between two tokens.

    FFN        q += d_ffn s_2^2 E[phi(h)^2],  c += d_ffn s_2^2 E[phi(h) phi(h')],  h and h' normal,
               of variance d s_1^2 and correlation c / q
    attention  q += d s_O^2 d s_V^2 (p + (1 - p) c / q),  p = exp(v) / t the chance that two draws
               from one softmax over t tokens meet, v the variance of its logits; the covariance of
               two tokens likewise, with p = 1 / t
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import erf

from jacdiag.measure.weight_statistics import bound_ffn
from jacdiag.sources import gpt

_NODES = 24


@dataclass(frozen=True)
class Depth:
    """One layer: the std that its attention (x) and its FFN (x') read, and Eq. 15 for the FFN."""

    sigma: float
    sigma_ffn: float
    bound: float


def closed_form(recipe: str, config: gpt.GPTConfig, length: int) -> list[Depth]:
    """Eq. 15 for every layer at the token in the middle of a sequence of `length` random tokens.

    Args:
        recipe: a name of `jacdiag.sources.gpt.RECIPES`.
        config: sizes; what the recipe does to the embedding is put in here.

    Example:
        >>> sizes = gpt.config_of({"n_layer": 24, "n_embd": 2304, "n_head": 24})
        >>> round(closed_form("embed-ln", sizes, 2048)[0].bound, 2)
        1.52
    """
    stds, change = gpt.RECIPES[recipe].std, gpt.RECIPES[recipe].change(config)
    config, d = replace(config, **change), config.n_embd

    def std(name: str, *shape: int) -> float:
        return stds(name, torch.empty(shape, device="meta"), config)

    s_qkv = std("transformer.h.0.attn.c_attn.weight", 3 * d, d)
    s_o = std("transformer.h.0.attn.c_proj.weight", d, d)
    s_1 = std("transformer.h.0.mlp.c_fc.weight", 4 * d, d)
    s_2 = std("transformer.h.0.mlp.c_proj.weight", d, 4 * d)
    embedding = std("transformer.wte.weight", config.vocab_size, d)
    positions = std("transformer.wpe.weight", config.block_size, d)
    q, c = (
        (1.0, 0.0)
        if config.embed_norm
        else ((embedding * config.embed_scale) ** 2 + positions**2, 0.0)
    )
    found, seen, hidden = [], (length + 1) / 2, d * s_1**2
    for _ in range(config.n_layer):
        sigma, rho = math.sqrt(q), c / q
        value = d * s_o**2 * d * s_qkv**2
        meet = min(1.0, math.exp((d * s_qkv**2) ** 2 * (1 - rho)) / seen)
        q, c = q + value * (meet + (1 - meet) * rho), c + value * (1 / seen + (1 - 1 / seen) * rho)
        found.append(Depth(sigma, math.sqrt(q), bound_ffn(s_1, s_2, math.sqrt(q), d, 4 * d)))
        rho = c / q
        q, c = (old + 4 * d * s_2**2 * moment(gelu, hidden, r) for old, r in ((q, 1.0), (c, rho)))
    return found


def moment(
    phi: Callable[[NDArray[np.float64]], NDArray[np.float64]], variance: float, rho: float
) -> float:
    """E[phi(h) phi(h')] for two normals of one variance and correlation rho.

    Example:
        >>> round(moment(lambda h: h, 0.4, 0.5), 6)
        0.2
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    a, b = np.meshgrid(nodes, nodes, indexing="ij")
    scale = math.sqrt(variance)
    other = rho * a + math.sqrt(max(0.0, 1 - rho**2)) * b
    joint = np.outer(weights, weights) / (2 * math.pi)
    return float((joint * phi(scale * a) * phi(scale * other)).sum())


def gelu(h: NDArray[np.float64]) -> NDArray[np.float64]:
    made: NDArray[np.float64] = 0.5 * h * (1 + erf(h / math.sqrt(2)))
    return made
