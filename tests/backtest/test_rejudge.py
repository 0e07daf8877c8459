"""A log played through the live rules says what was said in the run; with other thresholds or
curves, other things.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from monitor.rig import adam, plain_step, small

import jacdiag
from jacdiag.backtest import read_runs
from jacdiag.backtest.archive import encoded
from jacdiag.backtest.run_files import rejudged
from jacdiag.records.risk import RiskCurve, RiskTable
from jacdiag.records.run_log import RunLog, read_run
from jacdiag.rules.risk_curves import risk_toml
from jacdiag.rules.thresholds import load_thresholds

RANGES = {"figure": [1e-9, 1e9], "lr": [1e-9, 1e9], "width": [1.0, 1e6], "layers": [1.0, 1e3]}
CURVE = RiskCurve(
    "pre", "worst branch norm", [0.0, 0.0, 1.0], [[0.0] * 3] * 3, RANGES, 100, 40, "made up"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that goes on from a checkpoint at step 60 and is broken at step 90."""
    made = tmp_path_factory.mktemp("run")
    curves = made / "risk.toml"
    curves.write_text(risk_toml(RiskTable({"pre": CURVE})), encoding="utf-8")
    thresholds: dict[str, Any] = {"stable_rank_fall": {"info": 1.5}}
    model = small()
    optimizer = adam(model)
    options = {"log_dir": made, "every": 10, "stats_every": None, "log_every": 5, "quiet": True}
    saved: dict[str, Any] | None = None
    for first, last in ((1, 60), (61, 110)):
        w = jacdiag.watch(model, optimizer, resume=first > 1, thresholds=thresholds, **options)
        if saved is not None:
            w.load_state_dict(saved)
        for step in range(first, last + 1):
            if step == 90:
                torch.nn.init.normal_(model.transformer["wte"].weight, std=50.0)
            loss, norm = plain_step(model, optimizer, step)
            w.step(loss, grad_norm=norm)
        saved = w.state_dict()
        w.close()
    return made


def told(log: RunLog) -> list[tuple[int, str, str]]:
    """What the live rules said in the run; what JD1xx says of a probe is not theirs."""
    return [(a["step"], a["code"], a["what"]) for a in log.alerts if a["code"].startswith("JD5")]


def test_rejudging_with_the_same_rules_gives_the_same_alerts(folder: Path) -> None:
    log = read_run(folder)
    made = rejudged(log, load_thresholds())
    assert log.resumes == [60] and {"JD501", "JD504"} <= {code for _, code, _ in told(log)}
    assert sorted((a.step, a.code) for a in made if a.code != "JD105") == sorted(
        (s, c) for s, c, _ in told(log)
    )


def test_rejudging_with_other_thresholds_changes_the_alerts(folder: Path) -> None:
    log = read_run(folder)
    names = ("joint_one", "joint_both", "lift_both", "update_ratio", "gain_drift", "weight_write")
    silent = {name: {"warning": 1e9} for name in names}
    calm = {"spike_score": {"info": 1e9}}
    assert rejudged(log, load_thresholds({**silent, **calm})) == []
    rates = [row["lr"] for row in log.steps]
    path = folder / "louder.toml"
    louder = RiskCurve(
        "pre", CURVE.figure, [20.0, 0.0, 1.0], CURVE.covariance, RANGES, 100, 40, "made up"
    )
    path.write_text(risk_toml(RiskTable({"pre": louder})), encoding="utf-8")
    first = [a for a in rejudged(log, load_thresholds(risk=str(path))) if a.code == "JD105"]
    assert [(a.step, a.level) for a in first] == [(2, "error")] and rates[0] > 0


def test_rejudged_runs_hold_the_alerts_of_the_current_rules(folder: Path) -> None:
    (as_said,) = read_runs([folder])
    (again,) = read_runs([folder], rules=load_thresholds())
    live = [(step, code) for step, code in as_said.alerts if code.startswith("JD5")]
    assert sorted(live) == sorted(a for a in again.alerts if a[1] != "JD105") and live


def test_command_rejudges_a_packed_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from jacdiag_cli.main import main

    packed = tmp_path / "a.runs"
    packed.write_bytes(encoded(read_runs([folder]), packed))
    curves, calm = str(folder / "risk.toml"), tmp_path / "calm" / "run.jsonl"
    calm.parent.mkdir()
    lines = (folder / "run.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    calm.write_text(
        "".join(line for line in lines if json.loads(line).get("step", 0) < 90), encoding="utf-8"
    )
    assert (
        main(
            ["backtest", str(folder), str(calm), "--rejudge", "--risk", curves, "--format", "json"]
        )
        == 0
    )
    codes = [d["code"] for d in json.loads(capsys.readouterr().out)["detectors"]]
    assert "JD501" in codes and "JD103" not in codes
    assert main(["backtest", str(packed), "--rejudge"]) == 2
    assert "does not hold what the live rules look at" in capsys.readouterr().err
    poor = tmp_path / "poor" / "run.jsonl"
    poor.parent.mkdir()
    poor.write_text(
        '{"v":1,"type":"run","groups":[]}\n{"v":1,"type":"step","step":1,"loss":2.0}\n',
        encoding="utf-8",
    )
    assert main(["backtest", str(poor), "--rejudge"]) == 2
    assert "'poor' does not hold what the live rules look at" in capsys.readouterr().err
    assert main(["backtest", str(folder), "--risk", curves]) == 2
    assert "--risk is for --rejudge" in capsys.readouterr().err
    assert main(["backtest", str(folder), "--rejudge", "--risk", str(tmp_path / "none.toml")]) == 2
    assert "none.toml" in capsys.readouterr().err
