"""`jacdiag sites SOURCE`: the sub-layers that were found, and where every parameter went."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
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
    from torch import Tensor

    from jacdiag.sources import Source
    from jacdiag.trace import Sites
    from jacdiag.trace.sublayer import Sublayer

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

    The model runs a few times on the probe, and nothing is measured. SOURCE is the same as for
    `jacdiag audit`. If no sub-layer is found, the command shows which operations it recorded.

    A fused operation may hide a sub-layer. Declare such a sub-layer in pyproject.toml or
    jacdiag.toml. `shortcut` names the module that receives the shortcut. `branch` names the module
    that returns the branch. "PATH:in" and "PATH:out" choose its input or its output. "*" stands for
    one part of a path, and is the same in both:

    \b
      [tool.jacdiag.sites.attention]
      shortcut = "layers.*.norm1"
      branch = "layers.*.attn"

    \b
    Example:
      jacdiag sites build.py:model
    """
    with model_output(), bar("reading the model", invocation.heed):
        loaded, traced = _trace(source, given)
        data = describe(loaded, traced)
    invocation.heed()

    # 1. What was found.
    if output_format == "json":
        emit(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "json")
    else:
        emit(_page(data, room()))

    # 2. What to do next.
    if not data["sublayers"]:
        way = "the recorded operations are listed above"
        if data["hidden"]:
            way = "declare the hidden sub-layers in [tool.jacdiag.sites]"
        say(
            f"no sub-layer was found: `jacdiag audit` cannot run on this model (exit code 2); {way}"
        )


def _trace(source: str, given: dict[str, Any]) -> tuple[Source, Sites]:
    """Load a model, and record one forward of it.

    Raises:
        SourceError: there are weights and no model.
    """
    import torch

    from jacdiag.devices.device_choice import check_precision, pick
    from jacdiag.sources import build_probe, load
    from jacdiag.sources.probe import check_one_probe
    from jacdiag.trace import sites as trace

    # 1. The model.
    check_one_probe(tokens=given["tokens"], input_factory=given["inputs"])
    device = pick(given["device"])
    dtype = {"float32": torch.float32, "float64": torch.float64}[given["dtype"]]
    check_precision(device, dtype)
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
    check_precision(device, dtype, loaded.model.parameters())
    loaded.to(device)

    # 2. What the model is run on.
    probe_options = {name: given[name] for name in ("batch", "seq", "seed", "tokens", "inputs")}
    probe = build_probe(loaded, **probe_options, trust_code=given["trust_pickle"])
    if device.type != "cpu":
        probe = probe.to(device)

    # 3. One forward, recorded.
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
    # 1. The model, and the sub-layers with their parameters.
    params = found.skeleton.outlines
    data: dict[str, Any] = {
        "source": loaded.info,
        "model": _describe_model(loaded, found),
        "sublayers": [_describe_sublayer(site, params) for site in found],
    }

    # 2. The parameters outside them.
    coverage = found.coverage
    for group in _GROUPS:
        data[group] = _shapes_of(getattr(coverage, group), params)
    data["uncovered"] = {
        name: {"shape": list(params[name].shape), "reason": why}
        for name, why in coverage.uncovered.items()
    }

    # 3. What the trace says of itself.
    calls = Counter(node.name for node in found.graph.nodes)
    data |= {
        "deterministic": found.deterministic,
        "culprit": found.culprit or None,
        "left_out": list(map(asdict, found.left_out)),
        "hidden": found.hidden,
        "notes": found.notes,
        "calls": dict(calls.most_common()),
    }
    return data


def _describe_model(loaded: Source, found: Sites) -> dict[str, Any]:
    """Return the size of the model, and how much of it belongs somewhere."""
    sizes = {name: tensor.numel() for name, tensor in found.skeleton.outlines.items()}
    covered = found.coverage.covered()
    return {
        "class": type(loaded.model).__name__,
        "parameters": sum(sizes.values()),
        "covered_parameters": sum(size for name, size in sizes.items() if name in covered),
        "layers": found.layers,
    }


def _describe_sublayer(site: Sublayer, params: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a sub-layer as plain data."""
    return {
        "index": site.index,
        "name": site.name,
        "depth": site.depth,
        "kind": site.kind,
        "placement": site.placement,
        "norm_inside": site.norm_inside,
        "parallel": site.parallel,
        "nested": site.nested,
        "shape": list(site.shortcut.shape),
        "parameters": _shapes_of(site.parameters, params),
        "line": site.line,
    }


def _shapes_of(names: Iterable[str], params: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return the shapes of some parameters by name."""
    return {name: list(params[name].shape) for name in names}


def _page(data: dict[str, Any], width: int | None) -> str:
    """Return all that the command prints for people.

    Args:
        data: as plain data.
        width: of the terminal; None for no limit.
    """
    from jacdiag.render.content.sentences import read_words
    from jacdiag.render.terminal.report import packed

    # 1. The model, and what was read of its file.
    head = [*packed(_head(data), width), *packed(read_words(data["source"]), width)]
    sections = [_as_lines(filter(None, head))]

    # 2. Its sub-layers.
    if data["sublayers"]:
        sections.append(grid(_columns(data["sublayers"]), width, "json"))
    else:
        sections.append(_nothing(data))

    # 3. Its other parameters.
    sections.append(_elsewhere(data, width))
    if data["uncovered"]:
        sections.append(_uncovered(data["uncovered"], width))

    # 4. What limits all this.
    sections.append(_remarks(data))
    return "\n".join(filter(None, sections))


def _as_lines(texts: Iterable[str]) -> str:
    """Return texts, each on a line that ends."""
    return "".join(f"{text}\n" for text in texts)


def _head(data: dict[str, Any]) -> list[str]:
    """Return the model in facts: its class, its size, what is covered of it."""
    from jacdiag.records.number_format import share
    from jacdiag.render.content.sentences import plural

    # 1. Its size.
    model = data["model"]
    sublayers = plural(len(data["sublayers"]), "sub-layer")
    covered = share(model["covered_parameters"], model["parameters"])
    facts = [
        model["class"],
        f"{sublayers} in {plural(model['layers'], 'layer')}",
        f"{model['parameters']:,} parameters, {covered} covered",
    ]

    # 2. What is unusual about it.
    if data["left_out"]:
        facts.append(f"{plural(len(data['left_out']), 'residual sum')} left out")
    if not data["deterministic"]:
        facts.append("two runs gave different outputs")
    return facts


def _columns(rows: list[dict[str, Any]]) -> list[TableColumn]:
    """Return the table of sub-layers; on a narrow terminal the line of code goes first."""
    from jacdiag.render.content.shared_names import shown_names

    names = shown_names({row["name"]: row["depth"] for row in rows})

    def cells(write: Callable[[dict[str, Any]], str]) -> list[str]:
        return [write(row) for row in rows]

    return [
        TableColumn("layer", cells(lambda row: str(row["depth"])), 7, right=True),
        TableColumn("sub-layer", cells(lambda row: names[row["name"]])),
        TableColumn("kind", cells(lambda row: row["kind"]), 9),
        TableColumn("norm", cells(_norm_of), 8),
        TableColumn("parallel", cells(_both), 5),
        TableColumn("shape", cells(lambda row: _times(row["shape"])), 4),
        TableColumn("parameters", cells(_parameter_count), 7, right=True),
        TableColumn("added at", cells(lambda row: _near(row["line"])), 3),
    ]


def _norm_of(row: dict[str, Any]) -> str:
    """Return where the norm of a sub-layer stands; "inside" if it is at neither end."""
    # 1. At an end of the branch, or after the sum.
    placement = str(row["placement"])
    if placement != "none":
        return placement

    # 2. Between its ends, or nowhere.
    if row["norm_inside"]:
        return "inside"
    return placement


def _parameter_count(row: dict[str, Any]) -> str:
    """Return how many numbers the parameters of a sub-layer hold."""
    return f"{_count(row['parameters'].values()):,}"


def _near(line: str) -> str:
    """Return a source line relative to the current folder, or else to the folder that it is in."""
    path, _, number = line.rpartition(":")
    with contextlib.suppress(ValueError):
        return f"{Path(path).relative_to(Path.cwd())}:{number}"
    if not path:
        return line  # no place is known
    folder = Path(path).parts[-2:-1]
    return "/".join([*folder, f"{Path(path).name}:{number}"])


def _both(row: dict[str, Any]) -> str:
    """Return whether a sub-layer is parallel to another, or nested in one."""
    words = [word for word in ("parallel", "nested") if row[word]]
    if not words:
        return "-"
    return ", ".join(words)


def _nothing(data: dict[str, Any]) -> str:
    """Return what was looked for where no sub-layer was found, and the calls that were recorded."""
    most_frequent = list(data["calls"].items())[:12]
    calls = ", ".join(f"{name} {count}" for name, count in most_frequent)
    total = sum(data["calls"].values())
    return (
        "No residual sub-layer was found. A sub-layer is a sum y = a x + f(x) in which f has a "
        "matrix product.\n"
        f"{total} calls were recorded: {calls}\n"
    )


def _elsewhere(data: dict[str, Any], width: int | None) -> str:
    """Return a line for each group of parameters outside the sub-layers."""
    lines = []
    for key, title in _GROUPS.items():
        group = data[key]
        if not group:
            continue
        line = f"{title:<13}  {_count(group.values()):>13,}  {', '.join(group)}"
        lines.append(clipped(line, width))
    return _as_lines(lines)


def _uncovered(uncovered: dict[str, dict[str, Any]], width: int | None) -> str:
    """Return the parameters that no figure covers, each with the reason."""
    shapes, reasons = [], []
    for parameter in uncovered.values():
        shapes.append(_times(parameter["shape"]))
        reasons.append(parameter["reason"])
    columns = [
        TableColumn("not covered", list(uncovered)),
        TableColumn("shape", shapes, 1),
        TableColumn("reason", reasons, 2),
    ]
    return grid(columns, width, "json")


def _remarks(data: dict[str, Any]) -> str:
    """Return what was hidden, with the way to declare it, and further notes; never cut off."""
    from jacdiag.render.content.sentences import counted_once

    # 1. What differs between two runs.
    lines = []
    if data["culprit"]:
        lines.append(f"two runs differ: {data['culprit']}")

    # 2. Sums that are residual and no sub-layer. A loop makes one many times.
    left_out = []
    for item in data["left_out"]:
        module = item["module"] or "the model itself"
        left_out.append(f"left out: {module} at {item['line']}: {item['reason']}")
    lines += counted_once(left_out)

    # 3. What the dataflow does not show.
    lines += [f"hidden: {line}" for line in data["hidden"]]
    lines += [f"note: {line}" for line in data["notes"]]
    return _as_lines(lines)


def _times(shape: list[int]) -> str:
    """Return a shape such as "768 x 3072"; that of a scalar is "()"."""
    return " x ".join(map(str, shape)) or "()"


def _count(shapes: Any) -> int:
    """Return how many numbers tensors of some shapes hold together."""
    import math

    return sum(map(math.prod, shapes))
