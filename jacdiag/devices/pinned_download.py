"""Copies from a device to the host, which the host waits for when it reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Download:
    """A tensor on its way to the host.

    The copy goes to pinned memory and does not block. `read` waits for this copy alone, and not for
    what the device was given to do since. A device without streams, or memory that cannot be
    pinned, is waited for at once.

    Args:
        tensor: on any device. On a CPU there is nothing to copy.

    Attributes:
        waits: whether the host has to wait for a device.

    Example:
        >>> Download(torch.ones(2)).read()
        tensor([1., 1.])
    """

    def __init__(self, tensor: Tensor) -> None:
        """Begin the copy; see the class for the arguments."""
        self._event: Any = None
        self.waits = tensor.device.type != "cpu"
        self._host = tensor
        if not self.waits:
            return
        try:
            stream = torch.get_device_module(tensor.device).current_stream(tensor.device)
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = stream.record_event()
        except (AttributeError, NotImplementedError, RuntimeError):
            self._event = None
            self._host = tensor.to("cpu")

    def read(self) -> Tensor:
        """Return the tensor on the host."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._host
