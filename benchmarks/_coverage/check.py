"""One family, strictly: what is found, whether it replays, and whether its norms are those of the
dense Jacobian.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import jacdiag
from _coverage import guest, norms
from _coverage.build import Built, CannotBuild, build
from _coverage.expect import FamilyFacts, family_facts
from _coverage.expected import Expected
from _coverage.told import told_by_class, told_cross
from jacdiag.measure.replay_check import verify_replay
from jacdiag.spectra import JacobianOperator, independent_dims, spectral_norm

DENSE_PER_KIND, DENSE_LIMIT = 2, 1024
CLOSE = 1e-5
INTERPRETING = {"per_layer", "by", "layers", "stacks", "plus", "nested", "told", "not_told"}


@dataclass
class Outcome:
    """What one family showed. `problems` maps a strict check to what went wrong; empty means that
    all held.
    """

    task: str
    family: str
    status: str = "ok"
    reason: str = ""
    expected: int = 0
    found: int = 0
    covered: float = 0.0
    dense: int = 0
    norms_why: str = ""
    interpreted: bool = False
    sublayers: list[dict[str, Any]] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def check(task: str, family: str) -> dict[str, Any]:
    """Builds, traces and checks one family."""
    out = Outcome(task, family)
    try:
        built = build(task, family)
    except CannotBuild as error:
        out.status, out.reason = "not built", str(error)
        return asdict(out)
    out.notes = [built.facts["why"]] if "why" in built.facts else []
    out.interpreted = bool(INTERPRETING & set(built.facts))
    try:
        family_told = family_facts(task, built.config, built.facts)
        out.expected = family_told.count
        sites = jacdiag.sites(built.model, **built.inputs)
    except Exception as error:
        out.problems["sites"] = f"{type(error).__name__}: {error} ({getattr(error, 'got', '')})"[
            :300
        ]
    else:
        _compare(out, sites, built, family_told)
    out.status = "failed" if out.problems else "ok"
    return asdict(out)


def _compare(out: Outcome, sites: Any, built: Built, told: FamilyFacts) -> None:
    out.found = sum(not s.nested for s in sites)
    nested = sum(s.nested for s in sites)
    if (out.found, nested) != (told.count, told.nested):
        out.problems["count"] = f"{out.found}+{nested} nested instead of {told.count}+{told.nested}"
    out.covered = _covered(sites, built.model)
    by_norms = norms.placements(list(sites), norms.calls_of(built.model, built.inputs))
    answers = [_expected(site, built, told) for site in sites]
    out.sublayers = [
        {**_row(site, answer), "placement_norms": placement}
        for site, answer, placement in zip(sites, answers, by_norms, strict=True)
    ]
    out.norms_why = built.facts.get("norms_why", "")
    wrong = []
    for site, answer in zip(sites, answers, strict=True):
        wrong += answer.differences(site)
    if wrong:
        out.problems["told"] = "; ".join(wrong)[:400]
    tests: dict[str, Callable[[], str]] = {
        "replay": lambda: _replay(sites),
        "adjoint": lambda: _adjoint(sites),
        "whole run": lambda: _whole(sites),
        "dense": lambda: _dense(built, out),
    }
    out.problems |= guest.failing(tests) | guest.problems(built, sites)


def _expected(site: Any, built: Built, told: FamilyFacts) -> Expected:
    """Return what the config and the names of classes tell of one sub-layer."""
    kind = told_by_class(site.name, built.model, built.facts)
    token_wise = None
    if kind not in (None, "conv"):
        token_wise = kind in ("mlp", "moe") or told_cross(site.name)
    placement = told.placement_of(site, kind)
    return Expected(site.name, kind, placement, token_wise=token_wise)


def _row(site: Any, expected: Expected) -> dict[str, Any]:
    return {
        "name": site.name,
        "kind": site.kind,
        "kind_told": expected.kind,
        "placement": site.placement,
        "placement_told": expected.placement,
        "token_wise": site.token_wise,
        "token_wise_told": expected.token_wise,
        "nested": site.nested,
        "parallel": site.parallel,
        "line": site.line.rsplit("/", 1)[-1],
    }


def _covered(sites: Any, model: Any) -> float:
    covered = sites.coverage.covered()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return sum(n for name, n in sizes.items() if name in covered) / max(1, sum(sizes.values()))


# -- the strict checks: each returns what is wrong, or nothing -------------------------------------
def _replay(sites: Any) -> str:
    if not sites.deterministic:
        return "two runs of the model differ"
    wrong = [s.name for s in sites if not torch.equal(s.branch(s.shortcut), s.value)]
    return f"not bit-exact: {', '.join(wrong)}" if wrong else ""


def _adjoint(sites: Any) -> str:
    """<J u, w> = <u, J^T w>, relative to |J u| |w|."""
    generator = torch.Generator().manual_seed(3)
    wrong = []
    for site in sites:
        operator = JacobianOperator(site.branch, site.shortcut, ())
        u = torch.randn(1, operator.domain, generator=generator)
        w = torch.randn(1, operator.codomain, generator=generator)
        ju, jw = operator.push(u).double(), operator.pull(w).double()
        gap = abs(float((ju * w).sum() - (u * jw).sum())) / max(float(ju.norm() * w.norm()), 1e-30)
        if not gap <= CLOSE:
            wrong.append(f"{site.name} {gap:.1e}")
        operator.release()
    return "; ".join(wrong)


def _whole(sites: Any) -> str:
    errors = verify_replay(sites)
    return "; ".join(f"{name} {error:.1e}" for name, error in errors.items() if not error <= CLOSE)


def _dense(built: Built, out: Outcome) -> str:
    """The interval of two sub-layers of each kind against the singular values of the whole
    Jacobian, all in float64.
    """
    wrong: list[str] = []
    seen: dict[tuple[str, str], int] = {}
    for site in jacdiag.sites(built.model, dtype=torch.float64, **built.inputs):
        key = (site.kind, site.placement)
        if seen.get(key, 0) == DENSE_PER_KIND or site.shortcut.numel() > DENSE_LIMIT:
            continue
        seen[key] = seen.get(key, 0) + 1
        out.dense += 1
        truth = _dense_norm(site)
        operator = JacobianOperator(site.branch, site.shortcut, ())
        generator = torch.Generator().manual_seed(0)
        dims = independent_dims(
            operator.pull_shaped,
            site.shortcut.shape,
            site.value.shape,
            site.feature_dim,
            site.shortcut.dtype,
            site.shortcut.device,
            generator,
        )
        # A thousand intervals at 0.999 would be expected to miss once; here a miss is to mean a
        # mistake.
        norm = spectral_norm(site.branch, site.shortcut, batch_dims=dims, confidence=1 - 1e-6)
        lower, upper = float(norm.lower.max()), float(norm.upper.max())
        if not lower <= truth * (1 + 1e-9) or not truth <= upper * (1 + 1e-9):
            wrong.append(f"{site.name}: {truth:.8g} outside [{lower:.8g}, {upper:.8g}]")
    return "; ".join(wrong)


def _dense_norm(site: Any) -> float:
    """By one backward pass per output."""
    with torch.enable_grad():
        x = site.shortcut.detach().clone().requires_grad_()
        y = site.branch(x).flatten()
        rows = [_row_of(y, x, k) for k in range(y.numel())]
    return float(torch.linalg.svdvals(torch.stack(rows).double())[0])


def _row_of(y: Tensor, x: Tensor, k: int) -> Tensor:
    if not y.requires_grad:
        return torch.zeros(x.numel(), dtype=x.dtype)
    (g,) = torch.autograd.grad(y[k], x, retain_graph=True, allow_unused=True)
    return torch.zeros(x.numel(), dtype=x.dtype) if g is None else g.flatten()
