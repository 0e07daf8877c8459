"""Which remedies come into question for a report: the paper's recipes, the contract's, and modules
for a begun run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from jacdiag.records import ContractRecord, Report, WeightRecord
from jacdiag.remedies.changes import (
    Change,
    Draw,
    Fill,
    NormOutput,
    Reparametrise,
    Scale,
    ScaleOutput,
    Spare,
    Weights,
)
from jacdiag.rules import Deviation, deviations_of
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.remedy_targets import aims
from jacdiag.rules.schemes import INNER, RESIDUAL, VECTORS
from jacdiag.rules.thresholds import Thresholds

_LARGER = {"JD102", "JD103", "JD104", "JD105", "JD110"}  # what a larger shortcut is tried against
_SMALLER = {"JD101", "JD103", "JD104", "JD105"}  # what smaller matrices are tried against
_FREE = "no parameter; one multiplication per token"
_PLAIN = ("normal", "truncated", "uniform")  # families of what was drawn element by element
_SAME = 1.1  # times: two stds that are one within sampling
_ANEW = "a new initialisation: before the first step only"


@dataclass(frozen=True)
class Remedy:
    """A change to a model, not yet tried.

    Attributes:
        name, title, price: for the report.
        size: how much it changes, to compare with other remedies only; the smallest sufficient one
            is recommended.
        keeps_function: meant to leave the function as it is.
    """

    name: str
    title: str
    changes: tuple[Change, ...]
    price: str
    size: float
    keeps_function: bool = False

    def apply(self, model: nn.Module) -> None:
        for change in self.changes:
            change.apply(model)

    def __add__(self, other: Remedy) -> Remedy:
        return Remedy(
            f"{self.name} + {other.name}",
            f"{self.title}; {other.title}",
            (*self.changes, *other.changes),
            "; ".join(dict.fromkeys((self.price, other.price))),
            self.size + other.size,
            self.keeps_function and other.keeps_function,
        )


def remedies_for(
    report: Report, model: nn.Module, thresholds: Thresholds, *, begun: bool = False
) -> list[Remedy]:
    """The remedies that come into question, the smallest first; [] where nothing calls for one.

    Args:
        report: of `model`.
        thresholds: how far a branch is scaled down.
        begun: the run has begun: modules and reparametrisations, no new draws.
    """
    contract, codes = report.contract, aims(report)
    if contract is None:
        return []
    if begun:
        return list(_modules(report, contract, thresholds))
    if not codes:
        return []
    restored = _baseline(report, contract)
    others = _drawn_or_scaled(report, contract, model, codes)
    found = [*others, *([restored, *(restored + other for other in others)] if restored else [])]
    return sorted(found, key=lambda remedy: remedy.size)


def _drawn_or_scaled(
    report: Report, contract: ContractRecord, model: nn.Module, codes: Sequence[str]
) -> list[Remedy]:
    """The recipes of the contract and of the paper, alone and together."""
    by_weight = [
        r
        for r in (_contract(contract, codes), _tied(contract, model, codes), _spared(report, codes))
        if r
    ]
    first = [_joined(by_weight)] if by_weight else []
    shortcut = list(_embedding(report, contract, model)) if _LARGER & set(codes) else []
    matrices = list(_matrices(report, contract, codes)) if _SMALLER & set(codes) else []
    pairs = [
        pair for other in matrices if shortcut for pair in _pairs(report, contract, model, other)
    ]
    alone = (
        []
        if by_weight and any(c.startswith("JD2") for c in codes)
        else [*shortcut, *matrices, *pairs]
    )
    joined = [first[0] + other for other in (*shortcut, *matrices, *pairs)] if first else []
    return [*first, *alone, *joined]


def _pairs(
    report: Report, contract: ContractRecord, model: nn.Module, matrices: Remedy
) -> Iterator[Remedy]:
    """A larger shortcut beside smaller matrices. A table that both draw is the shortcut's, one that
    is scaled has the std that it is drawn with.
    """
    stds = {n: c.std for c in matrices.changes if isinstance(c, Draw) for n in c.weights.names}
    for one in _embedding(report, contract, model, stds):
        tables = {name for c in one.changes if isinstance(c, Draw) for name in c.weights.names}
        kept = tuple(
            c
            for c in matrices.changes
            if not (isinstance(c, Draw) and tables >= set(c.weights.names))
        )
        apart = len(kept) < len(matrices.changes)
        title = (
            matrices.title.replace("all matrices", "all other matrices")
            if apart
            else matrices.title
        )
        yield one + replace(matrices, title=title, changes=kept)


def _joined(remedies: Sequence[Remedy]) -> Remedy:
    made, *others = remedies
    for other in others:
        made += other
    return made


# -- the two conditions of the paper ---------------------------------------------------------------
def _embedding(
    report: Report,
    contract: ContractRecord,
    model: nn.Module,
    drawn: Mapping[str, float] | None = None,
) -> Iterator[Remedy]:
    """Large shortcut: scaled-embed and embed-ln of the paper, and a table drawn with std 1 where it
    is not the head.

    `drawn`: the std of weights that are drawn anew beside it.
    """
    stds = drawn or {}
    width = report.model.width
    tables = [
        w
        for w in contract.weights
        if w.role == "embedding" and len(w.shape) == 2 and w.shape[1] == width
    ]
    owners = [(w, owner) for w in tables if (owner := _owner(model, w.parameter))]
    if not width or not tables:
        return
    if len(owners) == len(tables):
        names = tuple(dict.fromkeys(owner for _, owner in owners))
        root, std = math.sqrt(width), max(stds.get(w.parameter, w.std or 0.0) for w in tables)
        text = f"sqrt(d), d = {width}"
        title = f"multiply the embedding by √d = {plain(root)}"
        yield Remedy("scaled-embed", title, (ScaleOutput(names, root, text),), _FREE, 2.0)
        if 0 < std * root < 1:
            factor = float(f"{1 / std:.4g}")
            yield Remedy(
                "unit-embed",
                f"multiply the embedding by {plain(factor)}, to std 1",
                (ScaleOutput(names, factor, "to std 1"),),
                _FREE,
                2.5,
            )
        price = f"{2 * width * len(names):,} parameters and a LayerNorm per token"
        yield Remedy(
            "embed-ln",
            "a LayerNorm on the embedding",
            tuple(NormOutput(n, width) for n in names),
            price,
            3.0,
        )
    if not contract.tied:
        draws = tuple(_draws(contract, tables, 1.0, "1"))
        yield Remedy(
            "std-1-embed",
            "draw the embedding with std 1, and spare it weight decay",
            draws,
            _ANEW,
            3.5,
        )


def _owner(model: nn.Module, parameter: str) -> str:
    """The module whose output is the looked-up table; "" where there is none that stands for it."""
    owner = parameter.rpartition(".")[0]
    return (
        owner
        if owner and len(list(model.get_submodule(owner).parameters(recurse=False))) == 1
        else ""
    )


def _matrices(report: Report, contract: ContractRecord, codes: Sequence[str]) -> Iterator[Remedy]:
    """Small sub-layers: scaling with depth where it is missing; the init of the field."""
    layers, width = max(report.model.layers, 1), report.model.width
    inner = [w for w in contract.weights if w.role in INNER and w.std]
    outer = [w for w in contract.weights if w.role in RESIDUAL and w.std]
    if not outer:
        return
    root = math.sqrt(2 * layers)
    largest = max((w.std or 0.0 for w in inner), default=0.0)
    if layers > 1 and max(w.std or 0.0 for w in outer) > 0.7 * largest:
        scaled = tuple(
            Scale(weights, 1 / root, f"1/sqrt(2*N), N = {layers}")
            for weights in _groups(contract, outer)
        )
        yield Remedy(
            "depth-scaling", f"W_O and W_2 times 1/√(2N) = {plain(1 / root)}", scaled, _ANEW, 4.0
        )
    if width:
        s = math.sqrt(2 / (5 * width))
        draws = (
            *_draws(contract, inner, s, f"sqrt(2/(5*d)), d = {width}"),
            *_draws(
                contract, outer, s / root, f"sqrt(2/(5*d))/sqrt(2*N), d = {width}, N = {layers}"
            ),
            *_outside(contract, s, f"sqrt(2/(5*d)), d = {width}", codes),
        )
        title = (
            f"draw all matrices with s = √(2/(5d)) = {plain(s)}, W_O and W_2 with s/√(2N) = "
            f"{plain(s / root)}"
        )
        yield Remedy("small-init", title, draws, _ANEW, 5.0)


def _outside(
    contract: ContractRecord, s: float, formula: str, codes: Sequence[str]
) -> Iterator[Draw]:
    """Embedding, positions and head: the small init draws these with s too.

    An embedding that already makes the shortcut large enough is not made smaller: 1 is the scheme's
    other std for it.
    """
    for w in contract.weights:
        if (
            w.role not in ("embedding", "positions", "head")
            or w.family not in _PLAIN
            or len(w.shape) != 2
        ):
            continue
        larger = w.role == "embedding" and "JD102" not in codes and (w.std or 0.0) > _SAME * s
        if not larger:
            yield from _draws(contract, [w], s, formula)
        elif w.parameter not in contract.tied and not 1 / _SAME < (w.std or 0.0) < _SAME:
            yield from _draws(contract, [w], 1.0, "1")


def _draws(
    contract: ContractRecord, weights: Iterable[WeightRecord], std: float, formula: str
) -> Iterator[Draw]:
    kept = list(weights)
    for uniform in (False, True):
        mine = [w for w in kept if (w.family == "uniform") is uniform]
        for group in _groups(contract, mine):
            yield Draw(group, std, formula, uniform)


def _groups(contract: ContractRecord, weights: Iterable[WeightRecord]) -> Iterator[Weights]:
    """Weights by name pattern."""
    names = [w.parameter for w in contract.weights]
    found: dict[str, list[WeightRecord]] = {}
    for weight in weights:
        found.setdefault(weight.pattern, []).append(weight)
    for pattern, group in found.items():
        yield Weights.of([w.parameter for w in group], pattern, names, group[0].role)


# -- the init contract -----------------------------------------------------------------------------
def _contract(contract: ContractRecord, codes: Sequence[str]) -> Remedy | None:
    """Every weight that departs from its contract, brought to what the contract says."""
    if not any(code in ("JD201", "JD202", "JD203", "JD204", "JD205") for code in codes):
        return None
    found: dict[tuple[str, float], list[Deviation]] = {}
    for one in deviations_of(contract):
        if one.section:
            continue  # to draw the entire matrix again would change its other rows
        found.setdefault((one.weight.pattern, one.value), []).append(one)
    changes, names = list[Change](), [w.parameter for w in contract.weights]
    for (pattern, value), group in found.items():
        weights = Weights.of(
            [d.weight.parameter for d in group], pattern, names, group[0].weight.role
        )
        vector = group[0].weight.role in VECTORS or len(group[0].weight.shape) < 2
        uniform = group[0].weight.family == "uniform"
        changes.append(
            Fill(weights, value) if vector else Draw(weights, value, group[0].formula, uniform)
        )
    if not changes:
        return None
    formulas = dict.fromkeys(d[0].formula for d in found.values())
    how = f"with {next(iter(formulas))}" if len(formulas) == 1 else "as the contract says"
    return Remedy(
        "contract",
        f"initialise {_shown(pattern for pattern, _ in found)} {how}",
        tuple(changes),
        _ANEW,
        1.0,
    )


def _baseline(report: Report, contract: ContractRecord) -> Remedy | None:
    """Every weight that departs from the recorded baseline, as it was there."""
    before = report.baseline
    names = dict.fromkeys(
        n for f in report.findings if f.code == "JD110" for n in f.evidence.get("parameters", ())
    )
    if before is None or not names:
        return None
    found: dict[tuple[str, float, bool, bool], list[WeightRecord]] = {}
    for weight in (w for w in contract.weights if w.parameter in names):
        old = before.weights[weight.parameter]
        constant = old["family"] in ("zero", "constant")
        value = float(f"{(old['value'] or 0.0) if constant else old['std']:.6g}")
        found.setdefault((weight.pattern, value, constant, old["family"] == "uniform"), []).append(
            weight
        )
    changes, everything = list[Change](), [w.parameter for w in contract.weights]
    for (pattern, value, constant, uniform), group in found.items():
        weights = Weights.of([w.parameter for w in group], pattern, everything, group[0].role)
        changes.append(
            Fill(weights, value)
            if constant
            else Draw(weights, value, "as in the baseline", uniform)
        )
    title = f"initialise {_shown(pattern for pattern, *_ in found)} as in the baseline"
    return Remedy("baseline", title, tuple(changes), _ANEW, 1.0) if changes else None


def _shown(patterns: Iterable[str]) -> str:
    known = list(dict.fromkeys(pattern.removesuffix(".weight") for pattern in patterns))
    return ", ".join(known[:3]) + (f" and {len(known) - 3} more" if len(known) > 3 else "")


def _tied(contract: ContractRecord, model: nn.Module, codes: Sequence[str]) -> Remedy | None:
    """A table that is the head too is scaled in the forward instead of in its weights."""
    if "JD206" not in codes:
        return None
    tables = [w for w in contract.weights if w.parameter in contract.tied and w.std]
    owners = [_owner(model, w.parameter) for w in tables]
    if not tables or not all(owners):
        return None
    width = contract.sizes.get("d", 0.0)
    logits = contract.logits_std or max(w.std or 0.0 for w in tables) * math.sqrt(width)
    factor = float(f"{logits:.4g}")
    changes = (
        Scale(Weights(tuple(w.parameter for w in tables)), 1 / factor, "to logits of std 1"),
        ScaleOutput(tuple(owners), factor, "what the weights lost"),
    )
    title = (
        f"scale the embedding by {plain(factor)} in the forward instead of in the weights "
        "that the head reads too"
    )
    return Remedy("forward-scale", title, changes, _FREE, 1.0)


def _spared(report: Report, codes: Sequence[str]) -> Remedy | None:
    """Parameter groups without decay for what should not shrink."""
    if "JD207" not in codes:
        return None
    found = [f for f in report.findings if f.code == "JD207"]
    names = tuple(dict.fromkeys(name for f in found for name in f.evidence["parameters"]))
    title = "a parameter group with weight_decay 0 for embeddings, gains and biases"
    return Remedy("no-decay", title, (Spare(names),), "nothing", 0.5, keeps_function=True)


# -- where a run has begun -------------------------------------------------------------------------
def _modules(report: Report, contract: ContractRecord, thresholds: Thresholds) -> Iterator[Remedy]:
    """y = x + a f(x) with a learned or fixed a, and W = gain V: what a run that has begun can
    take.
    """
    outer = [w for w in contract.weights if w.role in RESIDUAL and w.std and len(w.shape) == 2]
    owners = tuple(w.parameter.rpartition(".")[0] for w in outer)
    if not outer or not all(owners):
        return
    base = float(f"{max(w.std or 0.0 for w in outer):.4g}")
    weights = Weights(tuple(w.parameter for w in outer))
    yield Remedy(
        "reparametrise",
        "W = gain · V for W_O and W_2, one learned gain per matrix",
        (Reparametrise(weights, base),),
        f"{len(outer)} parameters; the optimizer's state of these matrices starts anew",
        1.0,
        keeps_function=True,
    )
    yield Remedy(
        "learned-scale",
        "y = x + a f(x), a learned and 1 at first",
        (ScaleOutput(owners, 1.0, "", learned=True),),
        f"{len(owners)} parameters; one multiplication per token and branch",
        2.0,
        keeps_function=True,
    )
    factor = _needed(report, thresholds)
    if factor is not None:
        yield Remedy(
            "branch-scale",
            f"y = x + a f(x) with a = {plain(factor)}",
            (ScaleOutput(owners, factor, "on the branch"),),
            "one multiplication per token and branch; the function changes",
            3.0,
        )


def _needed(report: Report, thresholds: Thresholds) -> float | None:
    """The factor that brings every branch below the first cut of its placement; None where all are
    below.
    """
    factor = 1.0
    for row in report.sublayers:
        limit = thresholds.limits("branch_norm", row.placement or "").info
        if row.branch_norm is not None and limit is not None and row.branch_norm.upper > 0:
            factor = min(factor, limit / row.branch_norm.upper)
    return float(f"{0.99 * factor:.3g}") if factor < 1 else None
