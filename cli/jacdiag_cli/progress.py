"""A progress bar with an estimate, on a terminal only and on stderr; everywhere else silence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress

    from jacdiag.records import Report


class Bar:
    """A `jacdiag.pipeline.options.Progress` without a display: it only listens for a Ctrl-C."""

    def __init__(self, heed: Callable[[], None]) -> None:
        self.heed = heed

    def start(self, _total: float, _text: str) -> None:
        """Say how much work there is."""
        self.heed()

    def advance(self, _units: float, _text: str) -> None:
        """Some of the work is done."""
        self.heed()

    def stop(self) -> None:
        """End the work."""


class DrawnBar(Bar):
    """A `jacdiag.pipeline.options.FirstLookProgress` that rich draws on a terminal."""

    def __init__(self, console: Console, text: str, heed: Callable[[], None]) -> None:
        super().__init__(heed)
        self.first_look: list[str] = []
        self.display = _display(console, self.first_look)
        self.task = self.display.add_task(text, total=None)

    def start(self, total: float, text: str) -> None:
        """Say how much work there is.

        The estimate begins to count here, also after an earlier `stop`.
        """
        super().start(total, text)
        self.display.start()
        self.display.reset(self.task, total=total, description=text)

    def advance(self, units: float, text: str) -> None:
        """Some of the work is done; `text` says on what."""
        super().advance(units, text)
        self.display.update(self.task, advance=units, description=text)

    def stop(self) -> None:
        """End the work: the bar goes away, for the table says what there is to say."""
        self.display.stop()

    def show_first_look(self, report: Report) -> None:
        """Show below the bar how the conditions come out, until the table says it.

        Args:
            report: judged, of what is known so far.
        """
        from jacdiag.render.content.first_look import first_look_lines

        self.first_look[:] = first_look_lines(report)
        self.heed()
        self.display.refresh()


@contextmanager
def bar(text: str, heed: Callable[[], None]) -> Iterator[Bar]:
    """Show a bar for as long as the block runs, first without an end.

    Args:
        text: what goes on at first.
        heed: asked at every step, so that a Ctrl-C that was swallowed is not lost.
    """
    if not sys.stderr.isatty():
        yield Bar(heed)
        return
    from rich.console import Console

    drawn = DrawnBar(Console(stderr=True), text, heed)
    with drawn.display:
        yield drawn


def _display(console: Console, below: Iterable[str]) -> Progress:
    """Return a display of a task, with lines of text below it.

    Args:
        console: that it is drawn on.
        below: the lines, read anew each time.
    """
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

    class WithLines(Progress):
        """A display of tasks, with lines of text below them."""

        def get_renderables(self) -> Iterable[RenderableType]:
            yield from super().get_renderables()
            for line in below:
                yield Text(line)

    return WithLines(
        SpinnerColumn(),
        TextColumn("{task.description:<36.36}", markup=False),
        BarColumn(24),
        Left(),
        console=console,
        transient=True,
    )
