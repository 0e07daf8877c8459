"""Run logs as a watch writes them, made by formula: healthy, with a spike, with NaN, resumed,
long.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from jacdiag.records.run_log import RunLog, to_line

LAYERS = 6
NAMES = [f"transformer.h.{k}.{part}" for k in range(LAYERS) for part in ("attn", "mlp")]
GROUPS = ["(embedding)", *NAMES, "(norms)"]


def step_row(
    step: int, total: int, *, seed: int = 0, spike: int | None = None, lost: int | None = None
) -> dict:
    """One step of a run that falls from ln 64 to 1.5; all figures but the time are functions of the
    arguments.
    """
    noise = random.Random(seed * 1_000_003 + step).gauss
    warm = min(1.0, step / max(total // 20, 1))
    loss = 1.5 + 2.66 * math.exp(-5 * step / total) + noise(0, 0.06)
    norm = (0.6 + 1.6 * math.exp(-6 * step / total)) * math.exp(noise(0, 0.25))
    if spike is not None and 0 <= step - spike < 12:
        loss, norm = loss + 3.0 * math.exp(-(step - spike) / 4), norm * 9
    gone = lost is not None and step >= lost
    clipped = norm > 1.0
    post = min(norm, 1.0)
    lr = 3e-4 * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / total)))
    name = GROUPS[step % len(GROUPS)]
    bad = math.nan
    return {
        "step": step,
        "loss": bad if gone else loss,
        "lr": lr,
        "lrs": None,
        "tokens": 4096 * step,
        "step_seconds": 0.25,
        "grad_norm": None if gone else norm,
        "grad_norm_post": bad if gone else post,
        "clipped": None if gone else clipped,
        "clip_ratio": None if gone else norm / post,
        "skipped": False,
        "skipped_for": None,
        "optimizer_step": "seen",
        "nonfinite": [],
        "grad": [post / 4] * len(GROUPS),
        "update": {
            "where": name,
            "norm": 1e-3,
            "weight": 1.0,
            "ratio": lr * math.exp(noise(1.2, 0.3)),
        },
        "batches": ["0013d1208d08f51e"],
        "votes": [],
        "scores": {"loss": 0.1},
    }


def figures(step: int, total: int, drift: int | None = None) -> dict[str, Any]:
    """Figures of the statistics and of a probe."""
    at = step / total
    gains, shortcuts, logits = {}, {}, {}
    for k, name in enumerate(NAMES):
        gains[name] = (
            (0.4 + 2.2 * at)
            * (1 + 0.6 * k / len(NAMES))
            * (6.0 if drift and step >= drift and k == 3 else 1)
        )
        shortcuts[name] = 0.25 + 0.6 * k / len(NAMES) + 0.8 * at
        if name.endswith("attn"):
            logits[name] = 1.5 + 8 * at * (1 + k / 4)
    return {"branch_norm": gains, "shortcut_std": shortcuts, "logit": logits}


def run_lines(
    steps: int,
    *,
    seed: int = 0,
    spike: int | None = None,
    lost: int | None = None,
    probe_every: int = 0,
    drift: int | None = None,
    resume: int | None = None,
    findings: list[dict[str, Any]] | None = None,
    end: bool = True,
) -> list[bytes]:
    """The lines of a log."""
    every = probe_every or max(steps // 20, 1)
    header = {
        "model": "GPT",
        "parameters": 206208,
        "ranks": 1,
        "sharded": False,
        "every": every,
        "stats_every": every,
        "groups": GROUPS,
        "lr_groups": ["0"],
        "jacdiag": "0.1.0",
        "torch": "2.9",
        "started": "2026-11-02T10:00:00",
    }
    lines = [to_line("run", header)]
    lines.append(
        to_line("price", {"statistics_seconds": 0.6, "sub_layers": 12, "probe_seconds": 2.5})
    )

    def measured(step: int) -> None:
        values = figures(step, max(steps, 1), drift)
        shared = {key: values[key] for key in ("shortcut_std", "logit")}
        lines.append(to_line("stats", {"step": step, "seconds": 0.6, "figures": shared}))
        report = {
            "state": "init" if step == 0 else "trained",
            "findings": (findings or []) if step == 0 else [],
            "settings": {"thresholds": {"branch_norm": {"info": 1.33, "warning": 2.35}}},
        }
        lines.append(
            to_line(
                "probe",
                {"step": step, "seconds": 2.4, "figures": values, "votes": [], "report": report},
            )
        )
        if step == 0:
            lines.extend(to_line("alert", {**finding, "step": 0}) for finding in findings or [])

    def alert(step: int, code: str, level: str, what: str) -> None:
        lines.append(
            to_line(
                "alert",
                {
                    "step": step,
                    "code": code,
                    "level": level,
                    "what": what,
                    "where": [NAMES[3]],
                    "evidence": {},
                    "suppressed": 0,
                },
            )
        )

    measured(0)
    for step in range(1, steps + 1):
        lines.append(to_line("step", step_row(step, steps, seed=seed, spike=spike, lost=lost)))
        if step % every == 0:
            measured(step)
        if step == spike:
            alert(
                step,
                "JD502",
                "warning",
                "loss 4.9, 3.1 over its median and 44 standard deviations over its mean",
            )
            alert(
                step + 1,
                "JD501",
                "warning",
                "loss 40 and gradient norm 31 standard deviations above; h.1.mlp first",
            )
        if step == lost:
            alert(step, "JD505", "error", "the loss is not finite")
        if drift and step == drift // every * every + 2 * every:
            alert(
                step,
                "JD504",
                "warning",
                f"branch norm of {NAMES[3]} is 6 times what its own trend foretold",
            )
        if step == resume:
            lines.append(to_line("resume", {"step": step}))
    if end:
        lines.append(
            to_line("end", {"step": steps, "seconds": 1.0, "off": {}, "alerts": 0, "skipped": 0})
        )
    return lines


def run_log(steps: int, **options: Any) -> RunLog:
    """The same as it is read."""
    run = RunLog()
    for line in run_lines(steps, **options):
        run.add(json.loads(line))
    return run


def write_log(folder: Path, steps: int, **options: Any) -> Path:
    """The same as a file; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.jsonl").write_bytes(b"".join(run_lines(steps, **options)))
    return folder


FINDINGS = [
    {
        "code": "JD102",
        "level": "warning",
        "where": NAMES[:5],
        "what": "norm gain 36 in layer 0: the shortcut is small",
        "evidence": {},
        "why": "",
        "fix": "Multiply the embedding by sqrt(768).",
    },
    {
        "code": "JD103",
        "level": "warning",
        "where": NAMES[:2],
        "what": "branch norm 9.4 in layer 0, warning above 2.35",
        "evidence": {},
        "why": "",
        "fix": "",
    },
]
