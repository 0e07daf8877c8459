"""What two probes must have in common so that the figures measured with them can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jacdiag.records.report import ProbeRecord, Report

Facts = Mapping[str, Any]


def facts_of(probe: ProbeRecord, dtype: str) -> dict[str, Any]:
    """Return what norms depend on apart from the model: size, source of the tokens, precision."""
    return {"batch": probe.batch, "seq": probe.seq, "tokens": probe.tokens, "dtype": dtype}


def measured_with(report: Report) -> dict[str, Any]:
    """Return the facts of a report's probe; {} if no norm was measured with it.

    Args:
        report: of a model.
    """
    if report.probe is None:
        return {}
    has_norm = any(row.branch_norm is not None for row in report.sublayers)
    if not has_norm:
        return {}

    dtype = str(report.settings.get("dtype", ""))
    return facts_of(report.probe, dtype)


def drawn_with(report: Report) -> dict[str, Any]:
    """Return the facts of a report's probe, with the seed that its tokens were drawn with."""
    facts = measured_with(report)
    if report.probe is not None and facts.get("tokens") == "random":
        facts["seed"] = report.probe.seed
    return facts


def parting(now: Facts, before: Facts) -> list[str]:
    """Return the facts that differ, of those that both have."""
    return [key for key in now if key in before and now[key] != before[key]]


def spoken(facts: Facts) -> str:
    """Return the facts of a probe in words: "2 x 64 random tokens, float32"."""
    batch, seq, tokens = facts.get("batch"), facts.get("seq"), str(facts.get("tokens"))
    size = f"{batch} x {seq}" if seq else f"batch {batch}"
    sources = {
        "random": f"{size} random tokens",
        "random pixels": f"{size} of random pixels",
        "inputs": f"{size}, from --inputs",
    }
    words = [sources.get(tokens, f"{size} tokens of {tokens}")]
    if facts.get("dtype"):
        words.append(str(facts["dtype"]))
    if "seed" in facts:
        words.append(f"seed {facts['seed']}")
    return ", ".join(words)


def probe_options(facts: Facts, keys: Sequence[str]) -> str:
    """Return the options that give a probe these facts: "--batch 2 --seq 64".

    Args:
        facts: of the probe.
        keys: the facts to give options for.
    """
    tokens = str(facts.get("tokens")).partition(" through ")[0]  # the file, without its tokenizer
    without = "without --tokens and --inputs"
    ways = {
        "random": without,
        "random pixels": without,
        "text": without,
        "inputs": "with its --inputs",
    }
    options = []
    for key in keys:
        if facts[key] is None:
            continue
        option = f"--{key} {facts[key]}"
        if key == "tokens":
            option = ways.get(tokens, f"--tokens {tokens}")
        options.append(option)
    return " ".join(options)
