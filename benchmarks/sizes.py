"""Products to a true error of 1% on one sequence, beside every peer, over width and length: a GPT-2
layer, B 1.

Counts decide; they depend on seeds alone. Times stand beside them and depend on the machine. Every
method is favoured as in `_peers.py`: it is stopped from outside as soon as it is within 1% of the
float64 truth, and svds, which cannot be stopped, is given the loosest tolerance that gets there.

    python benchmarks/sizes.py               sizes with T d up to 200,000; writes results/sizes.json
    python benchmarks/sizes.py --most inf    all sizes, d up to 2048 and T up to 1024; those in the
                                             file are kept
    python benchmarks/sizes.py --again       those in the file too
    python benchmarks/sizes.py --without svd_lowrank    an hour less at the largest size, where it
                                                        takes 300 products
    python benchmarks/sizes.py --quick       one small size, seconds; prints only
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _peers import TRUE_ERROR, Contest, Products, branches, by_jvp, by_own, run_power, run_svds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import jacdiag
from jacdiag.sources import gpt
from jacdiag.sources.factory import seeded
from jacdiag.trace import Sublayer

RESULTS = Path(__file__).parent / "results" / "sizes.json"
WIDTHS, LENGTHS = (256, 768, 2048), (64, 256, 1024)
FEWER = 1.8
DENSE_LIMIT = 2**27  # numbers in all per-token Jacobians together
TOLERANCES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.005)  # of svds, loosest first
Map = Callable[[Tensor], Tensor]
Found = tuple[float, int | None]  # value, products


def loosest(plain: Map, x: Tensor, truth: float, seed: int, solver: str) -> float:
    """The loosest tolerance with which svds is within 1%; finding it is not counted."""
    for tol in TOLERANCES:
        if abs(1 - run_svds(by_own(plain, x), tol, seed, solver) / truth) <= TRUE_ERROR:
            return tol
    return TOLERANCES[-1]


def run_lowrank(products: Products, truth: float, width: int, seed: int) -> float:
    """The algorithm of torch.svd_lowrank (Halko et al., 5.1), which takes a matrix only; a column
    costs one product.
    """
    n = products.like.numel()
    block = np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)
    for _ in range(200):
        image = np.stack([products.push(column) for column in block.T], 1)
        q, _ = np.linalg.qr(image)
        back = np.stack([products.pull(column) for column in q.T], 1)
        value = float(np.linalg.svd(back, compute_uv=False)[0])
        if value >= truth * (1 - TRUE_ERROR):
            break
        block, _ = np.linalg.qr(back)
    return value


def run_dense(plain: Map, x: Tensor) -> float:
    """Every token's Jacobian by jacrev, and its singular values."""
    jacobians = torch.func.vmap(torch.func.jacrev(lambda token: plain(token[None, None])[0, 0]))(
        x[0]
    )
    return float(torch.linalg.svdvals(jacobians)[:, 0].max())


def peers(
    site: Sublayer, plain: Map, truth: float, seeds: int
) -> dict[str, Callable[[int], Found]]:
    """Name -> a run from a seed. Power iteration by double backward is power iteration on our own
    products.
    """
    x = site.shortcut

    def counted(
        by: Callable[..., Products], run: Callable[[Products, int], float]
    ) -> Callable[[int], Found]:
        def go(seed: int) -> Found:
            products = by(plain, x)
            return run(products, seed), products.count

        return go

    with sdpa_kernel(SDPBackend.MATH):
        tols = {
            (s, seed): loosest(plain, x, truth, seed, s)
            for s in ("arpack", "propack")
            for seed in range(seeds)
        }
    found = {
        "svds ARPACK": counted(
            by_own, lambda p, seed: run_svds(p, tols["arpack", seed], seed, "arpack")
        ),
        "svds PROPACK": counted(
            by_own, lambda p, seed: run_svds(p, tols["propack", seed], seed, "propack")
        ),
        "power, jvp": counted(by_jvp, lambda p, seed: run_power(p, truth, seed)),
        "power, double backward": counted(by_own, lambda p, seed: run_power(p, truth, seed)),
        "svd_lowrank, q 2": counted(by_own, lambda p, seed: run_lowrank(p, truth, 2, seed)),
        "svd_lowrank, q 6": counted(by_own, lambda p, seed: run_lowrank(p, truth, 6, seed)),
    }
    if site.token_wise and x.shape[1] * x.shape[2] ** 2 <= DENSE_LIMIT:
        found["dense"] = lambda _: (run_dense(plain, x), None)
    return found


def compare(
    site: Sublayer, plain: Map, truth: float, seeds: int, without: tuple[str, ...]
) -> dict[str, Any]:
    """One sub-layer of one size: median products, largest true error and median seconds of every
    method asked for.
    """
    contest = Contest(site.name, site, plain, [truth])
    needed = {seed: contest.enough(seed) for seed in range(seeds)}

    def ours(seed: int) -> Found:
        solution = contest.solve(seed, tol=0.0, max_products=needed[seed])
        return float(solution.estimate.max()), solution.products

    rows = {}
    for name, run in {"ours": ours, **peers(site, plain, truth, seeds)}.items():
        if name.startswith(without):
            continue
        values, counts, seconds = [], [], []
        for seed in range(seeds):
            begun = time.perf_counter()
            with sdpa_kernel(SDPBackend.MATH):
                value, count = run(seed)
            seconds.append(time.perf_counter() - begun)
            values.append(abs(1 - value / truth))
            counts += [] if count is None else [count]
        rows[name] = {
            "products": statistics.median(counts) if counts else None,
            "true_error": max(values),
            "seconds": round(statistics.median(seconds), 4),
        }
    there = [
        r["products"]
        for n, r in rows.items()
        if n != "ours" and r["products"] and r["true_error"] <= TRUE_ERROR
    ]
    fewer = round(min(there) / rows["ours"]["products"], 2)
    return {"sub_layer": site.name, "methods": rows, "fewer_than_best_peer": fewer}


def size(
    width: int, length: int, seeds: int, known: set[tuple[int, int, str]], without: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """The rows of one size that are not known yet; at the largest, one takes an hour."""
    sizes = {
        "n_layer": 1,
        "n_embd": width,
        "n_head": max(1, width // 64),
        "vocab_size": 512,
        "block_size": length,
    }
    with seeded(0):
        model = gpt.build("gpt2", **sizes).eval()
        ids = torch.randint(512, (1, length))
    for p in model.parameters():
        p.requires_grad_(False)
    for site, plain, block in branches(model, jacdiag.sites(model, ids)):
        if (width, length, site.name) in known:
            continue
        block.double()
        with sdpa_kernel(SDPBackend.MATH):
            truth = run_svds(by_own(plain, site.shortcut.double()), 1e-8)
        block.float()
        yield {"d": width, "T": length, **compare(site, plain, truth, seeds, without)}


def kept(seeds: int) -> list[dict[str, Any]]:
    """Rows of an earlier run with as many seeds and the same torch: counts depend on nothing
    else.
    """
    held = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    same = (held.get("seeds"), held.get("torch")) == (seeds, torch.__version__)
    return list(held["rows"]) if same else []


def _save(rows: list[dict[str, Any]], seeds: int) -> None:
    result = {
        "goal": FEWER,
        "true_error": TRUE_ERROR,
        "seeds": seeds,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small size; nothing is written")
    parser.add_argument("--most", type=float, default=2e5, help="largest T d")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--again", action="store_true", help="run what the file holds, too")
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        help="a method to leave out, by how its name begins",
    )
    args = parser.parse_args()
    shapes = (
        [(64, 32)]
        if args.quick
        else [(d, t) for d in WIDTHS for t in LENGTHS if d * t <= args.most]
    )
    rows = [] if args.quick or args.again else kept(args.seeds)
    known = {(row["d"], row["T"], row["sub_layer"]) for row in rows}
    for width, length in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
        for row in size(width, length, args.seeds, known, tuple(args.without)):
            rows.append(row)
            counts = ", ".join(
                f"{n} {m['products']}"
                for n, m in row["methods"].items()
                if m["products"] is not None
            )
            ok = "ok  " if row["fewer_than_best_peer"] >= FEWER else "MISS"
            print(
                f"{ok}  d {width:4d}  T {length:4d}  {row['sub_layer'][-4:]:>4s}  "
                f"{row['fewer_than_best_peer']:.2f} times fewer: {counts}",
                flush=True,
            )
            if not args.quick:
                _save(rows, args.seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
