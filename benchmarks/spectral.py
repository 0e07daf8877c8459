"""Cost of a spectral norm beside SciPy's svds and power iteration, and of a whole audit. GPT-2
124M, B 4, T 128.

Everything is measured in one run, each contest in rounds that take turns, and the ratios are
medians over rounds. How the peers are favoured stands in `_peers.py`.

    python benchmarks/spectral.py            about 10 minutes; writes results/spectral.json
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import scipy
import torch
from _peers import PEERS, TRUE_ERROR, Contest, branches, contests, median_time, timed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import jacdiag
from jacdiag.measure.branch_norms import Effort, Solver
from jacdiag.measure.linearization import linearise, residual_map
from jacdiag.pipeline.provenance import peak_memory_mb
from jacdiag.rules import decision_points
from jacdiag.rules.thresholds import load_thresholds
from jacdiag.sources import gpt
from jacdiag.sources.factory import seeded
from jacdiag.spectra import JacobianOperator, Solution
from jacdiag.trace.graph.recorder import record

RESULTS = Path(__file__).parent / "results" / "spectral.json"
SHAPES = {
    "full": {
        "sizes": {
            "n_layer": 12,
            "n_embd": 768,
            "n_head": 12,
            "vocab_size": 50304,
            "block_size": 128,
        },
        "batch": 4,
    },
    "quick": {
        "sizes": {"n_layer": 2, "n_embd": 96, "n_head": 4, "vocab_size": 512, "block_size": 32},
        "batch": 2,
    },
}


def build(shape: dict[str, Any]) -> tuple[gpt.GPT, Tensor]:
    with seeded(0):
        model = gpt.build("gpt2", **shape["sizes"]).eval()
        ids = torch.randint(
            shape["sizes"]["vocab_size"], (shape["batch"], shape["sizes"]["block_size"])
        )
    return model, ids


# -- the whole audit -------------------------------------------------------------------------------
def whole_audit(model: gpt.GPT, ids: Tensor) -> dict[str, Any]:
    """An audit with a clock on every product and every linearisation."""
    spent: list[float] = []
    inside: list[bool] = []  # a linearisation makes products of its own, which count once

    def clocked(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if inside:
                return original(*args, **kwargs)
            inside.append(True)
            try:
                with timed(spent):
                    return original(*args, **kwargs)
            finally:
                inside.pop()

        return call

    names = ("__init__", "pull_shaped", "products_of")
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
        "seconds": round(report.cost.seconds, 1),
        "products": report.cost.products,
        "share_outside_products": round(1 - sum(spent) / report.cost.seconds, 3),
        "phases": {k: round(v, 2) for k, v in report.cost.phases.items()},
        "branch_products_median": statistics.median(r.branch_norm.products for r in sub_layers),
        "all_norms_products_median": statistics.median(r.cost or 0 for r in sub_layers),
        "all_products_over_dearest_median": round(
            statistics.median(_over_dearest(r) for r in sub_layers), 2
        ),
        "converged": sum(r.branch_norm.converged for r in sub_layers),
        "sub_layers": len(sub_layers),
        "width_median": round(
            statistics.median(r.branch_norm.upper / r.branch_norm.lower - 1 for r in sub_layers), 4
        ),
    }


def _over_dearest(row: Any) -> float:
    spent = [
        i.products for i in (row.core_norm, row.branch_norm, row.residual_norm) if i is not None
    ]
    return sum(spent) / max(spent)


def refined(model: gpt.GPT, ids: Tensor) -> dict[str, Any]:
    """The price by the clock of all norms of a sub-layer to 5%, as an audit solves them, over that
    of its dearest norm alone.

    The linearisation is part of both prices. Every third sub-layer; alone and together take turns
    in coming first.
    """
    ratios = []
    for k, site in enumerate(list(jacdiag.sites(model, ids))[::3]):
        linearising: list[float] = []
        with timed(linearising):
            one = linearise(site)
        residual, owned, _ = residual_map(site, one.branch, one.dims)
        assert one.core is not None and residual is not None
        maps = {"core_norm": one.core, "branch_norm": one.branch, "residual_norm": residual}
        solver, together = Solver(one, Effort()), list[float]()
        alone: dict[str, list[float]] = {name: [] for name in maps}
        for turn in (k, k + 1):
            if turn % 2:
                with timed(together):
                    solver.to_width(maps)
            else:
                for name, operator in maps.items():
                    with timed(alone[name]):
                        solver.solve(operator, name)
        for inner in owned:
            inner.release()
        one.release()
        ratios.append(
            (linearising[0] + together[0])
            / (linearising[0] + max(spent for (spent,) in alone.values()))
        )
    return {
        "all_over_dearest_median": round(statistics.median(ratios), 2),
        "all": [round(r, 2) for r in ratios],
    }


def decided(model: gpt.GPT, ids: Tensor) -> dict[str, Any]:
    """What `--decide` spends where every norm lies over 30% from all thresholds: counts, no
    clock.
    """
    report = jacdiag.audit(model, ids, state="init", decide=True)
    limits = load_thresholds(None)
    norms, totals, ratios = [], [], []
    for row in report.sublayers:
        points = decision_points(
            kind=row.kind, placement=row.placement, layers=report.model.layers, thresholds=limits
        )
        found = {name: getattr(row, name) for name in ("core_norm", "branch_norm", "residual_norm")}
        if all(
            max(i.estimate / p, p / i.estimate) > 1.3
            for name, i in found.items()
            for p in points.get(name, ())
        ):
            spent = [interval.products for interval in found.values()]
            norms.append(max(spent))
            totals.append(row.cost)
            if sorted(spent)[1] == 1:  # one norm was solved, the others follow from it
                ratios.append(sum(spent) / max(spent))
    every = {name: [getattr(row, name).products for row in report.sublayers] for name in found}
    told = {
        "sub_layers": len(norms),
        "per_norm": every,
        "forwards": [row.cost for row in report.sublayers],
    }
    if not norms:
        return told
    return {
        **told,
        "norm_products_median": statistics.median(norms),
        "norm_products_max": max(norms),
        "sub_layer_forwards_median": statistics.median(totals),
        "sub_layer_forwards_max": max(totals),
        "inherited": len(ratios),
        "all_over_dearest_median": round(statistics.median(ratios), 2) if ratios else None,
    }


def every_sublayer(model: gpt.GPT, ids: Tensor) -> dict[str, Any]:
    """Forwards of the branch, by the clock, for a 5% interval of its norm, linearisation
    included.
    """
    forwards, products = [], []
    for site, plain, _ in branches(model, jacdiag.sites(model, ids)):
        contest = Contest(site.name, site, plain, [])
        decided_by_dataflow = site.dims

        def solve(
            contest: Contest = contest, dims: tuple[int, ...] | None = decided_by_dataflow
        ) -> Solution:
            # Finding out what is independent is part of the price: no solve knows it from another.
            contest.site.dims = dims
            return contest.solve(tol=0.05, confidence=0.999)

        solving = median_time(solve, 1)
        products.append(solve().products)
        forwards.append(solving / median_time(contest.forward, 9))
    median, most = statistics.median(forwards), max(forwards)
    return {
        "median": round(median, 1),
        "max": round(most, 1),
        "all": [round(f, 1) for f in forwards],
        "products_median": statistics.median(products),
        "products": products,
    }


def recording(model: gpt.GPT, ids: Tensor) -> dict[str, float]:
    """A recorded forward, and all of `sites`, in plain forwards; rounds take turns."""
    from jacdiag.trace.execution.skeleton import Skeleton

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


# -- memory: each in a process of its own ----------------------------------------------------------
def peak_of(what: str, shape: str) -> float:
    """Peak resident memory in MB of a fresh process that does `what`."""
    out = subprocess.run(
        [sys.executable, __file__, "--memory", what, "--shape", shape],
        capture_output=True,
        text=True,
    )
    out.check_returncode()
    return float(out.stdout)


def memory_child(what: str, shape: dict[str, Any]) -> None:
    model, ids = build(shape)
    if what == "step":
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)
        _, loss = model(ids, ids)
        loss.backward()
        optimizer.step()
    elif what == "audit":
        jacdiag.audit(model, ids, state="init")
    print(peak_memory_mb())


def memory(shape: str) -> dict[str, float]:
    sizes, batch = SHAPES[shape]["sizes"], SHAPES[shape]["batch"]
    vectors = 32  # capacity of the basis, which is on the left
    basis = vectors * batch * sizes["block_size"] * sizes["n_embd"] * 4 / 2**20
    peaks = {what: round(peak_of(what, shape)) for what in ("build", "step", "audit")}
    return {**{f"{k}_mb": v for k, v in peaks.items()}, "basis_mb": round(basis)}


# -- goals -----------------------------------------------------------------------------------------
def goals(result: dict[str, Any]) -> list[tuple[str, float | None, str, float]]:
    """(what, measured or None, relation, goal)."""
    usual = {
        peer: statistics.median(c["ratio"][peer] for c in result["contests"]) for peer in PEERS
    }
    mem, short = result["memory"], result["decided"]
    counted = result["audit"]["all_products_over_dearest_median"]
    return [
        (
            "forwards for a 5% interval, median sub-layer",
            result["every_sublayer"]["median"],
            "<=",
            32,
        ),
        ("times faster (median) than svds on jvp/vjp", usual["svds, jvp"], ">=", 10),
        ("times faster (median) than svds on our products", usual["svds, own products"], ">=", 3.5),
        ("times faster (median) than power iteration by jvp", usual["power, jvp"], ">=", 5),
        (
            "times faster (median) than power iteration on our products",
            usual["power, own products"],
            ">=",
            2.5,
        ),
        (
            "products of the dearest norm, decided, median sub-layer",
            short.get("norm_products_median"),
            "<=",
            16,
        ),
        ("forwards, decided, median sub-layer", short.get("sub_layer_forwards_median"), "<=", 24),
        (
            "all norms over the dearest where inherited ends suffice",
            short.get("all_over_dearest_median"),
            "<=",
            1.5,
        ),
        (
            "all norms over the dearest, refined, by the clock",
            result["refined"]["all_over_dearest_median"],
            "<=",
            2.9,
        ),
        ("all norms over the dearest, refined, by products", counted, "<=", 2.9),
        (
            "largest true error of ours",
            max(c["ours"]["true_error"] for c in result["contests"]),
            "<=",
            TRUE_ERROR,
        ),
        ("recording, in plain forwards", result["recording"]["recording_in_forwards"], "<=", 3),
        (
            "share of the audit outside products",
            result["audit"]["share_outside_products"],
            "<=",
            0.20,
        ),
        (
            "peak memory over a training step + basis",
            mem["audit_mb"] / (mem["step_mb"] + mem["basis_mb"]),
            "<=",
            1,
        ),
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
    result: dict[str, Any] = {
        "shape": SHAPES[shape],
        "torch": torch.__version__,
        "scipy": scipy.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }
    steps: dict[str, Callable[[], Any]] = {
        "recording": lambda: recording(model, ids),
        "contests": lambda: [c.play(4) for c in contests(model, ids)],
        "every_sublayer": lambda: every_sublayer(model, ids),
        "decided": lambda: decided(model, ids),
        "refined": lambda: refined(model, ids),
        "audit": lambda: whole_audit(model, ids),
        "memory": lambda: memory(shape),
    }
    for name, step in steps.items():
        begun = time.perf_counter()
        result[name] = step()
        print(
            f"[{time.perf_counter() - begun:.0f} s] {name}: {json.dumps(result[name])}",
            file=sys.stderr,
            flush=True,
        )
    result["goals"] = []
    for what, value, relation, goal in goals(result):
        if value is None:
            print(f"none  {what}")
            continue
        ok = value <= goal if relation == "<=" else value >= goal
        result["goals"].append(
            {"what": what, "measured": value, "relation": relation, "goal": goal, "reached": ok}
        )
        print(f"{'ok  ' if ok else 'MISS'}  {what:59s} {value:8.3g}   {relation} {goal:g}")
    if not args.quick:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
