"""Is a product right, do intervals hold, and how often does the host wait?"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import jacdiag
from benchmarks._gpu.bench import Case, NotHereError, Row
from benchmarks._gpu.shapes import Shape, build
from benchmarks._gpu.waits import check_counted, counted_waits
from jacdiag.spectra.interval import rounding_pad

CPU = torch.device("cpu")
_FIRST_WITH_TF32 = (8, 0)  # compute capability of Ampere
PRECISIONS = ("float32", "TF32", "bfloat16")
MOST_WAITS_PER_PRODUCT = 1
MOST_WAITS_PER_SUBLAYER = 30  # beyond those of its products


def error_of_products(shape: Shape, device: torch.device, precision: str) -> Row:
    """Compare J^T w of the first attention and the first FFN with float64 on the CPU.

    Products in TF32 and in bfloat16 are made here by hand: the library makes float32 ones whatever
    the process allows. That those two are outside the pad is the reason for it.

    Raises:
        NotHereError: the device has no such products.
    """
    # 1. TF32 is what CUDA makes of float32 if it may.
    if precision == "TF32":
        check_tf32(device)

    # 2. The product in float64, and on the device.
    model, ids = build(shape, CPU)
    sites = jacdiag.sites(model, ids)
    block = model.transformer["h"][0]
    errors = {}
    for part, norm in (("attn", "ln_1"), ("mlp", "ln_2")):
        x = sites.named(f"transformer.h.0.{part}").shortcut
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        truth = _pulled(block, part, norm, x.double(), w)
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        with _float32_products("high" if precision == "TF32" else "highest"):
            found = _pulled(
                copy.deepcopy(block), part, norm, x.to(device, dtype), w.to(device, dtype)
            )
        errors[part] = float((found - truth).norm() / truth.norm())

    # 3. Only float32 has to be inside.
    pad = rounding_pad(torch.float32, device)
    is_inside = max(errors.values()) <= pad
    text = ", ".join(f"{part} {error:.1e}" for part, error in errors.items())
    return Row(
        part="products",
        what=f"J^T w in {precision}",
        figure=f"{text}; {'inside' if is_inside else 'beyond'} the pad of {pad:.0e}",
        passes=is_inside if precision == "float32" else None,
        numbers={"errors": errors, "pad": pad, "inside_the_pad": is_inside},
    )


def check_tf32(device: torch.device) -> None:
    """Raise if the device makes float32 products in float32 even where TF32 is allowed.

    Raises:
        NotHereError: it does.
    """
    if device.type != "cuda":
        raise NotHereError(f"a device of kind {device.type} has no TF32")
    if torch.version.hip is not None:
        raise NotHereError("torch for ROCm makes no products in TF32 by this setting")
    capability = torch.cuda.get_device_capability(device)
    if capability < _FIRST_WITH_TF32:
        major, minor = capability
        raise NotHereError(f"a card of compute capability {major}.{minor} has no TF32, 8.0 has")


def _pulled(block: nn.Module, part: str, norm: str, x: Tensor, w: Tensor) -> Tensor:
    """Return J^T w of a sub-layer, in float64 on the CPU."""
    moved = copy.deepcopy(block).to(x.device, x.dtype)

    def branch(v: Tensor) -> Tensor:
        result: Tensor = getattr(moved, part)(getattr(moved, norm)(v))
        return result

    with sdpa_kernel(SDPBackend.MATH):
        _, pull = torch.func.vjp(branch, x)  # type: ignore[misc]
        pulled: Tensor = pull(w)[0].detach().cpu().double()
    return pulled


@contextmanager
def _float32_products(mode: str) -> Iterator[None]:
    """Make float32 products in TF32 ("high") or not ("highest")."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(mode)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def intervals_hold(shape: Shape, device: torch.device) -> Row:
    """Compare the intervals of an audit on the device with the norms of float64 on the CPU."""
    model, ids = build(shape, CPU)
    there = jacdiag.audit(copy.deepcopy(model).to(device), ids.to(device), state="init")
    truth = jacdiag.audit(model.double(), ids, state="init", dtype="float64", tol=1e-4)

    # A norm that was not measured holds nothing.
    outside = []
    for ours, exact in zip(there.sublayers, truth.sublayers, strict=True):
        interval, norm = ours.branch_norm, exact.branch_norm
        is_measured = interval is not None and norm is not None
        if not is_measured or not interval.lower <= norm.estimate <= interval.upper:  # type: ignore[union-attr]
            outside.append(ours.name)
    return Row(
        part="intervals",
        what=f"{len(there.sublayers)} norms against CPU float64",
        figure=f"{len(there.sublayers) - len(outside)} of {len(there.sublayers)} hold",
        passes=not outside,
        numbers={"outside": outside},
    )


def waits_of_an_audit(shape: Shape, device: torch.device) -> Row:
    """Count how often the host waits in an audit, for each product and each sub-layer.

    Raises:
        NotHereError: nothing counts the waits for this kind of device.
    """
    # 1. The first audit of a process loads kernels.
    check_counted(device)
    model, ids = build(shape, device)
    jacdiag.audit(model, ids, state="init")
    with counted_waits(device) as waits:
        report = jacdiag.audit(model, ids, state="init")

    # 2. What is allowed.
    assert report.cost is not None
    products, sublayers = report.cost.products or 1, len(report.sublayers)
    most = MOST_WAITS_PER_PRODUCT * products + MOST_WAITS_PER_SUBLAYER * sublayers
    return Row(
        part="waits",
        what="audit: waits of the host per product",
        figure=f"{waits.count / products:.2f} ({waits.count} in all, aim at most {most})",
        numbers={
            "waits": waits.count,
            "products": products,
            "sublayers": sublayers,
            "at_most": most,
            "reached": waits.count <= most,
        },
    )


def cases_of(shape: Shape, device: torch.device) -> list[Case]:
    """Return what is measured here."""
    cases = []
    for precision in PRECISIONS:
        measure = partial(error_of_products, shape, device, precision)
        cases.append(Case("products", f"J^T w in {precision}", measure))
    holds = partial(intervals_hold, shape, device)
    cases.append(Case("intervals", "norms against CPU float64", holds))
    waits = partial(waits_of_an_audit, shape, device)
    cases.append(Case("waits", "audit: waits of the host per product", waits))
    return cases
