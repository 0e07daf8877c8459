"""The gate's result as the comment of a pull request."""

from __future__ import annotations

from jacdiag.records import Report
from jacdiag.render.formats.grouped_findings import (
    Note,
    accepting,
    counted,
    failing,
    not_applicable,
    notes,
    outcome,
    reservations,
)
from jacdiag.render.formats.markdown import _safe
from jacdiag.render.terminal.number_cells import three
from jacdiag.render.terminal.remedies import remedied
from jacdiag.render.terminal.sentences import legible, model_words, source_name

_SIGNS = {"PASS": "✓", "FAIL": "✗", "UNDECIDED": "?"}
_ROWS = 20


def render(report: Report) -> str:
    """GitHub-flavoured Markdown: the verdict, a row per rule, what changed against the baseline,
    how to accept it.
    """
    report = legible(report)
    about = report.settings.get("gate", {})
    word = outcome(report)
    seeds = int(about.get("seeds", 1))
    head = (
        f"{_safe(source_name(report))} · {_safe(model_words(report))} · {seeds} "
        f"{'seed' if seeds == 1 else 'seeds'}"
    )
    fatal = {n.code for n in failing(report)}
    command = "gate" if "gate" in report.settings else "audit"
    title = f"### {_SIGNS.get(word, '·')} jacdiag {command}: {word}"
    parts = [title, head, _table(notes(report), fatal), _changes(report)]
    parts.append(f"{counted(report)}.")
    parts += [
        "\n".join(
            f"- {_safe(line)}"
            for line in [*reservations(report), *not_applicable(report), *report.notes]
        )
    ]
    if report.remedies:
        parts.append(
            "**What to do**\n\n" + "\n".join(f"- {_safe(line)}" for line in remedied(report))
        )
    command = accepting(report)
    if command:
        parts.append(
            f"To accept the new figures, run and commit:\n\n```sh\n{command.replace('```', '')}\n"
            "```"
        )
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(found: list[Note], fatal: set[str]) -> str:
    if not found:
        return ""
    rows = ["| | rule | finding | where |", "|:---|:---|:---|:---|"]
    for note in found:
        sign = (
            "✗" if note.code in fatal else {"error": "●", "warning": "▲", "info": "·"}[note.level]
        )
        text = "<br>".join(_safe(line) for line in note.text.splitlines())
        rows.append(f"| {sign} | {note.code} {note.name} | {text} | {_safe(note.place)} |")
    return "\n".join(rows)


def _changes(report: Report) -> str:
    changes = [
        c for f in report.findings if f.code == "JD110" for c in f.evidence.get("changes", ())
    ]
    if not changes:
        return ""
    rows = ["| changed | figure | old | new |", "|:---|:---|---:|---:|"]
    rows += [
        f"| {_safe(str(c['where']))} | {c['field']} | {three(c['old'])} | {three(c['new'])} |"
        for c in changes[:_ROWS]
    ]
    rows += [f"| *{len(changes) - _ROWS} more* | | | |"] if len(changes) > _ROWS else []
    return "\n".join(rows)
