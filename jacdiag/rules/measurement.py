"""JD901 to JD907: measurements that are undecided, incomplete, unusual or broken."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from jacdiag.errors import REPEAT_THE_FORWARD
from jacdiag.records import Finding, Level, Report, RuleResult, SublayerRecord
from jacdiag.rules.rule import NOT_APPLICABLE, CheckOutcome, Rule, RuleContext
from jacdiag.rules.wording import list_names


def _checks(context: RuleContext) -> dict[str, object]:
    checks: dict[str, object] = context.report.settings.get("checks", {})
    return checks


def _undecided(context: RuleContext, rule: Rule) -> CheckOutcome:
    # 1. The rules that something leaves open, and where.
    open_rules: dict[str, list[str]] = {}
    where: dict[str, None] = {}
    matched = 0
    for code, outcome in context.outcomes.items():
        matched += outcome.matched
        if outcome.undecided:
            open_rules[code] = list(outcome.undecided)
            where |= dict.fromkeys(outcome.undecided)

    if not open_rules:
        return CheckOutcome(matched)

    # 2. The finding. On a trained model the rules observe, so that nothing hangs on it.
    names = list(where)
    what = f"{', '.join(open_rules)} undecided at {list_names(names)}"
    level: Level = "warning"
    if context.report.state == "trained":
        level = "info"
    level = context.level(rule, level)
    fix = _decide_by(context, names)
    evidence = {"rules": open_rules}
    return CheckOutcome(
        matched, [Finding(rule.code, level, names, what, evidence, rule.summary, fix)]
    )


def _decide_by(context: RuleContext, names: list[str]) -> str:
    """Return what decides what is open; "" if nothing here does.

    More products do where there is an interval. They do not where NaN came in between, or where
    the replay differs.
    """
    # 1. Sub-layers that NaN or Inf hides.
    unmeasured = _unmeasured(context, names)
    ways: list[str] = []
    are_hidden = any(map(_is_not_finite, unmeasured))
    if are_hidden:
        hidden = "them" if len(unmeasured) > 1 else "it"
        ways.append(f"NaN or Inf hides {hidden}, and more products do not help: {_mend(context)}")

    # 2. The others have an interval, which may be too wide.
    if _has_interval(context, names):
        ways.append("more products (--max-products), or --dtype float64")

    # 3. The reason of each that has none.
    if unmeasured:
        ways.append("the table of jacdiag audit says what could not be measured")

    return "; ".join(ways)


def _has_interval(context: RuleContext, names: Iterable[str]) -> bool:
    """Return whether one of the sub-layers of these names has a branch norm that is used."""
    # 1. The sub-layers that have a norm.
    rows = context.report.sublayers
    measured = {row.name for row in rows if row.branch_norm is not None}

    # 2. A norm whose replay differs is not used.
    used = measured.difference(context.distrusted)
    return any(name in used for name in names)


def _unmeasured(context: RuleContext, names: Container[str]) -> list[SublayerRecord]:
    """Return the sub-layers of these names that have no branch norm."""
    rows: list[SublayerRecord] = []
    for row in context.report.sublayers:
        is_open = row.name in names
        if is_open and row.branch_norm is None:
            rows.append(row)

    return rows


def _is_not_finite(row: SublayerRecord) -> bool:
    """Return whether the branch of a sub-layer could not be measured for NaN or Inf."""
    note = row.notes.get("branch_norm", "")
    return "not finite" in note


def _mend(context: RuleContext) -> str:
    """Return where to look for the NaN: in the weights that hold one, else in the forward."""
    broken = _checks(context).get("non_finite")
    is_known = isinstance(broken, list) and bool(broken)
    if not is_known:
        return "find the call that makes it"

    assert isinstance(broken, list)
    return f"repair {list_names(broken)}"


def _uncovered(context: RuleContext, rule: Rule) -> CheckOutcome:
    model = context.report.model
    if model.covered_parameters is None or not model.parameters:
        return NOT_APPLICABLE

    # Nothing was left out.
    if not model.uncovered:
        return CheckOutcome(1)

    # 1. A small share is an observation.
    share = 1 - model.covered_parameters / model.parameters
    limit = context.thresholds.limits("uncovered").warning
    level: Level = "info"
    if limit is not None and share >= limit:
        level = "warning"

    # 2. The finding.
    what = f"{share:.1%} of the parameters are not covered: {list_names(model.uncovered)}"
    evidence = {"share": share, "threshold": limit, "names": list(model.uncovered)}
    level = context.level(rule, level)
    return CheckOutcome(1, [Finding(rule.code, level, [], what, evidence, rule.summary)])


def _off_distribution(context: RuleContext, rule: Rule) -> CheckOutcome:
    probe = context.report.probe
    if probe is None or context.report.state != "trained":
        return NOT_APPLICABLE
    if not probe.off_distribution:
        return CheckOutcome(1)

    # 1. What the probe was, and the option that gives a real one.
    noun = "tokens"
    fix = "--tokens FILE with real text or tokens"
    if probe.tokens == "random pixels":
        noun = "pixels"
        fix = "--inputs FACTORY with real images"

    if not context.profile.levels:
        fix += "; levels are capped at warning until then"

    # 2. The finding.
    what = f"a trained model was probed with random {noun}"
    level = context.level(rule, "warning")
    return CheckOutcome(1, [Finding(rule.code, level, [], what, {}, rule.summary, fix)])


def norms_asked(report: Report, codes: Iterable[str]) -> bool:
    """Return whether a rule that judges norms was selected, and norms were not left out.

    Args:
        report: of which model.
        codes: of the selected rules.
    """
    are_left_out = report.settings.get("products") is False
    if are_left_out:
        return False
    return any(code.startswith("JD1") for code in codes)


def applied(report: Report, outcomes: Mapping[str, CheckOutcome | RuleResult]) -> bool:
    """Return whether a rule about the model applied.

    It is one of JD1xx, or of the contract where no norm was requested.

    Args:
        report: of which model.
        outcomes: of the selected rules, by code; the results that a report keeps say as much.
    """
    # 1. The rules that count.
    kinds: tuple[str, ...] = ("JD1", "JD2")
    if norms_asked(report, outcomes):
        kinds = ("JD1",)

    # 2. One of them had something to judge.
    matched = [code for code, outcome in outcomes.items() if outcome.matched]
    return any(code.startswith(kinds) for code in matched)


def _no_match(context: RuleContext, rule: Rule) -> CheckOutcome:
    # 1. Two runs that differ are the reason by themselves.
    report = context.report
    is_deterministic = _checks(context).get("deterministic") is not False
    if applied(report, context.outcomes) or not is_deterministic:
        return CheckOutcome(1)

    # 2. Which rules applied at all.
    contract_applied = _has_contract_applied(context)
    subject = "no rule applied"
    if contract_applied:
        subject = "no rule about norms applied"

    # 3. What to do where norms were to be judged.
    fix = ""
    if contract_applied and norms_asked(report, context.outcomes):
        fix = (
            "--select JD2 judges the init contract alone; thresholds of your own judge norms "
            "([tool.jacdiag])"
        )

    # 4. The finding.
    what = f"{subject}: {_why_no_match(context)}"
    level = context.level(rule, "warning")
    return CheckOutcome(1, [Finding(rule.code, level, [], what, {}, rule.summary, fix)])


def _has_contract_applied(context: RuleContext) -> bool:
    """Return whether a rule of the init contract had something to judge."""
    for code, outcome in context.outcomes.items():
        is_of_contract = code.startswith("JD2")
        if is_of_contract and outcome.matched:
            return True

    return False


def _why_no_match(context: RuleContext) -> str:
    """Return why no rule about the model applied."""
    if not norms_asked(context.report, context.outcomes):
        return "no norm was requested, and no rule of the init contract applied"

    # Weights that were read without code have no forward.
    if context.report.tier == "weights":
        return "the weights alone carry no Jacobian"

    return _unmatched(context)


def _unmatched(context: RuleContext) -> str:
    """Return why the rules about norms matched no sub-layer, in their own words if any."""
    # 1. What those rules say, each sentence once.
    notes: dict[str, None] = {}
    for code in ("JD101", "JD102", "JD103"):
        outcome = context.outcomes.get(code, NOT_APPLICABLE)
        if outcome.note:
            notes[outcome.note] = None

    # 2. They may say nothing.
    if not notes:
        return "no sub-layer matched"

    return "; ".join(notes)


def _non_deterministic(context: RuleContext, rule: Rule) -> CheckOutcome:
    checks = _checks(context)
    if "deterministic" not in checks:
        return NOT_APPLICABLE
    if checks["deterministic"]:
        return CheckOutcome(1)

    # The call that makes the runs differ, if it is known.
    what = "two runs on the same probe differ: no norm was measured"
    evidence = {}
    culprit = checks.get("culprit")
    if culprit:
        what += f"; {culprit}"
        evidence["culprit"] = culprit
    fix = REPEAT_THE_FORWARD
    device = str(context.report.settings.get("device") or "cpu")
    if not device.startswith("cpu"):
        fix += (
            f"; a kernel on {device} may differ too, which "
            "torch.use_deterministic_algorithms(True) names"
        )
    return CheckOutcome(1, [Finding(rule.code, "error", [], what, evidence, rule.summary, fix)])


def _non_finite(context: RuleContext, rule: Rule) -> CheckOutcome:
    names = _checks(context).get("non_finite")
    if not isinstance(names, list):
        return NOT_APPLICABLE
    if not names:
        return CheckOutcome(1)

    # The sub-layers that hold such a weight.
    where: list[str] = []
    for row in context.report.sublayers:
        is_broken = not set(names).isdisjoint(row.parameters)
        if is_broken:
            where.append(row.name)

    # The finding.
    what = f"NaN or Inf in {list_names(names, 5)}"
    fix = _other_weights(context)
    evidence = {"parameters": names}
    return CheckOutcome(1, [Finding(rule.code, "error", where, what, evidence, rule.summary, fix)])


def _other_weights(context: RuleContext) -> str:
    """Return how to get weights without NaN, by where these come from."""
    # 1. A file, or the reader of one.
    source = context.report.source
    if source.get("path"):
        return "an earlier checkpoint; check the file's hash"

    # 2. Code that builds the model.
    if source.get("format") in ("factory", "hf-config"):
        return (
            f"look at what fills them in {source.get('factory')}: the init (memory that was never "
            "written, a division by zero), or a file that it loads"
        )

    # 3. A model in memory.
    return "look for what wrote them last: the init, a training step, or a file that was loaded"


def _replay(context: RuleContext, rule: Rule) -> CheckOutcome:
    matched = len(context.report.sublayers)
    errors = _checks(context).get("replay")
    if not isinstance(errors, dict):
        return NOT_APPLICABLE
    if not errors:
        return CheckOutcome(matched)

    # The sub-layers whose replay differs.
    where = list(errors)
    what = (
        f"the replayed gradient of {list_names(where)} differs from the whole model's; its figures "
        "are not used"
    )
    level = context.level(rule, "warning")
    finding = Finding(rule.code, level, where, what, {"errors": errors}, rule.summary)
    return CheckOutcome(matched, [finding])


RULES = (
    Rule("JD901", "undecided", "warning", check=_undecided, after=True),
    Rule("JD902", "uncovered", "warning", check=_uncovered),
    Rule(
        "JD903",
        "off-distribution",
        "warning",
        check=_off_distribution,
        states=("trained",),
    ),
    Rule("JD904", "no-match", "warning", check=_no_match, after=True),
    Rule("JD905", "non-deterministic", "error", check=_non_deterministic),
    Rule("JD906", "non-finite-weights", "error", check=_non_finite),
    Rule("JD907", "replay-differs", "warning", check=_replay),
)
