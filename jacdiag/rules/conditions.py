"""JD101 to JD104: the two conditions of the paper, amplification, and the gain over depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from jacdiag.records import Finding, Interval, Level, SublayerRecord
from jacdiag.records.report import PRODUCT_ALONE
from jacdiag.rules.finding_numbers import plain, span
from jacdiag.rules.interval_status import Placed, placed
from jacdiag.rules.rule import ALL_PLACEMENTS, NOT_APPLICABLE, Context, Outcome, Rule
from jacdiag.rules.thresholds import CUTS, Limits

Value = Callable[[SublayerRecord], Interval | None]
Cut = Callable[[SublayerRecord], Limits]
Sentence = Callable[[Context, Rule, Sequence[Placed], Level], Finding]


def _judged(context: Context, rule: Rule, value: Value, limits: Cut, sentence: Sentence) -> Outcome:
    """Places every sub-layer's figure, and makes one finding per level out of those that lie beyond
    a cut.

    One that has no cut is left out if it was measured; what could not be measured is undecided in
    any case.
    """
    rows = context.rows(rule)
    if not rows:
        return Outcome(0, note=_why_not(context, rule))
    known = [(row, limits(row)) for row in rows if limits(row).cuts or row.branch_norm is None]
    measured = [row for row in rows if not limits(row).cuts and row.branch_norm is not None]
    without = sorted({f"{row.kind} ({row.placement})" for row in measured})
    note = f"no threshold is calibrated for {', '.join(without)}" if without else ""
    every = [placed(row, _trusted(context, row, value), one) for row, one in known]
    findings = []
    for level in ("error", "warning", "info"):
        group = [p for p in every if p.beyond == level]
        if group:
            findings.append(sentence(context, rule, group, level))
    undecided = [p.row.name for p in every if p.value is None or p.across]
    return Outcome(len(every), findings, undecided, note, {p.row.name: p.condition for p in every})


def _why_not(context: Context, rule: Rule) -> str:
    """Why a rule applies to no sub-layer, if that is for the placement of the norms; ""
    otherwise.
    """
    others = sorted(
        {_norm_words(r.placement) for r in context.report.sublayers if not r.nested and r.placement}
    )
    if (
        context.report.tier != "measured"
        or not others
        or set(rule.placements) == set(ALL_PLACEMENTS)
    ):
        return ""
    return f"the paper states it for pre-norm; this model has {' and '.join(others)}"


def _norm_words(placement: str | None) -> str:
    return "no norm" if placement in (None, "none") else f"{placement}-norm"


def _trusted(context: Context, row: SublayerRecord, value: Value) -> Interval | None:
    return None if row.name in context.distrusted else value(row)


def _worst(group: Sequence[Placed]) -> Placed:
    return max(group, key=lambda p: p.value.lower if p.value is not None else -math.inf)


def _extent(context: Context, group: Sequence[Placed]) -> str:
    """Which depths a group covers: an excess at the first layer only is another thing than one that
    persists.
    """
    depths = sorted({p.row.depth for p in group})
    last = context.report.model.layers - 1
    if depths == [0]:
        return "only at depth 0" if last > 0 else "at the only depth"
    if depths == list(range(last + 1)):
        return "at every depth"
    if depths == list(range(depths[-1] + 1)):
        return f"persists to depth {depths[-1]} of {last}"
    return (
        f"at depths {', '.join(map(str, depths[:6]))}{' ...' if len(depths) > 6 else ''} of 0 "
        f"to {last}"
    )


def _share(context: Context, rule: Rule, group: Sequence[Placed]) -> str:
    return f"{len(group)} of {len(context.rows(rule))} sub-layers, {_extent(context, group)}"


def _finding(
    context: Context,
    rule: Rule,
    group: Sequence[Placed],
    cut: Level,
    limit: float | None,
    what: str,
    fix: str,
    field: str,
) -> Finding:
    worst = _worst(group)
    assert worst.value is not None
    evidence = {
        "field": field,
        "sublayer": worst.row.name,
        "value": worst.value.estimate,
        "lower": worst.value.lower,
        "upper": worst.value.upper,
        "threshold": limit,
        "depths": sorted({p.row.depth for p in group}),
        "count": len(group),
        "of": len(context.rows(rule)),
    }
    return Finding(
        rule.code,
        context.level(rule, cut),
        [p.row.name for p in group],
        what,
        evidence,
        why=rule.summary,
        fix=fix,
    )


# -- JD101 -----------------------------------------------------------------------------------------
def _small(context: Context, rule: Rule) -> Outcome:
    scale = math.sqrt(2 * max(context.report.model.layers, 1))

    def value(row: SublayerRecord) -> Interval | None:
        return row.core_norm.scaled(scale) if row.core_norm is not None else None

    def limits(row: SublayerRecord) -> Limits:
        return context.thresholds.limits("core_norm", row.kind)

    def sentence(context: Context, rule: Rule, group: Sequence[Placed], cut: Level) -> Finding:
        worst = _worst(group)
        assert worst.value is not None
        limit = getattr(limits(worst.row), cut)
        most = f"core ‖J‖·√(2N) is {span(worst.value)} at {worst.row.name}"
        if cut == "info":
            what = f"partly met {_extent(context, group)}: {most} (met up to {plain(limit)})"
        else:
            what = f"{most} (not met above {plain(limit)}); {_share(context, rule, group)}"
        return _finding(
            context, rule, group, cut, limit, what, _smaller(context, worst.row), "core_norm"
        )

    return _judged(context, rule, value, limits, sentence)


def _smaller(context: Context, row: SublayerRecord) -> str:
    """What to change: the depth scaling where it is missing, else the std of the matrices."""
    if context.report.state == "trained":
        return ""
    layers, width = max(context.report.model.layers, 1), context.report.model.width
    out = row.weights.get("W_2") or row.weights.get("W_O")
    inner = [w.std for role, w in row.weights.items() if w.std and w is not out]
    advice = "initialise W_O and W_2 with std s/√(2N), the other matrices with s = √(2/(5d))"
    if width is None or out is None or out.std is None:
        return advice
    s = math.sqrt(2 / (5 * width))
    aim = s / math.sqrt(2 * layers)
    seen = f"{out.parameter} has std {plain(out.std)}, s/√(2N) is {plain(aim)}"
    if inner and out.std > 0.7 * max(inner) and layers > 1:
        seen += f"; no depth scaling is seen beside std {plain(max(inner))} before it"
    return f"{advice}: {seen}"


# -- JD102 -----------------------------------------------------------------------------------------
def _large(context: Context, rule: Rule) -> Outcome:
    limits = context.thresholds.limits("norm_gain")

    def value(row: SublayerRecord) -> Interval | None:
        gain = row.norm_gain
        if gain is None:
            return None
        return Interval.exact(gain.per_token.p99 if gain.per_token is not None else gain.estimate)

    def sentence(context: Context, rule: Rule, group: Sequence[Placed], cut: Level) -> Finding:
        worst = _worst(group)
        assert worst.value is not None
        spread = worst.row.shortcut_std
        sigma = worst.row.name
        if spread is not None:
            sigma = (
                f"σ_x {plain(spread.min)} at {sigma} (median over tokens {plain(spread.median)})"
            )
        if cut == "info":
            what = f"partly met {_extent(context, group)}: {sigma}"
        else:
            what = f"{sigma}, near 1 is meant; {_share(context, rule, group)}{_token(worst.row)}"
        limit = getattr(limits, cut)
        return _finding(context, rule, group, cut, limit, what, _larger(context), "norm_gain")

    return _judged(context, rule, value, lambda _row: limits, sentence)


def _token(row: SublayerRecord) -> str:
    at = row.shortcut_std.argmin if row.shortcut_std is not None else None
    if at is None or at.position is None:
        return ""
    who = f"token {at.token}" if at.token is not None else "the one"
    return f"; smallest at {who}, position {at.position}"


def _larger(context: Context) -> str:
    if context.report.state == "trained":
        return ""
    width = context.report.model.width
    factor = f"√d = {plain(math.sqrt(width))}" if width else "√d"
    return f"multiply the embedding by {factor} (scaled-embed), or put a LayerNorm on it (embed-ln)"


# -- JD103 -----------------------------------------------------------------------------------------
def _amplification(context: Context, rule: Rule) -> Outcome:
    def limits(row: SublayerRecord) -> Limits:
        return context.thresholds.limits("branch_norm", row.placement or "")

    def sentence(context: Context, rule: Rule, group: Sequence[Placed], cut: Level) -> Finding:
        worst = _worst(group)
        assert worst.value is not None
        limit = getattr(limits(worst.row), cut)
        norm = _norm_words(worst.row.placement)
        at = f"{norm} at init" if context.report.state == "trained" else norm
        what = (
            f"branch ‖J‖ is {span(worst.value)} at {worst.row.name} ({at}: {cut} above "
            f"{plain(limit)}); "
            f"{_extent(context, group)}"
        )
        return _finding(context, rule, group, cut, limit, what, "", "branch_norm")

    return _judged(context, rule, lambda row: row.branch_norm, limits, sentence)


# -- JD104 -----------------------------------------------------------------------------------------
def _product(context: Context, rule: Rule) -> Outcome:
    network = context.report.network
    if network is None or network.gain_product_log is None:
        return NOT_APPLICABLE
    limits, log = context.thresholds.limits("gain_product"), network.gain_product_log
    beyond = [cut for cut in CUTS if (at := getattr(limits, cut)) is not None and log > at]
    if not beyond:
        return Outcome(1)
    limit = getattr(limits, beyond[-1])
    whole = network.end_to_end
    evidence: dict[str, Any] = {
        "field": "gain_product_log",
        "value": log,
        "threshold": limit,
        "end_to_end": None,
    }
    true = PRODUCT_ALONE
    if whole is not None:
        evidence["end_to_end"] = [whole.lower, whole.upper]
        true = f"the true end-to-end gain is {span(whole)}"
    what = f"the gains multiply to e^{log:.1f} (Eq. 7), more than e^{limit:g}; {true}"
    return Outcome(
        1,
        [Finding(rule.code, context.level(rule, beyond[-1]), [], what, evidence, why=rule.summary)],
    )


SMALL = Rule(
    "JD101",
    "small-sublayers",
    "warning",
    check=_small,
    placements=("pre",),
    observation_when_trained=True,
)
LARGE = Rule(
    "JD102",
    "large-shortcut",
    "warning",
    check=_large,
    placements=("pre",),
    observation_when_trained=True,
)
AMPLIFICATION = Rule(
    "JD103",
    "amplification",
    "warning",
    check=_amplification,
    observation_when_trained=True,
)
PRODUCT = Rule("JD104", "depth-product", "info", check=_product)
RULES = (SMALL, LARGE, AMPLIFICATION, PRODUCT)
