"""The measured tier, step by step: probe, record, jobs that one rank or several do, report."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from jacdiag.auditing.request import Request
from jacdiag.auditing.stamp import peak_memory_mb, stamp
from jacdiag.errors import JacdiagError, MeasureError, SourceError, TraceError, UsageError, one_line
from jacdiag.measure.contract import contract_of, decayed_by
from jacdiag.measure.draws import Draws, std_of
from jacdiag.measure.finite import non_finite_state
from jacdiag.measure.model import model_record
from jacdiag.measure.network import end_to_end, gradient_profile, network_record, verify_replay
from jacdiag.measure.norms import Effort
from jacdiag.measure.state import StateDecision, WeightEvidence, decide_state, judge_weights, same_weights
from jacdiag.measure.sublayer import measure_group
from jacdiag.measure.weights import weight_stats
from jacdiag.ranks import Fingerprint, Share, Use, fingerprint, merged
from jacdiag.report import Cost, Interval, NetworkRecord, Report, SublayerRecord, WeightStats
from jacdiag.report.probes import facts_of, options, parting, spoken
from jacdiag.report.thresholds import load_healthy
from jacdiag.rules import decision_points
from jacdiag.sources import Probe, build_probe
from jacdiag.sources.device import pick
from jacdiag.sources.factory import model_code
from jacdiag.sources.history import history_of
from jacdiag.sources.host_memory import free_host_memory
from jacdiag.trace import Sublayer, sites
from jacdiag.trace.declared import nothing_found
from jacdiag.trace.tensors import collect_deep

REPLAY_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


@dataclass(frozen=True)
class Job:
    """A piece of the work that one rank does: `units` of the progress bar; `cost` is compared with other jobs'."""

    name: str
    phase: str
    units: float
    cost: float
    run: Callable[[], Share]


class Audit:
    """The measured tier, step by step."""

    def __init__(self, request: Request) -> None:
        assert request.source.model is not None
        self.request = request
        self.model: nn.Module = request.source.model
        self.started = time.perf_counter()
        self.phases: dict[str, float] = {}
        self.notes = list(request.source.notes)
        self._stats: dict[str, WeightStats | None] = {}

    def run(self) -> Report:
        with model_code():
            return self._run()

    def _run(self) -> Report:
        self._check_values()
        self._place()
        probe = self._probe()
        self._check_baseline(probe)
        with self._phase("record"), probe.suspected():
            self.sites = sites(self.model, *probe.args, dtype=self.request.dtype, declared=self.request.declared,
                               weights=self.request.source.weights, **probe.kwargs)  # fmt: skip
        self.notes += [*self.sites.notes, *(f"hidden from the dataflow: {line}" for line in self.sites.hidden)]
        self.notes += [f"residual sum left out: {item}" for item in self.sites.left_out]
        if not self.sites:
            raise nothing_found(self.sites)
        with self._phase("state"):
            self.decision = self._decide_state()
        self.state = self.decision.state
        if self.decision.note:
            self.notes.append(self.decision.note)
        self.layers = self.sites.layers
        self.draws = Draws(self.sites.skeleton.params)
        broken = non_finite_state(self.sites)
        self.broken = broken.names
        self.notes += broken.notes
        checks: dict[str, Any] = {"deterministic": self.sites.deterministic, "non_finite": self.broken}
        checks |= {"culprit": self.sites.culprit} if self.sites.culprit else {}
        self.request.ranks.agree(lambda: self._fingerprint(probe))
        found, network = Share(), None
        if self.sites.deterministic and self.request.products:  # else nothing is spent on products
            found = self._measure(probe, checks)
            network = self._network(found)
        return self._report(probe, found, network, checks)

    def _check_values(self) -> None:
        """Raise if the model has shapes only: nothing can be measured then."""
        held = self.request.source.weights is not None
        if held or not any(parameter.is_meta for parameter in self.model.parameters()):
            return
        hint = "build it on the CPU, or name its factory (build.py:model); jacdiag.sites() takes it as it is"
        raise SourceError("the model is on the meta device: it has shapes and no values", hint=hint)

    # -- steps -----------------------------------------------------------------------------------------------------
    def _place(self) -> None:
        """Moves a model that was loaded here to the device; a module that was handed in stays where it is."""
        if self.request.source.owned:
            self.request.source.to(pick(self.request.device))

    def _probe(self) -> Probe:
        r = self.request
        if r.inputs is not None:
            probe = Probe.of_inputs(r.inputs, seed=r.seed)
            return probe.to(pick(r.device)) if r.source.owned else probe
        probe = build_probe(r.source, batch=r.batch, seq=r.seq, seed=r.seed, tokens=r.tokens, inputs=r.input_factory,
                            trust_code=r.trust_code)  # fmt: skip
        return probe if r.source.device.type == "cpu" else probe.to(r.source.device)

    def _check_baseline(self, probe: Probe) -> None:
        """Refuses figures of another probe before anything is spent: unlike probes alone make them part."""
        before = self.request.baseline
        if before is None or not self.request.products:
            return
        if before.weights and not before.weights.keys() & {name for name, _ in self.model.named_parameters()}:
            return  # a baseline of another model: `jacdiag.gate` says so
        now = facts_of(probe.record, str(self.request.dtype).removeprefix("torch."))
        if apart := parting(now, before.probe):
            raise UsageError("the baseline was made with another probe", got=f"{spoken(before.probe)}, beside "
                             f"{spoken(now)}", hint=f"{options(before.probe, apart)}, as in the baseline; or write one "
                             "anew with --write-baseline")  # fmt: skip

    def _decide_state(self) -> StateDecision:
        """Decide whether the model is freshly initialised or trained."""
        skeleton, source = self.sites.skeleton, self.request.source
        return decide_state(
            self.request.state,
            history_of(source),
            lambda: judge_weights(skeleton.params, skeleton.outlines),
            settled=source.fresh,
            draws_again=self._draws_again if source.rebuild is not None else None,
        )

    def _draws_again(self, evidence: WeightEvidence) -> bool:
        """Return whether the factory builds other weights with another seed; False if there is no room to try."""
        source, params = self.request.source, self.sites.skeleton.params
        needed = sum(t.numel() * t.element_size() for t in self.sites.skeleton.outlines.values())
        free = free_host_memory()
        if source.rebuild is None or (free is not None and 2 * needed > free):
            return False
        try:
            other = source.rebuild(self.request.seed + 1)
        except JacdiagError:
            return False
        return not same_weights(params, other, evidence.failed)

    def _fingerprint(self, probe: Probe) -> Fingerprint:
        skeleton, tensors = self.sites.skeleton, []  # type: ignore[var-annotated]
        collect_deep((probe.args, probe.kwargs), tensors)
        told = {site.name: f"{site.kind}, group {site.group}, {site.placement}" for site in self.sites}
        facts = {"state": self.state, "deterministic": str(self.sites.deterministic), "not finite": str(self.broken)}
        weights = chain(skeleton.params.items(), skeleton.buffers.items())
        return fingerprint(skeleton.root, weights, tensors, self.request.options() | facts, told)

    def _measure(self, probe: Probe, checks: dict[str, Any]) -> Share:
        """Does this rank's jobs and returns what all ranks have found."""
        r, begun = self.request, time.perf_counter()
        jobs, shares = self._jobs(probe), []
        if r.progress is not None:
            r.progress.start(sum(job.units for job in jobs), "measuring")
        try:
            with self._phase("verify"):
                mine = r.ranks.part(range(len(self.sites)))
                shares.append(Share(errors={} if self.broken else verify_replay(self.sites, r.seed, mine)))
            for k, handed_out in r.ranks.jobs([job.cost for job in jobs]):
                with self._phase(jobs[k].phase):
                    shares.append(jobs[k].run())
                if r.progress is not None:
                    r.progress.advance(sum(jobs[i].units for i in handed_out), jobs[k].name)
            use = Use(r.ranks.rank, socket.gethostname(), str(r.source.device), len(shares) - 1,
                      time.perf_counter() - begun, peak_memory_mb())  # fmt: skip
            with self._phase("wait"):
                found = merged(r.ranks.gather(merged([*shares, Share(uses=[use])])))
        finally:
            if r.progress is not None:
                r.progress.stop()
        checks["replay"] = {n: e for n, e in found.errors.items() if not e <= REPLAY_TOLERANCE[self.sites.dtype]}
        return found

    def _jobs(self, probe: Probe) -> list[Job]:
        """One job for the sub-layers of each shortcut, and one for the figures of the whole network."""
        r, params = self.request, self.sites.skeleton.outlines
        effort = Effort(r.tol, r.confidence, r.max_products, r.seed, self._decider(), early=r.decide)

        def sublayers(members: list[Sublayer]) -> Share:
            records = measure_group(members, effort, probe.token_ids, self.state, self._figures())
            return Share(records, sum(i.products for record in records for i in _intervals(record)))

        jobs = []
        for members in self.sites.by_shortcut():
            cost = sum(params[name].numel() for site in members for name in site.products)
            jobs.append(Job(members[0].name, "sub-layers", len(members), cost, partial(sublayers, members)))
        if not r.decide and not self.broken:
            jobs.append(Job("end to end", "network", 0.4 * len(self.sites), math.inf, partial(self._through, probe)))
        return jobs

    def _through(self, probe: Probe) -> Share:
        """The figures that need the whole network: the gradient at every depth, the end-to-end norm."""
        r, profile = self.request, None
        why: dict[str, str] = {}
        try:
            profile = gradient_profile(self.sites, probe.token_ids)
        except MeasureError as error:  # the output has no loss; the norms do not need one
            why["gradient_norms"] = one_line(error)
        except (RuntimeError, NotImplementedError, TraceError) as error:
            return Share(why={"end_to_end": one_line(error)})
        try:
            through = end_to_end(self.sites, r.tol, r.confidence, r.max_products, r.seed)
        except (RuntimeError, NotImplementedError, MeasureError, TraceError) as error:
            return Share(profile=profile, why={**why, "end_to_end": one_line(error)})
        return Share(profile=profile, through=through, why=why)

    def _network(self, found: Share) -> NetworkRecord:
        notes = dict(found.why)
        if self.request.decide:
            notes |= dict.fromkeys(("end_to_end", "gradient_norms"), "not measured with --decide")
        return network_record(self.sites, found.records, found.profile, found.through, self.layers, notes)

    def _decider(self) -> Callable[[Sublayer], Mapping[str, Callable[[float, float], bool]]]:
        def decided(site: Sublayer) -> Mapping[str, Callable[[float, float], bool]]:
            points = decision_points(
                kind=site.kind, placement=site.placement, layers=self.layers, thresholds=self.request.thresholds,
            )  # fmt: skip
            return {name: _clear_of(points.get(name, ())) for name in ("branch_norm", "core_norm", "residual_norm")}

        return decided

    def _figures(self) -> Callable[[str], WeightStats | None]:
        params = self.sites.skeleton.params

        def figures(name: str) -> WeightStats | None:
            if name not in self._stats:
                # No rule reads the norms of weights.
                draw = self.draws.of(name)
                std = None if draw is None else draw.std
                self._stats[name] = weight_stats(name, params[name], norm=not self.request.decide, std=std)
            return self._stats[name]

        return figures

    # -- the report ------------------------------------------------------------------------------------------------
    def _report(
        self, probe: Probe, found: Share, network: NetworkRecord | None, checks: dict[str, Any]
    ) -> Report:
        r, coverage = self.request, self.sites.coverage
        params, values = self.sites.skeleton.outlines, self.sites.skeleton.params
        tables = [n for n in coverage.embedding if n in params and params[n].dim() == 2]
        model = replace(
            model_record(self.model, self.sites),
            weights={n: WeightStats(n, list(params[n].shape), std_of(values[n], correction=1)) for n in tables},
            vocabulary=r.source.vocab_size,
        )
        decayed = None if r.optimizer is None else decayed_by(self.model, r.optimizer)
        with self._phase("contract"):
            contract = contract_of(self.sites, self.draws, self.model, self.layers, model.width or 0, model.vocabulary,
                                   r.contract, decayed)  # fmt: skip
        off = self.state == "trained" and probe.record.is_random
        return Report(
            source=r.source.info,
            tier="measured",
            state=self.state,
            state_reason=self.decision.reason,
            state_basis=self.decision.basis,
            probe=replace(probe.record, off_distribution=off),
            model=model,
            sublayers=found.records,
            network=network,
            plan=r.plan,
            cost=self._cost(found),
            settings={
                "tol": r.tol, "confidence": r.confidence, "dtype": str(r.dtype).removeprefix("torch."),
                "device": str(r.source.device), "seed": r.seed, "products": r.products,
                "decide": r.decide, "remedies": r.remedies, "profile": r.profile,
                "name": r.source.name, "checks": checks,
                **({"ranks": [use.to_dict() for use in found.uses]} if r.ranks.size > 1 else {}),
            },
            ladder=load_healthy(model.width) if self.state == "init" else [],
            notes=[*self.notes, *probe.notes],
            contract=contract,
            **stamp(),
        )  # fmt: skip

    def _cost(self, found: Share) -> Cost:
        through = found.through.products if found.through else 0
        forwards = sum(record.cost or 0.0 for record in found.records) + through * len(found.records)
        peak = max((use.peak_memory_mb for use in found.uses), default=peak_memory_mb())
        seconds = time.perf_counter() - self.started
        return Cost(forwards, found.products + through, seconds, peak, self.phases)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - begun


def _intervals(record: SublayerRecord) -> list[Interval]:
    found = (record.branch_norm, record.residual_norm, record.core_norm, record.joint_residual_norm)
    return list({id(i): i for i in found if i is not None}.values())


def _clear_of(points: Iterable[float]) -> Callable[[float, float], bool]:
    limits = tuple(points)
    return lambda lower, upper: all(upper <= p or lower > p for p in limits)
