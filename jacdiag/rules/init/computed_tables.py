"""JD212: computed tables that were erased, rounded or never computed.

Examples are rotary frequencies and causal masks.
"""

from __future__ import annotations

from collections.abc import Sequence

from jacdiag.records import ContractRecord, Finding
from jacdiag.records.structure import TableRecord
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.grouping import group_by
from jacdiag.rules.rule import NOT_APPLICABLE, CheckOutcome, Rule, RuleContext
from jacdiag.rules.wording import list_names

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
    # 1. Tables without numbers of a known meaning.
    if table.meaning == "mask":
        return _fault_of_mask(table)
    if table.meaning not in _COMPUTED:
        return _fault_of_buffer(table)

    # 2. Memory that nobody wrote to explains values of any kind, so it is looked for first.
    return _never_written(table) or _unfit_for_meaning(table) or _rounded(table)


def _never_written(table: TableRecord) -> str:
    """Return the sign that nobody wrote to the memory of a table; "" if there is none."""
    # No table is computed with numbers that are not finite.
    if table.not_finite:
        return f"holds NaN or Inf in {table.not_finite} of {table.count} elements"

    # Integers that stood in the memory before read so.
    if table.tiny:
        return "holds numbers that are not zero and closer to it than 1e-30"

    # Memory that was never used is zero.
    if table.least == table.most == 0:
        return "is zero in every element"
    return ""


def _unfit_for_meaning(table: TableRecord) -> str:
    """Return why the values cannot be those of a variance or of slopes; "" if they can be."""
    if table.meaning == "variance":
        return _fault_of_variance(table)
    if table.meaning == "slopes":
        return _fault_of_slopes(table)

    # Of the other meanings any number may be right.
    return ""


def _fault_of_variance(table: TableRecord) -> str:
    """Return the fault of a running variance that is not positive throughout."""
    is_positive = table.least is not None and table.least > 0
    if is_positive:
        return ""
    return "is zero or negative in some elements"


def _fault_of_slopes(table: TableRecord) -> str:
    """Return the fault of slopes that start at 1 and not at their ratio."""
    starts_at_one = table.first == 1.0
    if not starts_at_one or not _falls(table):
        return ""

    # ALiBi's series of slopes has no slope of 1.
    ratio = plain(table.ratio)
    return f"starts at 1, where ALiBi starts at the ratio of its series, {ratio}"


def _rounded(table: TableRecord) -> str:
    """Return which precision the values lost their digits in; "" if they did not."""
    if not table.rounded:
        return ""

    # The running variance of a norm may be any positive number.
    if table.meaning == "variance":
        return ""

    return f"is {table.dtype} and holds numbers of {table.rounded} alone: it was rounded"


def _fault_of_mask(table: TableRecord) -> str:
    """Return the fault of a mask: it masks everything or nothing."""
    # Such a mask has one value throughout.
    holds_one_value = table.least == table.most
    if table.not_finite or not holds_one_value:
        return ""

    # A mask of one element may have either value.
    if table.count <= 1:
        return ""
    value = plain(table.least or 0.0)
    return f"is {value} in every element"


def _fault_of_buffer(table: TableRecord) -> str:
    """Return the fault of a buffer whose meaning is not known: it holds nothing but leftovers."""
    if not table.tiny > 0 or table.not_finite:
        return ""

    # One usual number shows that somebody wrote it.
    largest = max(_size_of_end(table.least), _size_of_end(table.most))
    has_usual_number = not largest < _SMALL
    if has_usual_number:
        return ""

    # All of them are too small for any table.
    return "holds numbers that are not zero and closer to it than 1e-30, and no usual one"


def _size_of_end(value: float | None) -> float:
    """Return the size of a table's least or largest number; 0 if it is not known."""
    return abs(value or 0.0)


def _falls(table: TableRecord) -> bool:
    return table.ratio is not None and table.ratio < 0.999


def wrong_tables(contract: ContractRecord) -> list[tuple[TableRecord, str]]:
    """Return the tables that are wrong, each with its fault."""
    tables = []
    for table in contract.tables:
        fault = fault_of(table)
        if fault:
            tables.append((table, fault))

    return tables


def _check(context: RuleContext, rule: Rule) -> CheckOutcome:
    contract = context.contract_for(rule)
    if contract is None or not contract.tables:
        return NOT_APPLICABLE

    # One finding for all tables of one meaning with the same fault.
    groups = group_by(wrong_tables(contract), _meaning_and_fault)
    findings = []
    for (meaning, fault), pairs in groups.items():
        tables = [table for table, _ in pairs]
        findings.append(_finding(context, rule, meaning, fault, tables))

    return CheckOutcome(len(contract.tables), findings)


def _meaning_and_fault(pair: tuple[TableRecord, str]) -> tuple[str, str]:
    """Return what a wrong table is, and its fault."""
    table, fault = pair
    return table.meaning, fault


def _finding(
    context: RuleContext, rule: Rule, meaning: str, fault: str, tables: Sequence[TableRecord]
) -> Finding:
    """Return the finding about tables of one meaning that have the same fault.

    Args:
        context: of the evaluation.
        rule: that checks.
        meaning: of the tables.
        fault: in words.
        tables: that have it.
    """
    # 1. What to do. A cast spoils numbers that were right.
    fix = _FIXES.get(meaning, _FIXES[""])
    is_rounded = bool(tables[0].rounded) and "was rounded" in fault
    if is_rounded:
        fix = "compute the frequencies again in float32 after the cast, or leave them out of it"

    # 2. The evidence.
    names = [table.name for table in tables]
    evidence = {
        "parameters": names,
        "meaning": meaning,
        "least": [table.least for table in tables],
        "most": [table.most for table in tables],
        "rounded": tables[0].rounded,
    }

    # 3. The finding.
    what = f"{_subject(names, meaning)}, {fault}"
    level = context.level(rule, rule.level)
    return Finding(rule.code, level, names, what, evidence, rule.summary, fix)


def _subject(names: Sequence[str], meaning: str) -> str:
    """Return which tables a finding is about, and what they are."""
    listed = list_names(names, longest=None)
    subject = f"{listed}, {_WORDS[meaning]}"

    # The fault is that of each.
    if len(names) > 1:
        subject += " (each)"
    return subject


_FIXES = {
    "slopes": "start the slopes at the ratio: 2^(-8/n) for n heads",
    "variance": "start the running variance at one",
    "": "compute the buffer once more after to_empty(), where the other weights are initialised",
}

RULE = Rule("JD212", "computed-tables", "warning", check=_check, states=("init",))
