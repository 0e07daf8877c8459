"""Pass on what happens in a run: to the log, the sinks, the flight recorder and the user."""

from __future__ import annotations

import datetime
import logging
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from jacdiag._version import __version__
from jacdiag.detectors.first_nonfinite import explain_batch
from jacdiag.detectors.live_rules import LiveRules, Repeat, StepFigures
from jacdiag.measure.batch_values import find_nonfinite_values
from jacdiag.monitor.alert_moment import AlertMoment, call_handler
from jacdiag.monitor.batch_fingerprints import Print, PrintsUnderWay
from jacdiag.monitor.batches import Batches
from jacdiag.monitor.blind_spots import Silence
from jacdiag.monitor.guards import AlertRaised, Guards, logger, say
from jacdiag.monitor.histograms import Histogram
from jacdiag.monitor.kept_batches import KeptBatch
from jacdiag.monitor.log.flight_recorder import FlightRecorder
from jacdiag.monitor.log.heartbeat_writer import Pulse
from jacdiag.monitor.log.run_file import RunFile
from jacdiag.monitor.log.sinks import AlertSink, Sink, open_alert_sinks, open_sinks, slashed
from jacdiag.monitor.noise_scale import MicroBatchNorms, NoiseScale
from jacdiag.monitor.process_endings import Ending
from jacdiag.monitor.schedule import Clock
from jacdiag.monitor.skip_list import SkipList
from jacdiag.records.batch_values import BatchValues
from jacdiag.records.run_log import Alert
from jacdiag.rules.thresholds import Thresholds

_LOG_LEVELS = {"error": logging.ERROR, "warning": logging.WARNING, "info": logging.INFO}


class RunEvents:
    """What happens in a run, passed on to everything that wants to know.

    Steps are judged by the live rules first. Then steps, alerts, findings, faults and notes go to
    the log, the sinks, the flight recorder, the logger and the handler of the user.

    Args:
        folder: of the run; None on ranks that do not write.
        resume: go on with the log in the folder.
        on_alert: "log", "raise" or a function.
        strict: raise errors of the watch itself.
        thresholds: of the live rules.
        sinks: addresses of sinks and objects with write(step, figures).
        recorder: steps that the flight recorder keeps; 0 for no recorder.
        quiet: do not print prices.
        warns: warn about how the watch is used; one rank does.
        alerts_to: addresses of webhooks and objects with alert(alert, moment).

    Attributes:
        live: the live rules.
        alerts: those of this process.
        findings: what the probes say about the model's init.
        waits: what each live rule still waits for, as far as the log has it.
        resumed_at: the step that a log on disk ends with.
        batches: what the model was called with; None if the watch does not observe it.
        skip_list: batches to leave out; None if there is no such list.
        prints: fingerprints of the micro-batches of the steps that are not logged yet.
        tiers: the measurements, which hold the model, the optimizers and the last report.
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
        warns: bool = True,
        alerts_to: str | AlertSink | Iterable[str | AlertSink] = (),
    ) -> None:
        self.on_alert = on_alert
        self.quiet = quiet
        self.warns = warns
        self.folder = folder
        self.guards = Guards(strict, self._note_fault)
        # Where events go.
        self.file: RunFile | None = None
        if folder is not None:
            self.file = RunFile(folder, resume=resume, failed=self._log_failed)
        self.alert_sinks = open_alert_sinks(alerts_to, self._webhook_failed)
        self.sinks = open_sinks(sinks, folder or Path())
        self.pulse: Pulse | None = None
        if folder is not None and self.file is not None:
            self.pulse = Pulse(folder, self.file.submit)
        self.recorder: FlightRecorder | None = None
        if folder is not None and recorder:
            self.recorder = FlightRecorder(folder, recorder)
        # What judges them, and what was found.
        self.live = LiveRules(thresholds)
        self.noise = NoiseScale()
        self.silence = Silence(self.warn, self.note)
        self.waits: dict[str, str] = {}
        self.alerts: list[Alert] = []
        self.findings: list[Alert] = []
        # What others set.
        self.tiers: weakref.ref[Any] | None = None
        self.batches: Batches | None = None
        self.skip_list: SkipList | None = None
        self.prints: list[list[Print]] = []
        self._prints_under_way: PrintsUnderWay | None = None
        # Where the run is.
        self.header: dict[str, Any] = {}
        self.last_step = 0
        self.going_on = False
        self.resumed_at = 0
        if self.file is not None:
            self.going_on = self.file.last_step is not None
            self.resumed_at = self.file.last_step or 0
        self.totals = {"steps": 0, "skipped": 0, "clipped": 0, "with_clip": 0}
        self.ending = Ending(how="closed")
        self.ending_flight: str | None = None
        self._started = time.time()
        self._is_first_step_numbered = False
        # lines with a step, held back until the first step has a number
        self._held_lines: list[tuple[str, Mapping[str, Any]]] | None = None
        self._warned: set[str] = set()
        self._alert_to_raise: Alert | None = None

    # -- lines -------------------------------------------------------------------------------------
    def begin(self, header: Mapping[str, Any]) -> None:
        """Write the first line.

        Args:
            header: the model, the names of the sub-layers (groups) and the settings.
        """
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
        if not self._is_first_step_numbered:
            self._held_lines = []

    def settle(self, base: int) -> None:
        """Write what was held back until the first step of this process had a number.

        Later calls do nothing.

        Args:
            base: the step that the weights were at when the first probe saw them.
        """
        if self._is_first_step_numbered or not self.header:
            return
        self._is_first_step_numbered = True
        # 1. Say where the run goes on, before the lines that follow from there.
        if self.going_on:
            self.line("resume", {"step": base}, at_once=True)
            self.live.resumed()
            self.going_on = False

        # 2. Give what was expected to be another step its number.
        expected, actual = self.resumed_at, max(base, 0)
        if expected != actual:
            self.live.renumber(expected, actual)
            _renumber(self.alerts, expected, actual)
            _renumber(self.findings, expected, actual)

        # 3. Write the lines.
        held_lines = self._held_lines or []
        self._held_lines = None
        for kind, row in held_lines:
            if row.get("step") == expected:
                row = {**row, "step": actual}
            self.line(kind, row)

    def rewind(self, base: int) -> None:
        """Note that the loop has gone back in this process: it does steps after `base` again."""
        self.line("resume", {"step": base})
        self.live.rewind(base)

    def go_on(self, step: int, live: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint: what the log has beyond its step is done again.

        Args:
            step: of the checkpoint.
            live: the state of the live rules; None if the checkpoint has none.
        """
        self.resumed_at = step
        self.going_on = True
        if live is not None:
            self.live.load(live)

    def line(self, kind: str, row: Mapping[str, Any], *, at_once: bool = False) -> None:
        """Write a line to the log.

        Args:
            kind: one of `jacdiag.records.run_log.KINDS`.
            row: the line without its kind.
            at_once: do not hold it back until the first step has a number.
        """
        self._write(kind, [row], at_once=at_once)

    def _write(self, kind: str, rows: list[Mapping[str, Any]], *, at_once: bool = False) -> None:
        # 1. Hold lines with a step back until the first step of this process has a number.
        if self._held_lines is not None and not at_once:
            has_step = any("step" in row for row in rows)
            if has_step:
                self._held_lines += [(kind, row) for row in rows]
                return

        # 2. Write all others, if there is a log that still works.
        if self.file is None:
            return
        if not self.guards.on("log"):
            return
        with self.guards.part("log", "nothing more is written to the run log"):
            self.file.write(kind, rows)

    def _log_failed(self, error: Exception) -> None:
        self.guards.fail("log", error, "nothing more is written to the run log")

    # -- steps and series --------------------------------------------------------------------------
    def steps(self, rows: list[dict[str, Any]]) -> None:
        """Take the steps since the last time: judge them, then pass them on.

        Args:
            rows: one per step, in order. Votes, scores and fingerprints are added to them.
        """
        # 1. Judge each step, and give it to the flight recorder.
        self._add_fingerprints(rows)
        self.silence.look_at_rows(rows)
        alerts: list[Alert] = []
        repeats: list[Repeat] = []
        ready: list[Mapping[str, Any]] = []
        for row, figures in zip(rows, self._read_figures(rows), strict=True):
            self._count(row)
            self.last_step = row["step"]
            with self.guards.part("detectors", "the live rules are silent from now on"):
                if self.guards.on("detectors") and figures is not None:
                    result = self.live.step(figures)
                    alerts += result.alerts
                    repeats += result.repeats
                    for note in result.notes:
                        self.note(note)
                    row["votes"] = result.votes
                    row["scores"] = result.scores
                    ready += self._newly_ready(row["step"])
            row["noise_scale"] = self._noise_scale(row.pop("noise"))
            if self.recorder is not None:
                self.recorder.add(row)

        # 2. Write the lines and send the figures, then the alerts about them.
        self._write("step", rows)  # type: ignore[arg-type]
        self._write("ready", ready)
        groups = self.header.get("groups", [])
        for row in rows:
            self.publish(row["step"], partial(slashed, row, groups))
        for alert in alerts:
            self.alert(self._with_batch(alert))
        for repeat in repeats:
            self.repeat(replace(repeat, alert=self._with_batch(repeat.alert)))

    def _read_figures(self, rows: list[dict[str, Any]]) -> Sequence[StepFigures | None]:
        """Return what the live rules read of each row, and prepare them for it.

        It is None for every row if the rules are switched off.
        """
        with self.guards.part("detectors", "the live rules are silent from now on"):
            if self.guards.on("detectors"):
                block = [StepFigures.from_row(row) for row in rows]
                self.live.expect(block)
                return block
        return [None] * len(rows)

    def _with_batch(self, alert: Alert) -> Alert:
        """Add to an alert about values that are not finite whether the batch held them."""
        if alert.code != "JD505":
            return alert
        if self.batches is None or self.batches.kept is None:
            return alert

        queue = self.batches.kept.queue
        with self.guards.part("batch values", "alerts do not say whether the batch was finite"):
            if self.guards.on("batch values"):
                values = _nonfinite_values_at(queue, alert.step)
                ranks = int(self.header.get("ranks") or 1)
                return explain_batch(alert, values, ranks)
        return alert

    def _noise_scale(self, norms: MicroBatchNorms | None) -> float | None:
        """Return the gradient noise scale in sequences, if the micro-batches were read."""
        if norms is None:
            return None
        self.noise.add(norms)
        return self.noise.value

    def _newly_ready(self, step: int) -> list[Mapping[str, Any]]:
        """Return a line for each live rule that has become ready since the last call."""
        before = self.waits
        self.waits = self.live.waits()
        lines: list[Mapping[str, Any]] = []
        for code, waited_for in before.items():
            is_ready = code not in self.waits
            if is_ready:
                lines.append({"step": step, "code": code, "waited_for": waited_for})
        return lines

    def note_ready(self, step: int) -> None:
        """Say which live rules statistics or a probe have made ready."""
        self._write("ready", self._newly_ready(step))

    def _count(self, row: Mapping[str, Any]) -> None:
        self.totals["steps"] += 1
        self.totals["skipped"] += bool(row["skipped"])
        if row["clipped"] is not None:
            self.totals["with_clip"] += 1
            self.totals["clipped"] += bool(row["clipped"])

    def begin_fingerprints(self, steps: int) -> None:
        """Launch what makes the fingerprints of the first steps that are not logged yet.

        Call it before the figures of these steps are read, so that one wait serves both.
        """
        with self.guards.part("batches", "no batch fingerprints from now on"):
            entries = [entry for prints in self.prints[:steps] for entry in prints]
            if entries:
                self._prints_under_way = PrintsUnderWay(entries)

    def _add_fingerprints(self, rows: list[dict[str, Any]]) -> None:
        """Add the fingerprints of their micro-batches to steps."""
        # 1. Take those of these steps. The others belong to steps that are read later.
        by_step = self.prints[: len(rows)]
        self.prints = self.prints[len(rows) :]
        under_way = self._prints_under_way
        self._prints_under_way = None
        if under_way is None:
            return

        # 2. Hand them out in order.
        with self.guards.part("batches", "no batch fingerprints from now on"):
            texts = iter(under_way.texts())
            for row, prints in zip(rows, by_step, strict=False):
                row["batches"] = list(islice(texts, len(prints)))

    def publish(self, step: int, figures: Callable[[], Mapping[str, float]]) -> None:
        """Send figures to every sink that still works.

        Args:
            step: that they belong to.
            figures: returns them by name; called for each sink.
        """
        for name, sink in self.sinks:
            with self.guards.part(f"sink {name}", f"nothing more is sent to {name}"):
                if self.guards.on(f"sink {name}"):
                    sink.write(step, figures())

    def publish_histograms(self, step: int, shown: Mapping[str, Histogram]) -> None:
        """Send histograms to every sink that shows them and still works."""
        for name, sink in self.sinks:
            write = getattr(sink, "write_histograms", None)
            if write is None or not self.guards.on(f"sink {name}"):
                continue
            with self.guards.part(f"sink {name}", f"nothing more is sent to {name}"):
                write(step, shown)

    def finding(self, finding: Alert) -> None:
        """Report what a probe says about the model's init. It raises nothing and calls nobody."""
        self.findings.append(finding)
        self.line("finding", finding.to_dict())
        logger.warning("jacdiag.watch: a finding, no alert: %s", finding)

    # -- alerts, faults, notes ---------------------------------------------------------------------
    def alert(self, alert: Alert) -> None:
        """Pass on an alert: to the log, the logger, the flight recorder, the sinks and the user."""
        # 1. Log it.
        self.alerts.append(alert)
        self.line("alert", alert.to_dict())
        logger.log(_LOG_LEVELS[alert.level], "jacdiag.watch: %s", alert)
        if alert.level == "info":
            return

        # 2. Keep the batch out, and write the flight. What JD1xx sees is in the checkpoint.
        self._add_to_skip_list(alert)
        flight = None
        if alert.code.startswith("JD5"):
            flight = self.dump(alert.step, str(alert))

        # 3. Send it, and call the user's handler.
        moment = self._moment(alert, flight)
        self._send(alert, moment)
        self._handle(alert, moment)

    def repeat(self, repeat: Repeat) -> None:
        """Note a rule that stands out again in its quiet time, and keep what a replay needs."""
        # 1. Note it. It is no alert: nobody is called.
        alert = repeat.alert
        self.line("note", {"step": alert.step, "code": alert.code, "text": str(repeat)})
        logger.info("jacdiag.watch: %s", repeat)

        # 2. Keep the batch out, and write the flight.
        self._add_to_skip_list(alert)
        self.dump(alert.step, str(alert), is_repeat=True)

    def _add_to_skip_list(self, alert: Alert) -> None:
        if self.skip_list is None:
            return
        with self.guards.part("skip list", "no batch is added to the skip list from now on"):
            if self.guards.on("skip list"):
                self.skip_list.add(alert)

    def _handle(self, alert: Alert, moment: AlertMoment) -> None:
        """Do what `on_alert` says."""
        # 1. An error is raised later, outside of every guard. The first alert is the one.
        if self.on_alert == "raise":
            self._alert_to_raise = self._alert_to_raise or alert
            return

        # 2. A function is called, as long as it works.
        if not callable(self.on_alert):
            return
        with self.guards.part("on_alert", "the function is called no more"):
            if self.guards.on("on_alert"):
                call_handler(self.on_alert, alert, moment)

    def _moment(self, alert: Alert, flight: Path | None) -> AlertMoment:
        """Return what a handler may want to look at."""
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
        # 1. Those for alerts alone.
        for name, alert_sink in self.alert_sinks:
            part = f"alerts to {name}"
            with self.guards.part(part, f"no alert is sent to {name} from now on"):
                if self.guards.on(part):
                    call_handler(alert_sink.alert, alert, moment)

        # 2. Those for figures, which may take alerts too.
        for name, sink in self.sinks:
            send = getattr(sink, "alert", None)
            with self.guards.part(f"sink {name}", f"nothing more is sent to {name}"):
                if callable(send) and self.guards.on(f"sink {name}"):
                    call_handler(send, alert, moment)

    def _webhook_failed(self, name: str, reason: str) -> None:
        self.guards.fail(f"alerts to {name}", reason, f"no alert is sent to {name} from now on")

    def raise_alert(self) -> None:
        """Raise the alert that `on_alert="raise"` has noted. Call it outside of every guard.

        Raises:
            AlertRaised: there was an alert since the last call.
        """
        alert = self._alert_to_raise
        self._alert_to_raise = None
        if alert is not None:
            raise AlertRaised(alert)

    def left(self, step: int, ending: Ending) -> None:
        """Note how the loop was left, with a flight if it is to have one.

        Args:
            step: the last one that was finished.
            ending: how it was left.
        """
        # 1. How it was left.
        self.settle(step)
        self.ending = ending
        if ending.how in ("crash", "interrupt", "signal"):
            self.line("note", {"step": step, "text": f"the loop was left by {ending.reason}"})

        # 2. Its flight. An alert at this step may have written it already.
        if not ending.has_flight:
            return
        flight = self.dump(step, ending.reason, ended=ending.how)
        if flight is None:
            flight = self._flight_of(step)
        self.ending_flight = flight.name if flight is not None else None

    def _flight_of(self, step: int) -> Path | None:
        """Return the flight that an alert at a step has written; None if there is none."""
        if self.folder is None:
            return None
        flight = self.folder / f"flight-{step}"
        if flight.is_dir():
            return flight
        return None

    def dump(self, step: int, why: str, ended: str = "", *, is_repeat: bool = False) -> Path | None:
        """Let the flight recorder write what it keeps.

        Args:
            step: that the flight is about.
            why: in one line.
            ended: how the loop was left; empty if it goes on.
            is_repeat: it is about a rule that stands out again in its quiet time.

        Returns:
            The folder of the flight; None if none was written.
        """
        if self.recorder is None:
            return None
        with self.guards.part("recorder", "the flight recorder writes nothing more"):
            if not self.guards.on("recorder"):
                return None
            # 1. The batch of a step that was running may be that of a compiled forward.
            if ended and self.batches is not None:
                self.batches.take_compiled()

            # 2. Write the flight.
            folder = self.recorder.dump(
                step, why, self.batches, self.header, ended, is_repeat=is_repeat
            )
            if folder is not None:
                self.line("note", {"step": step, "text": f"flight recorder: {folder.name}"})
            return folder
        return None

    def warn(self, what: str, text: str) -> None:
        """Warn about how the watch is used, once.

        Args:
            what: key of the warning.
            text: of the warning.
        """
        if what in self._warned or not self.warns:
            return
        self._warned.add(what)
        logger.warning("jacdiag.watch: %s", text)
        self.line("note", {"text": text})

    def note(self, text: str) -> None:
        """Write a note to the log."""
        self.line("note", {"text": text})

    def announce(self, text: str, row: Mapping[str, Any]) -> None:
        """Report the price of what is about to run.

        Args:
            text: for the logger and the terminal.
            row: for the log.
        """
        self.line("price", row)
        logger.info("jacdiag.watch: %s", text)
        if not self.quiet:
            say(f"jacdiag.watch: {text}")

    def _note_fault(self, part: str, error: str, loses: str, cure: str) -> None:
        if part != "log":
            self.line("fault", {"part": part, "error": error, "off": loses, "cure": cure})

    # -- the end -----------------------------------------------------------------------------------
    def wait(self) -> None:
        """Wait until the log is on the disk."""
        if self.file is not None:
            self.file.flush()

    def end(self, step: int, clock: Clock, looks: int) -> None:
        """Write the last line.

        Args:
            step: the last one.
            clock: with the time that the watch has spent.
            looks: how often the device was waited for.
        """
        self.settle(step)
        seen = max(self.live.seen, 1)
        with_clip = self.totals["with_clip"]
        clip_fraction = None
        if with_clip:
            clip_fraction = self.totals["clipped"] / with_clip
        self.line(
            "end",
            {
                "step": step,
                "seconds": time.time() - self._started,
                "spent": dict(clock.spent),
                "host_syncs": looks,
                "skipped": self.totals["skipped"],
                "off": dict(self.guards.off),
                "alerts": len(self.alerts),
                "clip_fraction": clip_fraction,
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
        """Write the last line, see `end`, and close everything."""
        self.end(step, clock, looks)
        self.close_sinks()
        if self.file is not None:
            self.file.close()


def _nonfinite_values_at(queue: Iterable[KeptBatch], step: int) -> list[BatchValues]:
    """Return what is not finite in each batch of a step, compared with the batches before it."""
    batches = list(queue)
    # 1. The batches before the step, the latest first.
    earlier: list[dict[str, Any]] = []
    for batch in reversed(batches):
        if batch.step < step:
            earlier.append(batch.arguments)

    # 2. Those of the step.
    values: list[BatchValues] = []
    for batch in batches:
        if batch.step == step:
            values.append(find_nonfinite_values(batch.arguments, earlier))
    return values


def _renumber(alerts: list[Alert], old: int, new: int) -> None:
    """Give the alerts of step `old` the number `new`."""
    for place, alert in enumerate(alerts):
        # An alert is frozen, so that another one takes its place.
        if alert.step == old:
            alerts[place] = replace(alert, step=new)
