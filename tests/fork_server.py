"""Start Python programs by a fork of one process that has imported torch and jacdiag already.

A new interpreter takes three seconds until it has imported torch and jacdiag; a fork takes twenty
milliseconds. Use it if a test is about what processes do to each other or how they end. A test of
how a program starts, or of what it imports, needs a new interpreter.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
ROOT = TESTS.parent


class ForkedProcess:
    """A program that was started by the server, with the names of `subprocess.Popen`."""

    def __init__(self, server: ForkServer, pid: int, output: Path, errors: Path) -> None:
        self.server = server
        self.pid = pid
        self.output = output
        self.errors = errors
        self.returncode: int | None = None

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the program if it runs still, and wait for its end."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait(60)

    def wait(self, timeout: float) -> int:
        """Return the exit code; a signal has a negative one.

        Raises:
            subprocess.TimeoutExpired: the program did not end in time.
        """
        if self.returncode is None:
            self.returncode = self.server.ask(wait=self.pid, timeout=timeout)["code"]
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for the end; return what the program wrote to stdout and to stderr."""
        self.wait(timeout)
        return self.output.read_text(encoding="utf-8"), self.errors.read_text(encoding="utf-8")


class ForkServer:
    """The process that has imported torch and jacdiag, and forks."""

    def __init__(self) -> None:
        search_path = os.pathsep.join([str(ROOT), str(ROOT / "cli"), str(TESTS)])
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": search_path, "OMP_NUM_THREADS": "1"},
        )
        self.folder = tempfile.TemporaryDirectory()
        self.started = 0
        atexit.register(self.close)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def start(
        self,
        arguments: Sequence[str | Path],
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> ForkedProcess:
        """Start a program.

        Args:
            arguments: what follows `python` on a command line: `-m MODULE`, `-c CODE` or a file,
                and the arguments of the program.
            folder: its working directory.
            environment: all of its environment variables; those of this process if not given.
        """
        self.started += 1
        output = Path(self.folder.name, f"{self.started}.out")
        errors = Path(self.folder.name, f"{self.started}.err")
        answer = self.ask(
            arguments=[str(argument) for argument in arguments],
            folder=str(folder or Path.cwd()),
            environment=dict(os.environ if environment is None else environment),
            output=str(output),
            errors=str(errors),
        )
        return ForkedProcess(self, answer["pid"], output, errors)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()


@functools.cache
def fork_server() -> ForkServer:
    """Return the server of this process, which is started when it is first asked for."""
    return ForkServer()


# -- in the server ---------------------------------------------------------------------------------
def serve() -> None:
    """Answer the requests on stdin until it is closed; then kill what runs still."""
    import torch.distributed.fsdp  # noqa: F401
    from jacdiag_cli.main import main  # noqa: F401

    import jacdiag
    import jacdiag.measure.network

    for name in ("audit", "sites", "watch"):
        getattr(jacdiag, name)  # imports what it needs

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the programs
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            code = wait_for(request["wait"], request["timeout"])
            if code is not None:
                running.discard(request["wait"])
            answer = {"code": code}
        else:
            pid = os.fork()
            if pid == 0:
                be_the_program(request)
            running.add(pid)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def wait_for(pid: int, timeout: float) -> int | None:
    limit = time.monotonic() + timeout
    while time.monotonic() < limit:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def be_the_program(request: dict[str, Any]) -> None:
    """Become the program of a request. Never returns."""
    # 1. The environment of a new process.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    for number, path in ((1, request["output"]), (2, request["errors"])):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)

    # 2. Run it, and end as an interpreter would.
    code = run_program(request["arguments"], request["folder"])
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)


def run_program(arguments: list[str], folder: str) -> int:
    """Run what follows `python` on a command line; return the exit code."""
    first, *rest = arguments
    try:
        if first == "-m":
            sys.argv = rest
            sys.path.insert(0, folder)
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            sys.argv = ["-c", *rest[1:]]
            sys.path.insert(0, folder)
            exec(rest[0], {"__name__": "__main__"})
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(first).parent))
            runpy.run_path(first, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return -signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    return 0


if __name__ == "__main__":
    serve()
