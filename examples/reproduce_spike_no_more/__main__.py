"""Reproduces "Spike No More" (arXiv 2312.16903) as far as a small machine allows.

    python -m examples.reproduce_spike_no_more figure2 --out out/paper             one part
    python -m examples.reproduce_spike_no_more all --out out/paper --jobs 2        everything
    python -m examples.reproduce_spike_no_more all --out /tmp/paper --quick        minutes

Each part says first what time it will take, and writes PART.json, PART.md and PART.png. The same
seeds give the same numbers on the same machine.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from . import figure2, figures34, questions
from .part import Data, Options, Part, single_thread, write

PARTS: dict[str, Part] = {
    part.name: part
    for part in (figure2.PART, figures34.PART, questions.PART, *questions.PARTS.values())
}
WHOLE = ("figure2", "figures34", "questions")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--runs", type=Path, help="folder of the training runs, kept between calls; OUT/runs"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes at once, one thread each")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument(
        "--redraw", action="store_true", help="tables, sentences and picture again, from PART.json"
    )
    asked = parser.parse_args()
    options = Options(runs=asked.runs or asked.out / "runs", jobs=asked.jobs, quick=asked.quick)
    single_thread()
    for name in WHOLE if asked.part == "all" else (asked.part,):
        run(PARTS[name], options, asked.out, redraw=asked.redraw)


def run(part: Part, options: Options, out: Path, *, redraw: bool = False) -> Data:
    """Runs one part, or makes its tables and picture again from the numbers that are there; returns
    them.
    """
    if redraw:
        data = kept(part, out)
    else:
        seconds = part.estimate(options)
        print(
            f"{part.name}: about {told(seconds)} of one core; {options.jobs} at once, if they are "
            "free",
            flush=True,
        )
        begun = time.perf_counter()
        if part.measure is not None:
            data = part.measure(options)
        else:
            data = {key: run(inner, options, out) for key, inner in part.parts.items()}
        print(f"{part.name}: done after {told(time.perf_counter() - begun)}", flush=True)
    write(part, data, out)
    for sentence in () if part.parts else part.tell(data):
        print(f"  {sentence}")
    return data


def kept(part: Part, out: Path) -> Data:
    """The numbers of an earlier call: of the parts of a part where all are there."""
    if part.parts and all((out / f"{inner.name}.json").exists() for inner in part.parts.values()):
        return {key: kept(inner, out) for key, inner in part.parts.items()}
    found: Data = json.loads((out / f"{part.name}.json").read_text(encoding="utf-8"))
    return found


def told(seconds: float) -> str:
    """A duration for people."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    main()
