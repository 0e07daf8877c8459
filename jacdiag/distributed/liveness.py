"""One process of a job, and whether it still exists, as far as this machine can see that."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from jacdiag.records.base import Record
from jacdiag.records.heartbeat import place_of_process


@dataclass(frozen=True)
class Member(Record):
    """What the other ranks know about a rank.

    Attributes:
        rank: its number.
        size: how many ranks the job has.
        host: the name of its machine.
        pid: the id of its process.
        place: equal for processes that see each other's ids; "" if it is not known.
    """

    rank: int
    size: int
    host: str
    pid: int
    place: str = ""

    @classmethod
    def me(cls, rank: int, size: int) -> Member:
        """Return this process as a member.

        Args:
            rank: of this process.
            size: how many ranks the job has.
        """
        return cls(rank, size, socket.gethostname(), os.getpid(), place_of_process())

    @property
    def name(self) -> str:
        """The rank and its host, for messages."""
        return f"rank {self.rank} of {self.size} ({self.host})"

    def is_gone(self) -> bool:
        """Return whether the process has certainly ended.

        False for a process of another machine or container.
        """
        # 1. Whether its number means anything here.
        if not self.place:
            return False
        if self.place != place_of_process():
            return False

        # 2. A process that has ended has no entry.
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return True

        # 3. A zombie has one, and one that is dead. The name of the program stands in parentheses,
        # and may have spaces and parentheses.
        state = stat.rpartition(")")[2].split()[0]
        return state in "ZX"
