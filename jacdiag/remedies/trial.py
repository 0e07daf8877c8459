"""Tries remedies on copies of a model, audits each copy again, and recommends the smallest that is
enough.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from jacdiag.errors import RankError, one_line
from jacdiag.records import Report
from jacdiag.records.remedy import RemedyRecord
from jacdiag.remedies.candidates import Remedy
from jacdiag.remedies.changes import Spare
from jacdiag.remedies.patches import patches
from jacdiag.rules.remedy_targets import aims, outlook
from jacdiag.sources.foreign_code import seeded
from jacdiag.trace.execution.tensors import collect_deep

_MOST = 16  # trials of one report
_FURTHER = 2  # seeds that a remedy must hold for beside the report's own
_APART = 1_000_003  # new draws must not be those that the model itself made with the same seed
# Rules that find nothing where their figure is missing, and whether a report has it.
_SEEN: dict[str, Callable[[Report], bool]] = {
    "JD104": lambda report: (
        report.network is not None and report.network.gain_product_log is not None
    ),
    "JD105": lambda report: report.risk is not None and report.risk.chance is not None,
    "JD110": lambda report: report.figures is not None and report.baseline is not None,
}


@dataclass(frozen=True)
class Bench:
    """What a trial needs of the audit that it repeats.

    Attributes:
        again: audits a changed model with a seed, spending products until the rules are decided;
            the second argument names the parameters that weight decay is to spare. Returns the
            report, and the output at the probe.
        output: of the model as it is, at the probe.
        fresh: builds the model anew with another seed; None where there is one set of weights only.
        seed: of the report.
        attempt: a context around each trial; on several ranks it fails on all of them, or on none.
    """

    again: Callable[[nn.Module, Iterable[str], int], tuple[Report, Any]]
    output: Any
    fresh: Callable[[int], nn.Module | None] | None
    seed: int
    attempt: Callable[[], AbstractContextManager[None]] = nullcontext


def tried(
    report: Report,
    model: nn.Module,
    remedies: Sequence[Remedy],
    bench: Bench,
    *,
    every: bool = False,
    told: Callable[[str], None] = lambda _name: None,
) -> tuple[list[RemedyRecord], list[str]]:
    """Tries remedies in turn, on copies; the first sufficient one ends it.

    Args:
        report: of `model` as it is.
        remedies: the smallest first.
        every: try all, also behind a sufficient one.
        told: is called with the name of each before it is tried.

    Returns:
        A record for each that was tried, and notes on those that could not be.
    """
    records: list[RemedyRecord] = []
    notes: list[str] = []
    found = False
    for remedy in remedies[:_MOST]:
        told(remedy.name)
        try:
            with bench.attempt():
                record = _trial(report, model, remedy, bench)
        except RankError:
            raise
        # a guest's own copying and building may raise anything; the audit itself is done
        except Exception as error:
            notes.append(f"{remedy.name} could not be tried: {one_line(error)}")
            continue
        records.append(replace(record, recommended=record.sufficient and not found))
        found = found or record.sufficient
        if found and not every:
            break
    return records, notes


def most_trials(remedies: int) -> int:
    """Return how many audits of copies so many remedies may take: each on the report's seed and on
    further ones.
    """
    return min(remedies, _MOST) * (1 + _FURTHER)


def _trial(report: Report, model: nn.Module, remedy: Remedy, bench: Bench) -> RemedyRecord:
    spared = [
        name for change in remedy.changes if isinstance(change, Spare) for name in change.names
    ]
    after, output = bench.again(_changed(model, remedy, bench.seed), spared, bench.seed)
    seeds, enough = [bench.seed], sufficient(report, after, remedy)
    for seed in range(bench.seed + 1, bench.seed + 1 + _FURTHER):
        other = bench.fresh(seed) if enough and bench.fresh is not None else None
        if other is not None:
            seeds.append(seed)
            enough = sufficient(
                report, bench.again(_changed(other, remedy, seed), spared, seed)[0], remedy
            )
    return RemedyRecord(
        remedy.name,
        remedy.title,
        aims(report),
        remedy.price,
        outlook(report),
        outlook(after),
        sufficient=enough,
        keeps_function=remedy.keeps_function,
        seeds=seeds,
        function_change=_difference(bench.output, output) if remedy.keeps_function else None,
        patches=patches(report, model, remedy),
    )


def _changed(model: nn.Module, remedy: Remedy, seed: int) -> nn.Module:
    made = copy.deepcopy(model)
    with seeded(seed + _APART):
        remedy.apply(made)
    return made


def sufficient(before: Report, after: Report, remedy: Remedy) -> bool:
    """Whether no warning or error is left of what the remedy was tried against, and none is new;
    infos may remain.

    That a weight which the remedy set on purpose departs from the rest of the model, or from the
    published init of its family, is no finding against it.
    """
    aimed = aims(before)
    if not aimed:
        return False
    changed = {
        name
        for change in remedy.changes
        for name in getattr(getattr(change, "weights", None), "names", ())
    }
    for finding in after.findings:
        deliberate = finding.code in ("JD202", "JD203", "JD204") and finding.code not in aimed
        if deliberate and set(finding.evidence.get("parameters", ())) <= changed:
            continue
        known = any(f.code == finding.code and f.level == finding.level for f in before.findings)
        if finding.level != "info" and (finding.code in aimed or not known):
            return False
    if any(code in aimed and not seen(after) for code, seen in _SEEN.items()):
        return False  # what it was tried against is not known of the changed model
    open_before = {r.code for r in before.rules if r.status == "unknown"}
    return not any(
        r.status == "unknown" and (r.code in aimed or r.code not in open_before)
        for r in after.rules
    )


def _difference(one: Any, other: Any) -> float | None:
    """The largest difference of two outputs of a model, over the largest value; None if they cannot
    be compared.
    """
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for value, tensors in zip((one, other), found, strict=True):
        collect_deep(value, tensors)
    pairs = [
        (a.detach(), b.detach()) for a, b in zip(*found, strict=False) if a.is_floating_point()
    ]
    if not pairs or any(a.shape != b.shape or a.is_meta for a, b in pairs):
        return None
    largest = max(float(a.abs().max()) for a, _ in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / (largest or 1.0)
