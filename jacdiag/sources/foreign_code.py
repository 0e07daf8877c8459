"""Code that is neither jacdiag's nor torch's: its errors, and the random numbers that it draws."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from jacdiag.devices.accelerators import borrowed_generators, present_kinds
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
        # an error of jacdiag itself is no fault of the model
        if not is_foreign(error):
            raise

        # Its own backward runs for the first time here.
        what = "the model's code raised when it was run again"
        hint = None
        if _is_in_backward(error):
            what = "a backward of the model's own raised"
            hint = "every branch is differentiated: a plain PyTorch version of it can be measured"
        raise TraceError(what, got=own_frames(error), hint=hint) from error


def _is_in_backward(error: BaseException) -> bool:
    """Return whether an error was raised in the backward of a custom autograd.Function."""
    torch_folder = str(Path(torch.__file__ or "").parent)
    frames = _frames_outside((torch_folder, str(_PACKAGE), _FROZEN), error)
    functions = {frame.name for frame in frames}
    return not functions.isdisjoint(("backward", "vjp"))


def is_foreign(error: BaseException) -> bool:
    """Return whether an error was raised by code that is neither jacdiag's nor torch's."""
    # 1. The frames without those of torch: it calls the model, and the model calls it.
    torch_folder = str(Path(torch.__file__ or "").parent)
    frames = _frames_outside((torch_folder, _FROZEN), error)

    # 2. The last one says whose code it was.
    if not frames:
        return False

    return not frames[-1].filename.startswith(str(_PACKAGE))


def own_frames(error: BaseException, limit: int = 3) -> str:
    """Return an exception of foreign code as text: the error, then its own last frames.

    Args:
        error: that was raised.
        limit: how many frames to show, innermost first; those of torch are left out.
    """
    # 1. The error. Of a syntax error, the frames end where the file was to be compiled.
    lines = traceback.format_exception_only(error)[-1].strip().splitlines()[:_LINES]
    if isinstance(error, SyntaxError) and error.filename:
        code = (error.text or "").strip()
        lines.append(f"at {Path(error.filename).name}:{error.lineno}: {code}")

    # 2. Its frames.
    libraries = [str(Path(module.__file__ or "").parent) for module in (torch, importlib)]
    frames = _frames_outside((str(_PACKAGE), *libraries, _FROZEN), error)
    for frame in reversed(frames[-limit:]):
        lines.append(f"at {Path(frame.filename).name}:{frame.lineno} in {frame.name}: {frame.line}")
    return "\n".join(lines)


def _frames_outside(folders: tuple[str, ...], error: BaseException) -> list[traceback.FrameSummary]:
    """Return the frames of an error whose files are in none of several folders.

    Args:
        folders: how the names of files begin that are left out.
        error: that was raised.
    """
    frames = traceback.extract_tb(error.__traceback__)
    return [frame for frame in frames if not frame.filename.startswith(folders)]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generators inside, and restore their states afterwards.

    Code may put its tensors on any accelerator that is there, and draw them there.
    """
    with borrowed_generators(present_kinds()):
        torch.manual_seed(seed)
        yield
