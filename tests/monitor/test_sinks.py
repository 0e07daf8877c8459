"""The sinks with the real libraries: slash-named figures, alerts, and no network beyond this
machine.
"""

from __future__ import annotations

import importlib
import logging
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from monitor.rig import lines, small, trained

from jacdiag.errors import UsageError
from jacdiag.monitor.alert_moment import AlertMoment, takes_moment
from jacdiag.monitor.log.openmetrics import METRICS_FILE, OpenMetrics
from jacdiag.monitor.log.sinks import open_sinks, slashed
from jacdiag.records.run_log import Alert

ALERT = Alert(
    7, "JD501", "warning", "loss 9.1 <!channel> above", ["h.0.attn", "h.1.mlp"], {"z": float("inf")}
)


def alerting(steps: int = 8, *, nan_at: int = 5, **options: Any) -> Any:
    """Train with a loss that is not finite at one step; return the closed watch."""

    def one(model: Any, optimizer: Any, step: int) -> tuple[Any, Any]:
        from monitor.rig import plain_step

        loss, norm = plain_step(model, optimizer, step)
        return (loss * float("nan") if step == nan_at else loss), norm

    given = {"every": None, "stats_every": None, "log_every": 2, "strict": True, **options}
    return trained(steps, given, one=one)[3]


def test_tensorboard_sink_writes_named_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(
        8,
        {"every": 4, "log_every": 2, "log_dir": tmp_path, "sinks": ["tensorboard"], "strict": True},
    )
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {
        "jacdiag/loss",
        "jacdiag/gain/transformer.h.0.attn",
        "jacdiag/grad/transformer.h.1.mlp",
    } <= set(tags)
    losses = [row["loss"] for row in lines(tmp_path, "step")]
    assert [e.value for e in events.Scalars("jacdiag/loss")] == pytest.approx(losses, rel=1e-6)
    assert [e.step for e in events.Scalars("jacdiag/gain/transformer.h.0.attn")] == [0, 4, 8]


def test_tensorboard_shows_alerts_as_text(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watch = alerting(log_dir=tmp_path, sinks=["tensorboard"])
    assert [alert.code for alert in watch.alerts] == ["JD505"]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    [event] = events.Tensors("jacdiag/alerts/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert event.step == 5 and "JD505 error at step 5" in text and watch.alerts[0].what in text


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    watch = alerting(log_dir=tmp_path, sinks=["wandb"])
    (file,) = tmp_path.rglob("*.wandb")
    wanted = [b"jacdiag/loss", b"JD505 error at step 5", watch.alerts[0].what.encode()]
    # finish() of wandb 0.31 returns a moment before the file is written
    until = time.monotonic() + 20
    while not all(text in file.read_bytes() for text in wanted) and time.monotonic() < until:
        time.sleep(0.1)
    data = file.read_bytes()
    assert [text for text in wanted if text not in data] == []


@pytest.fixture
def trackio_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("trackio")
    folder = tmp_path / "trackio"
    monkeypatch.setenv("TRACKIO_DIR", str(folder))
    # the folder is read at import
    for name in ("trackio.utils", "trackio.sqlite_storage", "trackio"):
        module = importlib.import_module(name)
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", folder)
    return folder


def rows_of(folder: Path, table: str) -> list[dict[str, Any]]:
    """All rows of a table of trackio's data base."""
    for _ in range(100):
        for file in folder.rglob("*.db"):
            with sqlite3.connect(file) as connection:
                connection.row_factory = sqlite3.Row
                tables = {row[0] for row in connection.execute("select name from sqlite_master")}
                if table in tables:
                    return [dict(row) for row in connection.execute(f"select * from {table}")]
        time.sleep(0.1)
    raise AssertionError(f"no table {table} below {folder}")


def test_trackio_sink_writes_metrics_and_alerts(trackio_folder: Path, tmp_path: Path) -> None:
    watch = alerting(log_dir=tmp_path / "run-a", sinks=["trackio"])
    metrics = rows_of(trackio_folder, "metrics")
    assert {row["step"] for row in metrics} == set(range(9))
    assert any("jacdiag/loss" in str(row["metrics"]) for row in metrics)
    [alert] = rows_of(trackio_folder, "alerts")
    assert alert["title"] == "JD505 error at step 5" and watch.alerts[0].what in alert["text"]
    assert alert["level"] == "error" and alert["run_name"] == "run-a"


def test_trackio_uses_the_run_that_is_open_and_leaves_it_open(
    trackio_folder: Path, tmp_path: Path
) -> None:
    import trackio
    from trackio import context_vars

    own = trackio.init(
        project="mine", name="theirs", auto_log_cpu=False, auto_log_gpu=False, embed=False
    )
    alerting(log_dir=tmp_path / "run-a", sinks=["trackio"])
    assert context_vars.current_run.get() is own
    trackio.log({"own": 1.0})
    trackio.finish()
    assert {row["run_name"] for row in rows_of(trackio_folder, "metrics")} == {"theirs"}


@pytest.fixture
def mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    yield mlflow
    mlflow.set_tracking_uri(before)


def test_mlflow_sink_writes_metrics_and_closes_its_run(mlflow_store: Any, tmp_path: Path) -> None:
    watch = alerting(log_dir=tmp_path / "run-a", sinks=["mlflow"])
    assert mlflow_store.active_run() is None, "a start_run of the loop would be refused"
    client = mlflow_store.MlflowClient()
    experiment = client.get_experiment_by_name("jacdiag")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run-a" and run.info.status == "FINISHED"
    losses = {row["step"]: row["loss"] for row in lines(tmp_path / "run-a", "step")}
    history = {
        metric.step: metric.value
        for metric in client.get_metric_history(run.info.run_id, "jacdiag/loss")
    }
    assert history.keys() == losses.keys()
    assert history[4] == pytest.approx(losses[4], rel=1e-6) and history[5] != history[5]
    assert {"jacdiag/grad/_embedding_", "jacdiag/logit/transformer.h.0.attn"} <= set(
        run.data.metrics
    )
    assert run.data.tags["jacdiag.alert.JD505.5"].startswith(
        "JD505 error at step 5: " + watch.alerts[0].what
    )


def test_mlflow_uses_the_run_that_is_active(mlflow_store: Any, tmp_path: Path) -> None:
    with mlflow_store.start_run() as run:
        alerting(log_dir=tmp_path / "run-a", sinks=["mlflow"])
        assert mlflow_store.active_run().info.run_id == run.info.run_id
    found = mlflow_store.MlflowClient().get_run(run.info.run_id)
    assert "jacdiag/loss" in found.data.metrics and found.info.status == "FINISHED"


# -- OpenMetrics -----------------------------------------------------------------------------------
def parsed(text: str) -> dict[str, list[Any]]:
    """Samples by name, the same by the parsers of both formats."""
    parser = pytest.importorskip("prometheus_client.parser")
    strict = pytest.importorskip("prometheus_client.openmetrics.parser")
    both = []
    for parse in (parser.text_string_to_metric_families, strict.text_string_to_metric_families):
        families = list(parse(text))
        assert {family.type for family in families} == {"gauge"}
        both.append([sample for family in families for sample in family.samples])
    assert [(s.name, s.labels, repr(s.value)) for s in both[0]] == [
        (s.name, s.labels, repr(s.value)) for s in both[1]
    ]
    assert all(sample.timestamp is None for sample in both[1]), "node_exporter refuses time stamps"
    samples: dict[str, list[Any]] = {}
    for sample in both[1]:
        samples.setdefault(sample.name, []).append(sample)
    return samples


def test_openmetrics_of_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "run-a"
    alerting(log_dir=folder, every=4, sinks=["openmetrics"])
    samples = parsed((folder / METRICS_FILE).read_text())
    last = lines(folder, "step")[-1]
    [loss] = samples["jacdiag_loss"]
    assert loss.labels == {"run": "run-a"} and loss.value == pytest.approx(last["loss"], rel=1e-6)
    gains = {sample.labels["sublayer"]: sample.value for sample in samples["jacdiag_gain"]}
    norms = lines(folder, "probe")[-1]["figures"]["branch_norm"]
    assert gains == pytest.approx(norms, rel=1e-6) and len(gains) == 4
    assert samples["jacdiag_step"][0].value == 8 and samples["jacdiag_run_ended"][0].value == 1
    [alert] = samples["jacdiag_alerts"]
    assert alert.labels == {"run": "run-a", "code": "JD505", "level": "error"} and alert.value == 1
    assert abs(samples["jacdiag_written_timestamp_seconds"][0].value - time.time()) < 600
    assert sorted(path.name for path in folder.glob("*.prom*")) == [METRICS_FILE]


def test_openmetrics_escapes_names_and_writes_what_is_not_finite(tmp_path: Path) -> None:
    sink = OpenMetrics(tmp_path / "a.prom", run='a "b"\\\n', every=0.0)
    names = {
        'jacdiag/gain/h.0\n"x"\\': 1.5,
        "jacdiag/loss": float("nan"),
        "jacdiag/lr": float("-inf"),
        "odd-näme": 2.0,
    }
    sink.write(3, names)
    samples = parsed((tmp_path / "a.prom").read_text())
    assert samples["jacdiag_gain"][0].labels == {"run": 'a "b"\\\n', "sublayer": 'h.0\n"x"\\'}
    assert samples["jacdiag_loss"][0].value != samples["jacdiag_loss"][0].value
    assert (
        samples["jacdiag_lr"][0].value == float("-inf")
        and samples["jacdiag_odd_n_me"][0].value == 2.0
    )
    assert samples["jacdiag_run_ended"][0].value == 0 and samples["jacdiag_alerts"][0].value == 0


def test_openmetrics_writes_seldom_and_at_an_alert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    monkeypatch.setattr(
        "jacdiag.monitor.log.openmetrics.replace_file",
        lambda path, data: written.append(data.decode()),
    )
    sink = OpenMetrics(tmp_path, every=3600.0)
    for step in range(1, 100):
        sink.write(step, {"jacdiag/loss": float(step)})
    assert len(written) == 1
    sink.alert(ALERT, AlertMoment(step=99))
    assert len(written) == 2 and "jacdiag_loss" in written[1] and 'code="JD501"' in written[1]
    sink.close()
    assert len(written) == 3


def test_openmetrics_to_a_file_of_its_own(tmp_path: Path) -> None:
    target = tmp_path / "collector" / "gpt.prom"
    alerting(log_dir=tmp_path / "run-a", sinks=[f"openmetrics:{target}"])
    assert 'run="run-a"' in target.read_text() and not (tmp_path / "run-a" / METRICS_FILE).exists()


# -- names -----------------------------------------------------------------------------------------
def test_unknown_sinks_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tensorboard, wandb, trackio, mlflow, openmetrics"):
        open_sinks(["nothing"], tmp_path)
    with pytest.raises(UsageError, match="alerts_to") as refused:
        open_sinks(["https://hooks.slack.com/services/SECRET"], tmp_path)
    assert "SECRET" not in str(refused.value)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "mlflow"])
def test_a_library_that_is_missing_is_named_with_its_extra(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    broken = {"tensorboard": "torch.utils.tensorboard"}.get(name, name)
    monkeypatch.setitem(sys.modules, broken, None)
    with pytest.raises(UsageError, match=rf"pip install 'jacdiag\[{name}\]'"):
        open_sinks([name], Path())


def test_an_update_of_a_weight_that_is_zero_has_no_ratio() -> None:
    """The log has null for it; a sink leaves it out."""
    assert slashed(
        {"loss": 1.0, "update": {"where": "h.0", "norm": 1.0, "weight": 0.0, "ratio": None}}, []
    ) == {"jacdiag/loss": 1.0}
    assert slashed({"lrs": [1e-3, None, 2e-3]}, []) == {
        "jacdiag/lrs/0": 1e-3,
        "jacdiag/lrs/2": 2e-3,
    }


# -- on_alert --------------------------------------------------------------------------------------
def test_on_alert_gets_what_a_checkpoint_needs(tmp_path: Path) -> None:
    seen: list[tuple[Alert, AlertMoment]] = []

    def save(alert: Alert, moment: AlertMoment) -> None:
        assert moment.model is not None
        state = {
            "step": moment.step,
            "model": moment.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in moment.optimizers],
            "findings": [finding.to_dict() for finding in moment.findings],
        }
        torch.save(state, tmp_path / f"alert-{alert.step}.pt")
        seen.append((alert, moment))

    watch = alerting(log_dir=tmp_path / "run-a", every=4, keep_batches=4, on_alert=save)
    [(alert, moment)] = seen
    assert (alert.step, moment.step) == (5, 6), (
        "the look after step 6 found it: the weights are those after step 6"
    )
    assert (
        moment.flight == tmp_path / "run-a" / "flight-5" and (moment.flight / "batch.pt").is_file()
    )
    assert moment.log_dir == tmp_path / "run-a" and moment.alerts == tuple(watch.alerts)
    state = torch.load(tmp_path / "alert-5.pt", weights_only=True)
    fresh = small()
    fresh.load_state_dict(state["model"])
    torch.optim.AdamW(fresh.parameters()).load_state_dict(state["optimizers"][0])
    assert state["step"] == 6 and int(state["optimizers"][0]["state"][0]["step"]) == 6


def test_on_alert_with_one_argument_is_called_as_before(tmp_path: Path) -> None:
    seen: list[Alert] = []
    alerting(log_dir=tmp_path, on_alert=seen.append)
    assert [alert.code for alert in seen] == ["JD505"]
    assert not takes_moment(seen.append)


def test_findings_of_the_last_probe_are_handed_over() -> None:
    moments: list[AlertMoment] = []

    def one(model: Any, optimizer: Any, step: int) -> tuple[Any, Any]:
        from monitor.rig import plain_step

        loss, norm = plain_step(model, optimizer, step)
        return (loss * float("nan") if step == 5 else loss), norm

    def broken() -> Any:
        return small("vanilla", n_layer=4)

    options = {"every": 2, "log_every": 2, "on_alert": lambda alert, moment: moments.append(moment)}
    trained(8, options, make=broken, one=one)
    assert {finding.code for finding in moments[-1].findings} & {"JD101", "JD102", "JD103"}
    assert moments[-1].flight is None and moments[-1].log_dir is None and moments[-1].run == ""


def test_an_on_alert_that_fails_is_switched_off_and_the_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(alert: Alert, moment: AlertMoment) -> None:
        raise OSError("disk full")

    with caplog.at_level(logging.WARNING):
        watch = alerting(log_dir=tmp_path, on_alert=fails, strict=False)
    assert watch.count == 8 and "disk full" in caplog.text
    [fault] = lines(tmp_path, "fault")
    assert fault["part"] == "on_alert"


def test_user_sink_receives_alerts(tmp_path: Path) -> None:
    class Both:
        def __init__(self) -> None:
            self.alerts: list[tuple[str, int]] = []
            self.steps: list[int] = []

        def write(self, step: int, figures: Any) -> None:
            self.steps.append(step)

        def alert(self, alert: Alert, moment: AlertMoment) -> None:
            self.alerts.append((alert.code, moment.step))

        def close(self) -> None:
            self.alerts.append(("closed", 0))

    sink, only = Both(), Both()
    alerting(log_dir=tmp_path, sinks=[sink], alerts_to=only)
    assert sink.alerts == only.alerts == [("JD505", 6), ("closed", 0)]
    assert sink.steps == list(range(9)) and only.steps == []
