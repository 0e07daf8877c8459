"""A progress bar with an estimate, on a terminal only and on stderr; everywhere else silence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


class Bar:
    """A `jacdiag.pipeline.options.Progress` drawn by rich; without a display it does nothing."""

    def __init__(self, display: Progress | None, text: str, heed: Callable[[], None]) -> None:
        self.display, self.heed = display, heed
        self.task = None if display is None else display.add_task(text, total=None)

    def start(self, total: float, text: str) -> None:
        """Say how much work there is.

        The estimate begins to count here, also after an earlier `stop`.
        """
        self.heed()
        if self.display is None or self.task is None:
            return
        self.display.start()
        self.display.reset(self.task, total=total, description=text)

    def advance(self, units: float, text: str) -> None:
        """Some of the work is done; `text` says on what."""
        self.heed()
        if self.display is None or self.task is None:
            return
        self.display.update(self.task, advance=units, description=text)

    def stop(self) -> None:
        """End the work: the bar goes away, for the table says what there is to say."""
        if self.display is not None:
            self.display.stop()


@contextmanager
def bar(text: str, heed: Callable[[], None]) -> Iterator[Bar]:
    """Show a bar for as long as the block runs, first without an end.

    Args:
        text: what goes on at first.
        heed: asked at every step, so that a Ctrl-C that was swallowed is not lost.
    """
    if not sys.stderr.isatty():
        yield Bar(None, text, heed)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        SpinnerColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Left(TimeRemainingColumn):
        """How long it will still take; nothing until that is known."""

        def render(self, task: Task) -> Text:
            known = task.total is not None and task.time_remaining is not None
            return super().render(task).append(" left") if known else Text()

    display = Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<36.36}", markup=False),
        BarColumn(24),
        Left(),
        console=Console(stderr=True),
        transient=True,
    )
    with display:
        yield Bar(display, text, heed)
