"""How much memory a probe needs at its peak, and how much is free."""

from __future__ import annotations

import torch

from jacdiag.devices.accelerators import free_device_memory
from jacdiag.devices.host_memory import free_host_memory
from jacdiag.trace import Sites

# vectors of the right and the left basis of 16 products, each as large as the shortcut
_BASIS = 2 * 8
# tensors as large as the shortcut that the graphs of one branch keep (FFN 4 d wide, twice
# transposed)
_GRAPH = 60
_SCORES = 8  # tensors (B, heads, T, T) that those of an attention keep


def needed(sites: Sites, weights: int = 0) -> int:
    """Return an upper bound of the bytes that a probe takes at its peak.

    That is what was recorded, with the basis and the graphs of the largest sub-layer.

    Args:
        sites: the sub-layers.
        weights: bytes of those that are gathered for the probe.
    """
    recorded = 0
    largest = 0
    for site in sites:
        # 1. What was recorded stays.
        x = site.shortcut
        for tensor in (x, site.value):
            recorded += tensor.numel() * tensor.element_size()

        # 2. Sub-layers are measured one after the other, so that the largest counts.
        own = (_BASIS + _GRAPH) * x.numel() * x.element_size()

        # Attention also has a score for every pair of tokens in each head.
        if site.kind == "attention" and x.dim() == 3:
            heads = max(x.shape[-1] // 64, 1)
            own += _SCORES * x.shape[0] * heads * x.shape[1] ** 2 * x.element_size()
        largest = max(largest, own)
    return recorded + largest + weights


def available(device: torch.device) -> int | None:
    """Return the bytes that are free on a device; None if they cannot be read."""
    if device.type == "cpu":
        return free_host_memory()
    return free_device_memory(device)
