"""Who stands beside jacdiag in `spectral.py`: SciPy's svds and power iteration, each on one
sequence of one sub-layer.

Every contender must come within 1% of the float64 truth, and each is favoured: a hand-written
branch, a pullback built once, for svds the loosest tolerance that gets there. Power iteration
cannot know that it has arrived, and a Lanczos run would go on to certify; both are stopped from
outside at the moment they are within 1%.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import jacdiag
from jacdiag.measure.linearization import linearise
from jacdiag.sources import gpt
from jacdiag.spectra import JacobianOperator, Solution, top_singular
from jacdiag.spectra.interval import ritz_values

TRUE_ERROR = 0.01
SVDS_TOLERANCE = 0.02  # of the eigenvalue of A^T A that ARPACK sees: 1% of the singular value
PEERS = ("svds, jvp", "svds, own products", "power, jvp", "power, own products")
Branch = Callable[[Tensor], Tensor]


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


# -- the peers, on one sequence --------------------------------------------------------------------
class Products:
    """J v and J^T w of a branch at x, on NumPy vectors of one sequence, counted."""

    def __init__(self, push: Branch, pull: Branch, like: Tensor) -> None:
        self.maps, self.like, self.count = (push, pull), like, 0

    def _apply(self, which: int, v: Any) -> Any:
        self.count += 1
        with torch.no_grad():
            y = self.maps[which](
                torch.from_numpy(np.ascontiguousarray(v)).to(self.like).view_as(self.like)
            )
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
    return Products(
        lambda v: operator.push(v.reshape(flat)), lambda w: operator.pull(w.reshape(flat)), x
    )


def run_svds(
    products: Products, tol: float = SVDS_TOLERANCE, seed: int = 0, solver: str = "arpack"
) -> float:
    n = products.like.numel()
    dtype = np.float64 if products.like.dtype == torch.float64 else np.float32
    matrix = LinearOperator((n, n), matvec=products.push, rmatvec=products.pull, dtype=dtype)
    start = np.random.default_rng(seed).standard_normal(n).astype(dtype)
    return float(
        svds(
            matrix,
            k=1,
            tol=tol,
            v0=start,
            return_singular_vectors=False,
            solver=solver,
            maxiter=200 if solver == "propack" else None,
        )[0]
    )


def run_power(products: Products, truth: float, seed: int = 0) -> float:
    """Power iteration on J^T J, stopped from outside as soon as it is within 1% of the truth."""
    v = np.random.default_rng(seed).standard_normal(products.like.numel()).astype(np.float32)
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
    site: jacdiag.trace.Sublayer
    plain: Branch  # the branch written by hand on the model's modules
    truths: list[float]  # float64, one per sequence

    def solve(self, seed: int = 0, **options: Any) -> Solution:
        """Linearises and solves. That sequences (and tokens) are independent is known, as it is to
        the peers.
        """
        one = linearise(self.site, seed)
        solution = top_singular(one.branch, start=one.start, **options)
        one.release()
        return solution

    def per_sequence(self, values: Any) -> Any:
        return values.reshape(len(self.truths), -1).max(1)

    def enough(self, seed: int) -> int:
        """The least number of products with which all sequences are within 1% of the truth, from
        this start.
        """
        solution = self.solve(seed, tol=1e-3)
        for spent in range(1, solution.products + 1):
            alphas, betas = solution.alphas[:, : (spent + 1) // 2], solution.betas[:, : spent // 2]
            theta = self.per_sequence(ritz_values(alphas, betas)[:, 0])
            if (theta >= np.array(self.truths) * (1 - TRUE_ERROR)).all():
                return spent
        raise AssertionError(f"{self.name}: not within 1% after {solution.products} products")

    def play(self, rounds: int) -> dict[str, Any]:
        """Each round has a random start of its own: ours to 1%, ours to a certified 5%, each peer
        on one sequence.
        """
        batch, x = len(self.truths), self.site.shortcut
        self.site.independent()
        enough = [self.enough(seed) for seed in range(rounds)]
        times: dict[str, list[float]] = {}
        errors = dict.fromkeys(("ours", *PEERS), 0.0)
        counts: dict[str, list[int]] = {}
        for turn in range(rounds):
            with timed(times.setdefault("ours", [])):
                solution = self.solve(turn, tol=0.0, max_products=enough[turn])
            with timed(times.setdefault("certified", [])):
                certified = self.solve(turn, tol=0.05, confidence=0.999)
            low, high = certified.lower.max(), certified.upper.max()
            assert low <= max(self.truths) <= high, (low, max(self.truths), high)
            found = self.per_sequence(solution.estimate)
            errors["ours"] = max(errors["ours"], self._error(found, np.array(self.truths)))
            counts.setdefault("ours", []).append(solution.products)
            counts.setdefault("certified", []).append(certified.products)
            row = turn % batch
            for peer in PEERS:
                with timed(times.setdefault(peer, [])):
                    value, products = self._peer(
                        peer, x[row : row + 1].contiguous(), self.truths[row], turn
                    )
                counts.setdefault(peer, []).append(products)
                errors[peer] = max(errors[peer], self._error(value, self.truths[row]))
        forward = median_time(self.forward, 15)
        ours = statistics.median(times["ours"])
        return {
            "sub_layer": self.name,
            "forward_ms": round(1e3 * forward, 2),
            "ours": {
                "products": counts["ours"],
                "seconds_per_sequence": round(ours / batch, 4),
                "true_error": errors["ours"],
                "forwards": round(ours / forward, 1),
            },
            "certified": {
                "products": counts["certified"],
                "width": round(float(high / low - 1), 4),
                "forwards": round(statistics.median(times["certified"]) / forward, 1),
                "true_error": self._error(
                    self.per_sequence(certified.estimate), np.array(self.truths)
                ),
            },
            "ratio": {
                peer: round(
                    statistics.median(
                        t * batch / o for t, o in zip(times[peer], times["ours"], strict=True)
                    ),
                    2,
                )
                for peer in PEERS
            },
            "peers": {
                peer: {
                    "products": counts[peer],
                    "seconds": round(statistics.median(times[peer]), 3),
                    "true_error": errors[peer],
                }
                for peer in PEERS
            },
        }

    def _peer(self, peer: str, one: Tensor, truth: float, seed: int) -> tuple[float, int]:
        method, by = peer.split(", ")
        with sdpa_kernel(SDPBackend.MATH):
            products = by_jvp(self.plain, one) if by == "jvp" else by_own(self.plain, one)
            value = (
                run_svds(products, seed=seed)
                if method == "svds"
                else run_power(products, truth, seed)
            )
        return value, products.count

    @staticmethod
    def _error(value: Any, truth: Any) -> float:
        return float(np.abs(1 - value / truth).max())

    def forward(self) -> None:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            self.plain(self.site.shortcut)


def branches(model: gpt.GPT, sites: Any) -> list[tuple[Any, Branch, Any]]:
    """Every sub-layer of a reference GPT with its branch written by hand, and the block that it
    lies in.
    """
    found = []
    for layer, block in enumerate(model.transformer["h"]):  # type: ignore[arg-type]
        for part, norm in (("attn", "ln_1"), ("mlp", "ln_2")):
            inner, first = getattr(block, part), getattr(block, norm)
            site = sites.named(f"transformer.h.{layer}.{part}")
            found.append((site, lambda x, a=inner, n=first: a(n(x)), block))
    return found


def contests(model: gpt.GPT, ids: Tensor) -> list[Contest]:
    """Attention and FFN of the first and of the middle layer; truths by svds in float64."""
    for p in model.parameters():
        p.requires_grad_(False)
    every = branches(model, jacdiag.sites(model, ids))
    made = []
    for site, plain, block in [*every[:2], *every[len(every) // 2 :][:2]]:
        block.double()
        with sdpa_kernel(SDPBackend.MATH):
            rows = [site.shortcut[row : row + 1].double() for row in range(ids.shape[0])]
            truths = [run_svds(by_own(plain, row), 1e-8) for row in rows]
        block.float()
        made.append(Contest(site.name, site, plain, truths))
    return made
