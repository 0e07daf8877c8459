"""A skip list: what the watch writes, and what the next run of the loop leaves out."""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.rig import free_port
from fork_server import fork_server
from monitor.rig import V, adam, batch, small
from torch import Tensor

import jacdiag
from jacdiag.errors import UsageError
from jacdiag.monitor.skip_list import (
    CODES,
    SkipList,
    append_line,
    content_of,
    read_skip_list,
    skipping,
)
from jacdiag.records.run_log import Alert

ROOT = Path(__file__).parents[2]
BAD = 149  # the place of the batch of step 150, counted from 0


def batches(count: int, bad: int | None = None, seed: int = 99) -> list[tuple[Tensor, Tensor]]:
    """Four batches again and again, and one of noise."""
    data = [batch(step % 4) for step in range(1, count + 1)]
    if bad is not None:
        generator = torch.Generator().manual_seed(seed)
        data[bad] = tuple(torch.randint(V, (4, 8), generator=generator) for _ in range(2))  # type: ignore[assignment]
    return data


def train(folder: Path, loader: Any, skip_list: Path, micro: int = 1) -> list[int]:
    """Train on a loader; the loss of the noise is scaled up. Return the steps of the alerts."""
    model = small(dropout=0.1)
    optimizer = adam(model, lr=1e-3)
    noise = content_of(batches(200, BAD)[BAD])
    options: dict[str, Any] = {
        "every": None,
        "stats_every": None,
        "log_every": 5,
        "quiet": True,
        "strict": True,
    }
    with jacdiag.watch(model, optimizer, log_dir=folder, skip_list=skip_list, **options) as w:
        scale, count = 1.0, 0
        for x, y in loader:
            scale = 5.0 if content_of((x, y)) == noise else scale
            _, loss = model(x, y)
            (loss * scale * (10 if scale > 1 else 1)).backward()
            count += 1
            if count % micro:
                continue
            optimizer.step()
            optimizer.zero_grad()
            w.step(loss.detach() * scale)
            scale = 1.0
        alerts = w.alerts
    return [alert.step for alert in alerts if alert.code.startswith(CODES)]


def test_the_batch_of_an_alert_is_recorded_and_left_out_of_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "lists" / "skip.jsonl"
    data = batches(170, BAD)
    assert train(tmp_path / "a", jacdiag.skipping(data, path), path) == [150]
    (entry,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert (entry["step"], entry["positions"], entry["code"]) == (150, [BAD], "JD502")
    assert entry["contents"] == [content_of(data[BAD])] and entry["run"] == str(tmp_path / "a")

    again = jacdiag.skipping(data, path)
    assert train(tmp_path / "b", again, path) == []
    assert again.skipped == [BAD] and again.position == 170 == len(again)
    assert len(path.read_text().splitlines()) == 1  # nothing was found, nothing was added


def test_micro_batches_of_a_step_are_recorded_together(tmp_path: Path) -> None:
    path = tmp_path / "skip.jsonl"
    data = batches(340)
    data[298] = batches(200, BAD)[BAD]
    assert train(tmp_path / "a", skipping(data, path), path, micro=2) == [150]
    assert read_skip_list(path).positions.keys() == {298, 299}


def test_a_loop_without_skipping_records_the_step_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "skip.jsonl"
    data = batches(170, BAD)
    assert train(tmp_path / "a", data, path) == [150]
    assert read_skip_list(path).positions == {} and read_skip_list(path).unplaced == [150]
    assert list(skipping(range(170), path)) == list(range(170))
    assert "batches_per_step=" in caplog.text
    caplog.clear()
    assert skipping(data, path, batches_per_step=1).bad.positions == {BAD: None}
    assert read_skip_list(path, batches_per_step=4).positions.keys() == {596, 597, 598, 599}
    assert not caplog.text


def test_a_place_with_other_content_is_not_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "skip.jsonl"
    data = batches(20, 5)
    append_line(str(path), {"positions": [5], "contents": [content_of(data[5])]})
    assert len(list(skipping(data, path))) == 19
    assert "the order of the data has changed" not in caplog.text

    # The same data in another order: the bad batch is left out wherever it is.
    moved = [*data[10:], *data[:10]]
    other = skipping(moved, path)
    assert len(list(other)) == 19 and other.skipped == [15]
    assert "other content" in caplog.text and "the order of the data has changed" in caplog.text
    # Other data altogether: nothing is left out.
    assert len(list(skipping(batches(20), path))) == 20
    # A list by hand knows no content: the place decides.
    hand = tmp_path / "hand.jsonl"
    hand.write_text("5\n")
    assert (
        skipping(moved, hand).bad.positions == {5: None} and len(list(skipping(moved, hand))) == 19
    )


@pytest.mark.parametrize(
    ("lines", "options", "places"),
    [
        ('{"positions": [3, 7]}\n', {}, {3, 7}),
        ('{"from": 3, "to": 6}\n', {}, {3, 4, 5, 6}),
        ("3\n\n7\n", {}, {3, 7}),
        ('{"positions": [3]}\n', {"before": 5, "after": 2}, {0, 1, 2, 3, 4, 5}),
        ('{"step": 2, "v": 1}\n', {"batches_per_step": 3}, {3, 4, 5}),
        ('{"step": 4, "since": 2}\n', {"batches_per_step": 2}, {2, 3, 4, 5, 6, 7}),
        ('{"positions": [3]}\n{"positions": [4], "cont', {}, {3}),  # torn off
        ("", {}, set()),
    ],
)
def test_skip_list_lines_are_parsed_into_positions(
    tmp_path: Path, lines: str, options: dict[str, int], places: set[int]
) -> None:
    path = tmp_path / "skip.jsonl"
    path.write_text(lines)
    assert read_skip_list(path, **options).positions.keys() == places  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "line", ['{"place": 3}', '"three"', "{3}\n{4}", '{"positions": [1], "v": 99}']
)
def test_lines_without_meaning_are_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "skip.jsonl"
    path.write_text(f"{line}\n1\n")
    with pytest.raises(UsageError, match="line 1"):
        skipping([], path)
    with pytest.raises(UsageError, match="before cannot be -1"):
        skipping([], tmp_path / "none", before=-1)


def test_a_run_goes_on_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "skip.jsonl"
    path.write_text("3\n12\n")
    whole = skipping(range(10), path)
    expected = [*whole, *whole]  # two epochs; the place of a batch counts over both
    assert expected == [0, 1, 2, 4, 5, 6, 7, 8, 9, 0, 1, 3, 4, 5, 6, 7, 8, 9] and whole.skipped == [
        3,
        12,
    ]

    for stop in (1, 3, 9, 11, 17):
        first = skipping(range(10), path, start=0)
        seen: list[int] = []
        for _ in range(2):
            for item in first:
                seen.append(item)
                if len(seen) == stop:
                    state = json.loads(json.dumps(first.state_dict()))
        second = skipping(range(10), path)
        second.load_state_dict(state)
        rest = list(second)
        if stop <= 9:  # the first epoch is not over, or nothing of it is left
            rest += list(second)
        assert [*seen[:stop], *rest] == expected, stop
        assert second.position == 20
    with pytest.raises(UsageError, match="this state"):
        whole.load_state_dict({"version": 2})


def test_a_loader_with_a_state_of_its_own_goes_on_by_itself(tmp_path: Path) -> None:
    class Stateful:
        at = 0

        def __iter__(self) -> Any:
            while self.at < 10:
                self.at += 1
                yield self.at - 1

        def state_dict(self) -> dict[str, int]:
            return {"at": self.at}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.at = state["at"]

    path = tmp_path / "skip.jsonl"
    path.write_text("7\n")
    first = skipping(Stateful(), path)
    iterator = iter(first)
    seen = [next(iterator) for _ in range(4)]
    second = skipping(Stateful(), path)
    second.load_state_dict(first.state_dict())
    assert [*seen, *second] == [0, 1, 2, 3, 4, 5, 6, 8, 9]


def test_loader_rebuilt_in_each_epoch_gets_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "skip.jsonl"
    with caplog.at_level(logging.WARNING):
        list(skipping(range(4), path))
        list(skipping(range(4), path, start=4))
        SkipList(path)  # another run in the same process
        list(skipping(range(4), path))
        assert not caplog.text
        list(skipping(range(4), path))
    assert "before the loop over epochs" in caplog.text


def test_only_alerts_of_single_steps_are_recorded(tmp_path: Path) -> None:
    path = tmp_path / "skip.jsonl"
    written = SkipList(path)
    iterator = iter(skipping(range(9), path))
    for step in range(1, 7):
        next(iterator)
        written.step_ended(step)
    for code, recorded in (
        ("JD504", 0),
        ("JD102", 0),
        ("JD507", 0),
        ("JD502", 1),
        ("JD501", 2),
        ("JD505", 3),
    ):
        written.add(Alert(3, code, "warning", "a reason"))
        assert (len(path.read_text().splitlines()) if path.exists() else 0) == recorded
    written.add(Alert(6, "JD501", "warning", "a reason", evidence={"since": 4}))
    assert json.loads(path.read_text().splitlines()[-1])["positions"] == [3, 4, 5]


def test_lines_of_several_writers_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "skip.jsonl"
    path.write_text('{"positions": [1], "what": "torn')  # a writer that was killed
    entry = {"positions": list(range(2000)), "what": "x" * 20000}
    writers = [
        threading.Thread(target=lambda: [append_line(str(path), entry) for _ in range(10)])
        for _ in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    rows = path.read_text().splitlines()
    assert len(rows) == 41 and all(json.loads(row) == entry for row in rows[1:])
    assert read_skip_list(path).positions.keys() == set(range(2000))


def test_a_list_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    model = small()
    options: dict[str, Any] = {
        "every": None,
        "stats_every": None,
        "quiet": True,
        "skip_list": folder,
    }
    with jacdiag.watch(model, adam(model), log_dir=tmp_path / "run", **options) as w:
        w.record.alert(Alert(1, "JD502", "warning", "a reason"))
    faults = [
        json.loads(line) for line in (tmp_path / "run" / "run.jsonl").read_text().splitlines()
    ]
    assert [row["part"] for row in faults if row["type"] == "fault"] == ["skip list"]


def test_content_is_that_of_the_values(tmp_path: Path) -> None:
    x = torch.arange(100_000)
    assert content_of({"x": x}) == content_of({"x": x.clone()}) != content_of({"x": x + 1})
    assert content_of((x, "a")) != content_of((x, "b"))
    others = [
        x.float(),
        x.view(100, 1000),
        x[:0],
        torch.zeros(2, dtype=torch.bfloat16),
        torch.tensor(True),
    ]
    assert len({content_of(other) for other in others}) == len(others)
    assert content_of(x.to("meta")) is None  # on a device: nobody waits for it


RANKS = """
import sys, torch.distributed as dist
import jacdiag
dist.init_process_group("gloo")
rank = dist.get_rank()
for name in ("skip", "wrong"):
    # The list of rank 0 counts: the other one has no such file.
    path = f"{sys.argv[1]}/{name}.jsonl" if rank == 0 else f"{sys.argv[1]}/nowhere.jsonl"
    try:
        kept = list(jacdiag.skipping([f"{rank}-{place}" for place in range(6)], path))
        line = " ".join([str(rank), *kept])
    except jacdiag.JacdiagError as error:
        line = f"{rank} {error}"
    print(line.replace("\\n", " "))
dist.destroy_process_group()
"""


def test_all_ranks_leave_out_the_same_places_and_refuse_the_same_list(tmp_path: Path) -> None:
    """Neither rank waits for the other, whether the list can be read or not."""
    (tmp_path / "skip.jsonl").write_text('{"positions": [1, 4], "contents": ["00", "01"]}\n')
    (tmp_path / "wrong.jsonl").write_text('{"wrong": 1}\n')
    job = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
    }
    ranks = [
        fork_server().start(["-c", RANKS, tmp_path], environment={**job, "RANK": str(rank)})
        for rank in range(2)
    ]
    lines: list[str] = []
    for rank in ranks:
        output, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors
        lines += output.splitlines()
    refused = {line for line in lines if "names no batch" in line}
    assert {line[0] for line in refused} == {"0", "1"}
    assert set(lines) - refused == {"0 0-0 0-2 0-3 0-5", "1 1-0 1-2 1-3 1-5"}
