"""The one orchestrator: source -> probe -> trace -> measure -> rules -> report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, Literal

import torch
from torch import nn

from jacdiag.distributed import Ranks, enlisted, fingerprint
from jacdiag.errors import UsageError
from jacdiag.pipeline.argument_types import check_arguments, check_one_confidence, codes_of
from jacdiag.pipeline.earlier_model import (
    Earlier,
    Given,
    judge_against,
    measure_earlier,
    open_earlier,
)
from jacdiag.pipeline.flight_replay import with_replay
from jacdiag.pipeline.measured_audit import Audit
from jacdiag.pipeline.probe_spread import check_probes, with_probes
from jacdiag.pipeline.provenance import stamp
from jacdiag.pipeline.request import Progress, Request
from jacdiag.pipeline.weights_only import weights_report
from jacdiag.pipeline.with_remedies import check_way, with_remedies
from jacdiag.records import FiguresRecord, Plan, Report
from jacdiag.records.option_ranges import check_ranges
from jacdiag.rules import checked_contract
from jacdiag.rules.thresholds import load_thresholds
from jacdiag.sources import Source
from jacdiag.sources.device_choice import current, pick
from jacdiag.sources.flight import latest_batch
from jacdiag.sources.probe import check_one_probe
from jacdiag.sources.python_source import path_text, source_of
from jacdiag.trace import Declaration
from jacdiag.trace.discovery.declarations import declarations

__all__ = ["AuditReport", "Progress", "audit"]

CONFIDENCE = 0.999  # of each interval, taken for itself
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class AuditReport(Report):
    """A report that can show itself."""

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Writes the picture: gain over depth, and its two factors below. The suffix gives the
        format.
        """
        from jacdiag.render.plots.report_plot import save

        save(self, path if isinstance(path, str) else path_text(path))


def audit(
    source: str | bytes | os.PathLike[str] | nn.Module | Callable[..., nn.Module] | Source,
    inputs: Any = None,
    *,
    model: str | os.PathLike[str] | Callable[..., nn.Module] | None = None,
    model_args: dict[str, Any] | None = None,
    tokens: str | os.PathLike[str] | None = None,
    input_factory: str | os.PathLike[str] | Callable[..., Any] | None = None,
    batch: int = 2,
    seq: int | None = None,
    seed: int = 0,
    probes: int = 1,
    device: str | torch.device | None = None,
    dtype: Literal["float32", "float64"] | torch.dtype = "float32",
    tol: float = 0.05,
    confidence: float | None = None,
    confidence_all: float | None = None,
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
    risk: str | os.PathLike[str] | None = None,
    trust_pickle: bool = False,
    max_products: int = 200,
    declared: Iterable[Declaration] | Mapping[str, Any] = (),
    contract: Mapping[str, Any] | None = None,
    optimizer: Any = None,
    products: bool = True,
    remedies: Literal["none", "first", "all", "begun"] = "none",
    baseline: FiguresRecord | None = None,
    progress: Progress | None = None,
    ranks: Ranks | bool = False,
    key: str | None = None,
    against: Given | None = None,
    replay: str | os.PathLike[str] | None = None,
) -> AuditReport:
    """Audits a model: the norms of every sub-layer with their intervals, the network's figures, a
    verdict.

    Args:
        source: a SOURCE string (checkpoint file, Hugging Face folder, "package.module:callable",
            "file.py:callable", "hf:CONFIG") or a path, a module, a function or class that builds
            one (with `model_args`), or what `jacdiag.sources.load` returned.
        inputs: the probe for a module: token ids (B, T), a tuple of arguments, or a dict of keyword
            arguments. Random token ids if not given.
        model, model_args: the factory that builds the module of a bare state dict, and its keyword
        arguments. tokens, input_factory: a file of probe tokens or of text; a factory of the probe
        input. Give one way to a probe. batch, seq, seed: the random probe. `seq` is 128, or what
        the model allows if that is less. device, dtype: where, and in what precision products run
        ("float64", or torch.float64).
        probes: measure on this many probes, and report how far the estimates lie apart. Each costs
            one more audit. The intervals, the findings and the verdict are those of the first
            probe.
        tol: relative width of the intervals that is asked for.
        confidence: probability with which each interval holds, taken for itself; 0.999 if not
            given.
        confidence_all: probability with which all intervals of the report hold together, in place
            of `confidence`. The chance of a miss is divided by the number of intervals
            (Bonferroni); `settings["confidence_all"]` shows it.
        decide: stop each norm as soon as the rules are decided.
        state: "init" or "trained"; detected if not given.
        lr, warmup, clip, beta2: the plan of the run.
        profile, select, ignore, thresholds: of the rules.
        risk: a file with the curves of the chance at a learning rate, in place of those that ship.
        trust_pickle: allow a pickle that holds more than tensors, or a tokenizer with code of its
            own, to run code.
        max_products: budget of products per norm.
        declared: sub-layers that the dataflow does not show, from `jacdiag.declare`.
        contract: a pinned init contract, role or name pattern -> formula of its std, such as
            {"W_O": "0.02/sqrt(2*N)"}.
        optimizer: a torch optimizer, or its parameter groups, of a module that was handed in: who
            decays is looked at.
        products: False leaves the Jacobians out, and judges the init contract alone; any size of
            model.
        remedies: what to try on copies of the model where a condition or the init contract is
            broken: "first" ends with the smallest change that is enough, "all" tries every one,
            "begun" those that a run that has begun can take.
        baseline: figures of `jacdiag.gate.read_baseline`, for JD110. One seed is held against them
            here; a `gate` holds several, and writes them.
        progress: told about the work done.
        ranks: share the work with the other processes that torchrun started; each must call this,
            with the same arguments, and each gets the whole report. Never done unasked: a training
            loop may audit on one rank only.
        key: the dotted path of the weights in a checkpoint file that holds several sets, such as
            "ema".
        against: an earlier checkpoint of the same model (anything that `source` may be), or its
            report (as an object, or the path of its JSON). Both are measured with one probe. JD110
            says what is worse beyond both intervals.
        replay: folder of a flight recorder (`flight-STEP` in a `log_dir`). Its latest batch is the
            probe, unless `inputs` are given. Every kept batch is run on these weights;
            `report.replay` says whether the batch or the weights stand out.

    Raises:
        JacdiagError: the source, the probe or the model cannot be used; the message says what, got,
            try.

    Example:
        >>> import torch, jacdiag
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)
        >>> report = jacdiag.audit(layer, torch.randn(2, 4, 8))
        >>> report.sublayers[1].kind, report.sublayers[1].branch_norm.converged
        ('mlp', True)
    """
    check_arguments(
        batch=batch,
        seed=seed,
        tol=tol,
        max_products=max_products,
        probes=probes,
        tokens=tokens,
        state=state,
        device=device,
        dtype=dtype,
        remedies=remedies,
        profile=profile,
        model_args=model_args,
        baseline=baseline,
        contract=contract,
        declared=declared,
        progress=progress,
        optimizer=optimizer,
    )
    device = None if device is None else str(device)
    tokens = None if tokens is None else path_text(tokens)
    selected, ignored = codes_of("select", select), codes_of("ignore", ignore)
    precision = DTYPES.get(str(dtype).removeprefix("torch."))
    if precision is None:
        raise UsageError(
            "unknown dtype", got=str(dtype), hint=f"by name or torch's own: {', '.join(DTYPES)}"
        )
    check_ranges(
        tol=tol,
        confidence=confidence,
        confidence_all=confidence_all,
        max_products=max_products,
        batch=batch,
        seq=seq,
        seed=seed,
        probes=probes,
        lr=lr,
        warmup=warmup,
        clip=clip,
        beta2=beta2,
    )
    check_one_confidence(confidence, confidence_all)
    check_probes(probes, inputs=inputs, products=products)
    seed = int(seed)
    check_way(remedies)
    _check_against(against, baseline=baseline, products=products)
    check_one_probe(tokens=tokens, input_factory=input_factory, inputs=inputs)
    if replay is not None:
        replay, inputs = (
            path_text(replay),
            _kept_batch(replay, inputs, tokens=tokens, input_factory=input_factory),
        )
    limits = load_thresholds(thresholds, risk)
    with (
        enlisted(ranks) as crew,
        torch.inference_mode(False),
        current(pick(device := crew.device(device))),
    ):
        loaded = source_of(
            source,
            model=model,
            model_args=model_args,
            key=key,
            trust_pickle=trust_pickle,
            seed=seed,
        )
        earlier = None
        if against is not None:
            earlier = open_earlier(
                against,
                model=model,
                model_args=model_args,
                key=key,
                trust_pickle=trust_pickle,
                seed=seed,
            )
        request = Request(
            loaded,
            inputs,
            tokens,
            input_factory,
            batch,
            seq,
            seed,
            device,
            precision,
            tol,
            CONFIDENCE if confidence is None else confidence,
            decide,
            state,
            Plan(lr, warmup, clip, beta2),
            profile,
            selected,
            ignored,
            limits,
            max_products,
            tuple(declarations(declared)),
            progress,
            crew,
            checked_contract(contract),
            optimizer,
            products,
            remedies,
            baseline,
            trust_pickle,
            confidence_all,
            int(probes),
            replay=replay,
        )
        made = None if loaded.model is None else Audit(request)
        if earlier is None:
            report = _weights_only(request) if made is None else made.run()
            report = request.judged(report)
        else:
            request, report = _compared(request, made, earlier)
        if made is not None:
            report = with_probes(request, made, report)
            report = with_remedies(request, made, report)
        report = with_replay(request, made, report)
    return AuditReport(**{f.name: getattr(report, f.name) for f in fields(Report)})


def _kept_batch(
    folder: str | os.PathLike[str], inputs: Any, *, tokens: str | None, input_factory: Any
) -> Any:
    """Return the probe of a replay: the latest batch of the flight, unless the caller passes a part
    of it.

    Raises:
        UsageError: the probe is given in another way, too.
        SourceError: the folder is no flight, or holds no batch.
    """
    if tokens is not None or input_factory is not None:
        other = "tokens" if tokens is not None else "input_factory"
        raise UsageError(
            "the probe is given twice", got=f"replay and {other}", hint="give one of them"
        )
    return latest_batch(folder) if inputs is None else inputs


def _check_against(
    against: Given | None, *, baseline: FiguresRecord | None, products: bool
) -> None:
    """Raise if a comparison is asked for twice, or without the norms that it needs."""
    if against is None:
        return
    if baseline is not None:
        raise UsageError(
            "against and baseline both say what to compare with", hint="give one of them"
        )
    if not products:
        hint = "leave products=False out; `jacdiag diff --contract-only` compares weights"
        raise UsageError(
            "against compares norms", got="products=False, which measures none", hint=hint
        )


def _compared(request: Request, now: Audit | None, earlier: Earlier) -> tuple[Request, Report]:
    """Measure the earlier model, then the one that is audited, and judge it compared with the
    earlier one.
    """
    if now is None:
        hint = "--model FACTORY builds the model; `jacdiag diff --contract-only` compares weights"
        raise UsageError("weights alone cannot be compared with an earlier model", hint=hint)
    # Norms are compared as intervals: they are measured to `tol`, not only until the rules are
    # decided.
    request = now.request = replace(request, decide=False)
    now.trace()
    before = measure_earlier(earlier, request, now)
    return judge_against(request, now.run(), before, earlier.name)


def _weights_only(request: Request) -> Report:
    if request.probes > 1:
        hint = "--model FACTORY, which builds the model; or leave --probes out"
        raise UsageError(
            "--probes needs a model that runs", got="weights alone: nothing is probed", hint=hint
        )
    request.ranks.agree(
        lambda: fingerprint(None, request.source.state.items(), (), request.options(), {})
    )
    report = weights_report(request.source, request.state)
    if request.tokens is not None:
        report = replace(
            report,
            notes=[*report.notes, f"--tokens {request.tokens} was not read: no model was run"],
        )
    settings = {
        **report.settings,
        "name": request.source.name,
        "profile": request.profile,
        "seed": request.seed,
        "products": request.products,
    }
    if report.contract is not None:
        report = replace(report, contract=replace(report.contract, pinned=request.contract))
    return replace(report, plan=request.plan, settings=settings, **stamp())
