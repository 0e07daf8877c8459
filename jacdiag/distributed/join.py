"""Make a process one rank of several, from the environment that torchrun sets."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from jacdiag.distributed.audit_team import JOIN, OR_ALONE, Alone, Team
from jacdiag.distributed.failure import Failure
from jacdiag.distributed.store import connect, in_environment
from jacdiag.errors import UsageError

Ranks = Alone | Team


def join(alarm: Callable[[Failure, threading.Event], None] | None = None) -> Team:
    """Join the other ranks that torchrun's environment names.

    Args:
        alarm: as for `Team`.

    Raises:
        RankError: they cannot be reached, or do not join.
        UsageError: the environment makes no sense.
    """
    # 1. Read rank and size from the environment.
    variables = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    if not _names_a_rank(variables):
        got = ", ".join(f"{name}={text}" for name, text in variables.items())
        raise UsageError("the environment names no rank of several", got=got, hint=OR_ALONE)
    rank = int(variables["RANK"])
    size = int(variables["WORLD_SIZE"])

    # 2. Meet the others at the store.
    return Team(connect(rank, size, JOIN), rank, size, alarm=alarm)


def _names_a_rank(variables: Mapping[str, str]) -> bool:
    """Return whether the variables are numbers, and the rank is below the size."""
    for text in variables.values():
        if not text.isdecimal():
            return False
    return int(variables["RANK"]) < int(variables["WORLD_SIZE"])


@contextmanager
def enlisted(ranks: Ranks | bool) -> Iterator[Ranks]:
    """Yield the team for one audit.

    Args:
        ranks: a team, which is used as it is; True for a new one; False for this process alone.

    Raises:
        UsageError: True in a process that is not one of several.
    """
    # 1. No new team.
    if isinstance(ranks, (Alone, Team)):
        yield ranks
        return
    if not ranks or os.environ.get("WORLD_SIZE") == "1":
        yield Alone()
        return
    if not in_environment():
        raise UsageError(
            "ranks=True needs other ranks",
            got="no RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT",
            hint="torchrun --nproc-per-node 2 script.py",
        )

    # 2. A new team, which ends with the audit, also if another rank is what ended it.
    team = join()
    try:
        yield team
        team.finish()
    except BaseException as error:
        cause = team.fail(error)
        team.close()
        raise cause from error
