"""Does the copy compute what the guest computes? Asked where hooks or a replaced forward stand in
the guest's way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from jacdiag.sources.module_wrappers import plain_name
from jacdiag.trace.execution.module_call import Call
from jacdiag.trace.execution.precision import map_leaves
from jacdiag.trace.execution.tensors import collect_deep

_TOLERANCE = {torch.bfloat16: 6e-2, torch.float16: 1e-2, torch.float32: 1e-3, torch.float64: 1e-3}
Outputs = dict[tuple[str, int], float]


class Guest:
    """The guest's own output, from one run in eval mode; its modes and buffers are as before.

    Args:
        model: the guest.
        root: its arguments, in the precision of the record.
    """

    def __init__(self, model: nn.Module, root: Call) -> None:
        self.model, self.root = model, root
        self.output = self.run()

    def run(self) -> Any:
        """Runs the guest itself, hooks and all."""
        args, kwargs = _as_given(self.root.arguments(), self.model)
        with torch.compiler.set_stance("force_eager"), _in_eval(self.model), torch.no_grad():
            buffers = {name: b.clone() for name, b in self.model.named_buffers()}
            return torch.func.functional_call(self.model, buffers, args, kwargs, strict=False)

    def agrees(self, output: Any) -> bool:
        """Whether the copy's output is the guest's, as far as the guest's precision goes."""
        mine: list[Tensor] = []
        theirs: list[Tensor] = []
        collect_deep(output, mine)
        collect_deep(self.output, theirs)
        tolerance = max(
            (_TOLERANCE.get(p.dtype, 0.0) for p in self.model.parameters()), default=1e-3
        )
        return len(mine) == len(theirs) and all(
            _close(a, b, tolerance) for a, b in zip(mine, theirs, strict=True)
        )

    def first_stray(self, copy: nn.Module, run_copy: Callable[[], Any]) -> str:
        """Names the first module whose output differs between the copy and the guest."""
        here, there = _outputs(copy, run_copy), _outputs(self.model, self.run)
        for key, value in here.items():
            other = there.get(key)
            if other is None or abs(value - other) > 1e-2 * max(abs(value), abs(other), 1e-6):
                return key[0]
        return ""


def _as_given(arguments: Any, model: nn.Module) -> Any:
    """Floating inputs in the precision of the guest's own weights, as it would be given them."""
    low = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return map_leaves(
        lambda t: t.to(low) if isinstance(t, Tensor) and t.is_floating_point() else t, arguments
    )


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape:
        return False
    a, b = torch.nan_to_num(a.detach().double()), torch.nan_to_num(b.detach().double())
    return bool((a - b).norm() <= tolerance * b.norm() + 1e-12)


def _outputs(model: nn.Module, run: Callable[[], Any]) -> Outputs:
    """A number for every output of every module call, in the order in which they ended."""
    names = {id(m): plain_name(name) for name, m in model.named_modules()}
    counts: Counter[str] = Counter()
    found: Outputs = {}

    def note(module: nn.Module, _: Any, output: Any) -> None:
        name = names.get(id(module))
        if name is None:
            return
        with torch._C.DisableTorchFunction():
            tensors: list[Tensor] = []
            collect_deep(output, tensors)
            size = sum(
                float(torch.nan_to_num(t.detach().double()).norm())
                for t in tensors
                if t.is_floating_point()
            )
        found[name, counts[name]] = size
        counts[name] += 1

    handle = register_module_forward_hook(note)
    try:
        run()
    finally:
        handle.remove()
    return found
