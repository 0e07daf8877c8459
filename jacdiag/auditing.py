"""The one orchestrator: source -> probe -> trace -> measure -> rules -> report."""

from __future__ import annotations

import datetime
import math
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain
from typing import Any, Literal, Protocol

import torch
from torch import nn

import jacdiag
from jacdiag.errors import MeasureError, TraceError, UsageError, one_line
from jacdiag.measure.contract import contract_of, decayed_by
from jacdiag.measure.figures import std_of
from jacdiag.measure.network import end_to_end, gradient_profile, network_record, verify_replay
from jacdiag.measure.norms import Effort
from jacdiag.measure.state import detect_state
from jacdiag.measure.sublayer import measure_group
from jacdiag.measure.weights import weight_stats, weights_report
from jacdiag.ranks import Fingerprint, Ranks, Share, Use, enlisted, fingerprint, merged
from jacdiag.report import (
    Cost,
    Interval,
    ModelRecord,
    NetworkRecord,
    Plan,
    Report,
    SublayerRecord,
    WeightStats,
)
from jacdiag.report.thresholds import Thresholds, load_healthy, load_thresholds
from jacdiag.rules import checked_contract, decision_points, evaluate
from jacdiag.sources import Probe, Source, build_probe, load
from jacdiag.sources.device import current, pick
from jacdiag.trace import Declaration, Sublayer, sites
from jacdiag.trace.declared import declarations, nothing_found
from jacdiag.trace.tensors import collect_deep

REPLAY_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Progress(Protocol):
    """What a long audit tells about itself; the command line draws it."""

    def start(self, total: float, text: str) -> None: ...
    def advance(self, units: float, text: str) -> None: ...
    def stop(self) -> None: ...


class AuditReport(Report):
    """A report that can show itself."""

    def table(self, **options: Any) -> None:
        """Prints the table to the terminal (see `jacdiag.render.table.print_report`)."""
        from rich.console import Console

        from jacdiag.render.table import print_report

        print_report(self, Console(), **options)

    def plot(self, path: str) -> None:
        """Writes the picture: gain over depth, and its two factors below. The suffix gives the format."""
        from pathlib import Path

        from jacdiag.render.plot import save

        save(self, Path(path))


def audit(
    source: str | nn.Module | Source,
    inputs: Any = None,
    *,
    model: str | None = None,
    model_args: dict[str, Any] | None = None,
    tokens: str | None = None,
    input_factory: str | None = None,
    batch: int = 2,
    seq: int | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: Literal["float32", "float64"] = "float32",
    tol: float = 0.05,
    confidence: float = 0.999,
    decide: bool = False,
    state: Literal["init", "trained"] | None = None,
    lr: float | None = None,
    warmup: int | None = None,
    clip: float | None = None,
    beta2: float | None = None,
    profile: str = "default",
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
    thresholds: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
    max_products: int = 200,
    declared: Iterable[Declaration] | Mapping[str, Any] = (),
    contract: Mapping[str, Any] | None = None,
    optimizer: Any = None,
    products: bool = True,
    progress: Progress | None = None,
    ranks: Ranks | bool = False,
) -> AuditReport:
    """Audits a model: the norms of every sub-layer with their intervals, the network's figures, a verdict.

    Args:
        source: a SOURCE string (checkpoint file, Hugging Face folder, "package.module:callable", "file.py:callable",
            "hf:CONFIG"), a module, or what `jacdiag.sources.load` returned.
        inputs: the probe for a module: token ids (B, T), a tuple of arguments, or a dict of keyword arguments. Random
            token ids if not given.
        model, model_args: the factory that builds the module of a bare state dict, and its keyword arguments.
        tokens, input_factory: a file of probe tokens; a factory of the probe input.
        batch, seq, seed: the random probe. `seq` is 128, or what the model allows if that is less.
        device, dtype: where, and in what precision products run.
        tol, confidence: relative width of the intervals that is asked for, and their confidence.
        decide: stop each norm as soon as the rules are decided.
        state: "init" or "trained"; detected if not given.
        lr, warmup, clip, beta2: the plan of the run.
        profile, select, ignore, thresholds: of the rules.
        trust_pickle: allow a pickle that holds more than tensors to run code.
        max_products: budget of products per norm.
        declared: sub-layers that the dataflow does not show, from `jacdiag.declare`.
        contract: a pinned init contract, role or name pattern -> formula of its std, such as {"W_O": "0.02/sqrt(2*N)"}.
        optimizer: a torch optimizer, or its parameter groups, of a module that was handed in: who decays is looked at.
        products: False leaves the Jacobians out, and judges the init contract alone; any size of model.
        progress: told about the work done.
        ranks: share the work with the other processes that torchrun started; each must call this, with the same
            arguments, and each gets the whole report. Never done unasked: a training loop may audit on one rank only.

    Raises:
        JacdiagError: the source, the probe or the model cannot be used; the message says what, got, try.

    Example:
        >>> import torch, jacdiag
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)
        >>> report = jacdiag.audit(layer, torch.randn(2, 4, 8))
        >>> report.sublayers[1].kind, report.sublayers[1].branch_norm.converged
        ('mlp', True)
    """
    if dtype not in DTYPES:
        raise UsageError("unknown dtype", got=str(dtype), hint=f"one of {', '.join(DTYPES)}")
    limits = load_thresholds(thresholds)
    with enlisted(ranks) as crew, torch.inference_mode(False), current(pick(device := crew.device(device))):
        if isinstance(source, str):
            source = load(source, model=model, model_args=model_args, trust_pickle=trust_pickle, seed=seed)
        loaded = source if isinstance(source, Source) else Source.of_module(source)
        request = _Request(
            loaded, inputs, tokens, input_factory, batch, seq, seed, device, DTYPES[dtype], tol, confidence, decide,
            state, Plan(lr, warmup, clip, beta2), profile, tuple(select), tuple(ignore), limits, max_products,
            tuple(declarations(declared)), progress, crew, checked_contract(contract), optimizer, products,
        )  # fmt: skip
        report = _weights_only(request) if loaded.model is None else _Audit(request).run()
    report = evaluate(report, thresholds=limits, profile=profile, select=request.select, ignore=request.ignore)
    return AuditReport(**{f.name: getattr(report, f.name) for f in fields(Report)})


@dataclass(frozen=True)
class _Request:
    source: Source
    inputs: Any
    tokens: str | None
    input_factory: str | None
    batch: int
    seq: int | None
    seed: int
    device: str | None
    dtype: torch.dtype
    tol: float
    confidence: float
    decide: bool
    state: Literal["init", "trained"] | None
    plan: Plan
    profile: str
    select: tuple[str, ...]
    ignore: tuple[str, ...]
    thresholds: Thresholds
    max_products: int
    declared: tuple[Declaration, ...]
    progress: Progress | None
    ranks: Ranks
    contract: dict[str, str]
    optimizer: Any
    products: bool

    def options(self) -> dict[str, Any]:
        """What must be the same on every rank, beside the model and the probe."""
        its_own = ("source", "inputs", "tokens", "input_factory", "device", "progress", "ranks", "optimizer")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in its_own}


@dataclass(frozen=True)
class _Job:
    """A piece of the work that one rank does: `units` of the progress bar; `cost` is compared with other jobs'."""

    name: str
    phase: str
    units: float
    cost: float
    run: Callable[[], Share]


class _Audit:
    """The measured tier, step by step."""

    def __init__(self, request: _Request) -> None:
        assert request.source.model is not None
        self.request = request
        self.model: nn.Module = request.source.model
        self.started = time.perf_counter()
        self.phases: dict[str, float] = {}
        self.notes = list(request.source.notes)
        self._stats: dict[str, WeightStats | None] = {}

    def run(self) -> Report:
        self._place()
        probe = self._probe()
        with self._phase("record"):
            self.sites = sites(self.model, *probe.args, dtype=self.request.dtype, declared=self.request.declared,
                               weights=self.request.source.weights, **probe.kwargs)  # fmt: skip
        self.notes += [*self.sites.notes, *(f"hidden from the dataflow: {line}" for line in self.sites.hidden)]
        if not self.sites:
            raise nothing_found(self.sites)
        self.state = self._state()
        self.layers = len({s.depth for s in self.sites if not s.nested})
        self.broken = self.sites.skeleton.non_finite()
        checks: dict[str, Any] = {"deterministic": self.sites.deterministic, "non_finite": self.broken}
        checks |= {"culprit": self.sites.culprit} if self.sites.culprit else {}
        self.request.ranks.agree(lambda: self._fingerprint(probe))
        found, network = Share(), None
        if self.sites.deterministic and self.request.products:  # else nothing is spent on products
            found = self._measure(probe, checks)
            network = self._network(found)
        return self._report(probe, found, network, checks)

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
        probe = build_probe(r.source, batch=r.batch, seq=r.seq, seed=r.seed, tokens=r.tokens, inputs=r.input_factory)
        return probe if r.source.device.type == "cpu" else probe.to(r.source.device)

    def _state(self) -> Literal["init", "trained"]:
        if self.request.state is not None:
            return self.request.state
        if self.request.source.fresh or self.request.source.step == 0:
            return "init"
        matrices = [name for site in self.sites for name in site.products]
        return detect_state(self.sites.skeleton.params, matrices, self.sites.skeleton.outlines)

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
                      time.perf_counter() - begun, _peak_memory_mb())  # fmt: skip
            with self._phase("wait"):
                found = merged(r.ranks.gather(merged([*shares, Share(uses=[use])])))
        finally:
            if r.progress is not None:
                r.progress.stop()
        checks["replay"] = {n: e for n, e in found.errors.items() if not e <= REPLAY_TOLERANCE[self.sites.dtype]}
        return found

    def _jobs(self, probe: Probe) -> list[_Job]:
        """One job for the sub-layers of each shortcut, and one for the figures of the whole network."""
        r, params = self.request, self.sites.skeleton.outlines
        groups: dict[int, list[Sublayer]] = {}
        for site in self.sites:
            groups.setdefault(site.group, []).append(site)
        effort = Effort(r.tol, r.confidence, r.max_products, r.seed, self._decider(), early=r.decide)

        def sublayers(members: list[Sublayer]) -> Share:
            records = measure_group(members, effort, probe.token_ids, self.state, self._figures())
            return Share(records, sum(i.products for record in records for i in _intervals(record)))

        jobs = []
        for members in groups.values():
            cost = sum(params[name].numel() for site in members for name in site.products)
            jobs.append(_Job(members[0].name, "sub-layers", len(members), cost, partial(sublayers, members)))
        if not r.decide and not self.broken:
            jobs.append(_Job("end to end", "network", 0.4 * len(self.sites), math.inf, partial(self._through, probe)))
        return jobs

    def _through(self, probe: Probe) -> Share:
        """The figures that need the whole network: the gradient at every depth, the end-to-end norm."""
        r, profile = self.request, None
        try:
            profile = gradient_profile(self.sites, probe.token_ids)
            through = end_to_end(self.sites, r.tol, r.confidence, r.max_products, r.seed)
        except (RuntimeError, NotImplementedError, MeasureError, TraceError) as error:
            return Share(profile=profile, why={"end_to_end": one_line(error)})
        return Share(profile=profile, through=through)

    def _network(self, found: Share) -> NetworkRecord:
        notes = dict(found.why)
        if self.request.decide:
            notes |= dict.fromkeys(("end_to_end", "gradient_norms"), "not measured with --decide")
        return network_record(self.sites, found.records, found.profile, found.through, self.layers, notes)

    def _decider(self) -> Callable[[Sublayer], Mapping[str, Callable[[float, float], bool]]]:
        def decided(site: Sublayer) -> Mapping[str, Callable[[float, float], bool]]:
            points = decision_points(
                kind=site.kind, placement=site.placement, state=self.state, layers=self.layers,
                parallel=site.parallel, thresholds=self.request.thresholds, profile=self.request.profile,
            )  # fmt: skip
            return {name: _clear_of(points.get(name, ())) for name in ("branch_norm", "core_norm", "residual_norm")}

        return decided

    def _figures(self) -> Callable[[str], WeightStats | None]:
        params = self.sites.skeleton.params

        def figures(name: str) -> WeightStats | None:
            if name not in self._stats:
                # No rule reads the norms of weights.
                self._stats[name] = weight_stats(name, params[name], norm=not self.request.decide)
            return self._stats[name]

        return figures

    # -- the report ------------------------------------------------------------------------------------------------
    def _report(
        self, probe: Probe, found: Share, network: NetworkRecord | None, checks: dict[str, Any]
    ) -> Report:
        r, coverage = self.request, self.sites.coverage
        params, values = self.sites.skeleton.outlines, self.sites.skeleton.params
        covered = coverage.covered()
        tables = [n for n in coverage.embedding if n in params and params[n].dim() == 2]
        model = ModelRecord(
            name=type(self.model).__name__,
            parameters=sum(p.numel() for p in params.values()),
            layers=self.layers,
            width=int(self.sites[0].shortcut.shape[self.sites[0].feature_dim]),
            covered_parameters=sum(p.numel() for n, p in params.items() if n in covered),
            uncovered=list(coverage.uncovered),
            uncovered_reasons=coverage.uncovered,
            weights={n: WeightStats(n, list(params[n].shape), std_of(values[n], correction=1)) for n in tables},
            vocabulary=r.source.vocab_size,
        )
        decayed = None if r.optimizer is None else decayed_by(self.model, r.optimizer)
        with self._phase("contract"):
            contract = contract_of(self.sites, self.model, self.layers, model.width or 0, model.vocabulary,
                                   r.contract, decayed)  # fmt: skip
        off = self.state == "trained" and probe.record.tokens == "random"
        return Report(
            source=r.source.info,
            tier="measured",
            state=self.state,
            probe=replace(probe.record, off_distribution=off),
            model=model,
            sublayers=found.records,
            network=network,
            plan=r.plan,
            cost=self._cost(found),
            settings={
                "tol": r.tol, "confidence": r.confidence, "dtype": str(r.dtype).removeprefix("torch."),
                "device": str(r.source.device), "seed": r.seed,
                "decide": r.decide, "profile": r.profile, "name": r.source.name, "checks": checks,
                **({"ranks": [use.to_dict() for use in found.uses]} if r.ranks.size > 1 else {}),
            },
            ladder=load_healthy(model.width) if self.state == "init" else [],
            notes=[*self.notes, *probe.notes],
            contract=contract,
            **_stamp(),
        )  # fmt: skip

    def _cost(self, found: Share) -> Cost:
        through = found.through.products if found.through else 0
        forwards = sum(record.cost or 0.0 for record in found.records) + through * len(found.records)
        peak = max((use.peak_memory_mb for use in found.uses), default=_peak_memory_mb())
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


def _weights_only(request: _Request) -> Report:
    request.ranks.agree(lambda: fingerprint(None, request.source.state.items(), (), request.options(), {}))
    report = weights_report(request.source)
    settings = {**report.settings, "name": request.source.name, "profile": request.profile, "seed": request.seed}
    if report.contract is not None:
        report = replace(report, contract=replace(report.contract, pinned=request.contract))
    return replace(report, plan=request.plan, settings=settings, **_stamp())


def _stamp() -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"created": now, "torch": torch.__version__, "jacdiag": jacdiag.__version__}


def _peak_memory_mb() -> float:
    """Peak of the device's allocator, or of the whole process on a CPU (ru_maxrss: KiB on Linux, bytes on macOS)."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
