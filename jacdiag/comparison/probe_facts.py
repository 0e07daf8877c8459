"""What two probes must have in common for the figures that they gave to be held against each
other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jacdiag.records.report import ProbeRecord, Report

Facts = Mapping[str, Any]


def facts_of(probe: ProbeRecord, dtype: str) -> dict[str, Any]:
    """Size, source of the tokens, and precision: what norms depend on beside the model."""
    return {"batch": probe.batch, "seq": probe.seq, "tokens": probe.tokens, "dtype": dtype}


def measured_with(report: Report) -> dict[str, Any]:
    """The facts of a report's probe; {} where no norm was measured with it."""
    if report.probe is None or not any(row.branch_norm is not None for row in report.sublayers):
        return {}
    return facts_of(report.probe, str(report.settings.get("dtype", "")))


def drawn_with(report: Report) -> dict[str, Any]:
    """The same, with the seed where tokens were drawn with it."""
    facts = measured_with(report)
    seeded = report.probe if facts.get("tokens") == "random" else None
    return facts if seeded is None else {**facts, "seed": seeded.seed}


def parting(now: Facts, before: Facts) -> list[str]:
    """The facts that both know and that differ; none for a baseline or report that does not say."""
    return [key for key in now if key in before and now[key] != before[key]]


def spoken(facts: Facts) -> str:
    """ "2 x 64 random tokens, float32"."""
    seq, tokens = facts.get("seq"), facts.get("tokens")
    size = f"{facts.get('batch')} x {seq}" if seq else f"batch {facts.get('batch')}"
    named = {
        "random": f"{size} random tokens",
        "random pixels": f"{size} of random pixels",
        "inputs": f"{size}, from --inputs",
    }
    words = [named.get(str(tokens), f"{size} tokens of {tokens}"), str(facts.get("dtype") or "")]
    words += [f"seed {facts['seed']}"] if "seed" in facts else []
    return ", ".join(word for word in words if word)


def options(facts: Facts, keys: Sequence[str]) -> str:
    """The options that give a probe these facts: "--batch 2 --seq 64"."""
    tokens = str(facts.get("tokens")).partition(" through ")[0]  # the file, without its tokenizer
    without = "without --tokens and --inputs"
    known = {
        "random": without,
        "random pixels": without,
        "text": without,
        "inputs": "with its --inputs",
    }
    return " ".join(
        known.get(tokens, f"--tokens {tokens}") if key == "tokens" else f"--{key} {facts[key]}"
        for key in keys
        if facts[key] is not None
    )
