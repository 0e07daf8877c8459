"""A model compared with an earlier one of the same architecture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from jacdiag.comparison.match import (
    FIGURES,
    Ends,
    Placed,
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
)

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

    Raises:
        UsageError: it was made from weights alone, or its norms were left out.
    """
    if any(row.branch_norm is not None for row in report.sublayers):
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
    if now.digest and probe.digest and now.digest != probe.digest:
        got = "another input of the same size"
        if not now.is_random:
            got += f", from {now.tokens}"
        hint = "pass the earlier checkpoint itself: both are then measured with one probe"
        raise UsageError(f"'{name}' was measured with another probe", got=got, hint=hint)


def _facts(probe: ProbeRecord, dtype: str) -> dict[str, object]:
    """Return what norms depend on apart from the model, with the seed of a random probe."""
    facts = facts_of(probe, dtype)
    if probe.is_random:
        facts["seed"] = probe.seed
    return facts


def check_same_architecture(
    now: Iterable[Placed],
    earlier: Iterable[Placed],
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
    placements = {key: row.placement for key, row in ours.items()}
    same_sublayers = placements == {key: row.placement for key, row in theirs.items()}
    same_width = None in widths or widths[0] == widths[1]
    if same_sublayers and same_width:
        return
    got = f"{_outline(theirs.values(), widths[1])}; now {_outline(ours.values(), widths[0])}"
    hint = (
        "--against takes an earlier checkpoint of the same model; `jacdiag diff A B` compares "
        "any two"
    )
    raise UsageError(f"'{name}' is of another architecture", got=got, hint=hint)


def _outline(rows: Iterable[Placed], width: int | None) -> str:
    """Return an architecture in words: "12 sub-layers (6 attention, 6 mlp) in pre-norm"."""
    kinds = []
    placements = set()
    for row in rows:
        kinds.append(row.kind)
        placement = f"{row.placement}-norm"
        if row.placement == "none":
            placement = "no norm"
        placements.add(placement)
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    in_width = f", width {width}" if width is not None else ""
    return f"{len(kinds)} sub-layers ({counts}) in {' and '.join(sorted(placements))}{in_width}"


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
    # 1. Pair the sub-layers, and see which have a norm in both reports.
    ours, theirs = numbered_rows(now.sublayers), numbered_rows(earlier.sublayers)
    pairs = [(row, theirs[key]) for key, row in ours.items() if key in theirs]
    measured = []
    missing = []
    for row, other in pairs:
        norms = (row.branch_norm, other.branch_norm)
        if None not in norms:
            measured.append((row, other))
        elif norms != (None, None):
            missing.append(row.name)

    # 2. List what differs.
    training = "trained" in (now.state, earlier.state)
    record = AgainstRecord(
        source=name,
        state=str(earlier.state or ""),
        created=earlier.created,
        training=training,
        compared=len(measured),
        missing=missing,
        changes=_changes(earlier, now),
        branch_norms={row.name: list(_ends(other.branch_norm)) for row, other in measured},
    )

    # 3. Give the earlier figures the names of now. Two steps of one training have no seeds between
    # them.
    names = {other.name: row.name for row, other in pairs}
    renamed = _renamed(earlier, names, _weight_names(now, earlier))
    return record, figures_of([renamed], 0.0 if training else margin)


def _changes(earlier: Report, now: Report) -> list[ChangeRecord]:
    """Return the changes of the figures of sub-layers, then that of the end-to-end norm."""
    # 1. Sub-layers.
    changes = []
    for pair in compare(earlier, now).parted:
        # Weights are not listed, only figures of sub-layers.
        if pair.figure not in FIGURES or pair.old is None or pair.new is None:
            continue
        old, new = list(pair.old), list(pair.new)
        changes.append(ChangeRecord(pair.b, pair.depth, pair.figure, old, new))

    # 2. The model from end to end.
    if now.network is None or earlier.network is None:
        return changes
    before, after = earlier.network.end_to_end, now.network.end_to_end
    if before is None or after is None:
        return changes
    if are_apart(_ends(before), _ends(after)):
        old, new = list(_ends(before)), list(_ends(after))
        changes.append(ChangeRecord("", None, "end_to_end", old, new))
    return changes


def _ends(interval: Interval | None) -> Ends:
    """Return lower end, estimate and upper end of an interval that was measured."""
    assert interval is not None
    return (interval.lower, interval.estimate, interval.upper)


def _weight_names(now: Report, earlier: Report) -> Mapping[str, str]:
    """Return the names of the earlier weights -> names of their counterparts now."""
    ours, theirs = numbered_weights(now), numbered_weights(earlier)
    return {weight.parameter: ours[key].parameter for key, weight in theirs.items() if key in ours}


def _renamed(report: Report, rows: Mapping[str, str], weights: Mapping[str, str]) -> Report:
    """Return a report with other names of sub-layers and weights."""
    sublayers = [replace(row, name=rows.get(row.name, row.name)) for row in report.sublayers]
    contract = report.contract
    if contract is not None:
        renamed = [
            replace(weight, parameter=weights.get(weight.parameter, weight.parameter))
            for weight in contract.weights
        ]
        contract = replace(contract, weights=renamed)
    return replace(report, sublayers=sublayers, contract=contract)
