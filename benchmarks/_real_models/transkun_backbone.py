"""The transformer of Transkun from the classes of its package, probed with a short spectrogram."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def build() -> nn.Module:
    """Build the backbone with the sizes of the package's own configuration file."""
    from transkun.LayersTransformer import Backbone

    return Backbone(
        inputSize=6,
        baseSize=64,
        posEmbedInitGamma=1,
        nHead=8,
        fourierSize=64,
        hiddenFactor=4,
        hiddenFactorAttn=1,
        expansionFactor=4,
        nLayers=6,
        enabledAttn=["F", "T"],
        useGradientCheckpoint=False,
        downsampleF=True,
    )


def inputs() -> dict[str, Any]:
    """Describe a few frames of a falling tone, and two pitches to transcribe."""
    frames, bands, channels = 8, 8, 6
    band = torch.arange(bands).view(1, 1, bands, 1)
    frame = torch.arange(frames).view(1, frames, 1, 1)
    distance = (band - (bands - 1 - frame)).abs()
    spectrogram = (-distance.float()).exp().expand(1, frames, bands, channels).contiguous()
    return {"x": spectrogram, "outputIndices": torch.tensor([60, 72])}
