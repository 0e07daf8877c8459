"""The lines of the user's code that drew the weights, noted while a factory builds the model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import jacdiag

_OWN = Path(jacdiag.__file__).parent
# Folders of installed packages.
_INSTALLED = frozenset({"site-packages", "dist-packages"})
# These end in "_" and write no value.
_NO_WRITES = frozenset({"requires_grad_", "detach_", "share_memory_", "rename_"})
# These make a tensor of the same values, in another place or precision.
_COPIES = frozenset(
    {"to", "clone", "contiguous", "__deepcopy__", "type", "cpu", "cuda"}
    | {"bfloat16", "half", "float", "double"}
)
_Storage = tuple[str, int]


@dataclass(frozen=True)
class CodeLine:
    """A line of the user's code: the file, with all links resolved, and the number."""

    file: str
    line: int


def is_users_own(file: str | Path, base: Path) -> bool:
    """Return whether a file lies below a folder, and not in an installed package.

    Args:
        file: with all links resolved.
        base: the folder. A virtual environment may lie in it.
    """
    path = Path(file)
    return path.is_relative_to(base) and _INSTALLED.isdisjoint(path.parts)


class InitLines(TorchFunctionMode):
    """Note which line of the user's code wrote each tensor last.

    Of the calls that lead to a write, the innermost one in the user's own code counts. For a weight
    that `nn.Linear` draws, that is the line that makes the layer. A copy has the line of its
    original.

    Attributes:
        base: the folder that lines must be in.

    Example:
        >>> with InitLines(Path.cwd()) as lines:                          # doctest: +SKIP
        ...     model = build()
        >>> lines.of(model)["h.0.mlp.weight"]                             # doctest: +SKIP
        CodeLine(file='/home/me/model.py', line=25)
    """

    def __init__(self, base: Path) -> None:
        super().__init__()
        self.base = Path(os.path.realpath(base))
        self._line_of: dict[_Storage, CodeLine | None] = {}
        self._is_users: dict[str, bool] = {}
        self._outermost: FrameType | None = None

    def __enter__(self) -> Self:
        # What calls the factory is no part of it.
        self._outermost = sys._getframe(1)
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._outermost = None
        super().__exit__(kind, error, traceback)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a call of torch, and note the line if it wrote a tensor or made one."""
        arguments = dict(kwargs or {})
        result = func(*args, **arguments)
        tensors = [value for value in (*args, *arguments.values()) if isinstance(value, Tensor)]

        # 1. A write into a tensor that exists.
        name = getattr(func, "__name__", "")
        if tensors and _is_write(name):
            self._note(tensors[0])
        # 2. A copy of another tensor.
        elif tensors and name in _COPIES and isinstance(result, Tensor):
            self._inherit(result, tensors[0])
        # 3. A new tensor. A view of another one is not new.
        elif isinstance(result, Tensor):
            key = _storage_of(result)
            is_new = key not in [_storage_of(value) for value in tensors]
            if is_new:
                self._note(result)
        return result

    def of(self, model: nn.Module) -> dict[str, CodeLine]:
        """Return the line that wrote each parameter last, by name; those not known are left out.

        Args:
            model: that was built in this context.
        """
        lines = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            key = _storage_of(parameter)
            line = None if key is None else self._line_of.get(key)
            if line is not None:
                lines[name] = line
        return lines

    def _note(self, tensor: Tensor) -> None:
        """Note the line that leads to a write. A later write by other code takes it away."""
        key = _storage_of(tensor)
        if key is not None:
            self._line_of[key] = self._users_line()

    def _inherit(self, result: Tensor, original: Tensor) -> None:
        """Note for a copy the line that wrote the original."""
        key, key_of_original = _storage_of(result), _storage_of(original)
        if key is not None and key_of_original is not None:
            self._line_of[key] = self._line_of.get(key_of_original)

    def _users_line(self) -> CodeLine | None:
        """Return the innermost line of the user's code that is running; None if there is none."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame is not self._outermost:
            file = frame.f_code.co_filename
            if self._is_file_of_user(file):
                return CodeLine(os.path.realpath(file), frame.f_lineno)
            frame = frame.f_back
        return None

    def _is_file_of_user(self, file: str) -> bool:
        """Return whether a file is the user's own. jacdiag's files are not."""
        if file not in self._is_users:
            real = os.path.realpath(file)
            is_ours = Path(real).is_relative_to(_OWN)
            self._is_users[file] = not is_ours and is_users_own(real, self.base)
        return self._is_users[file]


def _is_write(name: str) -> bool:
    """Return whether a function of torch writes into its first tensor, by its name."""
    if name == "__setitem__":
        return True
    is_in_place = name.endswith("_") and not name.startswith("_")
    return is_in_place and name not in _NO_WRITES


def _storage_of(tensor: Tensor) -> _Storage | None:
    """Return device and address of the memory of a tensor; None if it has none."""
    if tensor.is_meta or tensor.layout is not torch.strided:
        return None
    try:
        address = tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return None  # a subclass of tensors without memory of its own
    if not address:
        return None
    return str(tensor.device), address
