"""What a re-run replaces or steps around: fused attention, checkpointing, custom Functions."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from jacdiag.trace.graph.graph import Graph

_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
# Frames of torch and of the tracer are not the model's code.
_OURS = (torch.__path__[0], str(Path(__file__).parents[1]))
_MODULE_CALL = nn.Module._call_impl.__code__
_lock = threading.RLock()
_depth = 0


def custom_function(depth: int = 2) -> str:
    """Return the custom autograd.Function in whose forward the caller stands, "" if in none.

    Args:
        depth: how many frames lie between this function and the call in question.
    """
    frame: Any = sys._getframe(depth)
    while frame is not None and frame.f_code is not _MODULE_CALL:
        if frame.f_code is _APPLY:
            return str(frame.f_locals["cls"].__name__)

        # Go on to the caller, up to the module's forward.
        frame = frame.f_back
    return ""


def unseen_code() -> str:
    """Return what may have made a tensor that no recorded call made.

    That is a scripted function, if the code names one.
    """
    innermost = ""
    for frame in _frames_of_model(sys._getframe(2)):
        where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        innermost = innermost or where

        # 1. A scripted function.
        name = _scripted_function(frame)
        if name is not None:
            return (
                f"{name} (torch.jit.script), before {where}; run with PYTORCH_JIT=0, or "
                "declare what it hides"
            )

    # 2. Something in another language.
    return (
        f"a call before {innermost} whose inside torch does not show (C++, Triton); declare what "
        "it hides"
    )


def _frames_of_model(frame: Any) -> Iterator[Any]:
    """Yield the frames of the model's code from a frame outwards, up to the start of the run."""
    while frame is not None and frame.f_code.co_name != "observe":
        # Frames of torch and of the tracer lie between.
        is_model_code = not frame.f_code.co_filename.startswith(_OURS)
        if is_model_code:
            yield frame
        frame = frame.f_back


def _scripted_function(frame: Any) -> str | None:
    """Return the first scripted function that the code of a frame names, if any."""
    for name in frame.f_code.co_names:
        # Names of attributes are among them, which the globals do not have.
        named = frame.f_globals.get(name)

        # The first that the code names stands for all.
        if isinstance(named, torch.jit.ScriptFunction):
            return str(name)
    return None


def modules_with_functions(graph: Graph) -> set[str]:
    """Return the names of the modules in whose run a custom autograd.Function makes a call."""
    # 1. The innermost module calls.
    innermost = {node.invocation for node in graph.nodes if node.function}

    # 2. Those around them too.
    names: set[str] = set()
    for invocation in innermost:
        names.update(graph.paths_around(invocation))
    return names


def first_reader(graph: Graph, value: int, invocation: int) -> int | None:
    """Return the first call of a module call that reads a value outside of custom Functions.

    Args:
        graph: what one forward did.
        value: index of the value.
        invocation: index of the module call.
    """
    end = graph.invocations[invocation].end
    for node in graph.values[value].consumers:
        # 1. The module call makes it. One that has not ended makes all that follow.
        is_inside = end < 0 or node < end
        if not is_inside:
            continue

        # 2. A re-run can put another tensor in the value's place.
        record = graph.nodes[node]
        if not record.function and value in record.operands:
            return node
    return None


@contextmanager
def plain_run() -> Iterator[None]:
    """Run a model by its plain code: not compiled, not checkpointed, attention by products.

    A flash kernel has no second derivative. A checkpointed module would be run again in the
    backward, when the weights of this run are gone.
    """
    with (
        sdpa_kernel(SDPBackend.MATH),
        torch.compiler.set_stance("force_eager"),
        _without_checkpoints(),
    ):
        yield


@contextmanager
def _without_checkpoints() -> Iterator[None]:
    """Run without activation checkpointing; the first to enter and the last to leave switch it."""
    global _depth
    with _lock:
        _depth += 1
        if _depth == 1:
            _put_stand_ins()
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _put_originals()


def _put_stand_ins() -> None:
    """Put the stand-ins in the place of torch's checkpointing, and keep what was there."""
    for name, stand_in in _STAND_INS.items():
        # Some versions of torch do not have all of them.
        _patched[name] = getattr(torch.utils.checkpoint, name, None)
        setattr(torch.utils.checkpoint, name, stand_in)


def _put_originals() -> None:
    """Put torch's checkpointing back."""
    for name, original in _patched.items():
        setattr(torch.utils.checkpoint, name, original)


class _NoCheckpoint:
    """Stands in for the Function of reentrant checkpointing: the code runs once, in the open."""

    @staticmethod
    def apply(run_function: Any, _preserve_rng_state: Any, *args: Any) -> Any:
        """Return what the function returns; torch's own runs it under no_grad."""
        return run_function(*args)


def _no_frame(*_: Any, **__: Any) -> Iterator[None]:
    yield


_STAND_INS: dict[str, Any] = {
    "CheckpointFunction": _NoCheckpoint,
    "_checkpoint_without_reentrant_generator": _no_frame,
}
_patched: dict[str, Any] = {}
