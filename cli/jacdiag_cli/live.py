"""`jacdiag live RUN.jsonl`: a screen that follows a run."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jacdiag.errors import SourceError
from jacdiag_cli.output import Invocation, console, emit, interrupted

if TYPE_CHECKING:
    from jacdiag.report.runlog import RunLog

_FRAME = 24  # lines of a frame that goes to a pipe


@click.command(short_help="Follows a run on a screen: loss, gradient norm, gains, alerts.")
@click.argument("run")
@click.option("--once", is_flag=True, help="Print one frame and leave; so it is where stdout is no terminal.")
@click.option("--refresh", type=click.FloatRange(0.1, 60), default=1.0, show_default=True, help="Seconds per frame.")
@click.pass_obj
def live(invocation: Invocation, run: str, once: bool, refresh: float) -> int:
    """Follows the log of a run that `jacdiag.watch` writes. RUN is a run.jsonl, or the folder that holds one.

    Only reads: the run goes on whether anybody looks or not. Works over ssh, in 80 x 24.

    \b
    Example:
      jacdiag live runs/a
    """
    from jacdiag.render.live import screen
    from jacdiag.report.runlog import RUN_FILE

    path = Path(run) / RUN_FILE if Path(run).is_dir() else Path(run)
    follower = Follower(path)
    follower.read()
    terminal = console()
    if once or not sys.stdout.isatty():
        with terminal.capture() as held:
            terminal.print(screen(follower.run, str(path), terminal.width, _FRAME), height=_FRAME)
        emit(held.get())
        return 0
    from rich.live import Live

    def frame() -> Any:
        return screen(follower.run, str(path), terminal.width, terminal.height)

    try:
        with Live(frame(), console=terminal, screen=True, auto_refresh=False) as view:
            while True:
                time.sleep(refresh)
                invocation.heed()
                follower.read()
                view.update(frame(), refresh=True)
    except KeyboardInterrupt:  # how the screen says that one leaves: the code of Ctrl-C, and no error
        return interrupted()


class Follower:
    """Reads what a log has grown by; only whole lines are taken."""

    def __init__(self, path: Path) -> None:
        from jacdiag.report.runlog import read_run

        self.path, self.offset = path, 0
        self.run: RunLog = type(read_run(path))()

    def read(self) -> None:
        """Raises SourceError where the log has gone."""
        from jacdiag.report.runlog import WHERE_LOGS_ARE, parsed

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
            self.run.add(row)
