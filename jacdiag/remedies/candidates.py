"""Which remedies a report asks for: recipes of the paper and of the contract, new modules."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch import nn

from jacdiag.records import ContractRecord, Report, SublayerRecord, WeightRecord
from jacdiag.remedies.changes import (
    Fill,
    ModelChange,
    NormOutput,
    Redraw,
    Reparametrise,
    Rows,
    Scale,
    ScaleOutput,
    Spare,
    Weights,
)
from jacdiag.rules import Deviation, deviations_of
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.init.schemes import INNER, RESIDUAL, VECTORS
from jacdiag.rules.remedy_targets import aims
from jacdiag.rules.thresholds import Thresholds

_LARGER = {"JD102", "JD103", "JD104", "JD105", "JD110"}  # what a larger shortcut is tried against
_SMALLER = {"JD101", "JD103", "JD104", "JD105"}  # what smaller matrices are tried against
_FREE = "no parameter; one multiplication per token"
_PLAIN = ("normal", "truncated", "uniform")  # families of what was drawn element by element
_CONTRACT_CODES = {"JD201", "JD202", "JD203", "JD204", "JD205"}
_NAMED = 3  # name patterns that a title lists before it counts the rest
_SAME = 1.1  # times: two stds that are one within sampling
_NEW_INIT = "a new initialisation: before the first step only"


@dataclass(frozen=True)
class Remedy:
    """A change to a model, not yet tried.

    Attributes:
        name, title, price: for the report.
        size: how much it changes, to compare with other remedies only; the smallest sufficient one
            is recommended.
        keeps_function: meant to leave the function as it is.
        restores_baseline: draws weights as in the baseline, and nothing else. What the baseline
            was accepted with is not held against it.
    """

    name: str
    title: str
    changes: tuple[ModelChange, ...]
    price: str
    size: float
    keeps_function: bool = False
    restores_baseline: bool = False

    def apply(self, model: nn.Module) -> None:
        """Change a model in place."""
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
    report: Report, model: nn.Module, thresholds: Thresholds, *, has_begun: bool = False
) -> list[Remedy]:
    """Return the remedies that may help, the smallest first; [] if nothing asks for one.

    Args:
        report: of `model`.
        model: as it is; only its modules are looked at.
        thresholds: how far a branch is scaled down.
        has_begun: the run has begun: modules and reparametrizations, no new draws.
    """
    # 1. Without a contract no weight has a role.
    contract = report.contract
    if contract is None:
        return []

    # 2. A run that has begun keeps its weights.
    if has_begun:
        return list(_modules(report, contract, thresholds))

    # 3. What the rules that fired ask for.
    codes = aims(report)
    if not codes:
        return []

    remedies = _drawn_or_scaled(report, contract, model, codes)

    # 4. The init of the baseline, alone and with each of the others.
    restored = _baseline(report, contract)
    if restored is not None:
        together = [restored + remedy for remedy in remedies]
        remedies = [*remedies, restored, *together]
    return sorted(remedies, key=lambda remedy: remedy.size)


def _drawn_or_scaled(
    report: Report, contract: ContractRecord, model: nn.Module, codes: Sequence[str]
) -> list[Remedy]:
    """Return the recipes of the contract and of the paper, alone and together."""
    of_contract = _contract_recipes(report, contract, model, codes)
    of_paper = _paper_recipes(report, contract, model, codes)
    if of_contract is None:
        return of_paper

    # A rule of the contract fired: a recipe that leaves the contract broken cannot be enough.
    together = [of_contract + recipe for recipe in of_paper]
    is_contract_broken = any(code.startswith("JD2") for code in codes)
    if is_contract_broken:
        return [of_contract, *together]

    return [of_contract, *of_paper, *together]


def _contract_recipes(
    report: Report, contract: ContractRecord, model: nn.Module, codes: Sequence[str]
) -> Remedy | None:
    """Return what the rules of the contract ask for, as one remedy."""
    recipes = [
        _contract(contract, codes),
        _tied(contract, model, codes),
        _spared(report, codes),
    ]
    requested = [recipe for recipe in recipes if recipe is not None]
    if not requested:
        return None

    return functools.reduce(operator.add, requested)


def _paper_recipes(
    report: Report, contract: ContractRecord, model: nn.Module, codes: Sequence[str]
) -> list[Remedy]:
    """Return a larger shortcut, smaller matrices, and both."""
    # 1. A larger shortcut.
    shortcuts: list[Remedy] = []
    if not _LARGER.isdisjoint(codes):
        shortcuts = list(_embedding(report, contract, model))

    # 2. Smaller matrices.
    matrices: list[Remedy] = []
    if not _SMALLER.isdisjoint(codes):
        matrices = list(_matrices(report, contract, codes))
    recipes = [*shortcuts, *matrices]
    if not shortcuts:
        return recipes

    # 3. Both together. The shortcut may depend on what the matrices draw.
    for smaller in matrices:
        recipes += _pairs(report, contract, model, smaller)

    return recipes


def _pairs(
    report: Report, contract: ContractRecord, model: nn.Module, matrices: Remedy
) -> Iterator[Remedy]:
    """Yield smaller matrices together with each larger shortcut.

    A table that both draw is the shortcut's. A table that is scaled has the std that it is drawn
    with.
    """
    # 1. The stds that the matrices, and tables among them, are drawn with.
    stds: dict[str, float] = {}
    for draw in _draws_among(matrices.changes):
        stds |= dict.fromkeys(draw.weights.names, draw.std)

    # 2. Leave out what the shortcut draws, too.
    for shortcut in _embedding(report, contract, model, stds):
        yield shortcut + _without_draws_of(matrices, _drawn_names(shortcut.changes))


def _draws_among(changes: Iterable[ModelChange]) -> list[Redraw]:
    """Return the changes that draw weights again."""
    return [change for change in changes if isinstance(change, Redraw)]


def _drawn_names(changes: Iterable[ModelChange]) -> set[str]:
    """Return the weights that changes draw again."""
    names: set[str] = set()
    for draw in _draws_among(changes):
        names.update(draw.weights.names)

    return names


def _without_draws_of(matrices: Remedy, names: set[str]) -> Remedy:
    """Return smaller matrices without the draws of weights that the same remedy draws already."""
    # 1. The other changes.
    changes = []
    for change in matrices.changes:
        is_drawn_already = isinstance(change, Redraw) and names >= set(change.weights.names)
        if not is_drawn_already:
            changes.append(change)
    if len(changes) == len(matrices.changes):
        return matrices

    # 2. A title that claims no more than these.
    title = matrices.title.replace("all matrices", "all other matrices")
    return replace(matrices, title=title, changes=tuple(changes))


# -- the two conditions of the paper ---------------------------------------------------------------
def _embedding(
    report: Report,
    contract: ContractRecord,
    model: nn.Module,
    drawn: Mapping[str, float] = MappingProxyType({}),
) -> Iterator[Remedy]:
    """Yield recipes for a large shortcut.

    These are scaled-embed and embed-ln of the paper, and a table drawn with std 1 if it is not the
    head.

    Args:
        report: of the audited model.
        contract: its weights.
        model: its modules.
        drawn: the std of weights that the same remedy draws again.
    """
    width = report.model.width
    if not width:
        return

    tables = _embedding_tables(contract, width)
    if not tables:
        return

    # 1. The output of the embedding: only if a module stands for each table.
    owners = [_owner(model, table.parameter) for table in tables]
    if all(owners):
        unique_owners = tuple(dict.fromkeys(owners))
        yield from _embedding_outputs(unique_owners, width, _largest_std_after(tables, drawn))

    # 2. The table itself, which would change the head if it is the head, too.
    if not contract.tied:
        yield Remedy(
            "std-1-embed",
            "draw the embedding with std 1, and spare it weight decay",
            tuple(_draws(contract, tables, 1.0, "1")),
            _NEW_INIT,
            3.5,
        )


def _largest_std_after(tables: Iterable[WeightRecord], drawn: Mapping[str, float]) -> float:
    """Return the largest std of tables, some of which are drawn again with another one."""
    return max(drawn.get(table.parameter, table.std or 0.0) for table in tables)


def _embedding_tables(contract: ContractRecord, width: int) -> list[WeightRecord]:
    """Return the embeddings whose rows are as wide as the stream."""
    tables = []
    for weight in contract.weights:
        # A narrower table is projected, and its output is not the stream.
        is_as_wide = len(weight.shape) == 2 and weight.shape[1] == width
        if weight.role == "embedding" and is_as_wide:
            tables.append(weight)

    return tables


def _embedding_outputs(owners: tuple[str, ...], width: int, std: float) -> Iterator[Remedy]:
    """Yield changes to the output of embeddings of one width, whose largest std is given."""
    # 1. The factor of the paper.
    root = math.sqrt(width)
    title = f"multiply the embedding by √d = {plain(root)}"
    scaled = ScaleOutput(owners, root, f"sqrt(d), d = {width}")
    yield Remedy("scaled-embed", title, (scaled,), _FREE, 2.0)

    # 2. A larger one, if that leaves the std below 1.
    if 0 < std * root < 1:
        factor = float(f"{1 / std:.4g}")
        title = f"multiply the embedding by {plain(factor)}, to std 1"
        yield Remedy("unit-embed", title, (ScaleOutput(owners, factor, "to std 1"),), _FREE, 2.5)

    # 3. A norm.
    price = f"{2 * width * len(owners):,} parameters and a LayerNorm per token"
    norms = tuple(NormOutput(owner, width) for owner in owners)
    yield Remedy("embed-ln", "a LayerNorm on the embedding", norms, price, 3.0)


def _owner(model: nn.Module, parameter: str) -> str:
    """Return the module whose output is the looked-up table; "" if none stands for it."""
    owner = parameter.rpartition(".")[0]
    if not owner:
        return ""

    # A module with further parameters does more than look rows up.
    own_parameters = list(model.get_submodule(owner).parameters(recurse=False))
    if len(own_parameters) != 1:
        return ""

    return owner


def _matrices(report: Report, contract: ContractRecord, codes: Sequence[str]) -> Iterator[Remedy]:
    """Yield recipes for small sub-layers: scaling with depth if it is missing, the small init."""
    inner = _drawn_weights(contract, INNER)
    outer = _drawn_weights(contract, RESIDUAL)
    if not outer:
        return

    # 1. W_O and W_2 as wide as the other matrices: they lack the scaling with depth.
    layers = max(report.model.layers, 1)
    lacks_scaling = _largest_std(outer) > 0.7 * _largest_std(inner)
    if layers > 1 and lacks_scaling:
        yield _depth_scaling(contract, outer, layers)

    # 2. The small init of all matrices.
    if report.model.width:
        yield _small_init(contract, inner, outer, layers, report.model.width, codes)


def _drawn_weights(contract: ContractRecord, roles: Container[str]) -> list[WeightRecord]:
    """Return the weights of some roles, without those that are constant."""
    of_roles = [weight for weight in contract.weights if weight.role in roles]
    return [weight for weight in of_roles if weight.std]


def _largest_std(weights: Iterable[WeightRecord]) -> float:
    return max((weight.std or 0.0 for weight in weights), default=0.0)


def _depth_scaling(contract: ContractRecord, outer: Iterable[WeightRecord], layers: int) -> Remedy:
    """Return W_O and W_2 scaled by 1/√(2N), for N layers."""
    root = math.sqrt(2 * layers)
    formula = f"1/sqrt(2*N), N = {layers}"
    changes = tuple(Scale(group, 1 / root, formula) for group in _groups(contract, outer))
    title = f"W_O and W_2 times 1/√(2N) = {plain(1 / root)}"
    return Remedy("depth-scaling", title, changes, _NEW_INIT, 4.0)


def _small_init(
    contract: ContractRecord,
    inner: Iterable[WeightRecord],
    outer: Iterable[WeightRecord],
    layers: int,
    width: int,
    codes: Sequence[str],
) -> Remedy:
    """Return all matrices drawn with s = √(2/(5d)), and W_O and W_2 with s/√(2N).

    Args:
        contract: gives the tables outside the sub-layers.
        inner: matrices that read the stream.
        outer: W_O and W_2.
        layers: N.
        width: d.
        codes: the rules that fired.
    """
    root = math.sqrt(2 * layers)
    std = math.sqrt(2 / (5 * width))
    formula = f"sqrt(2/(5*d)), d = {width}"
    outer_formula = f"sqrt(2/(5*d))/sqrt(2*N), d = {width}, N = {layers}"
    draws = (
        *_draws(contract, inner, std, formula),
        *_draws(contract, outer, std / root, outer_formula),
        *_outside(contract, std, formula, codes),
    )
    title = (
        f"draw all matrices with s = √(2/(5d)) = {plain(std)}, W_O and W_2 with s/√(2N) = "
        f"{plain(std / root)}"
    )
    return Remedy("small-init", title, draws, _NEW_INIT, 5.0)


def _outside(
    contract: ContractRecord, std: float, formula: str, codes: Sequence[str]
) -> Iterator[Redraw]:
    """Yield draws of embedding, positions and head: the small init draws these too.

    An embedding that already makes the shortcut large enough is not made smaller: 1 is the scheme's
    other std for it.
    """
    shortcut_is_large = "JD102" not in codes
    for weight in filter(_is_drawn_table, contract.weights):
        # 1. A table that does not make the shortcut large, or is as small already.
        makes_it_large = shortcut_is_large and _is_large_embedding(weight, std)
        if not makes_it_large:
            yield from _draws(contract, [weight], std, formula)
            continue

        # 2. An embedding that makes it large.
        if _may_become_std_1(contract, weight):
            yield from _draws(contract, [weight], 1.0, "1")


def _is_drawn_table(weight: WeightRecord) -> bool:
    """Return whether a weight is an embedding, positions or the head, drawn by element."""
    is_table = weight.role in ("embedding", "positions", "head")
    has_rows = len(weight.shape) == 2
    was_drawn = weight.family in _PLAIN
    return is_table and has_rows and was_drawn


def _is_large_embedding(weight: WeightRecord, std: float) -> bool:
    """Return whether a weight is an embedding whose std is above that of the small init."""
    if weight.role != "embedding":
        return False

    own_std = weight.std or 0.0
    return own_std > _SAME * std


def _may_become_std_1(contract: ContractRecord, embedding: WeightRecord) -> bool:
    """Return whether an embedding is neither the head nor drawn with std 1 already."""
    # The head would become as large.
    if embedding.parameter in contract.tied:
        return False

    own_std = embedding.std or 0.0
    has_std_1 = 1 / _SAME < own_std < _SAME
    return not has_std_1


def _draws(
    contract: ContractRecord, weights: Iterable[WeightRecord], std: float, formula: str
) -> Iterator[Redraw]:
    """Yield new draws of weights, by family and name pattern."""
    # 1. What is uniform stays so, and anything else becomes normal.
    uniform: list[WeightRecord] = []
    normal: list[WeightRecord] = []
    for weight in weights:
        family = uniform if weight.family == "uniform" else normal
        family.append(weight)

    # 2. One draw for each name pattern.
    for group in _groups(contract, normal):
        yield Redraw(group, std, formula, uniform=False)
    for group in _groups(contract, uniform):
        yield Redraw(group, std, formula, uniform=True)


def _groups(contract: ContractRecord, weights: Iterable[WeightRecord]) -> Iterator[Weights]:
    """Yield weights by name pattern."""
    by_pattern: dict[str, list[WeightRecord]] = {}
    for weight in weights:
        group = by_pattern.setdefault(weight.pattern, [])
        group.append(weight)

    for pattern, group in by_pattern.items():
        yield _as_weights(contract, pattern, group)


def _as_weights(contract: ContractRecord, pattern: str, group: Sequence[WeightRecord]) -> Weights:
    """Return weights of one name pattern, as a change names them."""
    names = [weight.parameter for weight in group]
    # A pattern is used only if it selects no other parameter.
    everything = [weight.parameter for weight in contract.weights]
    weights = Weights.of(names, pattern, everything, group[0].role)
    return replace(weights, have_padding=any(map(_has_padding, group)))


def _has_padding(weight: WeightRecord) -> bool:
    """Return whether a weight is a table of embeddings of which some rows, not all, are zero."""
    is_table = weight.role in ("embedding", "positions") and len(weight.shape) == 2
    return is_table and 0 < weight.zero_rows < weight.shape[0]


# -- the init contract -----------------------------------------------------------------------------
def _contract(contract: ContractRecord, codes: Sequence[str]) -> Remedy | None:
    """Set every weight that differs from its contract to what the contract says."""
    if _CONTRACT_CODES.isdisjoint(codes):
        return None

    groups = _grouped_deviations(contract)
    if not groups:
        return None

    # 1. A change for each group.
    changes: list[ModelChange] = []
    for target, group in groups.items():
        weights = _as_weights(contract, target.pattern, [deviation.weight for deviation in group])
        changes.append(_as_the_contract_says(group[0], weights, target))

    # 2. A title with the formula, if it is the same for all.
    how = "as the contract says"
    formulas = {group[0].formula for group in groups.values()}
    if len(formulas) == 1:
        how = f"with {formulas.pop()}"
    title = f"initialise {_shown(target.words for target in groups)} {how}"
    return Remedy("contract", title, tuple(changes), _NEW_INIT, 1.0)


@dataclass(frozen=True)
class _ContractTarget:
    """What one change sets to the value of the contract.

    Attributes:
        pattern: the name pattern of the weights.
        value: that they should have.
        rows: the rows that are meant; None for entire weights.
    """

    pattern: str
    value: float
    rows: Rows | None = None

    @property
    def is_zero(self) -> bool:
        """Whether entire weights should be zero."""
        return self.value == 0 and self.rows is None

    @property
    def words(self) -> str:
        """The weights, in words."""
        name = self.pattern.removesuffix(".weight")
        if self.rows is None:
            return name

        return f"the {self.rows.role} rows of {name}"


def _grouped_deviations(contract: ContractRecord) -> dict[_ContractTarget, list[Deviation]]:
    """Return the deviations that one change can undo, by its target."""
    groups: dict[_ContractTarget, list[Deviation]] = {}
    for deviation in deviations_of(contract):
        rows = _rows_of(deviation)
        # To draw the entire matrix again would change the other rows of a section.
        if deviation.section and rows is None:
            continue

        target = _ContractTarget(deviation.weight.pattern, deviation.value, rows)
        groups.setdefault(target, []).append(deviation)

    return groups


def _rows_of(deviation: Deviation) -> Rows | None:
    """Return the rows that a deviation is about; None for entire weights, or if it is not known."""
    section = deviation.rows
    if section is None or section.dim is None:
        return None

    size = section.fan_out // section.groups
    return Rows(deviation.section, section.dim, section.groups, section.start, size)


def _as_the_contract_says(
    deviation: Deviation, weights: Weights, target: _ContractTarget
) -> ModelChange:
    """Return the change that gives weights the value, or the std, of their contract."""
    weight = deviation.weight
    # 1. One value for all numbers: a vector, or a matrix that starts at zero.
    is_vector = weight.role in VECTORS or len(weight.shape) < 2
    if is_vector:
        return Fill(weights, target.value)
    if target.is_zero:
        return Fill(weights, 0.0)

    # 2. A draw.
    is_uniform = weight.family == "uniform"
    return Redraw(weights, target.value, deviation.formula, is_uniform, target.rows)


def _baseline(report: Report, contract: ContractRecord) -> Remedy | None:
    """Set every weight that differs from the recorded baseline as it was there."""
    # 1. Groups of the same name pattern and target.
    names = set(_parameters_named_by(report, "JD110"))
    if report.baseline is None:
        return None

    differing = [weight for weight in contract.weights if weight.parameter in names]
    groups: dict[tuple[str, _Target], list[WeightRecord]] = {}
    for weight in differing:
        target = _Target.of(report.baseline.weights[weight.parameter])
        groups.setdefault((weight.pattern, target), []).append(weight)
    if not groups:
        return None

    # 2. A change for each.
    changes = []
    for (pattern, target), group in groups.items():
        weights = _as_weights(contract, pattern, group)
        changes.append(target.change_of(weights))
    title = f"initialise {_shown(pattern for pattern, _ in groups)} as in the baseline"
    return Remedy("baseline", title, tuple(changes), _NEW_INIT, 0.4, restores_baseline=True)


def _parameters_named_by(report: Report, code: str) -> list[str]:
    """Return the parameters that the findings of a rule name."""
    findings = [finding for finding in report.findings if finding.code == code]
    names: list[str] = []
    for finding in findings:
        names.extend(finding.evidence.get("parameters", ()))

    return names


@dataclass(frozen=True)
class _Target:
    """How a weight was initialized in the baseline: its value or its std, and the family."""

    value: float
    is_constant: bool
    is_uniform: bool

    @classmethod
    def of(cls, recorded: Mapping[str, Any]) -> _Target:
        """Return the target of a weight, as the baseline recorded it."""
        family = recorded["family"]
        is_constant = family in ("zero", "constant")
        value = recorded["std"]
        if is_constant:
            value = recorded["value"] or 0.0

        # Six digits: weights that differ by less are of one group.
        rounded = float(f"{value:.6g}")
        return cls(rounded, is_constant, is_uniform=family == "uniform")

    def change_of(self, weights: Weights) -> ModelChange:
        """Return the change that gives weights this init."""
        if self.is_constant:
            return Fill(weights, self.value)

        return Redraw(weights, self.value, "as in the baseline", self.is_uniform)


def _shown(patterns: Iterable[str]) -> str:
    """Return the first few name patterns, and how many there are beyond."""
    names = list(dict.fromkeys(pattern.removesuffix(".weight") for pattern in patterns))
    text = ", ".join(names[:_NAMED])
    beyond = len(names) - _NAMED
    if beyond > 0:
        text += f" and {beyond} more"
    return text


def _tied(contract: ContractRecord, model: nn.Module, codes: Sequence[str]) -> Remedy | None:
    """Scale a table that is the head too in the forward instead of in its weights."""
    if "JD206" not in codes:
        return None

    # 1. The tables, if a module stands for each.
    tables = _tied_tables(contract)
    owners = [_owner(model, table.parameter) for table in tables]
    if not tables or not all(owners):
        return None

    # 2. The factor that gives logits of std 1.
    logits_std = contract.logits_std
    if not logits_std:
        width = contract.sizes.get("d", 0.0)
        logits_std = _largest_std(tables) * math.sqrt(width)
    factor = float(f"{logits_std:.4g}")

    # 3. Smaller weights, and the factor on their output.
    names = tuple(table.parameter for table in tables)
    changes = (
        Scale(Weights(names), 1 / factor, "to logits of std 1"),
        ScaleOutput(tuple(owners), factor, "what the weights lost"),
    )
    title = (
        f"scale the embedding by {plain(factor)} in the forward instead of in the weights "
        "that the head reads too"
    )
    return Remedy("forward-scale", title, changes, _FREE, 1.0)


def _tied_tables(contract: ContractRecord) -> list[WeightRecord]:
    """Return the tables that are the head, too, without those that are constant."""
    tables = [weight for weight in contract.weights if weight.parameter in contract.tied]
    return [table for table in tables if table.std]


def _spared(report: Report, codes: Sequence[str]) -> Remedy | None:
    """Make parameter groups without decay for what should not shrink."""
    if "JD207" not in codes:
        return None

    names = _parameters_named_by(report, "JD207")
    spare = Spare(tuple(dict.fromkeys(names)))
    title = "a parameter group with weight_decay 0 for embeddings, gains and biases"
    return Remedy("no-decay", title, (spare,), "nothing", 0.5, keeps_function=True)


# -- a run that has begun -------------------------------------------------------------------------
def _modules(report: Report, contract: ContractRecord, thresholds: Thresholds) -> Iterator[Remedy]:
    """Yield what a run that has begun can take.

    These are W = gain V, and y = x + a f(x) with a learned or fixed a.
    """
    # 1. W_O and W_2, with the modules that hold them.
    outer = _output_matrices(contract)
    owners = tuple(weight.parameter.rpartition(".")[0] for weight in outer)
    if not outer or not all(owners):
        return

    # 2. What leaves the function as it is.
    base = float(f"{_largest_std(outer):.4g}")
    weights = Weights(tuple(weight.parameter for weight in outer))
    yield Remedy(
        "reparametrise",
        "W = gain · V for W_O and W_2, one learned gain per matrix",
        (Reparametrise(weights, base),),
        f"{len(outer)} parameters; the optimizer's state of these matrices starts again from zero",
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

    # 3. What changes it.
    factor = _needed_branch_scale(report, thresholds)
    if factor is not None:
        yield Remedy(
            "branch-scale",
            f"y = x + a f(x) with a = {plain(factor)}",
            (ScaleOutput(owners, factor, "on the branch"),),
            "one multiplication per token and branch; the function changes",
            3.0,
        )


def _output_matrices(contract: ContractRecord) -> list[WeightRecord]:
    """Return W_O and W_2 of all sub-layers, without those that are constant."""
    return [weight for weight in _drawn_weights(contract, RESIDUAL) if len(weight.shape) == 2]


def _needed_branch_scale(report: Report, thresholds: Thresholds) -> float | None:
    """Return the factor that brings every branch below the first cut of its placement.

    It is None if all branches are below.
    """
    factors = [_needed_scale_of(row, thresholds) for row in report.sublayers]
    factor = min(factors, default=1.0)
    if factor >= 1:
        return None

    # A little smaller, so that rounding does not leave a branch at its cut.
    return float(f"{0.99 * factor:.3g}")


def _needed_scale_of(row: SublayerRecord, thresholds: Thresholds) -> float:
    """Return the factor that brings one branch to the first cut; 1 or more if it is below."""
    limit = thresholds.limits("branch_norm", row.placement or "").info
    if row.branch_norm is None or limit is None:
        return 1.0

    # A branch of zero needs none, and NaN says nothing.
    upper = row.branch_norm.upper
    has_value = upper > 0
    if not has_value:
        return 1.0

    return limit / upper
