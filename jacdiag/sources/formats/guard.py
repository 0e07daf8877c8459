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
        # A call of a function is refused. Classes are written with a capital letter.
        looks_like_class = name.rpartition(".")[2].lstrip("_")[:1].isupper()
        if not looks_like_class and (module, name) not in _LOWERCASE_CLASSES:
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
        self.state = state
        # An object with slots has two states: its attributes, and those in the slots.
        if not isinstance(state, tuple) or len(state) != 2:
            return
        attributes, slots = state
        if isinstance(slots, dict) and isinstance(attributes, dict | None):
            self.state = {**(attributes or {}), **slots}

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
        """Return the real object if it is harmless, else a stub class.

        Args:
            module: as the pickle names it.
            name: in the module.

        Raises:
            Unsafe: the name is one of the system.
        """
        # 1. Protocols up to 2 write the names of Python 2.
        if (module, name) in _NAME_MAPPING:
            module, name = _NAME_MAPPING[module, name]
        else:
            module = _IMPORT_MAPPING.get(module, module)

        # 2. What builds tensors, numbers and plain containers.
        known = _harmless(module, name)
        if known is not None:
            return known

        # 3. What reaches the system. `posix` and `nt` are what `os` is called inside of pickles.
        root = module.partition(".")[0]
        shown = f"os.{name}" if root in ("posix", "nt") else f"{module}.{name}"
        if root in _SYSTEM:
            raise Unsafe(shown)
        if root == "builtins" and name != "getattr":
            raise Unsafe(shown)

        # 4. Any other class is left unread.
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
        return _harmless_at_top_of_torch(name)
    # Functions that put a tensor together from its storage.
    if module == "torch._utils" and name.startswith("_rebuild_"):
        return getattr(torch._utils, name, None)
    look_up = _TORCH.get((module, name))
    if look_up is None:
        return None
    return look_up()


def _harmless_at_top_of_torch(name: str) -> Any:
    """Return a dtype, a storage or a plain type that torch itself has; None for anything else."""
    value = getattr(torch, name, None)
    if isinstance(value, torch.dtype) or name.endswith("Storage"):
        return value
    if name in ("Size", "device", "Tensor"):
        return value
    return None


def _harmless_of_python(module: str, name: str) -> Any:
    """Return a plain type or container of Python; None for anything else."""
    if module == "builtins":
        # Those that take their length from a number are bounded.
        return _BOUNDED.get(name) or _PLAIN_TYPES.get(name)
    return _HELPERS.get((module, name))


_TORCH: dict[tuple[str, str], Callable[[], Any]] = {
    ("torch.nn.parameter", "Parameter"): lambda: torch.nn.Parameter,
    ("torch.nn.parameter", "Buffer"): lambda: torch.nn.Buffer,
    ("torch.storage", "UntypedStorage"): lambda: torch.storage.UntypedStorage,
    ("torch.storage", "TypedStorage"): lambda: torch.storage.TypedStorage,
    ("torch.serialization", "_get_layout"): lambda: torch.serialization._get_layout,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda: _plain_tensor,
}


def _bounded_bytes(kind: Callable[..., Any]) -> Callable[..., Any]:
    """Return a constructor of bytes that makes no long ones out of a number."""

    def make(*args: Any) -> Any:
        length = args[0] if args else 0
        if isinstance(length, int) and length > _LONGEST:
            raise pickle.UnpicklingError(f"{length:,} bytes out of nothing")
        return kind(*args)

    return make


def _bounded_range(*args: Any) -> range:
    """Return a range, if it is not so long that a loop over it would not end."""
    numbers = range(*args)
    # len() of a range fails for larger numbers
    largest = max(abs(numbers.start), abs(numbers.stop))
    if largest > 2**62 or len(numbers) > _LONGEST:
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
    """Return text as bytes. `codecs.encode` itself would run any codec by name."""
    if encoding == "latin1":
        return text.encode("latin1")
    # Python itself writes no other encoding
    return text.encode("utf-8")


# Types that hold only what a pickle gives them.
_PLAIN_TYPES = {name: getattr(builtins, name) for name in _HARMLESS_BUILTINS}
_HELPERS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("collections", "Counter"): collections.Counter,
    ("collections", "deque"): collections.deque,
    ("_codecs", "encode"): _encode,
    ("copyreg", "_reconstructor"): copyreg._reconstructor,  # type: ignore[attr-defined]
}


def _harmless_of_numpy(module: str, name: str) -> Any:
    """Return an array type, a dtype or a builder of arrays; None for anything else."""
    import numpy as np

    # 1. Types. Versions of numpy differ in the packages above the module.
    last = module.rpartition(".")[2]
    if last == "dtypes":
        return getattr(np.dtypes, name, None)
    if (last, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
        return getattr(np, name)

    # 2. Functions that put an array together.
    if (last, name) in (("multiarray", "_reconstruct"), ("multiarray", "scalar")):
        from numpy._core import multiarray

        return getattr(multiarray, name, None)
    if (last, name) == ("numeric", "_frombuffer"):
        from numpy._core import numeric

        return getattr(numeric, name, None)
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
