"""JD201 to JD207: how every weight was initialised.

Weights are compared with a pinned contract, a published init, or the rest of the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from jacdiag.records import ContractRecord, Finding, Report, WeightRecord
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.init.contract_judgement import Judgement, SchemeComparison, pinned_scheme
from jacdiag.rules.init.leftover_memory import without_leftovers
from jacdiag.rules.init.mistaken_formulas import find_mistaken
from jacdiag.rules.init.never_drawn import NoDraw, find_no_draws, without_no_draws
from jacdiag.rules.init.scheme_choice import followed
from jacdiag.rules.init.scheme_deviations import (
    Deviation,
    describe,
    deviations,
    head_left_at_default,
    layers_that_differ,
)
from jacdiag.rules.init.scheme_fit import Yardstick
from jacdiag.rules.init.schemes import MATRICES, Scheme, published_for
from jacdiag.rules.rule import NOT_APPLICABLE, CheckOutcome, Rule, RuleContext
from jacdiag.rules.wording import list_names

# Roles that are usually spared from weight decay, in words.
_SPARED = {"embedding": "the embedding", "norm_gain": "norm gains", "bias": "biases"}


def judged(contract: ContractRecord) -> SchemeComparison:
    """Compare every weight with what its family, or the rest of the model, says."""
    contract = without_no_draws(without_leftovers(contract))
    # 1. The scheme of the family, else the one that most of the model follows.
    published = published_for(contract.family)
    if published is not None:
        yardstick = Yardstick.given(contract, published)
        note = f"published init of {contract.family}: {published.title}"
    else:
        own = _own_yardstick(contract)
        if own is None:
            count, uneven = layers_that_differ(contract.weights)
            note = "follows no known scheme; layers are compared with each other"
            return SchemeComparison(None, False, None, count, uneven, note)
        yardstick = own
        note = _note_of_own(yardstick)

    # 2. The weights that the scheme covers.
    count, differing = deviations(yardstick)
    if published is None and not yardstick.looks:
        named = {deviation.weight.parameter for deviation in differing}
        for deviation in head_left_at_default(yardstick):
            if deviation.weight.parameter not in named:
                differing.append(deviation)

    # 3. The others, layer by layer.
    uncovered = [weight for weight in contract.weights if yardstick.mismatches(weight) is None]
    count_of_others, uneven = layers_that_differ(uncovered)
    return SchemeComparison(
        yardstick.scheme,
        published is not None,
        yardstick.s,
        count + count_of_others,
        [*differing, *uneven],
        note,
        mistake=yardstick.looks,
    )


def _own_yardstick(contract: ContractRecord) -> Yardstick | None:
    """Return the scheme that a model without a published init follows."""
    yardstick = followed(contract)
    if yardstick is None or yardstick.scheme.free:
        # A formula without a base std that explains every matrix comes before one with it.
        return find_mistaken(contract) or yardstick
    return yardstick


def _note_of_own(yardstick: Yardstick) -> str:
    note = f"follows {yardstick.scheme.title}"
    if yardstick.s is not None:
        note += f", s = {plain(yardstick.s)}"
    if yardstick.looks:
        note += f", with {yardstick.looks}"
    return note


def deviations_of(contract: ContractRecord) -> list[Deviation]:
    """Return the weights that differ from the pinned contract, or else from the rest."""
    return judge(contract).deviations


def judge(contract: ContractRecord) -> Judgement:
    """Return how the weights of a model compare with a scheme, worked out when it is needed."""
    return Judgement(contract, judged)


def _judgement(context: RuleContext, rule: Rule) -> Judgement | None:
    """Return the judgement of the weights, if the rule applies to a model of this state."""
    if context.report.state not in rule.states:
        return None
    return context.judgement


def _findings(
    context: RuleContext, rule: Rule, differing: Iterable[Deviation], by: str
) -> list[Finding]:
    """Return one finding per name pattern: the layers, measured, expected, and what it looks like.

    Args:
        context: of the evaluation.
        rule: that fires.
        differing: the weights.
        by: what expects another value, with its verb.
    """
    groups: dict[tuple[str, str], list[Deviation]] = {}
    for deviation in differing:
        key = (deviation.weight.pattern, deviation.section)
        groups.setdefault(key, []).append(deviation)
    findings = []
    for group in groups.values():
        what, evidence = describe(group, by)
        where = _where(deviation.weight for deviation in group)
        level = context.level(rule, rule.level)
        fix = _fix_of(group[0])
        findings.append(Finding(rule.code, level, where, what, evidence, rule.summary, fix))
    return findings


def _fix_of(deviation: Deviation) -> str:
    if deviation.by_layers:
        return "initialise it as the other layers"
    if len(deviation.weight.shape) > 1:
        return f"initialise it with std {deviation.formula}"
    return ""


def _where(weights: Iterable[WeightRecord]) -> list[str]:
    """Return the sub-layers of weights, each once; the name of a weight outside all."""
    return list(dict.fromkeys(weight.sublayer or weight.parameter for weight in weights))


# -- JD201 -----------------------------------------------------------------------------------------
def _pinned(context: RuleContext, rule: Rule) -> CheckOutcome:
    contract = context.report.contract
    if contract is None or not contract.pinned:
        return NOT_APPLICABLE
    if _known_to_be_trained(context.report):
        return CheckOutcome(
            0, note=f"the pinned contract is for an init; trained ({context.report.state_reason})"
        )
    # 1. What the user should know about the contract.
    scheme = pinned_scheme(contract)
    used = {key for weight in contract.weights for key in _keys(scheme, weight)}
    unmatched = [key for key in contract.pinned if key not in used]
    notes = []
    if unmatched:
        notes.append(f"nothing in this model matches {', '.join(unmatched)}")
    if context.report.state == "trained":
        notes.append(
            "applied although the weights look trained, which is a guess; --state trained leaves "
            "it out"
        )

    # 2. The weights that differ from it.
    count, differing = deviations(Yardstick.given(contract, scheme))
    findings = _findings(context, rule, differing, "the pinned contract expects")
    return CheckOutcome(count, findings, note="; ".join(notes))


def _known_to_be_trained(report: Report) -> bool:
    """Return whether somebody said that the weights are trained, or their file does.

    A guess is not enough.
    """
    return report.state == "trained" and report.state_basis in ("given", "file")


def _keys(scheme: Scheme, weight: WeightRecord) -> list[str]:
    """Return the keys of the scheme whose formulas are those of a weight."""
    formulas = scheme.of(weight)
    if not formulas:
        return []

    # Compared by identity: two keys may state equal formulas.
    return [key for key, value in scheme.formulas.items() if value is formulas]


# -- JD202 to JD205 --------------------------------------------------------------------------------
def _by_kind(kind: str) -> Callable[[RuleContext, Rule], CheckOutcome]:
    """Return the check of JD202 ("published"), JD203 ("depth"), JD204 ("own") or JD205 ("layers").

    Each of the four reports its own share of the weights that differ.
    """

    def check(context: RuleContext, rule: Rule) -> CheckOutcome:
        judgement = _judgement(context, rule)
        if judgement is None:
            return NOT_APPLICABLE
        contract, result = judgement.contract, judgement.result

        # 1. Weights that no init draws come first.
        if kind == "own":
            no_draws = _no_draw_findings(context, rule, contract, result)
            if no_draws:
                return _outcome_of_no_draws(context, rule, result, no_draws)

        # 2. Only one of "published" and "own" reports, according to the scheme.
        is_on_scheme = kind in ("published", "own")
        is_for_other_rule = is_on_scheme and (kind == "published") != result.published
        if not result.count or is_for_other_rule:
            shows_note = kind == "own" and not result.published
            return CheckOutcome(0, note=result.note if shows_note else "")

        # 3. The weights that differ in this rule's way.
        matched = _matched(kind, contract, result)
        if not matched:
            return NOT_APPLICABLE
        kinds = (kind, "plain") if is_on_scheme else (kind,)
        differing = [deviation for deviation in result.deviations if deviation.kind in kinds]
        findings = _findings(context, rule, differing, f"{_authority(contract, result)} expects")
        return CheckOutcome(matched, findings, note=result.note)

    return check


def _authority(contract: ContractRecord, result: SchemeComparison) -> str:
    """Return what the weights are compared with, in words."""
    if result.mistake:
        return "the formula of literature"
    if result.published:
        return f"the published init of {contract.family}"
    return "the scheme of the rest"


def _outcome_of_no_draws(
    context: RuleContext, rule: Rule, result: SchemeComparison, no_draws: list[Finding]
) -> CheckOutcome:
    """Return the outcome of JD204 for a model with weights that no init draws."""
    named = {name for finding in no_draws for name in finding.evidence["parameters"]}
    differing = []
    for deviation in result.deviations:
        is_of_this_rule = deviation.kind in ("own", "plain") and not result.published
        if is_of_this_rule and deviation.weight.parameter not in named:
            differing.append(deviation)
    others = _findings(context, rule, differing, "the scheme of the rest expects")
    return CheckOutcome(max(result.count, len(no_draws)), [*no_draws, *others], note=result.note)


def _no_draw_findings(
    context: RuleContext, rule: Rule, contract: ContractRecord, result: SchemeComparison
) -> list[Finding]:
    """Return one finding per name pattern and sign for weights that no init draws."""
    contract = without_leftovers(contract)
    # A head of unit spread may be what the family publishes (T5 of transformers).
    limit = None if result.published else context.thresholds.limits("logits_std").warning
    groups: dict[tuple[str, str], list[NoDraw]] = {}
    for no_draw in find_no_draws(contract, limit):
        groups.setdefault((no_draw.weight.pattern, no_draw.fix), []).append(no_draw)
    findings = []
    for (pattern, fix), group in groups.items():
        first, sign = group[0].weight, group[0].sign
        of = sum(weight.pattern == pattern for weight in contract.weights)
        count = f" ({len(group)} of {of})" if of > 1 else ""
        what = f"{pattern.removesuffix('.weight')}{count}: {sign}"
        evidence = {
            "parameters": [no_draw.weight.parameter for no_draw in group],
            "role": first.role,
            "pattern": pattern,
            "family": first.family,
            "value": first.std,
            "outliers": [no_draw.weight.outliers for no_draw in group],
            "looks": "no init draws this",
        }
        if first.role == "head" and "logits" in sign:
            evidence["logits_std"] = contract.logits_std
        where = _where(no_draw.weight for no_draw in group)
        level = context.level(rule, rule.level)
        findings.append(Finding(rule.code, level, where, what, evidence, rule.summary, fix))
    return findings


def _matched(kind: str, contract: ContractRecord, result: SchemeComparison) -> int:
    """Return how much a rule had to look at.

    For depth these are matrices under a scheme, for layers name patterns of several.
    """
    if kind == "depth":
        if result.scheme is None:
            return 0
        return sum(weight.role in MATRICES for weight in contract.weights)
    if kind == "layers":
        patterns = Counter(
            weight.pattern for weight in contract.weights if weight.layer is not None
        )
        return sum(count > 1 for count in patterns.values())
    return result.count


# -- JD206 -----------------------------------------------------------------------------------------
def _tied(context: RuleContext, rule: Rule) -> CheckOutcome:
    judgement = _judgement(context, rule)
    if judgement is None or not judgement.contract.tied:
        return NOT_APPLICABLE
    contract = judgement.contract
    limit = context.thresholds.limits("logits_std").warning
    width = contract.sizes.get("d", 0.0)
    findings = []
    for weight in contract.weights:
        if weight.parameter not in contract.tied or weight.std is None or limit is None:
            continue
        logits = contract.logits_std
        if logits is None:
            logits = weight.std * width**0.5
        if logits > limit:
            findings.append(_tied_finding(context, rule, weight, logits, limit))
    return CheckOutcome(len(contract.tied), findings)


def _tied_finding(
    context: RuleContext, rule: Rule, weight: WeightRecord, logits: float, limit: float
) -> Finding:
    what = (
        f"{weight.parameter} has std {plain(weight.std)} and is the head too: logits of std "
        f"{plain(logits)} at init, so that the first loss is about ln V + {plain(logits**2 / 2)}"
    )
    evidence = {
        "parameters": [weight.parameter],
        "value": logits,
        "threshold": limit,
        "std": weight.std,
    }
    fix = "scale the embedding in the forward instead of in its weights, or untie the head"
    level = context.level(rule, "warning")
    return Finding(rule.code, level, [weight.parameter], what, evidence, rule.summary, fix)


# -- JD207 -----------------------------------------------------------------------------------------
def _decay(context: RuleContext, rule: Rule) -> CheckOutcome:
    contract = context.report.contract
    if contract is None:
        return NOT_APPLICABLE
    has_optimizer = any(weight.decayed is not None for weight in contract.weights)
    if not has_optimizer:
        return NOT_APPLICABLE

    # One finding for each kind of parameter with weight decay.
    spared = [weight for weight in contract.weights if weight.role in _SPARED]
    decayed = [weight for weight in spared if weight.decayed]
    findings: list[Finding] = []
    for role, words in _SPARED.items():
        names = [weight.parameter for weight in decayed if weight.role == role]
        if names:
            findings.append(_decay_finding(context, rule, role, words, names))
    return CheckOutcome(len(spared), findings)


def _decay_finding(
    context: RuleContext, rule: Rule, role: str, words: str, names: list[str]
) -> Finding:
    """Return the finding about the parameters of one role that decay."""
    listed = list_names(names, longest=None)
    what = f"{words} in a parameter group with weight decay: {listed}"
    evidence = {"parameters": names, "role": role}
    level = context.level(rule, "info" if role == "bias" else "warning")
    fix = "a parameter group with weight_decay=0 for embeddings, gains and biases"
    return Finding(rule.code, level, names, what, evidence, rule.summary, fix)


RULES = (
    Rule("JD201", "pinned-contract", "error", check=_pinned),
    Rule("JD202", "published-init", "warning", check=_by_kind("published"), states=("init",)),
    Rule("JD203", "depth-scaling", "warning", check=_by_kind("depth"), states=("init",)),
    Rule("JD204", "init-consistency", "warning", check=_by_kind("own"), states=("init",)),
    Rule("JD205", "layers-differ", "warning", check=_by_kind("layers"), states=("init",)),
    Rule("JD206", "tied-embedding", "warning", check=_tied, states=("init",)),
    Rule("JD207", "decayed", "warning", check=_decay),
)
