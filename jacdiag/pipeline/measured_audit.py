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

from jacdiag.comparison.probe_facts import facts_of, options, parting, spoken
from jacdiag.distributed import Fingerprint, Share, Use, fingerprint, merged
from jacdiag.errors import JacdiagError, MeasureError, SourceError, TraceError, UsageError, one_line
from jacdiag.measure.branch_norms import Effort
from jacdiag.measure.dead_paths import find_dead_branches, find_dead_paths
from jacdiag.measure.family_confidence import Family, count_intervals
from jacdiag.measure.gradients import GradientProfile, gradient_profile
from jacdiag.measure.init_contract import contract_of, decayed_by
from jacdiag.measure.init_distribution import Draws, std_of
from jacdiag.measure.init_or_trained import (
    StateDecision,
    WeightEvidence,
    decide_state,
    judge_weights,
    same_weights,
)
from jacdiag.measure.model_summary import model_record
from jacdiag.measure.network import (
    backward_record,
    end_to_end,
    network_record,
    verify_replay,
    with_flow,
)
from jacdiag.measure.nonfinite_weights import non_finite_state
from jacdiag.measure.stream_statistics import forward_record
from jacdiag.measure.structure import with_structure
from jacdiag.measure.sublayer_norms import measure_group
from jacdiag.measure.weight_statistics import weight_stats
from jacdiag.pipeline.provenance import peak_memory_mb, stamp
from jacdiag.pipeline.request import Request
from jacdiag.records import Cost, Interval, NetworkRecord, Report, SublayerRecord, WeightStats
from jacdiag.records.signal_propagation import DeadPath
from jacdiag.rules import decision_points
from jacdiag.rules.thresholds import load_healthy
from jacdiag.sources import Probe, build_probe
from jacdiag.sources.device_choice import pick
from jacdiag.sources.factory import model_code
from jacdiag.sources.host_memory import free_host_memory
from jacdiag.sources.module_wrappers import plain_name
from jacdiag.sources.probe import check_varied
from jacdiag.sources.training_history import history_of
from jacdiag.trace import Sublayer, sites
from jacdiag.trace.discovery.declarations import nothing_found
from jacdiag.trace.execution.tensors import collect_deep

REPLAY_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


@dataclass(frozen=True)
class Job:
    """A piece of the work that one rank does: `units` of the progress bar; `cost` is compared with
    other jobs'.
    """

    name: str
    phase: str
    units: float
    cost: float
    run: Callable[[], Share]


class Audit:
    """The measured tier, step by step."""

    def __init__(self, request: Request, probe: Probe | None = None) -> None:
        """Prepare an audit.

        Args:
            request: what to do.
            probe: the input to run the model on; built as the request says if not given.
        """
        assert request.source.model is not None
        self.request = request
        self._given_probe = probe
        self._traced = False
        self.further: list[Probe] = []
        self.model: nn.Module = request.source.model
        self.started = time.perf_counter()
        self.phases: dict[str, float] = {}
        self.notes = list(request.source.notes)
        self.family: Family | None = None
        self._stats: dict[str, WeightStats | None] = {}

    def run(self) -> Report:
        with model_code():
            return self._run()

    def trace(self) -> None:
        """Record the model on its probe and find its sub-layers; nothing is measured."""
        with model_code():
            self._trace()

    def _trace(self) -> None:
        if self._traced:
            return
        self._check_values()
        self._place()
        probe = self.probe = self._probe()
        if self.request.probes > 1 and self._given_probe is None:
            self.further = [self._probe(number) for number in range(1, self.request.probes)]
            check_varied([probe, *self.further], self.request.input_factory)
        self._check_baseline(probe)
        with self._phase("record"), probe.suspected():
            self.sites = sites(
                self.model,
                *probe.args,
                dtype=self.request.dtype,
                declared=self.request.declared,
                weights=self.request.source.weights,
                **probe.kwargs,
            )
        self.notes += [
            *self.sites.notes,
            *(f"hidden from the dataflow: {line}" for line in self.sites.hidden),
        ]
        self.notes += [f"residual sum left out: {item}" for item in self.sites.left_out]
        if not self.sites:
            raise nothing_found(self.sites, self._frozen())
        self._traced = True

    def _run(self) -> Report:
        self._trace()
        probe = self.probe
        with self._phase("state"):
            self.decision = self._decide_state()
        self.state = self.decision.state
        if self.decision.note:
            self.notes.append(self.decision.note)
        self.layers = self.sites.layers
        self._share_confidence()
        self.draws = Draws(self.sites.skeleton.params)
        broken = non_finite_state(self.sites)
        self.broken = broken.names
        self.notes += broken.notes
        checks: dict[str, Any] = {
            "deterministic": self.sites.deterministic,
            "non_finite": self.broken,
        }
        checks |= {"culprit": self.sites.culprit} if self.sites.culprit else {}
        self.request.ranks.agree(lambda: self._fingerprint(probe))
        found, network = Share(), None
        if self.sites.deterministic and self.request.products:  # else nothing is spent on products
            found = self._measure(probe, checks)
            found = self._with_flow(found)
            network = self._network(found, probe)
        return self._report(probe, found, network, checks)

    def _check_values(self) -> None:
        """Raise if the model has shapes only: nothing can be measured then."""
        held = self.request.source.weights is not None
        if held or not any(parameter.is_meta for parameter in self.model.parameters()):
            return
        hint = (
            "build it on the CPU, or name its factory (build.py:model); jacdiag.sites() takes "
            "it as it is"
        )
        raise SourceError("the model is on the meta device: it has shapes and no values", hint=hint)

    def share_stats(self, other: Audit) -> None:
        """Take over the figures of weights that another audit of the same model has measured."""
        self._stats = other._stats

    # -- steps -------------------------------------------------------------------------------------
    def _place(self) -> None:
        """Moves a model that was loaded here to the device; a module that was handed in stays where
        it is.
        """
        if self.request.source.owned:
            self.request.source.to(pick(self.request.device))

    def _share_confidence(self) -> None:
        """Set the confidence of each interval, if one for all of them was asked for."""
        if self.request.confidence_all is None:
            return
        level, _ = self.request.split_level()
        count = count_intervals(
            self.sites.by_shortcut(), early=self.request.decide, state=self.state
        )
        self.family = Family(level, count)
        self.request = replace(self.request, confidence=self.family.each)

    def _probe(self, number: int = 0) -> Probe:
        r = self.request
        if self._given_probe is not None:
            return self._given_probe.to(r.source.device)
        if r.inputs is not None:
            probe = Probe.of_inputs(r.inputs, seed=r.seed)
            return probe.to(pick(r.device)) if r.source.owned else probe
        probe = build_probe(
            r.source,
            batch=r.batch,
            seq=r.seq,
            seed=r.seed,
            tokens=r.tokens,
            inputs=r.input_factory,
            trust_code=r.trust_code,
            number=number,
        )
        return probe if r.source.device.type == "cpu" else probe.to(r.source.device)

    def _check_baseline(self, probe: Probe) -> None:
        """Refuses figures of another probe before anything is spent: unlike probes alone make them
        part.
        """
        before = self.request.baseline
        if before is None or not self.request.products:
            return
        if before.weights and not before.weights.keys() & {
            name for name, _ in self.model.named_parameters()
        }:
            return  # a baseline of another model: `jacdiag.gate` says so
        now = facts_of(probe.record, str(self.request.dtype).removeprefix("torch."))
        if apart := parting(now, before.probe):
            raise UsageError(
                "the baseline was made with another probe",
                got=f"{spoken(before.probe)}, beside {spoken(now)}",
                hint=f"{options(before.probe, apart)}, as in the baseline; or write one "
                "anew with --write-baseline",
            )

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
        """Return whether the factory builds other weights with another seed; False if there is no
        room to try.
        """
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
        told = {
            site.name: f"{site.kind}, group {site.group}, {site.placement}" for site in self.sites
        }
        facts = {
            "state": self.state,
            "deterministic": str(self.sites.deterministic),
            "not finite": str(self.broken),
        }
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
                shares.append(
                    Share(errors={} if self.broken else verify_replay(self.sites, r.seed, mine))
                )
            for k, handed_out in r.ranks.jobs([job.cost for job in jobs]):
                with self._phase(jobs[k].phase):
                    shares.append(jobs[k].run())
                if r.progress is not None:
                    r.progress.advance(sum(jobs[i].units for i in handed_out), jobs[k].name)
            use = Use(
                r.ranks.rank,
                socket.gethostname(),
                str(r.source.device),
                len(shares) - 1,
                time.perf_counter() - begun,
                peak_memory_mb(),
            )
            with self._phase("wait"):
                found = merged(r.ranks.gather(merged([*shares, Share(uses=[use])])))
        finally:
            if r.progress is not None:
                r.progress.stop()
        checks["replay"] = {
            n: e for n, e in found.errors.items() if not e <= REPLAY_TOLERANCE[self.sites.dtype]
        }
        return found

    def _jobs(self, probe: Probe) -> list[Job]:
        """One job for the sub-layers of each shortcut, and one for the figures of the whole
        network.
        """
        r, params = self.request, self.sites.skeleton.outlines
        effort = Effort(
            r.tol, r.confidence, r.max_products, r.seed, self._decider(), early=r.decide
        )

        def sublayers(members: list[Sublayer]) -> Share:
            records = measure_group(members, effort, probe.token_ids, self.state, self._figures())
            return Share(records, sum(i.products for record in records for i in _intervals(record)))

        jobs = []
        for members in self.sites.by_shortcut():
            cost = sum(params[name].numel() for site in members for name in site.products)
            jobs.append(
                Job(members[0].name, "sub-layers", len(members), cost, partial(sublayers, members))
            )
        if not self.broken:
            units = len(self.sites) * (0.1 if r.decide else 0.4)
            jobs.append(
                Job("whole network", "network", units, math.inf, partial(self._through, probe))
            )
        return jobs

    def _through(self, probe: Probe) -> Share:
        """The figures that need the whole network: the gradient at every depth, the end-to-end
        norm.
        """
        r, profile, dead = self.request, None, None
        why: dict[str, str] = {}
        try:
            profile = gradient_profile(self.sites, probe.token_ids)
            dead = self._dead_paths(probe, profile)
        except MeasureError as error:  # the output has no loss; the norms do not need one
            why["gradient_norms"] = one_line(error)
        except (RuntimeError, NotImplementedError, TraceError) as error:
            return Share(why=dict.fromkeys(("gradient_norms", "end_to_end"), one_line(error)))
        if r.decide:  # one forward and one backward are cheap; the chain is not
            return Share(profile=profile, dead=dead, why=why)
        try:
            through = end_to_end(self.sites, r.tol, r.confidence, r.max_products, r.seed)
        except (RuntimeError, NotImplementedError, MeasureError, TraceError) as error:
            return Share(profile=profile, dead=dead, why={**why, "end_to_end": one_line(error)})
        return Share(profile=profile, through=through, dead=dead, why=why)

    def _dead_paths(self, probe: Probe, profile: GradientProfile | None) -> list[DeadPath] | None:
        if profile is None:
            return None
        return find_dead_paths(self.sites, probe.token_ids, profile, self._frozen())

    def _frozen(self) -> set[str]:
        """Return the names of the parameters that are frozen in the model that was passed."""
        return {
            plain_name(name) for name, p in self.model.named_parameters() if not p.requires_grad
        }

    def _network(self, found: Share, probe: Probe) -> NetworkRecord:
        notes = dict(found.why)
        if self.request.decide:
            notes["end_to_end"] = "not measured with --decide"
        if self.broken:
            notes |= dict.fromkeys(("end_to_end", "gradient_norms"), "weights hold NaN or Inf")
        missing = {"dead": notes["gradient_norms"]} if "gradient_norms" in notes else {}
        backward = backward_record(self.sites, found.profile, found.dead, missing)
        forward = forward_record(self.sites, probe.token_ids)
        return network_record(
            self.sites,
            found.records,
            found.profile,
            found.through,
            self.layers,
            notes,
            forward,
            backward,
        )

    def _with_flow(self, found: Share) -> Share:
        """The sub-layers' records with what one forward and one backward of the whole model say of
        them.
        """
        branches = find_dead_branches(self.sites, found.records, found.profile)
        return replace(found, records=with_flow(found.records, found.profile, branches, found.why))

    def _decider(self) -> Callable[[Sublayer], Mapping[str, Callable[[float, float], bool]]]:
        def decided(site: Sublayer) -> Mapping[str, Callable[[float, float], bool]]:
            points = decision_points(
                kind=site.kind,
                placement=site.placement,
                layers=self.layers,
                thresholds=self.request.thresholds,
            )
            return {
                name: _clear_of(points.get(name, ()))
                for name in ("branch_norm", "core_norm", "residual_norm")
            }

        return decided

    def _figures(self) -> Callable[[str], WeightStats | None]:
        params = self.sites.skeleton.params

        def figures(name: str) -> WeightStats | None:
            if name not in self._stats:
                # No rule reads the norms of weights.
                draw = self.draws.of(name)
                std = None if draw is None else draw.std
                self._stats[name] = weight_stats(
                    name, params[name], norm=not self.request.decide, std=std
                )
            return self._stats[name]

        return figures

    # -- the report --------------------------------------------------------------------------------
    def _report(
        self, probe: Probe, found: Share, network: NetworkRecord | None, checks: dict[str, Any]
    ) -> Report:
        r, coverage = self.request, self.sites.coverage
        params, values = self.sites.skeleton.outlines, self.sites.skeleton.params
        tables = [n for n in coverage.embedding if n in params and params[n].dim() == 2]
        model = replace(
            model_record(self.model, self.sites),
            weights={
                n: WeightStats(n, list(params[n].shape), std_of(values[n], correction=1))
                for n in tables
            },
            vocabulary=r.source.vocab_size,
        )
        decayed = None if r.optimizer is None else decayed_by(self.model, r.optimizer)
        with self._phase("contract"):
            contract = contract_of(
                self.sites,
                self.draws,
                self.model,
                self.layers,
                model.width or 0,
                model.vocabulary,
                r.contract,
                decayed,
            )
            if contract is not None:  # a benchmark of other rules leaves it out
                contract = with_structure(contract, self.sites, self.model, found.records)
        off = self.state == "trained" and probe.record.is_random
        return Report(
            source=r.source.info,
            tier="measured",
            state=self.state,
            state_reason=self.decision.reason,
            state_basis=self.decision.basis,
            probe=replace(probe.described, off_distribution=off),
            model=model,
            sublayers=found.records,
            network=network,
            plan=r.plan,
            cost=self._cost(found),
            settings={
                "tol": r.tol,
                "confidence": r.confidence,
                "dtype": str(r.dtype).removeprefix("torch."),
                "device": str(r.source.device),
                "seed": r.seed,
                "products": r.products,
                "decide": r.decide,
                "remedies": r.remedies,
                "profile": r.profile,
                "name": r.source.name,
                "checks": checks,
                **({"ranks": [use.to_dict() for use in found.uses]} if r.ranks.size > 1 else {}),
                **self._family_settings(),
            },
            ladder=self._ladder(found.records, model.width),
            notes=[*self.notes, *probe.notes],
            contract=contract,
            **stamp(),
        )

    def _family_settings(self) -> dict[str, Any]:
        if self.family is None:
            return {}
        shared = {
            "level": self.request.confidence_all,
            "shared_with_remedies": self.request.remedies != "none",
        }
        return {"confidence_all": {**shared, **self.family.to_dict()}}

    def _ladder(self, records: list[SublayerRecord], width: int | None) -> list[dict[str, Any]]:
        """Return the inits that this model may be compared with: untrained ones with the same
        placement.
        """
        placements = {record.placement for record in records if record.branch_norm is not None}
        if self.state != "init" or len(placements) != 1:
            return []
        return load_healthy(width, placements.pop())

    def _cost(self, found: Share) -> Cost:
        through = found.through.products if found.through else 0
        forwards = sum(record.cost or 0.0 for record in found.records) + through * len(
            found.records
        )
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
