"""Everything that was never run on an accelerator, in one command and under 10 minutes.

Is a product right, what do TF32 and bfloat16 do to it, how often does the host wait, how fast is an
audit, what does a watch cost beside trainscope and wandb.watch, and do the tests that need CUDA
pass? What a smaller card or a missing library does not allow is left out with a sentence. A row
that is wrong fails the script. The file is written after each row, so that a crash loses none.

    python benchmarks/gpu.py                 on the accelerator; prints, and writes results/gpu.json
    python benchmarks/gpu.py --quick         small shapes on any device, the CPU too; prints only
    python benchmarks/gpu.py --device xpu    on another device than the first one
    python benchmarks/gpu.py --only audit    one part, or several; prints only
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks._gpu import correctness, overhead, speed  # noqa: E402
from benchmarks._gpu.bench import Case, NotHereError, Row, run_cases  # noqa: E402
from benchmarks._gpu.shapes import (  # noqa: E402
    BILLION,
    GPT2,
    SEVEN_BILLION,
    SMALL,
    TOY,
    Shape,
)
from jacdiag.devices import accelerators  # noqa: E402
from jacdiag.devices.device_choice import pick  # noqa: E402
from jacdiag.errors import JacdiagError  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
SECONDS = 570.0
PARTS = ("products", "intervals", "waits", "tests", "audit", "watch")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How large the parts are.

    Attributes:
        exact: shape that is compared with float64 on the CPU.
        audited: shapes whose audits are timed.
        watched: shapes whose training steps are timed with and without watchers.
        product: rows of the square matrices whose product gives the rate.
        rounds, steps: of each contestant in a training loop.
        with_tests: the tests that need CUDA run, too.
    """

    exact: Shape
    audited: tuple[Shape, ...]
    watched: tuple[Shape, ...]
    product: int
    rounds: int
    steps: int
    with_tests: bool = True


FULL = Plan(
    exact=SMALL,
    audited=(GPT2, SEVEN_BILLION),
    watched=(GPT2, BILLION),
    product=8192,
    rounds=3,
    steps=6,
)
QUICK = Plan(
    exact=SMALL,
    audited=(SMALL,),
    watched=(SMALL,),
    product=512,
    rounds=2,
    steps=2,
    with_tests=False,
)
SMALLEST = Plan(
    exact=TOY, audited=(TOY,), watched=(TOY,), product=16, rounds=1, steps=1, with_tests=False
)


def cases_of(plan: Plan, device: torch.device) -> list[Case]:
    """Return what is measured, the cheap and the important first."""
    # 1. Correctness.
    cases = correctness.cases_of(plan.exact, device)
    between_logs = partial(overhead.waits_between_logs, plan.exact, device)
    cases.append(Case("waits", "watch: waits of the host between logs", between_logs))
    if plan.with_tests:
        cases.append(Case("tests", "pytest -m cuda", partial(cuda_tests, device)))

    # 2. Speed.
    for shape in plan.audited:
        timed: Callable[[], Row] = partial(speed.audit_time, shape, device, plan.product)
        name = f"{shape.name}, B {shape.batch}, T {shape.length}"
        cases.append(Case("audit", name, timed, shape.bytes_to_audit))
    for shape in plan.watched:
        for watcher in overhead.watchers():
            timed = partial(overhead.overhead, shape, device, watcher, plan.rounds, plan.steps)
            name = f"{shape.name}: {watcher.name}"
            cases.append(Case("watch", name, timed, shape.bytes_to_train))
    return cases


def cuda_tests(device: torch.device) -> Row:
    """Run the tests that need CUDA.

    Raises:
        NotHereError: there is no CUDA, or no pytest.
    """
    # 1. What they need.
    if device.type != "cuda":
        raise NotHereError(f"they need CUDA, and the device is of kind {device.type}")
    if importlib.util.find_spec("pytest") is None:
        raise NotHereError("pytest is not installed")

    # 2. Run them in a process of their own, which sees the chosen device alone.
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", *cuda_test_files()]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible_name(device)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
    return Row(
        part="tests",
        what="pytest -m cuda",
        figure=lines[-1] if lines else "no output",
        passes=done.returncode == 0,
        numbers={"exit_code": done.returncode, "output": lines[-20:]},
    )


def cuda_test_files() -> list[str]:
    """Return the test files that have the mark `cuda`, as paths in the repository."""
    paths = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if "pytest.mark.cuda" in path.read_text(encoding="utf-8"):
            paths.append(str(path.relative_to(ROOT)))
    return paths


def visible_name(device: torch.device) -> str:
    """Return how CUDA_VISIBLE_DEVICES names a device of this process.

    The variable may be set for this process already. Indices count what it lists then.
    """
    index = 0 if device.index is None else device.index
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in listed.split(",") if name.strip()]
    return names[index] if index < len(names) else str(index)


def measure(
    plan: Plan,
    device: torch.device,
    only: tuple[str, ...] = PARTS,
    seconds: float = SECONDS,
    results: Path | None = None,
) -> dict[str, Any]:
    """Measure the parts on a device, print the table and return the results.

    Args:
        plan: how large they are.
        device: where they run.
        only: the parts.
        seconds: after which nothing goes on.
        results: file that gets the results after each row; None writes none.
    """
    begun = time.monotonic()
    module = accelerators.module_of(device.type)
    name = getattr(module, "get_device_name", lambda _: device.type)
    with accelerators.made_current(device):
        cases = [case for case in cases_of(plan, device) if case.part in only]
        about = {
            "device": str(device),
            "name": "cpu" if device.type == "cpu" else name(device),
            "torch": torch.__version__,
        }
        print(", ".join(about.values()))

        def result_of(rows: list[Row]) -> dict[str, Any]:
            taken = round(time.monotonic() - begun, 1)
            return {**about, "seconds": taken, "rows": [asdict(row) for row in rows]}

        def keep(rows: list[Row]) -> None:
            if results is not None:
                text = json.dumps(result_of(rows), indent=1) + "\n"
                results.write_text(text, encoding="utf-8")

        rows = run_cases(cases, device, seconds, keep)
    return result_of(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes; nothing is written")
    parser.add_argument("--device", help="as torch names it (default: the first accelerator)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some of the parts")
    args = parser.parse_args()

    # 1. The device.
    kinds = accelerators.present_kinds()
    try:
        device = pick(args.device or (kinds[0] if kinds else "cpu"))
    except JacdiagError as error:
        print(error, file=sys.stderr)
        return 2
    if device.type == "cpu" and not args.quick:
        print("no accelerator is here; --quick runs small shapes on the CPU")
        return 0

    # 2. The parts.
    is_whole = tuple(args.only) == PARTS
    results = RESULTS if is_whole and not args.quick else None
    plan = QUICK if args.quick else FULL
    result = measure(plan, device, tuple(args.only), results=results)
    wrong = [row["what"] for row in result["rows"] if row["passes"] is False]
    if wrong:
        print("wrong: " + "; ".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
