"""The page of results: one table of models, one of norms, one of files that are refused."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]

_COLUMNS = (
    "model",
    "package",
    "class",
    "parameters",
    "sub-layers",
    "counted by hand",
    "opened with",
    "CPU seconds",
    "peak MB",
    "result",
)


def write(rows: list[Row], refused: list[Row], versions: dict[str, str]) -> str:
    """Return results/real_models.md.

    Args:
        rows: one for each model, as real_models.py builds them.
        refused: one for each file that is refused.
        versions: of the libraries.
    """
    passed = sum(row["status"] == "ok" for row in rows)
    norms = [norm for row in rows for norm in row["norms"]]
    inside = sum(norm["inside"] for norm in norms)
    lines = [
        "# Trained models from packages",
        "",
        "Written by `make real-models`. Each checkpoint is shipped inside a package.",
        f"{passed} of {len(rows)} models pass.",
        f"{inside} of {len(norms)} norms lie inside their interval.",
        "",
        "A model passes if three things hold:",
        "",
        "1. `jacdiag audit` opens it. A factory is passed only where the package ships weights",
        "   without a config of transformers, and `--model-args` where a config names no kind of",
        "   model.",
        "2. The audit lists as many sub-layers as were counted by hand from the architecture.",
        "3. The dense norm of three sub-layers lies inside the interval. It is the largest",
        "   singular value of a float64 Jacobian, computed without jacdiag from the model's own",
        "   modules.",
        "",
        "The probe is one short sequence. Time and memory are those of the whole process on one",
        "thread, imports included.",
        f"torch {versions['torch']}, transformers {versions['transformers']}.",
        "",
        "## Models",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "|" + "---|" * len(_COLUMNS),
        *[_model_line(row) for row in rows],
        "",
        "How the sub-layers were counted:",
        "",
        *[f"- {row['name']}: {row['counted_from']}" for row in rows],
        "",
        "## Norms of the residual branches",
        "",
        "| model | sub-layer | lower | dense SVD | upper | inside |",
        "|---|---|---|---|---|---|",
        *[_norm_line(row, norm) for row in rows for norm in row["norms"]],
        "",
    ]
    lines += _refusal_lines(refused)
    lines += _problem_lines(rows + refused)
    return "\n".join(lines)


def _model_line(row: Row) -> str:
    opened = f"`--model {row['factory']}`" if row["factory"] else "the path alone"
    if row.get("model_args"):
        opened = f"`--model-args '{row['model_args']}'`"
    parameters = f"{row['parameters'] / 1e6:.3g}M" if "parameters" in row else "–"
    cells = [row["name"], row["package"], row.get("class", "–"), parameters]
    cells += [_shown(row["listed"]), row["counted"], opened]
    cells += [row["seconds"], row["peak_mb"], row["status"]]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _shown(value: Any) -> str:
    return "–" if value is None else str(value)


def _norm_line(row: Row, norm: Row) -> str:
    upper = "–" if norm["upper"] is None else f"{norm['upper']:.5g}"
    inside = "yes" if norm["inside"] else "no"
    numbers = f"{norm['lower']:.5g} | {norm['dense']:.5g} | {upper}"
    return f"| {row['name']} | `{norm['sublayer']}` | {numbers} | {inside} |"


def _refusal_lines(refused: list[Row]) -> list[str]:
    """Return the section on files of formats that hold no weights for torch."""
    lines = ["## Files that are refused by name", ""]
    lines += ["| file | exit code | message |", "|---|---|---|"]
    for row in refused:
        message = " ".join(row["message"].split()).replace("|", "\\|")
        lines.append(f"| {row['name']} | {row['code']} | {message} |")
    return lines + [""]


def _problem_lines(rows: list[Row]) -> list[str]:
    """Return the section on what failed; nothing if nothing did."""
    failed = [row for row in rows if row["problems"]]
    if not failed:
        return []
    lines = ["## What failed", ""]
    for row in failed:
        lines += [f"- {row['name']}: {' '.join(problem.split())}" for problem in row["problems"]]
    return lines + [""]
