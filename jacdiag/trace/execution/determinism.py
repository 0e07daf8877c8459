"""Whether two runs of a model are the same, and the first call that differs if they are not."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from jacdiag.devices.accelerators import in_float64
from jacdiag.trace.execution.module_call import Call
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
