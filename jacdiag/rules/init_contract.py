"""JD201 to JD207: how every weight was initialised, against a pinned contract, a published init,
the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from jacdiag.records import ContractRecord, Finding, Report, WeightRecord
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.leftover_memory import without_leftovers
from jacdiag.rules.mistaken_formulas import find_mistaken
from jacdiag.rules.never_drawn import NoDraw, find_no_draws, without_no_draws
from jacdiag.rules.rule import NOT_APPLICABLE, Context, Outcome, Rule
from jacdiag.rules.scheme_choice import followed
from jacdiag.rules.scheme_deviations import (
    Departure,
    departures,
    head_left_at_default,
    layers_that_differ,
    told,
)
from jacdiag.rules.scheme_fit import Yardstick
from jacdiag.rules.schemes import MATRICES, Scheme, formulas_of, published_for


@dataclass(frozen=True)
class Judged:
    """A model compared with the scheme that speaks for it: that of its family, else the one that
    most of it follows.

    Attributes:
        scheme: None if the model follows none; then only its layers are compared with each other.
        published: Whether it is the published init of the model's family.
        s: The base std where the scheme leaves it open.
        count: How many weights were compared.
        found: Those that depart.
        note: Which scheme it is, in words.
        mistake: Made with the formula of the scheme in the entire model; "" for none.
    """

    scheme: Scheme | None
    published: bool
    s: float | None
    count: int
    found: list[Departure]
    note: str
    mistake: str = ""


def judged(contract: ContractRecord) -> Judged:
    """Compare every weight with what its family, or the rest of the model, says."""
    contract = without_no_draws(without_leftovers(contract))
    scheme = published_for(contract.family)
    if scheme is not None:
        yardstick = Yardstick.given(contract, scheme)
        note = f"published init of {contract.family}: {scheme.title}"
    else:
        followed_one = followed(contract)
        if followed_one is None or followed_one.scheme.free:
            # A formula without a base std that explains every matrix comes before one with it.
            followed_one = find_mistaken(contract) or followed_one
        if followed_one is None:
            count, found = layers_that_differ(contract.weights)
            note = "follows no known scheme; layers are compared with each other"
            return Judged(None, False, None, count, found, note)
        yardstick = followed_one
        base = f", s = {plain(yardstick.s)}" if yardstick.s is not None else ""
        note = f"follows {yardstick.scheme.title}{base}"
        if yardstick.looks:
            note += f", with {yardstick.looks}"
    count, found = departures(yardstick)
    if scheme is None and not yardstick.looks:
        spoken = {departure.weight.parameter for departure in found}
        found += [d for d in head_left_at_default(yardstick) if d.weight.parameter not in spoken]
    silent = [weight for weight in contract.weights if yardstick.mismatches(weight) is None]
    more, uneven = layers_that_differ(silent)
    published = scheme is not None
    mistake = yardstick.looks
    return Judged(
        yardstick.scheme, published, yardstick.s, count + more, [*found, *uneven], note, mistake
    )


def departures_of(contract: ContractRecord) -> list[Departure]:
    """Return every weight that differs from the pinned contract, and of the others those that
    differ from the rest.
    """
    pinned: list[Departure] = []
    if contract.pinned:
        pinned = departures(Yardstick.given(contract, _pinned_scheme(contract)))[1]
    spoken = {one.weight.parameter for one in pinned}
    return [*pinned, *(one for one in judged(contract).found if one.weight.parameter not in spoken)]


def _pinned_scheme(contract: ContractRecord) -> Scheme:
    return Scheme(
        "pinned", "the pinned contract", "given by the user", formulas_of(contract.pinned)
    )


def _contract(context: Context, rule: Rule) -> ContractRecord | None:
    contract = context.report.contract
    return contract if contract is not None and context.report.state in rule.states else None


def _findings(context: Context, rule: Rule, found: Iterable[Departure], by: str) -> list[Finding]:
    """One finding per name pattern: which layers, measured, expected, and what it looks like."""
    groups: dict[tuple[str, str], list[Departure]] = {}
    for one in found:
        groups.setdefault((one.weight.pattern, one.section), []).append(one)
    made = []
    for group in groups.values():
        what, evidence = told(group, by)
        where = list(dict.fromkeys(d.weight.sublayer or d.weight.parameter for d in group))
        fix = ""
        if group[0].by_layers:
            fix = "initialise it as the other layers"
        elif len(group[0].weight.shape) > 1:
            fix = f"initialise it with std {group[0].formula}"
        made.append(
            Finding(
                rule.code, context.level(rule, rule.level), where, what, evidence, rule.summary, fix
            )
        )
    return made


# -- JD201 -----------------------------------------------------------------------------------------
def _pinned(context: Context, rule: Rule) -> Outcome:
    contract = context.report.contract
    if contract is None or not contract.pinned:
        return NOT_APPLICABLE
    if _known_to_be_trained(context.report):
        return Outcome(
            0, note=f"the pinned contract is for an init; trained ({context.report.state_reason})"
        )
    own = _pinned_scheme(contract)
    unmatched = [
        k for k in contract.pinned if not any(k in _keys(own, w) for w in contract.weights)
    ]
    notes = [f"nothing in this model matches {', '.join(unmatched)}"] if unmatched else []
    if context.report.state == "trained":
        notes.append(
            "applied although the weights look trained, which is a guess; --state trained leaves "
            "it out"
        )
    count, found = departures(Yardstick.given(contract, own))
    return Outcome(
        count, _findings(context, rule, found, "the pinned contract expects"), note="; ".join(notes)
    )


def _known_to_be_trained(report: Report) -> bool:
    """Return whether somebody said that the weights are trained, or their file does. A guess is not
    enough.
    """
    return report.state == "trained" and report.state_basis in ("given", "file")


def _keys(scheme: Scheme, weight: WeightRecord) -> list[str]:
    formulas = scheme.of(weight)
    return [key for key, value in scheme.formulas.items() if formulas and value is formulas]


# -- JD202 to JD205 --------------------------------------------------------------------------------
def _by_kind(kind: str) -> Callable[[Context, Rule], Outcome]:
    def check(context: Context, rule: Rule) -> Outcome:
        contract = _contract(context, rule)
        if contract is None:
            return NOT_APPLICABLE
        result = judged(contract)
        unlike_any = _no_draw_findings(context, rule, contract, result) if kind == "own" else []
        if unlike_any:
            spoken = {name for finding in unlike_any for name in finding.evidence["parameters"]}
            found = [
                departure
                for departure in result.found
                if departure.kind in ("own", "plain")
                and not result.published
                and departure.weight.parameter not in spoken
            ]
            more = _findings(context, rule, found, "the scheme of the rest expects")
            return Outcome(
                max(result.count, len(unlike_any)), [*unlike_any, *more], note=result.note
            )
        elsewhere = kind in ("published", "own") and (kind == "published") != result.published
        if not result.count or elsewhere:
            return Outcome(0, note=result.note if kind == "own" and not result.published else "")
        who = (
            f"the published init of {contract.family}"
            if result.published
            else "the scheme of the rest"
        )
        if result.mistake:
            who = "the formula of literature"
        by = f"{who} expects"
        mine = [
            d
            for d in result.found
            if d.kind == kind or (d.kind == "plain" and kind in ("published", "own"))
        ]
        matched = _matched(kind, contract, result)
        if not matched:
            return NOT_APPLICABLE
        return Outcome(matched, _findings(context, rule, mine, by), note=result.note)

    return check


def _no_draw_findings(
    context: Context, rule: Rule, contract: ContractRecord, result: Judged
) -> list[Finding]:
    """Return one finding per name pattern and sign for weights that no init draws."""
    contract = without_leftovers(contract)
    # A head of unit spread may be what the family publishes (T5 of transformers).
    limit = None if result.published else context.thresholds.limits("logits_std").warning
    groups: dict[tuple[str, str], list[NoDraw]] = {}
    for one in find_no_draws(contract, limit):
        groups.setdefault((one.weight.pattern, one.fix), []).append(one)
    findings = []
    for (pattern, fix), group in groups.items():
        first, names = group[0].weight, [one.weight.parameter for one in group]
        of = sum(weight.pattern == pattern for weight in contract.weights)
        count = f" ({len(group)} of {of})" if of > 1 else ""
        what = f"{pattern.removesuffix('.weight')}{count}: {group[0].sign}"
        evidence = {
            "parameters": names,
            "role": first.role,
            "pattern": pattern,
            "family": first.family,
            "value": first.std,
            "outliers": [one.weight.outliers for one in group],
            "looks": "no init draws this",
        }
        if first.role == "head" and "logits" in group[0].sign:
            evidence["logits_std"] = contract.logits_std
        where = list(dict.fromkeys(one.weight.sublayer or one.weight.parameter for one in group))
        level = context.level(rule, rule.level)
        findings.append(Finding(rule.code, level, where, what, evidence, rule.summary, fix))
    return findings


def _matched(kind: str, contract: ContractRecord, result: Judged) -> int:
    """What a rule had to look at: for depth, matrices under a scheme; for layers, patterns of
    several.
    """
    if kind == "depth":
        return sum(w.role in MATRICES for w in contract.weights) if result.scheme is not None else 0
    if kind == "layers":
        patterns = [w.pattern for w in contract.weights if w.layer is not None]
        return sum(patterns.count(p) > 1 for p in dict.fromkeys(patterns))
    return result.count


# -- JD206 -----------------------------------------------------------------------------------------
def _tied(context: Context, rule: Rule) -> Outcome:
    contract = _contract(context, rule)
    if contract is None or not contract.tied:
        return NOT_APPLICABLE
    limit = context.thresholds.limits("logits_std").warning
    width = contract.sizes.get("d", 0.0)
    findings = []
    for weight in contract.weights:
        if weight.parameter not in contract.tied or weight.std is None or limit is None:
            continue
        logits = contract.logits_std if contract.logits_std is not None else weight.std * width**0.5
        if logits > limit:
            what = (
                f"{weight.parameter} has std {plain(weight.std)} and is the head too: logits of "
                f"std {plain(logits)} "
                f"at init, so that the first loss is about ln V + {plain(logits**2 / 2)}"
            )
            evidence = {
                "parameters": [weight.parameter],
                "value": logits,
                "threshold": limit,
                "std": weight.std,
            }
            fix = "scale the embedding in the forward instead of in its weights, or untie the head"
            findings.append(
                Finding(
                    rule.code,
                    context.level(rule, "warning"),
                    [weight.parameter],
                    what,
                    evidence,
                    rule.summary,
                    fix,
                )
            )
    return Outcome(len(contract.tied), findings)


# -- JD207 -----------------------------------------------------------------------------------------
def _decay(context: Context, rule: Rule) -> Outcome:
    contract = context.report.contract
    if contract is None or not any(w.decayed is not None for w in contract.weights):
        return NOT_APPLICABLE
    spared = [w for w in contract.weights if w.role in ("embedding", "norm_gain", "bias")]
    findings = []
    for role, words in (
        ("embedding", "the embedding"),
        ("norm_gain", "norm gains"),
        ("bias", "biases"),
    ):
        names = [w.parameter for w in spared if w.role == role and w.decayed]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            what = f"{words} in a parameter group with weight decay: {', '.join(names[:3])}{more}"
            evidence = {"parameters": names, "role": role}
            level = context.level(rule, "info" if role == "bias" else "warning")
            fix = "a parameter group with weight_decay=0 for embeddings, gains and biases"
            findings.append(Finding(rule.code, level, names, what, evidence, rule.summary, fix))
    return Outcome(len(spared), findings)


RULES = (
    Rule("JD201", "pinned-contract", "error", check=_pinned),
    Rule("JD202", "published-init", "warning", check=_by_kind("published"), states=("init",)),
    Rule("JD203", "depth-scaling", "warning", check=_by_kind("depth"), states=("init",)),
    Rule("JD204", "init-consistency", "warning", check=_by_kind("own"), states=("init",)),
    Rule("JD205", "layers-differ", "warning", check=_by_kind("layers"), states=("init",)),
    Rule("JD206", "tied-embedding", "warning", check=_tied, states=("init",)),
    Rule("JD207", "decayed", "warning", check=_decay),
)
