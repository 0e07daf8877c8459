"""Residual sums written with the less usual calls of torch, against dense Jacobians."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import jacdiag

D = 6
Add = Callable[[Tensor, Tensor, Tensor], Tensor]

# x, a branch, and a gate -> the sum. The branch that each adds to x follows.
FORMS: dict[str, tuple[Add, Add]] = {
    "rsub": (lambda x, f, g: torch.rsub(f, x), lambda x, f, g: -f),
    "rsub alpha": (lambda x, f, g: torch.rsub(f, x, alpha=3), lambda x, f, g: -3 * f),
    "__rsub__": (lambda x, f, g: f.__rsub__(x), lambda x, f, g: -f),
    "addcdiv": (lambda x, f, g: torch.addcdiv(x, f, g), lambda x, f, g: f / g),
    "addcdiv_": (
        lambda x, f, g: x.clone().addcdiv_(f, g, value=0.5),
        lambda x, f, g: 0.5 * f / g,
    ),
}


class Layers(nn.Module):
    """Two layers whose branches are added in one form."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.add, self.part = FORMS[form]
        self.up = nn.ModuleList([nn.Linear(D, 9) for _ in range(2)])
        self.down = nn.ModuleList([nn.Linear(9, D) for _ in range(2)])
        self.gate = nn.Linear(D, D)

    def branch(self, layer: int, x: Tensor) -> Tensor:
        return self.down[layer](self.up[layer](x).tanh())

    def forward(self, x: Tensor) -> Tensor:
        for layer in range(2):
            x = self.add(x, self.branch(layer, x), 1 + self.gate(x).sigmoid())
        return x


@pytest.mark.parametrize("form", FORMS)
def test_the_norm_of_every_form_is_that_of_a_dense_jacobian(form: str) -> None:
    torch.manual_seed(0)
    model = Layers(form).double()
    x = torch.randn(1, 3, D, dtype=torch.float64)
    report = jacdiag.audit(model, inputs=x, dtype="float64", tol=0.01, remedies="none")
    assert len(report.sublayers) == 2

    # The first sub-layer reads x itself.
    def first(x: Tensor) -> Tensor:
        return model.part(x, model.branch(0, x), 1 + model.gate(x).sigmoid())

    jacobian = torch.autograd.functional.jacobian(first, x).reshape(3 * D, 3 * D)
    dense = float(torch.linalg.svdvals(jacobian)[0])
    norm = report.sublayers[0].branch_norm
    assert norm is not None and norm.upper is not None
    assert norm.lower <= dense <= norm.upper and norm.upper < 1.05 * norm.lower


@pytest.mark.parametrize("form", ["rsub", "__rsub__"])
def test_one_minus_a_gate_is_no_sum(form: str) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            gate = self.layer(x).sigmoid()
            less = torch.rsub(gate, 1.0) if form == "rsub" else 1.0 - gate
            return x + less * self.layer(x)

    assert len(jacdiag.sites(Gated(), torch.randn(1, 3, D))) == 1
