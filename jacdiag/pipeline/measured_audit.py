"""The measured tier, step by step: probe, record, jobs that one rank or several do, report."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any, Literal

import torch
from torch import nn

from jacdiag.comparison.baseline_file import check_same_size
from jacdiag.comparison.probe_facts import facts_of, parting, probe_options, spoken
from jacdiag.devices.accelerators import has_float64, wait_for
from jacdiag.devices.device_choice import check_precision, pick
from jacdiag.devices.float32_precision import full_precision
from jacdiag.devices.host_memory import free_host_memory, return_freed_memory
from jacdiag.distributed import Fingerprint, Share, Use, fingerprint, merged
from jacdiag.errors import JacdiagError, MeasureError, SourceError, TraceError, UsageError, one_line
from jacdiag.measure.branch_norms import NORMS, Effort
from jacdiag.measure.dead_paths import find_dead_branches, find_dead_paths
from jacdiag.measure.family_confidence import Family, count_intervals
from jacdiag.measure.gradients import gradient_profile
from jacdiag.measure.init_contract import contract_of, decayed_by
from jacdiag.measure.init_distribution import Draws
from jacdiag.measure.init_or_trained import (
    StateDecision,
    WeightEvidence,
    decide_state,
    judge_weights,
    same_weights,
)
from jacdiag.measure.model_summary import model_record
from jacdiag.measure.moments import std_of
from jacdiag.measure.network import (
    backward_record,
    end_to_end,
    network_record,
    with_flow,
)
from jacdiag.measure.nonfinite_weights import non_finite_state
from jacdiag.measure.replay_check import REPLAY_TOLERANCE, ReplayCheck
from jacdiag.measure.stream_statistics import forward_record
from jacdiag.measure.structure import with_structure
from jacdiag.measure.sublayer_norms import WeightFigures, describe_unmeasured, measure_group
from jacdiag.measure.weight_statistics import all_weight_stats
from jacdiag.pipeline.options import DEFAULT_CONFIDENCE, FirstLookProgress
from jacdiag.pipeline.provenance import peak_memory_mb, stamp
from jacdiag.pipeline.request import Request
from jacdiag.records import (
    ContractRecord,
    Cost,
    ModelRecord,
    NetworkRecord,
    Report,
    SublayerRecord,
    WeightStats,
)
from jacdiag.rules import decision_points
from jacdiag.rules.thresholds import load_healthy
from jacdiag.sources import Probe, build_probe
from jacdiag.sources.foreign_code import model_code
from jacdiag.sources.module_wrappers import plain_name
from jacdiag.sources.offloaded_weights import placeholders_of
from jacdiag.sources.probe import check_varied
from jacdiag.sources.training_history import history_of
from jacdiag.spectra.interval import PAD, PAD_WITHOUT_FLOAT64
from jacdiag.trace import Sites, Sublayer
from jacdiag.trace.discovery.declarations import declarations
from jacdiag.trace.discovery.nothing_found import nothing_found
from jacdiag.trace.execution.tensors import collect_deep
from jacdiag.trace.tracer import Tracer

# What the first look measures: no condition of the paper reads the residual norm.
_NORMS_OF_CONDITIONS = frozenset({"branch_norm", "core_norm"})
_HELD_TOGETHER = 1 << 24  # numbers of weights

Decided = Callable[[float, float], bool]  # of an interval's two ends


@dataclass(frozen=True)
class Job:
    """A piece of the work that one rank does.

    Attributes:
        name: for the display of progress.
        phase: whose time it counts to.
        units: of the progress bar.
        cost: compared with other jobs', to share them out.
        run: does it.
    """

    name: str
    phase: str
    units: float
    cost: float
    run: Callable[[], Share]


class Audit:
    """The audit of a model that runs, step by step.

    Attributes:
        request: what to do.
        model: that is audited.
        probe: the input that it runs on.
        further: more probes of the same size, for `probes`.
        confidence: of each interval.
        sites: the sub-layers, once traced.
        layers: how many layers they make.
        state: "init" or "trained", once decided.
        broken: names of the weights that hold NaN or Inf.
    """

    probe: Probe
    sites: Sites
    layers: int
    state: Literal["init", "trained"]
    broken: list[str]
    _decision: StateDecision
    _draws: Draws

    def __init__(self, request: Request, probe: Probe | None = None) -> None:
        """Prepare an audit.

        Args:
            request: what to do.
            probe: the input to run the model on; built as the request says if not given.
        """
        assert request.source.model is not None
        self.request = request
        self.model: nn.Module = request.source.model
        self.further: list[Probe] = []
        self.confidence = request.options.confidence or DEFAULT_CONFIDENCE
        self._given_probe = probe
        self._traced = False
        self._started = time.perf_counter()
        self._phases: dict[str, float] = {}
        self._notes = list(request.source.notes)
        self._family: Family | None = None
        self._stats: dict[str, WeightStats | None] = {}
        self._first_look = Share()
        self._replay_check: ReplayCheck | None = None

    def run(self) -> Report:
        """Measure the model and return the report, not yet judged."""
        with model_code(), full_precision():
            return self._run()

    def trace(self) -> None:
        """Record the model on its probe and find its sub-layers; nothing is measured."""
        with model_code(), full_precision():
            self._trace()

    def share_stats(self, other: Audit) -> None:
        """Take over the figures of weights that another audit of the same model has measured."""
        self._stats = other._stats

    # -- steps -------------------------------------------------------------------------------------
    def _trace(self) -> None:
        """Record the model on its probe, once."""
        if self._traced:
            return

        # 1. Put the model on its device, and build the probes.
        self._check_values()
        self._place()
        self.probe = self._build_probe()
        self._build_further_probes()

        # 2. Record one forward, and find the sub-layers in it.
        options = self.request.options
        with self._phase("record"), self.probe.suspected():
            tracer = Tracer(
                self.model,
                self.probe.args,
                self.probe.kwargs,
                options.precision,
                declarations(options.declared),
                self.request.source.weights,
                keep_hooks=self.request.scope.hooks,
            )
            self.sites = tracer.trace()

        # 3. Note what the dataflow hides, and end if it shows no sub-layer.
        self._notes += self._precision_notes()
        self._notes += self._offloading_notes()
        self._notes += self.sites.notes
        self._notes += [f"hidden from the dataflow: {line}" for line in self.sites.hidden]
        self._notes += [f"residual sum left out: {item}" for item in self.sites.left_out]
        if not self.sites:
            raise nothing_found(self.sites, self._frozen())
        self._check_baseline()
        self._traced = True

    def _run(self) -> Report:
        """Measure the traced model."""
        self._trace()

        # 1. Decide what the weights are: fresh or trained, finite or not.
        with self._phase("state"):
            self._decision = self._decide_state()
        self.state = self._decision.state
        if self._decision.note:
            self._notes.append(self._decision.note)
        self.layers = self.sites.layers
        self._share_confidence()
        self._draws = Draws(self.sites.skeleton.params)
        checks = self._check_weights()

        # 2. Measure, unless two runs of the model differ: no product would mean anything.
        self.request.ranks.agree(self._fingerprint)
        measured = Share()
        network = None
        if self.sites.deterministic and self.request.options.products:
            self._show_first_look(checks)
            measured = self._measure(checks)
            measured = self._with_flow(measured)
            network = self._network(measured)
        contract = None
        if self.request.scope.contract:
            with self._phase("contract"):
                contract = self._contract(measured.records)
        return self._report(measured, network, contract, checks)

    def _check_weights(self) -> dict[str, Any]:
        """Look for weights that are not finite; return the first checks of the report."""
        non_finite = non_finite_state(self.sites)
        self.broken = non_finite.names
        self._notes += non_finite.notes
        checks: dict[str, Any] = {
            "deterministic": self.sites.deterministic,
            "non_finite": self.broken,
        }

        # The operation that makes two runs differ.
        if self.sites.culprit:
            checks["culprit"] = self.sites.culprit
        return checks

    def _check_values(self) -> None:
        """Raise if the model has shapes only: nothing can be measured then."""
        # Weights that stay in their files are read from there.
        if self.request.source.weights is not None:
            return
        # Those that accelerate keeps elsewhere are brought in.
        offloaded = placeholders_of(self.model)
        on_meta = [id(parameter) for parameter in self.model.parameters() if parameter.is_meta]
        if offloaded.keys() >= set(on_meta):
            return

        hint = (
            "build it on the CPU, or name its factory (build.py:model); jacdiag.sites() takes "
            "it as it is"
        )
        raise SourceError("the model is on the meta device: it has shapes and no values", hint=hint)

    def _place(self) -> None:
        """Move a model that was loaded here to the device; one that was passed stays in place."""
        source = self.request.source
        if source.owned:
            device = pick(self.request.options.device)
            check_precision(device, self.request.options.precision, self.model.parameters())
            source.to(device)
        check_precision(source.device, self.request.options.precision)

    def _precision_notes(self) -> list[str]:
        """Return what a device without float64 makes different; nothing for any other."""
        device = self.request.source.device
        if has_float64(device):
            return []
        wide, usual = PAD_WITHOUT_FLOAT64, PAD["float32"]
        return [
            f"{device.type} has no float64: norms of vectors are summed in float32, and each end "
            f"of an interval is moved outwards by {wide:.2%} (by {usual:.2%} with float64)"
        ]

    def _offloading_notes(self) -> list[str]:
        """Return what is special about a model whose weights accelerate keeps elsewhere."""
        count = len(placeholders_of(self.model))
        if not count:
            return []
        return [
            f"accelerate keeps {count} tensors elsewhere: all of them are brought to where the "
            "model uses them, and tied ones count one by one"
        ]

    def _build_probe(self, number: int = 0) -> Probe:
        """Return the probe of that number, on the model's device."""
        # 1. An input that was passed. With a model that was passed, it stays where it is.
        options = self.request.options
        source = self.request.source
        if self._given_probe is not None:
            return self._given_probe.to(source.device)
        if options.inputs is not None:
            probe = Probe.of_inputs(options.inputs, seed=options.seed)
            if not source.owned:
                return probe
            return probe.to(pick(self.request.options.device))

        # 2. One that is drawn or read here.
        probe = build_probe(
            source,
            batch=options.batch,
            seq=options.seq,
            seed=options.seed,
            tokens=options.tokens,
            inputs=options.input_factory,
            trust_code=options.trust_pickle,
            number=number,
        )
        if source.device.type == "cpu":
            return probe
        return probe.to(source.device)

    def _build_further_probes(self) -> None:
        """Build the other probes that are requested; raise if their inputs are all the same."""
        options = self.request.options
        if options.probes == 1 or self._given_probe is not None:
            return

        # The first probe has number 0.
        self.further = [self._build_probe(number) for number in range(1, options.probes)]
        check_varied([self.probe, *self.further], options.input_factory)

    def _check_baseline(self) -> None:
        """Raise if the baseline is of another model size, or was measured with a different probe.

        Results would differ for that reason alone.
        """
        baseline = self.request.baseline
        # An earlier model is compared by its own report, which is checked when it is read.
        if baseline is None or self.request.against is not None:
            return

        # 1. `jacdiag.gate` says that a baseline is of another model.
        names = {name for name, _ in self.model.named_parameters()}
        is_of_another_model = baseline.weights and names.isdisjoint(baseline.weights)
        if is_of_another_model:
            return

        # 2. The two sizes.
        check_same_size(model_record(self.model, self.sites), baseline)

        # 3. The two probes. Without products no figure depends on them.
        if not self.request.options.products:
            return
        facts = facts_of(self.probe.record, str(self.request.options.dtype))
        differing = parting(facts, baseline.probe)
        if differing:
            raise UsageError(
                "the baseline was made with another probe",
                got=f"{spoken(baseline.probe)}, against {spoken(facts)}",
                hint=f"{probe_options(baseline.probe, differing)}, as in the baseline; or write a "
                "new one with --write-baseline",
            )

    def _decide_state(self) -> StateDecision:
        """Decide whether the model is freshly initialised or trained."""
        skeleton = self.sites.skeleton
        source = self.request.source
        draws_again = None
        if source.rebuild is not None:
            draws_again = self._draws_again
        return decide_state(
            self.request.options.state,
            history_of(source),
            lambda: judge_weights(skeleton.params, skeleton.outlines),
            settled=source.fresh,
            draws_again=draws_again,
        )

    def _draws_again(self, evidence: WeightEvidence) -> bool:
        """Return whether the factory builds other weights with another seed.

        False if there is no room to try.
        """
        # 1. Whether there is room for a second model.
        rebuild = self.request.source.rebuild
        if rebuild is None:
            return False
        outlines = self.sites.skeleton.outlines.values()
        needed = sum(outline.numel() * outline.element_size() for outline in outlines)
        free = free_host_memory()
        if free is not None and 2 * needed > free:
            return False

        # 2. Build it, and compare.
        try:
            other = rebuild(self.request.options.seed + 1)
        except JacdiagError:
            return False
        return not same_weights(self.sites.skeleton.params, other, evidence.failed)

    def _share_confidence(self) -> None:
        """Set the confidence of each interval, if one for all of them together is requested."""
        options = self.request.options
        if options.confidence_all is None:
            return
        level, _ = options.split_level()
        count = count_intervals(self.sites.by_shortcut(), early=options.decide, state=self.state)
        self._family = Family(level, count)
        self.confidence = self._family.each

    def _fingerprint(self) -> Fingerprint:
        """Return what must be the same on every rank before the work is shared."""
        # 1. The probe and the sub-layers.
        skeleton = self.sites.skeleton
        tensors: list[torch.Tensor] = []
        collect_deep((self.probe.args, self.probe.kwargs), tensors)
        plan = {
            site.name: f"{site.kind}, group {site.group}, {site.placement}" for site in self.sites
        }

        # 2. What was found of the weights, and the options.
        facts = {
            "state": self.state,
            "deterministic": str(self.sites.deterministic),
            "not finite": str(self.broken),
        }
        weights = chain(skeleton.params.items(), skeleton.buffers.items())
        options = self.request.shared_by_ranks() | facts
        return fingerprint(skeleton.root, weights, tensors, options, plan)

    # -- a first look ------------------------------------------------------------------------------
    def _show_first_look(self, checks: dict[str, Any]) -> None:
        """Show how the conditions come out as soon as that is known, if the display can.

        Some norms are measured twice then: until the conditions are decided, and to their width.
        The second measurement does not go on from the first, so that its figures are those of an
        audit without a display.

        Args:
            checks: of the report.
        """
        progress = self.request.options.progress
        is_shared = self.request.ranks.size > 1
        if not isinstance(progress, FirstLookProgress) or is_shared or self.broken:
            return

        # 1. One forward decides the condition on the shortcuts.
        with self._phase("first look"):
            token_ids = self._ids_to_name
            known = Share([describe_unmeasured(site, token_ids) for site in self.sites])
            progress.show_first_look(self._judged_look(known, checks))
        if self.request.options.decide:
            return

        # 2. The norms, until the conditions are decided.
        groups = self.sites.by_shortcut()
        progress.start(len(groups), "first look")
        try:
            with self._phase("first look"):
                effort = replace(
                    self._effort(),
                    decided=self._decider_of_conditions(),
                    early=True,
                    norms=_NORMS_OF_CONDITIONS,
                )
                measured = Share()
                for members in groups:
                    share = self._measure_sublayers(members, effort, self._weight_stds)
                    measured = merged([measured, share])
                    progress.advance(1, members[0].name)
                self._first_look = measured
                progress.show_first_look(self._judged_look(measured, checks))
        finally:
            progress.stop()

    def _judged_look(self, measured: Share, checks: dict[str, Any]) -> Report:
        """Return a judged report of what is known so far; the init contract is left out."""
        return self.request.judged(self._report(measured, None, None, checks))

    # -- measuring ---------------------------------------------------------------------------------
    def _measure(self, checks: dict[str, Any]) -> Share:
        """Do this rank's jobs, and return the results of all ranks.

        Args:
            checks: is given the sub-layers whose replay differs from the recorded forward.
        """
        ranks = self.request.ranks
        progress = self.request.options.progress
        start = time.perf_counter()
        jobs = self._jobs()
        shares = []
        if progress is not None:
            progress.start(sum(job.units for job in jobs), "measuring")
        try:
            # 1. What running a sub-layer alone has to give, by a run of the entire model.
            with self._phase("verify"):
                self._replay_check = self._run_for_replay()

            # 2. Do the jobs that this rank takes.
            for index, handed_out in ranks.jobs([job.cost for job in jobs]):
                with self._phase(jobs[index].phase):
                    shares.append(jobs[index].run())
                if progress is not None:
                    units = sum(jobs[other].units for other in handed_out)
                    progress.advance(units, jobs[index].name)

            # 3. Compare the sub-layers that no job has compared.
            jobs_done = len(shares)
            if self._replay_check is not None:
                with self._phase("verify"):
                    shares.append(Share(errors=self._replay_check.finish()))

            # 4. Put together the results of all ranks.
            use = Use(
                ranks.rank,
                socket.gethostname(),
                str(self.request.source.device),
                jobs_done,
                time.perf_counter() - start,
                peak_memory_mb(self.request.source.device),
            )
            with self._phase("wait"):
                own_share = merged([*shares, Share(uses=[use])])
                measured = merged(ranks.gather(own_share))
        finally:
            if progress is not None:
                progress.stop()

        checks["replay"] = self._failed_replays(measured.errors)
        return measured

    def _failed_replays(self, errors: Mapping[str, float]) -> dict[str, float]:
        """Return the sub-layers that gave something else when they were run alone."""
        tolerance = REPLAY_TOLERANCE[self.sites.dtype]

        # `not <=`: an error that is NaN counts, too.
        return {name: error for name, error in errors.items() if not error <= tolerance}

    def _run_for_replay(self) -> ReplayCheck | None:
        """Return what this rank checks of the replay; None if nothing is checked."""
        if self.broken or not self.request.scope.replay:
            return None
        ranks = self.request.ranks
        stretch = ranks.part(range(len(self.sites)))
        return ReplayCheck(self.sites, self.request.options.seed, stretch)

    def _jobs(self) -> list[Job]:
        """Return a job for the sub-layers of each shortcut, and one for the entire network."""
        # 1. One job for each shortcut. Its cost is that of the weights in its products.
        options = self.request.options
        effort = self._effort()
        jobs = []
        for members in self.sites.by_shortcut():
            cost = sum(map(self._product_weights, members))
            run = partial(self._measure_sublayers, members, effort, self._figures_in_scope())
            jobs.append(Job(members[0].name, "sub-layers", len(members), cost, run))

        # 2. The entire network. With --decide its end-to-end norm is left out.
        if self.request.scope.network and not self.broken:
            share_of_time = 0.1 if options.decide else 0.4
            units = len(self.sites) * share_of_time
            jobs.append(Job("whole network", "network", units, math.inf, self._measure_network))
        return jobs

    def _figures_in_scope(self) -> WeightFigures:
        """Return what gives the figures of weights; none of any, if no bound is made of them."""
        if not self.request.scope.contract:
            return _no_figures

        return self._weight_figures

    def _product_weights(self, site: Sublayer) -> int:
        """Return how many weights the products of a sub-layer read."""
        outlines = self.sites.skeleton.outlines
        return sum(outlines[name].numel() for name in site.products)

    def _effort(self) -> Effort:
        """Return how far each norm is solved."""
        options = self.request.options
        return Effort(
            options.tol,
            self.confidence,
            options.max_products,
            options.seed,
            self._decider(),
            early=options.decide,
            norms=self.request.scope.norms,
        )

    def _measure_sublayers(
        self,
        members: list[Sublayer],
        effort: Effort,
        figures: WeightFigures,
    ) -> Share:
        """Measure the sub-layers of one shortcut, and count the products that were spent."""
        check = None
        if self._replay_check is not None:
            check = self._replay_check.compare
        products: list[int] = []
        records = measure_group(
            members, effort, self._ids_to_name, self.state, figures, check, products.append
        )
        return Share(records, sum(products))

    def _measure_network(self) -> Share:
        """Measure the entire network: the gradient at every depth, and the end-to-end norm."""
        # 1. The gradients, and where they do not arrive. The logits are large, and what the
        # sub-layers freed is in small pieces.
        return_freed_memory()
        options = self.request.options
        token_ids = self.probe.token_ids
        profile = None
        dead = None
        why: dict[str, str] = {}
        try:
            profile = gradient_profile(self.sites, token_ids)
            if profile is not None:
                dead = find_dead_paths(self.sites, token_ids, profile, self._frozen())
        except MeasureError as error:  # the output has no loss; the norms do not need one
            why["gradient_norms"] = one_line(error)
        except (RuntimeError, NotImplementedError, TraceError) as error:
            return Share(why=dict.fromkeys(("gradient_norms", "end_to_end"), one_line(error)))

        # 2. The end-to-end norm. One forward and one backward are cheap; the chain is not.
        through = None
        if not options.decide:
            try:
                through = end_to_end(
                    self.sites, options.tol, self.confidence, options.max_products, options.seed
                )
            except (RuntimeError, NotImplementedError, MeasureError, TraceError) as error:
                why["end_to_end"] = one_line(error)
        return Share(profile=profile, through=through, dead=dead, why=why)

    @cached_property
    def _ids_to_name(self) -> torch.Tensor | None:
        """The ids of the probe on the CPU, to name tokens by them."""
        token_ids = self.probe.token_ids
        return None if token_ids is None else token_ids.cpu()

    def _frozen(self) -> set[str]:
        """Return the names of the parameters that are frozen in the model that was passed."""
        names = set()
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                names.add(plain_name(name))
        return names

    def _network(self, measured: Share) -> NetworkRecord:
        """Return the record of the entire network."""
        # 1. Why a figure is missing.
        notes = dict(measured.why)
        if self.request.options.decide:
            notes["end_to_end"] = "not measured with --decide"
        if self.broken:
            notes |= dict.fromkeys(("end_to_end", "gradient_norms"), "weights hold NaN or Inf")
        missing = {}
        if "gradient_norms" in notes:
            missing["dead"] = notes["gradient_norms"]

        # 2. The parts, and the whole.
        backward = backward_record(self.sites, measured.profile, measured.dead, missing)
        forward = forward_record(self.sites, self._ids_to_name)
        return network_record(
            self.sites,
            measured.records,
            measured.profile,
            measured.through,
            self.layers,
            notes,
            forward,
            backward,
        )

    def _with_flow(self, measured: Share) -> Share:
        """Return the results with what one forward and one backward say of each sub-layer."""
        branches = find_dead_branches(self.sites, measured.records, measured.profile)
        records = with_flow(measured.records, measured.profile, branches, measured.why)
        return replace(measured, records=records)

    def _decider(self) -> Callable[[Sublayer], Mapping[str, Decided]]:
        """Return a function that says when each norm of a sub-layer decides the rules."""
        return lambda site: _decided_by(self._decision_points(site))

    def _decider_of_conditions(self) -> Callable[[Sublayer], Mapping[str, Decided]]:
        """Return the same for the conditions of the paper, where they apply to a sub-layer."""

        def decided(site: Sublayer) -> Mapping[str, Decided]:
            """Return for each norm of a sub-layer when its interval decides the condition."""
            points = self._decision_points(site)
            if "core_norm" in points:
                points = {"core_norm": points["core_norm"]}
            return _decided_by(points)

        return decided

    def _decision_points(self, site: Sublayer) -> dict[str, tuple[float, ...]]:
        """Return the values that the intervals of a sub-layer must not straddle."""
        return decision_points(
            kind=site.kind,
            placement=site.placement,
            layers=self.layers,
            thresholds=self.request.thresholds,
        )

    def _weight_figures(self, names: Sequence[str]) -> Mapping[str, WeightStats | None]:
        """Return the figures of weights, each measured once."""
        # No rule reads the norms.
        unknown = [name for name in dict.fromkeys(names) if name not in self._stats]
        self._stats |= self._measure_weights(unknown, norm=not self.request.options.decide)
        return self._stats

    def _weight_stds(self, names: Sequence[str]) -> Mapping[str, WeightStats | None]:
        """Return the figures of weights without their norms, which take time."""
        return self._measure_weights(names, norm=False)

    def _measure_weights(
        self, names: Sequence[str], *, norm: bool
    ) -> dict[str, WeightStats | None]:
        """Return the figures of weights."""
        params = self.sites.skeleton.params
        stats: dict[str, WeightStats | None] = {}
        for group in self._small_groups(names):
            weights = {name: params[name] for name in group}
            stds = self._stds_of_draws(group)
            stats |= all_weight_stats(weights, stds, norm=norm)
        return stats

    def _stds_of_draws(self, names: Sequence[str]) -> dict[str, float]:
        """Return the std of weights by their draw; weights without one are left out."""
        draws = self._draws.of_all(dict.fromkeys(names, False))
        return {name: draw.std for name, draw in draws.items() if draw is not None}

    def _small_groups(self, names: Sequence[str]) -> Iterator[list[str]]:
        """Yield names of weights that may be held together; a large one comes alone."""
        group: list[str] = []
        held = 0
        for name in names:
            size = self.sites.skeleton.outlines[name].numel()
            if group and held + size > _HELD_TOGETHER:
                yield group
                group, held = [], 0
            group.append(name)
            held += size
        if group:
            yield group

    # -- the report --------------------------------------------------------------------------------
    def _report(
        self,
        measured: Share,
        network: NetworkRecord | None,
        contract: ContractRecord | None,
        checks: dict[str, Any],
    ) -> Report:
        """Return the report, not yet judged."""
        model = self._model_record()
        off_distribution = self.state == "trained" and self.probe.record.is_random
        return Report(
            source=self.request.source.info,
            tier="measured",
            state=self.state,
            state_reason=self._decision.reason,
            state_basis=self._decision.basis,
            probe=replace(self.probe.described, off_distribution=off_distribution),
            model=model,
            sublayers=measured.records,
            network=network,
            plan=self.request.options.plan,
            cost=self._cost(measured),
            settings=self._settings(measured, checks),
            ladder=self._ladder(measured.records, model.width),
            notes=[*self._notes, *self.probe.notes],
            contract=contract,
            **stamp(),
        )

    def _model_record(self) -> ModelRecord:
        """Return the record of the model, with the std of each embedding table."""
        outlines = self.sites.skeleton.outlines
        params = self.sites.skeleton.params
        tables = {}
        for name in self.sites.coverage.embedding:
            is_table = name in outlines and outlines[name].dim() == 2
            if is_table:
                std = std_of(params[name], correction=1)
                tables[name] = WeightStats(name, list(outlines[name].shape), std)
        return replace(
            model_record(self.model, self.sites),
            weights=tables,
            vocabulary=self.request.source.vocab_size,
        )

    def _contract(self, records: list[SublayerRecord]) -> ContractRecord | None:
        """Return the init contract as the weights show it, and what it says of the structure."""
        options = self.request.options
        model = self._model_record()

        # 1. The parameters that the optimizer decays.
        decayed = None
        if options.optimizer is not None:
            decayed = decayed_by(self.model, options.optimizer)

        # 2. How every weight was drawn. A benchmark of other rules leaves it out.
        contract = contract_of(
            self.sites,
            self._draws,
            self.model,
            self.layers,
            model.width or 0,
            model.vocabulary,
            options.contract,
            decayed,
        )
        if contract is None:
            return None

        # 3. What the sub-layers say of the structure.
        return with_structure(contract, self.sites, self.model, records)

    def _settings(self, measured: Share, checks: dict[str, Any]) -> dict[str, Any]:
        """Return the settings that the report names."""
        # 1. What every report names.
        options = self.request.options
        source = self.request.source
        settings: dict[str, Any] = {
            "tol": options.tol,
            "confidence": self.confidence,
            "dtype": options.dtype,
            "device": str(source.device),
            "seed": options.seed,
            "products": options.products,
            "decide": options.decide,
            "remedies": options.remedies,
            "profile": options.profile,
            "name": source.name,
            "checks": checks,
        }

        # 2. What only some audits have.
        if self.request.ranks.size > 1:
            settings["ranks"] = [use.to_dict() for use in measured.uses]
        if self._family is not None:
            settings["confidence_all"] = {
                "level": options.confidence_all,
                "shared_with_remedies": options.remedies != "none",
                **self._family.to_dict(),
            }
        return settings

    def _ladder(self, records: list[SublayerRecord], width: int | None) -> list[dict[str, Any]]:
        """Return the inits to compare with: those of untrained models of the same placement."""
        # 1. Those that are known are untrained.
        if self.state != "init":
            return []

        # 2. Models of several placements have none to compare with.
        measured = [record for record in records if record.branch_norm is not None]
        placements = {record.placement for record in measured}
        if len(placements) != 1:
            return []
        return load_healthy(width, placements.pop())

    def _cost(self, measured: Share) -> Cost:
        """Return what the audit cost."""
        # 1. Work. A product of the entire network runs every branch.
        through = measured.through.products if measured.through else 0
        records = [*measured.records, *self._first_look.records]
        forwards = sum(record.cost or 0.0 for record in records)
        forwards += through * len(measured.records)
        products = measured.products + self._first_look.products + through

        # 2. Memory of the rank that took most, and time.
        own_peak = peak_memory_mb(self.request.source.device)
        peak = max((use.peak_memory_mb for use in measured.uses), default=own_peak)
        seconds = time.perf_counter() - self._started
        return Cost(forwards, products, seconds, peak, self._phases)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Add the time that is spent inside to a phase."""
        start = time.perf_counter()
        try:
            yield
            # What an accelerator has still to do belongs to this phase.
            wait_for(self.request.source.device)
        finally:
            self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - start


def _decided_by(points: Mapping[str, tuple[float, ...]]) -> dict[str, Decided]:
    """Return for each norm when its interval holds none of its points; one without any is free."""
    return {name: _clear_of(points.get(name, ())) for name in NORMS}


def _clear_of(points: Iterable[float]) -> Decided:
    """Return a function that says whether an interval holds none of the points."""
    limits = tuple(points)

    def is_clear(lower: float, upper: float) -> bool:
        """Return whether no limit lies inside the interval."""
        return all(upper <= limit or lower > limit for limit in limits)

    return is_clear


def _no_figures(_names: Sequence[str]) -> Mapping[str, WeightStats | None]:
    """Return no figure of any weight, in the place of `_weight_figures`."""
    return {}
