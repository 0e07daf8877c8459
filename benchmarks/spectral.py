"""Cost of a spectral norm beside SciPy's svds and power iteration, and of a whole audit. GPT-2 124M, B 4, T 128.

Everything is measured in one run, each contest in rounds that take turns, and the ratios are medians over rounds. The
peers get what favours them: a hand-written branch on one sequence, a pullback built once, the loosest tolerance that
reaches a true error of 1% (svds), and the moment of arrival told from outside (power iteration).

    python benchmarks/spectral.py            about 8 minutes; prints, and writes benchmarks/results/spectral.json
    python benchmarks/spectral.py --quick    a small shape, seconds; prints only
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import jacdiag
from jacdiag.measure.linearise import linearise
from jacdiag.sources import gpt
from jacdiag.sources.factory import seeded
from jacdiag.spectra import JacobianOperator, top_singular
from jacdiag.trace.record import record

RESULTS = Path(__file__).parent / "results" / "spectral.json"
SHAPES = {
    "full": {"sizes": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50304, "block_size": 128}, "batch": 4},
    "quick": {"sizes": {"n_layer": 2, "n_embd": 96, "n_head": 4, "vocab_size": 512, "block_size": 32}, "batch": 2},
}
TRUE_ERROR = 0.01
SVDS_TOLERANCE = 0.02  # of the eigenvalue of A^T A that ARPACK sees: 1% of the singular value
Branch = Callable[[Tensor], Tensor]


def build(shape: dict[str, Any]) -> tuple[gpt.GPT, Tensor]:
    with seeded(0):
        model = gpt.build("gpt2", **shape["sizes"]).eval()
        ids = torch.randint(shape["sizes"]["vocab_size"], (shape["batch"], shape["sizes"]["block_size"]))
    return model, ids


@contextmanager
def timed(into: list[float]) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    into.append(time.perf_counter() - begun)


def median_time(fn: Callable[[], Any], rounds: int = 7) -> float:
    times: list[float] = []
    fn()
    for _ in range(rounds):
        with timed(times):
            fn()
    return statistics.median(times)


# -- the peers, on one sequence ---------------------------------------------------------------------------------------
class Products:
    """J v and J^T w of a branch at x, on NumPy vectors of one sequence, counted."""

    def __init__(self, push: Branch, pull: Branch, like: Tensor) -> None:
        self.maps, self.like, self.count = (push, pull), like, 0

    def _apply(self, which: int, v: Any) -> Any:
        self.count += 1
        with torch.no_grad():
            y = self.maps[which](torch.from_numpy(np.ascontiguousarray(v)).to(self.like).view_as(self.like))
        return y.reshape(-1).numpy()

    def push(self, v: Any) -> Any:
        return self._apply(0, v)

    def pull(self, w: Any) -> Any:
        return self._apply(1, w)


def by_jvp(fn: Branch, x: Tensor) -> Products:
    """torch.func as its documentation shows it: jvp for every J v, one pullback for all J^T w."""
    _, pullback = torch.func.vjp(fn, x)  # type: ignore[misc]
    return Products(lambda v: torch.func.jvp(fn, (x,), (v,))[1], lambda w: pullback(w)[0], x)


def by_own(fn: Branch, x: Tensor) -> Products:
    operator = JacobianOperator(fn, x)
    flat = operator.problems, -1
    return Products(lambda v: operator.push(v.reshape(flat)), lambda w: operator.pull(w.reshape(flat)), x)


def run_svds(products: Products, tol: float = SVDS_TOLERANCE) -> float:
    n = products.like.numel()
    dtype = np.float64 if products.like.dtype == torch.float64 else np.float32
    matrix = LinearOperator((n, n), matvec=products.push, rmatvec=products.pull, dtype=dtype)
    start = np.random.default_rng(0).standard_normal(n).astype(dtype)
    return float(svds(matrix, k=1, tol=tol, v0=start, return_singular_vectors=False)[0])


def run_power(products: Products, truth: float) -> float:
    """Power iteration on J^T J, stopped from outside as soon as it is within 1% of the truth."""
    v = np.random.default_rng(0).standard_normal(products.like.numel()).astype(np.float32)
    for _ in range(500):
        w = products.push(v / np.linalg.norm(v))
        estimate = float(np.linalg.norm(w))
        if estimate >= truth * (1 - TRUE_ERROR):
            return estimate
        v = products.pull(w)
    return estimate


@dataclass
class Contest:
    """One sub-layer: our solver on the whole batch beside the peers on one sequence each."""

    name: str
    site: Any
    plain: Branch  # the branch written by hand on the model's modules
    truths: list[float]  # float64, one per sequence

    def ours(self) -> Any:
        one = linearise(self.site, torch.Generator().manual_seed(0))
        solution = top_singular(one.branch, tol=0.05, confidence=0.999, generator=torch.Generator().manual_seed(1))
        one.release()
        return solution

    def play(self, rounds: int) -> dict[str, Any]:
        x, batch = self.site.shortcut, len(self.truths)
        times: dict[str, list[float]] = {}
        errors: dict[str, float] = {}
        counts: dict[str, float] = {}
        for turn in range(rounds):
            with timed(times.setdefault("ours", [])):
                solution = self.ours()
            interval = solution.interval(tuple(n for d, n in enumerate(x.shape) if d in self.dims()))
            assert interval.per_sequence is not None and interval.lower <= max(self.truths) <= interval.upper
            errors["ours"] = max(abs(1 - a / b) for a, b in zip(interval.per_sequence, self.truths, strict=True))
            counts["ours"] = solution.products
            row = turn % batch
            one, truth = x[row : row + 1].contiguous(), self.truths[row]
            with sdpa_kernel(SDPBackend.MATH):
                for peer, run in (
                    ("svds, jvp", lambda p: run_svds(p)), ("svds, own products", lambda p: run_svds(p)),
                    ("power, jvp", lambda p, t=truth: run_power(p, t)),
                    ("power, own products", lambda p, t=truth: run_power(p, t)),
                ):  # fmt: skip
                    make = by_jvp if peer.endswith("jvp") else by_own
                    with timed(times.setdefault(peer, [])):
                        products = make(self.plain, one)
                        value = run(products)
                    errors[peer] = max(errors.get(peer, 0.0), abs(1 - value / truth))
                    counts[peer] = products.count
        forward = median_time(self._forward)
        ours = statistics.median(times["ours"])
        ratios = {
            peer: statistics.median(t * batch / o for t, o in zip(times[peer], times["ours"], strict=True))
            for peer in times if peer != "ours"
        }  # fmt: skip
        return {
            "sub_layer": self.name, "forward_ms": round(1e3 * forward, 2), "products": int(counts["ours"]),
            "width": round(solution.interval().upper / solution.interval().lower - 1, 4),
            "forwards": round(ours / forward, 1), "seconds_per_sequence": round(ours / batch, 4),
            "true_error": errors["ours"], "ratio": {k: round(v, 2) for k, v in ratios.items()},
            "peers": {
                k: {"products": int(counts[k]), "seconds": round(statistics.median(times[k]), 3), "true_error": errors[k]}
                for k in ratios
            },
        }  # fmt: skip

    def dims(self) -> tuple[int, ...]:
        return (0, 1) if self.site.token_wise else (0,)

    def _forward(self) -> None:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            self.plain(self.site.shortcut)


def contests(model: gpt.GPT, ids: Tensor) -> list[Contest]:
    """Attention and FFN of the middle layer; truths by svds in float64."""
    layer = len(model.transformer["h"]) // 2  # type: ignore[arg-type]
    block = model.transformer["h"][layer]  # type: ignore[index]
    for p in model.parameters():
        p.requires_grad_(False)
    sites = {s.name: s for s in jacdiag.sites(model, ids)}
    made = []
    for part, norm in (("attn", "ln_1"), ("mlp", "ln_2")):
        site = sites[f"transformer.h.{layer}.{part}"]
        inner, first = getattr(block, part), getattr(block, norm)
        truths = []
        with sdpa_kernel(SDPBackend.MATH):
            block.double()
            for row in range(ids.shape[0]):
                products = by_own(lambda x, a=inner, n=first: a(n(x)), site.shortcut[row : row + 1].double())
                truths.append(run_svds(products, 1e-8))
            block.float()
        made.append(Contest(site.name, site, lambda x, a=inner, n=first: a(n(x)), truths))
    return made


# -- the whole audit --------------------------------------------------------------------------------------------------
def whole_audit(model: gpt.GPT, ids: Tensor) -> dict[str, Any]:
    """An audit with a clock on every product and every linearisation."""
    spent: list[float] = []

    def clocked(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with timed(spent):
                return original(*args, **kwargs)

        return call

    names = ("__init__", "_push", "_pull", "pull_shaped")
    originals = {name: getattr(JacobianOperator, name) for name in names}
    for name, original in originals.items():
        setattr(JacobianOperator, name, clocked(original))
    try:
        report = jacdiag.audit(model, ids, state="init")
    finally:
        for name, original in originals.items():
            setattr(JacobianOperator, name, original)
    assert report.cost is not None
    sub_layers = [row for row in report.sublayers if row.branch_norm is not None]
    return {
        "seconds": round(report.cost.seconds, 1), "products": report.cost.products,
        "share_outside_products": round(1 - sum(spent) / report.cost.seconds, 3),
        "phases": {k: round(v, 2) for k, v in report.cost.phases.items()},
        "branch_products_median": statistics.median(r.branch_norm.products for r in sub_layers),
        "all_norms_products_median": statistics.median(r.cost or 0 for r in sub_layers),
        "converged": sum(r.branch_norm.converged for r in sub_layers), "sub_layers": len(sub_layers),
        "width_median": round(statistics.median(r.branch_norm.upper / r.branch_norm.lower - 1 for r in sub_layers), 4),
    }  # fmt: skip


def every_sublayer(model: gpt.GPT, ids: Tensor) -> dict[str, Any]:
    """Forwards of the branch, by the clock, for a 5% interval of its norm, linearisation included."""
    forwards = []
    for site in jacdiag.sites(model, ids):

        def solve(site: Any = site) -> None:
            one = linearise(site, torch.Generator().manual_seed(0))
            top_singular(one.branch, tol=0.05, confidence=0.999, generator=torch.Generator().manual_seed(1))
            one.release()

        def forward(site: Any = site) -> None:
            with torch.no_grad():
                site.branch(site.shortcut)

        forwards.append(median_time(solve, 1) / median_time(forward, 5))
    return {"median": round(statistics.median(forwards), 1), "max": round(max(forwards), 1), "all": [round(f, 1) for f in forwards]}


def recording(model: gpt.GPT, ids: Tensor) -> dict[str, float]:
    """A recorded forward, and all of `sites`, in plain forwards; rounds take turns."""
    from jacdiag.trace.skeleton import Skeleton

    skeleton = Skeleton(model)
    plain: list[float] = []
    taped: list[float] = []
    whole: list[float] = []
    for _ in range(8):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), timed(plain):
            model(ids)
        with timed(taped):
            record(skeleton, (ids,), {}, torch.float32)
        with timed(whole):
            jacdiag.sites(model, ids)
    ratio = [b / a for a, b in zip(plain[1:], taped[1:], strict=True)]
    sites = [b / a for a, b in zip(plain[1:], whole[1:], strict=True)]
    return {
        "plain_forward_ms": round(1e3 * statistics.median(plain[1:]), 1),
        "recording_in_forwards": round(statistics.median(ratio), 2),
        "sites_in_forwards": round(statistics.median(sites), 2),
    }


# -- memory: each in a process of its own -----------------------------------------------------------------------------
def peak_of(what: str, shape: str) -> float:
    """Peak resident memory in MB of a fresh process that does `what`."""
    out = subprocess.run([sys.executable, __file__, "--memory", what, "--shape", shape], capture_output=True, text=True)
    out.check_returncode()
    return float(out.stdout)


def memory_child(what: str, shape: dict[str, Any]) -> None:
    import resource

    model, ids = build(shape)
    if what == "step":
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)
        _, loss = model(ids, ids)
        loss.backward()
        optimizer.step()
    elif what == "audit":
        jacdiag.audit(model, ids, state="init")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def memory(shape: str) -> dict[str, float]:
    sizes, batch = SHAPES[shape]["sizes"], SHAPES[shape]["batch"]
    vectors = 2 * 32  # left and right, capacity of the basis
    basis = vectors * batch * sizes["block_size"] * sizes["n_embd"] * 4 / 2**20
    peaks = {what: round(peak_of(what, shape)) for what in ("build", "step", "audit")}
    return {**{f"{k}_mb": v for k, v in peaks.items()}, "basis_mb": round(basis)}


# -- goals ------------------------------------------------------------------------------------------------------------
def goals(result: dict[str, Any]) -> list[tuple[str, float, str, float]]:
    """(what, measured, relation, goal)."""
    worst = {peer: min(c["ratio"][peer] for c in result["contests"]) for peer in result["contests"][0]["ratio"]}
    mem = result["memory"]
    return [
        ("forwards for a 5% interval, median sub-layer", result["every_sublayer"]["median"], "<=", 40),
        ("times faster than svds on jvp/vjp", worst["svds, jvp"], ">=", 8),
        ("times faster than svds on our products", worst["svds, own products"], ">=", 3.5),
        ("times faster than power iteration by jvp", worst["power, jvp"], ">=", 4),
        ("times faster than power iteration on our products", worst["power, own products"], ">=", 2.5),
        ("largest true error of ours", max(c["true_error"] for c in result["contests"]), "<=", TRUE_ERROR),
        ("recording, in plain forwards", result["recording"]["recording_in_forwards"], "<=", 3),
        ("share of the audit outside products", result["audit"]["share_outside_products"], "<=", 0.25),
        ("peak memory over a training step + basis", mem["audit_mb"] / (mem["step_mb"] + mem["basis_mb"]), "<=", 1),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small shape; nothing is written")
    parser.add_argument("--memory", choices=("build", "step", "audit"), help=argparse.SUPPRESS)
    parser.add_argument("--shape", choices=tuple(SHAPES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        memory_child(args.memory, SHAPES[args.shape])
        return 0
    shape = "quick" if args.quick else "full"
    model, ids = build(SHAPES[shape])
    result: dict[str, Any] = {"shape": SHAPES[shape], "torch": torch.__version__, "scipy": scipy.__version__,
                              "machine": platform.machine(), "threads": torch.get_num_threads(),
                              "cpus": os.cpu_count()}  # fmt: skip
    steps: dict[str, Callable[[], Any]] = {
        "recording": lambda: recording(model, ids),
        "contests": lambda: [c.play(4) for c in contests(model, ids)],
        "every_sublayer": lambda: every_sublayer(model, ids),
        "audit": lambda: whole_audit(model, ids),
        "memory": lambda: memory(shape),
    }
    for name, step in steps.items():
        begun = time.perf_counter()
        result[name] = step()
        print(f"[{time.perf_counter() - begun:.0f} s] {name}: {json.dumps(result[name])}", file=sys.stderr, flush=True)
    result["goals"] = []
    for what, value, relation, goal in goals(result):
        ok = value <= goal if relation == "<=" else value >= goal
        result["goals"].append({"what": what, "measured": value, "relation": relation, "goal": goal, "reached": ok})
        print(f"{'ok  ' if ok else 'MISS'}  {what:52s} {value:8.3g}   {relation} {goal:g}")
    if not args.quick:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
