"""A model of two streams: that of an encoder ends where the products of the decoder read it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import jacdiag
from jacdiag.sources.factory import seeded


class EncoderDecoder(nn.Module):
    """An encoder and a decoder of torch on the same tokens, with or without final norms."""

    def __init__(self, *, norm_first: bool, final_norms: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.stacks = nn.Transformer(
            16, 2, 2, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first
        )
        if not final_norms:
            self.stacks.encoder.norm = None
            self.stacks.decoder.norm = None
        self.head = nn.Linear(16, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        logits: Tensor = self.head(self.stacks(x, x))
        return logits


def build(norm_first: bool, final_norms: bool) -> EncoderDecoder:
    with seeded(0):
        return EncoderDecoder(norm_first=norm_first, final_norms=final_norms).double().eval()


IDS = torch.arange(16).reshape(2, 8) % 32


@pytest.mark.parametrize("final_norms", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_every_sub_layer_of_both_stacks_is_measured(norm_first: bool, final_norms: bool) -> None:
    model = build(norm_first, final_norms)
    report = jacdiag.audit(model, IDS, dtype="float64", state="init", remedies="none")
    assert len(report.sublayers) == 10
    assert [row.name for row in report.sublayers if row.branch_norm is None] == []


def test_the_last_sum_of_the_encoder_ends_with_its_own_norm() -> None:
    """All its paths join again in the decoder, which is no part of its residual map."""
    model = build(norm_first=False, final_norms=False)
    report = jacdiag.audit(model, IDS, dtype="float64", state="init", remedies="none")
    [row] = [row for row in report.sublayers if row.name == "stacks.encoder.layers.1"]
    [site] = [site for site in jacdiag.sites(model, IDS) if site.name == row.name]

    # The map of each token, by hand.
    layer = model.stacks.encoder.layers[1]
    norms = []
    for token in site.shortcut.double().reshape(-1, 16):
        jacobian = torch.autograd.functional.jacobian(
            lambda x: layer.norm2(x + layer.linear2(layer.activation(layer.linear1(x)))), token
        )
        norms.append(float(torch.linalg.matrix_norm(jacobian, 2)))
    assert row.residual_norm is not None
    assert row.residual_norm.lower <= max(norms) * (1 + 1e-6)
    assert max(norms) <= row.residual_norm.upper
