"""Every script of the benchmarks can be started: what it imports is there."""

from __future__ import annotations

from pathlib import Path

from fork_server import fork_server

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for path in (ROOT / "benchmarks").glob("*.py") if path.name[0] != "_")

IMPORT_ALL = """
import runpy, sys, traceback
sys.path.insert(0, "benchmarks")
for path in sys.argv[1:]:
    try:
        runpy.run_path(path, run_name="imported")
    except Exception:
        print(path, traceback.format_exc().splitlines()[-1])
"""


def test_every_benchmark_script_can_be_imported() -> None:
    process = fork_server().start(["-c", IMPORT_ALL, *SCRIPTS], ROOT)
    output, errors = process.communicate(timeout=300)
    assert len(SCRIPTS) > 20
    assert (process.wait(0), output) == (0, ""), output + errors
