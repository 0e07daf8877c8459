"""JD401 to JD406 and JD409: what one backward of the loss shows, and dead branches."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jacdiag.errors import clipped
from jacdiag.records import Finding, Level, SublayerRecord
from jacdiag.records.signal_propagation import NEGLIGIBLE, BackwardRecord, DeadBranch, DeadPath
from jacdiag.rules.dead_layers import LayersOfZeros
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.forward import Measured, loudest
from jacdiag.rules.rule import NOT_APPLICABLE, CheckOutcome, Rule, RuleContext
from jacdiag.rules.wording import list_names

_NEVER_WRITTEN = "no init writes such numbers; initialise"
_RECOMPUTE = "no step changes a buffer; compute it once more after to_empty(), or in the forward"


def _backward(context: RuleContext) -> BackwardRecord | None:
    """Return what one backward of the loss showed; None if none was run."""
    network = context.report.network
    if network is None:
        return None
    return network.backward


# -- JD401 ---------------------------------------------
def _no_gradient(context: RuleContext, rule: Rule) -> CheckOutcome:
    record = _backward(context)
    if record is None:
        return NOT_APPLICABLE
    if record.dead is None:
        return CheckOutcome(0, note=record.notes.get("dead", ""))

    # 1. One finding for each part without a gradient, but for those that are meant to be so.
    findings: list[Finding] = []
    left_out: list[str] = []
    for path in record.dead:
        if _is_meant(path):
            left_out.extend(path.where)
        else:
            findings.append(_dead_path(context, rule, path))

    # 2. What was left out.
    note = ""
    if left_out:
        note = f"frozen, and cut off by the model's code: {list_names(left_out)}"
    return CheckOutcome(max(len(context.rows(rule)), 1), findings, note=note)


def _is_meant(path: DeadPath) -> bool:
    """Return whether a part is cut off on purpose.

    Its parameters are frozen, and the code detaches it.
    """
    return path.frozen and path.cause == "cut"


def _dead_path(context: RuleContext, rule: Rule, path: DeadPath) -> Finding:
    # 1. The sentence.
    level: Level = "warning"
    if path.head or path.elsewhere:
        level = "info"
    what = f"{_subject(path)} {_cause(path)}"
    if path.elsewhere:
        what += "; all their parameters get a gradient where the model uses them again"

    # 2. The finding.
    evidence = {
        "stream": path.stream,
        "cause": path.cause,
        "parameters": path.parameters,
        "calls": path.calls,
        "own_gradient": path.own_gradient,
        "count": len(path.where),
    }
    return Finding(
        rule.code,
        context.level(rule, level),
        path.where,
        what,
        evidence,
        why=rule.summary,
        fix=_fix(path),
    )


def _subject(path: DeadPath) -> str:
    """Return what gets no gradient."""
    names = list_names(path.where)
    if path.matrices_only:
        return f"no matrix of {names} gets a gradient:"
    if not path.stream:
        return f"no parameter of {names} gets a gradient:"

    # A stream that is dead before its first sub-layer has no name to give.
    if not path.where:
        return "no gradient reaches the first shortcut:"

    return f"no gradient reaches {names}:"


def _cause(path: DeadPath) -> str:
    """Return why no gradient gets there."""
    # 1. Causes that are no parameter.
    if path.cause == "cut":
        return f"every way from there to the loss passes {list_names(path.calls)}"

    # An input of zeros takes the gradient of whatever it is multiplied by.
    if path.cause == "input":
        reader = "it reads" if len(path.where) == 1 else "they read"
        return f"the stream that {reader} is zero for every token"
    if path.cause == "unknown":
        return "the cause is not known"

    # 2. Parameters that block each other.
    held = f"{_held(path.parameters, path.values)} in every element"
    outlook = _outlook(path)
    if path.together:
        return f"{held}, and only other values in all of them let it through{outlook}"

    # 3. Parameters that let nothing through by themselves.
    which = "any one of them"
    if len(path.parameters) == 1:
        which = "it"
    return f"{held}, and other values in {which} let it through{outlook}"


def _held(names: Sequence[str], values: Sequence[float]) -> str:
    """Return what parameters hold, as in "a.weight is 0, b.bias is -100".

    A tiny value is shown as "a.weight is at most 3e-41 in size".
    """
    phrases = []
    for name, value in zip(names, values, strict=False):
        # A tiny value is shown by its size: its digits mean nothing.
        held = f"{value:g}"
        if _is_negligible(value):
            held = f"at most {abs(value):.1g} in size"
        phrases.append(f"{clipped(name, 100)} is {held}")

    return list_names(phrases)


def _is_negligible(value: float) -> bool:
    """Return whether a number is not zero and so small that no init means it."""
    return 0 < abs(value) < NEGLIGIBLE


def _outlook(path: DeadPath) -> str:
    """Say whether the cause can end by itself."""
    gradient = path.own_gradient
    if gradient is None:
        return ""

    # Whether a step can end it.
    if gradient == 0:
        return "; no gradient reaches these values either, so that no step changes them"

    return "; these values get a gradient themselves, so that the first step changes them"


def _fix(path: DeadPath) -> str:
    """Return what to do; "" if nothing is known, or nothing is needed."""
    # 1. A head, or parameters that get a gradient elsewhere.
    if path.head or path.elsewhere:
        return ""

    # 2. A cut of the graph.
    if path.cause == "cut":
        calls = list_names(path.calls)
        return f"let the gradient through at {calls}, or freeze what lies before it"
    if path.cause != "zero":
        return ""

    # 3. Zeros that no step writes.
    names = list_names(path.parameters)
    if not path.learned:
        return f"{_RECOMPUTE}: {names}"

    # 4. Numbers that nobody wrote, or zeros that an init wrote.
    if any(map(_is_negligible, path.values)):
        return f"{_NEVER_WRITTEN}: {names}"
    return f"set gains to one and draw matrices: {names}"


# -- JD402 ---------------------------------------------
def _dead_branch(context: RuleContext, rule: Rule) -> CheckOutcome:
    rows = [row for row in context.rows(rule) if row.branch_norm is not None]
    if not rows:
        return NOT_APPLICABLE

    # 1. All layers alike is an init; some of them is a fault.
    single: list[SublayerRecord] = []
    blocked: list[SublayerRecord] = []
    alike: list[SublayerRecord] = []
    for row in rows:
        if row.dead_branch is None:
            continue
        if _is_dead_for_ever(row.dead_branch):
            blocked.append(row)
        elif row.dead_branch.alike:
            alike.append(row)
        else:
            single.append(row)

    # 2. One finding for each kind.
    kinds: list[tuple[list[SublayerRecord], Level]] = [
        (single, "warning"),
        (blocked, "warning"),
        (alike, "info"),
    ]
    findings = []
    for rows_of_kind, level in kinds:
        if rows_of_kind:
            findings.append(_branches(context, rule, rows_of_kind, level))

    return CheckOutcome(len(rows), findings)


def _is_dead_for_ever(branch: DeadBranch) -> bool:
    """Return whether several zeros block each other.

    Only all of them together let anything through.
    """
    return branch.alike and branch.together and branch.own_gradient == 0


def _branches(
    context: RuleContext, rule: Rule, rows: Sequence[SublayerRecord], level: Level
) -> Finding:
    """Return the finding about dead branches of one kind."""
    # 1. The causes, and the branches without a known one.
    branches: list[DeadBranch] = []
    unknown: list[str] = []
    calls: dict[str, None] = {}
    value_of: dict[str, float] = {}
    for row in rows:
        branch = row.dead_branch
        if branch is None:
            continue

        branches.append(branch)
        value_of |= dict(zip(branch.parameters, branch.values, strict=False))
        calls.update(dict.fromkeys(branch.calls))
        if not branch.parameters and not branch.calls:
            unknown.append(row.name)

    names = [row.name for row in rows]
    parameters = list(value_of)
    of_layers = LayersOfZeros.of(context.report.contract, parameters)

    # 2. The sentence.
    what = f"the Jacobian of {list_names(names)} is zero, the value is not"
    if all(branch.zero for branch in branches):
        verb = "is" if len(names) == 1 else "are"
        what = f"{list_names(names)} {verb} exactly zero, value and Jacobian"
    elif any(branch.zero for branch in branches):
        what = f"the Jacobian of {list_names(names)} is zero, not every value is"
    if parameters:
        telling = parameters
        if level != "info" and not any(value_of.values()):
            telling = of_layers.differing or parameters
        held = _held(telling, [value_of[name] for name in telling])
        what += f"; the cause: {held} in every element, {_how_far(branches, level)}"
    if calls:
        what += f"; every way through passes {list_names(list(calls))}, whose derivative is zero"
    if unknown:
        what += f"; the cause is not known for {list_names(unknown)}"

    # 3. The finding.
    evidence = {
        "parameters": parameters,
        "calls": list(calls),
        "count": len(names),
        "alike": level == "info",
    }
    return Finding(
        rule.code,
        context.level(rule, level),
        names,
        what,
        evidence,
        why=rule.summary,
        fix=_fix_of_branches(branches, parameters, of_layers, level),
    )


def _fix_of_branches(
    branches: Sequence[DeadBranch],
    parameters: Sequence[str],
    of_layers: LayersOfZeros,
    level: Level,
) -> str:
    """Return what to do; "" if the cause is not known, or is a zero-initialised branch.

    Args:
        branches: That do not depend on their input.
        parameters: The causes.
        of_layers: What the causes hold in the other layers.
        level: Of the finding.
    """
    # 1. Nothing is wrong, or nothing is known.
    if level == "info" or not parameters:
        return ""

    # 2. Zeros that block each other.
    if all(map(_is_dead_for_ever, branches)):
        return "draw all but one of the zero matrices of each branch"

    # 3. Buffers.
    names = list_names(parameters)
    if not _are_learned(branches):
        return f"{_RECOMPUTE}: {names}"

    # 4. Numbers that nobody wrote.
    if any(map(_is_negligible, _values_of(branches))):
        return f"{_NEVER_WRITTEN}: {names}"

    # 5. Zeros in some layers alone: in most of them, or in few.
    is_zero = not any(_values_of(branches))
    if is_zero and of_layers.fix:
        return of_layers.fix
    return f"initialise {names} as in the other layers"


def _are_learned(branches: Sequence[DeadBranch]) -> bool:
    """Return whether training may change every cause."""
    return all(branch.learned for branch in branches)


def _values_of(branches: Sequence[DeadBranch]) -> list[float]:
    """Return what the parameters that let nothing through hold."""
    values: list[float] = []
    for branch in branches:
        values.extend(branch.values)
    return values


def _how_far(branches: Sequence[DeadBranch], level: Level) -> str:
    """Return how far through the model a cause reaches, and what that says of it."""
    # 1. In every layer.
    if all(map(_is_dead_for_ever, branches)):
        return (
            "in every layer; only other values in all of a branch's let it through, no "
            "gradient reaches any of them"
        )
    if level == "info":
        return "as in every layer (a zero-initialised branch)"

    # 2. In some layers, and not zero.
    if any(_values_of(branches)):
        return "which is no zero-initialised branch"

    # 3. In some layers, and zero.
    if not _are_learned(branches):
        return "in a buffer, which no step changes"
    return "but not so in every layer"


# -- JD403 ---------------------------------------------
def _growth(context: RuleContext, rule: Rule) -> CheckOutcome:
    network = context.report.network
    if network is None:
        return NOT_APPLICABLE

    # 1. The exponents that are known.
    exponents = {"activation": network.growth.activation, "gradient": network.growth.gradient}
    known = {name: value for name, value in exponents.items() if value is not None}
    if not known:
        return CheckOutcome(0, note=network.notes.get("gradient_norms", ""))

    # 2. Those beyond their limit over the depth of the model.
    findings: list[Finding] = []
    for name, exponent in known.items():
        limit = context.thresholds.limits("growth", name).info
        if limit is None:
            continue

        # An exponent is the logarithm of the growth at one layer.
        over_all_layers = exponent * _layers_of_stream(context)
        if abs(over_all_layers) > limit:
            findings.append(_growth_finding(context, rule, name, exponent, limit))

    return CheckOutcome(len(known), findings)


def _layers_of_stream(context: RuleContext) -> int:
    """Return how many layers the stream has that the figures of the network are about."""
    network = context.report.network
    if network is None or network.part is None:
        return context.report.model.layers
    return network.part.layers


def _way(context: RuleContext, name: str) -> str:
    """Return from where to where "activation" or "gradient" grows, in words."""
    # 1. The two ends, as the activations pass them.
    first, last = "the input", "the top"
    share = ""
    network = context.report.network
    if network is not None and network.part is not None:
        part = network.part
        first, last = f"the shortcut of {part.first}", f"the sum of {part.last}"
        share = f", {part.share}"

    # 2. Gradients pass them the other way.
    if name == "gradient":
        first, last = last, first
    return f"from {first} to {last}{share}"


def _growth_finding(
    context: RuleContext, rule: Rule, name: str, exponent: float, limit: float
) -> Finding:
    """Return the finding about the norms of "activation" or "gradient" over depth."""
    # 1. The sentence.
    over_all_layers = exponent * _layers_of_stream(context)
    way = _way(context, name)
    verb = "grows" if over_all_layers > 0 else "shrinks"
    what = (
        f"the {name} norm {verb} {plain(math.exp(abs(over_all_layers)))}-fold {way} "
        f"(exponent per layer: {plain(exponent)})"
    )

    # 2. The finding.
    evidence = {
        "field": f"growth.{name}",
        "value": exponent,
        "whole": over_all_layers,
        "threshold": limit,
    }
    level = context.level(rule, "info")
    return Finding(rule.code, level, [], what, evidence, why=rule.summary)


# -- JD404 ---------------------------------------------
def _embedding(context: RuleContext, rule: Rule) -> CheckOutcome:
    record = _backward(context)
    if record is None:
        return NOT_APPLICABLE

    # 1. The share that was measured, or the reason why there is none.
    share = record.embedding_share
    if share is None:
        note = record.notes.get("embedding_norm") or record.notes.get("others_median", "")
        return CheckOutcome(0, note=note)

    # 2. The embedding compared with the other matrices.
    def sentence(worst: Measured) -> str:
        return (
            f"the gradient of {worst.where} is {plain(worst.value)} times the median of the "
            "other matrices"
        )

    measured = Measured(record.embedding or "", share)
    return CheckOutcome(1, loudest(context, rule, [measured], "embedding_gradient", sentence))


# -- JD405 ---------------------------------------------
def _update(context: RuleContext, rule: Rule) -> CheckOutcome:
    plan = context.report.plan
    rows = context.rows(rule)
    if not rows:
        return NOT_APPLICABLE
    if plan.lr is None:
        return CheckOutcome(0, note="no learning rate was given")

    # 1. The rate of the first step: a linear warm-up from zero has one part of it there.
    rate = plan.lr / max(plan.warmup or 1, 1)

    # 2. Adam changes each number by about the rate, whatever the gradient is.
    figures: dict[str, Measured] = {}
    for row in rows:
        for weight in row.weights.values():
            if weight.std:
                figures[weight.parameter] = Measured(weight.parameter, rate / weight.std)

    def sentence(worst: Measured) -> str:
        return (
            f"the first step of Adam at rate {plain(rate)} changes {worst.where} by "
            f"{plain(100 * worst.value)}% "
            "(norm of update / norm of weight; that the optimizer is Adam is assumed)"
        )

    findings = loudest(context, rule, list(figures.values()), "first_update", sentence)
    return CheckOutcome(len(figures), findings)


# -- JD406 ---------------------------------------------
def _not_finite(context: RuleContext, rule: Rule) -> CheckOutcome:
    record = _backward(context)
    network = context.report.network
    if record is None or network is None:
        return NOT_APPLICABLE
    if network.gradient_norms is None:
        return CheckOutcome(0, note=network.notes.get("gradient_norms", ""))

    # Every gradient is finite.
    if not record.not_finite:
        return CheckOutcome(1)

    # 1. The sentence. A finite loss shows that the backward alone is at fault.
    loss = (network.loss or {}).get("value")
    contrast = ""
    if isinstance(loss, float) and math.isfinite(loss):
        contrast = " although the loss is finite"
    what = f"the gradient holds NaN or Inf{contrast}: {list_names(record.not_finite)}"

    # 2. The finding.
    evidence = {"names": list(record.not_finite)}
    fix = (
        "add an epsilon inside a root or a quotient; torch.autograd.set_detect_anomaly(True) "
        "names the operation"
    )
    level = context.level(rule, "warning")
    return CheckOutcome(
        1, [Finding(rule.code, level, [], what, evidence, why=rule.summary, fix=fix)]
    )


# -- JD409 ---------------------------------------------
def _cut_shortcut(context: RuleContext, rule: Rule) -> CheckOutcome:
    record = _backward(context)
    if record is None:
        return NOT_APPLICABLE

    matched = max(len(context.rows(rule)), 1)
    cut = record.cut_shortcuts
    if not cut:
        return CheckOutcome(matched)

    # 1. The sentence.
    where = [shortcut.where for shortcut in cut]
    calls = list(dict.fromkeys(shortcut.call for shortcut in cut))
    what = (
        f"the shortcut of {list_names(where)} passes {list_names(calls)}: the gradient goes "
        "through the branch alone there"
    )

    # 2. The finding.
    evidence = {"calls": calls, "count": len(cut)}
    fix = f"add the shortcut itself, without {list_names(calls)}"
    level = context.level(rule, "warning")
    finding = Finding(rule.code, level, where, what, evidence, why=rule.summary, fix=fix)
    return CheckOutcome(matched, [finding])


RULES = (
    Rule("JD401", "no-gradient", "warning", check=_no_gradient),
    Rule("JD402", "dead-branch", "warning", check=_dead_branch),
    Rule("JD403", "growth-exponents", "info", check=_growth),
    Rule("JD404", "embedding-gradient", "info", check=_embedding),
    Rule("JD405", "update-ratio", "info", check=_update, states=("init",)),
    Rule(
        "JD406",
        "gradient-not-finite",
        "warning",
        check=_not_finite,
    ),
    Rule("JD409", "cut-shortcut", "warning", check=_cut_shortcut),
)
