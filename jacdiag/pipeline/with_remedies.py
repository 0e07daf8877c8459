"""What an audit lends to the remedies: a copy measured again, its output, the model built with
another seed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from jacdiag.errors import JacdiagError, MeasureError, UsageError
from jacdiag.measure.family_confidence import Family
from jacdiag.measure.init_contract import decayed_by
from jacdiag.pipeline.measured_audit import Audit
from jacdiag.pipeline.request import Request
from jacdiag.records import Report
from jacdiag.remedies import Bench, aims, most_trials, remedies_for, tried
from jacdiag.rules.remedy_targets import with_fixes
from jacdiag.sources import Source, load
from jacdiag.sources.host_memory import free_host_memory

WAYS = ("none", "first", "all", "begun")
_SPARE = 1.5  # times the weights: memory that must be free for a copy and the work on it


def check_way(way: str) -> None:
    """Raises UsageError for a way of trying remedies that there is not."""
    if way not in WAYS:
        raise UsageError(
            "unknown way of trying remedies", got=way, hint=f"one of {', '.join(WAYS)}"
        )


def with_remedies(request: Request, audit: Audit, report: Report) -> Report:
    """The report with the remedies that were tried; findings that the recommended one answers carry
    it as their fix.

    Args:
        request: of the audit; `remedies` says whether to stop at the first sufficient one
            ("first"), to try every one ("all"), or those for a run that has begun ("begun").
        audit: as it ran.
        report: what it found, evaluated.
    """
    begun = request.remedies == "begun"
    if request.remedies == "none" or audit.sites.deterministic is False or audit.broken:
        return report
    if not begun and (report.state != "init" or not aims(report)):
        return report
    try:
        with request.ranks.attempt():
            _check_room(request, audit)
    except MeasureError as error:
        return replace(report, notes=[*report.notes, f"no remedy was tried: {error.what}"])
    begun_at = time.perf_counter()
    remedies = remedies_for(report, audit.model, request.thresholds, begun=begun)
    bench = _bench(request, audit, report, len(remedies))
    records, notes = tried(
        report,
        audit.model,
        remedies,
        bench,
        every=request.remedies != "first",
        told=_teller(request, len(remedies)),
    )
    if request.progress is not None:
        request.progress.stop()
    findings, spent = with_fixes(report.findings, records), time.perf_counter() - begun_at
    cost = replace(
        report.cost,
        seconds=(report.cost.seconds or 0.0) + spent,
        phases={**report.cost.phases, "remedies": spent},
    )
    return replace(
        report, remedies=records, findings=findings, cost=cost, notes=[*report.notes, *notes]
    )


def _check_room(request: Request, audit: Audit) -> None:
    """Raises MeasureError where no copy of the model can be made."""
    if request.source.weights is not None:
        raise MeasureError("the weights stay in their files")
    size = sum(p.numel() * p.element_size() for p in audit.model.parameters())
    on_cpu = all(p.device.type == "cpu" for p in audit.model.parameters())
    free = free_host_memory() if on_cpu else None
    needed = _SPARE * size
    if free is not None and needed > free:
        raise MeasureError(
            f"a copy of the model needs {needed / 1e9:.2g} GB of memory, {free / 1e9:.2g} GB are "
            "free"
        )


def _teller(request: Request, count: int) -> Any:
    if request.progress is None:
        return lambda _name: None
    request.progress.start(count, "trying remedies")
    return lambda name: request.progress.advance(1, name)  # type: ignore[union-attr]


def _bench(request: Request, audit: Audit, report: Report, count: int) -> Bench:
    decayed = [] if request.optimizer is None else decayed_by(audit.model, request.optimizer)
    # these rest on figures of their full width
    decide = not {"JD104", "JD105", "JD110"} & set(aims(report))

    level = request.confidence_all
    if level is not None:  # each trial may miss as often as any other
        level = Family(request.split_level()[1], most_trials(count)).each

    def again(model: nn.Module, spared: Iterable[str], seed: int) -> tuple[Report, Any]:
        source = replace(request.source, model=model, notes=[])
        optimizer = None
        if request.optimizer is not None:
            kept = set(decayed) - set(spared)
            optimizer = [
                {
                    "params": [p for n, p in model.named_parameters() if n in kept],
                    "weight_decay": 1.0,
                }
            ]
        changed = replace(
            request,
            source=source,
            seed=seed,
            decide=decide,
            state=report.state,
            optimizer=optimizer,
            progress=None,
            remedies="none",
            probes=1,
            confidence_all=level,
        )
        made = Audit(changed)
        return changed.judged(made.run()), made.sites.output

    return Bench(
        again, audit.sites.output, _builder(request.source), request.seed, request.ranks.attempt
    )


def _builder(source: Source) -> Any:
    """Builds the source anew with another seed; None where it holds one set of weights."""
    if source.info.get("format") not in ("factory", "hf-config") or "factory" not in source.info:
        return None

    def build(seed: int) -> nn.Module | None:
        with contextlib.suppress(JacdiagError):
            return load(
                source.info["factory"], model_args=source.info.get("model_args"), seed=seed
            ).model
        return None

    return build
