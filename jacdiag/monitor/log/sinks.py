"""Sinks for figures and alerts, besides the log.

These are trackers, a text file for Prometheus, webhooks and objects of the user. A sink that also
has `alert(alert, moment)` gets alerts. Every library is imported where it is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from jacdiag.errors import UsageError
from jacdiag.monitor.alert_moment import AlertMoment
from jacdiag.monitor.histograms import Histogram, moments
from jacdiag.monitor.log.openmetrics import OpenMetrics
from jacdiag.monitor.log.webhooks import Webhook, is_address, lines_of, title_of
from jacdiag.records.run_log import Alert

_STEP_FIGURES = ("loss", "lr", "grad_norm", "grad_norm_post", "step_seconds", "noise_scale")
_SHOWN_NAMES = {"branch_norm": "gain", "core_norm": "core"}


class Sink(Protocol):
    """An object that takes figures, such as {"jacdiag/gain/transformer.h.0.attn": 1.2}.

    One that has a method `write_histograms(step, shown)` gets histograms too, if `histograms_every`
    is set.
    """

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of a step."""

    def close(self) -> None:
        """End, after the last write."""


class AlertSink(Protocol):
    """An object that takes alerts; a method `close()` is called at the end if there is one."""

    def alert(self, alert: Alert, moment: AlertMoment) -> None:
        """Take an alert."""


class TensorBoard:
    """Scalars and alerts (as text) for TensorBoard (extra `tensorboard`).

    Args:
        folder: of the run, which the event files go to.

    Raises:
        UsageError: the library is not installed.
    """

    def __init__(self, folder: Path) -> None:
        """Open the writer; see the class for the arguments."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _needs("tensorboard", "TensorBoard") from error
        self.writer = SummaryWriter(str(folder))

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the figures of a step as scalars."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def write_histograms(self, step: int, shown: Mapping[str, Histogram]) -> None:
        """Write the histograms of a step."""
        for name, histogram in shown.items():
            # TensorBoard wants the moments too, which the bins give closely enough.
            total, squares = moments(histogram)
            self.writer.add_histogram_raw(
                name,
                min=histogram.edges[0],
                max=histogram.edges[-1],
                num=sum(histogram.counts),
                sum=total,
                sum_squares=squares,
                bucket_limits=histogram.edges[1:],
                bucket_counts=histogram.counts,
                global_step=step,
            )

    def alert(self, alert: Alert, moment: AlertMoment) -> None:
        """Write an alert as text."""
        text = "  \n".join([f"**{title_of(alert)}**", *lines_of(alert, moment)])
        self.writer.add_text("jacdiag/alerts", text, alert.step)
        self.writer.flush()

    def close(self) -> None:
        """Close the writer."""
        self.writer.close()


class WeightsAndBiases:
    """Figures and alerts for Weights & Biases (extra `wandb`).

    They go to the run that is open, or else to an offline run of its own.

    Args:
        folder: of the run.

    Raises:
        UsageError: the library is not installed.
    """

    def __init__(self, folder: Path) -> None:
        """Take the open run, or begin one; see the class for the arguments."""
        try:
            import wandb
        except ImportError as error:
            raise _needs("wandb", "wandb") from error
        self.own = wandb.run is None
        if self.own:
            self.run: Any = wandb.init(project="jacdiag", dir=str(folder), mode="offline")
        else:
            self.run = wandb.run
        # The loop's own step counter stays its own.
        self.run.define_metric("jacdiag/step")
        self.run.define_metric("jacdiag/*", step_metric="jacdiag/step")

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the figures of a step."""
        self.run.log({"jacdiag/step": step, **figures})

    def write_histograms(self, step: int, shown: Mapping[str, Histogram]) -> None:
        """Log the histograms of a step."""
        import numpy as np
        import wandb

        panels: dict[str, Any] = {}
        for name, histogram in shown.items():
            pair = (np.array(histogram.counts), np.array(histogram.edges))
            panels[name] = wandb.Histogram(np_histogram=pair)
        self.run.log({"jacdiag/step": step, **panels})

    def alert(self, alert: Alert, moment: AlertMoment) -> None:
        """Send an alert by way of Weights & Biases."""
        level = {"error": "ERROR", "warning": "WARN"}.get(alert.level, "INFO")
        # wandb drops a second alert of the same title within a minute: the title holds the step.
        self.run.alert(title_of(alert), "\n".join(lines_of(alert, moment)), level=level)

    def close(self) -> None:
        """End a run of its own; that of the loop goes on."""
        if self.own:
            self.run.finish()


class Trackio:
    """Figures and alerts for trackio (extra `trackio`).

    They go to the run that is open, or else to one of its own.

    Args:
        folder: of the run.

    Raises:
        UsageError: the library is not installed.
    """

    def __init__(self, folder: Path) -> None:
        """Take the open run, or begin one; see the class for the arguments."""
        try:
            import trackio
            from trackio import context_vars
        except ImportError as error:
            raise _needs("trackio", "trackio") from error
        self.trackio = trackio
        self.run: Any = context_vars.current_run.get()
        self.own = self.run is None
        if self.own:
            name = _run_name(folder)
            self.run = trackio.init(
                project="jacdiag", name=name, auto_log_cpu=False, auto_log_gpu=False, embed=False
            )

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the figures of a step."""
        self.run.log(dict(figures), step=step)

    def alert(self, alert: Alert, moment: AlertMoment) -> None:
        """Send an alert by way of trackio."""
        levels = self.trackio.AlertLevel
        level = {"error": levels.ERROR, "warning": levels.WARN}.get(alert.level, levels.INFO)
        self.run.alert(title_of(alert), "\n".join(lines_of(alert, moment)), level=level)

    def close(self) -> None:
        """End a run of its own; that of the loop goes on."""
        if self.own:
            self.run.finish()


# a batch with another character in a name is refused altogether
_NOT_IN_MLFLOW = re.compile(r"[^\w./: -]", re.ASCII)


class MLflow:
    """Figures and alerts (as tags) for MLflow (extra `mlflow`).

    They go to the run that is active, or else to one of its own. MLflow's own threads send them, so
    that the training does not wait for the tracking server.

    Args:
        folder: of the run.

    Raises:
        UsageError: the library is not installed.
    """

    def __init__(self, folder: Path) -> None:
        """Take the active run, or begin one; see the class for the arguments."""
        try:
            import mlflow
            from mlflow import MlflowClient
        except ImportError as error:
            raise _needs("mlflow", "MLflow") from error
        self.mlflow = mlflow
        self.client = MlflowClient()
        active = mlflow.active_run()
        self.own = active is None
        if active is not None:
            self.run_id = active.info.run_id
            return
        # A run of its own is not made active: a start_run of the loop would be refused.
        experiment = self.client.get_experiment_by_name("jacdiag")
        if experiment is None:
            number = self.client.create_experiment("jacdiag")
        else:
            number = experiment.experiment_id
        self.run_id = self.client.create_run(number, run_name=_run_name(folder)).info.run_id

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the figures of a step, under names that MLflow allows."""
        allowed = {_NOT_IN_MLFLOW.sub("_", name): value for name, value in figures.items()}
        self.mlflow.log_metrics(allowed, step=step, run_id=self.run_id, synchronous=False)

    def alert(self, alert: Alert, moment: AlertMoment) -> None:
        """Set an alert as a tag of the run."""
        text = f"{title_of(alert)}: " + "\n".join(lines_of(alert, moment))
        self.client.set_tag(
            self.run_id, f"jacdiag.alert.{alert.code}.{alert.step}", text, synchronous=False
        )

    def close(self) -> None:
        """Send what waits, and end a run of its own."""
        self.mlflow.flush_async_logging()
        if self.own:
            self.client.set_terminated(self.run_id)


BY_NAME: dict[str, Callable[[Path], Any]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
    "mlflow": MLflow,
    "openmetrics": OpenMetrics,
}


def _needs(extra: str, library: str) -> UsageError:
    return UsageError(f"the sink '{extra}' needs {library}", hint=f"pip install 'jacdiag[{extra}]'")


def _run_name(folder: Path) -> str:
    return folder.resolve().name or "run"


def open_sinks(requested: Iterable[str | Sink], folder: Path) -> list[tuple[str, Sink]]:
    """Open sinks by name; objects with `write` and `close` are taken as they are.

    Args:
        requested: names of `BY_NAME`, "openmetrics:FILE", or objects.
        folder: of the run.

    Returns:
        Each sink with the name that messages call it by.

    Raises:
        UsageError: an unknown name, or a library that is not installed.
    """
    # 1. One name is a list of one.
    if isinstance(requested, str):
        requested = (requested,)
    if not isinstance(requested, Iterable):
        raise UsageError(
            "sinks is a list", got=f"type {type(requested).__name__}", hint='sinks=["tensorboard"]'
        )

    # 2. Open each.
    sinks: list[tuple[str, Sink]] = []
    for sink in requested:
        if isinstance(sink, str):
            sinks.append(_open_by_name(sink, folder))
        elif callable(getattr(sink, "write", None)):
            sinks.append((type(sink).__name__, sink))
        else:
            raise UsageError(
                "a sink needs write(step, figures) and close()", got=f"a {type(sink).__name__}"
            )
    return sinks


def _open_by_name(text: str, folder: Path) -> tuple[str, Sink]:
    """Open a sink by its name; raise UsageError if there is none of that name."""
    # 1. The address of a webhook. It holds a secret, so that the message does not repeat it.
    if is_address(text):
        hint = "alerts_to=[...] takes it; sinks take figures"
        raise UsageError("a sink is no address of a webhook", hint=hint)

    # 2. A name with a file.
    name, _, path = text.partition(":")
    if name == "openmetrics" and path:
        return name, OpenMetrics(path, run=_run_name(folder))

    # 3. A name by itself.
    if text not in BY_NAME:
        raise UsageError(f"no sink is called '{text}'", hint=f"there are {', '.join(BY_NAME)}")
    return text, cast(Sink, BY_NAME[text](folder))


def open_alert_sinks(
    requested: str | AlertSink | Iterable[str | AlertSink], failed: Callable[[str, str], None]
) -> list[tuple[str, AlertSink]]:
    """Open what alerts are sent to besides the sinks of figures.

    Args:
        requested: addresses of webhooks, or objects with `alert(alert, moment)`; one of them, or
            several.
        failed: called with the name and the reason if a webhook is given up, from a thread of its
            own.

    Returns:
        Each one with the name that messages call it by; no name is there twice.

    Raises:
        UsageError: neither an address nor such an object. The message does not repeat the address.
    """
    # 1. One address or object is a list of one.
    if isinstance(requested, str) or callable(getattr(requested, "alert", None)):
        requested = [cast("str | AlertSink", requested)]
    if not isinstance(requested, Iterable):
        raise UsageError(
            "alerts_to is an address, or a list", got=f"type {type(requested).__name__}"
        )

    # 2. Open each, under a name of its own.
    sinks: list[tuple[str, AlertSink]] = []
    names: set[str] = set()
    for target in requested:
        sink = _alert_sink(target)

        # The second of a name is "NAME (2)".
        base = getattr(sink, "name", type(sink).__name__)
        name = base
        number = 1
        while name in names:
            number += 1
            name = f"{base} ({number})"
        names.add(name)
        if isinstance(sink, Webhook):
            sink.failed = _with_name(failed, name)
        sinks.append((name, sink))
    return sinks


def _alert_sink(target: str | AlertSink) -> AlertSink:
    """Return what takes alerts for an address or an object; raise UsageError if it is neither."""
    # 1. An address. The message does not repeat one, since it may hold a secret.
    if isinstance(target, str):
        if is_address(target):
            return Webhook(target)
        hint = f"sinks=[...] takes {', '.join(BY_NAME)}, which get alerts too"
        raise UsageError(
            "alerts_to takes addresses, such as https://hooks.slack.com/services/...", hint=hint
        )

    # 2. An object.
    if callable(getattr(target, "alert", None)):
        return target
    raise UsageError(
        "alerts_to takes addresses and objects with alert(alert, moment)",
        got=f"a {type(target).__name__}",
    )


def _with_name(failed: Callable[[str, str], None], name: str) -> Callable[[str], None]:
    """Return a function that reports a failure of one target."""
    return lambda reason: failed(name, reason)


def slashed(row: Mapping[str, Any], groups: Iterable[str]) -> dict[str, float]:
    """Return the figures of a step under slash-separated names.

    Args:
        row: of the run log, type `step`.
        groups: names of the sub-layers that `grad` is given for.
    """
    # 1. What may be a figure, by its name.
    named_values: dict[str, Any] = {key: row.get(key) for key in _STEP_FIGURES}

    # Learning rates by parameter group, gradient norms by sub-layer, and the update.
    for group, rate in enumerate(row.get("lrs") or []):
        named_values[f"lrs/{group}"] = rate
    for name, norm in zip(groups, row.get("grad") or [], strict=False):
        named_values[f"grad/{name}"] = norm
    update = row.get("update")
    if update:
        named_values[f"update/{update['where']}"] = update["ratio"]

    # 2. Numbers only: what was not measured is None.
    figures: dict[str, float] = {}
    for name, value in named_values.items():
        if isinstance(value, int | float):
            figures[f"jacdiag/{name}"] = float(value)
    return figures


def slashed_series(series: Mapping[str, Mapping[str, float | None]]) -> dict[str, float]:
    """Return the figures of a probe or of the statistics under slash-separated names.

    Args:
        series: figure -> sub-layer -> value.
    """
    figures: dict[str, float] = {}
    for figure, values in series.items():
        name = _SHOWN_NAMES.get(figure, figure)
        for sublayer, value in values.items():
            if value is not None:
                figures[f"jacdiag/{name}/{sublayer}"] = float(value)
    return figures
