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
from typing import Any

from jacdiag.records.base import SCHEMA_VERSION, check_schema

HEARTBEAT_FILE = "heartbeat.json"

# Where fields of /proc/PID/stat stand after the name of the program, see proc(5).
_STATE_FIELD = 0
_START_FIELD = 19
_DEAD_STATES = "ZX"  # a zombie, and a process that is being removed


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

    # The process.
    session: str
    pid: int
    born: str
    host: str
    place: str

    # Its steps.
    started: float
    time: float
    step: int | None = None
    step_seconds: float | None = None

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        data = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        return json.dumps(data).encode() + b"\n"


def read_heartbeat(folder: str | os.PathLike[str]) -> Heartbeat | None:
    """Read the heartbeat next to a log; None if there is none, or the file is no heartbeat.

    Args:
        folder: of the run.

    Raises:
        NewerSchemaError: it is of a newer schema version.
    """
    # 1. Read the file. It may be missing, or cut off on a shared disk.
    try:
        data = json.loads((Path(folder) / HEARTBEAT_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(data, dict):
        return None

    # 2. Take the fields that this version knows.
    check_schema(data, "heartbeat")
    names = Heartbeat.__dataclass_fields__
    values = {name: value for name, value in data.items() if name in names}
    return _heartbeat_of(values)


def _heartbeat_of(values: dict[str, Any]) -> Heartbeat | None:
    """Return a heartbeat with these fields; None if a field that it needs is missing."""
    try:
        return Heartbeat(**values)
    except TypeError:
        return None


def is_alive(beat: Heartbeat) -> bool | None:
    """Return whether the process of a heartbeat still exists; None if that cannot be seen here.

    Args:
        beat: as it was read.
    """
    # 1. Numbers of processes mean something on one machine, in one name space, only.
    if not beat.place:
        return None
    if beat.place != place_of_process():
        return None

    # 2. A later process may have the number of one that has ended.
    born = birth_of(beat.pid)
    has_ended = not born
    if has_ended:
        return False
    is_same_process: bool = born == beat.born
    return is_same_process


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
    """Return when a process started, in ticks since the machine did; "" if it cannot be seen.

    Args:
        pid: the number of the process.
    """
    # 1. Read its line. The program's name in it may hold spaces, and ends at the last ")".
    file = Path(f"/proc/{pid}/stat")
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()
    if len(fields) <= _START_FIELD:
        return ""

    # 2. A dead process keeps its number until its parent asks how it ended.
    if fields[_STATE_FIELD] in _DEAD_STATES:
        return ""
    return fields[_START_FIELD]


def host_name() -> str:
    """Return the name of this machine."""
    return socket.gethostname()
