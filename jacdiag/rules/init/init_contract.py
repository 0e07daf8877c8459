"""JD201 to JD207: how every weight was initialised.

Weights are compared with a pinned contract, a published init, or the rest of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from jacdiag.records import ContractRecord, Finding, Level, Report, WeightRecord
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.grouping import group_by
from jacdiag.rules.init.contract_judgement import Judgement, SchemeComparison, pinned_scheme
from jacdiag.rules.init.first_loss import describe_first_loss
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
    with_drawn_among_zeros,
)
from jacdiag.rules.init.scheme_fit import Yardstick
from jacdiag.rules.init.schemes import MATRICES, Scheme, published_for
from jacdiag.rules.init.weight_facts import (
    is_vector,
    parameters_of,
    pattern_of,
    places_of,
    with_role,
)
from jacdiag.rules.rule import NOT_APPLICABLE, CheckOutcome, Rule, RuleContext
from jacdiag.rules.wording import list_names

# Roles that are usually spared from weight decay, in words.
_SPARED = {"embedding": "the embedding", "norm_gain": "norm gains", "bias": "biases"}


def judged(contract: ContractRecord) -> SchemeComparison:
    """Compare every weight with what its family, or the rest of the model, says."""
    contract = without_no_draws(without_leftovers(contract))

    # 1. The published init of the family.
    published = published_for(contract.family)
    if published is not None:
        note = f"published init of {contract.family}: {published.title}"
        return _compare_all(Yardstick.given(contract, published), note)

    # 2. The scheme that most of the model follows.
    own = _own_yardstick(contract)
    if own is not None:
        return _compare_all(own, _note_of_own(own))

    # 3. No scheme: the layers alone.
    count, uneven = layers_that_differ(contract.weights)
    uneven = with_drawn_among_zeros(contract, uneven)
    note = "follows no known scheme; layers are compared with each other"
    return SchemeComparison(None, False, None, count, uneven, note)


def _compare_all(yardstick: Yardstick, note: str) -> SchemeComparison:
    """Compare the weights that a scheme covers with it, and the others layer by layer.

    Args:
        yardstick: the scheme for this model.
        note: which scheme it is, in words.
    """
    # 1. The weights that the scheme covers, and a head that nobody initialized.
    count, differing = deviations(yardstick)
    is_right_elsewhere = yardstick.is_followed and not yardstick.looks
    if is_right_elsewhere:
        named = {deviation.weight.parameter for deviation in differing}
        for deviation in head_left_at_default(yardstick):
            if deviation.weight.parameter not in named:
                differing.append(deviation)

    # 2. The others, layer by layer.
    weights = yardstick.contract.weights
    uncovered = [weight for weight in weights if yardstick.mismatches(weight) is None]
    count_of_others, uneven = layers_that_differ(uncovered)
    if yardstick.is_followed:
        uneven = with_drawn_among_zeros(yardstick.contract, uneven)

    # 3. Both together.
    return SchemeComparison(
        yardstick.scheme,
        not yardstick.is_followed,
        yardstick.s,
        count + count_of_others,
        [*differing, *uneven],
        note,
        mistake=yardstick.looks,
    )


def _own_yardstick(contract: ContractRecord) -> Yardstick | None:
    """Return the scheme that a model without a published init follows."""
    yardstick = followed(contract)
    if yardstick is not None and not yardstick.scheme.free:
        return yardstick

    # A formula without a base std that explains every matrix comes before one with it.
    mistaken = find_mistaken(contract)
    return mistaken or yardstick


def _note_of_own(yardstick: Yardstick) -> str:
    """Return which scheme a model follows, with its base std and the mistake in it."""
    note = f"follows {yardstick.scheme.title}"
    if yardstick.s is not None:
        note += f", s = {plain(yardstick.s)}"

    # The mistake of the entire model.
    if yardstick.looks:
        note += f", with {yardstick.looks}"
    return note


def deviations_of(contract: ContractRecord) -> list[Deviation]:
    """Return the weights that differ from the pinned contract, or else from the rest."""
    return judge(contract).deviations


def judge(contract: ContractRecord) -> Judgement:
    """Return how the weights of a model compare with a scheme, worked out when it is needed."""
    return Judgement(contract, judged)


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
    findings = []
    for group in group_by(differing, _name_of).values():
        # 1. What is said of them.
        what, evidence = describe(group, by)
        fix = _fix_of(group[0])

        # 2. The finding.
        where = places_of(deviation.weight for deviation in group)
        level = context.level(rule, rule.level)
        findings.append(Finding(rule.code, level, where, what, evidence, rule.summary, fix))

    return findings


def _name_of(deviation: Deviation) -> tuple[str, str]:
    """Return the name of a weight with "*" for its layer, and its section."""
    return deviation.weight.pattern, deviation.section


def _fix_of(deviation: Deviation) -> str:
    """Return what to do; "" for vectors, whose value the sentence gives."""
    if deviation.by_layers:
        return "initialise it as the other layers"

    # Matrices have a std.
    if is_vector(deviation.weight):
        return ""

    subject = "it"
    if deviation.section:
        subject = "these rows"
    return f"initialise {subject} with std {deviation.formula}"


# -- JD201 -----------------------------------------------------------------------------------------
def _pinned(context: RuleContext, rule: Rule) -> CheckOutcome:
    # 1. A contract for an init says nothing of trained weights.
    contract = context.report.contract
    if contract is None or not contract.pinned:
        return NOT_APPLICABLE
    if _known_to_be_trained(context.report):
        reason = context.report.state_reason
        return CheckOutcome(0, note=f"the pinned contract is for an init; trained ({reason})")

    # 2. The weights that differ from it.
    scheme = pinned_scheme(contract)
    count, differing = deviations(Yardstick.given(contract, scheme))
    findings = _findings(context, rule, differing, "the pinned contract expects")
    return CheckOutcome(count, findings, note=_note_of_pinned(context, contract, scheme))


def _note_of_pinned(context: RuleContext, contract: ContractRecord, scheme: Scheme) -> str:
    """Return what the user should know about a pinned contract; "" if nothing."""
    notes = []

    # 1. Keys that no weight has.
    used: set[str] = set()
    for weight in contract.weights:
        used.update(_keys(scheme, weight))
    unmatched = [key for key in contract.pinned if key not in used]
    if unmatched:
        notes.append(f"nothing in this model matches {', '.join(unmatched)}")

    # 2. A state that may be another.
    if context.report.state == "trained":
        notes.append(
            "applied although the weights look trained, which is a guess; --state trained leaves "
            "it out"
        )
    return "; ".join(notes)


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
    keys: list[str] = []
    for key, formulas_of_key in scheme.formulas.items():
        if formulas_of_key is formulas:
            keys.append(key)

    return keys


# -- JD202 to JD205 --------------------------------------------------------------------------------
def _by_kind(kind: str) -> Callable[[RuleContext, Rule], CheckOutcome]:
    """Return the check of JD202 ("published"), JD203 ("depth"), JD204 ("own") or JD205 ("layers").

    Each of the four reports its own share of the weights that differ.
    """

    def check(context: RuleContext, rule: Rule) -> CheckOutcome:
        judgement = context.judgement_for(rule)
        if judgement is None:
            return NOT_APPLICABLE

        # Weights that no init draws come before those that differ from a scheme.
        if kind == "own":
            no_draws = _no_draw_findings(context, rule, judgement)
            if no_draws:
                return _outcome_of_no_draws(context, rule, judgement.result, no_draws)

        return _compare_by_kind(kind, context, rule, judgement)

    return check


def _compare_by_kind(
    kind: str, context: RuleContext, rule: Rule, judgement: Judgement
) -> CheckOutcome:
    """Return the outcome of one of the four rules, with the weights that differ in its way."""
    # 1. Only one of "published" and "own" reports, according to the scheme.
    contract, result = judgement.contract, judgement.result
    if not result.count or kind == _other_rule(result):
        return CheckOutcome(0, note=_note_of_silence(kind, result))

    # 2. How much there was to look at.
    matched = _matched(kind, contract, result)
    if not matched:
        return NOT_APPLICABLE

    # 3. The weights that differ.
    kinds = _REPORTED[kind]
    differing = [deviation for deviation in result.deviations if deviation.kind in kinds]
    findings = _findings(context, rule, differing, f"{_authority(contract, result)} expects")
    return CheckOutcome(matched, findings, note=result.note)


# The kinds of deviations that each rule reports.
_REPORTED = {
    "published": ("published", "plain"),
    "own": ("own", "plain"),
    "depth": ("depth",),
    "layers": ("layers",),
}


def _other_rule(result: SchemeComparison) -> str:
    """Return which of "published" and "own" says nothing of a model."""
    if result.published:
        return "own"

    return "published"


def _note_of_silence(kind: str, result: SchemeComparison) -> str:
    """Return the note of a rule that has nothing to compare: JD204 names the scheme."""
    # JD202 names a published one.
    names_the_scheme = kind == "own" and not result.published
    if names_the_scheme:
        return result.note
    return ""


def _authority(contract: ContractRecord, result: SchemeComparison) -> str:
    """Return what the weights are compared with, in words."""
    if result.mistake:
        return "the formula of literature"

    # A published init, else the scheme that most of the model follows.
    if result.published:
        return f"the published init of {contract.family}"

    return "the scheme of the rest"


def _outcome_of_no_draws(
    context: RuleContext, rule: Rule, result: SchemeComparison, no_draws: list[Finding]
) -> CheckOutcome:
    """Return the outcome of JD204 for a model with weights that no init draws."""
    # 1. The parameters that are named already.
    named: set[str] = set()
    for finding in no_draws:
        named.update(finding.evidence["parameters"])

    # 2. Others that differ from the scheme; JD202 reports those of a published one.
    differing: list[Deviation] = []
    if not result.published:
        differing = _reported_by_own(result.deviations, named)

    # 3. Both together.
    others = _findings(context, rule, differing, "the scheme of the rest expects")
    count = max(result.count, len(no_draws))
    return CheckOutcome(count, [*no_draws, *others], note=result.note)


def _reported_by_own(deviations: Sequence[Deviation], named: Collection[str]) -> list[Deviation]:
    """Return the deviations that JD204 reports, of weights that are not named already."""
    reported = []
    for deviation in deviations:
        is_of_this_rule = deviation.kind in _REPORTED["own"]
        is_named = deviation.weight.parameter in named
        if is_of_this_rule and not is_named:
            reported.append(deviation)
    return reported


def _no_draw_findings(context: RuleContext, rule: Rule, judgement: Judgement) -> list[Finding]:
    """Return one finding per name pattern and sign for weights that no init draws."""
    # 1. A head of unit spread may be what the family publishes (T5 of transformers).
    limit = context.thresholds.limits("logits_std").warning
    if judgement.result.published:
        limit = None

    # 2. One finding for each name and sign.
    contract = without_leftovers(judgement.contract)
    no_draws = find_no_draws(contract, limit, describe_first_loss(context.report))
    groups = group_by(no_draws, lambda no_draw: (no_draw.weight.pattern, no_draw.fix))
    return [_no_draw_finding(context, rule, contract, group) for group in groups.values()]


def _no_draw_finding(
    context: RuleContext, rule: Rule, contract: ContractRecord, group: list[NoDraw]
) -> Finding:
    """Return the finding about the weights of one name with one sign that no init draws."""
    # 1. The sentence.
    weights = [no_draw.weight for no_draw in group]
    first = weights[0]
    sign = group[0].sign
    of = sum(weight.pattern == first.pattern for weight in contract.weights)
    count = ""
    if of > 1:
        count = f" ({len(group)} of {of})"
    what = f"{first.pattern.removesuffix('.weight')}{count}: {sign}"

    # 2. The evidence.
    evidence = {
        "parameters": parameters_of(weights),
        "role": first.role,
        "pattern": first.pattern,
        "family": first.family,
        "value": first.std,
        "outliers": [weight.outliers for weight in weights],
        "looks": "no init draws this",
    }
    if first.role == "head" and "logits" in sign:
        evidence["logits_std"] = contract.logits_std

    # 3. The finding.
    where = places_of(weights)
    level = context.level(rule, rule.level)
    return Finding(rule.code, level, where, what, evidence, rule.summary, group[0].fix)


def _matched(kind: str, contract: ContractRecord, result: SchemeComparison) -> int:
    """Return how much a rule had to look at.

    For depth these are matrices under a scheme, for layers name patterns of several.
    """
    if kind == "depth":
        return _count_scaled(contract, result)
    if kind == "layers":
        return _count_comparable(contract)

    # A scheme covers as many weights as were compared with it.
    return result.count


def _count_scaled(contract: ContractRecord, result: SchemeComparison) -> int:
    """Return how many matrices may be scaled with depth; none without a scheme."""
    if result.scheme is None:
        return 0

    # A scheme says of every matrix of a sub-layer whether it is.
    return len(with_role(contract.weights, *MATRICES))


def _count_comparable(contract: ContractRecord) -> int:
    """Return how many names stand in several layers."""
    of_layers = [weight for weight in contract.weights if weight.layer is not None]
    groups = group_by(of_layers, pattern_of)

    # One weight alone has nothing to be compared with.
    return sum(len(group) > 1 for group in groups.values())


# -- JD206 -----------------------------------------------------------------------------------------
def _tied(context: RuleContext, rule: Rule) -> CheckOutcome:
    judgement = context.judgement_for(rule)
    if judgement is None or not judgement.contract.tied:
        return NOT_APPLICABLE

    # 1. The tables that the head reads too.
    contract = judgement.contract
    tied = [weight for weight in contract.weights if weight.parameter in contract.tied]
    limit = context.thresholds.limits("logits_std").warning

    # 2. Those that make the logits too large.
    findings: list[Finding] = []
    for weight in tied:
        logits = _std_of_logits(contract, weight)
        if logits is None or limit is None:
            continue

        if logits > limit:
            findings.append(_tied_finding(context, rule, weight, logits, limit))

    return CheckOutcome(len(contract.tied), findings)


def _std_of_logits(contract: ContractRecord, head: WeightRecord) -> float | None:
    """Return the std of the logits as measured, else as a head makes it of unit vectors."""
    if head.std is None:
        return None

    # The forward may scale the logits, which only a measurement shows.
    if contract.logits_std is not None:
        return contract.logits_std
    width = contract.sizes.get("d", 0.0)
    return float(head.std * width**0.5)


def _tied_finding(
    context: RuleContext, rule: Rule, weight: WeightRecord, logits: float, limit: float
) -> Finding:
    # 1. The sentence.
    what = (
        f"{weight.parameter} has std {plain(weight.std)} and is the head too: logits of std "
        f"{plain(logits)} at init; {describe_first_loss(context.report)}"
    )

    # 2. The finding.
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
    if contract is None or not _has_optimizer(contract):
        return NOT_APPLICABLE

    # One finding for each kind of parameter with weight decay.
    findings: list[Finding] = []
    for role, words in _SPARED.items():
        weights = with_role(contract.weights, role)
        decayed = [weight for weight in weights if weight.decayed]
        if decayed:
            names = parameters_of(decayed)
            findings.append(_decay_finding(context, rule, role, words, names))

    # All parameters of these kinds were looked at.
    spared = with_role(contract.weights, *_SPARED)
    return CheckOutcome(len(spared), findings)


def _has_optimizer(contract: ContractRecord) -> bool:
    """Return whether it is known which parameters decay."""
    return any(weight.decayed is not None for weight in contract.weights)


def _decay_finding(
    context: RuleContext, rule: Rule, role: str, words: str, names: list[str]
) -> Finding:
    """Return the finding about the parameters of one role that decay."""
    # 1. Many recipes let biases decay.
    level: Level = "warning"
    if role == "bias":
        level = "info"

    # 2. The finding.
    listed = list_names(names, longest=None)
    what = f"{words} in a parameter group with weight decay: {listed}"
    evidence = {"parameters": names, "role": role}
    fix = "a parameter group with weight_decay=0 for embeddings, gains and biases"
    level = context.level(rule, level)
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
