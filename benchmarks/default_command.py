"""How long `jacdiag audit hf:gpt2` takes on a terminal, and when each verdict stands on the screen.

The command runs in a terminal of its own (a pseudo-terminal), without options: GPT-2 124M with
random weights, 2 x 128 tokens. The clock starts before Python does.

    python benchmarks/default_command.py            90 seconds; writes results/default_command.json
    python benchmarks/default_command.py --quick    a small GPT, seconds; prints only
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "default_command.json"
SMALL = ["jacdiag.sources.gpt:build", "--model-args", '{"n_layer": 2, "n_embd": 64, "n_head": 2}']
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

# What the screen says once a condition is known, and once both are.
SHOWN = {
    "large shortcut": re.compile(r"first look: [^\n]*large shortcut (met|not met|partly met)"),
    "both conditions": re.compile(r"the intervals become narrower now"),
}


def run_on_terminal(command: list[str]) -> tuple[dict[str, float], float, int]:
    """Run a command in a terminal.

    Args:
        command: its words; the first is a path.

    Returns:
        The seconds at which each text of `SHOWN` first stood on the screen, the seconds until the
        command ended, and its exit code.
    """
    # 1. Start it.
    start = time.perf_counter()
    child, terminal = pty.fork()
    if child == 0:
        size = {"COLUMNS": "120", "LINES": "40", "TERM": "xterm-256color"}
        os.execve(command[0], command, {**os.environ, **size})

    # 2. Read the screen until the terminal closes.
    screen = ""
    seen: dict[str, float] = {}
    while True:
        try:
            output = os.read(terminal, 65536)
        except OSError:  # the other side has ended
            break
        if not output:
            break
        screen += ESCAPES.sub("", output.decode(errors="replace"))
        for name, text in SHOWN.items():
            if name not in seen and text.search(screen):
                seen[name] = time.perf_counter() - start
    seconds = time.perf_counter() - start
    _, status = os.waitpid(child, 0)
    return seen, seconds, os.waitstatus_to_exitcode(status)


def measure(source: list[str]) -> dict[str, Any]:
    """Return the seconds of one run, and what its report says of them."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "jacdiag_cli", "audit", *source, "--json", str(report)]
        seen, seconds, code = run_on_terminal(command)
        # 1 means that a rule fired; without a report there is nothing to read.
        if not report.exists():
            raise SystemExit(f"the command ended with {code} and wrote no report")
        cost = json.loads(report.read_text(encoding="utf-8"))["cost"]
    phases = cost["phases"]
    measured_once = phases.keys() - {"first look", "remedies"}
    measuring = sum(phases[name] for name in measured_once)
    return {
        "source": " ".join(source),
        "exit_code": code,
        "seconds_until_shown": {name: round(second, 1) for name, second in seen.items()},
        "seconds": round(seconds, 1),
        "seconds_of_phases": {name: round(spent, 1) for name, spent in phases.items()},
        "remedies_over_measuring": round(phases.get("remedies", 0.0) / measuring, 2),
    }


def main() -> None:
    """Measure, print, and write the results unless `--quick` is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small GPT; prints only")
    quick = parser.parse_args().quick
    measured = measure(SMALL if quick else ["hf:gpt2"])
    print(json.dumps(measured, indent=1))
    if not quick:
        RESULTS.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
