"""A pickle reader that runs nothing: tensors and plain containers are built, no other objects.

`torch.load(weights_only=True)` refuses a checkpoint for one argparse.Namespace in it. Here a
foreign *class* turns into a stub that only keeps its arguments and its state. A call to a foreign
*function*, or anything from a module that reaches the system, ends the reading with an error that
names it.
"""

from __future__ import annotations

import builtins
import collections
import copyreg
import pickle
from _compat_pickle import (
    IMPORT_MAPPING as _IMPORT_MAPPING,  # protocols up to 2 write Python 2's names
)
from _compat_pickle import NAME_MAPPING as _NAME_MAPPING
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from jacdiag.errors import SourceError, printable

# Roots of modules that no checkpoint needs and every attack does.
_SYSTEM = frozenset(
    {
        "os",
        "posix",
        "nt",
        "subprocess",
        "sys",
        "shutil",
        "socket",
        "runpy",
        "pty",
        "importlib",
        "pickle",
        "_pickle",
        "ctypes",
        "webbrowser",
        "code",
        "codeop",
        "commands",
        "imp",
        "pip",
        "timeit",
        "cProfile",
        "profile",
        "pdb",
        "bdb",
        "asyncio",
        "multiprocessing",
        "threading",
        "_thread",
        "signal",
        "tempfile",
        "http",
        "urllib",
        "requests",
        "ftplib",
        "smtplib",
        "telnetlib",
        "marshal",
        "types",
        "operator",
        "shelve",
        "dbm",
        "zipimport",
        "pkgutil",
    }
)
_HARMLESS_BUILTINS = frozenset(
    "list dict tuple set frozenset int float complex bool str slice object".split()
)
_LONGEST = 1 << 20  # of what a number alone asks for: bytes(n), range(n)
_LOWERCASE_CLASSES = frozenset(
    [("datetime", n) for n in ("datetime", "date", "time", "timedelta", "timezone")]
    + [
        ("functools", "partial"),
        ("builtins", "getattr"),
        ("argparse", "Namespace"),
        ("uuid", "UUID"),
    ]
)


class Unsafe(Exception):
    """The pickle asks for something that would run code. `wanted` is its name, as "os.system"."""

    def __init__(self, wanted: str) -> None:
        super().__init__(wanted)
        self.wanted = wanted


class _Inert(type):
    """A metaclass of stubs that distinguishes a call (REDUCE) from construction (NEWOBJ)."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        module, name = cls.origin  # type: ignore[attr-defined]
        classlike = name.rpartition(".")[2].lstrip("_")[:1].isupper()
        if not classlike and (module, name) not in _LOWERCASE_CLASSES:
            raise Unsafe(f"{module}.{name}")
        return cls.__new__(cls, *args, **kwargs)  # type: ignore[arg-type]


class Stub(metaclass=_Inert):
    """A stand-in for an object of a class that was not imported.

    It holds what the pickle gave it, and does nothing.

    Attributes:
        origin: (module, name) of the class.
        given: arguments of its construction.
        state: its attributes, as a dict where the pickle held one.
        entries: what was appended or set by key.
    """

    origin: tuple[str, str] = ("", "")

    given: tuple[Any, ...]
    state: Any
    entries: dict[Any, Any]

    def __new__(cls, *args: Any, **_kwargs: Any) -> Stub:
        """Return a stub that keeps what the pickle passes, and runs nothing."""
        self = object.__new__(cls)
        self.given, self.state, self.entries = args, {}, {}
        return self

    def __setstate__(self, state: Any) -> None:
        # An object with slots has two states: its attributes, and those in the slots.
        if isinstance(state, tuple) and len(state) == 2:
            attributes, slots = state
            if isinstance(slots, dict) and isinstance(attributes, dict | None):
                state = {**(attributes or {}), **slots}
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, value: Any) -> None:
        """Keep what the pickle appends.

        Args:
            value: of any kind.
        """
        self.entries[len(self.entries)] = value

    def extend(self, values: Any) -> None:
        """Keep what the pickle appends.

        Args:
            values: of any kind.
        """
        for value in values:
            self.append(value)

    add = append

    def __call__(self, *args: Any, **_kwargs: Any) -> Stub:
        """Return one more stub: a nested class, an attribute of a stub, is called like a class."""
        return type(self).__new__(type(self), *args)

    def __hash__(self) -> int:
        return id(self)


def _load_bytearray(unpickler: Any) -> None:
    """Read a bytearray.

    Python's own reader fills one of the claimed length before it looks for the bytes.
    """
    length = int.from_bytes(unpickler.read(8), "little")
    data = unpickler.read(length)
    if len(data) < length:
        raise EOFError("a bytearray that is longer than the file")
    unpickler.append(bytearray(data))


class GuardedPickle:
    """The `pickle_module` for `torch.load`; `unread` collects the classes that became stubs."""

    def __init__(self) -> None:
        self.unread: list[str] = []
        guard = self

        # Python's own, not the C one: there an index of the memo takes as much memory as it says.
        class Unpickler(pickle._Unpickler):
            dispatch = pickle._Unpickler.dispatch | {pickle.BYTEARRAY8[0]: _load_bytearray}

            def find_class(self, module: str, name: str) -> Any:
                """Return what the guard allows for a name."""
                return guard.find(module, name)

        self.module = SimpleNamespace(
            __name__="jacdiag_guard",
            Unpickler=Unpickler,
            load=lambda f, **kw: Unpickler(f, **kw).load(),
            UnpicklingError=pickle.UnpicklingError,
        )

    def find(self, module: str, name: str) -> Any:
        """Return the real object if it is harmless, else a stub class."""
        module, name = _NAME_MAPPING.get(
            (module, name), (_IMPORT_MAPPING.get(module, module), name)
        )
        known = _harmless(module, name)
        if known is not None:
            return known
        root = module.partition(".")[0]
        shown = ("os" if root in ("posix", "nt") else module) + "." + name
        if root in _SYSTEM or (root == "builtins" and name != "getattr"):
            raise Unsafe(shown)
        if shown not in self.unread and shown != "builtins.getattr":
            self.unread.append(printable(shown))
        return _Inert(name, (Stub,), {"origin": (module, name), "__module__": f"stub.{module}"})


def _harmless(module: str, name: str) -> Any:
    """Return a builder of tensors, numbers or plain containers; None for anything else.

    Nothing that reads, writes, imports or evaluates is returned.
    """
    root = module.partition(".")[0]
    if root == "torch":
        return _harmless_of_torch(module, name)
    if root == "numpy":
        return _harmless_of_numpy(module, name)
    return _harmless_of_python(module, name)


def _harmless_of_torch(module: str, name: str) -> Any:
    """Return a dtype, a storage or a builder of tensors; None for anything else."""
    if module == "torch":
        value = getattr(torch, name, None)
        is_storage = name.endswith("Storage")
        is_plain = name in ("Size", "device", "Tensor") or isinstance(value, torch.dtype)
        return value if is_storage or is_plain else None
    if module == "torch._utils" and name.startswith("_rebuild_"):
        return getattr(torch._utils, name, None)
    if (module, name) in _TORCH:
        return _TORCH[module, name]()
    return None


def _harmless_of_python(module: str, name: str) -> Any:
    """Return a plain type or container of Python; None for anything else."""
    if module == "collections" and name in ("OrderedDict", "defaultdict", "Counter", "deque"):
        return getattr(collections, name)
    if module == "builtins" and name in _BOUNDED:
        return _BOUNDED[name]
    if module == "builtins" and name in _HARMLESS_BUILTINS:
        return getattr(builtins, name)
    if (module, name) == ("_codecs", "encode"):
        return _encode
    if (module, name) == ("copyreg", "_reconstructor"):
        return copyreg._reconstructor  # type: ignore[attr-defined]
    return None


_TORCH: dict[tuple[str, str], Callable[[], Any]] = {
    ("torch.nn.parameter", "Parameter"): lambda: torch.nn.Parameter,
    ("torch.nn.parameter", "Buffer"): lambda: torch.nn.Buffer,
    ("torch.storage", "UntypedStorage"): lambda: torch.storage.UntypedStorage,
    ("torch.storage", "TypedStorage"): lambda: torch.storage.TypedStorage,
    ("torch.serialization", "_get_layout"): lambda: torch.serialization._get_layout,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda: _plain_tensor,
}


def _bounded_bytes(kind: Callable[..., Any]) -> Callable[..., Any]:
    def make(*args: Any) -> Any:
        if args and isinstance(args[0], int) and args[0] > _LONGEST:
            raise pickle.UnpicklingError(f"{args[0]:,} bytes out of nothing")
        return kind(*args)

    return make


def _bounded_range(*args: Any) -> range:
    numbers = range(*args)
    if max(abs(numbers.start), abs(numbers.stop)) > 2**62 or len(numbers) > _LONGEST:
        raise pickle.UnpicklingError("a range of so many numbers")
    return numbers


_BOUNDED: dict[str, Callable[..., Any]] = {
    "bytes": _bounded_bytes(bytes),
    "bytearray": _bounded_bytes(bytearray),
    "range": _bounded_range,
}


def _plain_tensor(func: Any, _kind: Any, args: Any, _state: Any) -> Any:
    """Return a tensor subclass as the plain tensor in it: its own __setstate__ is foreign code."""
    return func(*args)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1" if encoding == "latin1" else "utf-8")


def _harmless_of_numpy(module: str, name: str) -> Any:
    """Return an array type, a dtype or a builder of arrays; None for anything else."""
    import numpy as np

    last = module.rpartition(".")[2]
    if last == "dtypes" or (last, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
        return getattr(np.dtypes if last == "dtypes" else np, name, None)
    if (last, name) in (
        ("multiarray", "_reconstruct"),
        ("multiarray", "scalar"),
        ("numeric", "_frombuffer"),
    ):
        from numpy._core import multiarray, numeric

        return getattr(multiarray if last == "multiarray" else numeric, name, None)
    return None


def refusal(path: Any, unsafe: Unsafe) -> SourceError:
    """Return the message for a pickle that wants to run code."""
    return SourceError(
        f"cannot read '{path}': its pickle asks for `{printable(unsafe.wanted)}`, which is not a "
        "tensor or a plain "
        "container. Nothing was run.",
        hint=(
            "if you made this file and trust it, add --trust-pickle; better, save it again as "
            ".safetensors"
        ),
    )
