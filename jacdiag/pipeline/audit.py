"""The one orchestrator: source -> probe -> trace -> measure -> rules -> report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, Literal

import torch
from torch import nn

from jacdiag.devices.accelerators import made_current
from jacdiag.devices.device_choice import check_precision, pick
from jacdiag.distributed import Ranks, enlisted, fingerprint
from jacdiag.errors import UsageError
from jacdiag.pipeline.earlier_model import Earlier, judge_against, measure_earlier, open_earlier
from jacdiag.pipeline.flight_replay import with_replay
from jacdiag.pipeline.measured_audit import Audit
from jacdiag.pipeline.options import AuditOptions, ModelSource, Progress
from jacdiag.pipeline.probe_spread import with_probes
from jacdiag.pipeline.provenance import stamp
from jacdiag.pipeline.request import Request
from jacdiag.pipeline.weights_only import weights_report
from jacdiag.pipeline.with_remedies import with_remedies
from jacdiag.records import FiguresRecord, Report
from jacdiag.rules.thresholds import load_thresholds
from jacdiag.sources import Source
from jacdiag.sources.flight import latest_batch
from jacdiag.sources.python_source import path_text, source_of
from jacdiag.trace import Declaration

__all__ = ["AuditOptions", "AuditReport", "Progress", "audit", "run_audit"]


class AuditReport(Report):
    """A report that can draw itself."""

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write the picture: gain over depth, and its two factors below.

        Args:
            path: of the file; its suffix gives the format.
        """
        from jacdiag.render.plots.report_plot import save

        save(self, path if isinstance(path, str) else path_text(path))


def audit(
    source: ModelSource,
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
    against: ModelSource | Report | None = None,
    replay: str | os.PathLike[str] | None = None,
) -> AuditReport:
    """Audit a model: measure the norms of every sub-layer, and judge them by the rules.

    Each norm comes with its interval. The report also holds the figures of the entire network, the
    findings and a verdict.

    Args:
        source: a SOURCE string (checkpoint file, Hugging Face folder, "package.module:callable",
            "file.py:callable", "hf:CONFIG") or a path, a module, a function or class that builds
            one (with `model_args`), or what `jacdiag.sources.load` returned.
        inputs: the probe for a module: token ids (B, T), a tuple of arguments, or a dict of keyword
            arguments. Random token ids if not given.
        model: the factory that builds the module of a bare state dict.
        model_args: keyword arguments of a factory.
        tokens: a file of probe tokens or of text, in place of `inputs`.
        input_factory: a factory of the probe input, in place of `inputs`.
        batch: sequences of the random probe.
        seq: tokens of each; 128, or what the model allows if that is less.
        seed: of the random probe and of the solver's random starts.
        device: where the model runs.
        dtype: the precision that products run in ("float64", or torch.float64).
        probes: measure on this many probes, and report how far the estimates lie apart. Each costs
            one more audit. The intervals, the findings and the verdict are those of the first
            probe.
        tol: relative width of the intervals that is requested.
        confidence: probability with which each interval holds by itself; 0.999 if not given.
        confidence_all: probability with which all intervals of the report hold together, in place
            of `confidence`. The chance of a miss is divided by the number of intervals
            (Bonferroni); `settings["confidence_all"]` shows it.
        decide: stop each norm as soon as the rules are decided.
        state: "init" or "trained"; detected if not given.
        lr: the learning rate of the planned run.
        warmup: its number of warmup steps.
        clip: the gradient norm that it clips at.
        beta2: of its Adam.
        profile: the set of thresholds of the rules.
        select: codes or prefixes of the rules to apply; all if empty.
        ignore: codes or prefixes of the rules to leave out.
        thresholds: rule -> limits of its own, in place of those of the profile.
        risk: a file with the curves of the chance at a learning rate, in place of those that ship.
        trust_pickle: allow a pickle that holds more than tensors, or a tokenizer with code of its
            own, to run code.
        max_products: budget of products per norm.
        declared: sub-layers that the dataflow does not show, from `jacdiag.declare`.
        contract: a pinned init contract, role or name pattern -> formula of its std, such as
            {"W_O": "0.02/sqrt(2*N)"}.
        optimizer: a torch optimizer of the module that was passed, or its parameter groups. The
            init contract then checks which weights decay.
        products: False leaves the Jacobians out and judges the init contract alone, for a model of
            any size.
        remedies: what to try on copies of the model if a condition or the init contract is broken:
            "first" ends with the smallest change that is enough, "all" tries every one, "begun"
            those that a run that has begun can take.
        baseline: figures of `jacdiag.gate.read_baseline`, for JD110. One seed is compared with them
            here; a `gate` runs several, and writes them.
        progress: is notified of the work done.
        ranks: share the work with the other processes that torchrun started; each must call this,
            with the same arguments, and each gets the complete report. This is never done by
            default: a training loop may audit on one rank only.
        key: the dotted path of the weights in a checkpoint file that holds several sets, such as
            "ema".
        against: an earlier checkpoint of the same model (anything that `source` may be), or its
            report (as an object, or the path of its JSON). Both are measured with one probe. JD110
            says what is worse beyond both intervals.
        replay: folder of a flight recorder (`flight-STEP` in a `log_dir`). Its latest batch is the
            probe, unless `inputs` are given. Every batch in the folder is run on these weights;
            `report.replay` says whether the batch or the weights stand out.

    Returns:
        The report. It prints as a table, and `report.plot(PATH)` draws it.

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
    options = AuditOptions(
        inputs=inputs,
        model=model,
        model_args=model_args,
        tokens=tokens,
        input_factory=input_factory,
        batch=batch,
        seq=seq,
        seed=seed,
        probes=probes,
        device=device,
        dtype=dtype,
        tol=tol,
        confidence=confidence,
        confidence_all=confidence_all,
        decide=decide,
        state=state,
        lr=lr,
        warmup=warmup,
        clip=clip,
        beta2=beta2,
        profile=profile,
        select=select,
        ignore=ignore,
        thresholds=thresholds,
        risk=risk,
        trust_pickle=trust_pickle,
        max_products=max_products,
        declared=declared,
        contract=contract,
        optimizer=optimizer,
        products=products,
        remedies=remedies,
        baseline=baseline,
        progress=progress,
        ranks=ranks,
        key=key,
        against=against,
        replay=replay,
    )
    return run_audit(source, options)


def run_audit(source: ModelSource, options: AuditOptions) -> AuditReport:
    """Audit a model as a record of options says.

    Args:
        source: the model, as for `jacdiag.audit`.
        options: of the audit.

    Returns:
        The report, as from `jacdiag.audit`.

    Raises:
        JacdiagError: the source, the probe or the model cannot be used.

    Example:
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)
        >>> run_audit(layer, AuditOptions(inputs=torch.randn(2, 4, 8), products=False)).tier
        'measured'
    """
    # 1. The latest batch of a flight is the probe.
    if options.replay is not None and options.inputs is None:
        options = replace(options, inputs=latest_batch(path_text(options.replay)))
    thresholds = load_thresholds(options.thresholds, options.risk)

    # 2. Open both models before any work, on the device of this rank.
    with enlisted(options.ranks) as ranks, torch.inference_mode(False):
        device = ranks.device(None if options.device is None else str(options.device))
        picked = _device_for(source, device)
        check_precision(picked, options.precision)
        with made_current(picked):
            request = Request(
                source=_open(source, options),
                options=replace(options, device=device),
                thresholds=thresholds,
                ranks=ranks,
                baseline=options.baseline,
            )
            earlier = None
            if options.against is not None:
                earlier = open_earlier(options.against, options)
            report = _run(request, earlier)

    # 3. The same report, with the methods of the public class.
    return AuditReport(**{field.name: getattr(report, field.name) for field in fields(Report)})


def _device_for(source: ModelSource, requested: str | None) -> torch.device:
    """Return the device that is requested; that of a model that was passed, which stays there.

    Raises:
        UsageError: the requested device is not there.
    """
    if requested is not None or not isinstance(source, nn.Module):
        return pick(requested)
    for parameter in source.parameters():
        return parameter.device
    return torch.device("cpu")


def _open(source: ModelSource, options: AuditOptions) -> Source:
    """Return the opened source of an audit."""
    return source_of(
        source,
        model=options.model,
        model_args=options.model_args,
        key=options.key,
        trust_pickle=options.trust_pickle,
        seed=options.seed,
    )


def _run(request: Request, earlier: Earlier | None) -> Report:
    """Measure, judge, and add what the options request beyond that."""
    # 1. Measure the model, or read its weights alone, and judge the result by the rules.
    audit = None
    if request.source.model is not None:
        audit = Audit(request)
    if earlier is not None:
        request, report = _compare(request, audit, earlier)
    elif audit is not None:
        report = request.judged(audit.run())
    else:
        report = request.judged(_read_weights(request))

    # 2. Repeat on further probes, and try remedies.
    if audit is not None:
        report = with_probes(request, audit, report)
        report = with_remedies(request, audit, report)

    # 3. Run the batches of a flight recorder again.
    return with_replay(request, audit, report)


def _compare(request: Request, audit: Audit | None, earlier: Earlier) -> tuple[Request, Report]:
    """Measure the earlier model, then the audited one, and judge how they differ.

    Returns:
        The request that holds the comparison, and the judged report.
    """
    if audit is None:
        hint = "--model FACTORY builds the model; `jacdiag diff --contract-only` compares weights"
        raise UsageError("weights alone cannot be compared with an earlier model", hint=hint)

    # Norms are compared as intervals. They are measured to `tol`, not only until the rules are
    # decided.
    request = request.with_options(decide=False)
    audit.request = request
    audit.trace()
    earlier_report = measure_earlier(earlier, request, audit)
    return judge_against(request, audit.run(), earlier_report, earlier.name)


def _read_weights(request: Request) -> Report:
    """Return the report on weights without a model that runs."""
    # 1. What needs a model that runs.
    options = request.options
    if options.probes > 1:
        hint = "--model FACTORY, which builds the model; or leave --probes out"
        raise UsageError(
            "--probes needs a model that runs", got="weights alone: nothing is probed", hint=hint
        )
    weights = request.source.state.items()
    request.ranks.agree(lambda: fingerprint(None, weights, (), request.shared_by_ranks(), {}))

    # 2. Read the weights.
    report = weights_report(request.source, options.state)
    notes = list(report.notes)
    if options.tokens is not None:
        notes.append(f"--tokens {options.tokens} was not read: no model was run")

    # 3. Add what the options say.
    contract = report.contract
    if contract is not None:
        contract = replace(contract, pinned=dict(options.contract or {}))
    settings = {
        **report.settings,
        "name": request.source.name,
        "profile": options.profile,
        "seed": options.seed,
        "products": options.products,
    }
    return replace(
        report,
        notes=notes,
        contract=contract,
        plan=options.plan,
        settings=settings,
        **stamp(),
    )
