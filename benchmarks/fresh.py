"""Does the init contract blame anyone who did nothing wrong? Every model here is at its own init.

    python benchmarks/fresh.py [--only TEXT] [--seeds N] [--limit SECONDS]

The models: every family that transformers registers, from its default config made tiny and its own
init; the defaults of torch.nn, x-transformers and peft; published recipes written onto a small
decoder. Each is audited with `state="init"`, and every finding of the contract (JD2xx) at warning
is listed. A finding that a tied embedding makes large logits (JD206) is compared with the loss
itself. Where the init of transformers differs from the code that a model comes from, the finding is
true (_fresh/confirmed.py). Results: benchmarks/results/fresh.json and fresh.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical"}

import torch
from torch import Tensor, nn

import jacdiag
from benchmarks._fresh import libraries, recipes
from benchmarks._fresh.confirmed import source_of
from jacdiag.records import Report

RESULTS = Path(__file__).parent / "results"
Build = Callable[[int], tuple[nn.Module, Any]]
# JD208 to JD211 have a benchmark of their own (vectors.py).
CODES = ["JD20", "JD212", "JD213", "JD214", "JD215", "JD216"]


@dataclass
class Row:
    """What one model showed.

    Attributes:
        group: "transformers", "torch", "x-transformers", "peft" or "recipes".
        name: Of the model.
        status: "audited", or why it was not.
        scheme: The scheme that it was found to follow, or that of its family.
        findings: JD2xx at warning or error, as "code: what".
        true: Those of them that a measurement of the loss, or the code that the model comes from,
            confirms.
    """

    group: str
    name: str
    status: str = "audited"
    scheme: str = ""
    findings: list[str] = field(default_factory=list)
    true: list[str] = field(default_factory=list)

    @property
    def false_alarms(self) -> int:
        return len(self.findings) - len(self.true)

    def as_lines(self) -> list[str]:
        """Return a line of the page per finding."""
        confirmed = dict.fromkeys(self.true, "confirmed by the loss")
        for finding in self.true:
            source = source_of(self.name.rpartition(" ")[2], finding)
            if source:
                confirmed[finding] = f"confirmed: {source}"
        return [
            f"- {self.group}, {self.name}: {finding} ({confirmed.get(finding, 'false alarm')})"
            for finding in self.findings
        ]


# -- the models ------------------------------------------------------------------------------------
def models() -> Iterator[tuple[str, str, Build]]:
    """Yield (group, name, builder by seed) of every model."""
    from _coverage import build

    for task, family in build.families():
        yield "transformers", f"{task} {family}", partial(_family, task, family)
    for library, names in libraries.LIBRARIES.items():
        for name in names:
            yield library, name, partial(_library, library, name)
    for name, recipe in recipes.RECIPES.items():
        yield "recipes", name, partial(_recipe, recipe)


def _family(task: str, family: str, seed: int) -> tuple[nn.Module, Any]:
    from _coverage import build

    built = build.build(task, family, seed, disturb=False)
    return built.model, built.inputs


def _library(library: str, name: str, seed: int) -> tuple[nn.Module, Any]:
    fresh = libraries.build(library, name, seed)
    return fresh.model, fresh.inputs


def _recipe(recipe: recipes.Recipe, seed: int) -> tuple[nn.Module, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(recipes.VOCABULARY, (2, recipes.LENGTH), generator=generator)
    return recipes.build(recipe, seed), ids


# -- one model -------------------------------------------------------------------------------------
def examine(group: str, name: str, build: Build, seed: int) -> Row:
    """Audit one model and compare what is said of large logits with the loss."""
    row = Row(group, name)
    try:
        model, inputs = build(seed)
    except Exception as error:
        row.status = f"not built: {_first_line(error)}"
        return row
    try:
        report = jacdiag.audit(
            model, inputs, products=False, state="init", select=CODES, remedies="none"
        )
    except Exception as error:
        row.status = f"not traced: {_first_line(error)}"
        return row
    row.scheme = scheme_of(report)
    loss: float | None = None
    for finding in report.findings:
        if not finding.code.startswith("JD2") or finding.level == "info":
            continue
        sentence = f"{finding.code}: {finding.what}"
        row.findings.append(sentence)
        if source_of(name.rpartition(" ")[2], sentence):
            row.true.append(sentence)
        logits = finding.evidence.get("logits_std")
        if finding.code == "JD206":
            logits = finding.evidence["value"]
        if logits is not None:
            loss = first_loss(model, inputs) if loss is None else loss
            if loss is not None and loss > logits**2 / 4:
                row.true.append(sentence)
    return row


def _first_line(error: BaseException) -> str:
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error) else ''}"
    )


def scheme_of(report: Report) -> str:
    """Return the note that names the scheme."""
    notes = {rule.code: rule.note for rule in report.rules if rule.note}
    return notes.get("JD202") or notes.get("JD204") or notes.get("JD205") or ""


def first_loss(model: nn.Module, inputs: Any) -> float | None:
    """Return how far the loss on random targets lies above ln V; None if the model has no
    logits.
    """
    with torch.no_grad():
        output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        return None
    vocabulary = logits.shape[-1]
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(vocabulary, logits.shape[:-1], generator=generator)
    loss = nn.functional.cross_entropy(logits.flatten(0, -2).double(), targets.flatten())
    return float(loss) - math.log(vocabulary)


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done in {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# -- the page --------------------------------------------------------------------------------------
def page(rows: list[Row], versions: dict[str, str], seeds: int) -> str:
    """Return the results as markdown."""
    audited = [row for row in rows if row.status == "audited"]
    counts = Counter(row.group for row in audited)
    alarms = Counter[str]()
    confirmed = Counter[str]()
    for row in audited:
        alarms[row.group] += row.false_alarms
        confirmed[row.group] += len(row.true)
    lines = [
        "# Fresh models and the init contract",
        "",
        "Written by `benchmarks/fresh.py`. Every model is at its own init; a finding of the "
        "contract at",
        "warning is a false alarm, unless a measurement of the loss confirms it (on random "
        "targets it",
        "lies at least half as far above ln V as the finding says), or the code that the model "
        "comes from.",
        f"Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}. "
        f"Seeds: {seeds}.",
        "",
        "| models | audits | confirmed findings | false alarms |",
        "|---|---|---|---|",
    ]
    groups = dict.fromkeys(row.group for row in rows)
    lines += [
        f"| {name} | {counts[name]} | {confirmed[name]} | {alarms[name]} |" for name in groups
    ]
    total = f"| all | {len(audited)} | {confirmed.total()} | {alarms.total()} |"
    lines += [total, "", "## Findings", ""]
    for row in audited:
        lines += row.as_lines()
    lines += ["", "## Not audited", ""]
    lines += [f"- {row.name}: {row.status}" for row in rows if row.status != "audited"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default="", help="models whose group or name holds this; nothing is written"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds per model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    import transformers

    rows = []
    for group, name, build in models():
        if options.only not in f"{group} {name}":
            continue
        for seed in range(options.seeds):
            try:
                with limited(options.limit):
                    row = examine(group, name, build, seed)
            except TimeoutError as error:
                row = Row(group, name, str(error))
            rows.append(row)
            if row.status != "audited" or row.findings:
                print(f"{group} {name}: {row.status} {row.findings}", flush=True)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    if not options.only:
        lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
        head = json.dumps({**versions, "seeds": options.seeds})[:-1]
        (RESULTS / "fresh.json").write_text(f'{head}, "models": [\n{lines}\n]}}\n')
        (RESULTS / "fresh.md").write_text(page(rows, versions, options.seeds))
    audited = [row for row in rows if row.status == "audited"]
    print(f"{sum(row.false_alarms for row in audited)} false alarms in {len(audited)} audits")


if __name__ == "__main__":
    main()
