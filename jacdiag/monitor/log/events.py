"""What a run leaves behind: the log, the sinks, the flight recorder; and who is told of alerts and
faults.
"""

from __future__ import annotations

import datetime
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from jacdiag._version import __version__
from jacdiag.detectors.first_nonfinite import explain_batch
from jacdiag.detectors.live_rules import LiveRules, StepFigures
from jacdiag.measure.batch_values import find_nonfinite_values
from jacdiag.monitor.alert_moment import AlertMoment, call_handler
from jacdiag.monitor.batches import Batches, Print, make_prints
from jacdiag.monitor.blind_spots import Silence
from jacdiag.monitor.fault_isolation import AlertRaised, Guards, logger, say
from jacdiag.monitor.histograms import Histogram
from jacdiag.monitor.log.flight_recorder import Recorder
from jacdiag.monitor.log.heartbeat_writer import Pulse
from jacdiag.monitor.log.run_file import RunFile
from jacdiag.monitor.log.sinks import AlertSink, Sink, open_alert_sinks, open_sinks, slashed
from jacdiag.monitor.noise_scale import MicroBatchNorms, NoiseScale
from jacdiag.monitor.process_endings import Ending
from jacdiag.monitor.schedule import Clock
from jacdiag.monitor.skip_list import SkipList
from jacdiag.records.run_log import Alert
from jacdiag.rules.thresholds import Thresholds


class Record:
    """Everything that is told, and to whom.

    Args:
        folder: of the run; None on ranks that do not write.
        on_alert: "log", "raise" or a function.
        alerts_to: addresses of webhooks and objects with alert(alert, moment).
        recorder: steps that the flight recorder keeps.
        speaks: warn about how the watch is used; one rank does.

    Attributes:
        live: the live rules.
        findings: what the probes say of the model's init.
        waits: what each live rule still waits for, as far as it was told.
        resumed_at: the step that a log on disk ends with.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        resume: bool,
        on_alert: str | Callable[..., Any],
        strict: bool,
        thresholds: Thresholds,
        sinks: Iterable[str | Sink],
        recorder: int,
        quiet: bool,
        speaks: bool = True,
        alerts_to: str | AlertSink | Iterable[str | AlertSink] = (),
    ) -> None:
        self.on_alert, self.quiet, self.speaks = on_alert, quiet, speaks
        self.guards = Guards(strict, self._fault)
        self.live = LiveRules(thresholds)
        self.alerts: list[Alert] = []
        self.findings: list[Alert] = []
        self.waits: dict[str, str] = {}
        self.header: dict[str, Any] = {}
        self.file = (
            RunFile(folder, resume=resume, failed=self._log_failed) if folder is not None else None
        )
        self.alert_sinks = open_alert_sinks(alerts_to, self._webhook_failed)
        self.sinks = open_sinks(sinks, folder or Path())
        self.folder, self.last_step = folder, 0
        self.pulse = (
            Pulse(folder, self.file.submit)
            if folder is not None and self.file is not None
            else None
        )
        self.ending = Ending(how="closed")
        self.ending_flight: str | None = None
        # who holds the model, the optimizers and the last report
        self.tiers: weakref.ref[Any] | None = None
        self.recorder = Recorder(folder, recorder) if folder is not None and recorder else None
        self.batches: Batches | None = None
        self.skip_list: SkipList | None = None
        self.prints: list[list[Print]] = []
        self._is_placed = False
        self.going_on = self.file is not None and self.file.last_step is not None
        self.resumed_at = (self.file.last_step or 0) if self.file is not None else 0
        self.silence = Silence(self.warn, self.note)
        self.totals = {"steps": 0, "skipped": 0, "clipped": 0, "with_clip": 0}
        self.noise = NoiseScale()
        self._told: set[str] = set()
        self._raise: Alert | None = None
        # lines until the first step has a number
        self._held: list[tuple[str, Mapping[str, Any]]] | None = None
        self._begun = time.time()

    # -- lines -------------------------------------------------------------------------------------
    def begin(self, header: Mapping[str, Any]) -> None:
        """Writes the first line (and where a run goes on, from which step)."""
        self.header = {
            **header,
            "jacdiag": __version__,
            "torch": torch.__version__,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        if self.live.names != list(header["groups"]):
            self.live.set_names(header["groups"])
        self.waits = self.live.waits()
        self.header["waits"] = dict(self.waits)
        self.line("run", self.header)
        if not self._is_placed:
            self._held = []

    def settle(self, base: int) -> None:
        """Write what was held back until the first step of this process had a number; later calls
        do nothing.

        Args:
            base: the step that the weights were at when the first probe saw them.
        """
        if self._is_placed or not self.header:
            return
        self._is_placed = True
        if self.going_on:
            self.line("resume", {"step": base}, at_once=True)
            self.live.resumed()
            self.going_on = False
        before, after = self.resumed_at, max(base, 0)
        if before != after:
            self.live.renumber(before, after)
            for alerts in (self.alerts, self.findings):
                alerts[:] = [
                    replace(alert, step=after) if alert.step == before else alert
                    for alert in alerts
                ]
        held, self._held = self._held or [], None
        for kind, row in held:
            moved = {**row, "step": after} if row.get("step") == before else row
            self.line(kind, moved)

    def rewind(self, base: int) -> None:
        """The loop has gone back within the process: steps after `base` are done again."""
        self.line("resume", {"step": base})
        self.live.rewind(base)

    def go_on(self, step: int, live: Mapping[str, Any] | None) -> None:
        """Goes on from a checkpoint: what the log has beyond its step is done again."""
        self.resumed_at, self.going_on = step, True
        if live is not None:
            self.live.load(live)

    def line(self, kind: str, row: Mapping[str, Any], *, at_once: bool = False) -> None:
        self._write(kind, [row], at_once=at_once)

    def _write(self, kind: str, rows: list[Mapping[str, Any]], *, at_once: bool = False) -> None:
        if self._held is not None and not at_once and any("step" in row for row in rows):
            self._held += [(kind, row) for row in rows]
            return
        if self.file is None or not self.guards.on("log"):
            return
        with self.guards.part("log", "nothing more is written to the run log"):
            self.file.write(kind, rows)

    def _log_failed(self, error: Exception) -> None:
        self.guards.fail("log", error, "nothing more is written to the run log")

    # -- steps and series --------------------------------------------------------------------------
    def steps(self, rows: list[dict[str, Any]]) -> None:
        """Takes the steps since the last look: live rules, log, sinks, recorder, alerts."""
        self._fingerprints(rows)
        self.silence.look_at_rows(rows)
        alerts: list[Alert] = []
        ready: list[Mapping[str, Any]] = []
        for row in rows:
            self._count(row)
            self.last_step = row["step"]
            with self.guards.part("detectors", "the live rules are silent from now on"):
                if self.guards.on("detectors"):
                    verdict = self.live.step(StepFigures.of(row))
                    alerts += verdict.alerts
                    for note in verdict.notes:
                        self.note(note)
                    row["votes"], row["scores"] = verdict.votes, verdict.scores
                    ready += self._newly_ready(row["step"])
            row["noise_scale"] = self._noise_scale(row.pop("noise"))
            if self.recorder is not None:
                self.recorder.add(row)
        self._write("step", rows)  # type: ignore[arg-type]
        self._write("ready", ready)
        groups = self.header.get("groups", [])
        for row in rows:
            self.publish(row["step"], partial(slashed, row, groups))
        for alert in alerts:
            self.alert(self._with_batch(alert))

    def _with_batch(self, alert: Alert) -> Alert:
        """Say of an alert about values that are not finite whether the batch of its step held
        them.
        """
        kept = self.batches.kept if self.batches is not None else None
        if alert.code != "JD505" or kept is None:
            return alert
        with self.guards.part("batch values", "alerts do not say whether the batch was finite"):
            if self.guards.on("batch values"):
                own = [batch for batch in kept.queue if batch.step == alert.step]
                earlier = [
                    batch.arguments for batch in reversed(kept.queue) if batch.step < alert.step
                ]
                values = [find_nonfinite_values(batch.arguments, earlier) for batch in own]
                return explain_batch(alert, values, int(self.header.get("ranks") or 1))
        return alert

    def _noise_scale(self, norms: MicroBatchNorms | None) -> float | None:
        """The gradient noise scale in sequences, at the steps whose micro-batches were read."""
        if norms is None:
            return None
        self.noise.add(norms)
        return self.noise.value

    def _newly_ready(self, step: int) -> list[Mapping[str, Any]]:
        """Return a line for each live rule that has become ready since the last look."""
        before, self.waits = self.waits, self.live.waits()
        codes = [code for code in before if code not in self.waits]
        return [{"step": step, "code": code, "waited_for": before[code]} for code in codes]

    def note_ready(self, step: int) -> None:
        """Say which live rules statistics or a probe have made ready."""
        self._write("ready", self._newly_ready(step))

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
            flat = iter(make_prints([entry for group in prints for entry in group]))
            for row, group in zip(rows, prints, strict=False):
                row["batches"] = list(islice(flat, len(group)))

    def publish(self, step: int, figures: Callable[[], Mapping[str, float]]) -> None:
        """Sends figures to every sink that still works."""
        for name, sink in self.sinks:
            with self.guards.part(f"sink {name}", f"nothing more is sent to {name}"):
                if self.guards.on(f"sink {name}"):
                    sink.write(step, figures())

    def publish_histograms(self, step: int, shown: Mapping[str, Histogram]) -> None:
        """Sends histograms to every sink that shows them and still works."""
        for name, sink in self.sinks:
            write = getattr(sink, "write_histograms", None)
            if write is None or not self.guards.on(f"sink {name}"):
                continue
            with self.guards.part(f"sink {name}", f"nothing more is sent to {name}"):
                write(step, shown)

    def finding(self, finding: Alert) -> None:
        """Tell what a probe says of the model's init: a report, which raises nothing and calls
        nobody.
        """
        self.findings.append(finding)
        self.line("finding", finding.to_dict())
        logger.warning("jacdiag.watch: a finding, no alert: %s", finding)

    # -- alerts, faults, notes ---------------------------------------------------------------------
    def alert(self, alert: Alert) -> None:
        """Tells of an alert: log, logger, recorder, and what the user asked for."""
        self.alerts.append(alert)
        self.line("alert", alert.to_dict())
        log = (
            logger.error
            if alert.level == "error"
            else logger.warning
            if alert.level == "warning"
            else logger.info
        )
        log("jacdiag.watch: %s", alert)
        if alert.level == "info":
            return
        if self.skip_list is not None:
            with self.guards.part("skip list", "no batch is added to the skip list from now on"):
                if self.guards.on("skip list"):
                    self.skip_list.add(alert)
        flight = None
        if alert.code.startswith("JD5"):  # what JD1xx sees is in the checkpoint
            flight = self.dump(alert.step, str(alert))
        moment = self._moment(alert, flight)
        self._send(alert, moment)
        if self.on_alert == "raise":
            self._raise = self._raise or alert
        elif callable(self.on_alert):
            with self.guards.part("on_alert", "the function is called no more"):
                if self.guards.on("on_alert"):
                    call_handler(self.on_alert, alert, moment)

    def _moment(self, alert: Alert, flight: Path | None) -> AlertMoment:
        tiers = None
        if self.tiers is not None:
            tiers = self.tiers()
        return AlertMoment(
            step=max(self.last_step, alert.step),
            alerts=tuple(self.alerts),
            findings=tuple(getattr(tiers, "findings", ())),
            model=getattr(tiers, "model", None),
            optimizers=tuple(getattr(tiers, "optimisers", ())),
            log_dir=self.folder,
            flight=flight,
        )

    def _send(self, alert: Alert, moment: AlertMoment) -> None:
        """Send an alert to every sink that takes alerts and still works."""
        for name, alert_sink in self.alert_sinks:
            part = f"alerts to {name}"
            with self.guards.part(part, f"no alert is sent to {name} from now on"):
                if self.guards.on(part):
                    call_handler(alert_sink.alert, alert, moment)
        for name, sink in self.sinks:
            tell = getattr(sink, "alert", None)
            with self.guards.part(f"sink {name}", f"nothing more is sent to {name}"):
                if callable(tell) and self.guards.on(f"sink {name}"):
                    call_handler(tell, alert, moment)

    def _webhook_failed(self, name: str, reason: str) -> None:
        self.guards.fail(f"alerts to {name}", reason, f"no alert is sent to {name} from now on")

    def raise_alert(self) -> None:
        """Raises what `on_alert="raise"` asked for; outside of every guard."""
        alert, self._raise = self._raise, None
        if alert is not None:
            raise AlertRaised(alert)

    def left(self, step: int, ending: Ending) -> None:
        """Note how the loop was left, with a flight if it is to have one."""
        self.settle(step)
        self.ending = ending
        if ending.how in ("crash", "interrupt", "signal"):
            self.line("note", {"step": step, "text": f"the loop was left by {ending.reason}"})
        if ending.has_flight:
            folder = self.dump(step, ending.reason, ended=ending.how)
            there = self.folder / f"flight-{step}" if self.folder is not None else None
            if folder is None and there is not None and there.is_dir():
                folder = there  # an alert at this step has written it
            self.ending_flight = folder.name if folder is not None else None

    def dump(self, step: int, why: str, ended: str = "") -> Path | None:
        """Have the flight recorder write what it keeps; return the folder, or None if it wrote
        none.

        Args:
            step: that the flight is about.
            why: in one line.
            ended: how the loop was left; empty if it goes on.
        """
        if self.recorder is None:
            return None
        with self.guards.part("recorder", "the flight recorder writes nothing more"):
            if self.guards.on("recorder"):
                if ended and self.batches is not None:
                    self.batches.take_compiled()
                folder = self.recorder.dump(step, why, self.batches, self.header, ended)
                if folder is not None:
                    self.line("note", {"step": step, "text": f"flight recorder: {folder.name}"})
                return folder
        return None

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

    def _fault(self, part: str, error: str, loses: str, cure: str) -> None:
        if part != "log":
            self.line("fault", {"part": part, "error": error, "off": loses, "cure": cure})

    # -- the end -----------------------------------------------------------------------------------
    def wait(self) -> None:
        """Until the log is on the disk."""
        if self.file is not None:
            self.file.flush()

    def end(self, step: int, clock: Clock, looks: int) -> None:
        """Write the last line."""
        seen = max(self.live.seen, 1)
        with_clip = self.totals["with_clip"]
        self.settle(step)
        self.line(
            "end",
            {
                "step": step,
                "seconds": time.time() - self._begun,
                "spent": dict(clock.spent),
                "host_syncs": looks,
                "skipped": self.totals["skipped"],
                "off": dict(self.guards.off),
                "alerts": len(self.alerts),
                "clip_fraction": self.totals["clipped"] / with_clip if with_clip else None,
                "spike_score": {key: count / seen for key, count in self.live.spikes.items()},
                "how": self.ending.how,
                "reason": self.ending.reason,
                "flight": self.ending_flight,
                "session": self.pulse.session if self.pulse is not None else None,
            },
        )

    def close_sinks(self) -> None:
        """Close what figures and alerts are sent to."""
        for name, sink in self.sinks:
            with self.guards.part(f"sink {name}", f"{name} could not be closed"):
                sink.close()
        for name, alert_sink in self.alert_sinks:
            close = getattr(alert_sink, "close", None)
            with self.guards.part(f"alerts to {name}", f"{name} could not be closed"):
                if callable(close):
                    close()

    def close(self, step: int, clock: Clock, looks: int) -> None:
        self.end(step, clock, looks)
        self.close_sinks()
        if self.file is not None:
            self.file.close()
