"""What was looked at: the model's sizes, and which of its parameters lie in a sub-layer."""

from __future__ import annotations

from torch import nn

from jacdiag.records.report import ModelRecord
from jacdiag.records.structure import MissingShortcutRecord
from jacdiag.trace import Sites


def model_record(model: nn.Module, sites: Sites) -> ModelRecord:
    """Return the record of a traced model; no weight is read for it.

    Example:
        >>> import torch, jacdiag
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)
        >>> record = model_record(layer, jacdiag.sites(layer, torch.randn(2, 4, 8)))
        >>> record.layers, record.width, record.parameters == record.covered_parameters
        (1, 8, True)
    """
    sizes = {name: outline.numel() for name, outline in sites.skeleton.outlines.items()}
    covered = sites.coverage.covered()
    return ModelRecord(
        name=type(model).__name__,
        parameters=sum(sizes.values()),
        layers=sites.layers,
        width=int(sites[0].shortcut.shape[sites[0].feature_dim]),
        covered_parameters=sum(size for name, size in sizes.items() if name in covered),
        uncovered=list(sites.coverage.uncovered),
        uncovered_reasons=sites.coverage.uncovered,
        left_out=[str(item) for item in sites.left_out],
        missing_shortcuts=[
            MissingShortcutRecord(missing.part, missing.like, list(missing.parameters))
            for missing in sites.missing_shortcuts
        ],
    )
