"""Whether the copy of a model computes what the model computes, with its hooks and all.

That may not be so if hooks or a replaced forward change what the model's own code does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from jacdiag.devices.accelerators import in_float64
from jacdiag.sources.module_wrappers import plain_name
from jacdiag.trace.execution.determinism import close_output
from jacdiag.trace.execution.module_call import Call
from jacdiag.trace.execution.precision import map_leaves
from jacdiag.trace.execution.tensors import tensors_in

_TOLERANCE = {torch.bfloat16: 6e-2, torch.float16: 1e-2, torch.float32: 1e-3, torch.float64: 1e-3}
Outputs = dict[tuple[str, int], float]


class OriginalRun:
    """The model's own output, from one run in eval mode; its modes and buffers are as before.

    Args:
        model: the model, not its copy.
        root: its arguments, in the precision of the record.
    """

    def __init__(self, model: nn.Module, root: Call) -> None:
        self.model, self.root = model, root
        self.output = self.run()

    def run(self) -> Any:
        """Run the model itself, hooks and all."""
        args, kwargs = _as_given(self.root.arguments(), self.model)
        with torch.compiler.set_stance("force_eager"), _in_eval(self.model), torch.no_grad():
            buffers = {name: b.clone() for name, b in self.model.named_buffers()}
            return torch.func.functional_call(self.model, buffers, args, kwargs, strict=False)

    def agrees(self, output: Any) -> bool:
        """Return whether the copy's output is the model's, as far as its precision goes.

        Args:
            output: what the copy returned.
        """
        # The lowest precision of the weights sets the tolerance.
        dtypes = {parameter.dtype for parameter in self.model.parameters()}
        tolerances = [_TOLERANCE.get(dtype, 0.0) for dtype in dtypes]
        return close_output(output, self.output, max(tolerances, default=1e-3))

    def first_stray(self, copy: nn.Module, run_copy: Callable[[], Any]) -> str:
        """Return the first module whose output differs between the copy and the model.

        Args:
            copy: the model's copy.
            run_copy: runs it.
        """
        of_copy = _outputs(copy, run_copy)
        of_model = _outputs(self.model, self.run)
        for (name, call), size in of_copy.items():
            # 1. The model does not make this call.
            other = of_model.get((name, call))
            if other is None:
                return name

            # 2. It makes the call, with another output.
            scale = max(abs(size), abs(other), 1e-6)
            if abs(size - other) > 1e-2 * scale:
                return name
        return ""


def _as_given(arguments: Any, model: nn.Module) -> Any:
    """Return floating inputs in the precision of the model's own weights."""
    dtypes = [parameter.dtype for parameter in model.parameters()]
    low = next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)

    # Tokens and masks keep their dtype.
    def lowered(leaf: Any) -> Any:
        is_float_tensor = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(low) if is_float_tensor else leaf

    return map_leaves(lowered, arguments)


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, and back in its own afterwards."""
    # By the flag of each, since a model may override `eval()`.
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _outputs(model: nn.Module, run: Callable[[], Any]) -> Outputs:
    """Return a number for every module call's output, in the order in which the calls ended.

    Args:
        model: its modules are listed.
        run: runs it.
    """
    names = {id(m): plain_name(name) for name, m in model.named_modules()}
    counts: Counter[str] = Counter()
    sizes: Outputs = {}

    def note(module: nn.Module, _: Any, output: Any) -> None:
        # The hook is called for the modules of every model.
        name = names.get(id(module))
        if name is None:
            return

        # The norms of its floating tensors stand for the output.
        with torch._C.DisableTorchFunction():
            size = sum(_norm_if_float(tensor) for tensor in tensors_in(output))
        sizes[name, counts[name]] = size
        counts[name] += 1

    handle = register_module_forward_hook(note)
    try:
        run()
    finally:
        handle.remove()
    return sizes


def _norm_if_float(tensor: Tensor) -> float:
    """Return the norm of a floating tensor, with NaN as 0; 0 for any other tensor."""
    if not tensor.is_floating_point():
        return 0.0

    # In float64, so that it does not overflow.
    return float(torch.nan_to_num(in_float64(tensor.detach())).norm())
