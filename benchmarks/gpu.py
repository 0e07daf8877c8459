"""On one GPU, under 10 minutes: is a product right, what do TF32 and bfloat16 do to it, how fast is
a whole audit.

Every row is checked against CPU float64 where it can be; a row that is wrong fails the script.
Products in TF32 and in bfloat16 are made here by hand: the library makes float32 ones whatever the
process allows.

    python benchmarks/gpu.py            on CUDA; prints, and writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --quick    small shapes on any device, seconds; prints only
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import jacdiag
from jacdiag.sources import gpt
from jacdiag.sources.factory import seeded
from jacdiag.spectra.interval import PAD

RESULTS = Path(__file__).parent / "results" / "gpu.json"
SMALL = {"n_layer": 2, "n_embd": 128, "n_head": 2, "vocab_size": 512, "block_size": 64}
GPT2 = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50304, "block_size": 1024}
# 6.6e9 parameters
WIDE = {"n_layer": 32, "n_embd": 4096, "n_head": 32, "vocab_size": 32000, "block_size": 512}
ONE_LAYER = {**GPT2, "n_layer": 1, "block_size": 128}
LIMITS = {"GPT-2 124M, B 4, T 1024": 10.0, "7B, B 1, T 512": 60.0}


def built(
    sizes: dict[str, int], batch: int, device: str, dtype: torch.dtype = torch.float32
) -> tuple[Any, Tensor]:
    with seeded(0), torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = gpt.build("gpt2", **sizes).eval()
        finally:
            torch.set_default_dtype(before)
        ids = torch.randint(sizes["vocab_size"], (batch, sizes["block_size"]))
    return model, ids


@contextmanager
def allowed(mode: str) -> Iterator[None]:
    """Float32 products in TF32 ("high") or not ("highest")."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(mode)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def pulled(fn: Callable[[Tensor], Tensor], x: Tensor, w: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        _, pull = torch.func.vjp(fn, x)  # type: ignore[misc]
        return pull(w.to(x))[0].detach().double().cpu()


def rounding(sizes: dict[str, int], device: str) -> list[dict[str, Any]]:
    """Relative error of J^T w in each precision, beside CPU float64, for attention and FFN of the
    first layer.
    """
    model, ids = built(sizes, 2, "cpu")
    sites = jacdiag.sites(model, ids)
    rows = []
    for part, norm in (("attn", "ln_1"), ("mlp", "ln_2")):
        block = model.transformer["h"][0]
        x = sites.named(f"transformer.h.0.{part}").shortcut
        w = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

        def run(
            dtype: torch.dtype,
            where: str,
            mode: str = "highest",
            b: Any = block,
            p: str = part,
            n: str = norm,
            at: Tensor = x,
            along: Tensor = w,
        ) -> Tensor:
            moved = copy.deepcopy(b).to(where, dtype)
            with allowed(mode):
                return pulled(
                    lambda v: getattr(moved, p)(getattr(moved, n)(v)), at.to(where, dtype), along
                )

        truth = run(torch.float64, "cpu")
        made = {"float32": run(torch.float32, device), "bfloat16": run(torch.bfloat16, device)}
        if device == "cuda":  # a CPU has no TF32
            made["TF32"] = run(torch.float32, device, "high")
        for name, found in made.items():
            error = float((found - truth).norm() / truth.norm())
            rows.append(
                {
                    "branch": part,
                    "products": name,
                    "error": error,
                    "inside_the_pad": error <= PAD["float32"],
                }
            )
    return rows


def same_intervals(sizes: dict[str, int], device: str) -> bool:
    """Whether the intervals of a device's audit hold the estimates of a CPU float64 audit of the
    same model.
    """
    model, ids = built(sizes, 2, "cpu")
    here = jacdiag.audit(copy.deepcopy(model).to(device), ids.to(device), state="init")
    truth = jacdiag.audit(model.double(), ids, state="init", dtype="float64", tol=1e-4)
    pairs = [
        (a.branch_norm, b.branch_norm) for a, b in zip(here.sublayers, truth.sublayers, strict=True)
    ]
    return all(
        a is not None and b is not None and a.lower <= b.estimate <= a.upper for a, b in pairs
    )


def matmul_rate(device: str, size: int) -> float:
    """Float32 operations per second of a plain square product."""
    a = torch.randn(size, size, device=device)
    times = []
    for _ in range(5):
        _wait(device)
        begun = time.perf_counter()
        a @ a
        _wait(device)
        times.append(time.perf_counter() - begun)
    return 2 * size**3 / min(times)


def audited(
    name: str, sizes: dict[str, int], batch: int, device: str, dtype: torch.dtype, rate: float
) -> dict[str, Any]:
    """One whole audit: seconds, and the share of the matrix-product rate that its products reach.

    A product with a sub-layer's Jacobian is counted as two operations per weight and token,
    attention scores left out: 24 d^2 a layer and token, half of it for each sub-layer on the
    average.
    """
    model, ids = built(sizes, batch, device, dtype)
    _wait(device)
    begun = time.perf_counter()
    report = jacdiag.audit(model, ids, state="init")
    _wait(device)
    seconds = time.perf_counter() - begun
    assert report.cost is not None
    operations = report.cost.forward_equivalents * 12 * sizes["n_embd"] ** 2 * ids.numel()
    return {
        "what": name,
        "seconds": round(seconds, 2),
        "limit": LIMITS.get(name),
        "share_of_matmul_rate": round(operations / seconds / rate, 3),
        "converged": all(
            r.branch_norm is not None and r.branch_norm.converged for r in report.sublayers
        ),
        "phases": {k: round(v, 2) for k, v in report.cost.phases.items()},
    }


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="small shapes on any device; nothing is written"
    )
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.quick:
        print("no CUDA device here; --quick runs small shapes on the CPU")
        return 0
    rate = matmul_rate(device, 512 if args.quick else 8192)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "float32_matmul_per_second": rate,
        "rounding": rounding(SMALL if args.quick else ONE_LAYER, device),
        "intervals_hold": same_intervals(SMALL, device),
    }
    shapes = (
        [("small", SMALL, 2, torch.float32)]
        if args.quick
        else [
            ("GPT-2 124M, B 4, T 1024", GPT2, 4, torch.float32),
            ("7B, B 1, T 512", WIDE, 1, torch.bfloat16),
        ]
    )
    result["audits"] = [
        audited(name, sizes, batch, device, dtype, rate) for name, sizes, batch, dtype in shapes
    ]
    wrong = not result["intervals_hold"]
    for row in result["rounding"]:
        wrong |= row["products"] == "float32" and not row["inside_the_pad"]
        verdict = "inside the pad" if row["inside_the_pad"] else "refused: more than the pad"
        print(
            f"{row['branch']:5s} J^T w in {row['products']:9s} error {row['error']:.1e}   {verdict}"
        )
    print(f"intervals hold the CPU float64 norms: {'yes' if result['intervals_hold'] else 'NO'}")
    for row in result["audits"]:
        wrong |= not row["converged"]
        limit = "" if row["limit"] is None else f" (at most {row['limit']:g})"
        share = row["share_of_matmul_rate"]
        print(f"{row['what']:25s} {row['seconds']:7.2f} s{limit}   {share:.1%} of the product rate")
    if not args.quick:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
