"""`jacdiag rules`: every rule in a line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from jacdiag_cli.streams import TableColumn, emit, grid, room

if TYPE_CHECKING:
    from jacdiag.rules.rule import RuleInfo

_STATES, _PLACEMENTS = {"init", "trained"}, {"pre", "post", "sandwich", "reordered", "none"}


@click.command(short_help="Lists the rules, each in a line.")
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["pretty", "json"]),
    default="pretty",
    show_default=True,
    help="Of what is printed.",
)
def rules(output_format: str) -> None:
    """Lists the rules: code, name, the most that each says by itself, and what it applies to."""
    from jacdiag.rules import EVERY

    # 1. For programs.
    if output_format == "json":
        rows = list(map(_plain, EVERY))
        text = json.dumps(rows, indent=2, ensure_ascii=False)
        emit(text + "\n", "json")
        return

    # 2. For people.
    columns = [
        TableColumn("code", [rule.code for rule in EVERY]),
        TableColumn("name", [rule.name for rule in EVERY]),
        TableColumn("at most", [rule.level for rule in EVERY], 3),
        TableColumn("applies to", list(map(applies_to, EVERY)), 2),
        TableColumn("what it says", [rule.summary for rule in EVERY], 1),
    ]
    emit(
        grid(columns, room(), "json")
        + "\njacdiag explain CODE says why, with an example and a remedy.\n"
    )


def applies_to(rule: RuleInfo) -> str:
    """Return the states and placements of a rule: "pre, sandwich; init", or "any model"."""
    # A rule that names none, or all of them, is not limited.
    limits = []
    if rule.placements and not _PLACEMENTS.issubset(rule.placements):
        limits.append(f"{', '.join(rule.placements)} norm")
    if rule.states and not _STATES.issubset(rule.states):
        limits.append(", ".join(rule.states))

    return "; ".join(limits) or "any model"


def _plain(rule: RuleInfo) -> dict[str, object]:
    """Return a rule as JSON holds it."""
    return {
        "code": rule.code,
        "name": rule.name,
        "level": rule.level,
        "states": list(rule.states),
        "placements": list(rule.placements),
        "summary": rule.summary,
    }
