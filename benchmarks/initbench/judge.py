"""Audit a case and judge what the report says of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import jacdiag
from benchmarks.initbench.catalogue import Bug, Probe, Recipe
from benchmarks.initbench.draws import names_of

# Conditions of a paper on norms of sub-layers. A correct init may truly miss them (a Xavier init
# without a factor for
# the depth has core norms beyond the first), so they are listed apart. They name sub-layers, never
# a tensor, so they
# are no part of what is located.
PAPER = ("JD101", "JD102", "JD103")
# These describe the stream and name places of it, never a tensor: no part of what is located
# either.
STREAM = ("JD301", "JD302", "JD303", "JD304", "JD305")
# These say that an audit is not complete. They say nothing about the init.
INCOMPLETE = ("JD901", "JD902", "JD904")
LOUD = ("warning", "error")


@dataclass(frozen=True, kw_only=True)
class Remark:
    """A finding at warning or above.

    Attributes:
        code: of its rule.
        named: the tensors, modules or sub-layers that it names.
        what: its sentence.
    """

    code: str
    named: tuple[str, ...]
    what: str


@dataclass(frozen=True, kw_only=True)
class BugOutcome:
    """How a pair came out.

    Attributes:
        name, kind: of the case.
        found: whether the report of the bug has a finding that the mended model's report has not.
        located: whether the findings name the right tensors and no other.
        missing: right tensors that no finding names.
        wrong: names that are none of the right tensors.
        remarks: findings on the model with the bug.
        alarms: findings on the mended model, without the codes of `apart`.
        apart: codes on the mended model that are no blame of its init.
    """

    name: str
    kind: str
    found: bool
    located: bool
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)
    alarms: list[Remark] = field(default_factory=list)
    apart: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class RecipeOutcome:
    """Findings on a correct init; `apart` lists the codes that are no blame of the init."""

    name: str
    alarms: list[Remark] = field(default_factory=list)
    apart: list[str] = field(default_factory=list)


def judge_bug(case: Bug, seed: int = 0) -> BugOutcome:
    """Audit a pair and compare the findings on its two models."""
    torch.manual_seed(seed)
    broken = case.build(False)
    torch.manual_seed(seed)
    mended = case.build(True)
    before = audit_model(broken, case.probe)
    after = audit_model(mended, case.probe)

    remarks = [remark for remark in before if remark.code not in INCOMPLETE]
    is_found = any(is_new(remark, after) for remark in remarks)
    naming = [remark for remark in remarks if remark.code not in (*PAPER, *STREAM)]
    answers = [case.blames, case.or_blames] if case.or_blames else [case.blames]
    is_located, missing, wrong = locate(broken, naming, answers, case.allows)
    if case.one_is_enough:
        is_located = bool(naming) and not wrong
    return BugOutcome(
        name=case.name,
        kind=case.kind,
        found=is_found,
        located=is_found and is_located,
        missing=missing,
        wrong=wrong,
        remarks=remarks,
        alarms=blaming(after),
        apart=codes_apart(after),
    )


def judge_recipe(case: Recipe, seed: int = 0) -> RecipeOutcome:
    """Audit a correct init."""
    torch.manual_seed(seed)
    remarks = audit_model(case.build(), case.probe)
    return RecipeOutcome(name=case.name, alarms=blaming(remarks), apart=codes_apart(remarks))


def audit_model(model: nn.Module, probe: Probe) -> list[Remark]:
    """Return the findings at warning or above, as the gate would have them on a factory."""
    try:
        report = jacdiag.audit(model, probe(), state="init", decide=True)
    except jacdiag.JacdiagError as error:
        named = getattr(error, "parameters", None) or names_in_text(model, str(error))
        return [Remark(code="refused", named=tuple(named), what=str(error))]
    return [remark_of(finding) for finding in report.findings if finding.level in LOUD]


def remark_of(finding: Any) -> Remark:
    """Return what a finding names: its parameters if it lists them, its places if not."""
    named = finding.evidence.get("parameters") or finding.where
    return Remark(code=finding.code, named=tuple(named), what=finding.what)


def names_in_text(model: nn.Module, text: str) -> list[str]:
    """Return the names of tensors that occur in a message."""
    return [
        name
        for name in names_of(model, ".")
        if re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", text)
    ]


def is_new(remark: Remark, others: list[Remark]) -> bool:
    """Whether a finding is not among others. A condition on norms is compared by its code alone."""
    same_code = [other for other in others if other.code == remark.code]
    if remark.code in PAPER:
        return not same_code
    return all(other.named != remark.named for other in same_code)


def blaming(remarks: list[Remark]) -> list[Remark]:
    """Return the findings that blame the init."""
    return [remark for remark in remarks if remark.code not in (*PAPER, *INCOMPLETE)]


def codes_apart(remarks: list[Remark]) -> list[str]:
    """Return the codes of the other findings."""
    return sorted({remark.code for remark in remarks if remark.code in (*PAPER, *INCOMPLETE)})


def locate(
    model: nn.Module,
    remarks: list[Remark],
    answers: list[tuple[str, ...]],
    allows: tuple[str, ...],
) -> tuple[bool, list[str], list[str]]:
    """Compare the names of the findings with the tensors that are wrong.

    Args:
        model: the model with the bug.
        remarks: the findings on it.
        answers: sets of patterns; each explains the weights on its own.
        allows: patterns of names that are neither right nor wrong.

    Returns:
        Whether one answer is named in full and nothing else; what is missing and what is wrong for
        the answer that comes closest.
    """
    named = sorted({name for remark in remarks for name in remark.named})
    results = []
    for patterns in answers:
        targets = {name for pattern in patterns for name in names_of(model, pattern)}
        covered = {name: tensors_named(model, name, targets, allows) for name in named}
        missing = sorted(targets.difference(*covered.values()))
        wrong = [name for name in named if not covered[name] and not is_allowed(name, allows)]
        is_empty = not targets and not named
        results.append((not missing and not wrong and not is_empty, missing, wrong))
    return min(results, key=lambda result: (not result[0], len(result[1]) + len(result[2])))


def tensors_named(
    model: nn.Module, name: str, targets: set[str], allows: tuple[str, ...]
) -> set[str]:
    """Return the wrong tensors that a name stands for.

    A name is that of a tensor, of the module that owns it, or of an outer module all of whose
    tensors are wrong. A `*` stands for the number of a layer.
    """
    expression = re.escape(name).replace(r"\*", r"\d+")
    inside = [tensor for tensor in names_of(model, ".") if re.match(rf"{expression}(\.|$)", tensor)]
    owned = {tensor for tensor in inside if re.fullmatch(rf"{expression}(\.[^.]+)?", tensor)}
    if all(tensor in targets or is_allowed(tensor, allows) for tensor in inside):
        return targets.intersection(inside)
    return targets & owned


def is_allowed(name: str, allows: tuple[str, ...]) -> bool:
    """Whether a name is neither right nor wrong."""
    return any(re.search(pattern, name) for pattern in allows)
