"""`jacdiag sites SOURCE`: the sub-layers that were found, and where every parameter went."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jacdiag.errors import SourceError
from jacdiag_cli.config import Configured, current
from jacdiag_cli.options import PROBE, SOURCE, add
from jacdiag_cli.progress import bar
from jacdiag_cli.streams import (
    CommandInvocation,
    TableColumn,
    clipped,
    emit,
    grid,
    model_output,
    room,
    say,
)

if TYPE_CHECKING:
    from jacdiag.sources import Source
    from jacdiag.trace import Sites

_GROUPS = {"embedding": "embedding", "head": "head", "norms": "norms outside"}


@click.command(
    cls=Configured, short_help="Shows the sub-layers found, and where parameters belong."
)
@add(SOURCE, PROBE)
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["pretty", "json"]),
    default="pretty",
    show_default=True,
    help="Of what is printed.",
)
@click.pass_obj
def sites(invocation: CommandInvocation, source: str, output_format: str, **given: Any) -> None:
    """Shows the residual sub-layers of a model, and where each of its parameters belongs.

    Nothing is measured: the model runs a few times on the probe. SOURCE is as for `jacdiag audit`.
    What was recorded is shown also where there is no sub-layer in it; a line on stderr then says
    that an audit cannot run.

    A fused operation may hide a sub-layer from the dataflow. Declare it in pyproject.toml or
    jacdiag.toml, its shortcut by the module that is given it, its branch by the module that returns
    it ("PATH:in" and "PATH:out" say which end is meant; "*" is one part of a path, the same in
    both):

    \b
      [tool.jacdiag.sites.attention]
      shortcut = "layers.*.norm1"
      branch = "layers.*.attn"

    \b
    Example:
      jacdiag sites build.py:model
    """
    with model_output(), bar("reading the model", invocation.heed):
        loaded, found = _trace(source, given)
        data = describe(loaded, found)
    invocation.heed()
    if output_format == "json":
        emit(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "json")
    else:
        emit(_page(data, room()))
    if not data["sublayers"]:
        way = (
            "declare what is hidden, in [tool.jacdiag.sites]"
            if data["hidden"]
            else "see what was recorded"
        )
        say(
            f"no sub-layer was found: `jacdiag audit` cannot run on this model (exit code 2); {way}"
        )


def _trace(source: str, given: dict[str, Any]) -> tuple[Source, Sites]:
    import torch

    from jacdiag.sources import build_probe, load
    from jacdiag.sources.device_choice import pick
    from jacdiag.sources.probe import check_one_probe
    from jacdiag.trace import sites as trace

    # 1. The model.
    check_one_probe(tokens=given["tokens"], input_factory=given["inputs"])
    device = pick(given["device"])
    loaded = load(
        source,
        **{name: given[name] for name in ("model", "model_args", "key", "trust_pickle", "seed")},
    )
    if loaded.model is None:
        raise SourceError(
            f"'{source}' holds weights, and no model that they belong to is known",
            got=loaded.why_weights or None,
            hint="--model FACTORY builds it; `jacdiag audit` looks at the weights alone",
        )
    loaded.to(device)

    # 2. What the model is run on.
    probe_options = {name: given[name] for name in ("batch", "seq", "seed", "tokens", "inputs")}
    probe = build_probe(loaded, **probe_options, trust_code=given["trust_pickle"])
    if device.type != "cpu":
        probe = probe.to(device)

    # 3. One forward, recorded.
    dtype = {"float32": torch.float32, "float64": torch.float64}[given["dtype"]]
    declared = current().sites
    weights = loaded.weights
    with probe.suspected():
        sublayers = trace(
            loaded.model,
            *probe.args,
            dtype=dtype,
            declared=declared,
            weights=weights,
            **probe.kwargs,
        )
    return loaded, sublayers


def describe(loaded: Source, found: Sites) -> dict[str, Any]:
    """Return all that the command prints as plain data: the sub-layers, and every parameter."""
    params, coverage = found.skeleton.outlines, found.coverage
    covered = coverage.covered()
    return {
        "source": loaded.info,
        "model": {
            "class": type(loaded.model).__name__,
            "parameters": sum(p.numel() for p in params.values()),
            "covered_parameters": sum(p.numel() for name, p in params.items() if name in covered),
            "layers": found.layers,
        },
        "sublayers": [
            {
                "index": site.index,
                "name": site.name,
                "depth": site.depth,
                "kind": site.kind,
                "placement": site.placement,
                "parallel": site.parallel,
                "nested": site.nested,
                "shape": list(site.shortcut.shape),
                "parameters": {name: list(params[name].shape) for name in site.parameters},
                "line": site.line,
            }
            for site in found
        ],
        **{
            key: {name: list(params[name].shape) for name in getattr(coverage, key)}
            for key in _GROUPS
        },
        "uncovered": {
            name: {"shape": list(params[name].shape), "reason": why}
            for name, why in coverage.uncovered.items()
        },
        "deterministic": found.deterministic,
        "culprit": found.culprit or None,
        "left_out": [asdict(item) for item in found.left_out],
        "hidden": found.hidden,
        "notes": found.notes,
        "calls": dict(Counter(node.name for node in found.graph.nodes).most_common()),
    }


def _page(data: dict[str, Any], width: int | None) -> str:
    from jacdiag.render.content.sentences import read_words
    from jacdiag.render.terminal.report import packed

    head = [*packed(_head(data), width), *packed(read_words(data["source"]), width)]
    parts = ["".join(f"{line}\n" for line in head if line)]
    parts.append(
        grid(_columns(data["sublayers"]), width, "json") if data["sublayers"] else _nothing(data)
    )
    parts.append(_elsewhere(data, width))
    if data["uncovered"]:
        parts.append(_uncovered(data["uncovered"], width))
    parts.append(_remarks(data))
    return "\n".join(part for part in parts if part)


def _head(data: dict[str, Any]) -> list[str]:
    from jacdiag.records.number_format import share
    from jacdiag.render.content.sentences import plural

    model = data["model"]
    parts = [
        model["class"],
        f"{plural(len(data['sublayers']), 'sub-layer')} in {plural(model['layers'], 'layer')}",
        f"{model['parameters']:,} parameters, "
        f"{share(model['covered_parameters'], model['parameters'])} covered",
    ]
    if data["left_out"]:
        parts.append(f"{plural(len(data['left_out']), 'residual sum')} left out")
    return parts + ([] if data["deterministic"] else ["two runs gave different outputs"])


def _columns(rows: list[dict[str, Any]]) -> list[TableColumn]:
    return [
        TableColumn("index", [str(row["index"]) for row in rows], 6, right=True),
        TableColumn("sub-layer", [row["name"] for row in rows]),
        TableColumn("kind", [row["kind"] for row in rows], 9),
        TableColumn("norm", [row["placement"] for row in rows], 8),
        TableColumn("parallel", [_both(row) for row in rows], 5),
        TableColumn("shape", [_times(row["shape"]) for row in rows], 4),
        TableColumn(
            "parameters", [f"{_count(row['parameters'].values()):,}" for row in rows], 7, right=True
        ),
        TableColumn("added at", [_near(row["line"]) for row in rows], 3),
    ]


def _near(line: str) -> str:
    """Return a source line relative to the current folder, or else to the folder that it is in."""
    path, _, number = line.rpartition(":")
    with contextlib.suppress(ValueError):
        return f"{Path(path).relative_to(Path.cwd())}:{number}"
    return "/".join([*Path(path).parts[-2:-1], f"{Path(path).name}:{number}"]) if path else line


def _both(row: dict[str, Any]) -> str:
    return ", ".join(word for word in ("parallel", "nested") if row[word]) or "-"


def _nothing(data: dict[str, Any]) -> str:
    calls = ", ".join(f"{name} {count}" for name, count in list(data["calls"].items())[:12])
    return (
        "No residual sub-layer was found. Looked for y = a x + f(x) in the dataflow, f with a "
        "matrix product in it.\n"
        f"{sum(data['calls'].values())} calls were recorded: {calls}\n"
    )


def _elsewhere(data: dict[str, Any], width: int | None) -> str:
    lines = []
    for key, title in _GROUPS.items():
        if data[key]:
            lines.append(
                clipped(
                    f"{title:<13}  {_count(data[key].values()):>13,}  {', '.join(data[key])}", width
                )
            )
    return "".join(f"{line}\n" for line in lines)


def _uncovered(uncovered: dict[str, dict[str, Any]], width: int | None) -> str:
    names = list(uncovered)
    columns = [
        TableColumn("not covered", names),
        TableColumn("shape", [_times(uncovered[name]["shape"]) for name in names], 1),
        TableColumn("reason", [uncovered[name]["reason"] for name in names], 2),
    ]
    return grid(columns, width, "json")


def _remarks(data: dict[str, Any]) -> str:
    """Return what was hidden, with the way to declare it, and further notes; never cut off."""
    unlike = [f"two runs differ: {data['culprit']}"] if data["culprit"] else []
    left_out = [
        f"left out: {item['module'] or 'the model itself'} at {item['line']}: {item['reason']}"
        for item in data["left_out"]
    ]
    hidden = [f"hidden: {line}" for line in data["hidden"]]
    notes = [f"note: {line}" for line in data["notes"]]
    lines = [*unlike, *left_out, *hidden, *notes]
    return "".join(f"{line}\n" for line in lines)


def _times(shape: list[int]) -> str:
    return " x ".join(str(size) for size in shape) or "()"


def _count(shapes: Any) -> int:
    import math

    return sum(math.prod(shape) for shape in shapes)
