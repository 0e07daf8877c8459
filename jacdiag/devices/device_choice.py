"""Where products run: the device that is requested, or the best one of this machine."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from jacdiag.devices.accelerators import count_of, has_float64, present_kinds, present_names
from jacdiag.errors import UsageError


def pick(wanted: str | torch.device | None) -> torch.device:
    """Return the device of that name, or the best one if none is named.

    The best one is the accelerator of this machine. It is the CPU if there is no accelerator or the
    accelerator has no float64: intervals are narrower with it.

    Args:
        wanted: as torch names devices.

    Raises:
        UsageError: no device of that name, or it is not there.

    Example:
        >>> pick("cpu")
        device(type='cpu')
    """
    # 1. A name.
    if wanted is None:
        return _best()
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UsageError(
            "no such device", got=_asked(wanted), hint="one of those, such as --device cpu"
        ) from error

    # 2. A device that is there. There is always a CPU.
    if device.type == "cpu":
        return device
    count = count_of(device.type)
    if not count:
        raise UsageError(
            f"{device.type.upper()} was asked for and is not there",
            got=_asked(wanted),
            hint="--device cpu",
        )

    # 3. One of several, which count from 0.
    if device.index is not None and device.index >= count:
        last = f"{device.type}:{count - 1}"
        raise UsageError(f"there is no {device}", got=_asked(wanted), hint=f"--device {last}")
    return device


def check_precision(
    device: torch.device, dtype: torch.dtype | None, tensors: Iterable[Tensor] = ()
) -> None:
    """Raise if float64 is needed on a device that has none.

    Args:
        device: where the model runs.
        dtype: precision of the run; None if it is not chosen.
        tensors: weights that are there or are moved there.

    Raises:
        UsageError: the run or a weight is in float64, and the device has none.

    Example:
        >>> check_precision(torch.device("cpu"), torch.float64)
    """
    # 1. Most devices have float64.
    if has_float64(device):
        return

    # 2. This one has none.
    event = f"{device.type.upper()} has no float64"
    if dtype is torch.float64:
        got = f"--device {device} with --dtype float64"
        raise UsageError(event, got=got, hint="--dtype float32, or --device cpu")
    if any(tensor.dtype is torch.float64 for tensor in tensors):
        got = f"a model with float64 weights on --device {device}"
        raise UsageError(event, got=got, hint="--device cpu, or model.float()")


def _best() -> torch.device:
    """Return the accelerator of this machine if it has float64, else the CPU."""
    for kind in present_kinds():
        if has_float64(torch.device(kind)):
            return torch.device(kind)
    return torch.device("cpu")


def _asked(wanted: str | torch.device) -> str:
    """Return what was requested, and what there is."""
    return f"--device {wanted}; this machine has {', '.join(present_names())}"
