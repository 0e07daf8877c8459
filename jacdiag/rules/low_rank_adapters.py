"""JD215: low-rank additions that change the model at once, or that can never change it."""

from __future__ import annotations

from collections.abc import Sequence

from jacdiag.records import Finding
from jacdiag.records.structure import AdapterRecord
from jacdiag.rules.rule import NOT_APPLICABLE, Context, Outcome, Rule


def _check(context: Context, rule: Rule) -> Outcome:
    contract = context.report.contract
    if contract is None or context.report.state not in rule.states or not contract.adapters:
        return NOT_APPLICABLE
    pairs = contract.adapters
    several_zero = [pair for pair in pairs if len(pair.zero_factors) > 1]
    both_drawn = [pair for pair in pairs if not (pair.zero_factors or pair.decomposed)]
    findings = []
    if several_zero:
        firsts = [pair.zero_factors[0] for pair in several_zero]
        others = [name for pair in several_zero for name in pair.zero_factors[1:]]
        what = (
            f"{_listed(firsts)} and another factor of each are zero in every element: no "
            "gradient can reach either"
        )
        evidence = {"parameters": [*firsts, *others], "count": len(several_zero)}
        fix = f"draw {_listed(firsts)}, after all other inits"
        findings.append(_finding(context, rule, evidence, what, fix))
    if both_drawn:
        firsts, seconds = _names(both_drawn)
        state = "the adapted model is not its base at the start"
        what = f"{_listed(seconds)} and the other factor of each are not zero: {state}"
        evidence = {"parameters": seconds, "others": firsts, "count": len(both_drawn)}
        findings.append(_finding(context, rule, evidence, what, f"set {_listed(seconds)} to zero"))
    return Outcome(len(pairs), findings)


def _names(pairs: Sequence[AdapterRecord]) -> tuple[list[str], list[str]]:
    return [pair.first for pair in pairs], [pair.second for pair in pairs]


def _finding(
    context: Context, rule: Rule, evidence: dict[str, object], what: str, fix: str
) -> Finding:
    names = evidence["parameters"]
    assert isinstance(names, list)
    return Finding(
        rule.code, context.level(rule, "warning"), names, what, evidence, rule.summary, fix
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


RULE = Rule("JD215", "adapter-factors", "warning", check=_check, states=("init",))
