"""One view of a report: everything that is said of it, in the order in which it is shown.

`build_view` reads the report once. The terminal's table, Markdown, the comment of a pull request,
the gate's screen and the picture lay the view out; none of them reads the report.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from jacdiag.records import Report, Verdict
from jacdiag.render.content.depth_view import DepthView, build_depth_view
from jacdiag.render.content.flight_replay import ReplayTable, replay_facts, replay_table
from jacdiag.render.content.grouped_findings import GateView, build_gate_view
from jacdiag.render.content.next_step import NextStep, next_step
from jacdiag.render.content.remedies import document, remedied
from jacdiag.render.content.sentences import (
    counted_once,
    header,
    headline,
    legible,
    model_words,
    source_name,
    state_words,
    why_state,
)
from jacdiag.render.content.shared_names import with_shown_names
from jacdiag.render.content.sublayer_table import Grid, build
from jacdiag.render.content.verdict import Line, cost, footnotes, to_do, verdict_lines


@dataclass(frozen=True)
class HeaderView:
    """What was audited.

    Attributes:
        name: of the source.
        model: "GPT, 12 layers, width 768, 124M parameters (99.8% covered)".
        state: "init, pre-norm".
        why_state: why the model counts as initialized or trained; "" if the user said so.
        lines: these and the probe, as lines of pieces that are joined by a dot.
    """

    name: str
    model: str
    state: str
    why_state: str
    lines: list[list[str]]


@dataclass(frozen=True)
class VerdictView:
    """The verdict: one word, one sentence, and a line for each condition, rule and figure."""

    word: Verdict
    headline: str
    lines: list[Line]


@dataclass(frozen=True)
class ReplayView:
    """The replay of a flight: a sentence, a table of its batches, what stands out in them."""

    sentence: str
    table: ReplayTable
    facts: list[str]


@dataclass(frozen=True)
class CostView:
    """What the audit cost.

    Attributes:
        text: in one line.
        command: that runs the audit again; "" if it is not known.
        phases: name and seconds of each phase, the longest first.
    """

    text: str
    command: str
    phases: list[tuple[str, float]]


@dataclass(frozen=True)
class ReportView:
    """Everything that is said of a report. No text in it holds a control character.

    Attributes:
        header: what was audited.
        rows: the table of sub-layers.
        notes: why columns or figures of the table are missing.
        verdict: by condition, with the other rules and the figures of the network.
        replay: of a flight; None if the report has none.
        actions: what to do, one line each.
        next_step: the command that helps next.
        remedies: those of `actions` that are about remedies.
        remedy_document: all remedies with their code, as Markdown.
        cost: of the audit.
        gate: the result of the gate, one note for each rule.
        depth: curves over depth, for the picture.
        report_notes: the notes of the audit itself.
        settings: of the audit, each as a name and a text.
    """

    header: HeaderView
    rows: Grid
    notes: list[str]
    verdict: VerdictView
    replay: ReplayView | None
    actions: list[str]
    next_step: NextStep
    remedies: list[str]
    remedy_document: str
    cost: CostView
    gate: GateView
    depth: DepthView
    report_notes: list[str]
    settings: list[tuple[str, str]]


def build_view(report: Report, *, all_rows: bool = False, sort: str = "depth") -> ReportView:
    """Build the view of a report.

    Args:
        report: any report, of either tier and state.
        all_rows: show every sub-layer; else long models are folded.
        sort: "depth" (as the model runs) or "worst" (largest branch norm first).

    Example:
        >>> view = build_view(report)                             # doctest: +SKIP
        >>> view.verdict.word, view.verdict.headline              # doctest: +SKIP
        ('warn', 'Large shortcut not met, small sub-layers met: worst branch norm 22.4 to 23.3 ...')
    """
    report = with_shown_names(legible(report))
    return ReportView(
        header=_header(report),
        rows=build(report, all_rows=all_rows, sort=sort),
        notes=footnotes(report),
        verdict=VerdictView(report.verdict, headline(report), verdict_lines(report)),
        replay=_replay(report, all_rows=all_rows),
        actions=to_do(report),
        next_step=next_step(report),
        remedies=remedied(report),
        remedy_document=document(report),
        cost=_cost(report),
        gate=build_gate_view(report),
        depth=build_depth_view(report),
        report_notes=counted_once(report.notes),
        settings=_settings(report),
    )


def _header(report: Report) -> HeaderView:
    return HeaderView(
        name=source_name(report),
        model=model_words(report),
        state=state_words(report),
        why_state=why_state(report),
        lines=header(report),
    )


def _cost(report: Report) -> CostView:
    return CostView(
        text=cost(report),
        command=str(report.settings.get("command") or ""),
        phases=sorted(report.cost.phases.items(), key=lambda phase: -phase[1]),
    )


def _settings(report: Report) -> list[tuple[str, str]]:
    """Return the settings as texts; what is no text stands as JSON."""
    settings = []
    for name, value in report.settings.items():
        text = value
        if not isinstance(value, str):
            text = json.dumps(value, ensure_ascii=False, default=str)
        settings.append((name, text))
    return settings


def _replay(report: Report, *, all_rows: bool) -> ReplayView | None:
    if report.replay is None:
        return None
    table = replay_table(report.replay, all_rows=all_rows)
    return ReplayView(report.replay.sentence, table, replay_facts(report.replay))
