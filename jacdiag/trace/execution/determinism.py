"""Whether two runs of a model are the same, and the first call that differs if they are not."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from jacdiag.devices.accelerators import in_float64
from jacdiag.trace.execution.module_call import Call
from jacdiag.trace.execution.rng_state import RandomState, another_draw, borrowed
from jacdiag.trace.execution.skeleton import Skeleton
from jacdiag.trace.execution.tensors import collect, tensors_in
from jacdiag.trace.graph.graph import Node
from jacdiag.trace.graph.ops import RANDOM_DRAWS
from jacdiag.trace.graph.recorder import Recorder, observe, user_line


def same_output(a: Any, b: Any) -> bool:
    """Return whether two outputs of a model are equal bit for bit; NaN equals NaN.

    On the meta device, where there are no values, shapes are compared.

    Args:
        a: one output, a tensor or a container of tensors.
        b: the other.
    """
    first = tensors_in(a)
    second = tensors_in(b)
    if len(first) != len(second):
        return False
    return all(map(same_tensor, first, second))


def same_tensor(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors are equal; NaN equals NaN, and meta tensors have only a shape."""
    if x.shape != y.shape:
        return False

    # There are no values to compare.
    if x.is_meta:
        return True

    # Bit for bit, but for NaN.
    return bool(torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)))


def close_output(a: Any, b: Any, tolerance: float) -> bool:
    """Return whether two outputs of a model are equal to a relative tolerance; NaN counts as 0.

    Args:
        a: one output, a tensor or a container of tensors.
        b: the other.
        tolerance: of the norm of each tensor of `b`.
    """
    first = tensors_in(a)
    second = tensors_in(b)
    if len(first) != len(second):
        return False
    return all(_close_tensor(x, y, tolerance) for x, y in zip(first, second, strict=True))


def _close_tensor(x: Tensor, y: Tensor, tolerance: float) -> bool:
    """Return whether two tensors are equal to a relative tolerance."""
    if x.shape != y.shape:
        return False

    # In float64, so that the norms do not overflow.
    x = torch.nan_to_num(in_float64(x.detach()))
    y = torch.nan_to_num(in_float64(y.detach()))
    return bool((x - y).norm() <= tolerance * y.norm() + 1e-12)


class Fingerprints(Recorder):
    """A recorder that also keeps a checksum of every result, and the line that made the call."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.prints: list[tuple[str, tuple[float, ...]]] = []
        self.lines: list[str] = []

    def _note(
        self, func: Any, args: Any, kwargs: Any, result: Any, mutated: list[Tensor], key: Any
    ) -> Any:
        """Add a call to the record, with a checksum of what it made and wrote to."""
        count = len(self.nodes)
        out = super()._note(func, args, kwargs, result, mutated, key)
        is_recorded = len(self.nodes) > count
        if is_recorded:
            with torch._C.DisableTorchFunction():
                results: list[Tensor] = []
                collect((result, mutated), results)
                self.prints.append((key[0], tuple(_checksum(tensor) for tensor in results)))
                self.lines.append(user_line(3))
        return out


def _checksum(t: Tensor) -> float:
    """Return a sum of a tensor's numbers, each with a weight that depends on its place."""
    # 1. Without real numbers there is nothing to sum.
    has_real_numbers = not t.is_meta and not t.is_complex()
    if not has_real_numbers or t.numel() == 0:
        return 0.0

    # 2. The sum.
    flat = torch.nan_to_num(in_float64(t.detach())).flatten()
    weights = torch.arange(1, flat.numel() + 1, dtype=flat.dtype, device=flat.device).sqrt()
    return float((flat * weights).sum())


def culprit(skeleton: Skeleton, root: Call, dtype: torch.dtype) -> str:
    """Run the model twice more; return the first call whose results differ, "" if none does."""
    a, b = (observe(Fingerprints, skeleton, *root.arguments(), dtype)[0] for _ in range(2))
    return first_difference(a, b)


def repeats_with_deterministic_kernels(
    skeleton: Skeleton, root: Call, dtype: torch.dtype, start: RandomState | None
) -> bool:
    """Return whether runs are the same bit for bit where torch has deterministic kernels.

    Some kernels add in another order in every run: on CUDA that of `index_add_`, for example.

    Args:
        skeleton: the model's code.
        root: the arguments of the model.
        dtype: precision of the runs.
        start: of the random numbers that the model draws; None if it draws none. Another run then
            draws other numbers.
    """
    # 1. What the runs draw.
    draws = ["as recorded", "as recorded"]
    if start is not None:
        draws.append("anew")

    # 2. The runs.
    outputs = []
    with _deterministic_kernels():
        for draw in draws:
            with borrowed(start):
                if draw == "anew":
                    another_draw()
                args, kwargs = root.arguments()
                _, output = observe(Recorder, skeleton, args, kwargs, dtype)
            outputs.append(output)
    return all(same_output(outputs[0], output) for output in outputs[1:])


@contextmanager
def _deterministic_kernels() -> Iterator[None]:
    """Let torch choose deterministic kernels where it has them; other kernels run as ever."""
    is_on = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(is_on, warn_only=only_warns)


def first_difference(a: Fingerprints, b: Fingerprints) -> str:
    """Return the first call whose results differ between two runs, "" if none does.

    The text names the operation, the module and the line.

    Args:
        a: one run.
        b: the other.
    """
    # 1. The first call.
    pairs = itertools.zip_longest(a.prints, b.prints)
    index = next((k for k, (x, y) in enumerate(pairs) if x != y), None)
    if index is None:
        return ""

    # 2. The run that made it, if only one did.
    run = a
    if index >= len(a.prints):
        run = b
    node: Node = run.nodes[index]

    # 3. Where it stands.
    where = run.lines[index]
    if run.invocations and run.invocations[node.invocation].module:
        where = f"in '{run.invocations[node.invocation].module}', {where}"

    # 4. What differs.
    event = "gives another result"
    if node.name in RANDOM_DRAWS:
        event = "draws random numbers"
    return f"{node.name} {event} ({where})"
