"""JD212: computed tables that were erased, rounded or never computed.

Examples are rotary frequencies and causal masks.
"""

from __future__ import annotations

from collections.abc import Sequence

from jacdiag.records import ContractRecord, Finding
from jacdiag.records.structure import TableRecord
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.rule import NOT_APPLICABLE, Context, Outcome, Rule

# Memory that was handed out again holds integers, which read as float32 are below this or zero. A
# table whose meaning
# is not known is judged only if it holds nothing else: the tails of a window or a kernel are small
# too.
_SMALL = 1e-15
_COMPUTED = ("frequencies", "rotation", "sinusoid", "slopes", "variance")
_WORDS = {
    "frequencies": "frequencies of a sine and cosine",
    "rotation": "a table of sines or cosines",
    "sinusoid": "a table of positions",
    "slopes": "slopes of ALiBi",
    "variance": "the running variance of a norm",
    "mask": "a mask",
    "": "a buffer",
}


def fault_of(table: TableRecord) -> str:
    """Return what is wrong with a table, as the predicate of a sentence; "" if nothing is."""
    if table.meaning == "mask":
        return _fault_of_mask(table)
    if table.meaning not in _COMPUTED:
        return _fault_of_buffer(table)
    # 1. Memory that nobody wrote to.
    if table.not_finite:
        return f"holds NaN or Inf in {table.not_finite} of {table.count} elements"
    if table.tiny:
        return "holds numbers that are not zero and closer to it than 1e-30"
    if table.least == table.most == 0:
        return "is zero in every element"
    # 2. Values that do not fit the meaning.
    if table.meaning == "variance":
        is_positive = table.least is not None and table.least > 0
        return "" if is_positive else "is zero or negative in some elements"
    if table.meaning == "slopes" and table.first == 1.0 and _falls(table):
        ratio = plain(table.ratio)
        return f"starts at 1, where ALiBi starts at the ratio of its series, {ratio}"
    # 3. Values that lost digits.
    if table.rounded:
        return f"is {table.dtype} and holds numbers of {table.rounded} alone: it was rounded"
    return ""


def _fault_of_mask(table: TableRecord) -> str:
    is_constant = table.count > 1 and table.least == table.most
    if table.not_finite or not is_constant:
        return ""
    return f"is {plain(table.least or 0.0)} in every element"


def _fault_of_buffer(table: TableRecord) -> str:
    """Return the fault of a buffer whose meaning is not known: it holds nothing but leftovers."""
    largest = max(abs(table.least or 0.0), abs(table.most or 0.0))
    is_leftover = table.tiny > 0 and largest < _SMALL and not table.not_finite
    if not is_leftover:
        return ""
    return "holds numbers that are not zero and closer to it than 1e-30, and no usual one"


def _falls(table: TableRecord) -> bool:
    return table.ratio is not None and table.ratio < 0.999


def wrong_tables(contract: ContractRecord) -> list[tuple[TableRecord, str]]:
    """Return the tables that are wrong, each with its fault."""
    faults = [(table, fault_of(table)) for table in contract.tables]
    return [(table, fault) for table, fault in faults if fault]


def _check(context: Context, rule: Rule) -> Outcome:
    contract = context.report.contract
    if contract is None or context.report.state not in rule.states or not contract.tables:
        return NOT_APPLICABLE
    groups: dict[tuple[str, str], list[TableRecord]] = {}
    for table, fault in wrong_tables(contract):
        groups.setdefault((table.meaning, fault), []).append(table)
    findings = [
        _finding(context, rule, meaning, fault, tables)
        for (meaning, fault), tables in groups.items()
    ]
    return Outcome(len(contract.tables), findings)


def _finding(
    context: Context, rule: Rule, meaning: str, fault: str, tables: Sequence[TableRecord]
) -> Finding:
    names = [table.name for table in tables]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    each = " (each)" if len(names) > 1 else ""
    what = f"{', '.join(names[:3])}{more}, {_WORDS[meaning]}{each}, {fault}"
    evidence = {
        "parameters": names,
        "meaning": meaning,
        "least": [table.least for table in tables],
        "most": [table.most for table in tables],
        "rounded": tables[0].rounded,
    }
    fix = _FIXES.get(meaning, _FIXES[""])
    if tables[0].rounded and "was rounded" in fault:
        fix = "compute the frequencies anew in float32 after the cast, or leave them out of it"
    return Finding(
        rule.code, context.level(rule, rule.level), names, what, evidence, rule.summary, fix
    )


_FIXES = {
    "slopes": "start the slopes at the ratio: 2^(-8/n) for n heads",
    "variance": "start the running variance at one",
    "": "compute the buffer once more after to_empty(), where the other weights are initialised",
}

RULE = Rule("JD212", "computed-tables", "warning", check=_check, states=("init",))
