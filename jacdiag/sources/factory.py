"""Models from code: "package.module:callable", "path/to/file.py:callable", "hf:CONFIG"."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from jacdiag.errors import JacdiagError, SourceError, TraceError
from jacdiag.sources.meta_build import empty_parameters

_PACKAGE = Path(__file__).parents[1]  # the folder of jacdiag itself


def is_factory(source: str) -> bool:
    """Whether a SOURCE names a callable: "module:name" or "file.py:name" (and no file of that whole
    name exists).
    """
    place, _, name = source.rpartition(":")
    return (
        bool(place)
        and all(part.isidentifier() for part in name.split("."))
        and not there(Path(source))
    )


def there(path: Path) -> bool:
    """Whether a file or folder exists; a name that no file can have is not there."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


Factory = str | Callable[..., Any]  # how a factory is named, or the function itself


def name_of(spec: Any) -> str:
    """Return the name of a factory for messages and reports: its text, or the name of a
    function.
    """
    if isinstance(spec, str | bytes | os.PathLike):
        return os.fsdecode(spec)
    module, name = getattr(spec, "__module__", None), getattr(spec, "__qualname__", None)
    return f"{module}.{name}" if module and name else type(spec).__name__


def resolve(spec: Factory) -> Callable[..., Any]:
    """Return the function that a factory string names; a function is returned as it is.

    Raises:
        SourceError: no such module or file, its import raised, or it has no such callable.
    """
    if isinstance(spec, bytes | os.PathLike):
        spec = os.fsdecode(spec)
    if not isinstance(spec, str):
        if callable(spec) and not isinstance(spec, nn.Module):
            return spec
        got = f"type {type(spec).__name__}"
        raise SourceError(
            "a factory is a function that builds a model, or its name", got=got, hint=_HOW_WRITTEN
        )

    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise SourceError(
            f"a factory is written {_HOW_WRITTEN}", got=repr(spec), hint=_without_name(spec)
        )
    module = _from_file(Path(place)) if place.endswith(".py") else _from_package(place)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise SourceError(f"'{place}' has no '{name}'", hint=_candidates(place, found, part))
        found = getattr(found, part)
    if not callable(found):
        got = f"type {type(found).__name__}"
        raise SourceError(
            f"'{spec}' cannot be called", got=got, hint=_candidates(place, module, name)
        )
    return found  # type: ignore[no-any-return]


def _without_name(spec: str) -> str | None:
    """Return what to try if only a file or a module was named."""
    place = spec.rstrip(":")
    if not place.endswith(".py") or not Path(place).is_file():
        return None
    return _candidates(place, _from_file(Path(place)), "")


def _candidates(place: str, found: Any, name: str) -> str | None:
    """Return the names that a factory may have: the callables that the file or module defines,
    nearest name first.
    """
    own = getattr(found, "__name__", None)
    names = []
    for candidate in vars(found) if hasattr(found, "__dict__") else ():
        value = getattr(found, candidate, None)
        if candidate.startswith("_") or not callable(value):
            continue
        if inspect.ismodule(found) and getattr(value, "__module__", own) != own:
            continue  # imported there, not defined there
        names.append(candidate)
    if not names:
        return f"'{place}' defines no function or class that could build a model"

    near = get_close_matches(name, names, n=len(names))
    ordered = [*near, *(other for other in names if other not in near)]
    shown = ", ".join(ordered[:_LISTED])
    more = f" and {len(ordered) - _LISTED} more" if len(ordered) > _LISTED else ""
    return f"{place}:NAME with one of {shown}{more}"


_HOW_WRITTEN = "'package.module:callable' or 'file.py:callable'"
_LISTED = 8  # names in a hint


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise SourceError(
            f"no such file: '{path}'", hint="a factory is written path/to/file.py:callable"
        )
    spec = importlib.util.spec_from_file_location(f"_jacdiag_factory_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look their module up there
    with _on_path(path.resolve().parent):
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            what = f"importing '{path}' failed"
            raise SourceError(
                what, got=own_frames(error), hint=_import_hint(error, path)
            ) from error
    return module


def _from_package(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise SourceError(
            f"'{name}' is no module name",
            hint="a factory is written package.module:callable or file.py:callable",
        )
    with _on_path(Path.cwd()):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
                raise SourceError(
                    f"no module named '{error.name}'",
                    hint="modules are looked for in the current folder too",
                ) from error
            raise SourceError(f"importing '{name}' failed", got=own_frames(error)) from error
        except Exception as error:
            raise SourceError(f"importing '{name}' failed", got=own_frames(error)) from error


def _import_hint(error: Exception, path: Path) -> str | None:
    """Return what helps a file that cannot be imported alone: one that is part of a package names
    its package.
    """
    if not isinstance(error, ImportError) or "relative import" not in str(error):
        return None
    whole = path.resolve()
    parts = [whole.stem]
    folder = whole.parent
    while (folder / "__init__.py").is_file() and folder.name.isidentifier():
        parts.insert(0, folder.name)
        folder = folder.parent
    if len(parts) == 1:
        # A folder without __init__.py is a package too, if it is imported by its name.
        parts.insert(0, whole.parent.name)
        folder = whole.parent.parent
    dotted = ".".join(parts)
    return (
        f"from {folder}, name it as a module: {dotted}:CALLABLE (a file alone has no package "
        "to import from)"
    )


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """Code beside a factory's file can be imported by it, as if it were run from there."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def is_foreign(error: BaseException) -> bool:
    """Whether an error was raised by code that is neither jacdiag's nor torch's: by the model's
    own.
    """
    ours = str(_PACKAGE)
    not_its_own = (str(Path(torch.__file__ or "").parent), "<frozen")
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith(not_its_own)
    ]
    return bool(frames) and not frames[-1].filename.startswith(ours)


@contextmanager
def model_code() -> Iterator[None]:
    """Turn what the model's own code raises, in a run after the first, into a TraceError with its
    frames.
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


def own_frames(error: BaseException, limit: int = 3) -> str:
    """An exception of foreign code as text: the error, then its own last frames, innermost first,
    torch's left out.
    """
    lines = traceback.format_exception_only(error)[-1].strip().splitlines()[:8]
    # its frames end where the file was to be compiled
    if isinstance(error, SyntaxError) and error.filename:
        lines.append(f"at {Path(error.filename).name}:{error.lineno}: {(error.text or '').strip()}")
    libraries = [Path(module.__file__ or "").parent for module in (torch, importlib)]
    not_its_own = tuple(str(folder) for folder in [_PACKAGE, *libraries])
    foreign = traceback.extract_tb(error.__traceback__)
    frames = [f for f in foreign if not f.filename.startswith((*not_its_own, "<frozen"))]
    at = [
        f"at {Path(f.filename).name}:{f.lineno} in {f.name}: {f.line}"
        for f in reversed(frames[-limit:])
    ]
    return "\n".join([*lines, *at])


def build(
    spec: Factory, model_args: dict[str, Any] | None = None, seed: int = 0, *, init: bool = True
) -> nn.Module:
    """Calls a factory with seeded random numbers; a model on the meta device is given memory and,
    if `init`, weights.

    Raises:
        SourceError: the call raises, or returns no nn.Module.
    """
    if isinstance(spec, str) and spec.startswith("hf:"):
        return _of_config(spec, model_args, seed)
    function, spec = resolve(spec), name_of(spec)
    made = call(function, spec, model_args or {}, seed)
    if not isinstance(made, nn.Module):
        raise not_a_module(spec, made)
    if any(t.is_meta for t in [*made.parameters(), *made.buffers()]):
        with seeded(seed):
            materialise(made, spec, init=init)
    return made


def not_a_module(spec: str, made: Any) -> SourceError:
    """Return the error for a factory that returned something else, with what to change in it."""
    got = f"type {type(made).__name__}"
    hint = "the function must return the model, a torch.nn.Module"
    if made is None:
        hint = "it ends without `return`, or returns None: end it with `return model`"
    elif isinstance(made, type) and issubclass(made, nn.Module):
        got, hint = (
            f"the class {made.__name__}",
            f"return an instance: `return {made.__name__}(...)`",
        )
    elif isinstance(made, tuple | list):
        got = (
            f"a {type(made).__name__} of "
            f"{', '.join(type(item).__name__ for item in made) or 'nothing'}"
        )
        places = [k for k, item in enumerate(made) if isinstance(item, nn.Module)]
        if places:
            hint = (
                "return the model alone, such as `lambda: "
                f"{spec.rpartition(':')[2]}()[{places[0]}]`"
            )
    elif isinstance(made, dict):
        got = f"a dict with {', '.join(repr(key) for key in list(made)[:4]) or 'nothing'}"
        keys = [key for key, item in made.items() if isinstance(item, nn.Module)]
        if keys:
            hint = (
                "return the model alone, such as `lambda: "
                f"{spec.rpartition(':')[2]}()[{keys[0]!r}]`"
            )
        elif made and all(isinstance(item, Tensor) for item in made.values()):
            hint = (
                "these are weights: build the module, load_state_dict() them, and return the module"
            )
    return SourceError(f"'{spec}' returned no nn.Module", got=got, hint=hint)


def build_empty(
    spec: Factory, model_args: dict[str, Any] | None = None, seed: int = 0
) -> nn.Module:
    """Calls a factory whose parameters are to be read from a file: they take no memory, its buffers
    are computed.

    Raises:
        SourceError: the call raises, or returns no nn.Module.
    """
    if isinstance(spec, str) and spec.startswith("hf:"):
        with empty_parameters():
            return _of_config(spec, model_args, seed)
    function, name = resolve(spec), name_of(spec)
    try:
        with empty_parameters():
            made = call(function, name, model_args or {}, seed)
    except SourceError:  # an initialisation that needs numbers
        return build(spec, model_args, seed, init=False)
    if not isinstance(made, nn.Module):
        raise not_a_module(name, made)
    if any(buffer.is_meta for buffer in made.buffers()):
        with seeded(seed):
            _compute_buffers(made, name)
    return made


def _of_config(spec: str, model_args: dict[str, Any] | None, seed: int) -> nn.Module:
    """Build the model of `hf:CONFIG`."""
    from jacdiag.sources.formats import huggingface  # which imports this file

    return huggingface.from_config(spec.removeprefix("hf:"), model_args or {}, seed)


def _compute_buffers(model: nn.Module, spec: str) -> None:
    """Gives buffers on the meta device memory, and the numbers that the model's own initialisation
    gives them.
    """
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = torch.empty_like(buffer, device="cpu").fill_(_mark(buffer))
    with torch.no_grad():
        _initialise(model, spec)
    _check_touched(
        model, spec, {name for name, _ in model.named_buffers()} - set(model.state_dict())
    )


def call(factory: Callable[..., Any], spec: str, arguments: dict[str, Any], seed: int) -> Any:
    """Calls foreign code; what it raises is shown with its own frames."""
    if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
        raise SourceError("the arguments of a factory are a dict by name", got=repr(arguments)[:80])
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        takes = ", ".join(inspect.signature(factory).parameters) or "no arguments"
        raise SourceError(
            f"'{spec}' cannot be called so", got=str(error), hint=f"--model-args; it takes {takes}"
        ) from error
    except ValueError:
        pass  # a builtin without a signature
    try:
        with seeded(seed):
            return factory(**arguments)
    except JacdiagError:
        raise
    except Exception as error:
        raise SourceError(f"'{spec}' raised", got=own_frames(error)) from error


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's generators inside and gives them back as they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def materialise(model: nn.Module, spec: str, *, init: bool = True) -> None:
    """Gives a model on the meta device memory and weights, through its own `init_weights` or
    `reset_parameters`.

    Every tensor is first filled with a mark, so that one that nothing initialised is found and
    named.

    Args:
        init: False where a checkpoint is to fill the parameters; then only buffers must be
            initialised.
    """
    model.to_empty(device="cpu")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    with torch.no_grad():
        for _, t in tensors:
            t.fill_(_mark(t))
        _initialise(model, spec)
    buffers = {name for name, _ in model.named_buffers()} - set(model.state_dict())
    _check_touched(model, spec, {name for name, _ in tensors} if init else buffers)


def _check_touched(model: nn.Module, spec: str, wanted: set[str]) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    left = [name for name, t in tensors if name in wanted and t.numel() and _untouched(t)]
    if left:
        raise SourceError(
            f"'{spec}' builds on the meta device, and not all of its tensors are initialised",
            got=f"{len(left)} of {len(tensors)}: "
            + ", ".join(left[:5])
            + (" ..." if len(left) > 5 else ""),
            hint=(
                "give it an init_weights(), or its modules reset_parameters(), that fills them; "
                "or build on the CPU"
            ),
        )


def _initialise(model: nn.Module, spec: str) -> None:
    own = getattr(model, "init_weights", None)
    try:
        if callable(own):
            own()
            return
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None) or getattr(
                module, "_reset_parameters", None
            )
            if callable(reset):
                reset()
    except Exception as error:
        raise SourceError(
            f"initialising what '{spec}' built failed", got=own_frames(error)
        ) from error


def _mark(t: Tensor) -> float | int | bool:
    if t.is_floating_point() or t.is_complex():
        return float("nan")
    return True if t.dtype == torch.bool else torch.iinfo(t.dtype).max


def _untouched(t: Tensor) -> bool:
    if t.dtype == torch.bool:
        return False  # two values leave no room for a mark
    return (
        bool(torch.isnan(t).any())
        if t.is_floating_point() or t.is_complex()
        else bool((t == _mark(t)).all())
    )
