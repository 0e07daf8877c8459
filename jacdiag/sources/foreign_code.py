"""Code that is neither jacdiag's nor torch's: its errors, and the random numbers that it draws."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from jacdiag.errors import JacdiagError, TraceError

_PACKAGE = Path(__file__).parents[1]  # the folder of jacdiag itself
_FROZEN = "<frozen"  # file name of the frames of Python's own import machinery
_LINES = 8  # of an error's own text


@contextmanager
def model_code() -> Iterator[None]:
    """Turn what the model's own code raises, in a run after the first, into a TraceError.

    Raises:
        TraceError: the model's code raised; the message shows its frames.
    """
    try:
        yield
    except (JacdiagError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if not is_foreign(error):
            raise
        raise TraceError(
            "the model's code raised when it was run again", got=own_frames(error)
        ) from error


def is_foreign(error: BaseException) -> bool:
    """Return whether an error was raised by code that is neither jacdiag's nor torch's."""
    libraries = (str(Path(torch.__file__ or "").parent), _FROZEN)
    frames = traceback.extract_tb(error.__traceback__)
    files = [frame.filename for frame in frames if not frame.filename.startswith(libraries)]
    return bool(files) and not files[-1].startswith(str(_PACKAGE))


def own_frames(error: BaseException, limit: int = 3) -> str:
    """Return an exception of foreign code as text: the error, then its own last frames.

    Args:
        error: that was raised.
        limit: how many frames to show, innermost first; those of torch are left out.
    """
    lines = traceback.format_exception_only(error)[-1].strip().splitlines()[:_LINES]
    if isinstance(error, SyntaxError) and error.filename:
        # The frames end where the file was to be compiled.
        lines.append(f"at {Path(error.filename).name}:{error.lineno}: {(error.text or '').strip()}")

    libraries = [Path(module.__file__ or "").parent for module in (torch, importlib)]
    left_out = (str(_PACKAGE), *(str(folder) for folder in libraries), _FROZEN)
    frames = traceback.extract_tb(error.__traceback__)
    foreign = [frame for frame in frames if not frame.filename.startswith(left_out)]
    for frame in reversed(foreign[-limit:]):
        lines.append(f"at {Path(frame.filename).name}:{frame.lineno} in {frame.name}: {frame.line}")
    return "\n".join(lines)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generators inside, and restore their states afterwards."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
