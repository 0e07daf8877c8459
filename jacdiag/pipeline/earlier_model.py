"""The earlier model of `--against`: opened before any work, measured with the same probe."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from jacdiag.comparison import (
    check_has_norms,
    check_same_architecture,
    check_same_probe,
    compare_with_earlier,
    read_report,
)
from jacdiag.errors import SourceError, UsageError
from jacdiag.measure.model_summary import model_record
from jacdiag.pipeline.measured_audit import Audit
from jacdiag.pipeline.options import AuditOptions, ModelSource
from jacdiag.pipeline.request import Request
from jacdiag.records import Report
from jacdiag.records.report import source_name
from jacdiag.sources import Source
from jacdiag.sources.factory import is_factory
from jacdiag.sources.python_source import path_text, source_of

_MISSING = "no such file"  # how the message begins about a source that is not there


@dataclass(frozen=True)
class Earlier:
    """An earlier model to compare with: a written report, or a source that is measured here.

    Attributes:
        name: what it is called in the report and in messages.
        report: None for a source.
        source: None for a report.
    """

    name: str
    report: Report | None = None
    source: Source | None = None


def open_earlier(against: ModelSource | Report, options: AuditOptions) -> Earlier:
    """Open what a model is to be compared with; a source is loaded, and not yet measured.

    Args:
        against: a report, the path of one (.json), or a source as for `jacdiag.audit`.
        options: of the audit. `model` and `key` are left out for a source that builds itself.

    Raises:
        SourceError: it cannot be read.
        UsageError: it holds no norms, and no model that could be measured.
    """
    # 1. A report, in memory or in a file.
    if isinstance(against, Report):
        return _earlier_report(against, source_name(against))
    text = ""
    if isinstance(against, str | bytes | os.PathLike):
        text = path_text(against)
    try:
        path = Path(text)
        if text.endswith(".json") and path.is_file():
            return _earlier_report(read_report(path), text)

        # 2. A source to measure.
        source = _open_source(against, text, options)
    except SourceError as error:
        # The audited model is a source too: the message says which of the two it is about.
        hint = error.hint
        if error.what.startswith(_MISSING):
            hint = "EARLIER is an earlier checkpoint, or its JSON report (--json FILE)"
        raise SourceError(f"--against: {error.what}", got=error.got, hint=hint) from error
    if source.model is None:
        hint = "--model FACTORY builds the model; `jacdiag diff --contract-only` compares weights"
        raise UsageError(
            f"there is nothing to compare with in '{text}'", got="weights alone", hint=hint
        )
    return Earlier(text or source.name, source=source)


def _earlier_report(report: Report, name: str) -> Earlier:
    """Return a report to compare with; raise if it holds no norms."""
    check_has_norms(report, name)
    return Earlier(name, report=report)


def _open_source(against: ModelSource, text: str, options: AuditOptions) -> Source:
    """Open a source to compare with.

    Args:
        against: the source.
        text: its path or name; "" for a model in memory.
        options: of the audit.
    """
    # The factory and the key of the audited model fit another file of its weights only.
    model = options.model
    key = options.key
    builds_itself = not text or text.startswith("hf:") or is_factory(text)
    if builds_itself:
        model = None
        key = None
    return source_of(
        against,
        model=model,
        model_args=options.model_args,
        key=key,
        trust_pickle=options.trust_pickle,
        seed=options.seed,
    )


def measure_earlier(earlier: Earlier, request: Request, later: Audit) -> Report:
    """Return the report of the earlier model, measured with the same probe as the later one.

    Args:
        earlier: as it was opened.
        request: of the audit.
        later: the audit of the later model, already traced.

    Raises:
        UsageError: it is of another architecture, or a report that another probe was used for.
    """
    # 1. A report is only checked.
    width = model_record(later.model, later.sites).width
    if earlier.report is not None:
        report = earlier.report
        check_same_architecture(
            later.sites, report.sublayers, (width, report.model.width), earlier.name
        )
        dtype = str(request.options.dtype)
        check_same_probe(later.probe.described, dtype, report, earlier.name)
        return report

    # 2. A model is measured. Only the norms are compared: the contract, the optimizer and the
    # remedies are the later model's.
    assert earlier.source is not None and earlier.source.model is not None
    probe = later.probe.for_model(earlier.source.model)
    plain = replace(request, source=earlier.source, baseline=None)
    plain = plain.with_options(contract=None, optimizer=None, remedies="none")
    audit = Audit(plain, probe)
    audit.trace()
    widths = (width, model_record(audit.model, audit.sites).width)
    check_same_architecture(later.sites, audit.sites, widths, earlier.name)
    return audit.run()


def judge_against(
    request: Request, report: Report, earlier: Report, name: str
) -> tuple[Request, Report]:
    """Judge a report by the rules, compared with an earlier one.

    Args:
        request: of the audit.
        report: as it was measured.
        earlier: the report to compare with.
        name: what the earlier model is called.

    Returns:
        The request that holds the comparison, for what is tried on copies later, and the report
        with its verdict.
    """
    # 1. Compare.
    margin = request.thresholds.limits("regression").warning or 0.0
    record, figures = compare_with_earlier(report, earlier, name, margin)
    request = replace(request, baseline=figures, against=record)

    # 2. Judge, with the notes that only the earlier report has.
    own_notes = [f"{name}: {note}" for note in earlier.notes if note not in report.notes]
    return request, request.judged(replace(report, notes=[*report.notes, *own_notes]))
