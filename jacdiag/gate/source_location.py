"""The place of a finding in the user's code: file and line of the class of its module."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from jacdiag.errors import JacdiagError
from jacdiag.records import Finding
from jacdiag.sources.factory import resolve

_INSTALLED = frozenset({"site-packages", "dist-packages"})  # folders of installed packages


def located(
    findings: Sequence[Finding], model: nn.Module | None, spec: str, root: Path | None = None
) -> list[Finding]:
    """Return findings with evidence["location"], {"file", "line"}, relative to `root`.

    That is the working folder by default. A place outside of it is not named.

    Of the module of a finding and those around it, the first whose class lies below `root` is
    named; else the factory, else the file that the source is.

    Args:
        findings: of a report.
        model: that was audited; None if there are only weights.
        spec: the source, as it was named.
        root: the folder that places must be in.
    """
    base = Path(os.path.realpath(root or Path.cwd()))
    fallback = _fallback(spec, base)
    with_places = []
    for finding in findings:
        # 1. The class of its module, if that is the user's own.
        place = fallback
        if model is not None:
            place = _class_of(model, _first_name(finding), base) or fallback

        # 2. Say it in the evidence.
        if place is not None:
            finding = replace(finding, evidence={**finding.evidence, "location": place})
        with_places.append(finding)
    return with_places


def _first_name(finding: Finding) -> str:
    """Return the first parameter that a finding is about, else its first place; "" for none."""
    names = [*finding.evidence.get("parameters", ()), *finding.where]
    if not names:
        return ""

    # A parameter says more than its sub-layer.
    return str(names[0])


def _class_of(model: nn.Module, name: str, base: Path) -> dict[str, Any] | None:
    """Return the place of the innermost class below `base` around a name; None if there is none."""
    for module in _outwards(model, name):
        place = _lines(type(module), base)
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


def _lines(definition: Any, base: Path) -> dict[str, Any] | None:
    """Return the place of a class or function; None if its source is not known or not in `base`."""
    try:
        file = inspect.getsourcefile(definition)
        line = inspect.getsourcelines(definition)[1]
    except (OSError, TypeError):
        return None
    return _relative(file, max(line, 1), base)


def _relative(file: str | Path | None, line: int, base: Path) -> dict[str, Any] | None:
    """Return a place relative to `base`; None if it is outside, or in an installed package."""
    if file is None:
        return None

    real = Path(os.path.realpath(file))
    if not real.is_relative_to(base):
        return None

    # A virtual environment may lie in the working folder.
    is_installed = not _INSTALLED.isdisjoint(real.parts)
    if is_installed:
        return None
    return {"file": real.relative_to(base).as_posix(), "line": line}


def _fallback(spec: str, base: Path) -> dict[str, Any] | None:
    """Return the factory's own line, or the config or the checkpoint itself."""
    if not spec:
        return None

    # 1. A config of transformers, or the folder that holds one.
    if spec.startswith("hf:"):
        config = Path(spec.removeprefix("hf:"))
        if config.is_dir():
            config = config / "config.json"
        return _relative(config, 1, base)

    # 2. A checkpoint.
    if Path(spec).exists():
        return _relative(spec, 1, base)

    # 3. A factory: its definition, or else its file.
    try:
        definition = resolve(spec)
    except JacdiagError:
        return None
    file = spec.rpartition(":")[0]
    return _lines(definition, base) or _relative(file, 1, base)
