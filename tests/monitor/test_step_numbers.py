"""`w.step(loss, step=it)`: the trainer's own numbers, resumed runs, loops that go back, numbers of
no use.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monitor.rig import adam, lines, plain_step, small

import jacdiag
from jacdiag.errors import UsageError
from jacdiag.monitor.histograms import Histograms
from jacdiag.monitor.schedule import Cadence
from jacdiag.monitor.step_numbers import StepNumbers
from jacdiag.records.run_log import read_run

OPTIONS: dict[str, Any] = {
    "every": None,
    "stats_every": None,
    "log_every": 4,
    "quiet": True,
    "strict": True,
}


def go(folder: Path, steps: Any, **options: Any) -> Any:
    """Trains with these numbers and returns the watch (closed)."""
    model = small()
    optimizer = adam(model)
    with jacdiag.watch(model, optimizer, log_dir=folder, **{**OPTIONS, **options}) as w:
        for step in steps:
            loss, norm = plain_step(model, optimizer, step or 0)
            w.step(loss, grad_norm=norm, step=step)
    return w


def logged(folder: Path) -> list[int]:
    """The steps that a reader sees."""
    return [row["step"] for row in read_run(folder).steps]


def test_a_resumed_run_doubles_no_row_and_loses_none(tmp_path: Path) -> None:
    """From a checkpoint before the last row, and then after a gap; the log itself is only appended
    to.
    """
    go(tmp_path, range(1, 15), every=10)
    first = (tmp_path / "run.jsonl").read_bytes()
    go(tmp_path, range(11, 20), resume=True, every=200)
    run = read_run(tmp_path)
    assert logged(tmp_path) == list(range(1, 20)) and run.resumes == [10]
    assert (tmp_path / "run.jsonl").read_bytes().startswith(first)
    assert [row["step"] for row in run.probes] == [0, 10], (
        "of the weights that the checkpoint has, and once"
    )
    assert [row["step"] for row in lines(tmp_path, "probe")] == [0, 10, 10]
    raw = [row["step"] for row in lines(tmp_path, "step")]
    assert raw == [*range(1, 15), *range(11, 20)]
    w = go(tmp_path, range(31, 34), resume=True)
    assert logged(tmp_path) == [*range(1, 20), 31, 32, 33] and read_run(tmp_path).resumes == [
        10,
        30,
    ]
    assert w.count == 33


def test_a_new_log_of_a_run_that_goes_on_begins_where_the_run_is(tmp_path: Path) -> None:
    go(tmp_path, range(401, 405), every=200)
    run = read_run(tmp_path)
    assert logged(tmp_path) == [401, 402, 403, 404] and run.resumes == []
    assert [row["step"] for row in run.probes] == [400] == [row["step"] for row in run.stats]


def test_numbers_that_begin_with_zero(tmp_path: Path) -> None:
    w = go(tmp_path, range(5), every=2)
    run = read_run(tmp_path)
    assert logged(tmp_path) == [0, 1, 2, 3, 4] and w.count == 4
    assert [row["step"] for row in run.probes] == [0, 2, 4], (
        "that of step 0 is of the weights before the first update"
    )


def test_without_numbers_all_is_as_before(tmp_path: Path) -> None:
    go(tmp_path, [None] * 6)
    go(tmp_path, [None] * 3, resume=True)
    assert logged(tmp_path) == list(range(1, 10)) and read_run(tmp_path).resumes == [6]
    assert not lines(tmp_path, "note")


def test_a_number_that_is_given_once(tmp_path: Path) -> None:
    go(tmp_path, [401, None, None, 410, None])
    assert logged(tmp_path) == [401, 402, 403, 410, 411] and not lines(tmp_path, "note")


def test_step_numbers_that_go_back_get_a_warning_and_keep_the_later_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    w = go(tmp_path, [*range(1, 15), *range(9, 13)], keep_batches=40)
    assert caplog.text.count("step=9 came after step=14: the loop has gone back") == 1
    assert (
        logged(tmp_path) == list(range(1, 13))
        and read_run(tmp_path).resumes == [8]
        and w.count == 12
    )
    assert len(lines(tmp_path, "step")) == 18


@pytest.mark.parametrize(
    "steps", [[0, 1, 2, 0, 1, 2, 0, 1, 2], [5, 5, 5, 6, 6, 6], [7, 8, 9, 7, 8, 9]], ids=str
)
def test_step_numbers_that_do_not_grow_warn_once_and_lose_no_row(
    steps: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    go(tmp_path, steps)
    assert (
        logged(tmp_path) == list(range(steps[0], steps[0] + len(steps)))
        and read_run(tmp_path).resumes == []
    )
    assert caplog.text.count("do not grow over the run") == 1 and "gone back" not in caplog.text


def test_growing_step_numbers_give_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    go(tmp_path, [1, 2, 3, 10, 11])
    assert not lines(tmp_path, "note") and "step=" not in caplog.text


def test_steps_counted_in_micro_batches(tmp_path: Path) -> None:
    """Flights, kept batches and cadences follow; a cadence that the numbers step over is kept."""
    model = small()
    optimizer = adam(model)
    w = jacdiag.watch(model, optimizer, log_dir=tmp_path, **{**OPTIONS, "stats_every": 10})
    for step in range(3, 75, 3):
        loss, norm = plain_step(model, optimizer, step)
        w.step(loss, grad_norm=norm, step=step)
    w.__exit__(ValueError, ValueError("broken"), None)
    assert logged(tmp_path) == list(range(3, 75, 3))
    assert [row["step"] for row in read_run(tmp_path).stats] == [2, 12, 21, 30, 42, 51, 60, 72]
    about = json.loads((tmp_path / "flight-72" / "about.json").read_text())
    assert about["step"] == about["batch_step"] == 72
    assert w.batches is None and (tmp_path / "flight-72" / "batch.pt").is_file()
    earlier = [path.stem for path in (tmp_path / "flight-72").glob("batch-*.pt")]
    assert earlier and all(int(name.rpartition("-")[2]) < 72 for name in earlier)


def test_the_state_of_a_checkpoint_and_its_number_agree(tmp_path: Path) -> None:
    model = small()
    optimizer = adam(model)
    w = jacdiag.watch(model, optimizer, log_dir=tmp_path, **OPTIONS)
    for step in range(100, 110):
        w.step(*plain_step(model, optimizer, step)[:1], step=step)
        if step == 106:
            state = w.state_dict()
    w.close()
    with jacdiag.watch(model, optimizer, log_dir=tmp_path, resume=True, **OPTIONS) as w:
        w.load_state_dict(state)
        w.step(*plain_step(model, optimizer, 107)[:1], step=107)
    assert logged(tmp_path) == list(range(100, 108)) and read_run(tmp_path).resumes == [106]


@pytest.mark.parametrize("given", [np.int64(7), torch.tensor(7)], ids=repr)
def test_numbers_of_other_libraries(given: Any) -> None:
    assert StepNumbers(0, pytest.fail).advance(given).number == 7


@pytest.mark.parametrize("given", [True, 1.5, -1, "7"], ids=repr)
def test_what_is_no_number_is_refused(given: Any) -> None:
    with pytest.raises(UsageError, match="step cannot be"):
        StepNumbers(0, pytest.fail).advance(given)


def test_cadences_that_numbers_step_over() -> None:
    cadence = Cadence.of(10, "every")
    assert [step for step in range(4, 60, 4) if cadence.due(step)] == [12, 20, 32, 40, 52]
    assert [step for step in range(3, 60, 3) if Histograms(10).is_due(step, 3)] == [
        12,
        21,
        30,
        42,
        51,
    ]
    assert [step for step in range(1, 31) if Histograms(10).is_due(step)] == [10, 20, 30]
