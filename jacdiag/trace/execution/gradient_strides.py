"""Gradients with the strides of new tensors, where a backward of torch misreads others.

On the CPU the backward of a batch norm returns wrong numbers for a gradient of shape (1, C, ...)
whose first stride is not the number of its elements (torch 2.6 to 2.13). A permuted view has such
strides, for example where tokens (1, H * W, C) are made from an image (1, C, H, W). The same call
with a batch of two is right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _RegularGradient(torch.autograd.Function):
    """The identity, whose backward copies the gradient into a new tensor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return value.clone()  # not a view: the model may write into it

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is saved."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return gradient.clone(memory_format=torch.contiguous_format)


def with_regular_gradient(name: str, result: Any) -> Any:
    """Return the result of a torch call, with a backward that gets gradients of regular strides.

    Args:
        name: of the torch function.
        result: what it returned; changed only for a batch norm of one sequence or image on the CPU.

    Example:
        >>> x = torch.ones(1, 2, 3, requires_grad=True)
        >>> y = with_regular_gradient("batch_norm", torch.nn.BatchNorm1d(2).eval()(x))
        >>> y.grad_fn.name()
        '_RegularGradientBackward'
    """
    if name != "batch_norm" or not isinstance(result, Tensor):
        return result

    # Only a backward reads a gradient.
    if torch.is_grad_enabled() and _is_misread(result):
        return _RegularGradient.apply(result)
    return result


def _is_misread(result: Tensor) -> bool:
    """Return whether the backward of a batch norm may misread the gradient of its result."""
    # A gradient of shape (1, C, ...) on the CPU.
    is_one_sequence = result.dim() > 2 and result.shape[0] == 1
    return is_one_sequence and result.device.type == "cpu"
