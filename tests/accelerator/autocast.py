"""Autocast on the pretended device: the same lists of operations as on CUDA, in their main part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accelerator.machine import NAME

# Run in the type of autocast (torch/docs/amp, "CUDA Ops that can autocast to float16").
LOWER = (
    "addbmm",
    "addmm",
    "addmv",
    "baddbmm",
    "bmm",
    "conv1d",
    "conv2d",
    "conv3d",
    "linear",
    "matmul",
    "mm",
    "mv",
    "scaled_dot_product_attention",
)
# Run in float32.
FLOAT32 = (
    "binary_cross_entropy_with_logits",
    "cosine_similarity",
    "cross_entropy_loss",
    "cumsum",
    "exp",
    "group_norm",
    "layer_norm",
    "log",
    "log_softmax.int",
    "mse_loss",
    "nll_loss",
    "nll_loss_nd",
    "norm.Scalar",
    "pow.Tensor_Scalar",
    "prod",
    "rsqrt",
    "softmax.int",
    "sum",
    "sum.dim_IntList",
)


def register() -> list[torch.library.Library]:
    """Register autocast with torch; return what keeps it registered."""
    # 1. Operations that are in no list run as they are.
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")

    # 2. The lists.
    listed = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    for name in LOWER:
        listed.impl(name, _kernel_of(name, None))
    for name in FLOAT32:
        listed.impl(name, _kernel_of(name, torch.float32))
    return [others, listed]


def _kernel_of(name: str, dtype: torch.dtype | None) -> Callable[..., Any]:
    """Return the operation with its arguments in another type; None is the type of autocast."""
    packet_name, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.aten, packet_name), overload or "default")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        wanted = torch.get_autocast_dtype(NAME) if dtype is None else dtype
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            cast_args = [_cast(x, wanted) for x in args]
            return op(*cast_args, **{key: _cast(x, wanted) for key, x in kwargs.items()})

    return kernel


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Return an argument in another type, if it is a tensor of numbers on the device."""
    is_tensor = isinstance(value, Tensor) and value.device.type == NAME
    if not is_tensor or not value.is_floating_point() or value.dtype == torch.float64:
        return value
    return value.to(dtype)
