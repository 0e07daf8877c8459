"""Branches with recurrent layers of torch: found, measured, and never run by cuDNN.

cuDNN's recurrent kernels have no derivative in eval mode, in which models are run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import jacdiag

WIDTH = 8
LAYERS = {
    "gru": (nn.GRU, {}),
    "lstm": (nn.LSTM, {}),
    "rnn_tanh": (nn.RNN, {}),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu"}),
}


class Block(nn.Module):
    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self.norm(x))[0]
        return x + out


class _CudnnAtCall(TorchDispatchMode):
    """Note whether cuDNN is allowed at each of torch's own operations."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed: dict[str, set[bool]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        self.allowed.setdefault(name, set()).add(torch.backends.cudnn.enabled)
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=LAYERS)
def block(request: pytest.FixtureRequest) -> Iterator[Block]:
    torch.manual_seed(0)
    layer_class, options = LAYERS[request.param]
    yield Block(layer_class(WIDTH, WIDTH, batch_first=True, **options)).eval()


def test_the_branch_norm_is_that_of_the_dense_jacobian(block: Block) -> None:
    x = torch.randn(1, 4, WIDTH)
    report = jacdiag.audit(block, x)
    (row,) = report.sublayers
    assert row.branch_norm is not None

    dense = torch.autograd.functional.jacobian(lambda x: block(x) - x, x)
    size = float(torch.linalg.matrix_norm(dense.reshape(x.numel(), -1).double(), 2))
    assert row.branch_norm.lower <= size <= row.branch_norm.upper


def test_recurrent_layers_are_run_without_cudnn(block: Block) -> None:
    with _CudnnAtCall() as calls:
        jacdiag.sites(block, torch.randn(2, 4, WIDTH))
    of_layer = {"mkldnn_rnn_layer", "tanh", "relu", "sigmoid", "sigmoid_"} & set(calls.allowed)
    assert of_layer
    assert all(calls.allowed[name] == {False} for name in of_layer)
    assert torch.backends.cudnn.enabled
    assert calls.allowed["native_layer_norm"] == {True}
