"""Every script of the benchmarks can be started: what it imports is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for path in (ROOT / "benchmarks").glob("*.py") if path.name[0] != "_")

IMPORT_ALL = """
import runpy, sys, traceback
for path in sys.argv[1:]:
    try:
        runpy.run_path(path, run_name="imported")
    except Exception:
        print(path, traceback.format_exc().splitlines()[-1])
"""


def test_every_benchmark_script_can_be_imported() -> None:
    folders = [str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "cli")]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *map(str, SCRIPTS)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        timeout=300,
    )
    assert len(SCRIPTS) > 20
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
