"""What users may rely on: options and defaults of the commands, names in Python, keys in JSON.

Adding one is a change of these lists. Removing or renaming one breaks what users have written.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click
import pytest

import jacdiag

# Options that several commands share.
# Where the model comes from and what it is run on.
INPUT = {
    "--key",
    "--model",
    "--tokens",
    "--inputs",
    "--batch",
    "--seq",
    "--seed",
    "--device",
    "--dtype",
}
FACTORY = {"--model-args", "--trust-pickle"}
# How narrow the intervals are.
PRECISION = {"--tol", "--confidence", "--decide", "--no-decide", "--max-products"}
# What is judged, and what is written.
VERDICT = {
    "--state",
    "--lr",
    "--warmup",
    "--clip",
    "--beta2",
    "--profile",
    "--select",
    "--ignore",
    "--fail-on",
    "--json",
    "--plot",
    "--html",
    "--sort",
    "--contract",
    "--remedies",
    "--patch",
    "--risk",
    "--confidence-all",
}
COMMANDS = {
    "audit": INPUT
    | FACTORY
    | PRECISION
    | VERDICT
    | {"--format", "--all", "--replay", "--against", "--probes"},
    "gate": INPUT
    | FACTORY
    | PRECISION
    | VERDICT
    | {
        "--format",
        "--all",
        "--seeds",
        "--budget",
        "--baseline",
        "--write-baseline",
        "--contract-only",
    },
    "sites": INPUT | FACTORY | {"--format"},
    "diff": INPUT | PRECISION | {"--format", "--html", "--plot", "--all", "--contract-only"},
    "rules": {"--format"},
    "demo": set(),
    "explain": set(),
    "backtest": {
        "--format",
        "--json",
        "--plot",
        "--html",
        "--all",
        "--risk",
        "--column",
        "--figure",
        "--stratum",
        "--peers",
        "--bad",
        "--false-alarms",
        "--lead",
        "--resamples",
        "--markdown",
        "--hold-out",
        "--worse",
        "--write-risk",
        "--pack",
        "--rejudge",
    },
    "live": {"--once", "--refresh", "--lines"},
    "plot": {"-o", "--output", "--html", "--figures", "--from", "--to", "--smooth", "--size"},
}
# Arguments of the commands, which are no options.
ARGUMENTS = {"source", "topic", "run", "runs", "a", "b"}
DEFAULTS = {
    "batch": 2,
    "seq": None,
    "seed": 0,
    "device": None,
    "dtype": "float32",
    "tol": 0.05,
    "confidence": 0.999,
    "decide": False,
    "profile": "default",
    "fail_on": "error",
    "output_format": "pretty",
    "state": None,
}
PUBLIC = [
    "JacdiagError",
    "Report",
    "__version__",
    "audit",
    "declare",
    "sites",
    "skipping",
    "spectral_norm",
    "watch",
]
JSON_KEYS = {
    "schema_version",
    "jacdiag",
    "torch",
    "created",
    "source",
    "tier",
    "state",
    "probe",
    "plan",
    "conditions",
    "verdict",
    "model",
    "sublayers",
    "network",
    "findings",
    "rules",
    "cost",
    "settings",
    "ladder",
    "notes",
    "contract",
    "figures",
    "baseline",
    "remedies",
    "risk",
    "against",
    "state_reason",
    "state_basis",
    "replay",
}

SCHEMA = Path(jacdiag.__file__).parent / "records" / "report.schema.json"


def test_options_of_every_command_are_the_frozen_ones() -> None:
    from jacdiag_cli.main import cli

    found = {}
    for name, command in cli.commands.items():
        found[name] = set()
        for parameter in command.params:
            if isinstance(parameter, click.Argument):
                assert parameter.name in ARGUMENTS
            else:
                found[name] |= {*parameter.opts, *parameter.secondary_opts}
    assert found == COMMANDS


def test_defaults_of_audit_are_the_frozen_ones() -> None:
    from jacdiag_cli.main import cli

    # A command keeps the help option of its first context.
    parent = click.Context(cli, **cli.context_settings)
    found = cli.commands["audit"].make_context("audit", ["checkpoint.pt"], parent=parent).params
    assert {name: found[name] for name in DEFAULTS} == DEFAULTS


def test_python_names_are_the_frozen_ones() -> None:
    assert sorted(jacdiag.__all__) == PUBLIC
    assert all(getattr(jacdiag, name) is not None for name in PUBLIC)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = jacdiag.nothing


def test_json_keys_are_the_frozen_ones_and_those_of_the_schema() -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert {field.name for field in dataclasses.fields(jacdiag.Report)} == JSON_KEYS
    assert set(schema["required"]) <= JSON_KEYS == set(schema["properties"])
