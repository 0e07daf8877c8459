"""`jacdiag diff A B`: two models beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jacdiag_cli.config import Configured
from jacdiag_cli.options import PROBE, SOLVER, add
from jacdiag_cli.streams import Column, Invocation, emit, grid, guest_talk, room

if TYPE_CHECKING:
    from jacdiag.comparison import Comparison
    from jacdiag.records import Report


@click.command(cls=Configured, short_help="Compares two models, checkpoints or reports.")
@click.argument("a")
@click.argument("b")
@click.option(
    "--model", metavar="FACTORY", help="Builds the module that a bare state dict belongs to."
)
@click.option(
    "--key",
    metavar="NAME",
    help="Which weights to read, if a file holds several sets: ema, model.net.",
)
@click.option("--contract-only", is_flag=True, help="Weights alone; no Jacobians.")
@click.option(
    "--all", "all_rows", is_flag=True, help="Show every figure, not only those that part."
)
@add(PROBE, SOLVER)
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["pretty", "json", "markdown"]),
    default="pretty",
    show_default=True,
    help="Of what is printed.",
)
@click.pass_obj
def diff(
    invocation: Invocation, a: str, b: str, output_format: str, all_rows: bool, **given: Any
) -> int:
    """Compares two models, checkpoints or JSON reports: figures side by side, and where they part
    first.

    A and B are each a SOURCE as for `jacdiag audit`, or a report that `--json` wrote. Sub-layers
    and weights are matched by role and depth, whatever they are called. The exit code is 1 where a
    figure parts beyond its interval.

    \b
    Examples:
      jacdiag diff main.json build.py:model
      jacdiag diff hf:config.json megatron.pt --model build.py:megatron
    """
    with guest_talk():
        from jacdiag.comparison import compare

        found = compare(_report(a, given), _report(b, given))
    invocation.heed()
    _show(found, output_format, all_rows)
    return int(found.first is not None)


def _report(source: str, given: dict[str, Any]) -> Report:
    """A report from its file, or of an audit."""
    from jacdiag.comparison import read_report

    path = Path(source)
    if path.suffix == ".json" and path.is_file():
        return read_report(path)
    from jacdiag.pipeline.audit import audit
    from jacdiag.sources.factory import is_factory

    options = {
        k: v for k, v in given.items() if k not in ("contract_only", "inputs", "model", "key")
    }
    is_file = not (source.startswith("hf:") or is_factory(source) or path.is_dir())
    model = given["model"] if is_file else None
    key = given["key"] if is_file else None
    products = not given["contract_only"]
    return audit(
        source, **options, model=model, key=key, input_factory=given["inputs"], products=products
    )


def _show(found: Comparison, output_format: str, all_rows: bool) -> None:
    from jacdiag.render.formats import diff as beside
    from jacdiag.render.terminal.sentences import legible

    pairs: Any = found.pairs
    notes = found.notes
    if output_format == "json":
        emit(beside.as_json(pairs, notes), "json")
        return
    shown = pairs if all_rows else [p for p in pairs if p.parts]
    if output_format == "markdown":
        emit(beside.markdown(shown, beside.verdict(pairs), notes), "markdown")
        return
    if shown:
        cells = list(zip(*beside.rows(shown), strict=True))
        columns = [
            Column(title, list(column), 10 - k if k > 4 else 100, right=k in (0, 3, 4, 5))
            for k, (title, column) in enumerate(zip(beside.HEAD, cells, strict=True))
        ]
        emit(grid(columns, room()) + "\n")
    emit("\n".join([beside.verdict(pairs), *(f"note: {legible(note)}" for note in notes)]) + "\n")
