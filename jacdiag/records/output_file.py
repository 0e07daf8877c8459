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


class Kind(Enum):
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

    kind: Kind
    target: Path
    descriptor: int | None = None

    @property
    def streamed(self) -> bool:
        """Whether bytes are written through, and nothing is replaced."""
        return self.kind is not Kind.FILE


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
        if output.kind is Kind.STDOUT:
            _write_stdout(data)
            return
        if output.descriptor is not None:
            _write_descriptor(output.descriptor, data)
        elif output.streamed:
            _write_stream(output.target, data)
        else:
            replace_file(output.target, data)
    except BrokenPipeError:
        return
    except OSError as error:
        raise _refused_write(path, error) from error
    written.append(os.fspath(path))


def check_writable(path: OutputPath) -> Output:
    """Return where an output path leads; call it before long work, not after it.

    Nothing is opened: to open a named pipe would wait for its reader.

    Args:
        path: as for `write_output`.

    Raises:
        UsageError: it could not be written.
    """
    name = os.fspath(path)
    if not name:
        raise UsageError(
            "cannot write an output file", got="an empty name", hint="name a file, or - for stdout"
        )
    try:
        output = find_output(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"cannot write '{name}'", got=reason, hint="name another file, or - for stdout"
        ) from error
    if output.kind is Kind.FILE:
        _check_folder(name, output.target)
    elif output.descriptor is not None:
        _check_descriptor(name, output.descriptor)
    elif output.kind is not Kind.STDOUT and not os.access(output.target, os.W_OK):
        raise UsageError(f"cannot write '{name}'", got="no permission")
    return output


def find_output(path: OutputPath) -> Output:
    """Return where an output path leads, without a check that it can be written.

    Args:
        path: as for `write_output`.

    Raises:
        OSError: its links form a loop, or a part of the path is no folder.
        UsageError: a folder, a socket or a disk.
    """
    if isinstance(path, str) and path == STDOUT:
        return Output(kind=Kind.STDOUT, target=Path("/dev/stdout"))
    name = os.fspath(path)

    # 1. Follow the links. The links of /proc are no paths: each stands for an open file, which may
    # have no name.
    target = Path(name)
    for _ in range(_MOST_LINKS):
        target = Path(os.path.realpath(target.parent), target.name)
        if place := _DESCRIPTOR.fullmatch(str(target)):
            return _open_descriptor(target, int(place["process"]), int(place["number"]))
        if not target.is_symlink():
            break
        target = target.parent / target.readlink()
    else:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))

    # 2. Look at what is there.
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        if name.endswith(os.sep):
            raise UsageError(
                f"cannot write '{name}'", got="the name of a folder", hint="name a file in it"
            ) from None
        return Output(kind=Kind.FILE, target=target)
    return Output(kind=_kind_of(name, mode), target=target)


def leads_to_stdout(path: OutputPath) -> bool:
    """Return whether an output is this process's stdout: "-", or a path such as /dev/stdout."""
    return _kind(path) is Kind.STDOUT


def is_streamed(path: OutputPath) -> bool:
    """Return whether an output is written through, as stdout, devices and pipes are."""
    return _kind(path) not in (None, Kind.FILE)


def _kind(path: OutputPath) -> Kind | None:
    with contextlib.suppress(OSError, ValueError, UsageError):
        return find_output(path).kind
    return None


def _kind_of(name: str, mode: int) -> Kind:
    if stat.S_ISREG(mode):
        return Kind.FILE
    if stat.S_ISFIFO(mode):
        return Kind.PIPE
    if stat.S_ISCHR(mode):
        return Kind.DEVICE
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
    mode = target.stat().st_mode
    if process != os.getpid():
        kind = _kind_of(str(target), mode)
        # Its name may be gone, and a file in its place would not be the one that the process has
        # open.
        return Output(kind=Kind.DEVICE if kind is Kind.FILE else kind, target=target)
    if stat.S_ISDIR(mode):
        raise UsageError(f"cannot write '{target}'", got="an open folder", hint="name a file in it")
    if number == 1:
        return Output(kind=Kind.STDOUT, target=target)
    return Output(kind=Kind.DESCRIPTOR, target=target, descriptor=number)


def _check_folder(name: str, target: Path) -> None:
    folder = target.parent
    if not folder.is_dir():
        raise UsageError(
            f"cannot write '{name}'", got="its folder does not exist", hint=f"mkdir -p {folder}"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write '{name}'", got=f"no permission to write in {folder}")
    longest = os.pathconf(folder, "PC_NAME_MAX")
    if len(os.fsencode(target.name)) > longest:
        raise UsageError(f"cannot write '{name}'", got=f"a name of more than {longest} bytes")


def _check_descriptor(name: str, descriptor: int) -> None:
    try:
        access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError as error:
        raise UsageError(f"cannot write '{name}'", got=error.strerror) from error
    if access == os.O_RDONLY:
        raise UsageError(f"cannot write '{name}'", got="it is open for reading only")


def _refused_write(path: OutputPath, error: OSError) -> UsageError:
    room = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    hint = "free some space, or write elsewhere" if room else "write elsewhere, or to - for stdout"
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
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        _keep_owner(Path(name), target)
        Path(name).chmod(_mode(target))
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _write_stream(target: Path, data: bytes) -> None:
    """Write through to what is there.

    There is no O_CREAT, so that no file appears should it have gone.
    """
    handle = os.open(target, os.O_WRONLY | os.O_APPEND | os.O_NOCTTY)
    with os.fdopen(handle, "wb") as file:
        file.write(data)


def _write_descriptor(number: int, data: bytes) -> None:
    sys.stderr.flush()
    with os.fdopen(os.dup(number), "wb") as file:
        file.write(data)


def _write_stdout(data: bytes) -> None:
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
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _keep_owner(new: Path, target: Path) -> None:
    """Give the new file the owner of the old one.

    Only root may; others mostly own what they replace.
    """
    if not target.exists():
        return
    owner, now = target.stat(), new.stat()
    if (owner.st_uid, owner.st_gid) != (now.st_uid, now.st_gid):
        with contextlib.suppress(OSError):
            os.chown(new, owner.st_uid, owner.st_gid)
