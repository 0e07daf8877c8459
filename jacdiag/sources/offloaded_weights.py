"""Weights that accelerate keeps on the CPU or on disk, and brings in for each call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OffloadedWeight:
    """A weight that is not where the model uses it.

    Attributes:
        name: in the store.
        store: name -> weight, on the CPU or on disk.
        device: where the model uses it.
    """

    name: str
    store: Mapping[str, Tensor]
    device: torch.device

    def read(self) -> Tensor:
        """Return the weight on the device where it is used."""
        return self.store[self.name].to(self.device)


def placeholders_of(model: nn.Module) -> dict[int, OffloadedWeight]:
    """Return the weights that a model has placeholders for, by the id of the placeholder.

    Args:
        model: any module, with hooks of accelerate or without.
    """
    weights: dict[int, OffloadedWeight] = {}
    for module in model.modules():
        for placeholder, weight in _offloaded(module):
            weights[id(placeholder)] = weight
    return weights


def moves_weights(module: nn.Module) -> bool:
    """Return whether accelerate's hook brings a module's weights in for each call.

    A copy has them in place anyway.
    """
    return any(_offloads(hook) for hook in _hooks_of_accelerate(module))


def _offloaded(module: nn.Module) -> Iterator[tuple[Tensor, OffloadedWeight]]:
    """Yield the placeholders of a module's own weights, each with the weight."""
    # 1. The tensors of the module itself.
    named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]

    # 2. The hooks of accelerate that keep weights.
    for hook in _hooks_of_accelerate(module):
        keeps_weights = _offloads(hook) and getattr(hook, "weights_map", None) is not None
        if not keeps_weights:
            continue

        # 3. A placeholder lies on the meta device.
        device = torch.empty(0, device=hook.execution_device).device
        for name, tensor in named:
            if tensor.is_meta:
                yield tensor, OffloadedWeight(name, hook.weights_map, device)


def _hooks_of_accelerate(module: nn.Module) -> Iterator[Any]:
    """Yield accelerate's hooks on a module, one by one where it has put several in sequence."""
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        return
    yield from getattr(hook, "hooks", [hook])


def _offloads(hook: Any) -> bool:
    """Return whether a hook of accelerate brings weights in for each call."""
    return bool(getattr(hook, "offload", False))
