"""The place of a finding in the user's code, as exact as it is known.

It is the line that draws the weight, the class of its module, the factory, or a file.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from jacdiag.errors import JacdiagError
from jacdiag.gate.init_lines import CodeLine, is_users_own
from jacdiag.records import Finding
from jacdiag.sources.factory import resolve


def located(
    findings: Sequence[Finding],
    model: nn.Module | None,
    spec: str,
    root: Path | None = None,
    lines: Mapping[str, CodeLine] | None = None,
) -> list[Finding]:
    """Return findings with evidence["location"], {"file", "line", "what", "name"}.

    "file" is relative to `root`. A place outside of it is not named. "what" is the first of these
    that is known:

    - "draw": the line that wrote the weight last
    - "class": the class of the module, or of one around it
    - "factory": the function that builds the model
    - "file": the file that the source is; "line" is then 1 and says nothing

    "name" is that of the weight, the class or the factory, "" for a file.

    Args:
        findings: of a report.
        model: that was audited; None if there are only weights.
        spec: the source, as it was named.
        root: the folder that places must be in; by default the working folder.
        lines: that drew the weights, by the names of the parameters.
    """
    base = Path(os.path.realpath(root or Path.cwd()))
    fallback = _fallback(spec, base)
    with_places = []
    for finding in findings:
        # 1. The line that draws its weight, else the class of its module.
        place = _line_of_draw(finding, lines or {}, base)
        if place is None and model is not None:
            place = _class_of(model, _first_name(finding), base)

        # 2. Else what was named on the command line.
        if place is None:
            place = fallback

        # 3. Say it in the evidence.
        if place is not None:
            finding = replace(finding, evidence={**finding.evidence, "location": place})
        with_places.append(finding)
    return with_places


def _line_of_draw(
    finding: Finding, lines: Mapping[str, CodeLine], base: Path
) -> dict[str, Any] | None:
    """Return the line that draws the first weight of a finding; None if it is not known."""
    parameters = [str(name) for name in finding.evidence.get("parameters", ())]
    if not parameters or parameters[0] not in lines:
        return None
    first = parameters[0]
    return _relative(lines[first].file, lines[first].line, base, "draw", first)


def _first_name(finding: Finding) -> str:
    """Return the first parameter that a finding is about, else a sub-layer; "" for none."""
    # 1. A parameter says more than its sub-layer.
    names = [*finding.evidence.get("parameters", ())]

    # 2. The sub-layer that the sentence names, which need not be the first one.
    if finding.evidence.get("sublayer"):
        names.append(finding.evidence["sublayer"])

    names += finding.where
    if not names:
        return ""
    return str(names[0])


def _class_of(model: nn.Module, name: str, base: Path) -> dict[str, Any] | None:
    """Return the place of the innermost class below `base` around a name; None if there is none."""
    for module in _outwards(model, name):
        place = _lines(type(module), base, "class")
        if place is not None:
            return place
    return None


def _outwards(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """Yield the module that a name leads to and those around it, innermost first."""
    chain = [model]
    for part in name.replace(":", ".").replace("@", ".").split("."):
        child = chain[-1]._modules.get(part)
        # What follows is no module: a parameter, or a place in the code.
        if child is None:
            break
        chain.append(child)
    yield from reversed(chain)


def _lines(definition: Any, base: Path, what: str) -> dict[str, Any] | None:
    """Return the place of a class or function; None if its source is not known or not in `base`."""
    try:
        file = inspect.getsourcefile(definition)
        line = inspect.getsourcelines(definition)[1]
    except (OSError, TypeError):
        return None
    name = str(getattr(definition, "__qualname__", ""))
    return _relative(file, max(line, 1), base, what, name)


def _relative(
    file: str | Path | None, line: int, base: Path, what: str, name: str = ""
) -> dict[str, Any] | None:
    """Return a place relative to `base`; None if it is outside, or in an installed package."""
    if file is None:
        return None

    real = Path(os.path.realpath(file))
    if not is_users_own(real, base):
        return None
    place = real.relative_to(base).as_posix()
    return {"file": place, "line": line, "what": what, "name": name}


def _fallback(spec: str, base: Path) -> dict[str, Any] | None:
    """Return the factory's own line, or the config or the checkpoint itself."""
    if not spec:
        return None

    # 1. A config of transformers, or the folder that holds one.
    if spec.startswith("hf:"):
        config = Path(spec.removeprefix("hf:"))
        if config.is_dir():
            config = config / "config.json"
        return _relative(config, 1, base, "file")

    # 2. A checkpoint.
    if Path(spec).exists():
        return _relative(spec, 1, base, "file")

    # 3. A factory: its definition, or else its file.
    try:
        definition = resolve(spec)
    except JacdiagError:
        return None
    file = spec.rpartition(":")[0]
    return _lines(definition, base, "factory") or _relative(file, 1, base, "file")
