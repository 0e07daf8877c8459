"""`jacdiag live RUN.jsonl`: a screen that follows a run."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jacdiag.errors import SourceError
from jacdiag_cli.streams import CommandInvocation, console, emit, interrupted

if TYPE_CHECKING:
    from rich.console import Console

    from jacdiag.records.run_log import RunLog
    from jacdiag.records.run_state import RunState

_FRAME = 24  # lines of a frame that goes to a pipe
_LEAST_PAUSE = 10  # times what the last frame took


@click.command(short_help="Follows a run on a screen: loss, gradient norm, gains, alerts.")
@click.argument("run")
@click.option(
    "--once",
    is_flag=True,
    help="Print one frame and the alerts in full, and end. This is also what happens if stdout is "
    "no terminal.",
)
@click.option(
    "--refresh",
    type=click.FloatRange(0.1, 60),
    default=1.0,
    show_default=True,
    help="Seconds per frame.",
)
@click.option(
    "--lines",
    type=click.IntRange(12, 500),
    help="Height of a frame; that of the terminal if not given.",
)
@click.pass_obj
def live(
    invocation: CommandInvocation, run: str, once: bool, refresh: float, lines: int | None
) -> int:
    """Follow the log of a run that `jacdiag.watch` writes.

    RUN is a run.jsonl, or the folder that holds one.

    The command only reads the log. The run does not notice it, and goes on after Ctrl-C. A terminal
    of 80 x 24 is enough. The last line says whether the run goes on, is slow, has ended or is dead.
    To tell a dead run from a slow one, the process must run on this machine.

    \b
    Example:
      jacdiag live runs/a
    """
    from jacdiag.records.run_log import RUN_FILE
    from jacdiag.render.terminal.run_screen import screen

    # 1. The log, as far as it has come.
    path = Path(run)
    if path.is_dir():
        path = path / RUN_FILE
    follower = Follower(path)
    state = follower.follow()

    # 2. One frame, for --once or for a file.
    terminal = console()
    if once or not sys.stdout.isatty():
        height = lines if lines is not None else _FRAME
        emit(_single_frame(follower.run, path, terminal, height, state))
        return 0

    # 3. A frame whenever the log may have grown.
    from rich.live import Live

    from jacdiag.render.terminal.gain_cells import GainCells

    cells = GainCells()

    def frame() -> Any:
        width, height = terminal.width, lines if lines is not None else terminal.height
        idle = follower.idle()
        return screen(follower.run, str(path), width, height, cells=cells, idle=idle, state=state)

    try:
        with Live(frame(), console=terminal, screen=True, auto_refresh=False) as view:
            spent = 0.0
            while True:
                # a long log must not take a core from the training
                time.sleep(max(refresh, _LEAST_PAUSE * spent))
                invocation.heed()
                started = time.monotonic()
                state = follower.follow()
                view.update(frame(), refresh=True)
                spent = time.monotonic() - started
    # how the screen says that one leaves: the code of Ctrl-C, and no error
    except KeyboardInterrupt:
        return interrupted()


def _single_frame(
    run: RunLog, path: Path, terminal: Console, height: int, state: RunState | None
) -> str:
    """Return one frame, and below it the alerts that it has no room for.

    Args:
        run: as far as it has come.
        path: of its log.
        terminal: gives the width.
        height: of the frame, in lines.
        state: of the run, if it is known.
    """
    from jacdiag.render.content.run_flights import flights_of_run
    from jacdiag.render.terminal.run_screen import full_alerts, screen

    # 1. The frame.
    with terminal.capture() as held:
        frame = screen(run, str(path), terminal.width, height, state=state, is_followed=False)
        terminal.print(frame, height=height)
    text = held.get()

    # 2. What a frame cuts, in full.
    lines = full_alerts(run, text, flights_of_run(run, path.parent), terminal.width)
    return text + "".join(f"{line}\n" for line in lines)


class Follower:
    """Read a log that grows. Lines that are not complete yet are left for the next time."""

    def __init__(self, path: Path) -> None:
        from jacdiag.records.run_log import read_run

        self.path, self.offset = path, 0
        self.run: RunLog = type(read_run(path, light=True))()

    def read(self) -> None:
        """Read what was added.

        Raises:
            SourceError: the log has gone.
        """
        from jacdiag.records.run_log import WHERE_LOGS_ARE, lightened, parsed

        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read()
        except OSError as error:
            raise SourceError(
                f"cannot read the run log '{self.path}'", got=error.strerror, hint=WHERE_LOGS_ARE
            ) from error
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        for row in parsed(whole.splitlines(keepends=True)):
            self.run.add(lightened(row, self.run))

    def follow(self) -> RunState | None:
        """Read on, and return the state of the run; None if there is no heartbeat."""
        from jacdiag.records.heartbeat import is_alive, read_heartbeat
        from jacdiag.records.run_state import state_of_run

        # The process first, then the log: a process that has ended wrote its last line before.
        beat = read_heartbeat(self.path.parent)
        alive = is_alive(beat) if beat is not None else None
        self.read()
        return state_of_run(self.run, beat, alive, time.time())

    def idle(self) -> float | None:
        """Seconds since the log was last written to; None if that cannot be known."""
        try:
            return max(time.time() - self.path.stat().st_mtime, 0.0)
        except OSError:
            return None
