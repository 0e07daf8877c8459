"""Is this model freshly initialised or trained? Gains, biases and the shape of the weights' distribution tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

_SAMPLE = 1 << 16


def detect_state(
    parameters: Mapping[str, Tensor], matrices: Iterable[str], outlines: Mapping[str, Tensor] | None = None
) -> Literal["init", "trained"]:
    """Tells an initial state from a trained one.

    An initial state has every gain exactly constant, every bias exactly 0 (or drawn from a uniform distribution, as
    PyTorch's own layers do), and matrices that are normal, truncated normal, uniform or constant. A single vector that
    is none of these means training.

    Args:
        parameters: name -> tensor, all parameters.
        matrices: names of the weight matrices of sub-layers.
        outlines: the same parameters by shape alone, where each look at one reads it from a file.
    """
    shapes = parameters if outlines is None else outlines
    vectors = [parameters[name] for name, t in shapes.items() if t.dim() <= 1 and t.numel() > 1]
    if any(not (_constant(t) or _uniform(t)) for t in vectors):
        return "trained"
    names = [name for name in matrices if shapes[name].dim() >= 2]
    if names and not any(_known_family(parameters[name]) for name in names):
        return "trained"
    if not vectors and names and sum(map(_known_family, (parameters[n] for n in names))) < 0.9 * len(names):
        return "trained"
    return "init"


def _constant(t: Tensor) -> bool:
    return bool((t == t.flatten()[0]).all())


def _uniform(t: Tensor) -> bool:
    """Zero-centred and flat: kurtosis of 1.8 within its sampling error (5 standard errors), bounded by sqrt(3) std."""
    t = t.detach().double().flatten()
    std = float(t.std())
    if not std > 0 or abs(float(t.mean())) > 5 * std / t.numel() ** 0.5:
        return False
    bounded = float(t.abs().max()) <= 1.75 * std * (1 + 5 / t.numel() ** 0.5)
    return bounded and abs(_kurtosis(t) - 1.8) < 5 * (0.8 / t.numel() ** 0.5) + 0.01


def _known_family(t: Tensor) -> bool:
    """Constant, uniform, or normal (truncated at 2 std or more): kurtosis between 2.2 and 3, within sampling error."""
    flat = t.detach().flatten()[:_SAMPLE].double()
    if _constant(flat) or _uniform(flat):
        return True
    error = 5 * (24 / flat.numel()) ** 0.5
    return 2.2 - error <= _kurtosis(flat) <= 3 + error


def _kurtosis(t: Tensor) -> float:
    centred = t - t.mean()
    variance = centred.square().mean()
    return float(centred.pow(4).mean() / variance.square().clamp_min(torch.finfo(torch.float64).tiny))
