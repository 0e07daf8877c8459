"""The examples run as they stand, and leave a log with every step and a probe."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from fork_server import fork_server

from jacdiag.records.run_log import read_run

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
CASES = {
    "plain": ["watch_plain.py", "12"],
    "amp": ["watch_amp_compile.py", "12"],
    "fsdp": ["watch_fsdp.py", "12"],
    "ddp": ["watch_fsdp.py", "12", "ddp"],
    "hf": ["watch_huggingface.py", "12"],
    "accelerate": ["watch_huggingface.py", "12", "accelerate"],
    "lightning": ["watch_lightning.py", "12"],
    "fabric": ["watch_others.py", "12", "fabric"],
    "litgpt": ["watch_others.py", "12", "litgpt"],
    "x-transformers": ["watch_others.py", "12", "x-transformers"],
    "torchtitan": ["watch_others.py", "12", "torchtitan"],
}
# What an example needs beyond torch, if it may be missing.
NEEDS = {
    "lightning": "lightning",
    "fabric": "lightning",
    "litgpt": "litgpt",
    "x-transformers": "x_transformers",
    "torchtitan": "torchtitan",
}


LONG = {
    "amp",
    "fsdp",
    "ddp",
    "hf",
    "accelerate",
    "x-transformers",
    "lightning",
    "fabric",
    "litgpt",
    "torchtitan",
}


def ended(command: list[str], folder: Path, seconds: float = 240) -> tuple[int, str]:
    """Exit code and output. One that hangs is killed with all its ranks, and its output ends with
    where they stood.
    """
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONFAULTHANDLER": "1",
    }
    process = subprocess.Popen(
        command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        output = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            child.send_signal(signal.SIGABRT)
        output = process.communicate()[0]
    return process.returncode, output


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long) if n in LONG else n for n in CASES]
)
def test_example_script_runs_and_logs_every_step(name: str, tmp_path: Path) -> None:
    script, *args = CASES[name]
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    command = [sys.executable, str(EXAMPLES / script), *args]
    if script == "watch_fsdp.py":
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
        ]
        command = [*launcher, *command[1:]]
    if name in LONG:
        code, output = ended(command, tmp_path)
    else:
        process = fork_server().start(command[1:], tmp_path)
        output = process.communicate(timeout=240)
        code = process.returncode
    assert code == 0, output
    (file,) = tmp_path.glob("runs/*/run.jsonl")
    run = read_run(file)
    assert [row["step"] for row in run.steps][:12] == list(range(1, 13))
    assert run.probes and len(run.probes[0]["report"]["sublayers"]) >= 4 and not run.faults
    assert run.ended is not None
