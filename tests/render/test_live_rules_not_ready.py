"""The live screen: rules that are not ready yet, and what is said of the init, apart from the
alerts.
"""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from jacdiag.records.run_log import RunLog
from jacdiag.render.terminal.run_screen import screen


def run(*rows: dict[str, Any]) -> RunLog:
    log = RunLog()
    log.add(
        {
            "type": "run",
            "groups": [],
            "waits": {"JD502": "60 steps with a loss", "JD504": "3 rounds"},
        }
    )
    for step in range(1, 6):
        log.add({"type": "step", "step": step, "loss": 2.0, "grad_norm": 1.0})
    for row in rows:
        log.add(row)
    return log


def shown(log: RunLog) -> str:
    console = Console(width=90, height=24, record=True, file=io.StringIO())
    console.print(screen(log, "run.jsonl", 90, 24), height=24)
    return console.export_text()


def test_rules_that_wait_are_listed_until_they_are_ready() -> None:
    text = shown(run())
    assert "JD502 waits for" in text and "JD504 waits for" in text
    ready = {"type": "ready", "step": 60, "code": "JD502", "waited_for": "60 steps with a loss"}
    text = shown(run(ready))
    assert (
        run(ready).waits == {"JD504": "3 rounds"}
        and "JD504 waits for" in text
        and "JD502 waits" not in text
    )
    assert "waits for" not in shown(run(ready, {**ready, "code": "JD504"}))
    assert "waits for" not in shown(run({"type": "end", "step": 5}))


def test_a_log_of_an_older_version_waits_for_nothing() -> None:
    log = RunLog()
    log.add({"type": "run", "groups": []})
    log.add({"type": "step", "step": 1, "loss": 2.0, "grad_norm": 1.0})
    assert log.waits == {} and "waits for" not in shown(log)


def test_restarted_run_waits_for_its_rules_again() -> None:
    ready = {"type": "ready", "step": 4, "code": "JD502", "waited_for": "60 steps with a loss"}
    again = {"type": "run", "groups": [], "waits": {"JD502": "60 steps with a loss"}}
    assert run(ready, again).waits == {"JD502": "60 steps with a loss"}


def test_what_is_said_of_the_init_is_no_alert() -> None:
    finding = {
        "type": "finding",
        "step": 0,
        "code": "JD102",
        "level": "warning",
        "what": "x",
        "where": ["h.0.attn"],
    }
    text = shown(run(finding))
    assert (
        "report at step 0" in text and "JD102" in text and "none" in text and "JD102 at" not in text
    )
    alert = {
        "type": "alert",
        "step": 4,
        "code": "JD502",
        "level": "warning",
        "what": "loss",
        "where": [],
    }
    text = shown(run(finding, alert))
    assert "report at step 0" in text and "JD502 at 4" in text
