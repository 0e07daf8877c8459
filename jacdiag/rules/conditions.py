"""JD101 to JD104: the two conditions of the paper, amplification, and the gain over depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jacdiag.records import Finding, Interval, JudgedSublayers, Level, SublayerRecord
from jacdiag.records.placement_words import placement_in_words, placements_in_words
from jacdiag.records.report import PRODUCT_ALONE, UNCOVERED_CALLS, WeightStats
from jacdiag.rules.finding_numbers import plain, span
from jacdiag.rules.grouping import group_by
from jacdiag.rules.interval_status import ComparedFigure, compare_with_limits
from jacdiag.rules.rule import ALL_PLACEMENTS, NOT_APPLICABLE, CheckOutcome, Rule, RuleContext
from jacdiag.rules.thresholds import CUTS, Limits
from jacdiag.rules.wording import name_layers

# An output matrix with so much of the std before it has no scaling with depth.
_UNSCALED = 0.7


Value = Callable[[SublayerRecord], Interval | None]
Cut = Callable[[SublayerRecord], Limits]
Sentence = Callable[[RuleContext, Rule, Sequence[ComparedFigure], Level], Finding]


def _compare_with_cuts(
    context: RuleContext, rule: Rule, value: Value, limits: Cut, sentence: Sentence
) -> CheckOutcome:
    """Compare every sub-layer's figure with its cuts, and return one finding per level.

    A sub-layer that has no cut is left out if it was measured. What could not be measured is
    undecided in any case.

    Args:
        context: of the evaluation.
        rule: that checks.
        value: from a sub-layer to the interval of its figure.
        limits: from a sub-layer to the cuts of its figure.
        sentence: from the sub-layers beyond one cut to their finding.
    """
    rows = context.rows(rule)
    if not rows:
        judged = _judged_sublayers(context, rule, [], [])
        return CheckOutcome(0, note=_why_not(context, rule), judged=judged)

    # 1. Place each figure between its cuts.
    compared: list[ComparedFigure] = []
    uncalibrated: list[SublayerRecord] = []
    for row in rows:
        limits_of_row = limits(row)
        is_measured = row.branch_norm is not None
        if is_measured and not limits_of_row.cuts:
            uncalibrated.append(row)
            continue

        figure = _trusted(context, row, value)
        compared.append(compare_with_limits(row, figure, limits_of_row))

    # 2. One finding per level, the highest first.
    by_level = group_by(compared, lambda figure: figure.beyond)
    findings = []
    for level in reversed(CUTS):
        if level in by_level:
            findings.append(sentence(context, rule, by_level[level], level))

    # 3. What the intervals leave open, and the condition at each sub-layer.
    undecided = [figure.row.name for figure in compared if figure.is_undecided]
    conditions = {figure.row.name: figure.condition for figure in compared}
    note = _note_of_uncalibrated(uncalibrated)
    unmeasured = [figure.row for figure in compared if figure.value is None]
    judged = _judged_sublayers(context, rule, uncalibrated, unmeasured)
    return CheckOutcome(len(compared), findings, undecided, note, conditions, judged)


def _judged_sublayers(
    context: RuleContext,
    rule: Rule,
    uncalibrated: Sequence[SublayerRecord],
    unmeasured: Sequence[SublayerRecord],
) -> JudgedSublayers | None:
    """Return which sub-layers on the stream a rule judged, and why it did not judge the others.

    Args:
        context: of the evaluation.
        rule: that judges.
        uncalibrated: sub-layers that it applies to and for which there is no threshold.
        unmeasured: sub-layers that it applies to and that have no figure it could compare.
    """
    # 1. Without a run of the model there are no figures.
    report = context.report
    if report.tier != "measured" or report.state not in rule.states:
        return None

    # 2. Those that were not judged, by reason.
    has_no_threshold = {row.name for row in uncalibrated}
    has_no_figure = {row.name for row in unmeasured}
    on_stream = [row for row in report.sublayers if not row.nested]
    not_judged: dict[str, list[str]] = {}
    for row in on_stream:
        if row.placement not in rule.placements:
            reason = placement_in_words(row)
        elif row.name in has_no_threshold:
            reason = f"no threshold is calibrated for {row.kind}"
        elif row.name in has_no_figure:
            reason = context.distrusted.get(row.name, "not measured")
        else:
            continue
        not_judged.setdefault(reason, []).append(row.name)

    # 3. How many are left.
    left_out = sum(map(len, not_judged.values()))
    return JudgedSublayers(len(on_stream) - left_out, len(on_stream), not_judged)


def _note_of_uncalibrated(rows: Sequence[SublayerRecord]) -> str:
    """Return the note about sub-layers for which there is no threshold; "" without any."""
    if not rows:
        return ""

    # Each kind with its placement once.
    kinds = {f"{row.kind} ({row.placement})" for row in rows}
    return f"no threshold is calibrated for {', '.join(sorted(kinds))}"


def _why_not(context: RuleContext, rule: Rule) -> str:
    """Return why a rule applies to no sub-layer, if the placement of the norms is the reason."""
    # 1. Another reason.
    is_measured = context.report.tier == "measured"
    is_for_all = set(rule.placements) == set(ALL_PLACEMENTS)
    if is_for_all or not is_measured:
        return ""

    # 2. The placements that the model has.
    rows = [row for row in context.report.sublayers if row.placement and not row.nested]
    placements = placements_in_words(rows)

    # 3. A model may have no sub-layer at all.
    if not placements:
        return ""
    names = " and ".join(sorted(placements))
    return f"the paper states it for pre-norm; this model has {names}"


def _trusted(context: RuleContext, row: SublayerRecord, value: Value) -> Interval | None:
    """Return the figure of a sub-layer; None if its replay differs from the model."""
    is_distrusted = row.name in context.distrusted
    if is_distrusted:
        return None
    return value(row)


def _worst(group: Sequence[ComparedFigure]) -> ComparedFigure:
    """Return the sub-layer whose figure is the largest for certain."""

    def lower_bound(figure: ComparedFigure) -> float:
        if figure.value is None:
            return -math.inf

        return figure.value.lower

    return max(group, key=lower_bound)


def _extent(context: RuleContext, group: Sequence[ComparedFigure]) -> str:
    """Return which layers a group covers, in words: "in layers 1 to 3 (of 6)".

    An excess in the first layer alone is another thing than one in all layers.
    """
    depths = _depths_of(group)
    layers = context.report.model.layers

    # 1. Every layer.
    if depths == list(range(layers)):
        if layers == 1:
            return "in the only layer"
        return f"in all {layers} layers"

    # 2. Some of them.
    return f"in {name_layers(depths)} (of {layers})"


def _depths_of(group: Iterable[ComparedFigure]) -> list[int]:
    """Return the depths of sub-layers, each once, ascending."""
    return sorted({figure.row.depth for figure in group})


def _share(context: RuleContext, rule: Rule, group: Sequence[ComparedFigure]) -> str:
    """Return how many sub-layers a group has, of how many, and which layers it covers."""
    # Both conditions are for one placement, and do not count the sub-layers of the others.
    rows = context.rows(rule)
    noun = "sub-layers"
    if len(rows) == 1:
        noun = "sub-layer"

    # 1. Whether there are others.
    on_stream = 0
    for row in context.report.sublayers:
        if not row.nested:
            on_stream += 1

    # 2. The placement of those that count.
    if len(rows) < on_stream:
        noun = f"{rule.placements[0]}-norm {noun}"
    return f"{len(group)} of {len(rows)} {noun}, {_extent(context, group)}"


def _finding(
    context: RuleContext,
    rule: Rule,
    group: Sequence[ComparedFigure],
    cut: Level,
    limit: float | None,
    what: str,
    fix: str,
    field: str,
) -> Finding:
    """Return the finding about the sub-layers whose figure lies beyond one cut.

    Args:
        context: of the evaluation.
        rule: that fires.
        group: the sub-layers.
        cut: the level that they are beyond.
        limit: where that cut lies for the worst of them.
        what: the sentence.
        fix: what to do.
        field: the name of the figure in a sub-layer's record.
    """
    # 1. The evidence is that of the worst.
    worst = _worst(group)
    assert worst.value is not None
    evidence = {
        "field": field,
        "sublayer": worst.row.name,
        "value": worst.value.estimate,
        "lower": worst.value.lower,
        "upper": worst.value.upper,
        "threshold": limit,
        "depths": _depths_of(group),
        "count": len(group),
        "of": len(context.rows(rule)),
    }

    # 2. The finding.
    where = [figure.row.name for figure in group]
    level = context.level(rule, cut)
    return Finding(rule.code, level, where, what, evidence, why=rule.summary, fix=fix)


# -- JD101 -----------------------------------------------------------------------------------------
def _small(context: RuleContext, rule: Rule) -> CheckOutcome:
    scale = math.sqrt(2 * max(context.report.model.layers, 1))

    def value(row: SublayerRecord) -> Interval | None:
        # The cuts are for the norm times √(2N), which the paper wants near 1.
        if row.core_norm is None:
            return None

        return row.core_norm.scaled(scale)

    def limits(row: SublayerRecord) -> Limits:
        return context.thresholds.limits("core_norm", row.kind)

    def sentence(
        context: RuleContext, rule: Rule, group: Sequence[ComparedFigure], cut: Level
    ) -> Finding:
        # 1. The largest norm.
        worst = _worst(group)
        assert worst.value is not None
        limit = getattr(limits(worst.row), cut)
        most = f"core norm times √(2N) is {span(worst.value)} at {worst.row.name}"

        # 2. What that says of the condition.
        what = f"{most} (not met above {plain(limit)}); {_share(context, rule, group)}"
        if cut == "info":
            what = f"partly met {_extent(context, group)}: {most} (met up to {plain(limit)})"
        fix = _smaller(context, worst.row)
        return _finding(context, rule, group, cut, limit, what, fix, "core_norm")

    return _compare_with_cuts(context, rule, value, limits, sentence)


def _smaller(context: RuleContext, row: SublayerRecord) -> str:
    """Return what to change: the depth scaling where it is missing, else the std of matrices."""
    # 1. A trained model is not initialized again.
    model = context.report.model
    if context.report.state == "trained":
        return ""

    # 2. The advice alone, if the output matrix is not known.
    advice = "initialise W_O and W_2 with std s/√(2N), the other matrices with s = √(2/(5d))"
    output = row.weights.get("W_2") or row.weights.get("W_O")
    if model.width is None or output is None or output.std is None:
        return advice

    # 3. The std of the output matrix, and that of the advice.
    layers = max(model.layers, 1)
    s = math.sqrt(2 / (5 * model.width))
    aim = s / math.sqrt(2 * layers)
    seen = f"{output.parameter} has std {plain(output.std)}, s/√(2N) is {plain(aim)}"

    # 4. Whether it is as large as the matrices before it.
    inner_std = _largest_inner_std(row, output)
    is_unscaled = inner_std > 0 and output.std > _UNSCALED * inner_std
    if is_unscaled and layers > 1:
        seen += f"; no depth scaling is seen compared with std {plain(inner_std)} before it"
    return f"{advice}: {seen}"


def _largest_inner_std(row: SublayerRecord, output: WeightStats) -> float:
    """Return the largest std of the matrices before the output matrix; 0 if none is known."""
    largest = 0.0
    for weight in row.weights.values():
        is_before_output = weight is not output
        if is_before_output and weight.std is not None:
            largest = max(largest, weight.std)

    return largest


# -- JD102 -----------------------------------------------------------------------------------------
def _large(context: RuleContext, rule: Rule) -> CheckOutcome:
    limits = context.thresholds.limits("norm_gain")

    def value(row: SublayerRecord) -> Interval | None:
        # The token with nearly the smallest σ counts: 1/σ of the mean token hides it.
        gain = row.norm_gain
        if gain is None:
            return None
        if gain.per_token is None:
            return Interval.exact(gain.estimate)

        return Interval.exact(gain.per_token.p99)

    def sentence(
        context: RuleContext, rule: Rule, group: Sequence[ComparedFigure], cut: Level
    ) -> Finding:
        # 1. The smallest σ, if it was kept.
        worst = _worst(group)
        assert worst.value is not None
        spread = worst.row.shortcut_std
        sigma = f"shortcut std at {worst.row.name}"
        median = ""
        if spread is not None:
            sigma = f"shortcut std {plain(spread.min)} at {worst.row.name}"
            median = f"; median over its tokens {plain(spread.median)}"

        # 2. What that says of the condition.
        what = (
            f"{sigma} (target: about 1{median}); {_share(context, rule, group)}{_token(worst.row)}"
        )
        if cut == "info":
            what = f"partly met {_extent(context, group)}: {sigma} (target: about 1{median})"
        limit = getattr(limits, cut)
        return _finding(context, rule, group, cut, limit, what, _larger(context), "norm_gain")

    return _compare_with_cuts(context, rule, value, lambda _row: limits, sentence)


def _token(row: SublayerRecord) -> str:
    """Return which token has the smallest σ; "" if that is not known."""
    spread = row.shortcut_std
    if spread is None or spread.argmin is None:
        return ""

    # 1. Its position.
    place = spread.argmin
    if place.position is None:
        return ""

    # 2. Its number in the vocabulary, if the probe has one.
    if place.token is None:
        return f"; smallest at position {place.position}"
    return f"; smallest for token {place.token}, at position {place.position}"


def _larger(context: RuleContext) -> str:
    """Return how to make the shortcut larger."""
    if context.report.state == "trained":
        return ""

    # The factor in numbers, if the width is known.
    width = context.report.model.width
    factor = "√d"
    if width:
        factor = f"√d = {plain(math.sqrt(width))}"
    return f"multiply the embedding by {factor} (scaled-embed), or put a LayerNorm on it (embed-ln)"


# -- JD103 -----------------------------------------------------------------------------------------
def _amplification(context: RuleContext, rule: Rule) -> CheckOutcome:
    def limits(row: SublayerRecord) -> Limits:
        return context.thresholds.limits("branch_norm", row.placement or "")

    def sentence(
        context: RuleContext, rule: Rule, group: Sequence[ComparedFigure], cut: Level
    ) -> Finding:
        worst = _worst(group)
        assert worst.value is not None
        limit = getattr(limits(worst.row), cut)

        # 1. A trained model is compared with what is usual at init.
        norm = placement_in_words(worst.row)
        compared_with = norm
        if context.report.state == "trained":
            compared_with = f"{norm} at init"

        # 2. The sentence.
        what = (
            f"branch norm {span(worst.value)} at {worst.row.name} "
            f"({cut} above {plain(limit)} for {compared_with}), {_extent(context, group)}"
        )
        return _finding(context, rule, group, cut, limit, what, "", "branch_norm")

    return _compare_with_cuts(context, rule, lambda row: row.branch_norm, limits, sentence)


# -- JD104 -----------------------------------------------------------------------------------------
def _product(context: RuleContext, rule: Rule) -> CheckOutcome:
    network = context.report.network
    if network is None or network.gain_product_log is None:
        return NOT_APPLICABLE

    # 1. A product that is no bound says nothing of the depth.
    stream = network.stream
    if stream is not None and stream.gaps:
        note = f"the product is no bound: {stream.gaps_in_words} {UNCOVERED_CALLS}"
        return CheckOutcome(0, note=note)

    # 2. The highest cut that it is beyond. A part of the network alone is never a pass.
    part = network.part
    log = network.gain_product_log
    limits = context.thresholds.limits("gain_product")
    beyond = limits.beyond(log)
    if beyond is None and part is not None:
        return CheckOutcome(0, note=f"the product is known {part.words} alone")
    if beyond is None:
        return CheckOutcome(1)
    limit = limits.named_cuts[beyond]

    # 3. The true gain, if it was measured.
    evidence: dict[str, Any] = {
        "field": "gain_product_log",
        "value": log,
        "threshold": limit,
        "end_to_end": None,
    }
    true_gain = PRODUCT_ALONE
    end_to_end = network.end_to_end
    if end_to_end is not None:
        evidence["end_to_end"] = [end_to_end.lower, end_to_end.upper]
        true_gain = f"the measured end-to-end gain is {span(end_to_end)}"

    # 4. A part of the network has another name.
    sublayers = "of all sub-layers"
    if part is not None:
        sublayers = part.words
        true_gain = "an upper bound whose true value was not measured"
    if part is not None and end_to_end is not None:
        true_gain = f"the measured gain of that part is {span(end_to_end)}"

    # 5. The finding.
    what = (
        f"the product of the gains {sublayers} is e^{log:.1f} (Eq. 7), above e^{limit:g}; "
        f"{true_gain}"
    )
    level = context.level(rule, beyond)
    return CheckOutcome(1, [Finding(rule.code, level, [], what, evidence, why=rule.summary)])


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
