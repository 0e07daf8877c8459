"""The batches of a flight run again on the weights that are audited: was it the batch?"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from jacdiag.devices.float32_precision import full_precision
from jacdiag.devices.host_memory import free_host_memory
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

_TOKENS_SHOWN = 8
_CUT = 0.999  # the share of the other batches' tokens that is below the cut
_LEAST_TOKENS = 1000  # fewer do not show where that is

# Copies of the weights: themselves, two gradients, and what a format or a precision takes on the
# way.
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

    batch: FlightBatch
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
            tokens = sequence.tokens
            # They are not known for every loss.
            if tokens is None:
                continue
            if len(tokens.losses):
                by_sequence.append((row, tokens))
        return by_sequence


@dataclass(frozen=True)
class _LoggedRun:
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
    with model_code(), full_precision():
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
    needed = _COPIES * size
    free = free_host_memory()
    fits = free is None or needed <= free
    if fits:
        return ""

    return (
        f"the weights stay in their files; with gradients they would take {needed / 2**30:.1f} "
        "GiB, and less is free"
    )


def _whole_model(source: Source) -> nn.Module:
    """Return the model; a copy in memory if its weights stay in their files."""
    model = source.model
    assert model is not None
    if source.weights is None:
        return model

    # 1. Copy each parameter once, so that tied ones stay tied.
    copies: dict[int, nn.Parameter] = {}
    for original in model.parameters():
        copies[id(original)] = _copy_in_memory(source, original)

    # 2. Put the copies into a copy of the modules.
    whole = copy.deepcopy(model)
    for module, target in zip(model.modules(), whole.modules(), strict=True):
        for name, parameter in module._parameters.items():
            if parameter is not None:
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

    # One by its name, several by their number.
    which = failed[0].batch.file.name
    if len(failed) > 1:
        which = f"{len(failed)} of {len(measured)} batches"
    return f"{which} could not be run: {failed[0].why}"


def _notes_of_figures(measured: Sequence[_Measured]) -> list[str]:
    """Return the notes of the batches' figures, each once, in alphabetical order."""
    all_figures = [item.figures for item in measured if item.figures is not None]
    notes = {figures.note for figures in all_figures}

    # Most batches have nothing that a reader should know.
    notes.discard("")
    return sorted(notes)


def look_at_values(batch: FlightBatch, batches: Sequence[FlightBatch]) -> BatchValues:
    """Return what of a batch is not finite, compared with the batches before it."""
    return find_nonfinite_values(_by_name(batch), _earlier_arguments(batch, batches))


def _earlier_arguments(
    batch: FlightBatch, batches: Sequence[FlightBatch]
) -> Iterator[dict[str, Any]]:
    """Yield the arguments of the batches of earlier steps, which stand after a batch."""
    place = batches.index(batch)
    for earlier in batches[place + 1 :]:
        if earlier.step != batch.step:
            yield _by_name(earlier)


def _by_name(batch: FlightBatch) -> dict[str, Any]:
    """Return the arguments of a batch by name; positional ones by their place."""
    args, kwargs = batch.load()
    by_place = {str(place): value for place, value in enumerate(args)}
    return {**by_place, **kwargs}


def _device(parameters: Sequence[Tensor]) -> torch.device:
    """Return the device of the first parameter; the CPU if there is none."""
    if not parameters:
        return torch.device("cpu")
    return parameters[0].device


def _reason(error: BaseException) -> str:
    """Return an error in one line."""
    if not isinstance(error, JacdiagError):
        return one_line(error)

    # What, got and try; the last two may be missing.
    sentences = [error.what, error.got, error.hint]
    return "; ".join(sentence for sentence in sentences if sentence)


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
    suspects = [item for item in measured if _is_of_step(item, onset)]
    others = [item for item in measured if not _is_of_step(item, onset)]

    # 2. What the run had before, and what it had with these weights.
    levels = _levels(run, onset, checkpoint)
    decision = _decide(flight, run, onset, checkpoint, suspects, others, levels)
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
        outcome=decision.outcome,
        about_checkpoint=_about_checkpoint(checkpoint, onset),
        batches=[_batch(item, _is_of_step(item, onset), others, run) for item in measured],
        before=levels.before,
        at_checkpoint=levels.at_checkpoint,
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


def _is_of_step(item: _Measured, step: int | None) -> bool:
    """Return whether a batch belongs to a step; one whose step is not known belongs to none."""
    return item.batch.step is not None and item.batch.step == step


def _decide(
    flight: Flight,
    run: _LoggedRun,
    onset: int | None,
    checkpoint: int | None,
    suspects: Sequence[_Measured],
    others: Sequence[_Measured],
    levels: _Levels,
) -> Decision:
    """Return the verdict on the suspects, with its sentence and its evidence."""
    # 1. Loss and gradient norm.
    figures = []
    for name in (LOSS, GRADIENT):
        figure = Figure(
            name=name,
            suspects=_values(suspects, name),
            others=_values(others, name),
            at_step=_comparable_figure(name, run, onset),
            before=levels.before.get(name),
            at_checkpoint=levels.at_checkpoint.get(name),
            then=_logged_at_own_steps(others, name, run, onset, checkpoint),
            met=_met_after_checkpoint([*suspects, *others], name, run, checkpoint),
            sequences_out=_places_out(suspects, others, name),
            sequences=_count_sequences(suspects),
        )
        figures.append(figure)

    # 2. How the run ended, and what could not be run.
    highest = None
    if flight.complete:
        highest = _highest(run, onset)
    failures = [item.why for item in suspects if item.why]
    context = ReplayContext(
        step=onset,
        checkpoint_step=checkpoint,
        highest_before=highest,
        crash=_crash_of(flight, suspects),
        failed=next(iter(failures), ""),
        others_failed=sum(bool(item.why) for item in others),
    )
    return decide(figures, context)


def _crash_of(flight: Flight, suspects: Iterable[_Measured]) -> str:
    """Return why the run crashed, if a suspect was running then; "" otherwise."""
    if flight.ended != "crash":
        return ""

    # A batch that was done by then did not crash the run.
    if any(item.batch.running for item in suspects):
        return flight.why
    return ""


def _count_sequences(measured: Iterable[_Measured]) -> int:
    """Return how many sequences the batches that were run have."""
    count = 0
    for item in measured:
        if item.figures is not None:
            count += len(item.figures.sequences)
    return count


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
    others: Iterable[_Measured],
    name: str,
    run: _LoggedRun,
    onset: int | None,
    checkpoint: int | None,
) -> list[float | None]:
    """Return what the run logged for each batch that was run, at its own step.

    A batch of a step that the jump may have reached has None. The list is empty if nothing can be
    compared.
    """
    if onset is None:
        return []
    if not _is_comparable(name, run):
        return []

    # 1. Weights from long before had other values, which are those around their own step.
    is_early = checkpoint is not None and checkpoint < onset - WINDOW // 2
    if is_early:
        return []

    # 2. The steps before the jump.
    steps = [item.batch.step for item in others if item.figures is not None]
    return [_logged_before(name, run, step, onset) for step in steps]


def _logged_before(name: str, run: _LoggedRun, step: int | None, onset: int) -> float | None:
    """Return what the run logged at a step, if that lies before the onset."""
    if step is None:
        return None

    # The jump may have reached later steps.
    if step >= onset:
        return None
    return _logged_figure(name, run, step)


def _met_after_checkpoint(
    measured: Iterable[_Measured], name: str, run: _LoggedRun, checkpoint: int | None
) -> tuple[float, float] | None:
    """Return the figure of the batch of the step after the checkpoint, now and in the run."""
    if checkpoint is None:
        return None

    # 1. What the run logged at that step.
    next_step = checkpoint + 1
    logged = _comparable_figure(name, run, next_step)
    if logged is None:
        return None

    # 2. Its batch. With several micro-batches, the run logged no figure of one of them.
    values = _values([item for item in measured if item.batch.step == next_step], name)
    if len(values) != 1:
        return None
    return values[0], logged


def _is_comparable(name: str, run: _LoggedRun) -> bool:
    """Return whether the run logged a figure that is one of a single batch."""
    return name != GRADIENT or not run.note


def _logged_figure(name: str, run: _LoggedRun, step: int | None) -> float | None:
    """Return the loss or the gradient norm that the run logged at a step."""
    row = run.row(step)
    if name == LOSS:
        return _loss_of(row)
    return _gradient_of(row)


def _comparable_figure(name: str, run: _LoggedRun, step: int | None) -> float | None:
    """Return what the run logged at a step, if it is a figure of a single batch."""
    if not _is_comparable(name, run):
        return None

    # The same figure of several batches or ranks would differ for that reason alone.
    return _logged_figure(name, run, step)


def _batch(
    item: _Measured, suspect: bool, others: Sequence[_Measured], run: _LoggedRun
) -> BatchReplay:
    """Return the record of a batch, with what the run logged at its step."""
    # 1. What is known of any batch, also of one that could not be run.
    step = item.batch.step
    row = run.row(step)
    figures = item.figures
    record = BatchReplay(
        file=item.batch.file.name,
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

    # 2. Its own figures.
    return replace(
        record,
        loss=figures.loss,
        gradient=figures.gradient,
        sequences=_sequence_records(item, figures, others),
        note=figures.note,
    )


def _sequence_records(
    item: _Measured, figures: BatchFigures, others: Sequence[_Measured]
) -> list[SequenceReplay]:
    """Return the record of each sequence of a batch, compared with those of other batches."""
    # 1. Which of them are out of the range of the others.
    reference = [other for other in others if other is not item]
    is_loss_out = _sequences_out(item, reference, LOSS)
    is_gradient_out = _sequences_out(item, reference, GRADIENT)

    # 2. One record for each.
    records = []
    for place, sequence in enumerate(figures.sequences):
        outlying = []
        if is_loss_out[place]:
            outlying.append(LOSS)
        if is_gradient_out[place]:
            outlying.append(GRADIENT)
        record = SequenceReplay(
            loss=sequence.loss,
            gradient=sequence.gradient,
            tokens=_count_tokens(sequence.tokens),
            outlying=outlying,
        )
        records.append(record)
    return records


def _count_tokens(tokens: TokenLosses | None) -> int | None:
    """Return how many tokens a loss is the mean of; None if that is not known."""
    if tokens is None:
        return None
    return len(tokens.losses)


def _sequences_out(item: _Measured, reference: Iterable[_Measured], name: str) -> list[bool]:
    """Return whether each sequence of a batch is outside the range of those of other batches."""
    assert item.figures is not None
    # 1. The figures of its own sequences.
    values = [getattr(sequence, name) for sequence in item.figures.sequences]

    # 2. Those of the other batches that could be run.
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
        for sequence, tokens in item.tokens:
            # No other token of the sequence can be among them.
            largest += _largest_of_sequence(item.batch.file.name, sequence, tokens)

    largest.sort(key=lambda token: -token.loss)
    return largest[:_TOKENS_SHOWN]


def _largest_of_sequence(batch: str, sequence: int, tokens: TokenLosses) -> list[TokenReplay]:
    """Return the tokens of a sequence with the largest losses."""
    order = tokens.losses.argsort(descending=True)
    largest = []
    for place in order[:_TOKENS_SHOWN].tolist():
        token = TokenReplay(
            sequence=sequence,
            position=int(tokens.positions[place]),
            target=int(tokens.targets[place]),
            loss=float(tokens.losses[place]),
            batch=batch,
        )
        largest.append(token)
    return largest


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

    # Sub-layers that were measured in both.
    changes = []
    for row in report.sublayers:
        norm = row.branch_norm
        if norm is None or row.name not in earlier:
            continue
        change = NormChange(row.name, batch=norm.estimate, probe=number(earlier[row.name]))
        changes.append(change)
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


def _logged(flight: Flight, micro: int) -> _LoggedRun:
    """Return the losses and the gradient norms that the run logged.

    Args:
        flight: of the run.
        micro: batches of one step.
    """
    losses = []
    gradients = []
    by_step: dict[int, Mapping[str, Any]] = {}
    for row in flight.rows:
        step = row["step"]
        by_step[step] = row
        loss = _loss_of(row)
        if loss is not None:
            losses.append((step, loss))
        gradient = _gradient_of(row)
        if gradient is not None:
            gradients.append((step, _logarithm(gradient)))
    return _LoggedRun(losses, gradients, by_step, _why_other_gradients(flight, micro))


def _logarithm(gradient: float) -> float:
    """Return the logarithm of a gradient norm; the norm itself if it is 0, inf or nan."""
    is_positive = 0 < gradient < math.inf
    if is_positive:
        return math.log(gradient)
    return gradient


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
    # 1. The norms after clipping. One from before it is one of the batch.
    norms = []
    for row in rows:
        if row.get("grad_norm") is not None:
            return False
        norm = number(row.get("grad_norm_post"))
        if math.isfinite(norm):
            norms.append(norm)
    if not norms:
        return False

    # 2. How many of them were clipped to the largest.
    as_large = max(norms) * (1 - _CLIPPED_ALIKE)
    largest = [norm for norm in norms if norm >= as_large]
    return len(largest) > 2


def _loss_of(row: Mapping[str, Any]) -> float | None:
    """Return the loss in a row of the log; None if it was not logged."""
    if row.get("loss") is None:
        return None
    return number(row["loss"])


def _gradient_of(row: Mapping[str, Any]) -> float | None:
    """Return the gradient norm in a row, before clipping if that was logged; None if none was."""
    value = row.get("grad_norm")
    if value is None:
        value = row.get("grad_norm_post")
    if value is None:
        return None
    return number(value)


def _onset(flight: Flight, run: _LoggedRun) -> int | None:
    """Return the step to look at.

    It is the one that crashed, else the first that stands out up to that of the flight.
    """
    # 1. A flight that does not say its step: that of its latest batch.
    if flight.step is None:
        return flight.batches[0].step if flight.batches else None

    # 2. The step that was running when the run crashed.
    running = _running_step(flight)
    if running is not None and flight.ended == "crash":
        return running

    # 3. The first that stands out. Gradient norms scatter more: they say where a jump begins only
    # if the loss has none.
    by_loss = first_out(run.losses, flight.step, logarithm=False)
    by_gradient = first_out(run.gradients, flight.step, logarithm=True)
    for step in (by_loss, by_gradient, running):
        if step:
            return step
    return flight.step


def _running_step(flight: Flight) -> int | None:
    """Return the step of the first batch that was in work when the flight was written."""
    for batch in flight.batches:
        if batch.running:
            return batch.step
    return None


@dataclass(frozen=True)
class _Levels:
    """The usual values of the figures that are comparable with those of a batch.

    Attributes:
        before: in all steps before the onset.
        at_checkpoint: when the run had the weights of the checkpoint.
    """

    before: dict[str, LevelRecord] = field(default_factory=dict)
    at_checkpoint: dict[str, LevelRecord] = field(default_factory=dict)


def _levels(run: _LoggedRun, onset: int | None, checkpoint: int | None) -> _Levels:
    """Return the usual values before the onset, and when the run had the checkpoint's weights."""
    levels = _Levels()
    if onset is None:
        return levels
    _add_levels(levels, LOSS, run.losses, onset, checkpoint)

    # Gradient norms of several batches say nothing of one.
    if not run.note:
        _add_levels(levels, GRADIENT, run.gradients, onset, checkpoint)
    return levels


def _add_levels(
    levels: _Levels,
    name: str,
    rows: Iterable[tuple[int, float]],
    onset: int,
    checkpoint: int | None,
) -> None:
    """Add the usual values of one figure, where there are enough steps to have one."""
    # 1. All steps before the onset.
    earlier = [(step, value) for step, value in rows if step < onset]
    level = usual_value(earlier)
    if level:
        levels.before[name] = level

    # 2. As many on either side of the checkpoint. The beginning and the onset cut some off.
    near = earlier
    if checkpoint is not None and checkpoint < onset - 1:
        near = _rows_near(earlier, checkpoint)
    level = usual_value(near)
    if level:
        levels.at_checkpoint[name] = level


def _rows_near(rows: Iterable[tuple[int, float]], step: int) -> list[tuple[int, float]]:
    """Return the rows of half a window on either side of a step."""
    return [row for row in rows if abs(row[0] - step) <= WINDOW // 2]


def _highest(run: _LoggedRun, onset: int | None) -> float | None:
    """Return the largest usual loss of the run before the onset; that of the first step counts."""
    usual = []
    for step, loss in run.losses:
        if onset is not None and step >= onset:
            continue

        # A loss that is not finite is not usual.
        if math.isfinite(loss):
            usual.append(loss)
    return max(usual, default=None)
