"""How long an audit takes, and how near it comes to what the device can multiply."""

from __future__ import annotations

import time

import torch

import jacdiag
from benchmarks._gpu.bench import Row
from benchmarks._gpu.shapes import Shape, build
from jacdiag.devices.accelerators import wait_for
from jacdiag.devices.float32_precision import full_precision


def product_rate(device: torch.device, size: int) -> float:
    """Return the float32 operations per second of a plain square product, without TF32."""
    a = torch.randn(size, size, device=device)
    times = []
    with full_precision():
        for _ in range(5):
            wait_for(device)
            begun = time.perf_counter()
            a @ a
            wait_for(device)
            times.append(time.perf_counter() - begun)
    return 2 * size**3 / min(times)


def audit_time(shape: Shape, device: torch.device, size_of_product: int) -> Row:
    """Time an audit of a shape.

    A product with a sub-layer's Jacobian counts as two operations per weight and token, without the
    scores of attention: 24 d^2 a layer and token, half of it for each sub-layer on the average.
    """
    # 1. The audit, and the rate of plain products.
    rate = product_rate(device, size_of_product)
    model, ids = build(shape, device)
    wait_for(device)
    begun = time.perf_counter()
    report = jacdiag.audit(model, ids, state="init")
    wait_for(device)
    seconds = time.perf_counter() - begun

    # 2. The share.
    assert report.cost is not None
    operations = report.cost.forward_equivalents * 12 * shape.width**2 * ids.numel()
    share = operations / seconds / rate
    norms = [record.branch_norm for record in report.sublayers]
    is_converged = all(norm is not None and norm.converged for norm in norms)

    # 3. What is demanded.
    limit = "" if shape.most_seconds is None else f" (at most {shape.most_seconds:g} s)"
    return Row(
        part="audit",
        what=f"{shape.name}, B {shape.batch}, T {shape.length}",
        figure=f"{seconds:.2f} s{limit}, {share:.1%} of the rate of plain float32 products",
        passes=is_converged,
        numbers={
            "seconds": seconds,
            "at_most_seconds": shape.most_seconds,
            "share_of_product_rate": share,
            "float32_operations_per_second": rate,
            "converged": is_converged,
            "products": report.cost.products,
            "peak_mb": report.cost.peak_memory_mb,
            "phases": report.cost.phases,
        },
    )
