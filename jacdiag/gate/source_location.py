"""Where in the user's code a finding belongs: the file and line of the class of the module it
speaks of.
"""

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


def located(
    findings: Sequence[Finding], model: nn.Module | None, spec: str, root: Path | None = None
) -> list[Finding]:
    """Findings with evidence["location"], {"file", "line"}: relative to `root` (the working
    folder), which holds it.

    Of the modules from the one a finding speaks of outwards, the first whose class lies below
    `root` is named; else the factory, else the file that the source is.
    """
    base = Path(os.path.realpath(root or Path.cwd()))
    fallback = _fallback(spec, base)
    found = []
    for finding in findings:
        names = [*finding.evidence.get("parameters", ()), *finding.where]
        place = _class_of(model, names[0] if names else "", base) if model is not None else None
        place = place or fallback
        evidence = finding.evidence if place is None else {**finding.evidence, "location": place}
        found.append(replace(finding, evidence=evidence))
    return found


def _class_of(model: nn.Module, name: str, base: Path) -> dict[str, Any] | None:
    for module in _outwards(model, name):
        place = _lines(type(module), base)
        if place is not None:
            return place
    return None


def _outwards(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The module that a name leads to, as far as it does, and those around it, innermost first."""
    chain, here = [model], model
    for part in name.replace(":", ".").replace("@", ".").split("."):
        child = here._modules.get(part)
        if child is None:
            break
        chain.append(child)
        here = child
    yield from reversed(chain)


def _lines(thing: Any, base: Path) -> dict[str, Any] | None:
    try:
        file = inspect.getsourcefile(thing)
        line = inspect.getsourcelines(thing)[1]
    except (OSError, TypeError):
        return None
    return _relative(file, max(line, 1), base)


def _relative(file: str | Path | None, line: int, base: Path) -> dict[str, Any] | None:
    if file is None:
        return None
    real = Path(os.path.realpath(file))
    if not real.is_relative_to(base) or {"site-packages", "dist-packages"} & set(real.parts):
        return None
    return {"file": real.relative_to(base).as_posix(), "line": line}


def _fallback(spec: str, base: Path) -> dict[str, Any] | None:
    """The factory's own line; the config or the checkpoint itself."""
    if not spec:
        return None
    if spec.startswith("hf:"):
        path = Path(spec.removeprefix("hf:"))
        return _relative(path / "config.json" if path.is_dir() else path, 1, base)
    if Path(spec).exists():
        return _relative(spec, 1, base)
    try:
        return _lines(resolve(spec), base) or _relative(spec.rpartition(":")[0], 1, base)
    except JacdiagError:
        return None
