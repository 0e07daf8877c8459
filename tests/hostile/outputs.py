"""Output paths of every kind, drawn at random: what may be replaced is replaced whole, and nothing
else is touched.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import socket
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

OLD = b"the old content"
KINDS = (
    "new",
    "old",
    "link",
    "dangling",
    "chain",
    "pipe",
    "null",
    "full",
    "descriptor",
    "folder",
    "socket",
    "loop",
    "missing",
    "long",
    "locked name",
    "small disk",
    "small disk, old",
    "small disk, link",
)
_REFUSED = ("full", "folder", "socket", "loop", "missing", "long", "locked name")


@dataclass
class Case:
    """An output path, and what holds before and after a write to it.

    Attributes:
        path: what is written to.
        file: the regular file that has the content afterwards; None if the content goes elsewhere.
        read: what came out of a pipe.
        room: bytes that a file may take; None for no limit.
    """

    path: str
    file: Path | None = None
    read: list[bytes] = field(default_factory=list)
    reader: threading.Thread | None = None
    room: int | None = None


def verdict_on_output(folder: Path, rng: random.Random) -> str:
    """Write to an output path of a random kind and return "written", "refused", or what went
    wrong.
    """
    from jacdiag.errors import JacdiagError
    from jacdiag.records.output_file import write_output

    kind, data = rng.choice(KINDS), rng.randbytes(rng.choice([0, 1, 5_000, 200_000]))
    place = folder / "outputs"
    place.mkdir()
    try:
        with contextlib.ExitStack() as opened:
            case = _case(kind, place, data, rng, opened)
            before = _state(place)
            error = ""
            try:
                with _limited(case.room):
                    write_output(case.path, data)
            except JacdiagError:
                error = "refused"
            except BaseException as other:
                return f"output {kind}: crash: {type(other).__name__}: {str(other)[:120]}"
            if case.reader is not None:
                case.reader.join(5)
            wrong = _wrong(kind, case, data, before, _state(place), refused=bool(error))
            return f"output {kind}: {wrong}" if wrong else error or "written"
    finally:
        shutil.rmtree(place)


def _case(
    kind: str, place: Path, data: bytes, rng: random.Random, opened: contextlib.ExitStack
) -> Case:
    """Make a place of that kind."""
    target, link = place / "target", place / "link"
    if kind.endswith(("old", "chain")) or kind in ("link", "small disk, link"):
        target.write_bytes(OLD)
    room = rng.randrange(len(data)) if kind.startswith("small disk") and data else None
    if kind in ("new", "old", "small disk", "small disk, old"):
        return Case(str(target), target, room=room)
    if kind in ("link", "dangling", "small disk, link"):
        link.symlink_to("target")
        return Case(str(link), target, room=room)
    if kind == "chain":
        (place / "second").symlink_to(target)
        link.symlink_to("second")
        return Case(str(link), target)
    if kind == "pipe":
        os.mkfifo(target)
        case = Case(str(target))
        case.reader = threading.Thread(
            target=lambda: case.read.append(target.read_bytes()), daemon=True
        )
        case.reader.start()
        return case
    if kind in ("null", "full"):
        link.symlink_to(f"/dev/{kind}")
        return Case(rng.choice([str(link), f"/dev/{kind}"]))
    if kind == "descriptor":
        file = opened.enter_context(target.open("wb"))
        return Case(f"/proc/self/fd/{file.fileno()}", target)
    if kind == "socket":
        server = opened.enter_context(socket.socket(socket.AF_UNIX))
        # the name of a socket is short; that of the folder may not be
        holder = os.open(place, os.O_RDONLY)
        opened.callback(os.close, holder)
        server.bind(f"/proc/self/fd/{holder}/target")
        return Case(str(target))
    if kind == "loop":
        link.symlink_to("link")
        return Case(str(link))
    if kind == "folder":
        return Case(str(place))
    names = {"missing": "no/such/file", "long": "x" * 256, "locked name": "file/x"}
    if kind == "locked name":
        (place / "file").write_bytes(OLD)
    return Case(str(place / names[kind]))


@contextlib.contextmanager
def _limited(room: int | None) -> Iterator[None]:
    """Let no file grow beyond some bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if room is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _state(place: Path) -> dict[str, tuple[int, int, str]]:
    """Every name with its kind, its device number and where its link leads."""
    state = {}
    for path in place.iterdir():
        status = path.lstat()
        leads = str(path.readlink()) if path.is_symlink() else ""
        state[path.name] = (stat.S_IFMT(status.st_mode), status.st_rdev, leads)
    for device in ("/dev/null", "/dev/full"):
        status = os.lstat(device)
        state[device] = (stat.S_IFMT(status.st_mode), status.st_rdev, "")
    return state


def _wrong(
    kind: str,
    case: Case,
    data: bytes,
    before: dict[str, tuple[int, int, str]],
    after: dict[str, tuple[int, int, str]],
    *,
    refused: bool,
) -> str:
    """Return what is not as it must be, or nothing."""
    must_refuse = kind in _REFUSED and not (kind == "full" and not data)
    must_refuse = must_refuse or case.room is not None
    if refused != must_refuse:
        return "refused" if refused else "written, and it cannot be"
    expected = dict(before)
    if case.file is not None and not refused:
        expected["target"] = (stat.S_IFREG, 0, "")
    if after != expected:
        return f"the folder changed: {sorted(after)}"
    if kind == "pipe" and case.read != [data]:
        return "the pipe brought something else"
    if case.file is None or not case.file.exists():
        return ""
    content = case.file.read_bytes()
    whole = OLD if refused else data
    return "" if content == whole else f"{len(content)} bytes of {len(whole)}"
