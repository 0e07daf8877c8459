"""The batches of a flight run again on the weights that are audited: was it the batch?"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from jacdiag.errors import JacdiagError, MeasureError, one_line
from jacdiag.measure.batch_values import find_nonfinite_values
from jacdiag.measure.sequence_losses import (
    BatchFigures,
    LossReader,
    TokenLosses,
    find_loss,
    measure_batch,
    prepared,
    ready_for_gradients,
)
from jacdiag.pipeline.measured_audit import Audit
from jacdiag.pipeline.request import Request
from jacdiag.records import Report
from jacdiag.records.batch_values import BatchValues
from jacdiag.records.flight_replay import (
    BatchReplay,
    LevelRecord,
    NormChange,
    ReplayRecord,
    SequenceReplay,
    TokenReplay,
)
from jacdiag.records.run_log import number
from jacdiag.rules.flight_replay import (
    GRADIENT,
    LOSS,
    WINDOW,
    Context,
    Decision,
    Figure,
    decide,
    first_out,
    out_of_range,
    usual_value,
)
from jacdiag.sources import Source
from jacdiag.sources.flight import Flight, KeptBatch, read_flight
from jacdiag.sources.foreign_code import model_code
from jacdiag.sources.host_memory import free_host_memory

_TOKENS_SHOWN = 8
_CUT = 0.999  # the share of the other batches' tokens that is below the cut
_LEAST_TOKENS = 1000  # fewer do not show where that is
# of the weights: themselves, two gradients, and what a format or a precision takes on the way
_COPIES = 4
_CLIPPED_ALIKE = 5e-3  # norms this close to the largest one were clipped to it


@dataclass
class _Measured:
    """A kept batch with its figures, or the reason why it has none."""

    kept: KeptBatch
    figures: BatchFigures | None = None
    why: str = ""
    values: BatchValues | None = None

    @property
    def tokens(self) -> list[tuple[int, TokenLosses]]:
        """The losses of its tokens, by sequence."""
        sequences = self.figures.sequences if self.figures is not None else []
        return [
            (row, s.tokens)
            for row, s in enumerate(sequences)
            if s.tokens is not None and len(s.tokens.losses)
        ]


@dataclass(frozen=True)
class _Run:
    """The figures that the run logged.

    Attributes:
        losses, gradients: step and value of each step; a gradient norm by its logarithm.
        by_step: step -> the row.
        note: why the gradient norms cannot be compared with those of a batch; "" if they can.
    """

    losses: list[tuple[int, float]]
    gradients: list[tuple[int, float]]
    by_step: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    note: str = ""

    def row(self, step: int | None) -> Mapping[str, Any]:
        """Return what the run logged at a step; empty if it logged nothing."""
        if step is None:
            return {}
        return self.by_step.get(step, {})


def with_replay(request: Request, audit: Audit | None, report: Report) -> Report:
    """Run the batches of a flight on the audited weights, and add what came out of it.

    Args:
        request: of the audit, with the folder of the flight.
        audit: as it ran; None if only weights were read.
        report: what it found, judged.

    Returns:
        The report with its `replay`, or with a note if nothing could be run.

    Raises:
        SourceError: the folder holds no flight, or a batch cannot be read.
    """
    if request.options.replay is None:
        return report
    flight = read_flight(request.options.replay)
    reason = _why_not(request) if audit is not None else "no model was run"
    if reason:
        return replace(
            report, notes=[*report.notes, f"the batches of {flight.folder} were not run: {reason}"]
        )
    begun = time.perf_counter()
    with model_code():
        measured, computed, notes = _measure(request, _whole_model(request.source), flight)
    record = _record(request, report, flight, measured, computed, notes)
    seconds = time.perf_counter() - begun
    cost = replace(
        report.cost,
        seconds=(report.cost.seconds or 0.0) + seconds,
        phases={**report.cost.phases, "replay": seconds},
    )
    return replace(report, replay=replace(record, seconds=seconds), cost=cost)


def _why_not(request: Request) -> str:
    """Return why the model cannot be run with gradients; "" if it can be."""
    source = request.source
    if source.model is None:
        return "no model was run"
    if source.weights is None:
        return ""
    size = sum(p.numel() * p.element_size() for p in source.model.parameters())
    free = free_host_memory()
    if free is not None and _COPIES * size > free:
        gib = _COPIES * size / 2**30
        return (
            f"the weights stay in their files; with gradients they would take {gib:.1f} GiB, "
            "and less is free"
        )
    return ""


def _whole_model(source: Source) -> nn.Module:
    """Return the model; a copy in memory if its weights stay in their files."""
    model = source.model
    assert model is not None
    if source.weights is None:
        return model
    whole = copy.deepcopy(model)
    # by the parameter that they belong to: tied ones stay tied
    values: dict[int, nn.Parameter] = {}
    for module, target in zip(model.modules(), whole.modules(), strict=True):
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in values:
                value = source.value_of(parameter)
                assert value is not None
                values[id(parameter)] = nn.Parameter(
                    value.to(source.device), requires_grad=parameter.requires_grad
                )
            target._parameters[name] = values[id(parameter)]
    return whole


# -- the batches -----------------------------------------------------------------------------------
def _measure(
    request: Request, model: nn.Module, flight: Flight
) -> tuple[list[_Measured], str, list[str]]:
    """Run every kept batch; return the figures, the loss in words, and notes."""
    measured = [_Measured(kept) for kept in flight.batches]
    if not measured:
        return [], "", []
    progress = request.options.progress
    if progress is not None:
        progress.start(len(measured), "replaying")
    notes: list[str] = []
    try:
        with ready_for_gradients(model) as (used, parameters, dtype):
            reader: LossReader | None = None
            for item in measured:
                item.values = look_at_values(item.kept, flight.batches)
                arguments = prepared(item.kept.load(), _device(parameters), dtype)
                try:
                    if reader is None:
                        reader = find_loss(used, arguments)
                    item.figures = measure_batch(used, arguments, reader, parameters)
                except (
                    MeasureError,
                    RuntimeError,
                    NotImplementedError,
                    TypeError,
                    ValueError,
                    IndexError,
                ) as error:
                    item.why = _reason(error)
                if progress is not None:
                    progress.advance(1, item.kept.file.name)
            if dtype is not None:
                notes.append("half-precision weights: the batches were run on a float32 copy")
    finally:
        if progress is not None:
            progress.stop()
    failed = [item for item in measured if item.why]
    if failed:
        count = (
            f"{len(failed)} of {len(measured)} batches"
            if len(failed) > 1
            else failed[0].kept.file.name
        )
        notes.append(f"{count} could not be run: {failed[0].why}")
    notes += sorted(
        {item.figures.note for item in measured if item.figures is not None and item.figures.note}
    )
    return measured, "" if reader is None else reader.words, notes


def look_at_values(batch: KeptBatch, batches: Sequence[KeptBatch]) -> BatchValues:
    """Return what of a batch is not finite, compared with the batches before it."""
    place = batches.index(batch)
    earlier = (_by_name(before) for before in batches[place + 1 :] if before.step != batch.step)
    return find_nonfinite_values(_by_name(batch), earlier)


def _by_name(batch: KeptBatch) -> dict[str, Any]:
    args, kwargs = batch.load()
    return {**{str(place): value for place, value in enumerate(args)}, **kwargs}


def _device(parameters: Sequence[Tensor]) -> torch.device:
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


def _reason(error: BaseException) -> str:
    if isinstance(error, JacdiagError):
        return "; ".join(part for part in (error.what, error.got, error.hint) if part)
    return one_line(error)


# -- the record ------------------------------------------------------------------------------------
def _record(
    request: Request,
    report: Report,
    flight: Flight,
    measured: list[_Measured],
    computed: str,
    notes: list[str],
) -> ReplayRecord:
    micro = _micro_batches(flight)
    run = _logged(flight, micro)
    onset = _onset(flight, run)
    suspects = [item for item in measured if item.kept.step is not None and item.kept.step == onset]
    others = [item for item in measured if item not in suspects]
    checkpoint = request.source.step

    # 1. What the run had before, and what it had with these weights.
    before, at_checkpoint = _levels(run, onset, checkpoint)
    decision = _decide(flight, run, onset, checkpoint, suspects, others, before, at_checkpoint)
    if run.note and suspects:
        notes = [*notes, run.note]

    # 2. The tokens of the suspects, compared with those of the other batches.
    cut = _token_cut(others)
    losses = [
        loss for item in suspects for _, tokens in item.tokens for loss in tokens.losses.tolist()
    ]
    norms, probe_step = _norms(report, flight)
    return ReplayRecord(
        folder=str(flight.folder),
        step=flight.step,
        onset=onset,
        why=flight.why,
        checkpoint_step=checkpoint,
        computed=computed,
        verdict=decision.verdict,
        sentence=decision.sentence,
        about_checkpoint=_about_checkpoint(checkpoint, onset),
        batches=[_batch(item, item in suspects, others, run) for item in measured],
        before=before,
        at_checkpoint=at_checkpoint,
        tokens=_largest_tokens(suspects),
        token_cut=cut,
        tokens_beyond=0 if cut is None else sum(loss > cut for loss in losses),
        tokens_counted=len(losses),
        norms=norms,
        probe_step=probe_step,
        probed_step=None if flight.probed is None else flight.probed.step,
        evidence=decision.evidence,
        notes=notes,
    )


def _decide(
    flight: Flight,
    run: _Run,
    onset: int | None,
    checkpoint: int | None,
    suspects: Sequence[_Measured],
    others: Sequence[_Measured],
    before: Mapping[str, LevelRecord],
    at_checkpoint: Mapping[str, LevelRecord],
) -> Decision:
    row = run.row(onset)
    logged = {LOSS: _loss_of(row), GRADIENT: None if run.note else _gradient_of(row)}
    figures = [
        Figure(
            name=name,
            suspects=_values(suspects, name),
            others=_values(others, name),
            at_step=logged[name],
            before=before.get(name),
            at_checkpoint=at_checkpoint.get(name),
            then=_then(others, name, run, onset, checkpoint),
            met=_met([*suspects, *others], name, run, checkpoint),
            sequences_out=_places_out(suspects, others, name),
            sequences=sum(
                len(item.figures.sequences) for item in suspects if item.figures is not None
            ),
        )
        for name in (LOSS, GRADIENT)
    ]
    highest = _highest(run, onset) if flight.complete else None
    is_crash = flight.ended == "crash" and any(item.kept.running for item in suspects)
    context = Context(
        step=onset,
        checkpoint_step=checkpoint,
        highest_before=highest,
        crash=flight.why if is_crash else "",
        failed=next((item.why for item in suspects if item.why), ""),
        others_failed=sum(bool(item.why) for item in others),
    )
    return decide(figures, context)


def _values(measured: Iterable[_Measured], name: str) -> list[float]:
    return [getattr(item.figures, name) for item in measured if item.figures is not None]


def _then(
    others: Iterable[_Measured], name: str, run: _Run, onset: int | None, checkpoint: int | None
) -> list[float | None]:
    """Return what the run logged for each batch at its own step.

    None for steps that the jump may have reached.

    Weights from long before had other values, which are those around their own step.
    """
    early = checkpoint is not None and onset is not None and checkpoint < onset - WINDOW // 2
    if early or onset is None or (name == GRADIENT and run.note):
        return []
    read = _loss_of if name == LOSS else _gradient_of
    logged = []
    for item in others:
        if item.figures is not None:
            step = item.kept.step
            logged.append(
                read(run.by_step.get(step, {})) if step is not None and step < onset else None
            )
    return logged


def _met(
    measured: Iterable[_Measured], name: str, run: _Run, checkpoint: int | None
) -> tuple[float, float] | None:
    """Return the figure of the batch of the step after the checkpoint, now and in the run."""
    if checkpoint is None or (name == GRADIENT and run.note):
        return None
    logged = (_loss_of if name == LOSS else _gradient_of)(run.by_step.get(checkpoint + 1, {}))
    values = [
        v for item in measured if item.kept.step == checkpoint + 1 for v in _values([item], name)
    ]
    return (values[0], logged) if len(values) == 1 and logged is not None else None


def _batch(item: _Measured, suspect: bool, others: Sequence[_Measured], run: _Run) -> BatchReplay:
    step = item.kept.step
    row = run.row(step)
    figures = item.figures
    plain = BatchReplay(
        file=item.kept.file.name,
        step=step or 0,
        suspect=suspect,
        loss=None,
        gradient=None,
        logged_loss=_loss_of(row),
        logged_gradient=_gradient_of(row),
        note=item.why,
        values=item.values,
    )
    if figures is None:
        return plain
    reference = [other for other in others if other is not item and other.figures is not None]
    outlying = {name: _sequences_out(item, reference, name) for name in (LOSS, GRADIENT)}
    sequences = [
        SequenceReplay(
            loss=sequence.loss,
            gradient=sequence.gradient,
            tokens=None if sequence.tokens is None else len(sequence.tokens.losses),
            outlying=[name for name, out in outlying.items() if out[place]],
        )
        for place, sequence in enumerate(figures.sequences)
    ]
    return replace(
        plain, loss=figures.loss, gradient=figures.gradient, sequences=sequences, note=figures.note
    )


def _sequences_out(item: _Measured, reference: Iterable[_Measured], name: str) -> list[bool]:
    assert item.figures is not None
    values = [getattr(sequence, name) for sequence in item.figures.sequences]
    others = [
        getattr(s, name)
        for other in reference
        if other.figures is not None
        for s in other.figures.sequences
    ]
    return out_of_range(values, others, logarithm=name == GRADIENT)


def _places_out(suspects: Iterable[_Measured], others: Sequence[_Measured], name: str) -> list[int]:
    """Return the sequences of the suspects that are outside the range of the other batches."""
    places: list[int] = []
    for item in suspects:
        if item.figures is not None:
            places += [place for place, out in enumerate(_sequences_out(item, others, name)) if out]
    return places


def _largest_tokens(suspects: Iterable[_Measured]) -> list[TokenReplay]:
    found: list[TokenReplay] = []
    for item in suspects:
        for row, tokens in item.tokens:
            for place in tokens.losses.argsort(descending=True)[:_TOKENS_SHOWN].tolist():
                target, position = int(tokens.targets[place]), int(tokens.positions[place])
                found.append(
                    TokenReplay(
                        row, position, target, float(tokens.losses[place]), item.kept.file.name
                    )
                )
    found.sort(key=lambda token: -token.loss)
    return found[:_TOKENS_SHOWN]


def _token_cut(others: Iterable[_Measured]) -> float | None:
    losses = [tokens.losses for item in others for _, tokens in item.tokens]
    if sum(map(len, losses)) < _LEAST_TOKENS:
        return None
    joined = torch.cat(losses)
    place = min(int(_CUT * len(joined)), len(joined) - 1)
    return float(joined.sort().values[place])


def _norms(report: Report, flight: Flight) -> tuple[list[NormChange], int | None]:
    """Return the branch norms on this batch and on the run's last probe.

    The step of that probe comes with them.
    """
    if flight.probe is None:
        return [], None
    earlier = (flight.probe.get("figures") or {}).get("branch_norm") or {}
    changes = [
        NormChange(row.name, row.branch_norm.estimate, number(earlier[row.name]))
        for row in report.sublayers
        if row.branch_norm is not None and row.name in earlier
    ]
    return changes, flight.probe.get("step")


def _about_checkpoint(checkpoint: int | None, step: int | None) -> str:
    if checkpoint is None:
        return "the checkpoint does not say its step"
    if step is None:
        return f"the checkpoint is of step {checkpoint:,}; the flight does not say its step"
    if checkpoint == step - 1:
        return (
            f"the checkpoint is of step {checkpoint:,}: the weights that the batch of step "
            f"{step:,} met"
        )
    if checkpoint == step:
        return (
            f"the checkpoint is of step {checkpoint:,}: the weights right after the batch of "
            "that step"
        )
    apart = abs(checkpoint - step)
    side = "before" if checkpoint < step else "after"
    where = f"{apart:,} steps {side} step {step:,}"
    return f"the checkpoint is of step {checkpoint:,}, {where}: not the weights of the flight"


# -- the run's own values --------------------------------------------------------------------------
def _micro_batches(flight: Flight) -> int:
    """Return how many batches a step of the run has."""
    counts = [len(row["batches"]) for row in flight.rows if row.get("batches")]
    if counts:
        return max(counts)
    steps = [kept.step for kept in flight.batches]
    return max((steps.count(step) for step in set(steps)), default=1)


def _logged(flight: Flight, micro: int) -> _Run:
    losses, gradients = [], []
    for row in flight.rows:
        loss, gradient = _loss_of(row), _gradient_of(row)
        if loss is not None:
            losses.append((row["step"], loss))
        if gradient is not None:
            logarithm = math.log(gradient) if 0 < gradient < math.inf else gradient
            gradients.append((row["step"], logarithm))
    by_step: dict[int, Mapping[str, Any]] = {row["step"]: row for row in flight.rows}
    return _Run(losses, gradients, by_step, _why_other_gradients(flight, micro))


def _why_other_gradients(flight: Flight, micro: int) -> str:
    """Return why the logged gradient norms are not those of one batch; "" if they are."""
    start = "gradient norms are not compared with the run's: "
    ranks = flight.header.get("ranks")
    if isinstance(ranks, int) and ranks > 1:
        return f"{start}those are of {ranks} ranks together"
    if micro > 1:
        return f"{start}those are of {micro} micro-batches together"
    rows = [row for row in flight.rows if _gradient_of(row) is not None]
    if any(row.get("grad_norm") is not None for row in rows):
        return ""
    values = [value for row in rows if math.isfinite(value := number(row.get("grad_norm_post")))]
    if sum(value >= max(values) * (1 - _CLIPPED_ALIKE) for value in values) > 2:
        return f"{start}those seem to be clipped (pass grad_norm= to the watch)"
    return ""


def _loss_of(row: Mapping[str, Any]) -> float | None:
    if row.get("loss") is None:
        return None
    return number(row["loss"])


def _gradient_of(row: Mapping[str, Any]) -> float | None:
    value = row.get("grad_norm")
    if value is None:
        value = row.get("grad_norm_post")
    if value is None:
        return None
    return number(value)


def _onset(flight: Flight, run: _Run) -> int | None:
    """Return the step to look at.

    It is the one that crashed, else the first that stands out up to that of the flight.
    """
    if flight.step is None:
        return next((kept.step for kept in flight.batches), None)
    running = next((batch.step for batch in flight.batches if batch.running), None)
    if running is not None and flight.ended == "crash":
        return running
    by_loss = first_out(run.losses, flight.step, logarithm=False)
    by_gradient = first_out(run.gradients, flight.step, logarithm=True)
    # Gradient norms scatter more: they say where a jump begins only if the loss has none.
    return by_loss or by_gradient or running or flight.step


def _levels(
    run: _Run, onset: int | None, checkpoint: int | None
) -> tuple[dict[str, LevelRecord], dict[str, LevelRecord]]:
    """Return the usual values before the onset.

    With them come those of the run when it had the weights of the checkpoint.
    """
    if onset is None:
        return {}, {}
    before, at_checkpoint = {}, {}
    for name, rows in ((LOSS, run.losses), (GRADIENT, run.gradients)):
        earlier = [row for row in rows if row[0] < onset]
        near = earlier
        if checkpoint is not None and checkpoint < onset - 1:
            # As many steps on either side; the beginning and the onset cut some of them off.
            near = [row for row in earlier if abs(row[0] - checkpoint) <= WINDOW // 2]
        if level := usual_value(earlier):
            before[name] = level
        if level := usual_value(near):
            at_checkpoint[name] = level
    if run.note:
        before.pop(GRADIENT, None)
        at_checkpoint.pop(GRADIENT, None)
    return before, at_checkpoint


def _highest(run: _Run, onset: int | None) -> float | None:
    """Return the largest usual loss of the run before the onset; that of the first step counts."""
    rows = [value for step, value in run.losses if onset is None or step < onset]
    return max((value for value in rows if math.isfinite(value)), default=None)
