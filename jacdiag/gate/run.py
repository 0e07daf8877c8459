"""One gate run: build, audit, decide, over seeds; put together; compare; an exit code."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from jacdiag.comparison.baseline_file import check_comparable, read_baseline
from jacdiag.comparison.seed_spread import figures_of
from jacdiag.errors import UsageError
from jacdiag.gate.source_location import located
from jacdiag.measure.family_confidence import Family
from jacdiag.pipeline.argument_types import codes_of
from jacdiag.pipeline.audit import audit
from jacdiag.records import LEVELS, FiguresRecord, Finding, Report, RuleResult, Verdict
from jacdiag.records.option_ranges import check_ranges
from jacdiag.rules import evaluate, measurement, selected
from jacdiag.rules.remedy_targets import with_fixes
from jacdiag.rules.thresholds import load_thresholds
from jacdiag.sources import Source
from jacdiag.sources.python_source import path_text, source_of

PASS, FINDINGS, UNDECIDED = 0, 1, 3
_MORE = 4  # times the products, where a rule stayed undecided
_MOST = 4000
# formats of sources that a gate takes as freshly initialised
_BUILT = ("factory", "hf-config", "module")


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
        words = {0: "passed", 1: "failed", 3: "undecided"}
        word = words.get(self.exit_code, "")
        if self.exit_code == PASS and self.report.verdict == "observed":
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
    """Audits a freshly initialised model over several seeds and decides whether it may pass.

    Args:
        source: as for `jacdiag.audit`, or a callable that returns a new module.
        inputs: the probe, as for `jacdiag.audit`.
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

    Raises:
        JacdiagError: as `jacdiag.audit`; also a baseline that cannot be read or is of another
            model.

    Example:
        >>> out = gate("jacdiag.sources.gpt:build", seeds=2, batch=1, seq=8,
        ...            model_args={"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 32})
        >>> out.exit_code, out.report.settings["gate"]["seeds"]
        (0, 2)
    """
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise UsageError(
            f"seeds cannot be {seeds!r}", hint="a number of initialisations, from 1 on"
        )
    if budget is not None and (
        isinstance(budget, bool) or not isinstance(budget, int | float) or not budget > 0
    ):
        raise UsageError(f"budget cannot be {budget!r}", hint="seconds, above 0")
    check_ranges(seed=seed)
    if fail_on not in (*LEVELS, "never"):
        raise UsageError(
            "unknown level", got=str(fail_on), hint=f"one of {', '.join((*LEVELS, 'never'))}"
        )
    before = read_baseline(baseline) if baseline is not None else None
    select, ignore = codes_of("select", select), codes_of("ignore", ignore)
    together = options.get("confidence_all")
    check_ranges(confidence_all=together)
    if together is not None:  # each seed may miss as often as any other
        options["confidence_all"] = Family(together, seeds).each
    # nothing that is selected asks for norms
    if all(rule.code.startswith("JD2") for rule in selected(select, ignore)):
        options["products"] = False
    runs = _Runs(
        _opener(source, model, model_args, key, trust_pickle),
        inputs,
        budget,
        {
            **options,
            "profile": profile,
            "select": select,
            "ignore": ignore,
            "thresholds": thresholds,
            "decide": options.get("decide", True) and before is None,
            "state": state,
            "trust_pickle": trust_pickle,
        },
        max_products,
        before,
    )
    reports = runs.all(range(seed, seed + seeds))
    limits = load_thresholds(thresholds, options.get("risk"))
    figures = figures_of(reports, limits.limits("regression").warning or 0.0, command)
    if before is not None and baseline is not None:
        check_comparable(Path(path_text(baseline)), figures, before)
    first = replace(reports[0], figures=figures, baseline=before)
    judged = evaluate(first, thresholds=limits, profile=profile, select=select, ignore=ignore)
    told = _together([judged, *reports[1:]])
    findings = located(with_fixes(told.findings, told.remedies), runs.model, runs.spec)
    undecided = sorted({r.code for r in told.rules if r.status == "unknown"})
    applied = measurement.applied(told, {r.code: r for r in told.rules})
    code = _exit_code(findings, fail_on, bool(undecided) or runs.short or not applied)
    about = {
        "exit_code": code,
        "seeds": len(reports),
        "same_weights": runs.same,
        "budget_ran_out": runs.short,
        "undecided": undecided,
        "rule_applied": applied,
        "seconds": time.perf_counter() - runs.started,
        "fail_on": fail_on,
        "baseline": str(baseline) if baseline is not None else None,
    }
    settings = {
        **told.settings,
        "gate": about,
        "command": command,
        "remedies": options.get("remedies", "none"),
    }
    if together is not None and "confidence_all" in settings:
        settings["confidence_all"] = {
            **settings["confidence_all"],
            "level": together,
            "seeds": seeds,
        }
    notes = [*told.notes, *runs.notes]
    return Outcome(replace(told, findings=findings, settings=settings, notes=notes), code, figures)


Opener = Callable[[int], Source]


def _opener(
    source: Any, model: str | None, model_args: dict[str, Any] | None, key: str | None, trust: bool
) -> tuple[Opener, str]:
    """How a fresh model of a seed is made, and what names it in the user's code."""
    spec = path_text(source) if isinstance(source, str | bytes | os.PathLike) else ""

    def open_with(seed: int) -> Source:
        return source_of(
            source, model=model, model_args=model_args, key=key, trust_pickle=trust, seed=seed
        )

    return open_with, spec


class _Runs:
    """The audits, one per seed."""

    def __init__(
        self,
        opener: tuple[Opener, str],
        inputs: Any,
        budget: float | None,
        options: dict[str, Any],
        products: int,
        baseline: FiguresRecord | None,
    ) -> None:
        (self.open, self.spec), self.inputs, self.budget = opener, inputs, budget
        self.options, self.products, self.baseline = options, products, baseline
        self.started = time.perf_counter()
        self.same = self.short = self.tried = False
        self.notes: list[str] = []
        self.model: nn.Module | None = None

    def all(self, seeds: Iterable[int]) -> list[Report]:
        reports: list[Report] = []
        for seed in seeds:
            if reports and self._late(len(reports)):
                self.short = True
                self.notes.append(
                    f"the budget of {self.budget:g} s ran out after {len(reports)} of the seeds"
                )
                break
            loaded = self.open(seed)
            loaded.fresh = loaded.fresh or loaded.info.get("format") in _BUILT
            if self.model is None:
                self.model = loaded.model
            reports.append(self._decided(loaded, seed))
            if loaded.info.get("format") not in ("factory", "hf-config"):
                break  # a file, or a module in memory: it holds one set of weights
            if len(reports) == 2 and _fingerprint(reports[0]) == _fingerprint(reports[1]):
                self.same = True
                self.notes.append(
                    "two seeds gave the same weights: the factory seeds itself; they count as one"
                )
                return reports[:1]
        return reports

    def _decided(self, loaded: Source, seed: int) -> Report:
        """Audits, and spends more products for as long as a rule is undecided and the budget
        lasts.
        """
        products = self.products
        while True:
            options = {
                **self.options,
                **({"remedies": "none"} if self.tried else {"baseline": self.baseline}),
            }
            report = audit(loaded, self.inputs, seed=seed, max_products=products, **options)
            self.tried = self.tried or bool(report.remedies)
            across = any(r.status == "unknown" and r.code.startswith("JD1") for r in report.rules)
            products *= _MORE
            if not across or products > _MOST or self._late(0):
                return report

    def _late(self, done: int) -> bool:
        """Whether the next audit would not end within the budget."""
        if self.budget is None:
            return False
        passed = time.perf_counter() - self.started
        return passed + (passed / done if done else 0.0) > self.budget


def _fingerprint(report: Report) -> tuple[Any, ...]:
    """Figures of the drawn weights to the last bit; () where there is none to tell by."""
    weights = report.contract.weights if report.contract is not None else []
    drawn = [(w.parameter, w.std, w.mean) for w in weights if w.family not in ("zero", "constant")]
    return tuple(drawn) or (object(),)


def _together(reports: list[Report]) -> Report:
    """The first seed's report with what the others found: a rule fires if it does for any seed."""
    first = reports[0]
    merged: dict[tuple[str, str, int], Finding] = {}
    for k, report in enumerate(reports):
        count: Counter[tuple[str, str]] = Counter()
        for finding in report.findings:
            alike = (finding.code, str(finding.evidence.get("pattern", finding.level)))
            # several of one report stay several, such as JD110's, one per figure
            key = (*alike, count[alike])
            count[alike] += 1
            held = merged.get(key)
            seen = [*held.evidence["seeds"], k] if held is not None else [k]
            merged[key] = replace(
                held or finding, evidence={**(held or finding).evidence, "seeds": seen}
            )
    order = ("fired", "unknown", "clean", "not-applicable")
    rules = []
    for one in first.rules:
        others = [r for report in reports for r in report.rules if r.code == one.code]
        worst = min(others, key=lambda r: order.index(r.status))
        rules.append(
            RuleResult(one.code, worst.status, one.matched, one.name, one.note or worst.note)
        )
    verdicts: tuple[Verdict, ...] = ("fail", "warn", "unknown", "observed", "pass")
    verdict = min((r.verdict for r in reports), key=verdicts.index)
    codes = [r.code for r in rules]
    findings = sorted(merged.values(), key=lambda f: codes.index(f.code))
    remedies = next((report.remedies for report in reports if report.remedies), [])
    return replace(first, findings=findings, rules=rules, verdict=verdict, remedies=remedies)


def _exit_code(findings: list[Finding], fail_on: str, undecided: bool) -> int:
    if fail_on != "never" and any(LEVELS.index(f.level) >= LEVELS.index(fail_on) for f in findings):  # type: ignore[arg-type]
        return FINDINGS
    return UNDECIDED if undecided else PASS
