"""Read how much memory of this machine is free for this process: the one place that knows.

A container or a batch job is a control group of Linux with a limit of its own. The limit may stand
on the group itself or on any group around it, so every level is asked. Version 1 and version 2 of
the interface name their files differently (https://docs.kernel.org/admin-guide/cgroup-v2.html,
section "Memory Interface Files").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True, kw_only=True)
class _Interface:
    """Name the files of one version of the control groups.

    Attributes:
        limits: files with a number of bytes, or with a word if there is no limit.
        usage: file with the bytes that the group uses, page cache included.
        cache: key in `memory.stat` of the page cache that the kernel gives back first.
        mount: where the hierarchy is mounted, if the list of mounts does not say so.
    """

    limits: tuple[str, ...]
    usage: str
    cache: str
    mount: str


_V1 = _Interface(
    limits=("memory.limit_in_bytes",),
    usage="memory.usage_in_bytes",
    cache="total_inactive_file",
    mount="/sys/fs/cgroup/memory",
)
_V2 = _Interface(
    limits=("memory.max", "memory.high"),
    usage="memory.current",
    cache="inactive_file",
    mount="/sys/fs/cgroup",
)


@dataclass(frozen=True, kw_only=True)
class _Mount:
    """The place of a hierarchy of groups: its group `root` is visible at the folder `point`."""

    root: PurePosixPath
    point: PurePosixPath


def free_host_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of main memory that this process can still take.

    Args:
        root: folder that holds `proc` and `sys`; another one than `/` is for tests.

    Returns:
        The memory that the kernel calls available, or what the tightest control group leaves if
        that is less. None if neither can be read (`/proc` exists on Linux only).
    """
    rooms = [*_available(root), *_rooms_of_groups(root)]
    return max(min(rooms), 0) if rooms else None


def _available(root: Path) -> Iterator[int]:
    """Yield what `/proc/meminfo` calls available."""
    for line in _lines(root / "proc/meminfo"):
        words = line.split()
        if len(words) >= 2 and words[0] == "MemAvailable:" and words[1].isdecimal():
            yield int(words[1]) * 1024


def _rooms_of_groups(root: Path) -> Iterator[int]:
    """Yield limit minus use of this process's group and of every group around it."""
    for line in _lines(root / "proc/self/cgroup"):
        # "0::/path" is the group of version 2, "4:memory:/path" one of version 1.
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")

        if number == "0" and not controllers:
            interface = _V2
        elif "memory" in controllers.split(","):
            interface = _V1
        else:
            continue

        for folder in _folders(root, interface, PurePosixPath(path)):
            yield from _room(folder, interface)


def _folders(root: Path, interface: _Interface, group: PurePosixPath) -> Iterator[Path]:
    """Yield the folders of a group and of the groups around it, as far as they are visible."""
    mount = _mount(root, interface)
    point = root / mount.point.relative_to("/")

    # A container sees its own group as the root of the mount. A path that leads out of it names
    # nothing visible.
    inside = group.is_relative_to(mount.root) and ".." not in group.parts
    below = group.relative_to(mount.root) if inside else PurePosixPath()

    for level in (below, *below.parents):
        yield point / level


def _mount(root: Path, interface: _Interface) -> _Mount:
    """Return where the hierarchy of an interface is mounted, from `/proc/self/mountinfo`."""
    for line in _lines(root / "proc/self/mountinfo"):
        # 36 35 98:0 ROOT POINT options optional... - TYPE source super-options
        head, separator, tail = line.partition(" - ")
        fields, kinds = head.split(), tail.split()
        if not separator or len(fields) < 5 or len(kinds) < 3:
            continue

        is_v2 = interface is _V2 and kinds[0] == "cgroup2"
        is_v1 = interface is _V1 and kinds[0] == "cgroup" and "memory" in kinds[2].split(",")
        absolute = fields[3].startswith("/") and fields[4].startswith("/")
        if (is_v1 or is_v2) and absolute:
            return _Mount(root=PurePosixPath(fields[3]), point=PurePosixPath(fields[4]))

    return _Mount(root=PurePosixPath("/"), point=PurePosixPath(interface.mount))


def _room(folder: Path, interface: _Interface) -> Iterator[int]:
    """Yield what one group leaves; nothing if it has no limit or cannot be read."""
    limits = [limit for name in interface.limits if (limit := _number(folder / name)) is not None]
    used = _number(folder / interface.usage)
    if not limits or used is None:
        return

    # Page cache counts as used, but the kernel drops the inactive part before it refuses memory.
    cache = 0
    for line in _lines(folder / "memory.stat"):
        words = line.split()
        if len(words) == 2 and words[0] == interface.cache and words[1].isdecimal():
            cache = int(words[1])

    yield min(limits) - max(used - cache, 0)


def _number(path: Path) -> int | None:
    """Return the number in a file; None if there is no file, or a word such as `max`."""
    lines = _lines(path)
    text = lines[0].strip() if lines else ""
    return int(text) if text.isdecimal() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
