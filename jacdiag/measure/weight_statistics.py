"""Measure weights without a forward: the std and norm of each matrix, and the paper's bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from jacdiag.devices.packed_download import download
from jacdiag.errors import UsageError
from jacdiag.measure.moments import std_of
from jacdiag.records.report import WeightStats
from jacdiag.sources import gpt
from jacdiag.spectra import DenseOperator, Question, in_step
from jacdiag.trace.execution.tensors import finite_flag

_NORM_WIDTH = 1e-3


def bound_ffn(s1: float, s2: float, sigma: float, d: int, d_ffn: int) -> float:
    """Eq. 15: |dy/dx'| <= 1 + s1 s2 / sigma C_ffn, C_ffn = (sqrt(d) + sqrt(d_ffn))^2.

    Args:
        s1: std of W_1.
        s2: std of W_2.
        sigma: std of the shortcut.
        d: width of the stream.
        d_ffn: width of the hidden layer.

    Example:
        >>> round(bound_ffn(0.02, 0.02, 1.0, 1024, 4096), 3)
        4.686
    """
    return 1 + s1 * s2 / sigma * (math.sqrt(d) + math.sqrt(d_ffn)) ** 2


def bound_attention(s_o: float, sigma: float, d: int, jz: float) -> float:
    """Eq. 20: |dx'/dx| <= 1 + s_O / sigma C_attn, C_attn = 2 sqrt(d) |J^Z|.

    Args:
        s_o: std of W_O.
        sigma: std of the shortcut.
        d: width.
        jz: spectral norm of the Jacobian of the concatenated heads, measured.
    """
    return 1 + s_o / sigma * 2 * math.sqrt(d) * jz


def initial_bound(recipe: str, n_layer: int, n_embd: int) -> float:
    """Return Eq. 15 at the first FFN of a recipe of the paper.

    The attention's contribution to sigma_x' is left out.

    Args:
        recipe: a name of `jacdiag.sources.gpt.RECIPES`.
        n_layer: number of layers.
        n_embd: width of the stream; d_ffn is four times that.

    Raises:
        UsageError: unknown recipe.

    Example:
        >>> round(initial_bound("vanilla", 24, 1024), 1)
        27.3
        >>> round(initial_bound("scaled-embed", 24, 1024), 2)
        1.82
    """
    if recipe not in gpt.RECIPES:
        raise UsageError("unknown recipe", got=recipe, hint=f"one of {', '.join(gpt.RECIPES)}")

    config = gpt.config_of({"n_layer": n_layer, "n_embd": n_embd, "n_head": 1})
    std_by_recipe, change = gpt.RECIPES[recipe].std, gpt.RECIPES[recipe].change(config)

    def std(name: str, *shape: int) -> float:
        return std_by_recipe(name, torch.empty(shape, device="meta"), config)

    # 1. The std of the first shortcut: that of the embedding, unless a norm follows it.
    if change.get("embed_norm"):
        sigma = 1.0
    else:
        sigma = std("transformer.wte.weight", config.vocab_size, n_embd)
        sigma *= float(change.get("embed_scale", 1.0))

    # 2. The bound of the first FFN.
    s1 = std("transformer.h.0.mlp.c_fc.weight", 4 * n_embd, n_embd)
    s2 = std("transformer.h.0.mlp.c_proj.weight", n_embd, 4 * n_embd)
    return bound_ffn(s1, s2, sigma, n_embd, 4 * n_embd)


def weight_stats(
    name: str, tensor: Tensor, seed: int = 0, norm: bool = True, std: float | None = None
) -> WeightStats | None:
    """Return the std and spectral norm of a weight matrix.

    The norm is computed in float32 where the matrix is stored in a lower precision.

    Args:
        name: for the record.
        tensor: (m, n), or (E, m, n) for stacked experts, whose largest norm is given. `norm` is the
            upper end of an interval of 0.1%, so that a product of norms bounds. Tensors of other
            shapes get a std only.
        seed: of the solver's random start.
        norm: whether the spectral norm is wanted: it costs some hundred products with the matrix.
        std: where it is known already.

    Returns:
        None for a vector or a tensor without memory.

    Example:
        >>> stats = weight_stats("weight", 2 * torch.eye(4))
        >>> round(stats.std, 3), round(stats.norm, 2)
        (0.866, 2.0)
    """
    stds = {} if std is None else {name: std}
    return all_weight_stats({name: tensor}, stds, seed, norm)[name]


def all_weight_stats(
    weights: Mapping[str, Tensor], stds: Mapping[str, float], seed: int = 0, norm: bool = True
) -> dict[str, WeightStats | None]:
    """Return what `weight_stats` returns for each of several weights.

    On an accelerator norms are solved in step, so that it is waited for once for all of them.

    Args:
        weights: by name.
        stds: those that are known already, by name.
        seed: of the solver's random starts.
        norm: whether spectral norms are wanted.
    """
    figures: dict[str, WeightStats | None] = {}
    matrices: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        # 1. A vector has no figures, nor has a tensor without memory.
        has_values = tensor.is_floating_point() and not tensor.is_meta
        if tensor.dim() < 2 or not has_values:
            figures[name] = None
            continue

        # 2. The std.
        matrix = tensor.detach()
        std = stds.get(name)
        if std is None and matrix.numel():
            std = std_of(matrix)
        figures[name] = WeightStats(name, list(tensor.shape), _if_finite(std))
        # A kernel is no matrix of its own.
        if norm and tensor.dim() <= 3 and tensor.numel():
            matrices[name] = matrix

    # 3. The norms of those that are finite.
    flags = download([finite_flag(matrix) for matrix in matrices.values()])
    for name, is_finite in zip(list(matrices), flags, strict=True):
        if not is_finite:
            del matrices[name]
    for name, size in _norms_of(matrices, seed).items():
        with_std = figures[name]
        assert with_std is not None
        figures[name] = replace(with_std, norm=size)
    return figures


def _norms_of(matrices: Mapping[str, Tensor], seed: int) -> dict[str, float]:
    """Return the upper end of the spectral norm of each matrix, in float32 at least."""
    # 1. One problem for each.
    questions: dict[str, Question] = {}
    for name, matrix in matrices.items():
        if matrix.dtype not in (torch.float32, torch.float64):
            matrix = matrix.float()
        questions[name] = Question(DenseOperator(matrix), torch.Generator().manual_seed(seed))

    # 2. In step an accelerator is waited for once for all. A CPU keeps one matrix in its cache.
    on_cpu = all(question.operator.device.type == "cpu" for question in questions.values())
    groups = [list(questions)]
    if on_cpu:
        groups = [[name] for name in questions]

    # 3. Solve them.
    norms = {}
    for group in groups:
        together = [questions[name] for name in group]
        solutions = in_step(together, tol=_NORM_WIDTH, max_products=400)
        for name, solution in zip(group, solutions, strict=True):
            norms[name] = float(solution.upper.max())
    return norms


def _if_finite(std: float | None) -> float | None:
    """Return a std; None if it is not finite."""
    if std is None or not math.isfinite(std):
        return None

    return std
