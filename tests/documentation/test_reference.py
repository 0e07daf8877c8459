"""The reference names everything that is public, and nothing that is not there."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from documentation.example_files import build_model
from jacdiag_cli.main import cli

import jacdiag
from jacdiag.rules import EVERY
from scripts.docs import generated
from scripts.docs.repository_files import ROOT

PYTHON_PAGES = sorted((ROOT / "docs" / "reference" / "python").glob("*.md"))
PATHS = [
    path
    for page in PYTHON_PAGES
    for path in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
]
PACKAGES = [
    "jacdiag",
    "jacdiag.backtest",
    "jacdiag.comparison",
    "jacdiag.gate",
    "jacdiag.monitor",
    "jacdiag.testing",
    "jacdiag.trace",
]


def resolve(path: str) -> Any:
    """Return the object of a dotted path."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_python_reference(package: str) -> None:
    documented = [resolve(path) for path in PATHS]
    missing = []
    for name in importlib.import_module(package).__all__:
        value = getattr(importlib.import_module(package), name)
        if name != "__version__" and not any(value is other for other in documented):
            missing.append(name)
    assert missing == []


def test_the_overview_names_every_name_of_the_package() -> None:
    overview = (ROOT / "docs" / "reference" / "python" / "index.md").read_text(encoding="utf-8")
    assert [name for name in jacdiag.__all__ if f"`jacdiag.{name}`" not in overview] == []


def test_every_command_has_a_page_with_all_its_options() -> None:
    for name, command in cli.commands.items():
        page = generated.pages()[f"reference/cli/{name}.md"]
        table = generated.filled("<!-- generated: commands -->")
        assert f"[`jacdiag {name}`]({name}.md)" in table
        for param in command.params:
            if param.param_type_name == "option":
                assert all(f"`{option}`" in page for option in param.opts), (name, param.opts)


def test_every_rule_has_a_page_and_a_row() -> None:
    table = generated.filled("<!-- generated: rules -->")
    for rule in EVERY:
        assert f"| [{rule.code}]({rule.code}.md) | {rule.name} | {rule.level} |" in table
        page = generated.pages()[f"rules/{rule.code}.md"]
        assert page.startswith(f"# {rule.code} {rule.name}\n")
        assert rule.page.remedy in page


def test_the_report_page_has_every_key_of_a_report() -> None:
    table = generated.filled("<!-- generated: report fields -->")
    report = jacdiag.audit(build_model(), torch.randint(256, (1, 8)), remedies="none")
    missing = {key for key in keys_of(json.loads(report.to_json())) if f"| `{key}` |" not in table}
    assert missing == set()


def keys_of(report: dict[str, Any]) -> set[str]:
    """Return the keys of a report, of its sub-layers, of its network and of its findings."""
    tables = [report, *report["sublayers"], report["network"], *report["findings"]]
    return {key for table in tables for key in table}


def test_the_page_of_the_run_log_has_every_key_that_a_watch_writes(tmp_path: Path) -> None:
    # 1. A short run with statistics, a probe, and a loss that is not finite at its end.
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"every": 2, "stats_every": 2, "log_every": 2, "quiet": True}
    watch = jacdiag.watch(model, optimizer, log_dir=tmp_path / "run", **options)
    for step in range(1, 5):
        batch = torch.randint(256, (1, 17))
        loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.step(loss if step < 4 else loss * float("nan"), grad_norm=1.0, step=step)
    watch.close()

    # 2. The page names each type and each key.
    page = (ROOT / "docs" / "reference" / "run-log.md").read_text(encoding="utf-8")
    kinds = set()
    for line in (tmp_path / "run" / "run.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        kinds.add(row["type"])
        assert f"`{row['type']}`" in page
        assert {key for key in row if f"`{key}`" not in page} == set()
    assert {"run", "step", "stats", "probe", "alert", "end"} <= kinds


def test_thresholds_and_options_are_in_the_configuration_page() -> None:
    thresholds = generated.filled("<!-- generated: thresholds -->")
    assert "| `norm_gain` | 3.87 | 8.64 |" in thresholds
    options = generated.filled("<!-- generated: configuration options -->")
    assert "| `fail-on` |" in options
    assert "| `trust-pickle` |" not in options
