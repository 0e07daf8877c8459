"""What a person reads of a replay: the sentence, the table of batches, outlying sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from jacdiag.detectors.first_nonfinite import describe_batch
from jacdiag.records.flight_replay import BatchReplay, ReplayRecord, TokenReplay
from jacdiag.records.number_format import three
from jacdiag.render.content.number_cells import aligned
from jacdiag.rules.flight_replay import GRADIENT, LOSS

HEADER = ("step", "loss", "in run", "gradient", "in run", "sequences out")
_FOLDED = 6  # batches of other steps that are shown, unless all are requested
_SEQUENCES = 4
_TOKENS = 4
_NORMS = 3


@dataclass(frozen=True)
class ReplayTable:
    """A table of texts: a header and rows, the columns of numbers with their points in a line."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def replay_table(replay: ReplayRecord, *, all_rows: bool = False) -> ReplayTable:
    """Return the table of a replay.

    It lists the suspects, then the other batches, then what is usual in the run.

    Args:
        replay: of a report.
        all_rows: show every batch; else the suspects and the latest few of the others.
    """
    # 1. The rows.
    others = replay.others
    if not all_rows:
        others = others[:_FOLDED]
    rows = [_batch_cells(batch, _batch_name(batch)) for batch in [*replay.suspects, *others]]
    hidden = replay.others[len(others) :]
    if hidden:
        rows.append(_range_cells(hidden))
    if replay.before:
        rows.append(_level_cells(replay))

    # 2. The columns of numbers, with their points in a line.
    if not rows:
        return ReplayTable(HEADER, [])
    columns = [list(column) for column in zip(*rows, strict=True)]
    numbers = [aligned(column) for column in columns[1:5]]
    texts = [columns[0], *numbers, columns[5]]
    return ReplayTable(HEADER, list(zip(*texts, strict=True)))


def table_lines(table: ReplayTable) -> list[str]:
    """Return the table as lines of plain text."""
    widths = [
        max(len(cell) for cell in column) for column in zip(table.header, *table.rows, strict=True)
    ]
    lines = []
    for row in [table.header, *table.rows]:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def replay_facts(replay: ReplayRecord) -> list[str]:
    """Return the sentences below the table.

    They are about checkpoint, sequences, tokens, norms, what was computed, and notes.
    """
    # 1. The checkpoint, and the step whose batch is looked at.
    facts = [replay.about_checkpoint]
    onset = _onset(replay)
    if onset:
        facts.append(onset)

    # 2. The batches, from values down to tokens.
    facts += _not_finite(replay.batches)
    for batch in replay.suspects:
        outlying = _sequences_out(batch)
        if outlying:
            facts.append(outlying)
    if replay.tokens:
        facts.append(_tokens(replay))

    # 3. The model, and how all this was computed.
    if replay.norms:
        facts.append(_norms(replay))
    if replay.computed:
        facts.append(f"computed: {replay.computed}; in evaluation mode, without dropout")
    return [*facts, *replay.notes]


def _onset(replay: ReplayRecord) -> str:
    """Return why the batch of another step than the alert's is looked at; "" if it is not."""
    onset, step = replay.onset, replay.step
    if onset is None or step is None or onset == step:
        return ""
    if onset > step:
        return (
            f"step {onset:,} had begun and not ended when the loop was left: its batch is looked at"
        )
    return (
        f"step {onset:,} is the first one that stands out before the alert at step {step:,}: its "
        "batch is looked at"
    )


def _not_finite(batches: list[BatchReplay]) -> list[str]:
    """Return which batches hold NaN or inf.

    If a figure is not finite and no batch holds such a value, that is said. Else nothing is.
    """
    # 1. The batches that hold such a value.
    facts = []
    for batch in batches:
        if batch.values is not None and batch.values.arguments:
            values = describe_batch(batch.values)
            facts.append(f"not finite in the batch of step {batch.step:,}: {values}")
    if facts:
        return facts

    # 2. No batch does: worth a word if a figure is not finite.
    all_finite = all(batch.values is not None and batch.values.is_finite for batch in batches)
    if all_finite and any(_has_lost_figure(batch) for batch in batches):
        return [f"every tensor of the {len(batches)} kept batches is finite"]
    return []


def _has_lost_figure(batch: BatchReplay) -> bool:
    """Return whether a loss or a gradient norm of a batch is not finite."""
    figures = (batch.loss, batch.gradient, batch.logged_loss, batch.logged_gradient)
    return any(figure is not None and not math.isfinite(figure) for figure in figures)


def _batch_name(batch: BatchReplay) -> str:
    if batch.suspect:
        return f"{batch.step:,} suspect"
    return f"{batch.step:,}"


def _batch_cells(batch: BatchReplay, name: str) -> tuple[str, ...]:
    return (
        name,
        three(batch.loss),
        three(batch.logged_loss),
        three(batch.gradient),
        three(batch.logged_gradient),
        _count_outlying([batch]),
    )


def _range_cells(batches: list[BatchReplay]) -> tuple[str, ...]:
    return (
        f"{len(batches)} more",
        _ends([batch.loss for batch in batches]),
        "",
        _ends([batch.gradient for batch in batches]),
        "",
        _count_outlying(batches),
    )


def _ends(values: list[float | None]) -> str:
    """Return the smallest and the largest of some values."""
    known = [value for value in values if value is not None]
    if not known:
        return three(None)
    return f"{three(min(known))} to {three(max(known))}"


def _count_outlying(batches: list[BatchReplay]) -> str:
    """Return how many sequences of some batches are out of range, and of how many."""
    outlying, count = 0, 0
    for batch in batches:
        outlying += sum(bool(sequence.outlying) for sequence in batch.sequences)
        count += len(batch.sequences)
    return f"{outlying} of {count}"


def _level_cells(replay: ReplayRecord) -> tuple[str, ...]:
    """Return what is usual in the run before the alert."""
    loss, gradient = None, None
    if LOSS in replay.before:
        loss = replay.before[LOSS].center
    if GRADIENT in replay.before:
        gradient = math.exp(replay.before[GRADIENT].center)  # its level is that of the logarithm
    return "usual before", "", three(loss), "", three(gradient), ""


def _sequences_out(batch: BatchReplay) -> str:
    """Return the outlying sequences of a batch, the largest loss first; "" if there are none."""
    out = [(place, sequence) for place, sequence in enumerate(batch.sequences) if sequence.outlying]
    if not out:
        return ""
    out.sort(key=lambda pair: -(pair[1].loss or 0.0))
    shown = [
        f"{place} (loss {three(sequence.loss)}, gradient {three(sequence.gradient)})"
        for place, sequence in out[:_SEQUENCES]
    ]
    listed = ", ".join(shown)
    if len(out) > _SEQUENCES:
        listed += f" and {len(out) - _SEQUENCES} more"
    noun = "sequences"
    if len(out) == 1:
        noun = "sequence"
    return (
        f"out of the range of the other batches' sequences: {noun} {listed}, of "
        f"{len(batch.sequences)} in the batch of step {batch.step:,}"
    )


def _tokens(replay: ReplayRecord) -> str:
    shown = ", ".join(_token(token) for token in replay.tokens[:_TOKENS])
    text = f"largest token losses of the suspect: {shown}"
    if replay.token_cut is not None and replay.tokens_counted:
        text += (
            f"; {replay.tokens_beyond} of its {replay.tokens_counted:,} tokens are above "
            f"{three(replay.token_cut)}, as 1 in 1,000 tokens of the other batches is"
        )
    return text


def _token(token: TokenReplay) -> str:
    return (
        f"{three(token.loss)} (id {token.target} in sequence {token.sequence} at {token.position})"
    )


def _norms(replay: ReplayRecord) -> str:
    finite = [norm for norm in replay.norms if math.isfinite(norm.ratio) and norm.ratio > 0]
    start = f"branch norms on the batch of step {replay.probed_step}"
    start += f" compared with the probe of step {replay.probe_step}"
    if not finite:
        return f"{start}: none can be compared"
    finite.sort(key=lambda norm: -abs(math.log(norm.ratio)))
    far = ", ".join(f"{three(norm.ratio)} x at {norm.name}" for norm in finite[:_NORMS])
    return (
        f"{start}: {three(median(norm.ratio for norm in finite))} x in the median; farthest {far}"
    )
