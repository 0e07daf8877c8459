"""Variance, largest activation and cosine between tokens of the stream, compared with plain
loops.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from measure import flow_models as models
from torch import Tensor

import jacdiag
from jacdiag.measure import stream_statistics as forward
from jacdiag.measure.stream_statistics import forward_record, peak, token_cosines, variances


def token_cosine(x: Tensor, feature_dim: int) -> float | None:
    cosines = token_cosines([("x", x, feature_dim)])
    return None if cosines is None else cosines[0]


def test_a_model_by_hand() -> None:
    model, ids = models.decoder(), models.ids()
    record = forward_record(jacdiag.sites(model, ids), ids)
    x = model.wte(ids)
    points = [x]
    for block in model.h:
        x = x + block.attn(block.norm1(x))
        points.append(x)
        x = x + block.mlp(block.norm2(x))
        points.append(x)
    assert (
        record.points[0] == "h.0.attn"
        and record.points[-1] == "end"
        and len(record.points) == len(points)
    )
    assert (
        record.variance is not None and record.peaks is not None and record.token_cosine is not None
    )
    for k, point in enumerate(points):
        by_token = [
            float(token.var(correction=0)) for token in point.detach().double().flatten(0, 1)
        ]
        assert record.variance[k] == pytest.approx(sum(by_token) / len(by_token), rel=1e-5)
        assert record.peaks[k].value == pytest.approx(float(point.detach().abs().max()), rel=1e-6)


def test_the_cosine_is_the_mean_over_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)) + 0.5
    pairs = itertools.combinations(x.double().flatten(0, 1), 2)
    cosines = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs]
    wanted = sum(cosines) / len(cosines)
    assert token_cosine(x, -1) == pytest.approx(wanted, rel=1e-9)
    assert token_cosine(x.movedim(-1, 1), 1) == pytest.approx(wanted, rel=1e-9)
    monkeypatch.setattr(forward, "_ROWS", 3)
    assert token_cosine(x, -1) == pytest.approx(wanted, rel=1e-9)


def test_the_same_vector_everywhere_has_cosine_one_and_one_token_has_none() -> None:
    assert token_cosine(torch.ones(2, 4, 3), -1) == pytest.approx(1)
    assert token_cosine(torch.ones(1, 1, 3), -1) is None
    assert token_cosine(torch.zeros(2, 4, 3), -1) is None


def test_a_peak_names_its_token_and_its_feature() -> None:
    x = torch.full((2, 3, 4), 0.5)
    x[1, 2, 3] = -900.0
    found = peak(x, -1, torch.arange(6).view(2, 3))
    assert (found.value, found.median, found.feature) == (900.0, 0.5, 3)
    assert (found.sequence, found.position, found.token) == (1, 2, 5)


def test_variance_in_another_dimension() -> None:
    x = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))
    wanted = float(x.double().var(1, correction=0).mean())
    assert variances([("x", x, 1)]) == pytest.approx([wanted], rel=1e-12)


def test_a_stream_with_nan_has_a_reason_in_place_of_figures() -> None:
    class Broken(models.Decoder):
        def between(self, x: torch.Tensor, index: int) -> torch.Tensor:
            return x * float("nan") if index == 1 else x

    report = jacdiag.audit(models.decoder(Broken), models.ids(), decide=True)
    assert report.network is not None and report.network.forward is not None
    assert (
        report.network.forward.variance is None
        and "NaN" in report.network.forward.notes["variance"]
    )
    status = {rule.code: rule.status for rule in report.rules}
    assert status["JD301"] == status["JD302"] == status["JD305"] == "not-applicable"
