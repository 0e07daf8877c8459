"""What a person reads of a replay: the sentence, the table of batches, outlying sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from jacdiag.detectors.first_nonfinite import describe_batch
from jacdiag.records.flight_replay import BatchReplay, LevelRecord, ReplayRecord, TokenReplay
from jacdiag.records.number_format import three
from jacdiag.render.content.number_cells import aligned
from jacdiag.rules.flight_replay import GRADIENT, LOSS

HEADER = ("step", "loss", "in run", "gradient", "in run", "sequences out")
_FOLDED = 6  # batches of other steps that are shown, unless all are asked for
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
    others = replay.others
    if not all_rows:
        others = others[:_FOLDED]
    rows = [_batch_cells(batch, _batch_name(batch)) for batch in [*replay.suspects, *others]]
    hidden = replay.others[len(others) :]
    if hidden:
        rows.append(_range_cells(hidden))
    if replay.before:
        rows.append(_level_cells(replay))

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
    facts = [replay.about_checkpoint]
    if replay.onset is not None and replay.step is not None and replay.onset > replay.step:
        facts.append(
            f"step {replay.onset:,} had begun and not ended when the loop was left: its batch is "
            "looked at"
        )
    elif replay.onset is not None and replay.step is not None and replay.onset != replay.step:
        facts.append(
            f"step {replay.onset:,} is the first one that stands out before the alert at step "
            f"{replay.step:,}: its "
            "batch is looked at"
        )
    facts += _not_finite(replay.batches)
    facts += [text for batch in replay.suspects if (text := _sequences_out(batch))]
    if replay.tokens:
        facts.append(_tokens(replay))
    if replay.norms:
        facts.append(_norms(replay))
    if replay.computed:
        facts.append(f"computed: {replay.computed}; in evaluation mode, without dropout")
    return [*facts, *replay.notes]


def _not_finite(batches: list[BatchReplay]) -> list[str]:
    """Return which batches hold NaN or inf.

    If a figure is not finite and no batch holds such a value, that is said. Else nothing is.
    """
    facts = [
        f"not finite in the batch of step {batch.step:,}: {describe_batch(batch.values)}"
        for batch in batches
        if batch.values is not None and batch.values.arguments
    ]
    if facts:
        return facts
    figures = [
        value for b in batches for value in (b.loss, b.gradient, b.logged_loss, b.logged_gradient)
    ]
    is_lost = any(value is not None and not math.isfinite(value) for value in figures)
    all_finite = all(batch.values is not None and batch.values.is_finite for batch in batches)
    if is_lost and all_finite:
        return [f"every tensor of the {len(batches)} kept batches is finite"]
    return []


def _batch_name(batch: BatchReplay) -> str:
    if batch.suspect:
        return f"{batch.step:,} suspect"
    return f"{batch.step:,}"


def _batch_cells(batch: BatchReplay, name: str) -> tuple[str, ...]:
    out = sum(bool(sequence.outlying) for sequence in batch.sequences)
    return (
        name,
        three(batch.loss),
        three(batch.logged_loss),
        three(batch.gradient),
        three(batch.logged_gradient),
        f"{out} of {len(batch.sequences)}",
    )


def _range_cells(batches: list[BatchReplay]) -> tuple[str, ...]:
    def ends(values: list[float | None]) -> str:
        known = [value for value in values if value is not None]
        if not known:
            return three(None)
        return f"{three(min(known))} to {three(max(known))}"

    sequences = [sequence for batch in batches for sequence in batch.sequences]
    return (
        f"{len(batches)} more",
        ends([batch.loss for batch in batches]),
        "",
        ends([batch.gradient for batch in batches]),
        "",
        f"{sum(bool(s.outlying) for s in sequences)} of {len(sequences)}",
    )


def _level_cells(replay: ReplayRecord) -> tuple[str, ...]:
    loss, gradient = replay.before.get(LOSS), replay.before.get(GRADIENT)
    return (
        "usual before",
        "",
        three(None if loss is None else loss.center),
        "",
        three(None if gradient is None else _exponential(gradient)),
        "",
    )


def _exponential(level: LevelRecord) -> float:
    return math.exp(level.center)


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
    more = f" and {len(out) - _SEQUENCES} more" if len(out) > _SEQUENCES else ""
    noun = "sequence" if len(out) == 1 else "sequences"
    return (
        f"out of the range of the other batches' sequences: {noun} {', '.join(shown)}{more}, of "
        f"{len(batch.sequences)} "
        f"in the batch of step {batch.step:,}"
    )


def _tokens(replay: ReplayRecord) -> str:
    shown = ", ".join(_token(token) for token in replay.tokens[:_TOKENS])
    text = f"largest token losses of the suspect: {shown}"
    if replay.token_cut is not None and replay.tokens_counted:
        text += (
            f"; {replay.tokens_beyond} of its {replay.tokens_counted:,} tokens are above "
            f"{three(replay.token_cut)}, as "
            "1 in 1,000 tokens of the other batches is"
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
