"""One gate run: build and audit a model for each seed, merge the reports, compare, decide."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from jacdiag.comparison.baseline_coverage import describe_uncompared
from jacdiag.comparison.baseline_file import check_comparable, read_baseline
from jacdiag.comparison.seed_spread import figures_of
from jacdiag.errors import UsageError
from jacdiag.gate.init_lines import CodeLine, InitLines
from jacdiag.gate.source_location import located
from jacdiag.measure.family_confidence import Family
from jacdiag.pipeline.audit import run_audit
from jacdiag.pipeline.options import AuditOptions
from jacdiag.records import (
    LEVELS,
    FiguresRecord,
    Finding,
    RemedyRecord,
    Report,
    RuleResult,
    Verdict,
)
from jacdiag.records.option_ranges import RANGES
from jacdiag.rules import evaluate, measurement, selected
from jacdiag.rules.remedy_targets import with_fixes
from jacdiag.rules.thresholds import load_thresholds
from jacdiag.sources import Source
from jacdiag.sources.python_source import path_text, source_of

PASS, FINDINGS, UNDECIDED = 0, 1, 3
_MORE_PRODUCTS = 4  # times as many, if a rule stayed undecided
_MOST_PRODUCTS = 4000
# Formats of sources that a gate takes as freshly initialised.
_FRESH_FORMATS = ("factory", "hf-config", "module")
# Formats of sources that build other weights for another seed.
_SEEDED_FORMATS = ("factory", "hf-config")
# From worst to best: the worst of all seeds counts.
_STATUSES = ("fired", "unknown", "clean", "not-applicable")
_VERDICTS: tuple[Verdict, ...] = ("fail", "warn", "unknown", "observed", "pass")


@dataclass(frozen=True)
class Outcome:
    """How a gate came out.

    Attributes:
        report: that of the first seed, with the findings of all, `figures`, `baseline`, and
            settings["gate"].
        exit_code: 0 pass, 1 findings at or above `fail_on`, 3 nothing fired, but something stayed
            undecided or no rule about the model applied. A trained model without a baseline is
            observed, and exits with 0.
        figures: what `--write-baseline` writes.
    """

    report: Report
    exit_code: int
    figures: FiguresRecord

    def __str__(self) -> str:
        """Return how the gate came out, and the summary of the report."""
        words = {PASS: "passed", FINDINGS: "failed", UNDECIDED: "undecided"}
        word = words.get(self.exit_code, "")
        if self.exit_code == PASS and self.report.is_observed:
            word = "observed a trained model"
        return f"Gate {word} (exit code {self.exit_code})\n{self.report}"


def gate(
    source: str | nn.Module | Callable[[], nn.Module],
    inputs: Any = None,
    *,
    seeds: int = 3,
    seed: int = 0,
    budget: float | None = None,
    baseline: str | Path | None = None,
    fail_on: str = "error",
    model: str | None = None,
    model_args: dict[str, Any] | None = None,
    key: str | None = None,
    trust_pickle: bool = False,
    thresholds: Mapping[str, Any] | None = None,
    profile: Any = "default",
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
    max_products: int = 200,
    state: Any = None,
    command: str = "",
    **options: Any,
) -> Outcome:
    """Audit a freshly initialised model over several seeds and decide whether it may pass.

    Args:
        source: as for `jacdiag.audit`, or a callable that returns a new module.
        inputs: the probe, as for `jacdiag.audit`.
        seed: of the first initialisation; the others follow it.
        model: as for `jacdiag.audit`, like the next three.
        model_args: see there.
        key: see there.
        trust_pickle: see there.
        thresholds: as for `jacdiag.audit`, like the next three.
        profile: see there.
        select: see there.
        ignore: see there.
        seeds: how many initialisations; a checkpoint or a module in memory has one.
        budget: seconds; seeds and products that do not fit are left out, and then nothing is called
            a pass.
        baseline: a file of `write_baseline`; norms are then measured to `tol` instead of until
            decided.
        fail_on: the least level that fails: info, warning, error or never.
        max_products: per norm at first; more are spent where a rule stays undecided.
        state: "init" or "trained". If not given, a model that is built or passed as a module is
            fresh, for every seed; a file is judged as by `jacdiag.audit`.
        command: for the report.
        **options: of `jacdiag.audit`.

    Returns:
        The outcome: the merged report, the exit code, and the figures for a baseline.

    Raises:
        JacdiagError: as `jacdiag.audit`; also a baseline that cannot be read or is of another
            model.

    Example:
        >>> out = gate("jacdiag.sources.gpt:build", seeds=2, batch=1, seq=8,
        ...            model_args={"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 32})
        >>> out.exit_code, out.report.settings["gate"]["seeds"]
        (0, 2)
    """
    audit_options = AuditOptions(
        inputs=inputs,
        seed=seed,
        model=model,
        model_args=model_args,
        key=key,
        trust_pickle=trust_pickle,
        thresholds=thresholds,
        profile=profile,
        select=select,
        ignore=ignore,
        max_products=max_products,
        state=state,
        **{"decide": True, **options},
    )
    return run_gate(
        source,
        audit_options,
        seeds=seeds,
        budget=budget,
        baseline=baseline,
        fail_on=fail_on,
        command=command,
    )


def run_gate(
    source: Any,
    options: AuditOptions,
    *,
    seeds: int = 3,
    budget: float | None = None,
    baseline: str | Path | None = None,
    fail_on: str = "error",
    command: str = "",
) -> Outcome:
    """Run a gate as a record of options says.

    Args:
        source: the model, as for `gate`.
        options: of each audit. `decide` has no effect if there is a baseline.
        seeds: as for `gate`, like the others.
        budget: seconds.
        baseline: a file of `write_baseline`.
        fail_on: the least level that fails.
        command: for the report.

    Returns:
        The outcome: the merged report, the exit code, and the figures for a baseline.

    Raises:
        JacdiagError: as `gate`.
    """
    # 1. Check the options before any work.
    _check_gate(seeds, budget, fail_on)
    before = None
    if baseline is not None:
        before = read_baseline(baseline)
    limits = load_thresholds(options.thresholds, options.risk)
    level = options.confidence_all
    options = _options_of_each(options, seeds, has_baseline=before is not None)

    # 2. Audit the model of each seed, and judge all of them together.
    runs = _Runs(source, options, before, budget)
    reports = runs.run(range(options.seed, options.seed + seeds))
    figures = figures_of(reports, limits.limits("regression").warning or 0.0, command)
    if before is not None and baseline is not None:
        check_comparable(Path(path_text(baseline)), figures, before)
    first = replace(reports[0], figures=figures, baseline=before)
    judged = evaluate(
        first,
        thresholds=limits,
        profile=options.profile,
        select=options.select,
        ignore=options.ignore,
    )
    merged = _merge([judged, *reports[1:]])

    # 3. Decide. What is undecided, or what no rule was applied to, is never a pass.
    fixed = with_fixes(merged.findings, merged.remedies)
    findings = located(fixed, runs.model, _spec(source), lines=runs.lines)
    undecided = sorted({rule.code for rule in merged.rules if rule.status == "unknown"})
    applied = measurement.applied(merged, {rule.code: rule for rule in merged.rules})
    may_not_pass = bool(undecided) or runs.ran_out or not applied
    exit_code = _exit_code(findings, fail_on, may_not_pass)

    # 4. Say so in the report.
    about = {
        "exit_code": exit_code,
        "seeds": len(reports),
        "same_weights": runs.same_weights,
        "budget_ran_out": runs.ran_out,
        "undecided": undecided,
        "rule_applied": applied,
        "seconds": time.perf_counter() - runs.started,
        "fail_on": fail_on,
        "baseline": None if baseline is None else str(baseline),
        "not_compared": _not_compared(merged, before),
    }
    settings = {
        **merged.settings,
        "gate": about,
        "command": command,
        "remedies": options.remedies,
    }
    if level is not None and "confidence_all" in settings:
        shared = {"level": level, "seeds": seeds}
        settings["confidence_all"] = {**settings["confidence_all"], **shared}
    notes = [*merged.notes, *runs.notes]
    report = replace(merged, findings=findings, settings=settings, notes=notes)
    return Outcome(report, exit_code, figures)


def _check_gate(seeds: Any, budget: Any, fail_on: Any) -> None:
    """Raise unless the options that only a gate has are in their ranges."""
    # 1. The number of seeds.
    if seeds not in RANGES["seeds"]:
        raise UsageError(
            f"seeds cannot be {seeds!r}", hint="a number of initialisations, from 1 on"
        )

    # 2. The budget.
    if budget is not None:
        _check_budget(budget)

    # 3. The level.
    levels = (*LEVELS, "never")
    if fail_on not in levels:
        hint = f"one of {', '.join(levels)}"
        raise UsageError("unknown level", got=str(fail_on), hint=hint)


def _check_budget(budget: Any) -> None:
    """Raise unless a budget is a number of seconds."""
    is_number = isinstance(budget, int | float)
    # A bool is an integer in Python.
    if isinstance(budget, bool):
        is_number = False
    if is_number and budget > 0:
        return
    raise UsageError(f"budget cannot be {budget!r}", hint="seconds, above 0")


def _options_of_each(options: AuditOptions, seeds: int, *, has_baseline: bool) -> AuditOptions:
    """Return the options of the audit of one seed.

    Args:
        options: of the gate.
        seeds: how many audits there are.
        has_baseline: norms are then measured to `tol`, not only until the rules are decided.
    """
    if has_baseline:
        options = replace(options, decide=False)

    # Each seed may miss as often as any other.
    if options.confidence_all is not None:
        each = Family(options.confidence_all, seeds).each
        options = replace(options, confidence_all=each)

    # No norm is measured if no selected rule reads one.
    rules = selected(options.select, options.ignore)
    if all(rule.code.startswith("JD2") for rule in rules):
        options = replace(options, products=False)
    return options


def _spec(source: Any) -> str:
    """Return what names the model in the user's code; "" for an object in memory."""
    if isinstance(source, str | bytes | os.PathLike):
        return path_text(source)
    return ""


class _Runs:
    """The audits of a gate, one per seed.

    Attributes:
        model: of the first seed.
        lines: of the user's code, that drew its weights.
        started: when the first began.
        notes: for the report.
        same_weights: whether two seeds gave the same weights.
        ran_out: whether the budget ran out before all were done.
    """

    def __init__(
        self,
        source: Any,
        options: AuditOptions,
        baseline: FiguresRecord | None,
        budget: float | None,
    ) -> None:
        # 1. What to audit.
        self._source = source
        self._options = options
        self._baseline = baseline
        self._budget = budget

        # 2. What came of it so far.
        self._remedies_tried = False
        self.started = time.perf_counter()
        self.same_weights = False
        self.ran_out = False
        self.notes: list[str] = []
        self.model: nn.Module | None = None
        self.lines: dict[str, CodeLine] = {}

    def run(self, seeds: Iterable[int]) -> list[Report]:
        """Audit the model of each seed.

        Args:
            seeds: in the order in which they are audited.

        Returns:
            The reports; one only, if the source has one set of weights or ignores the seed.
        """
        reports: list[Report] = []
        for seed in seeds:
            # 1. Stop if the next audit would end after the budget.
            if reports and self._is_late(len(reports)):
                self.ran_out = True
                self.notes.append(
                    f"the budget of {self._budget:g} s ran out after {len(reports)} of the seeds"
                )
                break

            # 2. Audit the model of this seed.
            if reports:
                loaded = self._open(seed)
            else:
                loaded = self._open_first(seed)
            reports.append(self._audit_until_decided(loaded, seed))

            # 3. A file, or a module in memory, holds one set of weights.
            if loaded.info.get("format") not in _SEEDED_FORMATS:
                break

            # 4. So does a factory that seeds itself.
            if len(reports) == 2 and _drawn_figures(reports[0]) == _drawn_figures(reports[1]):
                self.same_weights = True
                self.notes.append(
                    "two seeds gave the same weights: the factory seeds itself; they count as one"
                )
                return reports[:1]
        return reports

    def _open_first(self, seed: int) -> Source:
        """Return the model of the first seed, and note which lines drew its weights."""
        with InitLines(Path.cwd()) as lines:
            loaded = self._open(seed)
        self.model = loaded.model
        if loaded.model is not None:
            self.lines = lines.of(loaded.model)
        return loaded

    def _open(self, seed: int) -> Source:
        """Return the model of a seed."""
        options = self._options
        loaded = source_of(
            self._source,
            model=options.model,
            model_args=options.model_args,
            key=options.key,
            trust_pickle=options.trust_pickle,
            seed=seed,
        )
        loaded.fresh = loaded.fresh or loaded.info.get("format") in _FRESH_FORMATS
        return loaded

    def _audit_until_decided(self, loaded: Source, seed: int) -> Report:
        """Audit with more products each time, while a rule is undecided and the budget lasts."""
        products = self._options.max_products
        while True:
            # 1. Remedies are tried once, on the first model that needs one.
            options = replace(self._options, seed=seed, max_products=products)
            if self._remedies_tried:
                options = replace(options, remedies="none")
            else:
                options = replace(options, baseline=self._baseline)
            report = run_audit(loaded, options)
            if report.remedies:
                self._remedies_tried = True

            # 2. More products decide only what an interval leaves open.
            if not _is_undecided(report):
                return report

            # 3. There is a limit to them.
            products *= _MORE_PRODUCTS
            if products > _MOST_PRODUCTS:
                return report

            # 4. Nor is there time for them once the budget is spent.
            if self._is_late(0):
                return report

    def _is_late(self, done: int) -> bool:
        """Return whether the next audit would not end within the budget."""
        if self._budget is None:
            return False

        # The next audit is assumed to take as long as those before it.
        elapsed = time.perf_counter() - self.started
        next_audit = 0.0
        if done:
            next_audit = elapsed / done
        return elapsed + next_audit > self._budget


def _is_undecided(report: Report) -> bool:
    """Return whether a rule about norms is undecided."""
    # Codes that begin with JD1 are those of the norms.
    undecided = [rule.code for rule in report.rules if rule.status == "unknown"]
    return any(code.startswith("JD1") for code in undecided)


def _drawn_figures(report: Report) -> tuple[Any, ...]:
    """Return the figures of the drawn weights to the last bit.

    Two models are the same if these are. If no weight is drawn, the result equals no other.
    """
    if report.contract is None:
        return (object(),)

    # Constants are the same for every seed.
    figures = []
    for weight in report.contract.weights:
        is_drawn = weight.family not in ("zero", "constant")
        if is_drawn:
            figures.append((weight.parameter, weight.std, weight.mean))
    return tuple(figures) or (object(),)


def _merge(reports: Sequence[Report]) -> Report:
    """Return the first report with the findings of all: a rule fires if it does for any seed."""
    # 1. The worst status of each rule, and the worst verdict.
    first = reports[0]
    rules = [_worst_result(rule, reports) for rule in first.rules]
    verdicts = [report.verdict for report in reports]
    verdict = min(verdicts, key=_VERDICTS.index)

    # 2. The findings in the order of the rules.
    codes = [rule.code for rule in rules]
    findings = sorted(_merge_findings(reports), key=lambda finding: codes.index(finding.code))

    # 3. Everything else is that of the first report.
    merged = replace(first, findings=findings, rules=rules, verdict=verdict)
    return replace(merged, remedies=_first_remedies(reports))


def _first_remedies(reports: Sequence[Report]) -> list[RemedyRecord]:
    """Return the remedies of the first model that some were tried on."""
    # They are tried once, so that no other report has any.
    for report in reports:
        if report.remedies:
            return report.remedies
    return []


def _merge_findings(reports: Sequence[Report]) -> list[Finding]:
    """Return the findings of all reports; the same one of several seeds becomes one.

    Its evidence lists the seeds under "seeds". Several of one report stay several, such as those
    of JD110, one per figure.
    """
    merged: dict[tuple[str, str, int], Finding] = {}
    for index, report in enumerate(reports):
        count: Counter[tuple[str, str]] = Counter()
        for finding in report.findings:
            # 1. What makes it the same one: code, pattern, and its place among those of one report.
            kind = (finding.code, str(finding.evidence.get("pattern", finding.level)))
            key = (*kind, count[kind])
            count[kind] += 1

            # 2. Add the seed to what is known of it.
            earlier = merged.get(key)
            if earlier is None:
                evidence = {**finding.evidence, "seeds": [index]}
                merged[key] = replace(finding, evidence=evidence)
            else:
                evidence = {**earlier.evidence, "seeds": [*earlier.evidence["seeds"], index]}
                merged[key] = replace(earlier, evidence=evidence)
    return list(merged.values())


def _worst_result(rule: RuleResult, reports: Sequence[Report]) -> RuleResult:
    """Return the result of a rule of the first report, with its worst status in all of them."""
    # 1. Its result in each report.
    results = []
    for report in reports:
        results += [other for other in report.rules if other.code == rule.code]

    # 2. The worst, the first of equal ones.
    worst = min(results, key=lambda other: _STATUSES.index(other.status))
    note = rule.note or worst.note
    return RuleResult(rule.code, worst.status, rule.matched, rule.name, note)


def _not_compared(report: Report, before: FiguresRecord | None) -> list[str]:
    """Return what a comparison with a baseline does not cover, a sentence each; [] without one.

    Args:
        report: of all seeds, with its figures.
        before: those of the baseline.
    """
    if before is None or report.figures is None:
        return []

    # The rule that compares may be left out.
    codes = {rule.code for rule in report.rules}
    if "JD110" not in codes:
        return ["nothing was compared with the baseline: JD110 is not among the selected rules"]
    is_traced = report.tier == "measured"
    return describe_uncompared(report.figures, before, is_traced=is_traced)


def _exit_code(findings: list[Finding], fail_on: str, may_not_pass: bool) -> int:
    """Return the exit code of a gate.

    Args:
        findings: of all seeds.
        fail_on: the least level that fails; "never" for none.
        may_not_pass: something stayed undecided, or no rule applied.
    """
    # 1. A finding at the level or above it.
    if fail_on != "never":
        failing = LEVELS[LEVELS.index(fail_on) :]
        if any(finding.level in failing for finding in findings):
            return FINDINGS

    # 2. What was not decided is never a pass.
    if may_not_pass:
        return UNDECIDED
    return PASS
