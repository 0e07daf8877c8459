"""What a person reads of a replay: the sentence, the table of batches, outlying sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from jacdiag.detectors.first_nonfinite import describe_batch
from jacdiag.records.flight_replay import BatchReplay, ReplayRecord, SequenceReplay, TokenReplay
from jacdiag.records.number_format import three
from jacdiag.render.content.number_cells import aligned
from jacdiag.rules.flight_replay import GRADIENT, LONGEST_ONSET, LOSS

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
    # 1. The batches, suspects first.
    others = replay.others
    if not all_rows:
        others = others[:_FOLDED]
    rows = [_batch_cells(batch, _batch_name(batch)) for batch in [*replay.suspects, *others]]

    # 2. One row for all that are folded away, and one for what is usual.
    hidden = replay.others[len(others) :]
    if hidden:
        rows.append(_range_cells(hidden))
    if replay.before:
        rows.append(_level_cells(replay))
    return ReplayTable(HEADER, _aligned_rows(rows))


def _aligned_rows(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return rows whose columns of numbers have their points in a line."""
    if not rows:
        return []
    first, *numbers, last = zip(*rows, strict=True)
    columns = [first, *map(aligned, numbers), last]
    return list(zip(*columns, strict=True))


def table_lines(table: ReplayTable) -> list[str]:
    """Return the table as lines of plain text."""
    # 1. Every column as wide as its widest cell.
    all_rows = [table.header, *table.rows]
    columns = zip(*all_rows, strict=True)
    widths = [max(map(len, column)) for column in columns]

    # 2. The lines, without spaces at their ends.
    lines = []
    for row in all_rows:
        cells = map(str.ljust, row, widths)
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
    facts += filter(None, map(_sequences_out, replay.suspects))
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
    if onset is None or step is None:
        return ""

    # The batch of the alert's own step.
    if onset == step:
        return ""

    # A step after the last one that was logged.
    if onset > step:
        return (
            f"step {onset:,} had begun and not ended when the loop was left: its batch is looked at"
        )

    # The steps before it are not searched.
    if onset == step - LONGEST_ONSET + 1:
        return (
            f"all of the {LONGEST_ONSET} steps up to the alert at step {step:,} stand out, and the "
            f"jump may have begun before them: the batch of the first, step {onset:,}, is looked at"
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
    lost_a_figure = any(map(_has_lost_figure, batches))
    if lost_a_figure and all(map(_has_finite_values, batches)):
        return [f"every tensor of the {len(batches)} kept batches is finite"]
    return []


def _has_finite_values(batch: BatchReplay) -> bool:
    """Return whether a batch was looked at, and every value in it is finite."""
    return batch.values is not None and batch.values.is_finite


def _has_lost_figure(batch: BatchReplay) -> bool:
    """Return whether a loss or a gradient norm of a batch is not finite."""
    figures = (batch.loss, batch.gradient, batch.logged_loss, batch.logged_gradient)
    return any(figure is not None and not math.isfinite(figure) for figure in figures)


def _batch_name(batch: BatchReplay) -> str:
    """Return the step of a batch, and whether it is the suspect."""
    name = f"{batch.step:,}"
    if batch.suspect:
        name += " suspect"
    return name


def _batch_cells(batch: BatchReplay, name: str) -> tuple[str, ...]:
    """Return the row of one batch: its figures now, each next to the one in the run's log."""
    return (
        name,
        three(batch.loss),
        three(batch.logged_loss),
        three(batch.gradient),
        three(batch.logged_gradient),
        _count_outlying([batch]),
    )


def _range_cells(batches: list[BatchReplay]) -> tuple[str, ...]:
    """Return the row of batches that are folded away: the range of each figure."""
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
    least, most = three(min(known)), three(max(known))
    return f"{least} to {most}"


def _count_outlying(batches: list[BatchReplay]) -> str:
    """Return how many sequences of some batches are out of range, and of how many."""
    sequences = []
    for batch in batches:
        sequences += batch.sequences
    outlying = sum(bool(sequence.outlying) for sequence in sequences)
    return f"{outlying} of {len(sequences)}"


def _level_cells(replay: ReplayRecord) -> tuple[str, ...]:
    """Return what is usual in the run before the alert."""
    loss, gradient = None, None
    if LOSS in replay.before:
        loss = replay.before[LOSS].center
    # The level of the gradient is that of its logarithm.
    if GRADIENT in replay.before:
        gradient = math.exp(replay.before[GRADIENT].center)
    return "usual before", "", three(loss), "", three(gradient), ""


def _sequences_out(batch: BatchReplay) -> str:
    """Return the outlying sequences of a batch, the largest loss first; "" if there are none."""
    # 1. Those that are out of range.
    outlying = _outlying_sequences(batch)
    if not outlying:
        return ""

    # 2. The first few of them in words.
    shown = []
    for place, sequence in outlying[:_SEQUENCES]:
        loss, gradient = three(sequence.loss), three(sequence.gradient)
        shown.append(f"{place} (loss {loss}, gradient {gradient})")
    listed = ", ".join(shown)
    if len(outlying) > _SEQUENCES:
        listed += f" and {len(outlying) - _SEQUENCES} more"

    # 3. The sentence.
    noun = "sequences"
    if len(outlying) == 1:
        noun = "sequence"
    return (
        f"out of the range of the other batches' sequences: {noun} {listed}, of "
        f"{len(batch.sequences)} in the batch of step {batch.step:,}"
    )


def _outlying_sequences(batch: BatchReplay) -> list[tuple[int, SequenceReplay]]:
    """Return the outlying sequences of a batch with their places, the largest loss first."""
    outlying = []
    for place, sequence in enumerate(batch.sequences):
        if sequence.outlying:
            outlying.append((place, sequence))

    # A loss that is not known comes last.
    return sorted(outlying, key=lambda pair: -(pair[1].loss or 0.0))


def _tokens(replay: ReplayRecord) -> str:
    """Return the tokens of the largest losses, and how many are above the other batches' range."""
    shown = map(_token, replay.tokens[:_TOKENS])
    text = f"largest token losses of the suspect: {', '.join(shown)}"
    if replay.token_cut is None or not replay.tokens_counted:
        return text  # there is no other batch to compare with
    return (
        f"{text}; {replay.tokens_beyond} of its {replay.tokens_counted:,} tokens are above "
        f"{three(replay.token_cut)}, as 1 in 1,000 tokens of the other batches is"
    )


def _token(token: TokenReplay) -> str:
    """Return the loss of a token, its id and its place in the batch."""
    place = f"id {token.target} in sequence {token.sequence} at {token.position}"
    return f"{three(token.loss)} ({place})"


def _norms(replay: ReplayRecord) -> str:
    """Return how branch norms on the suspect compare with those on the run's fixed probe."""
    start = f"branch norms on the batch of step {replay.probed_step}"
    start += f" compared with the probe of step {replay.probe_step}"

    # 1. The ratios that can be compared.
    comparable = []
    for norm in replay.norms:
        if math.isfinite(norm.ratio) and norm.ratio > 0:
            comparable.append(norm)
    if not comparable:
        return f"{start}: none can be compared"

    # 2. The usual ratio, and those farthest from 1 in either direction.
    usual = three(median(norm.ratio for norm in comparable))
    comparable.sort(key=lambda norm: -abs(math.log(norm.ratio)))
    farthest = [f"{three(norm.ratio)} x at {norm.name}" for norm in comparable[:_NORMS]]
    return f"{start}: {usual} x in the median; farthest {', '.join(farthest)}"
