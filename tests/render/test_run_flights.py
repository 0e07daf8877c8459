"""An alert names its flight and the next command, but only if a flight was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jacdiag_cli.main import main
from render.run_logs import write_log

from jacdiag.records.run_log import read_run, to_line
from jacdiag.render.content.run_flights import flights_of_run


def with_flight(folder: Path, *, batch: bool = True, deleted: bool = False) -> Path:
    """A run with an alert at step 200, and the flight that the watch wrote then."""
    write_log(folder, 300, spike=200)
    log = folder / "run.jsonl"
    note = to_line("note", {"step": 200, "text": "flight recorder: flight-200"})
    log.write_bytes(log.read_bytes() + note)
    if not deleted:
        (folder / "flight-200").mkdir()
    if batch:
        (folder / "flight-200" / "batch.pt").write_bytes(b"")
    return folder


def test_plot_says_the_flight_of_an_alert_and_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_flight(tmp_path / "run a")
    page = tmp_path / "run.html"
    assert main(["plot", str(folder), "--html", str(page)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[1].startswith("alert: step 200: JD502 warning: ")
    flight = folder / "flight-200"
    assert lines[2:4] == [
        f"  flight: {flight}",
        f"  next: jacdiag audit CHECKPOINT --replay '{flight}'",
    ]
    # The alert of the step after it wrote none.
    assert lines[4].startswith("alert: step 201") and len(lines) == 5
    assert f"flight: {flight}" in page.read_text(encoding="utf-8")


def test_live_once_says_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = with_flight(tmp_path)
    assert main(["live", str(folder), "--once"]) == 0
    command = f"jacdiag audit CHECKPOINT --replay {folder}/flight-200"
    assert f"    next: {command}" in capsys.readouterr().out.splitlines()


def test_nothing_is_said_of_a_flight_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(tmp_path / "none", 300, spike=200)
    assert main(["plot", str(tmp_path / "none")]) == 0
    assert "flight" not in capsys.readouterr().err
    gone = with_flight(tmp_path / "gone", deleted=True, batch=False)
    assert flights_of_run(read_run(gone), gone) == {}


def test_a_flight_without_a_batch_offers_no_replay(tmp_path: Path) -> None:
    folder = with_flight(tmp_path, batch=False)
    [flight] = flights_of_run(read_run(folder), folder).values()
    assert flight.lines == [f"flight: {folder}/flight-200 (no batch was kept)"]


def test_a_log_cannot_name_a_folder_elsewhere(tmp_path: Path) -> None:
    folder = with_flight(tmp_path / "run")
    text = (folder / "run.jsonl").read_text(encoding="utf-8")
    (folder / "run.jsonl").write_text(text.replace("flight-200", "../run"), encoding="utf-8")
    assert flights_of_run(read_run(folder), folder) == {}
    assert json.loads(text.splitlines()[0])["type"] == "run"
