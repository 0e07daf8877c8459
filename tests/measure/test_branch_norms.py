"""What one norm of a sub-layer inherits from another: ends that hold, for one product, taken where
they decide.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import jacdiag
from jacdiag.measure.branch_norms import NORMS, Effort, Solver
from jacdiag.measure.linearization import linearise
from jacdiag.measure.sublayer_norms import measure_group
from jacdiag.records import Interval
from jacdiag.sources import gpt
from jacdiag.sources.factory import seeded
from jacdiag.spectra import JacobianOperator, dense_norm
from jacdiag.trace import Sites


def traced(recipe: str) -> Sites:
    with seeded(0):
        model = (
            gpt.build(recipe, n_layer=2, n_head=2, n_embd=16, vocab_size=32, block_size=6)
            .double()
            .eval()
        )
        ids = torch.randint(32, (2, 6))
    return jacdiag.sites(model, ids, dtype=torch.float64)


def effort(points: dict[str, float], *, early: bool = True) -> Effort:
    """Rules that ask on which side of a point a norm lies; a norm without a point asks nothing."""

    def side(point: float | None) -> object:
        return lambda low, high: point is None or high <= point or low > point

    decided = {name: side(points.get(name)) for name in NORMS}
    return Effort(seed=1, decided=lambda site: decided, early=early)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("recipe", ["vanilla", "scaled-embed", "xavier"])
def test_inherited_ends_hold_the_dense_norms(recipe: str) -> None:
    taken = 0
    for site in traced(recipe):
        x = site.shortcut
        truths = {
            "branch": dense_norm(site.branch, x),
            "core": dense_norm(site.core, site.normalized),
            "residual": dense_norm(site.residual, x),
        }
        one = linearise(site)
        norms = Solver(
            one, effort({"core_norm": truths["core"] / 3, "branch_norm": truths["branch"] / 3})
        ).norms()
        one.release()
        for name, true in truths.items():
            interval = getattr(norms, name)
            assert isinstance(interval, Interval) and interval.lower <= true <= interval.upper, (
                site.name,
                name,
            )
            taken += "follows from another norm" in interval.stop
    assert taken >= 4, "the point of the test is that ends were inherited"


def test_ends_that_do_not_decide_are_not_taken() -> None:
    site = traced("vanilla")[0]
    true = dense_norm(site.branch, site.shortcut)
    one = linearise(site)
    norms = Solver(one, effort({"branch_norm": true * 1.02, "core_norm": 1e9})).norms()
    assert norms.branch is not None and "follows" not in norms.branch.stop
    assert norms.branch.upper <= true * 1.02, "solved until it lies on one side"
    assert norms.residual is not None and norms.residual.products == 1, (
        "no rule asks about the residual map"
    )


def test_without_early_every_norm_is_solved_to_its_width() -> None:
    site = traced("vanilla")[1]
    one = linearise(site)
    norms = Solver(one, effort({}, early=False)).norms()
    intervals = (norms.branch, norms.core, norms.residual)
    for interval in intervals:
        assert interval is not None and interval.converged and "follows" not in interval.stop
        assert interval.upper <= interval.lower * 1.05
    assert one.products == sum(i.products for i in intervals if i) - 2, "they share the first one"


def test_deciding_costs_a_fraction() -> None:
    with seeded(0):
        model = gpt.build(
            "scaled-embed", n_layer=3, n_head=2, n_embd=32, vocab_size=64, block_size=16
        )
        ids = torch.randint(64, (2, 16))
    full = jacdiag.audit(model, ids, state="init")
    short = jacdiag.audit(model, ids, state="init", decide=True)
    assert (short.verdict, short.conditions) == (full.verdict, full.conditions)
    assert short.cost is not None and full.cost is not None
    assert short.cost.products < full.cost.products / 3
    assert all(row.bound is None or row.kind == "mlp" for row in short.sublayers), (
        "Eq. 20 was not measured"
    )


class ParallelBranches(nn.Module):
    """Two branches that are added to one shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        return x + self.first(z).tanh() + self.second(z).relu()


def test_a_joint_residual_norm_is_solved_only_if_residual_norms_are_requested() -> None:
    torch.manual_seed(0)
    sites = jacdiag.sites(ParallelBranches(), torch.randn(2, 3, 8))
    for norms in (NORMS, NORMS - {"residual_norm"}):
        records = measure_group(list(sites), Effort(norms=norms), None, "init", lambda _names: {})
        assert len(records) == 2
        for record in records:
            has_residual = record.residual_norm is not None
            assert has_residual == ("residual_norm" in norms)
            assert (record.joint_residual_norm is not None) == has_residual


class TokenWise(nn.Module):
    """A branch that treats tokens one by one, after a norm: tanh of a matrix that is chosen."""

    def __init__(self, matrix: Tensor, *, centred: bool) -> None:
        super().__init__()
        width = len(matrix)
        self.norm: nn.Module = nn.LayerNorm(width)
        if not centred:
            self.norm = nn.RMSNorm(width)
        self.matrix = nn.Parameter(matrix)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.norm(x) @ self.matrix.T)


def to_width(model: nn.Module, x: Tensor, tol: float = 0.05) -> tuple[dict[str, Interval], Any]:
    """The norms of the only sub-layer to their width, and the sub-layer."""
    [site] = jacdiag.sites(model.double().eval(), x.double(), dtype=torch.float64)
    one = linearise(site)
    norms = Solver(one, Effort(tol=tol)).norms()
    one.release()
    assert norms.core is not None and norms.branch is not None and norms.residual is not None
    return {"core": norms.core, "branch": norms.branch, "residual": norms.residual}, site


def hold_the_truth(norms: dict[str, Interval], site: Any) -> None:
    truths = {
        "branch": dense_norm(site.branch, site.shortcut),
        "core": dense_norm(site.core, site.normalized),
        "residual": dense_norm(site.residual, site.shortcut),
    }
    for name, true in truths.items():
        assert norms[name].lower <= true <= norms[name].upper, name
        assert norms[name].converged and norms[name].upper <= norms[name].lower * 1.0501, name


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("spread", [1.0, 10.0])
def test_a_token_wise_branch_follows_from_its_core(centred: bool, spread: float) -> None:
    """Also where one token has a gain ten times as large, and not the largest core."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(192, 192, generator=generator) * 0.05
    x = torch.randn(1, 3, 192, generator=generator)
    x[0, 1] /= spread
    norms, site = to_width(TokenWise(matrix, centred=centred), x)
    hold_the_truth(norms, site)
    assert norms["branch"].products == 1
    assert "follows from another norm" in norms["branch"].stop


class WrittenOut(nn.Module):
    """A norm by hand, of the mean square or of the variance; eps stands in the root or after it."""

    def __init__(self, *, centred: bool, within: float, after: float) -> None:
        super().__init__()
        self.centred, self.within, self.after = centred, within, after
        self.weight = nn.Parameter(torch.ones(192))

    def forward(self, x: Tensor) -> Tensor:
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        root = torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.within)
        return self.weight * (x / (root + self.after))


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("within", "after"), [(1e-5, 0.0), (0.3, 0.0), (0.0, 0.3), (0.0, 1e-16)])
def test_a_norm_by_hand_has_the_closed_form_only_if_it_is_one(
    centred: bool, within: float, after: float
) -> None:
    """An eps after the root makes another Jacobian, along z, unless eps is tiny."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(192, 192, generator=generator) * 0.05
    model = TokenWise(matrix, centred=centred)
    model.norm = WrittenOut(centred=centred, within=within, after=after)
    norms, site = to_width(model, torch.randn(1, 3, 192, generator=generator))
    hold_the_truth(norms, site)
    one = linearise(site)
    assert (one.norm is not None) == (after != 0.3)
    assert ("follows" in norms["branch"].stop) == (one.norm is not None)
    one.release()


@pytest.mark.parametrize("direction", ["mean", "z"])
def test_a_norm_that_takes_off_what_the_core_would_enlarge(direction: str) -> None:
    """Then the branch is far smaller than gain times core, and is solved by itself."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 192, generator=generator)
    taken_off = torch.ones(192)
    if direction == "z":
        taken_off = x[0, 0] - x.mean()
    taken_off = taken_off / taken_off.norm()
    matrix = torch.randn(192, 192, generator=generator) * 0.002
    matrix += 0.2 * torch.outer(torch.randn(192, generator=generator) / 192**0.5, taken_off)
    norms, site = to_width(TokenWise(matrix, centred=True), x)
    hold_the_truth(norms, site)
    gain = 1 / float(x.std(correction=0))
    assert norms["branch"].upper < 0.8 * gain * norms["core"].lower
    assert "follows" not in norms["branch"].stop


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("level", [0.0, 3.0, 0.1])
def test_a_token_whose_features_are_all_the_same(centred: bool, level: float) -> None:
    """Its gain is 1 / sqrt(eps) after a LayerNorm: a padding row of zeros has the largest norm."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(192, 192, generator=generator) * 0.05
    x = torch.randn(1, 3, 192, generator=generator)
    x[0, 2] = level
    norms, site = to_width(TokenWise(matrix, centred=centred), x)
    hold_the_truth(norms, site)
    assert site.input_norm is not None
    gain = float(site.input_norm.gain[0, 2])
    deviation = 0.0 if centred else level
    # The default eps of RMSNorm is that of the type of the run.
    eps = 1e-5 if centred else torch.finfo(torch.float64).eps
    assert gain == pytest.approx((deviation**2 + eps) ** -0.5, rel=1e-6)


def test_narrow_branches_and_branches_that_mix_tokens_are_solved() -> None:
    generator = torch.Generator().manual_seed(0)
    narrow, _ = to_width(
        TokenWise(torch.randn(16, 16, generator=generator), centred=True),
        torch.randn(1, 3, 16, generator=generator),
    )
    attention = traced("vanilla")[0]
    assert attention.kind == "attention"
    mixing = Solver(linearise(attention), Effort()).norms()
    for interval in (narrow["branch"], mixing.branch):
        assert interval is not None and "follows" not in interval.stop


class CutOff(torch.autograd.Function):
    """Tanh with a backward that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (1 - x.tanh() ** 2)


class Parallel(nn.Module):
    """x + f(n1(x)) + g(n2(x)), whose second branch may be one that cannot be measured."""

    def __init__(self, second: Any) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.f, self.g = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(self.n1(x)).tanh() + self.second(self.g(self.n2(x)))


@pytest.mark.parametrize(("second", "is_measured"), [(torch.tanh, True), (CutOff.apply, False)])
def test_a_parallel_branch_that_cannot_be_measured_leaves_the_other(
    second: Any, is_measured: bool
) -> None:
    with seeded(0):
        report = jacdiag.audit(Parallel(second), torch.randn(2, 3, 8), state="init")
    first, other = report.sublayers
    assert first.branch_norm is not None and first.branch_norm.converged
    assert (other.branch_norm is not None) == is_measured
    assert (first.joint_residual_norm is not None) == is_measured
    if not is_measured:
        assert "once_differentiable" in other.notes["branch_norm"]

    # The condition counts the branches that it was judged at.
    judged = report.conditions.small_sublayers_judged
    assert judged is not None and judged.of == 2
    assert judged.not_judged.get("not measured", []) == [other.name] * (not is_measured)


def test_the_cost_of_a_report_is_what_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Core, branch, residual map and the check of the replay share their first product."""
    made: list[int] = []
    make = JacobianOperator._made
    monkeypatch.setattr(
        JacobianOperator,
        "_made",
        lambda self, way, vectors: (made.append(len(vectors)), make(self, way, vectors))[1],
    )
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True).eval()
    report = jacdiag.audit(layer, torch.randn(2, 4, 8), state="trained")
    assert report.cost is not None and report.network is not None
    assert report.cost.products == sum(made)

    # The norms of a sub-layer share one product, and its Jacobian takes one forward. A norm that is
    # inherited begins at the other's top vector.
    for row in report.sublayers:
        norms = [row.core_norm, row.branch_norm, row.residual_norm]
        solved = [norm for norm in norms if norm is not None and "follows" not in norm.stop]
        products = sum(norm.products for norm in norms if norm is not None)
        assert row.cost == products - (len(solved) - 1) + 1
