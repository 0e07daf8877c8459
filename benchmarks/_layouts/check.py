"""One layout, checked: `jacdiag audit FOLDER` opens it, and its weights are those of
`from_pretrained`.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from _coverage.build import facts_of
from _coverage.expect import family_facts
from jacdiag_cli.main import main
from torch import nn

from _layouts.catalog import Layout, Refused
from _layouts.write import write_layout, write_refused
from jacdiag.sources import Source, load

OPTIONS = (
    *("--seq", "16", "--batch", "1", "--decide", "--max-products", "8"),
    *("--remedies", "none", "--fail-on", "never"),
)


@dataclass
class Outcome:
    """What one layout showed. `problems` is empty where every check held."""

    name: str
    shows: str
    files: str
    exit_code: int = -1
    architecture: str = ""
    expected: int = 0
    found: int = 0
    weights: int = 0
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def check_layout(layout: Layout) -> dict[str, Any]:
    """Write, audit and compare one layout."""
    shards = "" if layout.files.shards == 1 else f", {layout.files.shards} shards"
    out = Outcome(layout.name, layout.shows, f"{layout.files.kind}{shards}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "folder"
        folder.mkdir()
        config = write_layout(layout, folder)
        out.expected = (
            layout.count
            or family_facts(layout.task, config, facts_of(layout.task, layout.family)).count
        )
        _audit(out, folder)
        if out.exit_code == 0:
            _compare(out, layout, folder)
    return asdict(out)


def _audit(out: Outcome, folder: Path) -> None:
    report_file = folder.parent / "report.json"
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        out.exit_code = main(["audit", str(folder), "--json", str(report_file), *OPTIONS])
    if out.exit_code != 0:
        out.problems.append(f"exit code {out.exit_code}: {said.getvalue().strip()[:400]}")
        return
    report = json.loads(report_file.read_text())
    out.found = sum(not record.get("nested") for record in report["sublayers"])
    out.architecture = report["source"]["architecture"]
    out.notes = report["notes"]
    if out.found != out.expected:
        out.problems.append(f"{out.found} sub-layers, the config has {out.expected}")


def _compare(out: Outcome, layout: Layout, folder: Path) -> None:
    """Compare every weight with what transformers loads by itself."""
    import transformers

    wanted = layout.loaded_as or layout.opened or layout.saved
    if out.architecture != wanted:
        out.problems.append(f"opened as {out.architecture}, not as {wanted}")
        return
    if layout.note and not any(layout.note in note for note in out.notes):
        out.problems.append(f"no note says {layout.note}")
    if not layout.note and any("left out" in note for note in out.notes):
        out.problems.append("a note says that weights are left out")

    kind = getattr(transformers, wanted)
    expected = kind.from_pretrained(
        folder, config=_config_of(kind, folder), dtype=torch.float32, local_files_only=True
    )
    ours = _all_weights(load(str(folder)))
    theirs = expected.state_dict()
    differing = [name for name, tensor in theirs.items() if not _equal(ours.get(name), tensor)]
    out.weights = len(theirs)
    if differing:
        out.problems.append(
            f"{len(differing)} weights differ from from_pretrained: {', '.join(differing[:3])}"
        )


def _equal(ours: torch.Tensor | None, theirs: torch.Tensor) -> bool:
    return ours is not None and torch.equal(ours.to(theirs.dtype), theirs)


def _config_of(kind: Any, folder: Path) -> Any:
    data = json.loads((folder / "config.json").read_text())
    return kind.config_class.from_dict(data)


def _all_weights(source: Source) -> dict[str, torch.Tensor]:
    model: nn.Module | None = source.model
    assert model is not None
    state = dict(model.state_dict())
    if source.weights is not None:
        state |= {name: source.weights[name] for name in source.weights}
    return state


def check_refused(case: Refused) -> dict[str, Any]:
    """Check that a folder is refused with exit code 2, and that the error says what it must."""
    out = Outcome(case.name, "refused", "")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "folder"
        folder.mkdir()
        write_refused(case, folder)
        said = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            out.exit_code = main(["audit", str(folder), *OPTIONS])
        text = said.getvalue().replace(str(folder), "FOLDER").strip()
        out.notes = [text]
        if out.exit_code != 2:
            out.problems.append(f"exit code {out.exit_code}, not 2")
        out.problems += [
            f"the error does not say {word!r}: {text[:300]}"
            for word in case.says
            if word not in text
        ]
    return asdict(out)
