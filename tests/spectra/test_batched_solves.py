"""Norms solved in step: the same ends as alone and as dense algebra, with one call for what they
have in common.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from jacdiag.spectra import (
    Composed,
    JacobianOperator,
    NormJacobian,
    Operator,
    Question,
    Shifted,
    Summed,
    in_step,
    products_together,
    top_singular,
)
from jacdiag.spectra.operator import Way, flat

X = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
W = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Counted(JacobianOperator):
    """Tells how many vectors came at once."""

    calls: list[int]

    def products_of(self, way: Way, vectors: Any) -> list[Tensor]:
        self.calls = [*getattr(self, "calls", []), len(vectors)]
        return super().products_of(way, vectors)


def mixing(x: Tensor) -> Tensor:
    return torch.cumsum(torch.tanh(x @ W), 1)


def maps(fn: Any = mixing) -> tuple[Counted, dict[str, Operator]]:
    """Core, branch and residual map around one Jacobian; norms before and behind it, a gain on the
    shortcut.
    """
    core = Counted(fn, X)
    before = JacobianOperator(lambda x: x / x.norm(dim=-1, keepdim=True), X)
    behind = JacobianOperator(lambda x: x.sin(), X)
    carry = JacobianOperator(lambda x: 2 * x, X)
    branch = Composed(core, before)
    shifted = Shifted(branch, 0.5)
    return core, {
        "core": core,
        "branch": branch,
        "residual": shifted,
        "post": Composed(behind, shifted),
        "carried": Summed([carry, branch]),
    }


def dense(operator: Operator) -> Tensor:
    columns = []
    for j in range(operator.domain):
        u = torch.zeros(operator.problems, operator.domain, dtype=torch.float64)
        u[:, j] = 1
        columns.append(operator.push(u))
    return torch.stack(columns, 2)


def start(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("way", ["push", "pull"])
def test_products_are_the_dense_ones_and_meet_at_the_core(way: Way) -> None:
    core, made = maps()
    operators = list(made.values())
    matrices = [dense(operator) for operator in operators]
    before = [operator.products for operator in operators]
    core.calls = []
    vectors = [
        torch.randn(2, 15, dtype=torch.float64, generator=start(k)) for k in range(len(operators))
    ]
    found = products_together(way, operators, vectors)
    for matrix, vector, product in zip(matrices, vectors, found, strict=True):
        true = (matrix if way == "push" else matrix.mT) @ vector.unsqueeze(2)
        torch.testing.assert_close(product, true.squeeze(2))
    assert core.calls == [5], "all at once, those with a norm before or behind it too"
    assert [o.products - b for o, b in zip(operators[1:], before[1:], strict=True)] == [1] * 4


def test_in_step_is_what_each_is_alone() -> None:
    _, made = maps()
    alone = [top_singular(o, tol=1e-3, generator=start(k)) for k, o in enumerate(made.values())]
    core, made = maps()
    together = in_step([Question(o, start(k)) for k, o in enumerate(made.values())], tol=1e-3)
    calls = len(core.calls)
    for operator, one, other in zip(made.values(), alone, together, strict=True):
        true = torch.linalg.matrix_norm(dense(operator), 2).numpy()
        assert (other.lower <= true).all() and (true <= other.upper).all()
        assert other.products == one.products and other.stop is one.stop
        assert other.lower == pytest.approx(one.lower, rel=1e-9)
        assert other.upper == pytest.approx(one.upper, rel=1e-9)
    assert calls == max(solution.products for solution in together)


def test_each_stops_for_itself() -> None:
    _, made = maps()
    questions = [
        Question(made["core"], start(0), decide=lambda low, high: True),
        Question(made["branch"], start(1)),
    ]
    early, late = in_step(questions, tol=1e-9)
    assert early.products == 1 < late.products


class Looks(torch.autograd.Function):
    """Its backward asks for a number, which a stack of vectors does not have."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 3 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return 3 * grads[0] if float(grads[0].detach().abs().max()) >= 0 else None


def test_what_cannot_be_stacked_is_made_one_by_one() -> None:
    operator = JacobianOperator(lambda x: mixing(Looks.apply(x)), X)
    plain = JacobianOperator(lambda x: mixing(3 * x), X)
    vectors = [torch.randn(2, 15, dtype=torch.float64, generator=start(k)) for k in range(3)]
    for _ in range(2):
        for found, true in zip(
            operator.products_of("pull", vectors), map(plain.pull, vectors), strict=True
        ):
            torch.testing.assert_close(found, true)
    assert not operator.stacks and plain.stacks


def test_wide_vectors_are_not_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = JacobianOperator(mixing, X)
    vectors = [
        flat(torch.randn(X.shape, dtype=torch.float64, generator=start(k)), (0,)) for k in range(5)
    ]
    true = operator.products_of("push", vectors)
    monkeypatch.setattr("jacdiag.spectra.operator._NARROW", 2 * X.numel())
    widths: list[int] = []
    inner = operator._push_map
    operator._push_map = lambda u: (widths.append(u.dim()), inner(u))[1]  # type: ignore[func-returns-value]
    stacked = operator._stacked
    operator._stacked = lambda product, stack: (widths.append(len(stack)), stacked(product, stack))[
        1
    ]  # type: ignore
    for found, expected in zip(operator.products_of("push", vectors), true, strict=True):
        torch.testing.assert_close(found, expected)
    assert [w for w in widths if w != 3] == [2, 2]  # the fifth is alone


def test_a_norm_in_closed_form_needs_no_call() -> None:
    core = Counted(mixing, X)
    norm = NormJacobian(X, torch.ones(2, 3), centred=False, batch_dims=(0,))
    products_together(
        "push", [core, Composed(core, norm)], [torch.ones(2, 15, dtype=torch.float64)] * 2
    )
    assert core.calls == [2] and core.products == 2
