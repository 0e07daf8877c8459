"""An error in the model's own code is named for what it is: in a run of it, or in a backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacdiag
from jacdiag.errors import TraceError


class RaisesInBackward(torch.autograd.Function):
    """A function without a backward, as one for inference is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("for inference alone")


RUNS: list[int] = []  # a run of the model gives its attributes back


class Branch(nn.Linear):
    """A linear map that raises in every call after the first, if it is to."""

    raises_later = False

    def forward(self, x: Tensor) -> Tensor:
        RUNS.append(1)
        if self.raises_later and len(RUNS) > 1:
            raise RuntimeError("only once")
        return super().forward(x)


class Residual(nn.Module):
    """x + f(x); f raises in a backward, or in every call after the first."""

    def __init__(self, *, in_backward: bool) -> None:
        super().__init__()
        self.f = Branch(8, 8)
        self.f.raises_later = not in_backward
        self.in_backward = in_backward

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        if self.in_backward:
            y = RaisesInBackward.apply(y)
        return x + y


@pytest.mark.parametrize(
    ("in_backward", "what"),
    [
        (True, "a backward of the model's own raised"),
        (False, "the model's code raised when it was run again"),
    ],
)
def test_an_error_says_whether_a_run_or_a_backward_raised(in_backward: bool, what: str) -> None:
    RUNS.clear()
    with pytest.raises(TraceError, match=what) as raised:
        jacdiag.audit(Residual(in_backward=in_backward), torch.randn(2, 3, 8), state="init")
    assert ("plain PyTorch version" in str(raised.value)) == in_backward
