"""Judge how the weights of a fresh run were drawn: the rules JD2xx, once, before the first update.

An audit judges the same. The watch also knows the optimizers, and so which weights decay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from jacdiag.measure.init_contract import contract_of, decayed_by
from jacdiag.measure.init_distribution import Draws
from jacdiag.measure.structure import with_structure
from jacdiag.records import Finding, Report
from jacdiag.rules import evaluate
from jacdiag.rules.thresholds import Thresholds
from jacdiag.sources import Source
from jacdiag.trace import Sites


def judge_init(
    model: nn.Module,
    sublayers: Sites,
    report: Report,
    optimizers: Sequence[Any],
    thresholds: Thresholds,
) -> list[Finding]:
    """Return what the rules JD2xx find in the weights, without what the report has already.

    Each weight is read once. Nothing is drawn and no weight is changed.

    Args:
        model: before its first update.
        sublayers: of the model as it is now.
        report: of the probe on the same weights.
        optimizers: those that update its parameters.
        thresholds: of the rules.
    """
    # 1. How each weight was drawn, and which of them the optimizers let decay.
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    vocabulary = Source.of_module(model).vocab_size
    contract = contract_of(
        sublayers,
        Draws(sublayers.skeleton.params),
        model,
        sublayers.layers,
        report.model.width or 0,
        vocabulary,
        decayed=decayed_by(model, groups),
    )
    contract = with_structure(contract, sublayers, model, report.sublayers)

    # 2. The rules, on the report of the probe with this contract.
    described = replace(report.model, vocabulary=vocabulary)
    judged = evaluate(
        replace(report, model=described, contract=contract, findings=[]), thresholds=thresholds
    )
    known = {finding.code for finding in report.findings}
    return [
        finding
        for finding in judged.findings
        if finding.code.startswith("JD2") and finding.code not in known
    ]


def has_stepped(optimizer: Any) -> bool:
    """Return whether the state of an optimizer shows that it has made a step.

    Some optimizers make their state when they are built. That of others is empty until the first
    step, or for ever.
    """
    state = getattr(optimizer, "state", None)
    if not isinstance(state, Mapping):
        return False
    return any(_shows_a_step(entry) for entry in state.values())


def _shows_a_step(entry: Any) -> bool:
    # 1. A count of steps decides.
    if not isinstance(entry, Mapping):
        return False
    if "step" in entry:
        return float(entry["step"]) > 0

    # 2. Without one, whatever is kept comes from a step.
    return bool(entry)
