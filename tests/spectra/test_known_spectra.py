"""Operators with a chosen spectrum: the interval contains the truth, at every number of steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from jacdiag.spectra import (
    Aim,
    DenseOperator,
    Question,
    Solution,
    Stop,
    in_step,
    inherited,
    top_singular,
)
from jacdiag.spectra.golub_kahan import Bidiagonalisation, draw_start
from jacdiag.spectra.interval import (
    PAD,
    _sum_of_squares,
    are_upper_ends,
    bidiagonal,
    largest_ritz_values,
    ritz_values,
    upper_ends,
)

SPECTRA: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "uniform": lambda k, rng: np.sort(rng.uniform(0, 1, k))[::-1],
    "soft edge": lambda k, rng: 1 - (np.arange(k) / k) ** 1.5,
    "decaying": lambda k, rng: 0.7 ** np.arange(k),
    "slow decay": lambda k, rng: 1 / (1 + np.arange(k)),
    "clustered top": lambda k, rng: np.concatenate(
        [1 - 1e-6 * np.arange(min(5, k)), np.full(max(0, k - 5), 0.5)]
    ),
    "repeated top": lambda k, rng: np.concatenate(
        [np.ones(min(3, k)), rng.uniform(0, 0.9, max(0, k - 3))]
    ),
    "one outlier": lambda k, rng: np.concatenate([[10.0], rng.uniform(0, 1, k - 1)]),
    "rank 1": lambda k, rng: np.concatenate([[1.0], np.zeros(k - 1)]),
    "zero": lambda k, rng: np.zeros(k),
    "identity": lambda k, rng: np.ones(k),
    "tiny": lambda k, rng: 1e-12 * rng.uniform(0.1, 1, k),
    "huge": lambda k, rng: 1e12 * rng.uniform(0.1, 1, k),
}


def operator_with(
    spectrum: np.ndarray, m: int, n: int, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """A dense (m, n) matrix with these singular values, and its norm."""
    k = min(m, n)
    u, _ = np.linalg.qr(rng.standard_normal((m, k)))
    v, _ = np.linalg.qr(rng.standard_normal((n, k)))
    return (u * spectrum) @ v.T, float(spectrum.max(initial=0.0))


def begin(matrices: torch.Tensor, generator: torch.Generator) -> Bidiagonalisation:
    operator = DenseOperator(matrices)
    return Bidiagonalisation(operator, draw_start(operator, generator))


def random_operators(count: int, seed: int) -> list[tuple[str, np.ndarray, float]]:
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        name = list(SPECTRA)[i % len(SPECTRA)]
        m, n = (int(rng.integers(1, 120)) for _ in range(2))
        if i % 10 == 0:
            m = 1
        elif i % 10 == 5:
            n = 1
        matrix, norm = operator_with(SPECTRA[name](min(m, n), rng), m, n, rng)
        found.append((name, matrix, norm))
    return found


@pytest.mark.parametrize(
    ("count", "allowed"), [(300, 2), pytest.param(1000, 4, marks=pytest.mark.long)]
)
def test_interval_contains_the_truth(count: int, allowed: int) -> None:
    missed = []
    generator = torch.Generator().manual_seed(11)
    for name, matrix, norm in random_operators(count, seed=7):
        solution = top_singular(
            DenseOperator(torch.from_numpy(matrix)), tol=0.05, generator=generator
        )
        if not float(solution.lower[0]) <= norm <= float(solution.upper[0]):
            missed.append((name, matrix.shape, norm, solution.lower[0], solution.upper[0]))
        assert solution.lower[0] <= norm * (1 + 1e-13), (
            f"the lower end is above the norm: {name} {matrix.shape}"
        )
    assert len(missed) <= allowed, missed


def test_interval_contains_the_truth_at_every_product() -> None:
    """The upper end may fail once in a thousand starts, however many products were made."""
    generator = torch.Generator().manual_seed(5)
    failed, tried = 0, 0
    for _, matrix, norm in random_operators(120, seed=3):
        lanczos = begin(torch.from_numpy(matrix), generator)
        bad = False
        for _ in range(2 * min(25, min(matrix.shape) + 2)):
            lanczos.advance()
            theta = ritz_values(lanczos.alphas, lanczos.betas)
            high = upper_ends(
                theta[:, 0], lanczos.alphas, lanczos.betas, lanczos.exact, matrix.shape[0], 1e-3
            )
            assert theta[0, 0] <= norm * (1 + 1e-13) + 1e-300
            bad |= high[0] * (1 + PAD["float64"]) < norm * (1 - 1e-14)
        failed += bad
        tried += 1
    assert failed <= 1, f"{failed} of {tried} starts"


@pytest.mark.parametrize("products", [2, 3, 4])
def test_upper_end_fails_about_as_often_as_announced(products: int) -> None:
    """With eps 0.2 the bound must fail sometimes, and not more often than that: it is neither void
    nor false.
    """
    rng = np.random.default_rng(0)
    # a start almost orthogonal to the top vector hides it
    spectrum = np.concatenate([[1.0], np.full(39, 0.3)])
    if products > 2:  # a bulk of its own for every polynomial more, far below
        spectrum[20:] = 0.002
    matrix, norm = operator_with(spectrum, 40, 40, rng)
    problems = torch.from_numpy(matrix).expand(2000, 40, 40).contiguous()
    lanczos = begin(problems, torch.Generator().manual_seed(1))
    for _ in range(products):
        lanczos.advance()
    theta = ritz_values(lanczos.alphas, lanczos.betas)
    rates = []
    for eps in (0.2, 0.05):
        high = upper_ends(theta[:, 0], lanczos.alphas, lanczos.betas, lanczos.exact, 40, eps)
        rates.append(float((high < norm).mean()))
    for rate, eps in zip(rates, (0.2, 0.05), strict=True):
        assert 0.1 * eps < rate < eps + 4 * (eps * (1 - eps) / 2000) ** 0.5


@pytest.mark.parametrize("trials", [36, pytest.param(120, marks=pytest.mark.long)])
def test_upper_end_holds_for_every_start_that_sees_the_top_vector(trials: int) -> None:
    """No chance in it: a component of delta along the top vector is all that the bound asks, at
    every product.
    """
    rng, eps = np.random.default_rng(8), 1e-3
    for trial in range(trials):
        n = int(rng.integers(3, 60))
        spectrum = np.sort(SPECTRA[list(SPECTRA)[trial % 6]](n, rng))[::-1].copy()
        spectrum[0] *= rng.choice([1.0, 1.2, 10.0])
        delta = eps * np.sqrt(np.pi / (2 * n))
        start = rng.standard_normal(n)
        start[0] = 0.0
        start *= np.sqrt(1 - delta**2) / np.linalg.norm(start)
        start[0] = delta
        diagonal = DenseOperator(torch.diag(torch.from_numpy(spectrum)))
        lanczos = Bidiagonalisation(diagonal, 3 * torch.from_numpy(start)[None])
        for _ in range(2 * n):
            lanczos.advance()
            if lanczos.exact[0]:
                break
            theta = ritz_values(lanczos.alphas, lanczos.betas)
            high = upper_ends(theta[:, 0], lanczos.alphas, lanczos.betas, lanczos.exact, n, eps)
            assert theta[0, 0] <= spectrum[0] * (1 + 1e-12)
            assert high[0] >= spectrum[0] * (1 - 1e-9), (trial, lanczos.steps)


NEARLY_ONE_VALUE = {
    "identity and a little": lambda k: 1 + 1e-3 * np.linspace(0, 1, k),
    "one cluster": lambda k: 1 - 1e-4 * np.arange(k) / k,
    "two clusters": lambda k: np.where(np.arange(k) % 2, 1.0, 0.5) - 1e-5 * np.arange(k) / k,
    "slow geometric": lambda k: 0.97 ** np.arange(k),
    "halves": lambda k: 0.5 ** np.arange(k),
    "fast geometric": lambda k: 0.1 ** np.arange(k),
}


@pytest.mark.parametrize("spectrum", NEARLY_ONE_VALUE)
@pytest.mark.parametrize("shape", [(8, 8), (60, 60), (5, 40), (40, 5), (64, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_distinct_values_neither_break_orthogonality_nor_the_exact_norm(
    spectrum: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Small coefficients enlarge rounding. Reorthogonalised on the wrong side alone, norms that are
    called exact are off by 1e-5 here.
    """
    # 1. A run until every problem is exact.
    rng = np.random.default_rng(4)
    values = NEARLY_ONE_VALUE[spectrum](min(shape))
    matrices = [torch.from_numpy(operator_with(values, *shape, rng)[0]) for _ in range(4)]
    problems = torch.stack(matrices).to(dtype)
    truth = torch.linalg.svdvals(problems.double())[:, 0].numpy()
    lanczos = begin(problems, torch.Generator().manual_seed(2))
    for _ in range(2 * max(shape) + 2):
        lanczos.advance()
        top = largest_ritz_values(lanczos.alphas, lanczos.betas)
        assert (top <= truth * (1 + PAD[str(dtype).removeprefix("torch.")])).all()
        if lanczos.exact.all():
            break
    assert lanczos.exact.all()

    # 2. The norm is exact to rounding.
    rounding = 100 * torch.finfo(dtype).eps
    assert np.abs(top / truth - 1).max() < rounding

    # 3. The directions that were kept are orthogonal, those of a breakdown are 0.
    count = min(lanczos.steps, shape[0])
    inner = lanczos.left[:, :count] @ lanczos.left[:, :count].transpose(1, 2)
    sizes = inner.diagonal(dim1=1, dim2=2)
    assert (inner - torch.diag_embed(sizes)).abs().max() < rounding
    assert ((sizes - 1).abs().minimum(sizes.abs()) < rounding).all()


@pytest.mark.parametrize("spectrum", ["slow geometric", "halves", "fast geometric", "two clusters"])
@pytest.mark.parametrize("scale", [1e-25, 1e-22, 1e25])
def test_a_tiny_or_huge_problem_among_others_keeps_its_own_interval(
    spectrum: str, scale: float
) -> None:
    """Squares of what is taken off a direction leave the range of float32 here."""
    rng = np.random.default_rng(5)
    extreme = operator_with(scale * NEARLY_ONE_VALUE[spectrum](60), 60, 60, rng)[0]
    usual = operator_with(np.linspace(0.1, 1, 60), 60, 60, rng)[0]
    problems = torch.from_numpy(np.stack([extreme, usual])).float()
    truth = torch.linalg.svdvals(problems.double())[:, 0].numpy()
    for batch, norm in ((problems, truth), (problems[:1], truth[:1])):
        for tol in (0.05, 1e-3, 1e-5):
            solution = top_singular(
                DenseOperator(batch), tol=tol, generator=torch.Generator().manual_seed(2)
            )
            assert solution.converged
            assert (solution.lower <= norm).all() and (norm <= solution.upper).all()


@pytest.mark.parametrize(
    ("shape", "is_kept"), [((30, 30), False), ((30, 50), False), ((50, 30), True)]
)
def test_directions_on_the_right_are_kept_only_where_they_run_out_first(
    shape: tuple[int, int], is_kept: bool
) -> None:
    lanczos = begin(torch.randn(2, *shape), torch.Generator().manual_seed(2))
    for _ in range(6):
        lanczos.advance()
    assert (lanczos.right is not None) is is_kept


def test_upper_end_is_below_that_of_the_last_polynomial_alone() -> None:
    """The end of van Dorsselaer et al., by bisection: log s + sum log(s + 1 - theta_j^2 /
    theta_1^2) = const.
    """
    generator = torch.Generator().manual_seed(5)
    gained = []
    for _, matrix, _ in random_operators(24, seed=9):
        lanczos = begin(torch.from_numpy(matrix), generator)
        for _ in range(min(matrix.shape)):
            lanczos.step()
            theta = ritz_values(lanczos.alphas, lanczos.betas)
            if lanczos.exact[0]:
                break
            high = upper_ends(
                theta[:, 0], lanczos.alphas, lanczos.betas, lanczos.exact, matrix.shape[0], 1e-3
            )
            square = ritz_values(lanczos.alphas, lanczos.betas[:, :-1])
            last = _last_polynomial_end(
                square[0], lanczos.alphas[0], lanczos.betas[0], matrix.shape[0]
            )
            assert theta[0, 0] <= high[0] <= last * (1 + 1e-9)
            gained.append(high[0] < last * (1 - 1e-6))
    assert any(gained)


def _last_polynomial_end(theta: np.ndarray, alphas: np.ndarray, betas: np.ndarray, n: int) -> float:
    ratio = (theta / theta[0]) ** 2
    right = (
        np.log(alphas / theta[0]).sum()
        + np.log(betas / theta[0]).sum()
        - np.log(1e-3 * np.sqrt(np.pi / (2 * n)))
    )
    low, high = -700.0, 700.0
    for _ in range(200):
        t = (low + high) / 2
        below = t + np.log(np.maximum(np.exp(t) + 1 - ratio[1:], 1e-300)).sum() < right
        low, high = (t, high) if below else (low, t)
    return float(theta[0] * np.sqrt(1 + np.exp(low)))


def test_a_settled_problem_keeps_valid_ends() -> None:
    """Problems that cannot attain the maximum are left alone; their last upper ends hold all the
    same.
    """
    size = torch.logspace(0, -3, 40, dtype=torch.float64).reshape(-1, 1, 1)
    matrix = size * torch.randn(
        40, 60, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(4)
    )
    truth = torch.linalg.svdvals(matrix)[:, 0].numpy()
    solution = top_singular(
        DenseOperator(matrix), tol=1e-6, generator=torch.Generator().manual_seed(5)
    )
    assert solution.converged
    assert (solution.lower <= truth).all() and (truth <= solution.upper).all()
    assert np.isfinite(solution.upper).all()
    assert np.abs(solution.estimate / truth - 1).max() < 1e-6


def few_that_lead_at_first(count: int, size: int, rng: np.random.Generator) -> torch.Tensor:
    """Matrices of which the first eight have the largest ends early, and the ninth the largest
    norm: one value far above the others.
    """
    flat = np.sort(rng.uniform(0.9, 1.0, size))[::-1]
    hidden = np.concatenate([[1.5], rng.uniform(0.0, 0.3, size - 1)])
    small = 0.5 * rng.uniform(0, 1, size)
    spectra = [flat] * 8 + [hidden] + [small] * (count - 9)
    return torch.from_numpy(
        np.stack([operator_with(spectrum, size, size, rng)[0] for spectrum in spectra])
    )


@pytest.mark.parametrize("tol", [0.3, 0.05, 1e-3])
@pytest.mark.parametrize("seed", range(4))
def test_many_problems_are_solved_as_if_all_were_looked_at(
    tol: float, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    problems = few_that_lead_at_first(60, 40, rng)
    truth = torch.linalg.svdvals(problems)[:, 0].numpy()

    def solve() -> Solution:
        start = torch.Generator().manual_seed(seed)
        return top_singular(DenseOperator(problems), tol=tol, generator=start)

    found = solve()
    assert (found.lower <= truth).all() and (truth <= found.upper).all()
    assert found.converged and found.upper.max() <= (1 + tol) * found.lower.max()
    np.testing.assert_allclose(
        found.estimate,
        largest_ritz_values(found.alphas, found.betas),
        rtol=1e-12,
    )

    # If all are looked at every time, the run ends no more than the patience earlier.
    monkeypatch.setattr("jacdiag.spectra.solve._MANY", 10**9)
    every = solve()
    assert every.products <= found.products <= every.products + 4


def test_many_problems_take_the_budget_where_no_width_is_enough() -> None:
    problems = few_that_lead_at_first(60, 40, np.random.default_rng(0))
    truth = torch.linalg.svdvals(problems)[:, 0].numpy()
    start = torch.Generator().manual_seed(0)
    solution = top_singular(DenseOperator(problems), tol=0.0, max_products=20, generator=start)
    assert solution.products == 20 and solution.stop is Stop.BUDGET
    assert (solution.lower <= truth).all() and (truth <= solution.upper).all()
    assert (solution.steps == 10) and np.isfinite(solution.upper).all()


def test_few_of_many_problems_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    problems = torch.from_numpy(rng.standard_normal((200, 60, 60)))
    counts: list[int] = []

    def ends(top: np.ndarray, *arguments: Any) -> np.ndarray:
        counts.append(len(top))
        return upper_ends(top, *arguments)

    def solve() -> tuple[int, int]:
        """How many products are made, and how many ends computed."""
        counts.clear()
        generator = torch.Generator().manual_seed(0)
        solution = top_singular(DenseOperator(problems), generator=generator)
        assert solution.converged
        return solution.products, sum(counts)

    monkeypatch.setattr("jacdiag.spectra.solve.upper_ends", ends)
    products, computed = solve()
    monkeypatch.setattr("jacdiag.spectra.solve._MANY", 10**9)
    products_of_all, computed_of_all = solve()
    assert products == products_of_all
    assert computed < computed_of_all * 2 / 3


@pytest.mark.parametrize("shape", [(25, 40), (40, 25)])
def test_a_number_is_an_upper_end_if_it_is_no_lower_than_the_one_found(
    shape: tuple[int, int],
) -> None:
    """After each product, for whatever ends the problems have."""
    rng = np.random.default_rng(3)
    problems = rng.standard_normal((50, *shape)) * 10.0 ** rng.uniform(-9, 9, (50, 1, 1))
    operator = DenseOperator(torch.from_numpy(problems))
    lanczos = Bidiagonalisation(operator, draw_start(operator, torch.Generator().manual_seed(0)))
    lanczos.advance()
    for _ in range(16):
        lanczos.advance()
        coefficients = lanczos.alphas, lanczos.betas
        top = largest_ritz_values(*coefficients)
        ends = upper_ends(top, *coefficients, lanczos.exact, shape[0], 1e-3)

        def are(x: np.ndarray, coefficients: Any = coefficients) -> np.ndarray:
            return are_upper_ends(x, *coefficients, shape[0], 1e-3)

        assert are((1 + 1e-9) * ends).all() and are(1e6 * ends).all()
        assert not are((1 - 1e-6) * ends).any()
        assert not are(0.5 * top).any()


@pytest.mark.parametrize("early", [False, True])
def test_what_decides_is_the_maximum_over_all_of_many_problems(early: bool) -> None:
    rng = np.random.default_rng(1)
    problems = few_that_lead_at_first(60, 40, rng)
    asked: list[tuple[float, float]] = []

    def is_below(lower: float, upper: float) -> bool:
        asked.append((lower, upper))
        return upper < 1.4 or lower > 1.4  # the norm is 1.5

    solution = top_singular(
        DenseOperator(problems),
        tol=0.5,
        decide=is_below,
        early=early,
        generator=torch.Generator().manual_seed(1),
    )
    assert solution.lower.max() > 1.4 and len(asked) > 1


def test_an_upper_end_that_a_settled_problem_has_passed_is_not_kept() -> None:
    """At a confidence of 0.9 a start may hide the larger problem until it is left alone."""
    first, second = [1.0, 0.9, 0.8, 0.5, 0.2, 0.1], [1.05, 0.6, 0.5, 0.3, 0.2, 0.1]
    matrices = torch.zeros(2, 20, 20, dtype=torch.float64)
    for matrix, spectrum in zip(matrices, (first, second), strict=True):
        matrix.diagonal()[:6] = torch.tensor(spectrum, dtype=torch.float64)

    missed = 0
    for seed in range(200):
        start = torch.Generator().manual_seed(seed)
        solution = top_singular(DenseOperator(matrices), tol=1e-9, confidence=0.9, generator=start)
        assert (solution.lower <= solution.upper).all(), seed
        missed += float(solution.upper.max()) < 1.05
    assert missed < 20


@pytest.mark.parametrize("smallest", [0.01, 0.5])
def test_a_maximum_of_scaled_problems_comes_to_its_width_too(smallest: float) -> None:
    """The factors turn the order around: what is settled for one maximum decides the other."""
    problems = 12
    size = torch.linspace(1, smallest, problems, dtype=torch.float64)
    matrix = torch.randn(
        problems, 40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(4)
    )
    matrix *= size.reshape(-1, 1, 1)
    truth = torch.linalg.svdvals(matrix)[:, 0].numpy()
    factors = (1 / size**2).numpy()

    def start() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    operator = DenseOperator(matrix)
    alone = top_singular(operator, tol=0.1, generator=start())
    question = Question(operator, start(), scaled=Aim(factors, 0.01))
    [both] = in_step([question], tol=0.1)
    assert (both.lower <= truth).all() and (truth <= both.upper).all()
    low, high = (factors * both.lower).max(), (factors * both.upper).max()
    assert low <= (factors * truth).max() <= high <= low * 1.01
    assert both.upper.max() <= both.lower.max() * 1.1
    assert both.products > alone.products
    assert (factors * alone.upper).max() > (factors * alone.lower).max() * 1.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batched_problems_agree_with_svdvals(dtype: torch.dtype) -> None:
    matrix = torch.randn(7, 30, 50, dtype=dtype, generator=torch.Generator().manual_seed(2))
    solution = top_singular(
        DenseOperator(matrix), tol=1e-3, generator=torch.Generator().manual_seed(3)
    )
    truth = torch.linalg.svdvals(matrix.double())[:, 0].numpy()
    assert solution.converged
    assert (solution.lower <= truth).all() and (truth <= solution.upper).all()
    assert np.abs(solution.estimate / truth - 1).max() < 2e-3
    left = solution.left.double()
    stretched = torch.bmm(left.unsqueeze(1), matrix.double()).norm(dim=2).squeeze(1).numpy()
    assert np.abs(stretched / solution.estimate - 1).max() < 1e-3


@pytest.mark.parametrize(("largest", "is_scaled_down"), [(1.0, False), (1e80, True)])
def test_sums_of_a_few_problems_are_those_of_many_to_the_last_bit(
    largest: float, is_scaled_down: bool
) -> None:
    """Points just above 1 and far above, where the polynomials must be scaled down."""
    rng = np.random.default_rng(4)
    x = 1 + largest * rng.uniform(0, 1, 5)
    diagonal, off = rng.uniform(0, 1, (5, 20)), rng.uniform(1e-12, 1, (5, 20))
    together = _sum_of_squares(x, list(diagonal.T), list(off.T))
    problems = zip(x.tolist(), diagonal.tolist(), off.tolist(), strict=True)
    one_by_one = np.array([_sum_of_squares(*problem) for problem in problems]).T
    for expected, found in zip(together, one_by_one, strict=True):
        assert np.array_equal(expected, found)
    assert bool((together[2] > 0).any()) == is_scaled_down


def test_degenerate_operators_are_exact() -> None:
    for matrix, norm in (
        (torch.zeros(3, 5), 0.0),
        (torch.eye(6), 1.0),
        (torch.full((1, 1), -2.0), 2.0),
        (torch.ones(4, 3), 12**0.5),
        (torch.tensor([[0.0, 3.0]]), 3.0),
    ):
        solution = top_singular(
            DenseOperator(matrix.double()), generator=torch.Generator().manual_seed(0)
        )
        assert solution.stop is Stop.EXACT
        assert solution.estimate[0] == pytest.approx(norm, rel=1e-12, abs=0.0)
        assert solution.lower[0] <= norm <= solution.upper[0]


def test_solution_says_why_it_stopped() -> None:
    matrix = torch.randn(200, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = torch.Generator().manual_seed
    narrow = top_singular(DenseOperator(matrix), tol=0.01, generator=start(0))
    assert (
        narrow.stop is Stop.WIDTH and narrow.converged and narrow.upper[0] <= narrow.lower[0] * 1.01
    )
    short = top_singular(DenseOperator(matrix), tol=1e-9, max_products=8, generator=start(0))
    assert short.stop is Stop.BUDGET and not short.converged and short.products == 8
    assert "max_products" in short.sentence and "width" in short.sentence
    early = top_singular(
        DenseOperator(matrix), tol=1e-9, generator=start(0), decide=lambda low, high: high < 1e6
    )
    assert early.stop is Stop.DECIDED and early.products < 8
    broken = top_singular(DenseOperator(matrix.clone().fill_(float("nan"))), generator=start(0))
    assert broken.stop is Stop.NON_FINITE and broken.lower[0] == 0 and np.isinf(broken.upper[0])


def test_maximum_over_problems_needs_no_union_bound() -> None:
    matrix = torch.diag_embed(torch.tensor([[3.0, 1.0, 0.5], [2.0, 1.9, 0.1]], dtype=torch.float64))
    interval = top_singular(
        DenseOperator(matrix), generator=torch.Generator().manual_seed(0)
    ).interval((2,))
    assert interval.per_sequence == pytest.approx([3.0, 2.0])
    assert interval.lower <= 3.0 <= interval.upper and interval.estimate == pytest.approx(3.0)


class _Laid(DenseOperator):
    """A product that comes back transposed in memory, as a pullback's may."""

    def _push(self, u: torch.Tensor) -> torch.Tensor:
        return super()._push(u).t().contiguous().t()


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_long_rows_in_any_memory_and_of_any_size(scale: float) -> None:
    matrix = scale * torch.randn(2, 2048, 1024, generator=torch.Generator().manual_seed(6))
    truth = torch.linalg.svdvals(matrix.double())[:, 0].numpy()
    solution = top_singular(_Laid(matrix), tol=0.01, generator=torch.Generator().manual_seed(7))
    assert solution.converged
    assert (solution.lower <= truth).all() and (truth <= solution.upper).all()


@pytest.mark.parametrize("scale", [1e-200, 1e-12, 1.0, 1e12, 1e200])
def test_largest_ritz_values_are_the_largest_of_all_to_rounding(scale: float) -> None:
    rng = np.random.default_rng(3)
    for steps in (1, 2, 5, 20):
        alphas = scale * rng.random((30, steps))
        for betas in (scale * rng.random((30, steps - 1)), scale * rng.random((30, steps))):
            every = np.linalg.svd(bidiagonal(alphas, betas), compute_uv=False)
            assert largest_ritz_values(alphas, betas) == pytest.approx(every[:, 0], rel=1e-14)
    assert (largest_ritz_values(np.zeros((3, 2)), np.zeros((3, 1))) == 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_a_second_product_raises_an_inherited_lower_end(seed: int) -> None:
    """|A v| / |v| of v = A^T u lies between |A^T u| / |u| and the norm."""
    matrix = torch.randn(
        3, 40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    truth = torch.linalg.svdvals(matrix)[:, 0].numpy()
    vectors = torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    vectors[2] = 0
    operator, upper = DenseOperator(matrix), 1.01 * truth

    def ends(most_products: int, tol: float) -> Solution:
        return inherited(
            operator, vectors, upper, confidence=0.999, tol=tol, most_products=most_products
        )

    first, second = ends(1, 0.05), ends(2, 0.05)
    assert (first.products, second.products) == (1, 2)
    assert (first.lower[:2] < second.lower[:2]).all() and (second.lower <= truth).all()
    assert second.lower[2] == 0, "nothing is known from a vector of zeros"
    assert ends(2, 1e3).products == 1, "the first is narrow enough"
    third, fourth = ends(3, 1e-9), ends(4, 1e-9)
    assert (third.products, fourth.products) == (3, 4)
    assert (second.lower <= third.lower).all() and (third.lower <= fourth.lower).all()
    assert (fourth.lower <= truth).all()
    for solution in (second, fourth):
        pulled = torch.bmm(solution.left.unsqueeze(1), matrix).norm(dim=2).squeeze(1).numpy()
        assert (pulled[:2] >= solution.estimate[:2] * (1 - 1e-12)).all()
