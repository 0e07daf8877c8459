"""Two models side by side, as text, Markdown or JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from jacdiag.comparison.match import Pair
from jacdiag.records.number_format import three
from jacdiag.render.content.changed_figures import ChangeSummary
from jacdiag.render.content.columns import DIFF_COLUMNS, figure_words
from jacdiag.render.content.compared_figures import cell_words
from jacdiag.render.content.compared_models import ComparedModel, ComparisonView
from jacdiag.render.formats.markdown import escaped, table_row

HEAD = tuple(column.title for column in DIFF_COLUMNS)


def rows(pairs: Sequence[Pair], *, with_range: bool = True) -> list[tuple[str, ...]]:
    """Return one row of cells per pair, under `HEAD`.

    Args:
        pairs: a row each.
        with_range: write the range around a median.
    """
    return [_row(pair, with_range) for pair in pairs]


def _row(pair: Pair, with_range: bool) -> tuple[str, ...]:
    """Return the cells of one figure of both models."""
    # 1. What may be missing.
    depth, ratio = "-", ""
    if pair.depth is not None:
        depth = str(pair.depth)
    if pair.ratio is not None:
        ratio = three(pair.ratio)

    # 2. A mark where the two differ.
    mark = ""
    if pair.parts:
        mark = "◀"
    first = cell_words(pair, pair.old, pair.a, with_range=with_range)
    second = cell_words(pair, pair.new, pair.b, with_range=with_range)
    return depth, pair.part, figure_words(pair.figure), first, second, ratio, mark


def markdown(view: ComparisonView, *, all_rows: bool = False) -> str:
    """Return a comparison in Markdown.

    Args:
        view: of the comparison.
        all_rows: show the figures that do not differ, too.
    """
    # 1. The verdict, the models, and what limits the comparison.
    sections = [f"**{escaped(view.verdict)}**", "\n".join(map(_model_item, view.models))]
    for note in view.notes:
        sections.append(f"Note: {escaped(note)}.")

    # 2. What changed, and the table.
    sections += _summary_sections(view.summary)
    pairs = view.shown_pairs(all_rows=all_rows)
    if pairs:
        lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
        lines += map(table_row, rows(pairs))
        sections.append("\n".join(lines))
    return "\n\n".join(sections) + "\n"


def _model_item(model: ComparedModel) -> str:
    """Return what one model is, as an item of a list."""
    facts = map(escaped, model.facts)
    return f"- {model.letter}: {', '.join(facts)}"


def _summary_sections(summary: ChangeSummary) -> list[str]:
    """Return what changed, by kind of figure and by layer, as lists."""
    # 1. By kind of figure.
    sections = []
    if summary.kinds:
        items = [f"- {kind.kind}: {escaped(kind.text)}" for kind in summary.kinds]
        sections.append("\n".join(["What changed (both intervals are apart):", "", *items]))

    # 2. By layer.
    items = []
    for layer in summary.layers:
        text = f"{layer.where}: {layer.what} {layer.change}, {layer.factor}"
        items.append(f"- {escaped(text)}")
    if items:
        sections.append("\n".join(["What changed most in each layer:", "", *items]))
    return sections


def as_json(view: ComparisonView) -> str:
    """Return both models, every pair, the first that differs, and the notes, as JSON."""
    listed = [_plain(pair) for pair in view.pairs]
    different = (pair for pair in listed if pair["parts"])
    data = {
        "schema_version": 1,
        "models": [dataclasses.asdict(model) for model in view.models],
        "first": next(different, None),
        "pairs": listed,
        "notes": view.notes,
    }
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def _plain(pair: Pair) -> dict[str, Any]:
    """Return a pair as JSON holds it."""
    return {
        "depth": pair.depth,
        "part": pair.part,
        "figure": pair.figure,
        "a": pair.a,
        "b": pair.b,
        "old": pair.old,
        "new": pair.new,
        "ratio": pair.ratio,
        "parts": pair.parts,
    }
