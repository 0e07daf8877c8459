"""Output files: replaced whole, or written through; links followed; what is no file refused by
name.
"""

from __future__ import annotations

import io
import os
import socket
import stat
import subprocess
import sys
import threading
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from jacdiag.errors import UsageError
from jacdiag.records.output_file import (
    OutputKind,
    check_writable,
    find_output,
    is_streamed,
    leads_to_stdout,
    write_output,
    written,
)

DATA = b"0123456789" * 20_000  # more than a pipe holds


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def read_in_thread(path: Path) -> tuple[threading.Thread, list[bytes]]:
    """Starts a reader of a named pipe."""
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(path.read_bytes()), daemon=True)
    reader.start()
    return reader, read


def test_a_regular_file_is_replaced_whole(tmp_path: Path) -> None:
    path, other = tmp_path / "a", tmp_path / "hard link"
    path.write_text("old")
    path.chmod(0o640)
    other.hardlink_to(path)
    write_output(path, DATA)
    assert path.read_bytes() == DATA and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert other.read_text() == "old", "another name of the old file keeps the old content"
    assert names(tmp_path) == {"a", "hard link"} and written[-1] == str(path)


def test_a_named_pipe_is_written_through(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_writable(pipe)  # waits for nobody
    reader, read = read_in_thread(pipe)
    write_output(pipe, DATA)
    reader.join(10)
    assert read == [DATA] and stat.S_ISFIFO(pipe.stat().st_mode) and names(tmp_path) == {"pipe"}


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def read_little() -> None:
        with pipe.open("rb", buffering=0) as file:
            file.read(5)

    reader = threading.Thread(target=read_little, daemon=True)
    reader.start()
    before = len(written)
    write_output(pipe, DATA * 10)
    reader.join(10)
    assert len(written) == before, "it is not called written"


def test_output_to_dev_null_leaves_the_device() -> None:
    write_output("/dev/null", DATA)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode) and written[-1] == "/dev/null"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_full_device_is_an_error_and_stays(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("/dev/full")
    for path in ("/dev/full", link):
        with pytest.raises(
            UsageError, match=r"cannot write the result to .*\nNo space left.*\nfree some space"
        ):
            write_output(path, DATA)
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode) and link.is_symlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A disk of 64 kB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield disk  # type: ignore[misc]
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_keeps_the_old_file(small_disk: Path) -> None:
    path = small_disk / "a"
    path.write_text("old")
    with pytest.raises(UsageError, match="No space left"):
        write_output(path, DATA)
    assert path.read_text() == "old" and names(small_disk) == {"a"}
    with pytest.raises(UsageError, match="No space left"):
        write_output(small_disk / "b", DATA)
    assert names(small_disk) == {"a"}


def test_links_are_followed_and_stay(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    target = tmp_path / "sub" / "target"
    target.write_text("old")
    (tmp_path / "link").symlink_to("sub/target")
    (tmp_path / "second").symlink_to("link")
    write_output(tmp_path / "second", b"new")
    assert (
        target.read_text() == "new"
        and (tmp_path / "link").is_symlink()
        and (tmp_path / "second").is_symlink()
    )
    assert names(tmp_path / "sub") == {"target"}


def test_a_dangling_link_makes_its_target(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    write_output(tmp_path / "link", b"new")
    assert (tmp_path / "target").read_text() == "new" and (tmp_path / "link").is_symlink()
    (tmp_path / "away").symlink_to("no/such/folder")
    with pytest.raises(UsageError, match="its folder does not exist"):
        check_writable(tmp_path / "away")


def test_failed_write_through_a_link_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UsageError):
        write_output(tmp_path / "link", DATA)
    assert (tmp_path / "target").read_text() == "old" and names(tmp_path) == {"link", "target"}


def test_what_is_no_file_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("old")
    (tmp_path / "to-folder").symlink_to(".")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name, said in [
            ("socket", "a socket"),
            (".", "a folder of that name"),
            ("to-folder", "a folder of that name"),
            ("/", "a folder of that name"),
            ("new/", "the name of a folder"),
            ("loop", "Too many levels of symbolic links"),
            ("loop/x", "Too many levels of symbolic links"),
            ("file/x", "Not a directory"),
            ("no/x", "its folder does not exist"),
            ("x" * 300, "name"),
            ("a\0b", "null"),
            ("", "an empty name"),
        ]:
            with pytest.raises(UsageError) as refused:
                write_output(name, b"new")
            assert said in str(refused.value), name
    assert (
        names(tmp_path) == {"loop", "file", "to-folder", "socket"}
        and (tmp_path / "file").read_text() == "old"
    )


def test_a_disk_is_not_overwritten(tmp_path: Path) -> None:
    try:
        os.mknod(tmp_path / "disk", 0o600 | stat.S_IFBLK, os.makedev(7, 250))
    except OSError:
        pytest.skip("cannot make a device here")
    with pytest.raises(UsageError, match="a disk, whose content would be lost"):
        check_writable(tmp_path / "disk")


def test_a_name_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    write_output(tmp_path / ("x" * 255), b"new")
    assert (tmp_path / ("x" * 255)).read_text() == "new"


def test_a_dash_is_stdout_as_a_string_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = len(written)
    write_output("-", b"\x00\xff")
    assert capfdbinary.readouterr().out == b"\x00\xff" and len(written) == before
    write_output("./-", b"a")
    write_output(Path("-"), b"b")
    assert Path("-").read_text() == "b" and leads_to_stdout("-") and not leads_to_stdout("./-")


def test_stdout_that_takes_text_only() -> None:
    with redirect_stdout(io.StringIO()) as held:
        write_output("-", "ü".encode())
        with pytest.raises(UsageError, match="text only"):
            write_output("-", b"\xff")
    assert held.getvalue() == "ü"


def test_open_descriptors_are_written_at_their_place(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb", buffering=0) as file:
        file.write(b"before ")
        write_output(f"/proc/self/fd/{file.fileno()}", b"between ")
        write_output(f"/dev/fd/{file.fileno()}", b"again ")
        file.write(b"after")
    assert (tmp_path / "log").read_text() == "before between again after"
    with (
        (tmp_path / "log").open("rb") as file,
        pytest.raises(UsageError, match="open for reading only"),
    ):
        write_output(f"/proc/self/fd/{file.fileno()}", b"x")
    with pytest.raises(UsageError, match="No such file"):
        write_output("/proc/self/fd/987", b"x")


def test_pipes_devices_and_stdout_are_streamed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert find_output(tmp_path / "new").kind is OutputKind.FILE and not is_streamed(
        tmp_path / "new"
    )
    assert is_streamed("-") and is_streamed("/dev/null") and is_streamed(tmp_path / "pipe")
    assert not is_streamed(tmp_path) and not is_streamed("no/such/folder/x")


def test_stdout_by_its_path_in_a_process(tmp_path: Path) -> None:
    """The shell's file keeps what was printed before and after."""
    code = (
        "from jacdiag.records.output_file import write_output\n"
        "print('before')\nwrite_output('/dev/stdout', b'between\\n')\nprint('after', flush=True)\n"
    )
    with (tmp_path / "out").open("wb") as file:
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True)
    assert (tmp_path / "out").read_text() == "before\nbetween\nafter\n"
