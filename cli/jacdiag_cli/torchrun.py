"""This process as one rank of several (`torchrun ... -m jacdiag_cli`): rank 0 alone prints."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from jacdiag.errors import Stopped
from jacdiag_cli.streams import complain

if TYPE_CHECKING:
    from jacdiag.distributed import Failure, Team

_NOTICE = 2.0  # seconds in which a rank may notice by itself that another has failed
_GRACE = 20.0  # and then those in which a long operation may end


def enrolled() -> Team | None:
    """Join the other ranks, and handle SIGTERM from here on; None if this process is the only one.

    Raises:
        RankError: they cannot be reached, or do not come.
    """
    if not _is_rank_of_several():
        return None
    from jacdiag.distributed import join

    # Only the main thread may handle signals.
    if threading.current_thread() is not threading.main_thread():
        return join()

    def stop(_number: int, _frame: FrameType | None) -> None:
        calm()  # once is enough: what follows is orderly
        raise Stopped

    signal.signal(signal.SIGTERM, stop)
    return join(_alarm)


def _is_rank_of_several() -> bool:
    """Return whether a launcher started this process as one of several, and said how to join."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    return all(os.environ.get(name) for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))


def calm() -> None:
    """From here on this rank ends by itself; torchrun's SIGTERM must not cut its last words."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _alarm(failure: Failure, noticed: threading.Event) -> None:
    """Get the main thread out of its work; out of one operation that does not end, by leaving."""
    # 1. By a signal that ends a sleep, too.
    if not noticed.wait(_NOTICE):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    if noticed.wait(_GRACE):
        return

    # 2. By ending the process.
    with suppress(Exception):
        complain(failure.what, got=failure.got, hint=failure.hint)
    code = 2
    if failure.kind == "interrupted":
        code = 130
    os._exit(code)


@contextmanager
def quiet(unless: bool) -> Iterator[None]:
    """Swallow what this process prints, its model's own code and warnings included."""
    if unless:
        yield
        return
    before = sys.stdout, sys.stderr
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        sys.stdout = sys.stderr = nowhere
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
