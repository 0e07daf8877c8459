"""Try remedies on copies of a model, audit each copy, recommend the smallest that is enough."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from jacdiag.errors import RankError, one_line
from jacdiag.records import Finding, Report
from jacdiag.records.remedy import RemedyRecord
from jacdiag.remedies.candidates import Remedy
from jacdiag.remedies.changes import Spare
from jacdiag.remedies.patches import patches
from jacdiag.rules.remedy_targets import aims, outlook
from jacdiag.sources.foreign_code import seeded
from jacdiag.trace.execution.tensors import collect_deep

_MOST = 16  # trials of one report
_FURTHER = 2  # seeds, at most, that a remedy must hold for after the report's own
_APART = 1_000_003  # new draws must not be those that the model itself made with the same seed
_ABOUT_WEIGHTS = ("JD202", "JD203", "JD204")  # compare a weight with others


def _has_gain_product(report: Report) -> bool:
    """Return whether the product of the gains of all sub-layers is known."""
    network = report.network
    return network is not None and network.gain_product_log is not None


def _has_chance(report: Report) -> bool:
    """Return whether the chance of a loss spike is known."""
    risk = report.risk
    return risk is not None and risk.chance is not None


def _has_baseline(report: Report) -> bool:
    """Return whether the report holds what is compared with a baseline, and the baseline."""
    return report.figures is not None and report.baseline is not None


# Rules that find nothing where their figure is missing, and whether a report has it.
_SEEN: dict[str, Callable[[Report], bool]] = {
    "JD104": _has_gain_product,
    "JD105": _has_chance,
    "JD110": _has_baseline,
}


@dataclass(frozen=True)
class Bench:
    """What a trial needs of the audit that it repeats.

    Attributes:
        again: audits a changed model with a seed, spending products until the rules are decided;
            the second argument names the parameters that weight decay is to spare. Returns the
            report, and the output at the probe.
        on_one_sequence: does the same on one sequence of the probe, and returns the report alone;
            None if the model does not run on one, or the probe cannot be divided.
        confirm: audits a changed model of a further seed, from the same arguments. Its report is
            judged by the rules that remedies are tried against, and by no other.
        is_clear: whether all figures of such a report are far from the cuts of these rules, so that
            another seed would hardly say anything else.
        output: of the model as it is, at the probe.
        fresh: builds the model with another seed, to be changed in place; None if there is one set
            of weights only.
        seed: of the report.
        attempt: a context around each trial; on several ranks it fails on all of them, or on none.
    """

    again: Callable[[nn.Module, Iterable[str], int], tuple[Report, Any]]
    on_one_sequence: Callable[[nn.Module, Iterable[str], int], Report | None]
    confirm: Callable[[nn.Module, Iterable[str], int], Report]
    is_clear: Callable[[Report], bool]
    output: Any
    fresh: Callable[[int], nn.Module | None] | None
    seed: int
    attempt: Callable[[], AbstractContextManager[None]] = nullcontext


def try_remedies(
    report: Report,
    model: nn.Module,
    remedies: Sequence[Remedy],
    bench: Bench,
    *,
    every: bool = False,
    before_each: Callable[[str], None] = lambda _name: None,
) -> tuple[list[RemedyRecord], list[str]]:
    """Try remedies in turn, on copies; the first sufficient one ends it.

    Args:
        report: of `model` as it is.
        model: to be copied.
        remedies: the smallest first.
        bench: audits the copies.
        every: try all, also after a sufficient one.
        before_each: is called with the name of each before it is tried.

    Returns:
        A record for each that was tried, and notes on those that could not be.

    Raises:
        RankError: another rank of a shared audit failed.
    """
    records: list[RemedyRecord] = []
    notes: list[str] = []
    is_recommended = False  # one of those before
    for remedy in remedies[:_MOST]:
        # 1. Try it.
        before_each(remedy.name)
        try:
            with bench.attempt():
                record = _trial(report, model, remedy, bench)
        except RankError:
            raise
        # A model's own copying and building may raise anything. The audit itself is done.
        except Exception as error:
            notes.append(f"{remedy.name} could not be tried: {one_line(error)}")
            continue

        # 2. The first sufficient one is recommended.
        if record.sufficient and not is_recommended:
            record = replace(record, recommended=True)
            is_recommended = True
        records.append(record)
        if is_recommended and not every:
            break

    return records, notes


def most_trials(remedies: int) -> int:
    """Return how many audits of copies so many remedies may take.

    Each is audited on the report's seed, on one sequence and on all, and on further seeds.
    """
    return min(remedies, _MOST) * (2 + _FURTHER)


@dataclass(frozen=True)
class _FirstTrial:
    """A changed copy of the report's own seed, as it was audited.

    Attributes:
        after: its report.
        output: at the probe; None where that of one sequence was run alone.
        is_enough: nothing is left of what the remedy was tried against, and nothing is new.
    """

    after: Report
    output: Any
    is_enough: bool


def _trial(report: Report, model: nn.Module, remedy: Remedy, bench: Bench) -> RemedyRecord:
    """Audit a changed copy, and changed models of further seeds while it is enough.

    On the report's own seed nothing new may fire. On further seeds what the remedy is tried against
    may not: other seeds are draws of the same distributions.
    """
    spared = _spared_names(remedy)
    # 1. The report's own seed.
    changed = _changed(copy.deepcopy(model), remedy, bench.seed)
    first = _first_trial(report, changed, remedy, bench)
    after, is_enough = first.after, first.is_enough
    seeds = [bench.seed]

    # 2. Further seeds, until one is far from every cut.
    for seed in range(bench.seed + 1, bench.seed + 1 + _FURTHER):
        if not is_enough or bench.fresh is None:
            break
        other = bench.fresh(seed)
        if other is None:
            continue

        seeds.append(seed)
        changed = _changed(other, remedy, seed)
        other_report = bench.confirm(changed, spared, seed)
        is_enough = sufficient(report, other_report, remedy)
        if bench.is_clear(other_report):
            break

    # 3. How far the function changed, if it should not.
    function_change = None
    if remedy.keeps_function:
        function_change = _difference(bench.output, first.output)
    return RemedyRecord(
        remedy.name,
        remedy.title,
        _answered(report, after, remedy),
        remedy.price,
        outlook(report),
        outlook(after),
        sufficient=is_enough,
        keeps_function=remedy.keeps_function,
        seeds=seeds,
        sequences=None if after.probe is None else after.probe.batch,
        function_change=function_change,
        patches=patches(report, model, remedy),
    )


def _first_trial(report: Report, changed: nn.Module, remedy: Remedy, bench: Bench) -> _FirstTrial:
    """Audit a changed copy of the report's own seed: on one sequence, if that settles it.

    It does where nothing is held against the remedy, and where a rule still warns that it was tried
    against: what one sequence shows is left on all of them. Something new may be of one sequence
    alone, such as an expert that no token chose.
    """
    spared = _spared_names(remedy)

    # 1. One sequence. The function is compared on all of them.
    after = None
    if not remedy.keeps_function:
        after = bench.on_one_sequence(changed, spared, bench.seed)

    # 2. Whether it settles the matter.
    if after is not None:
        first = _FirstTrial(after, None, sufficient(report, after, remedy))
        if first.is_enough or _is_left(report, after, remedy):
            return first

    # 3. All of them.
    after, output = bench.again(changed, spared, bench.seed)
    return _FirstTrial(after, output, sufficient(report, after, remedy))


def _is_left(before: Report, after: Report, remedy: Remedy) -> bool:
    """Return whether a rule still warns of the changed model that the remedy was tried against."""
    aimed = _aims_of(before, remedy)
    findings = _held_against(after, aimed, remedy)
    return _still_broken(findings, aimed)


def _spared_names(remedy: Remedy) -> list[str]:
    """Return the parameters that a remedy spares weight decay."""
    names: list[str] = []
    for change in remedy.changes:
        if isinstance(change, Spare):
            names.extend(change.names)

    return names


def _changed(model: nn.Module, remedy: Remedy, seed: int) -> nn.Module:
    """Change a copy in place, and return it."""
    with seeded(seed + _APART):
        remedy.apply(model)

    return model


def sufficient(before: Report, after: Report, remedy: Remedy) -> bool:
    """Return whether nothing is left of what a remedy was tried against, and nothing is new.

    Infos may remain. That a weight which the remedy set on purpose differs from the rest of the
    model, or from the published init of its family, is no finding against it.

    Args:
        before: of the model as it is.
        after: of the changed copy.
        remedy: what was changed.
    """
    aimed = _aims_of(before, remedy)
    if not aimed:
        return False

    # 1. What cannot be judged counts as not enough.
    if _is_unknown(after, aimed):
        return False
    if _is_undecided(before, after, aimed):
        return False

    # 2. No rule may warn of what the remedy was tried against, or of something new.
    findings = _held_against(after, aimed, remedy)
    if _still_broken(findings, aimed):
        return False

    return not _newly_broken(before, findings, aimed)


def _aims_of(before: Report, remedy: Remedy) -> list[str]:
    """Return the rules that a remedy is tried against.

    The weights of a baseline were accepted with what else its rules found. So that remedy is tried
    against the difference from the baseline alone.
    """
    aimed = aims(before)
    if not remedy.restores_baseline:
        return aimed

    # A model that agrees with its baseline has nothing to restore.
    has_changed = "JD110" in aimed
    if not has_changed:
        return []
    return ["JD110"]


def _answered(before: Report, after: Report, remedy: Remedy) -> list[str]:
    """Return the rules that a remedy answers: those of a restored baseline that no longer fire."""
    # 1. Any other remedy is to answer all of them.
    aimed = aims(before)
    if not remedy.restores_baseline:
        return aimed

    # 2. What fires on the baseline too stays.
    left = set(outlook(after).fired)
    answered = []
    for code in aimed:
        if code not in left:
            answered.append(code)
    return answered


def _still_broken(findings: Iterable[Finding], aimed: Sequence[str]) -> bool:
    """Return whether a rule that the remedy was tried against warns of the changed model."""
    return any(finding.code in aimed for finding in findings)


def _newly_broken(before: Report, findings: Iterable[Finding], aimed: Sequence[str]) -> bool:
    """Return whether a rule warns that did not warn, at this level, of the model as it is."""
    known = {(finding.code, finding.level) for finding in before.findings}
    for finding in findings:
        # These count as still broken.
        if finding.code in aimed:
            continue

        if (finding.code, finding.level) not in known:
            return True

    return False


def _held_against(after: Report, aimed: Sequence[str], remedy: Remedy) -> list[Finding]:
    """Return the warnings and errors that are not about what the remedy did on purpose."""
    changed = _changed_names(remedy)
    held = []
    for finding in after.findings:
        # Infos may remain.
        if finding.level == "info":
            continue

        if not _is_on_purpose(finding, aimed, changed):
            held.append(finding)

    return held


def _is_on_purpose(finding: Finding, aimed: Sequence[str], changed: set[str]) -> bool:
    """Return whether a finding says only that changed weights differ from others."""
    if finding.code not in _ABOUT_WEIGHTS:
        return False
    # The remedy was to end this very finding.
    if finding.code in aimed:
        return False

    return changed.issuperset(finding.evidence.get("parameters", ()))


def _changed_names(remedy: Remedy) -> set[str]:
    """Return the weights that a remedy changes."""
    names: set[str] = set()
    for change in remedy.changes:
        weights = getattr(change, "weights", None)
        names |= set(getattr(weights, "names", ()))

    return names


def _is_unknown(after: Report, aimed: Sequence[str]) -> bool:
    """Return whether a figure that the remedy was tried against is not known of the changed one."""
    for code in aimed:
        has_figure = _SEEN.get(code)
        # Any other rule says itself that it is undecided.
        if has_figure is None:
            continue

        if not has_figure(after):
            return True

    return False


def _is_undecided(before: Report, after: Report, aimed: Sequence[str]) -> bool:
    """Return whether a rule is undecided that the remedy was tried against, or that was decided."""
    undecided = _undecided_codes(after)
    aimed_at = undecided.intersection(aimed)
    newly_undecided = undecided - _undecided_codes(before)
    return bool(aimed_at or newly_undecided)


def _undecided_codes(report: Report) -> set[str]:
    """Return the rules that a report leaves undecided."""
    return {rule.code for rule in report.rules if rule.status == "unknown"}


def _difference(before: Any, after: Any) -> float | None:
    """Return the largest difference of two outputs of a model, over the largest value.

    Args:
        before: tensor, or container of tensors.
        after: the same.

    Returns:
        None if the two cannot be compared.
    """
    # 1. The floating tensors of both, in order.
    pairs = _floating_pairs(before, after)
    if not pairs:
        return None

    are_comparable = [_can_be_compared(tensor, other) for tensor, other in pairs]
    if not all(are_comparable):
        return None

    # 2. Their largest difference.
    largest = max(float(tensor.abs().max()) for tensor, _ in pairs)
    difference = max(float((tensor - other).abs().max()) for tensor, other in pairs)
    return difference / (largest or 1.0)


def _floating_pairs(before: Any, after: Any) -> list[tuple[Tensor, Tensor]]:
    """Return the floating-point tensors of an output with their counterparts in another one."""
    tensors: list[Tensor] = []
    other_tensors: list[Tensor] = []
    collect_deep(before, tensors)
    collect_deep(after, other_tensors)

    pairs = []
    for tensor, other in zip(tensors, other_tensors, strict=False):
        if tensor.is_floating_point():
            pairs.append((tensor.detach(), other.detach()))

    return pairs


def _can_be_compared(tensor: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have one shape, and values."""
    return tensor.shape == other.shape and not tensor.is_meta
