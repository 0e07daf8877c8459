"""Run a fast part of the tests with every version of torch that is supported; `make matrix`.

Each version gets a virtual environment of its own in a temporary folder, which is removed
afterwards: the CUDA builds that the index holds take about 7 GB each. A version that cannot be
installed stands in the table as such.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
VERSIONS = ("2.6", "2.7", "2.8", "2.9", "2.10", "2.11", "2.12", "2.13")
TOOLS = ("pytest>=8", "hypothesis>=6.100", "psutil>=5.9", "transformers>=4.48", "jsonschema>=4.21")
TESTS = (
    "tests/trace/test_wrappers.py",
    "tests/trace/test_hooks.py",
    "tests/trace/test_general_mechanisms.py",
    "tests/trace/test_independence_by_dataflow.py",
    "tests/trace/test_kernels_that_round.py",
    "tests/trace/test_low_precision_constants.py",
    "tests/trace/test_recurrent_layers.py",
    "tests/spectra",
    "tests/measure/test_branch_norms.py",
    "tests/measure/test_replay_check.py",
    "tests/sources/test_source_strings.py",
    "tests/sources/test_checkpoint.py",
    "tests/sources/test_factory.py",
    "tests/devices",
    "tests/cli/test_cli_exit.py",
    "tests/monitor/test_step_metrics.py",
    "tests/test_printed_objects.py",
)

# An audit of a small model, in which a warning of any package is a failure.
QUIET = """
import jacdiag
model = dict(recipe="vanilla", n_layer=1, n_embd=16, n_head=2, vocab_size=32, block_size=8)
jacdiag.audit("jacdiag.sources.gpt:build", model_args=model, batch=1, seq=8)
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The outcome of one version.

    Attributes:
        asked: as in `VERSIONS`.
        torch, python: versions that ran.
        passed, failed, skipped: numbers of tests.
        warnings: the last line of an audit that a warning ends; empty if it was quiet.
        seconds: of the tests, without the installation.
        note: why there is no figure.
    """

    asked: str
    torch: str = ""
    python: str = ""
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    warnings: str = ""
    seconds: float = 0.0
    note: str = ""


def main() -> int:
    """Run the versions that the command line names, and write `results/matrix.md` and `.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    parser.add_argument("--tests", nargs="+", default=TESTS)
    parser.add_argument(
        "--disk", type=float, default=15.0, help="GB that must be free; 3 are enough for CPU builds"
    )
    options = parser.parse_args()

    # Versions that an earlier call ran stay in the table.
    path = RESULTS / "matrix.json"
    rows = (
        {row["asked"]: Row(**row) for row in json.loads(path.read_text())} if path.exists() else {}
    )
    for version in options.versions:
        with tempfile.TemporaryDirectory(prefix="jacdiag-matrix-") as folder:
            rows[version] = run(version, Path(folder), options.tests, options.disk)
        print(rows[version], flush=True)
        write([rows[known] for known in VERSIONS if known in rows])
    return int(any(row.failed or row.note for row in rows.values()))


def run(version: str, folder: Path, tests: tuple[str, ...], disk: float) -> Row:
    """Install one version and run the tests with it, if at least `disk` GB are free."""
    if shutil.disk_usage(folder).free < disk * 1e9:
        return Row(asked=version, note=f"not run: less than {disk:g} GB of disk are free")
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    others = [line for line in project["dependencies"] if not line.startswith("torch")]
    command = [
        str(python),
        "-m",
        "pip",
        "install",
        "-q",
        "--no-cache-dir",
        f"torch=={version}.*",
        *others,
        *TOOLS,
    ]
    installed = subprocess.run(command, capture_output=True, text=True)
    if installed.returncode != 0:
        last = (installed.stderr.strip().splitlines() or ["no message"])[-1]
        return Row(asked=version, note=f"cannot be installed here: {last[:120]}")
    return measure(version, python, tests)


def measure(version: str, python: Path, tests: tuple[str, ...]) -> Row:
    """Run the tests, and one audit in which no warning may appear."""
    environment = {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}",
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
    }
    ask = "import torch; print(torch.__version__)"
    asked = subprocess.run([str(python), "-c", ask], capture_output=True, text=True)
    outcomes = python.parent / "outcomes.xml"
    begun = time.perf_counter()
    done = subprocess.run(
        [str(python), "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={outcomes}", *tests],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    seconds = time.perf_counter() - begun
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-2000:], flush=True)
    quiet = subprocess.run(
        [str(python), "-W", "error", "-c", QUIET],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    last = (quiet.stderr.strip().splitlines() or [""])[-1]
    known = Row(
        asked=version,
        torch=asked.stdout.strip(),
        python=platform.python_version(),
        warnings=last if quiet.returncode else "",
        seconds=round(seconds, 1),
    )
    if not outcomes.exists():
        return replace(known, note="the tests did not run to their end")
    suite = ElementTree.parse(outcomes).getroot()[0].attrib
    failed = int(suite["failures"]) + int(suite["errors"])
    skipped = int(suite["skipped"])
    return replace(
        known, passed=int(suite["tests"]) - failed - skipped, failed=failed, skipped=skipped
    )


def write(rows: list[Row]) -> None:
    """Write the table and the figures behind it."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "matrix.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    lines = [
        "# Versions of torch",
        "",
        "Written by `make matrix`: a fast part of the tests, and an audit under",
    ]
    lines += [
        "`python -W error`.",
        "",
        "| torch | Python | passed | failed | skipped | warnings | note |",
    ]
    lines.append("|---|---|---:|---:|---:|---|---|")
    for row in rows:
        name = row.torch or row.asked
        said = row.warnings or ("none" if row.torch else "–")
        lines.append(
            f"| {name} | {row.python} | {row.passed} | {row.failed} | {row.skipped} | {said} | "
            f"{row.note} |"
        )
    (RESULTS / "matrix.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
