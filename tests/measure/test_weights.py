"""Eq. 15 from std and sizes: the paper's three sizes and four recipes, and the tier that has
weights only.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from sources.rig import SIZES, save, weights

import jacdiag
from jacdiag.errors import UsageError
from jacdiag.measure.weight_statistics import bound_ffn, initial_bound, weight_stats
from jacdiag.sources import gpt
from jacdiag.sources.factory import seeded

SHAPES = {"350M": (24, 1024), "1.7B": (24, 2304), "13B": (40, 5120)}
GOLDEN = {  # Eq. 15 at the first FFN, to three digits
    "vanilla": (27.3, 40.4, 46.5),
    "scaled-embed": (1.82, 1.82, 1.64),
    "embed-ln": (1.52, 1.52, 1.40),
    "xavier": (183, 274, 408),
}


def by_hand(recipe: str, layers: int, d: int) -> float:
    """With d_ffn = 4 d: C = (1 + 2)^2 d = 9 d. N(0, 2 / 5 d) twice gives 3.6, Xavier's 2 / (d + 4
    d) once the same.
    """
    s = math.sqrt(0.4 / d)
    sigma = {"vanilla": s, "xavier": s, "scaled-embed": s * math.sqrt(d), "embed-ln": 1.0}[recipe]
    depth = 1.0 if recipe == "xavier" else math.sqrt(2 * layers)
    return 1 + 3.6 / (depth * sigma)


@pytest.mark.parametrize("recipe", list(GOLDEN))
@pytest.mark.parametrize("column", range(3), ids=list(SHAPES))
def test_initial_bound_equals_the_numbers_of_the_paper(recipe: str, column: int) -> None:
    layers, d = list(SHAPES.values())[column]
    found = initial_bound(recipe, layers, d)
    assert f"{found:.3g}" == f"{GOLDEN[recipe][column]:.3g}"
    assert found == pytest.approx(by_hand(recipe, layers, d), rel=1e-9)


def test_initial_bound_of_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown recipe"):
        initial_bound("magic", 2, 16)


def test_initial_bound_is_above_the_measured_norms() -> None:
    """Eq. 15 as it stands: 1 + |W_1| |W_2| / sigma, and Gaussian norms come near s (sqrt(m) +
    sqrt(n)).
    """
    generator = torch.Generator().manual_seed(0)
    one = 0.02 * torch.randn(256, 64, generator=generator)
    two = 0.02 * torch.randn(64, 256, generator=generator)
    norms = [float(torch.linalg.matrix_norm(w, 2)) for w in (one, two)]
    exact = 1 + norms[0] * norms[1] / 0.5
    assert exact <= bound_ffn(0.02, 0.02, 0.5, 64, 256) * 1.02
    assert exact == pytest.approx(bound_ffn(0.02, 0.02, 0.5, 64, 256), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_std_and_norm_of_a_matrix(dtype: torch.dtype) -> None:
    matrix = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)).to(dtype).t()
    found = weight_stats("w", matrix)
    assert found is not None and found.std is not None and found.norm is not None
    exact = matrix.double().numpy()
    assert found.std == pytest.approx(exact.std(), rel=1e-5)
    top = float(torch.linalg.matrix_norm(matrix.double(), 2))
    assert top * (1 - 1e-6) <= found.norm <= top * 1.002
    assert found.shape == [24, 40]


def test_what_has_no_norm() -> None:
    assert weight_stats("v", torch.ones(3)) is None
    assert weight_stats("i", torch.ones(3, 3, dtype=torch.long)) is None
    broken = weight_stats("n", torch.full((3, 3), math.nan))
    assert broken is not None and broken.std is None and broken.norm is None


# -- the weights-only tier -------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", ["vanilla", "xavier"])
def test_the_bound_from_the_weights_alone(tmp_path: Path, recipe: str) -> None:
    """At a size where the sampling error of every std is below 1%."""
    with seeded(1):
        model = gpt.build(recipe, n_layer=2, n_embd=128, n_head=2, vocab_size=512, block_size=8)
    report = jacdiag.audit(str(save(tmp_path / "w.pt", model.state_dict())))
    first, *others = [row for row in report.sublayers if row.kind == "mlp"]
    assert first.bound == pytest.approx(by_hand(recipe, 2, 128), rel=0.03)
    assert [row.bound for row in others] == [None] and "sigma_x'" in others[0].notes["bound"]


def test_weights_alone_are_never_reported_as_a_pass(tmp_path: Path) -> None:
    path = str(save(tmp_path / "w.pt", weights()))
    for profile in ("default", "paper"):
        report = jacdiag.audit(path, profile=profile)
        assert (report.tier, report.verdict) == ("weights", "unknown")
        conditions = report.conditions
        assert conditions.small_sublayers == conditions.large_shortcut == "unknown"
        assert conditions.small_sublayers_judged is conditions.large_shortcut_judged is None
        assert not [
            rule for rule in report.rules if rule.code.startswith("JD1") and rule.status == "clean"
        ]


def test_roles_std_and_norms(tmp_path: Path) -> None:
    state = weights()
    report = jacdiag.audit(str(save(tmp_path / "w.pt", state)))
    assert [(row.name, row.kind, row.depth) for row in report.sublayers] == [
        (f"transformer.h.{k}.{part}", kind, k)
        for k in range(2)
        for part, kind in (("attn", "attention"), ("mlp", "mlp"))
    ]
    assert [set(row.weights) for row in report.sublayers] == [{"W_QKV", "W_O"}, {"W_1", "W_2"}] * 2
    for row in report.sublayers:
        for stats in row.weights.values():
            matrix = state[stats.parameter].double()
            assert stats.std == pytest.approx(float(matrix.std(correction=0)), rel=1e-6)
            assert stats.norm == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=2e-3)
        assert row.branch_norm is None and row.core_norm is None and row.placement is None
    assert report.model.parameters == sum(t.numel() for t in state.values())
    assert report.model.width == SIZES["n_embd"] and report.model.layers == SIZES["n_layer"]


def test_a_trained_state_gets_no_bound(tmp_path: Path) -> None:
    report = jacdiag.audit(str(save(tmp_path / "w.pt", {"net": weights(), "step": 1200})))
    assert report.tier == "weights"
    assert report.state == "trained" and all(row.bound is None for row in report.sublayers)


def test_non_finite_weights_are_named(tmp_path: Path) -> None:
    state = weights()
    state["transformer.h.1.mlp.c_fc.weight"][0, 0] = math.inf
    report = jacdiag.audit(str(save(tmp_path / "w.pt", state)))
    (finding,) = [f for f in report.findings if f.level == "error"]
    assert finding.code == "JD906" and "transformer.h.1.mlp.c_fc.weight" in finding.what
    (row,) = [row for row in report.sublayers if row.name == "transformer.h.1.mlp"]
    assert row.weights["W_1"].norm is None
