"""Make a process one rank of several, from the environment that torchrun sets."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jacdiag.distributed.audit_team import JOIN, OR_ALONE, Alone, Team
from jacdiag.distributed.failure import Failure
from jacdiag.distributed.store import connect, in_environment
from jacdiag.errors import UsageError

Ranks = Alone | Team


def join(alarm: Callable[[Failure, threading.Event], None] | None = None) -> Team:
    """Joins the other ranks, as torchrun's environment names them.

    Raises:
        RankError: they cannot be reached, or do not come.
        UsageError: the environment makes no sense.
    """
    given = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    if not all(text.isdecimal() for text in given.values()) or int(given["RANK"]) >= int(
        given["WORLD_SIZE"]
    ):
        got = ", ".join(f"{name}={text}" for name, text in given.items())
        raise UsageError("the environment names no rank of several", got=got, hint=OR_ALONE)
    rank, size = int(given["RANK"]), int(given["WORLD_SIZE"])
    return Team(connect(rank, size, JOIN), rank, size, alarm=alarm)


@contextmanager
def enlisted(ranks: Ranks | bool) -> Iterator[Ranks]:
    """The team for one audit: as it was given, a new one for True, nobody for False.

    Raises:
        UsageError: True in a process that is not one of several.
    """
    if isinstance(ranks, (Alone, Team)):
        yield ranks
    elif not ranks or os.environ.get("WORLD_SIZE") == "1":
        yield Alone()
    elif not in_environment():
        raise UsageError(
            "ranks=True needs other ranks",
            got="no RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT",
            hint="torchrun --nproc-per-node 2 script.py",
        )
    else:
        team = join()
        try:
            yield team
            team.finish()
        except BaseException as error:
            real = team.fail(error)
            team.close()
            raise real from error
