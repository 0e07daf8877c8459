"""The earlier model of `--against`: opened before any work, measured with the probe of the model
that is audited.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from jacdiag.comparison import (
    check_has_norms,
    check_same_architecture,
    check_same_probe,
    compare_with_earlier,
    read_report,
)
from jacdiag.errors import UsageError
from jacdiag.measure.model_summary import model_record
from jacdiag.pipeline.measured_audit import Audit
from jacdiag.pipeline.request import Request
from jacdiag.records import Report
from jacdiag.records.summary import source_name
from jacdiag.sources import Source
from jacdiag.sources.factory import is_factory
from jacdiag.sources.python_source import path_text, source_of

Given = str | bytes | os.PathLike[str] | nn.Module | Callable[..., nn.Module] | Source | Report


@dataclass(frozen=True)
class Earlier:
    """What a model is compared with: a report that was written, or a source that is measured here.

    Attributes:
        name: what it is called in the report and in messages.
        report: None for a source.
        source: None for a report.
    """

    name: str
    report: Report | None = None
    source: Source | None = None


def open_earlier(
    given: Given,
    *,
    model: Any,
    model_args: dict[str, Any] | None,
    key: str | None,
    trust_pickle: bool,
    seed: int,
) -> Earlier:
    """Open what a model is to be compared with; a source is loaded, and not yet measured.

    Args:
        given: a report, the path of one (.json), or a source as for `jacdiag.audit`.
        model: builds the module of a bare state dict; left out for a source that builds itself.
        model_args, key, trust_pickle, seed: as for `jacdiag.audit`.

    Raises:
        SourceError: it cannot be read.
        UsageError: it holds no norms, and no model that could be measured.
    """
    if isinstance(given, Report):
        check_has_norms(given, source_name(given))
        return Earlier(source_name(given), report=given)

    text = path_text(given) if isinstance(given, str | bytes | os.PathLike) else ""
    path = Path(text)
    if text.endswith(".json") and path.is_file():
        report = read_report(path)
        check_has_norms(report, text)
        return Earlier(text, report=report)

    builds_itself = text.startswith("hf:") or (bool(text) and is_factory(text)) or not text
    source = source_of(
        given,
        model=None if builds_itself else model,
        model_args=model_args,
        key=None if builds_itself else key,
        trust_pickle=trust_pickle,
        seed=seed,
    )
    if source.model is None:
        hint = "--model FACTORY builds the model; `jacdiag diff --contract-only` compares weights"
        raise UsageError(
            f"there is nothing to compare with in '{text}'", got="weights alone", hint=hint
        )
    return Earlier(text or source.name, source=source)


def measure_earlier(earlier: Earlier, request: Request, now: Audit) -> Report:
    """Return the report of the earlier model, measured with the same probe as the model that is
    audited.

    Args:
        earlier: as it was opened.
        request: of the audit.
        now: the audit of the model, already traced.

    Raises:
        UsageError: it is of another architecture, or a report that another probe was used for.
    """
    width = model_record(now.model, now.sites).width
    if earlier.report is not None:
        report = earlier.report
        dtype = str(request.dtype).removeprefix("torch.")
        check_same_architecture(
            now.sites, report.sublayers, (width, report.model.width), earlier.name
        )
        check_same_probe(now.probe.described, dtype, report, earlier.name)
        return report

    assert earlier.source is not None and earlier.source.model is not None
    probe = now.probe.for_model(earlier.source.model)
    plain = replace(
        request, source=earlier.source, baseline=None, contract={}, optimizer=None, remedies="none"
    )
    audit = Audit(plain, probe)
    audit.trace()
    widths = (width, model_record(audit.model, audit.sites).width)
    check_same_architecture(now.sites, audit.sites, widths, earlier.name)
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
    margin = request.thresholds.limits("regression").warning or 0.0
    record, figures = compare_with_earlier(report, earlier, name, margin)
    request = replace(request, baseline=figures, against=record)
    own_notes = [f"{name}: {note}" for note in earlier.notes if note not in report.notes]
    return request, request.judged(replace(report, notes=[*report.notes, *own_notes]))
