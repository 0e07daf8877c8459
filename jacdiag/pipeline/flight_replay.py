"""The batches of a flight run again on the weights that are audited: was it the batch?"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
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
from jacdiag.pipeline.options import Progress
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
    Decision,
    Figure,
    ReplayContext,
    decide,
    first_out,
    out_of_range,
    usual_value,
)
from jacdiag.sources import Source
from jacdiag.sources.flight import Flight, FlightBatch, read_flight
from jacdiag.sources.foreign_code import model_code
from jacdiag.sources.host_memory import free_host_memory

_TOKENS_SHOWN = 8
_CUT = 0.999  # the share of the other batches' tokens that is below the cut
_LEAST_TOKENS = 1000  # fewer do not show where that is
# of the weights: themselves, two gradients, and what a format or a precision takes on the way
_COPIES = 4
_CLIPPED_ALIKE = 5e-3  # norms this close to the largest one were clipped to it
# What a batch that does not fit the model raises; any other error is one of this program.
_ERRORS_OF_A_RUN = (
    MeasureError,
    RuntimeError,
    NotImplementedError,
    TypeError,
    ValueError,
    IndexError,
)


@dataclass
class _Measured:
    """A kept batch with its figures, or the reason why it has none."""

    kept: FlightBatch
    figures: BatchFigures | None = None
    why: str = ""
    values: BatchValues | None = None

    @property
    def tokens(self) -> list[tuple[int, TokenLosses]]:
        """The losses of its tokens, by sequence."""
        if self.figures is None:
            return []
        by_sequence = []
        for row, sequence in enumerate(self.figures.sequences):
            if sequence.tokens is not None and len(sequence.tokens.losses):
                by_sequence.append((row, sequence.tokens))
        return by_sequence


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

    # 1. Whether the model can run the batches at all.
    flight = read_flight(request.options.replay)
    reason = "no model was run"
    if audit is not None:
        reason = _why_not(request)
    if reason:
        note = f"the batches of {flight.folder} were not run: {reason}"
        return replace(report, notes=[*report.notes, note])

    # 2. Run them.
    start = time.perf_counter()
    with model_code():
        measured, computed, notes = _measure(request, _whole_model(request.source), flight)
    record = _record(request, report, flight, measured, computed, notes)

    # 3. Add the record and what it took.
    seconds = time.perf_counter() - start
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
    is_in_memory = source.weights is None
    if is_in_memory:
        return ""

    # Weights that stay in their files are copied into memory, together with their gradients.
    size = sum(p.numel() * p.element_size() for p in source.model.parameters())
    free = free_host_memory()
    if free is None or _COPIES * size <= free:
        return ""
    gib = _COPIES * size / 2**30
    return (
        f"the weights stay in their files; with gradients they would take {gib:.1f} GiB, "
        "and less is free"
    )


def _whole_model(source: Source) -> nn.Module:
    """Return the model; a copy in memory if its weights stay in their files."""
    model = source.model
    assert model is not None
    if source.weights is None:
        return model

    whole = copy.deepcopy(model)
    # Copies are kept by the parameter that they belong to, so that tied ones stay tied.
    copies: dict[int, nn.Parameter] = {}
    for module, target in zip(model.modules(), whole.modules(), strict=True):
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in copies:
                copies[id(parameter)] = _copy_in_memory(source, parameter)
            target._parameters[name] = copies[id(parameter)]
    return whole


def _copy_in_memory(source: Source, parameter: nn.Parameter) -> nn.Parameter:
    """Return a parameter with the values that its file holds, on the device of the source."""
    value = source.value_of(parameter)
    assert value is not None
    return nn.Parameter(value.to(source.device), requires_grad=parameter.requires_grad)


# -- the batches -----------------------------------------------------------------------------------
def _measure(
    request: Request, model: nn.Module, flight: Flight
) -> tuple[list[_Measured], str, list[str]]:
    """Run every kept batch; return the figures, the loss in words, and notes."""
    if not flight.batches:
        return [], "", []

    # 1. Run them one after the other.
    progress = request.options.progress
    if progress is not None:
        progress.start(len(flight.batches), "replaying")
    try:
        with ready_for_gradients(model) as (used, parameters, dtype):
            measured, reader = _run_batches(
                used, parameters, dtype, flight.batches, progress=progress
            )
    finally:
        if progress is not None:
            progress.stop()

    # 2. Say what is special about these figures.
    notes: list[str] = []
    if dtype is not None:
        notes.append("half-precision weights: the batches were run on a float32 copy")
    failure = _note_on_failures(measured)
    if failure:
        notes.append(failure)
    notes += _notes_of_figures(measured)
    words = "" if reader is None else reader.words
    return measured, words, notes


def _run_batches(
    model: nn.Module,
    parameters: list[Tensor],
    dtype: torch.dtype | None,
    batches: Sequence[FlightBatch],
    *,
    progress: Progress | None,
) -> tuple[list[_Measured], LossReader | None]:
    """Measure each batch, or say why it cannot be run.

    The reader of the loss is found on the first batch that has one, and used for all others.

    Args:
        model: in evaluation mode.
        parameters: whose gradients count.
        dtype: precision of the model, if it is a copy in another one.
        batches: as the flight has them.
        progress: advances by one with each batch.
    """
    reader: LossReader | None = None
    measured = []
    for batch in batches:
        item = _Measured(batch, values=look_at_values(batch, batches))
        arguments = prepared(batch.load(), _device(parameters), dtype)
        try:
            if reader is None:
                reader = find_loss(model, arguments)
            item.figures = measure_batch(model, arguments, reader, parameters)
        except _ERRORS_OF_A_RUN as error:
            item.why = _reason(error)
        measured.append(item)
        if progress is not None:
            progress.advance(1, batch.file.name)
    return measured, reader


def _note_on_failures(measured: Sequence[_Measured]) -> str:
    """Return which batches could not be run, and why the first could not; "" if all ran."""
    failed = [item for item in measured if item.why]
    if not failed:
        return ""
    which = failed[0].kept.file.name
    if len(failed) > 1:
        which = f"{len(failed)} of {len(measured)} batches"
    return f"{which} could not be run: {failed[0].why}"


def _notes_of_figures(measured: Sequence[_Measured]) -> list[str]:
    """Return the notes of the batches' figures, each once, in alphabetical order."""
    notes: set[str] = set()
    for item in measured:
        if item.figures is not None and item.figures.note:
            notes.add(item.figures.note)
    return sorted(notes)


def look_at_values(batch: FlightBatch, batches: Sequence[FlightBatch]) -> BatchValues:
    """Return what of a batch is not finite, compared with the batches before it."""
    place = batches.index(batch)
    earlier = (_by_name(before) for before in batches[place + 1 :] if before.step != batch.step)
    return find_nonfinite_values(_by_name(batch), earlier)


def _by_name(batch: FlightBatch) -> dict[str, Any]:
    """Return the arguments of a batch by name; positional ones by their place."""
    args, kwargs = batch.load()
    return {**{str(place): value for place, value in enumerate(args)}, **kwargs}


def _device(parameters: Sequence[Tensor]) -> torch.device:
    """Return the device of the first parameter; the CPU if there is none."""
    if not parameters:
        return torch.device("cpu")
    return parameters[0].device


def _reason(error: BaseException) -> str:
    """Return an error in one line."""
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
    """Return the record of the flight, run on the audited weights."""
    # 1. The batches of the step to look at, and all others.
    run = _logged(flight, _micro_batches(flight))
    onset = _onset(flight, run)
    checkpoint = request.source.step
    suspects: list[_Measured] = []
    others: list[_Measured] = []
    for item in measured:
        is_suspect = item.kept.step is not None and item.kept.step == onset
        if is_suspect:
            suspects.append(item)
        else:
            others.append(item)

    # 2. What the run had before, and what it had with these weights.
    before, at_checkpoint = _levels(run, onset, checkpoint)
    decision = _decide(flight, run, onset, checkpoint, suspects, others, before, at_checkpoint)
    if run.note and suspects:
        notes = [*notes, run.note]

    # 3. The tokens of the suspects, compared with those of the other batches.
    cut = _token_cut(others)
    losses = _token_losses(suspects)
    tokens_beyond = 0
    if cut is not None:
        tokens_beyond = sum(loss > cut for loss in losses)

    # 4. The branch norms, compared with those of the run's last probe.
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
        tokens_beyond=tokens_beyond,
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
    """Return the verdict on the suspects, with its sentence and its evidence."""
    # 1. What the run logged at the onset.
    row = run.row(onset)
    logged = {LOSS: _loss_of(row), GRADIENT: None if run.note else _gradient_of(row)}
    sequences = 0
    for item in suspects:
        if item.figures is not None:
            sequences += len(item.figures.sequences)

    # 2. Loss and gradient norm.
    figures = []
    for name in (LOSS, GRADIENT):
        figure = Figure(
            name=name,
            suspects=_values(suspects, name),
            others=_values(others, name),
            at_step=logged[name],
            before=before.get(name),
            at_checkpoint=at_checkpoint.get(name),
            then=_logged_at_own_steps(others, name, run, onset, checkpoint),
            met=_met_after_checkpoint([*suspects, *others], name, run, checkpoint),
            sequences_out=_places_out(suspects, others, name),
            sequences=sequences,
        )
        figures.append(figure)

    # 3. How the run ended, and what could not be run.
    is_crash = flight.ended == "crash" and any(item.kept.running for item in suspects)
    reasons = [item.why for item in suspects if item.why]
    context = ReplayContext(
        step=onset,
        checkpoint_step=checkpoint,
        highest_before=_highest(run, onset) if flight.complete else None,
        crash=flight.why if is_crash else "",
        failed=reasons[0] if reasons else "",
        others_failed=sum(bool(item.why) for item in others),
    )
    return decide(figures, context)


def _values(measured: Iterable[_Measured], name: str) -> list[float]:
    """Return one figure of every batch that was run."""
    return [getattr(item.figures, name) for item in measured if item.figures is not None]


def _token_losses(measured: Iterable[_Measured]) -> list[float]:
    """Return the losses of all tokens of some batches."""
    losses: list[float] = []
    for item in measured:
        for _, tokens in item.tokens:
            losses += tokens.losses.tolist()
    return losses


def _logged_at_own_steps(
    others: Iterable[_Measured], name: str, run: _Run, onset: int | None, checkpoint: int | None
) -> list[float | None]:
    """Return what the run logged for each batch at its own step.

    None for steps that the jump may have reached.

    Weights from long before had other values, which are those around their own step.
    """
    if onset is None or not _is_comparable(name, run):
        return []
    is_early = checkpoint is not None and checkpoint < onset - WINDOW // 2
    if is_early:
        return []
    logged: list[float | None] = []
    for item in others:
        if item.figures is None:
            continue
        step = item.kept.step
        if step is not None and step < onset:
            logged.append(_logged_figure(name, run, step))
        else:
            logged.append(None)
    return logged


def _met_after_checkpoint(
    measured: Iterable[_Measured], name: str, run: _Run, checkpoint: int | None
) -> tuple[float, float] | None:
    """Return the figure of the batch of the step after the checkpoint, now and in the run."""
    if checkpoint is None or not _is_comparable(name, run):
        return None
    next_step = checkpoint + 1
    values = _values([item for item in measured if item.kept.step == next_step], name)
    logged = _logged_figure(name, run, next_step)
    # With several micro-batches, the run logged no figure of one of them.
    if len(values) != 1 or logged is None:
        return None
    return values[0], logged


def _is_comparable(name: str, run: _Run) -> bool:
    """Return whether the run logged a figure that is one of a single batch."""
    return name != GRADIENT or not run.note


def _logged_figure(name: str, run: _Run, step: int) -> float | None:
    """Return the loss or the gradient norm that the run logged at a step."""
    row = run.row(step)
    return _loss_of(row) if name == LOSS else _gradient_of(row)


def _batch(item: _Measured, suspect: bool, others: Sequence[_Measured], run: _Run) -> BatchReplay:
    """Return the record of a batch, with what the run logged at its step."""
    # 1. What is known of any batch, also of one that could not be run.
    step = item.kept.step
    row = run.row(step)
    figures = item.figures
    record = BatchReplay(
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
        return record

    # 2. Its sequences, compared with those of the other batches.
    reference = [other for other in others if other is not item and other.figures is not None]
    outlying = {name: _sequences_out(item, reference, name) for name in (LOSS, GRADIENT)}
    sequences = []
    for place, sequence in enumerate(figures.sequences):
        sequence_record = SequenceReplay(
            loss=sequence.loss,
            gradient=sequence.gradient,
            tokens=None if sequence.tokens is None else len(sequence.tokens.losses),
            outlying=[name for name, out in outlying.items() if out[place]],
        )
        sequences.append(sequence_record)
    return replace(
        record, loss=figures.loss, gradient=figures.gradient, sequences=sequences, note=figures.note
    )


def _sequences_out(item: _Measured, reference: Iterable[_Measured], name: str) -> list[bool]:
    """Return whether each sequence of a batch is outside the range of those of other batches."""
    assert item.figures is not None
    values = [getattr(sequence, name) for sequence in item.figures.sequences]
    others = []
    for other in reference:
        if other.figures is not None:
            others += [getattr(sequence, name) for sequence in other.figures.sequences]
    return out_of_range(values, others, logarithm=name == GRADIENT)


def _places_out(suspects: Iterable[_Measured], others: Sequence[_Measured], name: str) -> list[int]:
    """Return the sequences of the suspects that are outside the range of the other batches."""
    places: list[int] = []
    for item in suspects:
        if item.figures is None:
            continue
        for place, is_out in enumerate(_sequences_out(item, others, name)):
            if is_out:
                places.append(place)
    return places


def _largest_tokens(suspects: Iterable[_Measured]) -> list[TokenReplay]:
    """Return the tokens of the suspects with the largest losses, the largest first."""
    largest: list[TokenReplay] = []
    for item in suspects:
        for row, tokens in item.tokens:
            for place in tokens.losses.argsort(descending=True)[:_TOKENS_SHOWN].tolist():
                token = TokenReplay(
                    row,
                    int(tokens.positions[place]),
                    int(tokens.targets[place]),
                    float(tokens.losses[place]),
                    item.kept.file.name,
                )
                largest.append(token)
    largest.sort(key=lambda token: -token.loss)
    return largest[:_TOKENS_SHOWN]


def _token_cut(others: Iterable[_Measured]) -> float | None:
    """Return the loss below which nearly all tokens of the other batches are."""
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
    figures = flight.probe.get("figures") or {}
    earlier = figures.get("branch_norm") or {}
    changes = []
    for row in report.sublayers:
        if row.branch_norm is not None and row.name in earlier:
            earlier_norm = number(earlier[row.name])
            changes.append(NormChange(row.name, row.branch_norm.estimate, earlier_norm))
    return changes, flight.probe.get("step")


def _about_checkpoint(checkpoint: int | None, step: int | None) -> str:
    """Return in words how the step of the checkpoint lies to the one that is looked at."""
    # 1. One of the two is not known.
    if checkpoint is None:
        return "the checkpoint does not say its step"
    if step is None:
        return f"the checkpoint is of step {checkpoint:,}; the flight does not say its step"

    # 2. Right before the step, or right after it.
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

    # 3. Elsewhere.
    apart = abs(checkpoint - step)
    side = "before" if checkpoint < step else "after"
    where = f"{apart:,} steps {side} step {step:,}"
    return f"the checkpoint is of step {checkpoint:,}, {where}: not the weights of the flight"


# -- the run's own values --------------------------------------------------------------------------
def _micro_batches(flight: Flight) -> int:
    """Return how many batches a step of the run has."""
    # 1. As the run logged it.
    counts = [len(row["batches"]) for row in flight.rows if row.get("batches")]
    if counts:
        return max(counts)

    # 2. Else as many as were kept of one step.
    batches_of_step = Counter(batch.step for batch in flight.batches)
    return max(batches_of_step.values(), default=1)


def _logged(flight: Flight, micro: int) -> _Run:
    """Return the losses and the gradient norms that the run logged.

    Args:
        flight: of the run.
        micro: batches of one step.
    """
    losses, gradients = [], []
    for row in flight.rows:
        loss = _loss_of(row)
        if loss is not None:
            losses.append((row["step"], loss))
        gradient = _gradient_of(row)
        if gradient is not None:
            is_positive = 0 < gradient < math.inf
            gradients.append((row["step"], math.log(gradient) if is_positive else gradient))
    by_step: dict[int, Mapping[str, Any]] = {row["step"]: row for row in flight.rows}
    return _Run(losses, gradients, by_step, _why_other_gradients(flight, micro))


def _why_other_gradients(flight: Flight, micro: int) -> str:
    """Return why the logged gradient norms are not those of one batch; "" if they are."""
    start = "gradient norms are not compared with the run's: "
    # 1. They are of more than one batch.
    ranks = flight.header.get("ranks")
    if isinstance(ranks, int) and ranks > 1:
        return f"{start}those are of {ranks} ranks together"
    if micro > 1:
        return f"{start}those are of {micro} micro-batches together"

    # 2. They are those after clipping: several are as large as the largest.
    if _seem_clipped(flight.rows):
        return f"{start}those seem to be clipped (pass grad_norm= to the watch)"
    return ""


def _seem_clipped(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether only norms after clipping are logged, and more than two equal the largest."""
    norms = []
    for row in rows:
        if row.get("grad_norm") is not None:
            return False
        if row.get("grad_norm_post") is None:
            continue
        norm = number(row["grad_norm_post"])
        if math.isfinite(norm):
            norms.append(norm)
    if not norms:
        return False
    as_large = max(norms) * (1 - _CLIPPED_ALIKE)
    largest = [norm for norm in norms if norm >= as_large]
    return len(largest) > 2


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
        steps = [batch.step for batch in flight.batches]
        return steps[0] if steps else None

    # 1. The step that was running when the run crashed.
    running = _running_step(flight)
    if running is not None and flight.ended == "crash":
        return running

    # 2. The first that stands out.
    by_loss = first_out(run.losses, flight.step, logarithm=False)
    by_gradient = first_out(run.gradients, flight.step, logarithm=True)
    # Gradient norms scatter more: they say where a jump begins only if the loss has none.
    return by_loss or by_gradient or running or flight.step


def _running_step(flight: Flight) -> int | None:
    """Return the step of the first batch that was in work when the flight was written."""
    for batch in flight.batches:
        if batch.running:
            return batch.step
    return None


def _levels(
    run: _Run, onset: int | None, checkpoint: int | None
) -> tuple[dict[str, LevelRecord], dict[str, LevelRecord]]:
    """Return the usual values before the onset.

    With them come those of the run when it had the weights of the checkpoint.
    """
    if onset is None:
        return {}, {}
    logged = {LOSS: run.losses, GRADIENT: run.gradients}
    if run.note:
        del logged[GRADIENT]
    before: dict[str, LevelRecord] = {}
    at_checkpoint: dict[str, LevelRecord] = {}
    for name, rows in logged.items():
        # 1. All steps before the onset.
        earlier = [row for row in rows if row[0] < onset]
        level = usual_value(earlier)
        if level:
            before[name] = level

        # 2. As many on either side of the checkpoint. The beginning and the onset cut some off.
        near = earlier
        if checkpoint is not None and checkpoint < onset - 1:
            near = [row for row in earlier if abs(row[0] - checkpoint) <= WINDOW // 2]
        level = usual_value(near)
        if level:
            at_checkpoint[name] = level
    return before, at_checkpoint


def _highest(run: _Run, onset: int | None) -> float | None:
    """Return the largest usual loss of the run before the onset; that of the first step counts."""
    values = []
    for step, value in run.losses:
        is_before = onset is None or step < onset
        if is_before and math.isfinite(value):
            values.append(value)
    return max(values, default=None)
