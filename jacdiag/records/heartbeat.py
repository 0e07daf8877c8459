"""The heartbeat of a watched run: a small file next to the log, and what it says to a reader.

The file is replaced about once a second while steps are made. A process that hangs or is slow stops
replacing it; only its own machine can say whether it still exists.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

HEARTBEAT_FILE = "heartbeat.json"
_SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """A sign of life.

    Attributes:
        session: names one process's part of a run; the line `end` of the log has the same.
        pid: the process.
        born: when the process started, as the system counts; a later process may have its number.
        host: name of its machine.
        place: what identifies the machine since it was booted, and the name space of the number;
            empty if not known.
        started: when the watch began, in seconds since 1970.
        time: when the last step ended; that of the start before the first step.
        step: the last step; None before the first one.
        step_seconds: median of the last steps; None before it is known.
    """

    session: str
    pid: int
    born: str
    host: str
    place: str
    started: float
    time: float
    step: int | None = None
    step_seconds: float | None = None

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        return json.dumps({"schema_version": _SCHEMA, **asdict(self)}).encode() + b"\n"


def read_heartbeat(folder: str | os.PathLike[str]) -> Heartbeat | None:
    """Read the heartbeat next to a log; None if there is none that this version reads.

    Args:
        folder: of the run.
    """
    try:
        data = json.loads((Path(folder) / HEARTBEAT_FILE).read_bytes())
        names = Heartbeat.__dataclass_fields__
        return Heartbeat(**{name: value for name, value in data.items() if name in names})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def is_alive(beat: Heartbeat) -> bool | None:
    """Return whether the process of a heartbeat still exists; None if that cannot be seen here."""
    if not beat.place or beat.place != place_of_process():
        return None
    born = birth_of(beat.pid)
    return bool(born) and born == beat.born


def place_of_process() -> str:
    """Return what identifies this machine since its start, and the name space of processes.

    "" if it is not known.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def birth_of(pid: int) -> str:
    """Return when a process started, in ticks since the machine did; "" if it cannot be seen."""
    try:
        fields = (
            Path(f"/proc/{pid}/stat")
            .read_text(encoding="utf-8", errors="replace")
            .rpartition(")")[2]
            .split()
        )
        state, born = fields[0], fields[19]
    except (OSError, IndexError):
        return ""
    return "" if state in "ZX" else born


def host_name() -> str:
    """Return the name of this machine."""
    return socket.gethostname()
