"""One process of a job, and whether it lives, as far as that can be seen from this machine."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from jacdiag.records.base import Record


@dataclass(frozen=True)
class Member(Record):
    """A rank as the others know it.

    `place` is equal for processes that see each other's ids, and "" if it is not known.
    """

    rank: int
    size: int
    host: str
    pid: int
    place: str = ""

    @classmethod
    def me(cls, rank: int, size: int) -> Member:
        return cls(rank, size, socket.gethostname(), os.getpid(), _place())

    @property
    def name(self) -> str:
        return f"rank {self.rank} of {self.size} ({self.host})"

    def is_gone(self) -> bool:
        """Return whether the process has certainly ended.

        False for a process of another machine or container.
        """
        if not self.place or self.place != _place():
            return False
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        return state in "ZX"


def _place() -> str:
    """This boot of this machine, and this namespace of process ids; "" where there is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
