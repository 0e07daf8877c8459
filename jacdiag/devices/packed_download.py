"""Read several tensors of an accelerator in one copy, so that the host waits once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jacdiag.devices.accelerators import widest


def download(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors on the CPU, in their shapes and types.

    Tensors of the CPU are returned as they are. Those of an accelerator come in one copy, as
    numbers of its widest type. Integers that are longer than its digits come on their own.

    Args:
        tensors: real numbers, integers or flags, each on any device.

    Returns:
        As many tensors, in their order.

    Example:
        >>> flag, numbers = download([torch.tensor(True), torch.arange(3)])
        >>> bool(flag), numbers.tolist()
        (True, [0, 1, 2])
    """
    # 1. Those that can travel together, by device.
    arrived = list(tensors)
    together: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors):
        if tensor.device.type == "cpu":
            continue
        if _fits(tensor.dtype, widest(tensor.device)):
            together.setdefault(tensor.device, []).append(place)
        else:
            arrived[place] = tensor.cpu()

    # 2. One copy for each device.
    for device, places in together.items():
        flat = [tensors[place].detach().reshape(-1).to(widest(device)) for place in places]
        parts = torch.cat(flat).cpu().split([len(part) for part in flat])
        for place, part in zip(places, parts, strict=True):
            tensor = tensors[place]
            arrived[place] = part.reshape(tensor.shape).to(tensor.dtype)
    return arrived


def _fits(dtype: torch.dtype, wide: torch.dtype) -> bool:
    """Return whether a wide type holds every number of a type.

    Indices in int64 are taken to be below 2^53.
    """
    if dtype.is_floating_point or dtype in (torch.bool, torch.uint8, torch.int8, torch.int16):
        return True
    return wide == torch.float64 and not dtype.is_complex
