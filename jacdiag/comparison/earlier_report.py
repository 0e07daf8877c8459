"""A model compared with an earlier one of the same architecture."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from jacdiag.comparison.match import (
    FIGURES,
    Ends,
    Key,
    StreamSublayer,
    are_apart,
    compare,
    numbered_rows,
    numbered_weights,
)
from jacdiag.comparison.probe_facts import facts_of, parting, probe_options, spoken
from jacdiag.comparison.seed_spread import figures_of
from jacdiag.errors import SourceError, UsageError
from jacdiag.records import (
    AgainstRecord,
    ChangeRecord,
    FiguresRecord,
    Interval,
    NewerSchemaError,
    ProbeRecord,
    Report,
    SublayerRecord,
)
from jacdiag.records.placement_words import placements_in_words

_LARGEST = 256 * 2**20  # bytes


def read_report(path: Path) -> Report:
    """Read a report that `--json` wrote.

    Args:
        path: of the file.

    Returns:
        The report; fields that an older version did not write have their defaults.

    Raises:
        SourceError: the file cannot be read, is of a newer version, or holds something else.
    """
    hint = "a report that `jacdiag audit --json` wrote; a config is written hf:FILE"
    try:
        size = path.stat().st_size
        if size > _LARGEST:
            raise SourceError(f"'{path}' is no report", got=f"{size:,} bytes", hint=hint)
        text = path.read_text(encoding="utf-8")
        return Report.from_json(text)
    except NewerSchemaError as error:
        raise SourceError(
            f"cannot read the report '{path}': {error.what}", got=error.got, hint=error.hint
        ) from error
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        json.JSONDecodeError,
    ) as error:
        raise SourceError(f"'{path}' is no report", got=str(error), hint=hint) from error


def check_has_norms(report: Report, name: str) -> None:
    """Raise unless a report holds branch norms, which are what is compared.

    Args:
        report: to compare with.
        name: what it is called.

    Raises:
        UsageError: it was made from weights alone, or its norms were left out.
    """
    has_norm = any(row.branch_norm is not None for row in report.sublayers)
    if has_norm:
        return

    hint = (
        "audit it with a model that runs (--model FACTORY); `jacdiag diff --contract-only` "
        "compares weights"
    )
    got = "a report without a branch norm"
    if report.tier == "weights":
        got = "a report of weights alone"
    raise UsageError(f"there is nothing to compare with in '{name}'", got=got, hint=hint)


def check_same_probe(now: ProbeRecord, dtype: str, earlier: Report, name: str) -> None:
    """Raise if an earlier report was measured with a different probe.

    Norms would differ for that reason alone.

    Args:
        now: the probe of the model that is audited, with its digest.
        dtype: the precision that products run in, such as "float32".
        earlier: the report to compare with.
        name: what it is called.

    Raises:
        UsageError: batch, seq, tokens, dtype, seed or the input itself differ.
    """
    probe = earlier.probe
    assert probe is not None

    # 1. Probes of another size, source or precision.
    facts = _facts(now, dtype)
    before = _facts(probe, str(earlier.settings.get("dtype", dtype)))
    differing = parting(facts, before)
    if differing:
        got = f"{spoken(before)}; now {spoken(facts)}"
        hint = (
            f"{probe_options(before, differing)}, as in '{name}'; or pass the earlier checkpoint "
            "itself"
        )
        raise UsageError(f"'{name}' was measured with another probe", got=got, hint=hint)

    # 2. Probes whose facts are the same, and whose values differ.
    if _has_other_values(now, probe):
        got = "another input of the same size"
        if not now.is_random:
            got += f", from {now.tokens}"
        hint = "pass the earlier checkpoint itself: both are then measured with one probe"
        raise UsageError(f"'{name}' was measured with another probe", got=got, hint=hint)


def _has_other_values(now: ProbeRecord, earlier: ProbeRecord) -> bool:
    """Return whether the digests of two probes differ."""
    # An older report has no digest. Then the facts must do.
    if not now.digest or not earlier.digest:
        return False

    return now.digest != earlier.digest


def _facts(probe: ProbeRecord, dtype: str) -> dict[str, object]:
    """Return what norms depend on apart from the model, with the seed of a random probe."""
    facts = facts_of(probe, dtype)
    if probe.is_random:
        facts["seed"] = probe.seed
    return facts


def check_same_architecture(
    now: Iterable[StreamSublayer],
    earlier: Iterable[StreamSublayer],
    widths: tuple[int | None, int | None],
    name: str,
) -> None:
    """Raise unless two models have the same sub-layers.

    Every sub-layer needs a counterpart at its depth, of its kind and with its placement of the
    norm.

    Args:
        now: the sub-layers of the model that is audited.
        earlier: those of the model to compare with.
        widths: of both models, None if unknown.
        name: what the earlier model is called.

    Raises:
        UsageError: the two are of different architectures.
    """
    ours, theirs = numbered_rows(now), numbered_rows(earlier)
    same_sublayers = _placements(ours) == _placements(theirs)
    # An unknown width does not contradict the other one.
    same_width = None in widths or widths[0] == widths[1]
    if same_sublayers and same_width:
        return

    got = f"{_outline(theirs.values(), widths[1])}; now {_outline(ours.values(), widths[0])}"
    hint = (
        "--against takes an earlier checkpoint of the same model; `jacdiag diff A B` compares "
        "any two"
    )
    raise UsageError(f"'{name}' is of another architecture", got=got, hint=hint)


def _placements(rows: Mapping[Key, StreamSublayer]) -> dict[Key, str]:
    """Return where the norm of each sub-layer stands."""
    return {key: row.placement for key, row in rows.items()}


def _outline(rows: Collection[StreamSublayer], width: int | None) -> str:
    """Return an architecture in words: "12 sub-layers (6 attention, 6 mlp) with pre-norm"."""
    # 1. How many sub-layers there are of each kind, and where their norms stand.
    kinds = Counter(row.kind for row in rows)
    placements = placements_in_words(rows)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))

    # 2. The same as one sentence.
    norms = " and ".join(sorted(placements))
    outline = f"{kinds.total()} sub-layers ({counts}) with {norms}"
    if width is None:
        return outline

    return f"{outline}, width {width}"


def compare_with_earlier(
    now: Report, earlier: Report, name: str, margin: float
) -> tuple[AgainstRecord, FiguresRecord]:
    """Compare a report with an earlier one of the same architecture and probe.

    Args:
        now: the report of the model that is audited.
        earlier: the report to compare with; its sub-layers may have other names.
        name: what the earlier model is called.
        margin: by how much a figure may differ from one seed to another, relative, if both models
            are at init.

    Returns:
        What differs beyond both intervals, and the earlier figures under the names of now, as JD110
        reads them.
    """
    # 1. Pair the sub-layers.
    pairs = _sublayer_pairs(now, earlier)
    measured = _measured_in_both(pairs)

    # 2. List what differs.
    training = "trained" in (now.state, earlier.state)
    record = AgainstRecord(
        source=name,
        state=str(earlier.state or ""),
        created=earlier.created,
        training=training,
        compared=len(measured),
        missing=_measured_in_one(pairs),
        changes=[*_sublayer_changes(earlier, now), *_end_to_end_change(earlier, now)],
        branch_norms={row.name: list(_ends(other.branch_norm)) for row, other in measured},
    )

    # 3. Give the earlier figures the names of now.
    names = {other.name: row.name for row, other in pairs}
    renamed = _renamed(earlier, names, _weight_names(now, earlier))
    if training:
        margin = 0.0  # two steps of one training have no seeds between them
    return record, figures_of([renamed], margin)


_RowPair = tuple[SublayerRecord, SublayerRecord]  # of now, and of the earlier report


def _sublayer_pairs(now: Report, earlier: Report) -> list[_RowPair]:
    """Return the sub-layers that both reports have."""
    ours, theirs = numbered_rows(now.sublayers), numbered_rows(earlier.sublayers)
    return [(row, theirs[key]) for key, row in ours.items() if key in theirs]


def _measured_in_both(pairs: Iterable[_RowPair]) -> list[_RowPair]:
    """Return the pairs with a branch norm on each side."""
    measured = []
    for row, other in pairs:
        norms = (row.branch_norm, other.branch_norm)
        if None not in norms:
            measured.append((row, other))

    return measured


def _measured_in_one(pairs: Iterable[_RowPair]) -> list[str]:
    """Return the names, in the report of now, of sub-layers whose norm one report lacks."""
    names = []
    for row, other in pairs:
        has_norm = row.branch_norm is not None
        had_norm = other.branch_norm is not None
        if has_norm != had_norm:
            names.append(row.name)

    return names


def _sublayer_changes(earlier: Report, now: Report) -> list[ChangeRecord]:
    """Return the changes of the figures of sub-layers."""
    changes = []
    for pair in compare(earlier, now).parted:
        is_weight = pair.figure not in FIGURES
        if is_weight:
            continue
        # A sub-layer that one report lacks is of another architecture, and no change.
        if pair.old is None or pair.new is None:
            continue

        old, new = list(pair.old), list(pair.new)
        changes.append(ChangeRecord(pair.b, pair.depth, pair.figure, old, new))

    return changes


def _end_to_end_change(earlier: Report, now: Report) -> list[ChangeRecord]:
    """Return the change of the norm of the model from end to end; [] if there is none."""
    # 1. One that was not measured has not changed.
    before, after = _end_to_end(earlier), _end_to_end(now)
    if before is None or after is None:
        return []

    # 2. Gains of different parts of the model are different figures.
    if _part(earlier) != _part(now):
        return []

    # 3. The two intervals.
    old, new = _ends(before), _ends(after)
    if not are_apart(old, new):
        return []

    return [ChangeRecord("", None, "end_to_end", list(old), list(new))]


def _part(report: Report) -> tuple[str, str] | None:
    """Return the ends of the part that the figures of the network are about; None of all of it."""
    network = report.network
    if network is None or network.part is None:
        return None
    return network.part.first, network.part.last


def _end_to_end(report: Report) -> Interval | None:
    """Return the norm of a model from end to end; None if it was not measured."""
    network = report.network
    if network is None:
        return None

    return network.end_to_end


def _ends(interval: Interval | None) -> Ends:
    """Return lower end, estimate and upper end of an interval that was measured."""
    assert interval is not None
    return (interval.lower, interval.estimate, interval.upper)


def _weight_names(now: Report, earlier: Report) -> Mapping[str, str]:
    """Return the names of the earlier weights -> names of their counterparts now."""
    ours = numbered_weights(now)
    theirs = numbered_weights(earlier)
    names = {}
    for key, weight in theirs.items():
        # One without a counterpart is not renamed.
        if key in ours:
            names[weight.parameter] = ours[key].parameter

    return names


def _renamed(report: Report, rows: Mapping[str, str], weights: Mapping[str, str]) -> Report:
    """Return a report with other names of sub-layers and weights."""
    # 1. Sub-layers. One without a counterpart keeps its name.
    sublayers = [replace(row, name=rows.get(row.name, row.name)) for row in report.sublayers]
    renamed = replace(report, sublayers=sublayers)
    if report.contract is None:
        return renamed

    # 2. Weights.
    parameters = [
        replace(weight, parameter=weights.get(weight.parameter, weight.parameter))
        for weight in report.contract.weights
    ]
    return replace(renamed, contract=replace(report.contract, weights=parameters))
