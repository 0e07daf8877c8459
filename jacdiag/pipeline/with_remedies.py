"""Remedies tried on copies of the audited model, each judged by a new audit of the copy."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from jacdiag.devices.host_memory import free_host_memory
from jacdiag.errors import JacdiagError, MeasureError, TraceError
from jacdiag.measure.branch_norms import NORMS
from jacdiag.measure.family_confidence import Family
from jacdiag.measure.init_contract import decayed_by
from jacdiag.pipeline.measured_audit import Audit
from jacdiag.pipeline.request import Request, Scope
from jacdiag.records import Report
from jacdiag.remedies import Bench, aims, most_trials, remedies_for, try_remedies
from jacdiag.rules.remedy_targets import with_fixes
from jacdiag.sources import Source, load
from jacdiag.trace.execution.wrappers import has_foreign_hooks

_SPARE = 1.5  # times the weights: memory that must be free for a copy and the work on it
# These rules rest on figures of full width, which an audit that stops early does not have.
_NEED_FULL_WIDTH = {"JD104", "JD105", "JD110"}
# The rules that read each norm, of those that a remedy can be tried against.
_READERS = {"branch_norm": {"JD103"}, "core_norm": {"JD101"}}
# The rules on a norm or a gain, which have a distance from their cut.
_HAVE_DISTANCE = {"JD101", "JD102", "JD103"}
# Times by which a figure of one seed is to be below a cut. No seed of a mended model was so many
# times above the median of the seeds (benchmarks/remedies.py --spread).
_CLEAR = 1.5
_USUAL_PROFILE = "default"  # its infos and warnings have the levels of the rules themselves


def with_remedies(request: Request, audit: Audit, report: Report) -> Report:
    """Try remedies, and add them to the report; findings carry the recommended one as their fix.

    Args:
        request: of the audit; `remedies` says whether to stop at the first sufficient one
            ("first"), to try every one ("all"), or those for a run that has begun ("begun").
        audit: as it ran.
        report: its result, judged.

    Returns:
        The report as it was, if no remedy is requested or none can be tried.
    """
    if not _can_be_remedied(request, audit, report):
        return report
    try:
        with request.ranks.attempt():
            _check_room(request, audit)
    except MeasureError as error:
        return replace(report, notes=[*report.notes, f"no remedy was tried: {error.what}"])

    # 1. Try the remedies.
    start = time.perf_counter()
    choice = request.options.remedies
    progress = request.options.progress
    remedies = remedies_for(report, audit.model, request.thresholds, has_begun=choice == "begun")
    if progress is not None:
        progress.start(len(remedies), "trying remedies")
    records, notes = try_remedies(
        report,
        audit.model,
        remedies,
        _bench(request, audit, report, len(remedies)),
        every=choice != "first",
        before_each=_advance_with(request),
    )
    if progress is not None:
        progress.stop()

    # 2. Add them to the report.
    findings = with_fixes(report.findings, records)
    seconds = time.perf_counter() - start
    cost = replace(
        report.cost,
        seconds=(report.cost.seconds or 0.0) + seconds,
        phases={**report.cost.phases, "remedies": seconds},
    )
    return replace(
        report, remedies=records, findings=findings, cost=cost, notes=[*report.notes, *notes]
    )


def _can_be_remedied(request: Request, audit: Audit, report: Report) -> bool:
    """Return whether remedies are requested, and the model is one to try them on."""
    # 1. Nothing is requested, or nothing could be measured on a copy.
    choice = request.options.remedies
    if choice == "none":
        return False
    if audit.sites.deterministic is False or audit.broken:
        return False

    # 2. A run that has begun can be changed whatever its state; else only an init can.
    if choice == "begun":
        return True
    return report.state == "init" and bool(aims(report))


def _check_room(request: Request, audit: Audit) -> None:
    """Raise MeasureError if no copy of the model can be made."""
    if request.source.weights is not None:
        raise MeasureError("the weights stay in their files")

    # 1. Memory is checked on the host alone.
    size = 0
    for parameter in audit.model.parameters():
        if parameter.device.type != "cpu":
            return
        size += parameter.numel() * parameter.element_size()

    # 2. Compare it with what is free, if that can be known.
    needed = _SPARE * size
    free = free_host_memory()
    if free is not None and needed > free:
        raise MeasureError(
            f"a copy of the model needs {needed / 1e9:.2g} GB of memory, {free / 1e9:.2g} GB are "
            "free"
        )


def _advance_with(request: Request) -> Callable[[str], None]:
    """Return a function that notes on the display of progress that a remedy was tried."""
    progress = request.options.progress

    def advance(name: str) -> None:
        if progress is not None:
            progress.advance(1, name)

    return advance


def _bench(request: Request, audit: Audit, report: Report, count: int) -> Bench:
    """Return what the remedies are tried with.

    Args:
        request: of the audit.
        audit: of the model as it is.
        report: of that audit.
        count: how many remedies there are.
    """
    options = request.options

    # 1. The level of one trial. Each may miss as often as any other.
    level = options.confidence_all
    if level is not None:
        level = Family(options.split_level()[1], most_trials(count)).each

    # 2. A trial is an audit like that of the model as it is.
    decayed: Iterable[str] = ()
    if options.optimizer is not None:
        decayed = decayed_by(audit.model, options.optimizer)
    trial = _Trial(
        request=request,
        state=report.state,
        aims=frozenset(aims(report)),
        applied=_only_rules_about_norms(report),
        own_hooks=not has_foreign_hooks(audit.model),
        confidence_all=level,
        decayed=frozenset(decayed),
    )

    return Bench(
        trial.audit,
        trial.audit_on_one_sequence,
        trial.confirm,
        trial.is_clear,
        audit.sites.output,
        _builder(request.source),
        options.seed,
        request.ranks.attempt,
    )


def _only_rules_about_norms(report: Report) -> frozenset[str]:
    """Return the rules about norms that applied, if all of them read norms of full width."""
    # 1. The rules about norms that had something to judge.
    matched = {rule.code for rule in report.rules if rule.matched}
    about_norms = frozenset(filter(_is_about_norms, matched))

    # 2. One that reads other norms applies to a copy, too.
    is_any_other = bool(about_norms - _NEED_FULL_WIDTH)
    if is_any_other:
        return frozenset()

    return about_norms


def _is_about_norms(code: str) -> bool:
    return code.startswith("JD1")


@dataclass(frozen=True)
class _Trial:
    """An audit of changed copies of the model.

    Attributes:
        request: of the audit of the model itself.
        state: of its weights: a copy is not judged again.
        aims: the rules that remedies are tried against.
        applied: the rules about norms without which none would apply.
        own_hooks: all hooks of a copy are those of a remedy, since the model has none.
        confidence_all: of one trial; None if the confidence is that of each interval.
        decayed: names of the parameters that the optimizer decays.
    """

    request: Request
    state: Literal["init", "trained"] | None
    aims: frozenset[str]
    applied: frozenset[str]
    own_hooks: bool
    confidence_all: float | None
    decayed: frozenset[str]

    def audit(self, model: nn.Module, spared: Iterable[str], seed: int) -> tuple[Report, Any]:
        """Audit a copy.

        Args:
            model: the copy.
            spared: names of parameters that the remedy takes out of weight decay.
            seed: of the probe and the solver.

        Returns:
            The judged report, and the output of the copy on the probe.
        """
        request = self._request_of_first(model, spared, seed)
        audit = Audit(request)
        return request.judged(audit.run()), audit.sites.output

    def audit_on_one_sequence(
        self, model: nn.Module, spared: Iterable[str], seed: int
    ) -> Report | None:
        """Audit a copy on one sequence of the probe, with the arguments of `audit`.

        None if the probe has one, was passed, or is that of a baseline, if a rule reads figures of
        the entire probe, or if the model does not run on one sequence.
        """
        if not self._may_divide_probe():
            return None

        request = self._request_of_first(model, spared, seed).with_options(batch=1)
        audit = _traced(request)
        if audit is None:
            return None
        return request.judged(audit.run())

    def _may_divide_probe(self) -> bool:
        """Return whether one sequence can stand for the probe."""
        # 1. It has several, which are drawn or read here.
        options = self.request.options
        is_several = options.batch > 1 and options.inputs is None

        # 2. No figure of the entire probe is read or compared.
        needs_all = bool(_NEED_FULL_WIDTH & (self.aims | self.applied))
        is_compared = self.request.baseline is not None or self.request.against is not None
        return is_several and not needs_all and not is_compared

    def _request_of_first(self, model: nn.Module, spared: Iterable[str], seed: int) -> Request:
        """Return the request of an audit on the report's own seed; see `audit`.

        Infos may remain, so that the norm of a branch is solved until warnings are decided. The
        infos of other figures decide whether a condition is met. Of the residual maps, rules read
        norms of full width alone. These are measured if remedies are tried against such a rule, or
        if no other rule about norms applies. The copy would seem to be judged by none without them.
        """
        # The code of a copy is that of the model, whose parts were run alone and compared.
        scope = Scope(hooks=self.own_hooks, replay=False)
        are_read = _NEED_FULL_WIDTH & (self.aims | self.applied)
        if not are_read:
            scope = replace(scope, norms=NORMS - {"residual_norm"})
        changed = replace(self._changed_request(model, spared, seed), scope=scope)
        if self.request.options.profile == _USUAL_PROFILE:
            thresholds = changed.thresholds.without_infos("branch_norm")
            changed = replace(changed, thresholds=thresholds)
        return changed

    def confirm(self, model: nn.Module, spared: Iterable[str], seed: int) -> Report:
        """Audit a copy of a further seed by the rules that remedies are tried against alone.

        What none of these rules reads is not measured. Infos may remain, so that norms are solved
        until it is decided whether they are beyond the cut of a warning, and whether they are far
        below it. The probe has one sequence, unless the model does not run on one, the input was
        passed, or a rule compares figures of the entire probe.

        Args:
            model: the copy.
            spared: names of parameters that the remedy takes out of weight decay.
            seed: of the probe and the solver.
        """
        # 1. What the rules read.
        changed = self._changed_request(model, spared, seed)
        scope = replace(_what_is_read_by(self.aims), hooks=self.own_hooks)
        changed = replace(changed, scope=scope).with_options(select=sorted(self.aims))
        if "JD110" not in self.aims:
            changed = replace(changed, baseline=None, against=None)
            changed = changed.with_options(baseline=None, against=None)

        # 2. The cuts that decide. A profile may make warnings of infos.
        if self.request.options.profile == _USUAL_PROFILE:
            cuts = changed.thresholds.of_warnings().with_infos_below_warnings(_CLEAR)
            changed = replace(changed, thresholds=cuts)

        # 3. The init contract is read off the weights. Other rules need a probe.
        if all(code.startswith("JD2") for code in self.aims):
            changed = changed.with_options(products=False)
        elif not _NEED_FULL_WIDTH & self.aims:
            small = changed.with_options(batch=1)
            audit = _traced(small)
            if audit is not None:
                return small.judged(audit.run())
        return changed.judged(Audit(changed).run())

    def is_clear(self, report: Report) -> bool:
        """Return whether all figures of a further seed are far from the cuts of a warning.

        Args:
            report: as `confirm` returns it.
        """
        # 1. Another profile keeps its own infos, and rules on weights have no distance from a cut.
        is_usual = self.request.options.profile == _USUAL_PROFILE
        has_distance = self.aims <= _HAVE_DISTANCE
        if not (is_usual and has_distance):
            return False

        # 2. An info says that a figure is near.
        near = {finding.code for finding in report.findings}
        undecided = {rule.code for rule in report.rules if rule.status == "unknown"}
        return self.aims.isdisjoint(near | undecided)

    def _changed_request(self, model: nn.Module, spared: Iterable[str], seed: int) -> Request:
        """Return the request of an audit of a copy; see `audit` for the arguments."""
        return replace(
            self.request, source=replace(self.request.source, model=model, notes=[])
        ).with_options(
            seed=seed,
            decide=not _NEED_FULL_WIDTH & self.aims,
            state=self.state,
            optimizer=self._optimizer(model, set(spared)),
            progress=None,
            remedies="none",
            probes=1,
            confidence_all=self.confidence_all,
        )

    def _optimizer(self, model: nn.Module, spared: set[str]) -> list[dict[str, Any]] | None:
        """Return parameter groups of the copy: what the optimizer would decay of it."""
        if self.request.options.optimizer is None:
            return None

        # Any decay above 0 says that a parameter decays.
        names = self.decayed - spared
        params = [parameter for name, parameter in model.named_parameters() if name in names]
        return [{"params": params, "weight_decay": 1.0}]


def _traced(request: Request) -> Audit | None:
    """Return an audit that has recorded its model; None if the model does not run on the probe."""
    audit = Audit(request)
    try:
        audit.trace()
    except TraceError:
        return None
    return audit


def _what_is_read_by(codes: frozenset[str]) -> Scope:
    """Return what has to be measured for some of the rules that can be aimed at."""
    # 1. These rules read figures of the entire model.
    if _NEED_FULL_WIDTH & codes:
        return Scope(replay=False)

    # 2. Any other reads norms of sub-layers, or weights.
    norms = set()
    for name, readers in _READERS.items():
        if readers & codes:
            norms.add(name)

    # 3. The rules on weights read the init contract.
    reads_weights = any(code.startswith("JD2") for code in codes)
    return Scope(replay=False, network=False, contract=reads_weights, norms=frozenset(norms))


def _builder(source: Source) -> Callable[[int], nn.Module | None] | None:
    """Return a function that builds the source with another seed; None if it has one set only.

    The caller alone holds each model that the function builds.
    """
    # 1. A file holds one set of weights.
    if source.info.get("format") not in ("factory", "hf-config"):
        return None
    if "factory" not in source.info:
        return None
    factory = source.info["factory"]
    model_args = source.info.get("model_args")

    # 2. A factory or a config draws others.
    def build(seed: int) -> nn.Module | None:
        """Return the model with weights of this seed; None if it cannot be built again."""
        try:
            built = load(factory, model_args=model_args, seed=seed)
        except JacdiagError:
            return None

        # A factory may return a model that somebody else holds too.
        if built.info.get("format") == "factory":
            return copy.deepcopy(built.model)
        return built.model

    return build
