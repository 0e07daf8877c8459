"""Results as a Markdown page: the count, the confusion tables, one line per family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

TITLES = {
    "causal-lm": "Causal language models",
    "masked-lm": "Masked language models",
    "seq2seq": "Sequence to sequence",
    "image": "Image classification",
}
FIELDS = ("kind", "placement", "token_wise")


def page(rows: Sequence[dict[str, Any]], versions: dict[str, str]) -> str:
    """Returns the whole page."""
    ran = [r for r in rows if r["status"] != "not built"]
    good = [r for r in ran if r["status"] == "ok"]
    lines = [
        "# Families of transformers",
        "",
        f"transformers {versions['transformers']}, torch {versions['torch']}. {len(ran)} of "
        f"{len(rows)} registered "
        f"(task, family) pairs build and run offline from a shrunk default config; **{len(good)} "
        f"of these {len(ran)} "
        f"({100 * len(good) / max(1, len(ran)):.1f}%) pass every check, which is {len(good)} of "
        f"all {len(rows)} "
        f"({100 * len(good) / max(1, len(rows)):.1f}%)**: exactly the expected sub-layers, "
        "bit-exact "
        "replay, adjoint to 1e-5, J^T w equal to a whole-model re-run's, the dense norm inside "
        "the interval, kind, "
        "placement and token-wise as config and class names tell, a guest left as it was, and the "
        "same records "
        "whatever the batch size, the grad mode and the train flag.",
        "",
        f"{sum(r['interpreted'] for r in ran)} families have counts or kinds that the config "
        "alone does not tell; "
        "`benchmarks/_coverage/families.toml` says how to read them and where each family's norms "
        "stand. Counts and "
        "kinds were read in the models' code, with the disagreements of earlier runs in hand: a "
        "second reading, not a "
        "blind one, and so were placements, some of them only accepted as the known architecture; "
        "they are held "
        "against the models' own norm modules below, in which the tracer has no part. The dense "
        "intervals are at 1 - "
        "1e-6, so that a miss means a mistake. Dense Jacobians are compared for up to two "
        "sub-layers of each kind and "
        f"placement with at most 1024 entries in the shortcut, {sum(r['dense'] for r in ran)} in "
        "all; "
        f"{_without_dense(ran)}",
        "",
        *_totals(ran),
    ]
    for field in FIELDS:
        lines += [
            "",
            f"## {field}: found (columns) against what config or class names tell (rows)",
            "",
            *_confusion(ran, field),
        ]
    lines += [
        "",
        "## placement: found (columns) against the models' own norm modules (rows)",
        "",
        "Every module whose class is called a norm (of tokens) says what it was given and what it "
        "made; both are "
        'compared with each shortcut, branch and sum. "Not told": the last sum, behind which a '
        "norm may be the "
        "model's, or no such module.",
        "",
        *_confusion(ran, "placement", "norms"),
        "",
        *_apart(ran),
    ]
    lines += ["", "## What fails, and why", "", *_failures(ran)]
    for task, title in TITLES.items():
        lines += ["", f"## {title}", "", *_families([r for r in ran if r["task"] == task])]
    lines += [
        "",
        "## Not built or not run offline (registered, but not among those that run)",
        "",
        *_unbuilt(rows),
    ]
    return "\n".join(lines) + "\n"


def _without_dense(ran: Sequence[dict[str, Any]]) -> str:
    none = [r["family"] for r in ran if r["found"] and not r["dense"]]
    return (
        f"none is small enough in {', '.join(none)}."
        if none
        else "every family with a sub-layer has some."
    )


def _totals(ran: Sequence[dict[str, Any]]) -> list[str]:
    out = _table(
        ["task", "families that run", "pass", "sub-layers expected", "found"],
        [
            [
                title,
                len(mine),
                sum(r["status"] == "ok" for r in mine),
                sum(r["expected"] for r in mine),
                sum(r["found"] for r in mine),
            ]
            for task, title in TITLES.items()
            for mine in [[r for r in ran if r["task"] == task]]
        ],
    )
    return list(out)


def _apart(ran: Sequence[dict[str, Any]]) -> list[str]:
    """Where the tracer and the norm modules disagree, with the reason."""
    rows = []
    for r in ran:
        apart = [
            s
            for s in r["sublayers"]
            if not s["nested"] and s["placement_norms"] not in (None, s["placement"])
        ]
        if apart:
            said = ", ".join(
                sorted({f"{s['placement']}, not {s['placement_norms']}" for s in apart})
            )
            rows.append([r["task"], r["family"], len(apart), said, r["norms_why"]])
    return (
        _table(["task", "family", "sub-layers apart", "found", "reason"], rows)
        if rows
        else ["No disagreement."]
    )


def _confusion(ran: Sequence[dict[str, Any]], field: str, by: str = "told") -> list[str]:
    counts = Counter(
        (_word(s[f"{field}_{by}"]), _word(s[field]))
        for r in ran
        for s in r["sublayers"]
        if not s["nested"]
    )
    columns = sorted({found for _, found in counts})
    return _table(
        ["told", *columns],
        [
            [told, *(counts[told, found] or "" for found in columns)]
            for told in sorted({told for told, _ in counts})
        ],
    )


def _word(value: Any) -> str:
    return "not told" if value is None else str(value)


def _failures(ran: Sequence[dict[str, Any]]) -> list[str]:
    failed = [r for r in ran if r["status"] != "ok"]
    if not failed:
        return ["Nothing."]
    return _table(
        ["task", "family", "what fails", "known reason"],
        [
            [
                r["task"],
                r["family"],
                "; ".join(f"{k}: {v}" for k, v in r["problems"].items()) or r["reason"],
                " ".join(r["notes"]),
            ]
            for r in failed
        ],
    )


def _families(rows: Sequence[dict[str, Any]]) -> list[str]:
    return _table(
        [
            "family",
            "found / expected",
            "covered",
            "kinds",
            "placement",
            "all checks",
            "how the config is read",
        ],
        [
            [
                r["family"],
                f"{r['found']} / {r['expected']}",
                f"{100 * r['covered']:.1f}%",
                _kinds(r["sublayers"], "kind"),
                _kinds(r["sublayers"], "placement"),
                "yes" if r["status"] == "ok" else "**no**",
                " ".join(r["notes"]),
            ]
            for r in rows
        ],
    )


def _kinds(sublayers: Sequence[dict[str, Any]], field: str) -> str:
    counts = Counter(f"{s[field]}{' (nested)' * s['nested']}" for s in sublayers)
    return ", ".join(f"{n} {name}" for name, n in counts.items())


def _unbuilt(rows: Sequence[dict[str, Any]]) -> list[str]:
    return _table(
        ["task", "family", "reason"],
        [[r["task"], r["family"], r["reason"]] for r in rows if r["status"] == "not built"],
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(str(c).replace("|", "/").replace("\n", " ") for c in cells) + " |"

    return [line(head), line("---" for _ in head), *(line(row) for row in rows)]
