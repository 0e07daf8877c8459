"""The models of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jacdiag.sources import gpt
from jacdiag.sources.factory import seeded


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A GPT-2 of some size, and its batch.

    Attributes:
        name: in the table.
        layers, width, heads, vocabulary: of the model.
        batch, length: sequences and their tokens.
        dtype: of the weights.
        most_seconds: that its audit may take; None if nothing is demanded.
    """

    name: str
    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int
    length: int
    dtype: torch.dtype = torch.float32
    most_seconds: float | None = None

    @property
    def parameters(self) -> int:
        """About how many: 12 d^2 a layer, and one table that embeds and unembeds."""
        return 12 * self.layers * self.width**2 + self.vocabulary * self.width

    @property
    def bytes_to_audit(self) -> int:
        """About how many: the weights, one layer of them in float32, and what one run records."""
        weights = self.parameters * self.dtype.itemsize + 12 * self.width**2 * 4
        recorded = 40 * self.layers * self.batch * self.length * self.width * 4
        return weights + recorded

    @property
    def bytes_to_train(self) -> int:
        """About how many: weights, gradients, AdamW's two moments, and what one forward keeps."""
        kept = 40 * self.layers * self.batch * self.length * self.width * 4
        logits = 3 * self.batch * self.length * self.vocabulary * 4
        return 16 * self.parameters + kept + logits


GPT2 = Shape(
    name="GPT-2 124M",
    layers=12,
    width=768,
    heads=12,
    vocabulary=50304,
    batch=4,
    length=1024,
    most_seconds=10.0,
)
BILLION = Shape(name="1B", layers=20, width=2048, heads=16, vocabulary=50304, batch=4, length=1024)
SEVEN_BILLION = Shape(
    name="7B",
    layers=32,
    width=4096,
    heads=32,
    vocabulary=32000,
    batch=1,
    length=512,
    dtype=torch.bfloat16,
    most_seconds=60.0,
)
SMALL = Shape(name="small", layers=2, width=128, heads=2, vocabulary=512, batch=2, length=64)
TOY = Shape(name="toy", layers=1, width=16, heads=2, vocabulary=32, batch=2, length=8)


def build(shape: Shape, device: torch.device) -> tuple[Any, Tensor]:
    """Return an untrained model and token ids of a shape, both on a device.

    The weights are drawn on the device, which takes a large model a second there.
    """
    before = torch.get_default_dtype()
    with seeded(0), torch.device(device):
        torch.set_default_dtype(shape.dtype)
        try:
            model = gpt.build(
                "gpt2",
                n_layer=shape.layers,
                n_embd=shape.width,
                n_head=shape.heads,
                vocab_size=shape.vocabulary,
                block_size=shape.length,
                dropout=0.0,
            )
        finally:
            torch.set_default_dtype(before)
        ids = torch.randint(shape.vocabulary, (shape.batch, shape.length))
    return model.to(device).eval(), ids.to(device)
