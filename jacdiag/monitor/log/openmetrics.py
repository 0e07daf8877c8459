"""The latest figures of a run as a text file for Prometheus.

The textfile collector of node_exporter reads it. It holds gauges without time stamps, so that it is
valid both as OpenMetrics and in Prometheus' own text format.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path

from jacdiag.errors import UsageError
from jacdiag.monitor.alert_moment import AlertMoment
from jacdiag.records.output_file import replace_file
from jacdiag.records.run_log import Alert

METRICS_FILE = "jacdiag.prom"
_EVERY = 5.0  # seconds between two writes; a scrape comes every 15 to 60
_HELP = {
    "loss": "training loss of the last step",
    "lr": "learning rate of the first parameter group",
    "grad_norm": "gradient norm before clipping",
    "grad_norm_post": "gradient norm that the optimizer used",
    "step_seconds": "seconds of the last step",
    "grad": "gradient norm of a sub-layer, as the optimizer used it",
    "update": "update norm over weight norm of a sub-layer",
    "gain": "spectral norm of the branch's Jacobian",
    "core": "spectral norm of the sub-layer's Jacobian without its norm layer",
}


class OpenMetrics:
    """The latest value of every figure, written to a file completely or not at all.

    Args:
        path: of the file, or a folder for `jacdiag.prom` in it. node_exporter reads files that end
            in `.prom`.
        run: value of the label `run`; the name of the file's folder if not given.
        every: least seconds between two writes. Alerts and the end of the run are written at once.

    Raises:
        UsageError: the folder does not exist and cannot be made.
    """

    def __init__(self, path: str | Path, run: str = "", every: float = _EVERY) -> None:
        """Make the file's folder; see the class for the arguments."""
        # 1. Where to write.
        path = Path(path)
        if path.is_dir():
            path = path / METRICS_FILE
        self.path = path
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write '{self.path}'", got=error.strerror) from error

        # 2. What is written.
        self.run = run or self.path.parent.resolve().name
        self.every = every
        self.values: dict[str, float] = {}
        self.alerts: dict[tuple[str, str], int] = {}
        self.step = 0
        self.ended = False
        self._written = -math.inf

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of a step; write the file if the last write is long enough ago."""
        self.step = max(self.step, step)
        self.values.update(figures)
        if time.monotonic() - self._written >= self.every:
            self._write_file()

    def alert(self, alert: Alert, moment: AlertMoment) -> None:  # noqa: ARG002, the form of every sink
        """Count an alert and write the file."""
        key = alert.code, alert.level
        self.alerts[key] = self.alerts.get(key, 0) + 1
        self._write_file()

    def close(self) -> None:
        """Write what is known, and that the run has ended."""
        self.ended = True
        self._write_file()

    def _write_file(self) -> None:
        replace_file(self.path, self.text().encode())
        self._written = time.monotonic()

    def text(self) -> str:
        """Return the content of the file."""
        families: dict[str, list[str]] = {}
        helps: dict[str, str] = {}

        def add(name: str, value: float, help_text: str, **labels: str) -> None:
            metric = f"jacdiag_{name}"
            helps.setdefault(metric, help_text)
            all_labels = {"run": self.run, **labels}
            pairs = [f'{key}="{_escaped(text)}"' for key, text in all_labels.items()]
            sample = f"{metric}{{{','.join(pairs)}}} {_number(value)}"
            families.setdefault(metric, []).append(sample)

        # 1. The state of the run.
        add("step", self.step, "optimizer steps so far")
        add(
            "written_timestamp_seconds",
            time.time(),
            "when this file was written: one that is old tells of a dead run",
        )
        add("run_ended", float(self.ended), "1 if the run has ended")
        if not self.alerts:
            add("alerts", 0.0, "alerts of this session", code="", level="")
        for (code, level), count in sorted(self.alerts.items()):
            add("alerts", count, "alerts of this session", code=code, level=level)

        # 2. Its figures: jacdiag/NAME, or jacdiag/NAME/SUB-LAYER.
        for key, value in sorted(self.values.items()):
            name, _, where = key.removeprefix("jacdiag/").partition("/")
            labels = {}
            if where:
                labels["sublayer"] = where
            add(_metric_name(name), value, _HELP.get(name, name), **labels)

        # 3. The samples of each metric, after its help and its type.
        lines: list[str] = []
        for metric, samples in families.items():
            lines += [
                f"# HELP {metric} {_escaped(helps[metric])}",
                f"# TYPE {metric} gauge",
                *samples,
            ]
        return "\n".join([*lines, "# EOF"]) + "\n"


def _metric_name(name: str) -> str:
    """Return a name of letters, digits and underscores, as a metric's name has to be.

    >>> _metric_name("logit max/2")
    'logit_max_2'
    """
    return "".join(c if c.isascii() and (c.isalnum() or c == "_") else "_" for c in name)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if value == math.inf:
        return "+Inf"
    if value == -math.inf:
        return "-Inf"
    return repr(float(value))
