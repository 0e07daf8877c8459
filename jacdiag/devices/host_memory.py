"""How much memory of this machine is free for this process: the one place that knows.

A container or a batch job is a control group of Linux with a limit of its own. The limit may stand
on the group itself or on any group around it, so every level is read. Version 1 and version 2 of
the interface name their files differently (https://docs.kernel.org/admin-guide/cgroup-v2.html,
section "Memory Interface Files").
"""

from __future__ import annotations

import ctypes
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
        kind: type of the file system, in the list of mounts.
    """

    limits: tuple[str, ...]
    usage: str
    cache: str
    mount: str
    kind: str


_V1 = _Interface(
    limits=("memory.limit_in_bytes",),
    usage="memory.usage_in_bytes",
    cache="total_inactive_file",
    mount="/sys/fs/cgroup/memory",
    kind="cgroup",
)
_V2 = _Interface(
    limits=("memory.max", "memory.high"),
    usage="memory.current",
    cache="inactive_file",
    mount="/sys/fs/cgroup",
    kind="cgroup2",
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
    if not rooms:
        return None
    # a group may use more than its limit for a moment
    return max(min(rooms), 0)


def return_freed_memory() -> None:
    """Give back to the system what the C library keeps of freed memory, if it can.

    glibc keeps freed blocks of less than 32 MiB, and takes new memory for larger ones: a program
    that frees many small tensors, and then needs a few large ones, takes both. Any other library
    is left alone.

    Example:
        >>> return_freed_memory()
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):
        return
    trim(0)


def _available(root: Path) -> Iterator[int]:
    """Yield what `/proc/meminfo` calls available."""
    kilobytes = _value_of_key(root / "proc/meminfo", "MemAvailable:")
    if kilobytes is not None:
        # the file says kB and means 1024 bytes
        yield kilobytes * 1024


def _rooms_of_groups(root: Path) -> Iterator[int]:
    """Yield limit minus use of this process's group and of every group around it."""
    for line in _lines(root / "proc/self/cgroup"):
        # "0::/path" is the group of version 2, "4:memory:/path" one of version 1.
        number, _, membership = line.partition(":")
        controllers, _, path = membership.partition(":")
        interface = _interface_of(number, controllers)
        if interface is None:
            continue
        for folder in _folders(root, interface, PurePosixPath(path)):
            yield from _room(folder, interface)


def _interface_of(number: str, controllers: str) -> _Interface | None:
    """Return the interface of a hierarchy that limits memory; None if it limits something else.

    Args:
        number: of the hierarchy.
        controllers: what it limits, separated by commas; empty in version 2.
    """
    # 1. The only hierarchy of version 2.
    if number == "0" and not controllers:
        return _V2

    # 2. One of version 1 for each controller, or for several together.
    if "memory" in controllers.split(","):
        return _V1
    return None


def _folders(root: Path, interface: _Interface, group: PurePosixPath) -> Iterator[Path]:
    """Yield the folders of a group and of the groups around it, as far as they are visible."""
    # 1. The place of the hierarchy.
    mount = _find_mount(root, interface)
    point = root / mount.point.relative_to("/")

    # 2. A container sees its own group as the root of the mount. A path that leads out of it names
    #    nothing visible.
    below = PurePosixPath()
    if group.is_relative_to(mount.root) and ".." not in group.parts:
        below = group.relative_to(mount.root)

    # 3. Every level has limits of its own.
    for level in (below, *below.parents):
        yield point / level


def _find_mount(root: Path, interface: _Interface) -> _Mount:
    """Return where the hierarchy of an interface is mounted, from `/proc/self/mountinfo`."""
    for line in _lines(root / "proc/self/mountinfo"):
        mount = _parse_mount(line, interface)
        if mount is not None:
            return mount

    # Without a list of mounts, where it usually is.
    return _Mount(root=PurePosixPath("/"), point=PurePosixPath(interface.mount))


def _parse_mount(line: str, interface: _Interface) -> _Mount | None:
    """Return the mount in a line; None if it is another one, or the line cannot be read."""
    # 1. 36 35 98:0 ROOT POINT options optional... - TYPE source super-options
    head, separator, tail = line.partition(" - ")
    fields = head.split()
    kinds = tail.split()
    if not separator or len(fields) < 5 or len(kinds) < 3:
        return None

    # 2. A hierarchy of the right type.
    kind, _, options = kinds[:3]
    if kind != interface.kind:
        return None
    # Version 1 has a hierarchy for each controller.
    if interface is _V1 and "memory" not in options.split(","):
        return None

    # 3. Its group and its folder.
    group, point = fields[3:5]
    if not group.startswith("/") or not point.startswith("/"):
        return None
    return _Mount(root=PurePosixPath(group), point=PurePosixPath(point))


def _room(folder: Path, interface: _Interface) -> Iterator[int]:
    """Yield what one group leaves; nothing if it has no limit or cannot be read."""
    # 1. The tightest limit, and the use.
    limits = []
    for name in interface.limits:
        limit = _number(folder / name)
        if limit is not None:
            limits.append(limit)
    used = _number(folder / interface.usage)
    if not limits or used is None:
        return

    # 2. Page cache counts as used, but the kernel drops the inactive part before it refuses memory.
    cache = _value_of_key(folder / "memory.stat", interface.cache) or 0
    yield min(limits) - max(used - cache, 0)


def _value_of_key(path: Path, key: str) -> int | None:
    """Return the number after a key in a file with a key in each line; None if there is none."""
    for line in _lines(path):
        words = line.split()
        is_entry = len(words) >= 2
        if is_entry and words[0] == key:
            return _decimal(words[1])
    return None


def _number(path: Path) -> int | None:
    """Return the number in a file; None if there is no file, or a word such as `max`."""
    lines = _lines(path)
    if not lines:
        return None
    return _decimal(lines[0].strip())


def _decimal(text: str) -> int | None:
    """Return a number of decimal digits; None for any other text."""
    if text.isdecimal():
        return int(text)
    # `max` and such words are no limit
    return None


def _lines(path: Path) -> list[str]:
    """Return the lines of a file; none if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
