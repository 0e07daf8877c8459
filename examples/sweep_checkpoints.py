"""Sweeps a series of checkpoints: worst branch norm and both conditions at every step, and rungs
for the ladder.

Each checkpoint is audited once and is a line of the output; a sweep that was stopped goes on.
Public series publish their steps as revisions of one repository (Pythia, OLMo, Amber ...); with
network and `pip install 'jacdiag[hf]'`:

    python examples/sweep_checkpoints.py --repo EleutherAI/pythia-160m --revision step0 \\
        --out pythia.jsonl
    python examples/sweep_checkpoints.py step0=ckpt/0.pt step1000=ckpt/1000.pt --out mine.jsonl
    python examples/sweep_checkpoints.py --out pythia.jsonl --rungs "Pythia 160M"

The last prints the untrained checkpoints as rungs for jacdiag/rules/healthy.toml; send them in.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jacdiag


def row(name: str, source: str, options: argparse.Namespace) -> dict[str, Any]:
    """One checkpoint, every norm to its width; figures that were not measured are null."""
    report = jacdiag.audit(
        source, model=options.model, batch=1, seq=options.seq, tokens=options.tokens
    )
    measured = [r for r in report.sublayers if r.branch_norm is not None]
    worst = max(measured, key=lambda r: r.branch_norm.estimate, default=None)
    interval = None if worst is None else [worst.branch_norm.lower, worst.branch_norm.upper]
    return {
        "name": name,
        "state": report.state,
        "width": report.model.width,
        "layers": report.model.layers,
        "placement": "/".join(sorted({str(r.placement) for r in measured})),
        "worst_branch_norm": interval,
        "at": None if worst is None else worst.name,
        "small_sublayers": report.conditions.small_sublayers,
        "large_shortcut": report.conditions.large_shortcut,
        "verdict": report.verdict,
        "torch": report.torch,
    }


def sources(options: argparse.Namespace) -> list[tuple[str, str]]:
    found = [
        (name, source) for name, _, source in (text.partition("=") for text in options.checkpoints)
    ]
    if options.repo:
        from huggingface_hub import snapshot_download

        files = ["*.safetensors", "*.json", "*.bin"]
        found += [
            (one, snapshot_download(options.repo, revision=one, allow_patterns=files))
            for one in options.revision
        ]
    return found


def known(path: Path) -> list[dict[str, Any]]:
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if path.exists()
        else []
    )


def rungs(rows: list[dict[str, Any]], name: str) -> str:
    """The untrained checkpoints as TOML; the middle of the interval stands for it."""
    parts = []
    for one in rows:
        if one["state"] != "init" or one["worst_branch_norm"] is None:
            continue
        gain = float(f"{sum(one['worst_branch_norm']) / 2:.3g}")
        parts.append(
            "[[rung]]\n"
            + "".join(
                f"{key} = {json.dumps(value)}\n"
                for key, value in (
                    ("name", name),
                    ("width", one["width"]),
                    ("layers", one["layers"]),
                    ("placement", one["placement"]),
                    ("worst_branch_gain", gain),
                )
            )
        )
    return "\n".join(parts) or "# no untrained checkpoint among them\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="*", metavar="NAME=SOURCE")
    parser.add_argument("--repo", help="a repository of the Hugging Face hub")
    parser.add_argument(
        "--revision", action="append", default=[], help="one of its revisions; may be given again"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--model", help="the factory of a bare state dict")
    parser.add_argument("--tokens", help="a file of text to probe with")
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument(
        "--rungs", metavar="NAME", help="print the untrained ones as rungs of this name, and stop"
    )
    options = parser.parse_args()
    if options.rungs:
        print(rungs(known(options.out), options.rungs), end="")
        return
    done = {one["name"] for one in known(options.out)}
    for name, source in sources(options):
        if name in done:
            continue
        found = row(name, source, options)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        print(
            name,
            found["state"],
            found["verdict"],
            "worst branch norm",
            found["worst_branch_norm"],
            flush=True,
        )


if __name__ == "__main__":
    main()
