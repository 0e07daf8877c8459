"""The init contract on mutants: one mistake in a model's init each. Found? Located? Nobody else
blamed?

Also unchanged models over seeds: named rightly, and silent. Results:
benchmarks/results/mutants.json.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import jacdiag
from benchmarks._families import CONFIGS, RECIPES, SCHEMES, Subject, family, recipe, written

Mutation = tuple[str, Callable[[Subject], set[str]]]
CODES = ("JD202", "JD203", "JD204", "JD205")


def judged(subject: Subject) -> Any:
    return jacdiag.audit(subject.model, subject.probe, products=False, select=["JD20"])


def blamed(report: Any) -> set[str]:
    return {name for f in report.findings if f.code in CODES for name in f.evidence["parameters"]}


def groups(subject: Subject) -> dict[str, list[str]]:
    """Matrices of sub-layers by name pattern."""
    found: dict[str, list[str]] = {}
    for name, weight in subject.model.named_parameters():
        if weight.dim() == 2 and re.search(r"\.\d+\.", name) and "relative" not in name:
            found.setdefault(re.sub(r"\.\d+\.", ".*.", name, count=1), []).append(name)
    return found


def rescaled(
    names: list[str], factor: Callable[[torch.Tensor], float], subject: Subject
) -> set[str]:
    with torch.no_grad():
        for name in names:
            weight = subject.model.get_parameter(name)
            weight.mul_(factor(weight))
    return set(names)


def mutations(subject: Subject, name: str) -> Iterator[Mutation]:
    """Every single mistake that this init can carry."""
    depth = name in (
        "gpt2",
        "small-init",
        "neox",
        "own-depth",
        "vanilla",
        "embed-ln",
        "scaled-embed",
    )
    layers = 4
    for pattern, members in groups(subject).items():
        last = members[-1]
        yield f"one x1.5: {last}", partial(rescaled, [last], lambda w: 1.5)
        yield f"std for std^2: {pattern}", partial(rescaled, members, lambda w: float(w.std()))
        rows, columns = subject.model.get_parameter(last).shape
        if (
            name in ("t5", "pytorch", "xavier-fan")
            and rows != columns
            and not (name == "t5" and ".q." in pattern)
        ):
            swap = partial(rescaled, members, lambda w: math.sqrt(w.shape[1] / w.shape[0]))
            yield f"fan_out for fan_in: {pattern}", swap
        if depth and re.search(r"c_proj|o_proj|down_proj", pattern):
            # 2/(N sqrt d) is not s/sqrt(2N): what is dropped there is the whole of it
            factor = math.sqrt(2 * layers) if name != "neox" else math.sqrt(2 / 320) / (2 / (4 * 8))
            yield (
                f"depth scaling dropped: {pattern}",
                partial(rescaled, members, lambda w, f=factor: f),
            )
            yield (
                f"one layer missed: {members[1]}",
                partial(rescaled, [members[1]], lambda w, f=factor: f),
            )
            yield (
                f"depth scaling twice: {pattern}",
                partial(rescaled, members, lambda w: 1 / math.sqrt(2 * layers)),
            )
    llama = "model.embed_tokens.weight"
    table = {"t5": "shared.weight", "torchtitan-depth": llama, "pytorch": llama}
    if name in table:
        yield "embedding std 1 to 0.02", partial(rescaled, [table[name]], lambda w: 0.02)


def builders() -> dict[str, Callable[[int], Subject]]:
    made: dict[str, Callable[[int], Subject]] = {
        f"transformers {n}": partial(family, n) for n in CONFIGS
    }
    made |= {f"recipe {n}": partial(recipe, n) for n in RECIPES}
    return made | {f"scheme {n}": partial(written, n) for n in SCHEMES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/mutants.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    total = found = wrong = 0
    misses: list[dict[str, Any]] = []
    alarms: dict[str, int] = {}
    names: dict[str, list[str]] = {}
    for label, build in builders().items():
        reports = [judged(build(seed)) for seed in range(options.seeds)]
        alarms[label] = sum(bool(blamed(r)) for r in reports)
        names[label] = sorted(
            {next((x.note for x in r.rules if x.note and x.code == "JD203"), "") for r in reports}
        )
        count = len(list(mutations(build(0), label.split()[1])))
        for k in range(count):
            subject = build(1000 + k)
            what, mutate = list(mutations(subject, label.split()[1]))[k]
            meant, said = mutate(subject), blamed(judged(subject))
            total += 1
            found += meant <= said
            wrong += bool(said - meant)
            if meant != said:
                misses.append(
                    {
                        "model": label,
                        "mutation": what,
                        "not_found": sorted(meant - said)[:4],
                        "blamed_wrongly": sorted(said - meant)[:4],
                    }
                )
        print(
            f"{label:28s} {alarms[label]:2d} of {options.seeds} seeds alarmed, {count:3d} mutants "
            f" {names[label]}",
            flush=True,
        )
    result = {
        "mutants": total,
        "found": found,
        "blamed_wrongly": wrong,
        "seeds": options.seeds,
        "alarms": alarms,
        "named": names,
        "misses": misses,
    }
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(
        f"{found} of {total} mutants found and located, {wrong} with another weight blamed; "
        f"{sum(alarms.values())} false alarms in {len(alarms) * options.seeds} unchanged models"
    )
    for miss in misses:
        print("  ", miss)


if __name__ == "__main__":
    main()
