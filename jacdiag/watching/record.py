"""What a run leaves behind: the log, the sinks, the flight recorder; and who is told of alerts and faults."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

import jacdiag
from jacdiag.errors import one_line
from jacdiag.report.runlog import Alert
from jacdiag.report.thresholds import Thresholds
from jacdiag.rules.live import LiveRules, StepFigures
from jacdiag.watching.batches import Batches
from jacdiag.watching.cadence import Clock
from jacdiag.watching.guards import AlertRaised, Guards, logger, say
from jacdiag.watching.log import RunFile
from jacdiag.watching.recorder import Recorder
from jacdiag.watching.silence import Silence
from jacdiag.watching.sinks import Sink, open_sinks, slashed


class Record:
    """Everything that is told, and to whom.

    Args:
        folder: of the run; None on ranks that do not write.
        on_alert: "log", "raise" or a function.
        recorder: steps that the flight recorder keeps.
        speaks: warn about how the watch is used; one rank does.

    Attributes:
        live: the live rules.
        resumed_at: the step that a log on disk ends with.
    """

    def __init__(
        self, folder: Path | None, *, resume: bool, on_alert: str | Callable[[Alert], Any], strict: bool,
        thresholds: Thresholds, sinks: Iterable[str | Sink], recorder: int, quiet: bool, speaks: bool = True,
    ) -> None:  # fmt: skip
        self.on_alert, self.quiet, self.speaks = on_alert, quiet, speaks
        self.guards = Guards(strict, self._fault)
        self.live = LiveRules(thresholds)
        self.alerts: list[Alert] = []
        self.header: dict[str, Any] = {}
        self.file = RunFile(folder, resume=resume, failed=self._log_failed) if folder is not None else None
        self.sinks = open_sinks(sinks, folder or Path())
        self.recorder = Recorder(folder, recorder) if folder is not None and recorder else None
        self.batches: Batches | None = None
        self.prints: list[list[torch.Tensor]] = []
        self.going_on = self.file is not None and self.file.last_step is not None
        self.resumed_at = (self.file.last_step or 0) if self.file is not None else 0
        self.silence = Silence(self.warn, self.note)
        self.totals = {"steps": 0, "skipped": 0, "clipped": 0, "with_clip": 0}
        self._told: set[str] = set()
        self._raise: Alert | None = None
        self._begun = time.time()

    # -- lines -----------------------------------------------------------------------------------------------------
    def begin(self, header: Mapping[str, Any]) -> None:
        """Writes the first line (and where a run goes on, from which step)."""
        self.header = {
            **header,
            "jacdiag": jacdiag.__version__,
            "torch": torch.__version__,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        if self.live.names != list(header["groups"]):
            self.live.set_names(header["groups"])
        self.line("run", self.header)
        if self.going_on:
            self.line("resume", {"step": self.resumed_at})
            self.live.resumed()
            self.going_on = False

    def go_on(self, step: int, live: Mapping[str, Any] | None) -> None:
        """Goes on from a checkpoint: what the log has beyond its step is done again."""
        self.resumed_at, self.going_on = step, True
        if live is not None:
            self.live.load(live)

    def line(self, kind: str, row: Mapping[str, Any]) -> None:
        self._write(kind, [row])

    def _write(self, kind: str, rows: list[Mapping[str, Any]]) -> None:
        if self.file is None or not self.guards.on("log"):
            return
        with self.guards.part("log", "nothing more is written to the run log"):
            self.file.write(kind, rows)

    def _log_failed(self, error: Exception) -> None:
        self.guards.fail("log", error, "nothing more is written to the run log")

    # -- steps and series ------------------------------------------------------------------------------------------
    def steps(self, rows: list[dict[str, Any]]) -> None:
        """Takes the steps since the last look: live rules, log, sinks, recorder, alerts."""
        self._fingerprints(rows)
        self.silence.look_at_rows(rows)
        alerts: list[Alert] = []
        for row in rows:
            self._count(row)
            with self.guards.part("detectors", "the live rules are silent from now on"):
                if self.guards.on("detectors"):
                    verdict = self.live.step(StepFigures.of(row))
                    alerts += verdict.alerts
                    row["votes"], row["scores"] = verdict.votes, verdict.scores
            if self.recorder is not None:
                self.recorder.add(row)
        self._write("step", rows)  # type: ignore[arg-type]
        groups = self.header.get("groups", [])
        for row in rows:
            self.publish(row["step"], partial(slashed, row, groups))
        for alert in alerts:
            self.alert(alert)

    def _count(self, row: Mapping[str, Any]) -> None:
        self.totals["steps"] += 1
        self.totals["skipped"] += bool(row["skipped"])
        if row["clipped"] is not None:
            self.totals["with_clip"] += 1
            self.totals["clipped"] += bool(row["clipped"])

    def _fingerprints(self, rows: list[dict[str, Any]]) -> None:
        prints, self.prints = self.prints[: len(rows)], self.prints[len(rows) :]
        if not any(prints):
            return
        with self.guards.part("batches", "no batch fingerprints from now on"):
            where = next(p for group in prints for p in group).device
            flat = torch.stack([p.to(where) for group in prints for p in group]).tolist()
            for row, group in zip(rows, prints, strict=False):
                row["batches"] = [f"{flat.pop(0):016x}" for _ in group]

    def publish(self, step: int, figures: Callable[[], Mapping[str, float]]) -> None:
        """Sends figures to every sink that still works."""
        for name, sink in self.sinks:
            with self.guards.part(f"sink {name}", f"nothing more is sent to {name}"):
                if self.guards.on(f"sink {name}"):
                    sink.write(step, figures())

    # -- alerts, faults, notes -------------------------------------------------------------------------------------
    def alert(self, alert: Alert) -> None:
        """Tells of an alert: log, logger, recorder, and what the user asked for."""
        self.alerts.append(alert)
        self.line("alert", alert.to_dict())
        log = logger.error if alert.level == "error" else logger.warning if alert.level == "warning" else logger.info
        log("jacdiag.watch: %s", alert)
        if alert.level == "info":
            return
        if alert.code.startswith("JD5"):  # what JD1xx sees is in the checkpoint
            self.dump(alert.step, str(alert))
        if self.on_alert == "raise":
            self._raise = self._raise or alert
        elif callable(self.on_alert):
            with self.guards.part("on_alert", "the function is called no more"):
                if self.guards.on("on_alert"):
                    self.on_alert(alert)

    def raise_alert(self) -> None:
        """Raises what `on_alert="raise"` asked for; outside of every guard."""
        alert, self._raise = self._raise, None
        if alert is not None:
            raise AlertRaised(alert)

    def dump(self, step: int, why: str) -> None:
        if self.recorder is None:
            return
        with self.guards.part("recorder", "the flight recorder writes nothing more"):
            if self.guards.on("recorder"):
                folder = self.recorder.dump(step, why, self.batches, self.header)
                if folder is not None:
                    self.line("note", {"step": step, "text": f"flight recorder: {folder.name}"})

    def crashed(self, step: int, error: BaseException) -> None:
        """The loop was left by an exception."""
        self.line("note", {"step": step, "text": f"the loop was left by {one_line(error)}"})
        if not isinstance(error, KeyboardInterrupt | AlertRaised):
            self.dump(step, one_line(error))

    def warn(self, what: str, text: str) -> None:
        """Says something about how the watch is used, once."""
        if what in self._told or not self.speaks:
            return
        self._told.add(what)
        logger.warning("jacdiag.watch: %s", text)
        self.line("note", {"text": text})

    def note(self, text: str) -> None:
        self.line("note", {"text": text})

    def announce(self, text: str, row: Mapping[str, Any]) -> None:
        """Tells the price of what is about to run."""
        self.line("price", row)
        logger.info("jacdiag.watch: %s", text)
        if not self.quiet:
            say(f"jacdiag.watch: {text}")

    def _fault(self, part: str, error: str, loses: str) -> None:
        if part != "log":
            self.line("fault", {"part": part, "error": error, "off": loses})

    # -- the end ---------------------------------------------------------------------------------------------------
    def wait(self) -> None:
        """Until the log is on the disk."""
        if self.file is not None:
            self.file.flush()

    def close(self, step: int, clock: Clock, looks: int) -> None:
        seen = max(self.live.seen, 1)
        with_clip = self.totals["with_clip"]
        self.line(
            "end",
            {
                "step": step, "seconds": time.time() - self._begun, "spent": dict(clock.spent), "host_syncs": looks,
                "skipped": self.totals["skipped"], "off": dict(self.guards.off), "alerts": len(self.alerts),
                "clip_fraction": self.totals["clipped"] / with_clip if with_clip else None,
                "spike_score": {key: count / seen for key, count in self.live.spikes.items()},
            },
        )  # fmt: skip
        for name, sink in self.sinks:
            with self.guards.part(f"sink {name}", f"{name} could not be closed"):
                sink.close()
        if self.file is not None:
            self.file.close()
