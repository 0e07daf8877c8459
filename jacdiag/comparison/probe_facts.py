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
    # 1. A report of weights alone has no probe, or has measured nothing with it.
    if report.probe is None:
        return {}

    has_norm = any(row.branch_norm is not None for row in report.sublayers)
    if not has_norm:
        return {}

    # 2. An older report does not say its precision.
    dtype = str(report.settings.get("dtype", ""))
    return facts_of(report.probe, dtype)


def drawn_with(report: Report) -> dict[str, Any]:
    """Return the facts of a report's probe, with the seed that its tokens were drawn with."""
    facts = measured_with(report)
    # Without facts there is no token either.
    if facts.get("tokens") != "random":
        return facts

    assert report.probe is not None
    return {**facts, "seed": report.probe.seed}


def parting(now: Facts, before: Facts) -> list[str]:
    """Return the facts that differ, of those that both have."""
    shared = [key for key in now if key in before]
    return [key for key in shared if now[key] != before[key]]


def spoken(facts: Facts) -> str:
    """Return the facts of a probe in words: "2 x 64 random tokens, float32"."""
    # 1. Its size.
    batch = facts.get("batch")
    seq = facts.get("seq")
    size = f"batch {batch}"  # of inputs that are no sequences
    if seq:
        size = f"{batch} x {seq}"

    # 2. Where its numbers are from.
    tokens = str(facts.get("tokens"))
    sources = {
        "random": f"{size} random tokens",
        "random pixels": f"{size} of random pixels",
        "inputs": f"{size}, from --inputs",
    }
    words = [sources.get(tokens, f"{size} tokens of {tokens}")]

    # 3. What else a result depends on.
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
    options = []
    for key in keys:
        # What a probe does not have needs no option.
        if facts[key] is None:
            continue

        option = f"--{key} {facts[key]}"
        if key == "tokens":
            option = _tokens_option(str(facts[key]))
        options.append(option)

    return " ".join(options)


def _tokens_option(tokens: str) -> str:
    """Return the option for a source of tokens, or what to do in its place."""
    path = tokens.partition(" through ")[0]  # the file, without its tokenizer
    without = "without --tokens and --inputs"
    sources = {
        "random": without,
        "random pixels": without,
        "text": without,
        "inputs": "with its --inputs",
    }
    return sources.get(path, f"--tokens {path}")
