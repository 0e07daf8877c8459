"""Output files: regular files appear complete or not at all; others are written through."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import sys
import tempfile
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from jacdiag.errors import UsageError

STDOUT = "-"  # as a string only: Path("-") is a file of that name, and so is "./-"

# outputs that this process has written, by the names given: Ctrl-C names them
written: list[str] = []

_DESCRIPTOR = re.compile(r"/proc/(?P<process>\d+)(/task/\d+)?/fd/(?P<number>\d+)")
_MOST_LINKS = 40  # as Linux has it

OutputPath = str | os.PathLike[str]


class OutputKind(Enum):
    """How an output is written."""

    FILE = "file"  # a regular file, or none yet: replaced whole
    STDOUT = "stdout"
    DESCRIPTOR = "descriptor"  # open in this process: /dev/fd/3, /dev/stderr, >(command)
    DEVICE = "device"
    PIPE = "pipe"


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where an output path leads.

    Attributes:
        kind: how it is written.
        target: the path after all symbolic links.
        descriptor: the number of an open descriptor.
    """

    kind: OutputKind
    target: Path
    descriptor: int | None = None

    @property
    def streamed(self) -> bool:
        """Whether bytes are written through, and nothing is replaced."""
        return self.kind is not OutputKind.FILE


def write_output(path: OutputPath, data: bytes) -> None:
    """Write an output.

    A regular file is written under a temporary name next to it, then renamed: an interruption or a
    full disk leaves the old file, or none. Its mode and, where permitted, its owner stay. It is a
    new file, so another hard link to the old one keeps the old content. Symbolic links are followed
    and stay. Devices, named pipes, open descriptors and stdout are written through; a named pipe
    waits for its reader, as `cat` does. A reader that leaves early is no error.

    Args:
        path: where to; the string "-" is stdout.
        data: the entire content.

    Raises:
        UsageError: the path cannot be written to, or there is no room.
    """
    output = check_writable(path)

    try:
        _write_by_kind(output, data)
    except BrokenPipeError:
        return  # the reader has left early
    except OSError as error:
        raise _refused_write(path, error) from error

    # Ctrl-C names the outputs that are there. What stdout got is on the screen.
    if output.kind is not OutputKind.STDOUT:
        written.append(os.fspath(path))


def _write_by_kind(output: Output, data: bytes) -> None:
    """Write an output in the way of its kind."""
    if output.kind is OutputKind.STDOUT:
        _write_stdout(data)
    elif output.descriptor is not None:
        _write_descriptor(output.descriptor, data)
    elif output.streamed:
        _write_stream(output.target, data)
    else:
        replace_file(output.target, data)


def check_writable(path: OutputPath) -> Output:
    """Return where an output path leads; call it before long work, not after it.

    Nothing is opened: to open a named pipe would wait for its reader.

    Args:
        path: as for `write_output`.

    Raises:
        UsageError: it could not be written.
    """
    # 1. Find where it leads.
    name = os.fspath(path)
    if not name:
        raise UsageError(
            "cannot write an output file", got="an empty name", hint="name a file, or - for stdout"
        )
    output = _found_output(path, name)

    # 2. Check that it takes bytes.
    if output.kind is OutputKind.FILE:
        _check_folder(name, output.target)
    elif output.descriptor is not None:
        _check_descriptor(name, output.descriptor)
    elif output.kind is not OutputKind.STDOUT:
        _check_permission(name, output.target)
    return output


def _found_output(path: OutputPath, name: str) -> Output:
    """Return where an output path leads.

    Args:
        path: as for `write_output`.
        name: of the path, for the error.

    Raises:
        UsageError: it leads nowhere.
    """
    try:
        return find_output(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"cannot write '{name}'", got=reason, hint="name another file, or - for stdout"
        ) from error


def find_output(path: OutputPath) -> Output:
    """Return where an output path leads, without a check that it can be written.

    Args:
        path: as for `write_output`.

    Raises:
        OSError: its links form a loop, or a part of the path is no folder.
        UsageError: a folder, a socket or a disk.
    """
    if isinstance(path, str) and path == STDOUT:
        return Output(kind=OutputKind.STDOUT, target=Path("/dev/stdout"))
    name = os.fspath(path)

    # 1. A link of /proc is no path. It stands for an open file, which may have no name.
    target = _follow_links(Path(name))
    place = _DESCRIPTOR.fullmatch(str(target))
    if place:
        return _open_descriptor(target, int(place["process"]), int(place["number"]))

    # 2. Look at what is there.
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        _check_names_file(name)
        return Output(kind=OutputKind.FILE, target=target)
    return Output(kind=_kind_of(name, mode), target=target)


def _follow_links(target: Path) -> Path:
    """Follow symbolic links, up to a file that is none or to an open descriptor.

    Raises:
        OSError: the links form a loop.
    """
    for _ in range(_MOST_LINKS):
        target = Path(os.path.realpath(target.parent), target.name)
        if _DESCRIPTOR.fullmatch(str(target)):
            return target
        if not target.is_symlink():
            return target
        target = target.parent / target.readlink()
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _check_names_file(name: str) -> None:
    """Raise if a path that does not exist ends as that of a folder does."""
    if name.endswith(os.sep):
        raise UsageError(
            f"cannot write '{name}'", got="the name of a folder", hint="name a file in it"
        )


def leads_to_stdout(path: OutputPath) -> bool:
    """Return whether an output is this process's stdout: "-", or a path such as /dev/stdout."""
    return _kind(path) is OutputKind.STDOUT


def is_streamed(path: OutputPath) -> bool:
    """Return whether an output is written through, as stdout, devices and pipes are."""
    return _kind(path) not in (None, OutputKind.FILE)


def _kind(path: OutputPath) -> OutputKind | None:
    """Return the kind of an output; None for one that cannot be written."""
    with contextlib.suppress(OSError, ValueError, UsageError):
        return find_output(path).kind
    return None


def _kind_of(name: str, mode: int) -> OutputKind:
    """Return the kind of what a path leads to.

    Args:
        name: the path, for the message.
        mode: of what is there, as `os.stat` has it.

    Raises:
        UsageError: a folder, a socket or a disk.
    """
    # 1. What can be written.
    if stat.S_ISREG(mode):
        return OutputKind.FILE
    if stat.S_ISFIFO(mode):
        return OutputKind.PIPE
    if stat.S_ISCHR(mode):
        return OutputKind.DEVICE

    # 2. What cannot be.
    if stat.S_ISDIR(mode):
        raise UsageError(
            f"cannot write '{name}'", got="a folder of that name", hint="name a file in it"
        )
    if stat.S_ISSOCK(mode):
        raise UsageError(
            f"cannot write '{name}'", got="a socket", hint="name a file, or - for stdout"
        )
    raise UsageError(
        f"cannot write '{name}'",
        got="a disk, whose content would be lost",
        hint="name a file on it",
    )


def _open_descriptor(target: Path, process: int, number: int) -> Output:
    """Return an open file of this process by its number; of another process by its path."""
    # 1. Of another process. A regular file is written through: its name may be gone, and a new file
    # in its place would not be the one that the process has open.
    mode = target.stat().st_mode
    if process != os.getpid():
        kind = _kind_of(str(target), mode)
        if kind is OutputKind.FILE:
            kind = OutputKind.DEVICE
        return Output(kind=kind, target=target)

    # 2. Of this process.
    if stat.S_ISDIR(mode):
        raise UsageError(f"cannot write '{target}'", got="an open folder", hint="name a file in it")
    if number == 1:
        return Output(kind=OutputKind.STDOUT, target=target)
    return Output(kind=OutputKind.DESCRIPTOR, target=target, descriptor=number)


def _check_folder(name: str, target: Path) -> None:
    """Raise if no file of this name can be made in its folder."""
    folder = target.parent
    if not folder.is_dir():
        raise UsageError(
            f"cannot write '{name}'", got="its folder does not exist", hint=f"mkdir -p {folder}"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write '{name}'", got=f"no permission to write in {folder}")

    # The temporary name is shorter than the limit, so the rename would be the first to fail.
    longest = os.pathconf(folder, "PC_NAME_MAX")
    if len(os.fsencode(target.name)) > longest:
        raise UsageError(f"cannot write '{name}'", got=f"a name of more than {longest} bytes")


def _check_permission(name: str, target: Path) -> None:
    """Raise if this process may not write to a device or pipe."""
    if not os.access(target, os.W_OK):
        raise UsageError(f"cannot write '{name}'", got="no permission")


def _check_descriptor(name: str, descriptor: int) -> None:
    """Raise if an open file is closed by now, or open for reading only."""
    try:
        access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError as error:
        raise UsageError(f"cannot write '{name}'", got=error.strerror) from error

    # Such as standard input, under the name /dev/fd/0.
    if access == os.O_RDONLY:
        raise UsageError(f"cannot write '{name}'", got="it is open for reading only")


def _refused_write(path: OutputPath, error: OSError) -> UsageError:
    """Return the error of a write that failed, with what to do."""
    hint = "write elsewhere, or to - for stdout"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        hint = "free some space, or write elsewhere"
    return UsageError(
        f"cannot write the result to '{os.fspath(path)}'",
        got=error.strerror or str(error),
        hint=hint,
    )


def replace_file(target: Path, data: bytes) -> None:
    """Write a regular file under a temporary name next to it, then rename it.

    A reader sees the old file or the new one.

    Args:
        target: the file; links are not followed.
        data: its entire content.

    Raises:
        OSError: it cannot be written; the old file is still there.
    """
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".jacdiag.", suffix=".part")
    temporary = Path(name)
    try:
        # 1. Write the new file, with the owner and mode of the old one.
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        _keep_owner(temporary, target)
        temporary.chmod(_mode(target))

        # 2. Put it in the place of the old one, at once.
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_stream(target: Path, data: bytes) -> None:
    """Write through to what is there.

    There is no O_CREAT, so that no file appears should it have gone.
    """
    handle = os.open(target, os.O_WRONLY | os.O_APPEND | os.O_NOCTTY)
    with os.fdopen(handle, "wb") as file:
        file.write(data)


def _write_descriptor(number: int, data: bytes) -> None:
    """Write to an open file of this process, and leave it open."""
    # It may be stderr, and what was printed before comes first.
    sys.stderr.flush()
    with os.fdopen(os.dup(number), "wb") as file:
        file.write(data)


def _write_stdout(data: bytes) -> None:
    """Write bytes to stdout, after what was printed before."""
    stream = sys.stdout
    raw = getattr(stream, "buffer", None)
    try:
        stream.flush()
        if raw is None:  # a StringIO in place of stdout
            stream.write(data.decode())
            return
        raw.write(data)
        raw.flush()
    except OSError:
        # What is left in the buffer would raise again when the interpreter flushes it at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise
    except UnicodeDecodeError as error:
        raise UsageError(
            "cannot write a picture to a stdout that takes text only", hint="name a file"
        ) from error


def _mode(target: Path) -> int:
    """Return the mode of the existing file, else that of a plain open(): 0666 less the umask."""
    if target.exists():
        return target.stat().st_mode & 0o7777

    # The umask can only be read by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _keep_owner(new: Path, target: Path) -> None:
    """Give the new file the owner of the old one.

    Only root may; others mostly own what they replace.
    """
    if not target.exists():
        return
    owner = target.stat()
    current = new.stat()
    is_same_owner = (owner.st_uid, owner.st_gid) == (current.st_uid, current.st_gid)
    if is_same_owner:
        return
    with contextlib.suppress(OSError):
        os.chown(new, owner.st_uid, owner.st_gid)
