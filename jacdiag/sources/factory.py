"""Models from code: "package.module:callable", "path/to/file.py:callable", "hf:CONFIG"."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from jacdiag.errors import JacdiagError, SourceError
from jacdiag.sources.foreign_code import own_frames, seeded
from jacdiag.sources.formats import huggingface
from jacdiag.sources.meta_build import compute_buffers, empty_parameters, materialise

__all__ = [
    "Factory",
    "build",
    "build_empty",
    "call",
    "is_factory",
    "name_of",
    "not_a_module",
    "resolve",
    "seeded",
    "there",
]

# How a factory is named, or the function itself.
Factory = str | os.PathLike[str] | Callable[..., Any]

_HOW_WRITTEN = "'package.module:callable' or 'file.py:callable'"
_LISTED = 8  # names in a hint
_RETURN_A_MODULE = "the function must return the model, a torch.nn.Module"


# -- names -----------------------------------------------------------------------------------------
def is_factory(source: str) -> bool:
    """Return whether a SOURCE names a callable: "module:name" or "file.py:name".

    A file whose name is the entire SOURCE goes first.
    """
    place, _, name = source.rpartition(":")
    if not place or not _is_dotted_name(name):
        return False
    return not there(Path(source))


def _is_dotted_name(name: str) -> bool:
    """Return whether a text is names of Python, joined by dots."""
    return all(part.isidentifier() for part in name.split("."))


def there(path: Path) -> bool:
    """Return whether a file or folder exists; a name that no file can have does not exist."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def name_of(spec: Any) -> str:
    """Return the name of a factory for messages: its text, or the name of a function."""
    if isinstance(spec, str | bytes | os.PathLike):
        return os.fsdecode(spec)

    module = getattr(spec, "__module__", None)
    name = getattr(spec, "__qualname__", None)
    # An object that can be called has no name of its own.
    if not module or not name:
        return type(spec).__name__
    return f"{module}.{name}"


def resolve(spec: Factory) -> Callable[..., Any]:
    """Return the function that a factory string names; a function is returned as it is.

    Args:
        spec: "package.module:callable", "file.py:callable", or a function.

    Raises:
        SourceError: no such module or file, its import raised, or it has no such callable.
    """
    if isinstance(spec, str | bytes | os.PathLike):
        return _resolve_name(os.fsdecode(spec))

    # A module can be called, and builds nothing.
    if callable(spec) and not isinstance(spec, nn.Module):
        return spec

    raise SourceError(
        "a factory is a function that builds a model, or its name",
        got=f"type {type(spec).__name__}",
        hint=_HOW_WRITTEN,
    )


def _resolve_name(spec: str) -> Callable[..., Any]:
    """Return the function that a factory string names."""
    # 1. Import the module or the file.
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise SourceError(
            f"a factory is written {_HOW_WRITTEN}", got=repr(spec), hint=_hint_without_name(spec)
        )
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)

    # 2. Look the name up in it.
    value = _look_up(place, module, name)

    # 3. It has to be callable. A model is, and builds nothing.
    if isinstance(value, nn.Module):
        raise SourceError(
            f"'{spec}' is a model, and a function that builds one is needed",
            got=f"type {type(value).__name__}",
            hint=f"def build(): return {name}, then {place}:build",
        )
    if not callable(value):
        got = f"type {type(value).__name__}"
        raise SourceError(
            f"'{spec}' cannot be called", got=got, hint=_candidates(place, module, name)
        )
    return value


def _look_up(place: str, module: ModuleType, name: str) -> Any:
    """Return what a dotted name stands for in a module.

    Args:
        place: of the module, as the user wrote it.
        module: that is looked into.
        name: with a dot before each attribute of an attribute.
    """
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            raise SourceError(f"'{place}' has no '{name}'", hint=_candidates(place, value, part))
        value = getattr(value, part)
    return value


def _hint_without_name(spec: str) -> str | None:
    """Return what to try if only a file or a module was named."""
    place = spec.rstrip(":")
    path = Path(place)

    # Only a file is imported to look into it: the text may be anything.
    if not place.endswith(".py") or not path.is_file():
        return None

    return _candidates(place, _import_file(path), "")


def _candidates(place: str, owner: Any, name: str) -> str | None:
    """Return a hint with the callables that a file or module defines, the nearest name first.

    Args:
        place: the file or module, as it was written.
        owner: the module or the class in it that is searched.
        name: that it lacks.
    """
    names = _own_callables(owner)
    if not names:
        return f"'{place}' defines no function or class that could build a model"
    near = get_close_matches(name, names, n=len(names))
    ordered = list(dict.fromkeys([*near, *names]))
    shown = ", ".join(ordered[:_LISTED])
    if len(ordered) > _LISTED:
        shown += f" and {len(ordered) - _LISTED} more"
    return f"{place}:NAME with one of {shown}"


def _own_callables(owner: Any) -> list[str]:
    """Return the names of the public callables that a module or class defines itself."""
    if not hasattr(owner, "__dict__"):
        return []
    names = []
    for name in vars(owner):
        value = getattr(owner, name, None)
        if name.startswith("_") or not callable(value):
            continue
        if not _is_imported(value, owner):
            names.append(name)
    return names


def _is_imported(value: Any, owner: Any) -> bool:
    """Return whether a module has a callable from another one. A class has all of its own."""
    if not inspect.ismodule(owner):
        return False
    own_name = owner.__name__
    # An object without a module may be of this one.
    return getattr(value, "__module__", own_name) != own_name


# -- imports ---------------------------------------------------------------------------------------
def _import_file(path: Path) -> ModuleType:
    """Import a Python file by its path."""
    if not path.is_file():
        raise SourceError(
            f"no such file: '{path}'", hint="a factory is written path/to/file.py:callable"
        )

    # 1. A module under a name of its own. Dataclasses and pickles look their module up there.
    spec = importlib.util.spec_from_file_location(f"_jacdiag_factory_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module

    # 2. Run the file as if from its folder.
    with _on_path(path.resolve().parent):
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            hint = _import_hint(error, path)
            raise SourceError(
                f"importing '{path}' failed", got=own_frames(error), hint=hint
            ) from error
    return module


def _import_module(name: str) -> ModuleType:
    """Import a module by its dotted name, from the current folder too."""
    if not _is_dotted_name(name):
        raise SourceError(
            f"'{name}' is no module name",
            hint="a factory is written package.module:callable or file.py:callable",
        )
    with _on_path(Path.cwd()):
        try:
            return importlib.import_module(name)
        except Exception as error:
            # A module that this one imports may be missing, too.
            if isinstance(error, ModuleNotFoundError) and _is_part_of(error.name, name):
                raise SourceError(
                    f"no module named '{error.name}'",
                    hint="modules are looked for in the current folder too",
                ) from error
            raise SourceError(f"importing '{name}' failed", got=own_frames(error)) from error


def _is_part_of(missing: str | None, name: str) -> bool:
    """Return whether a missing module is the one of that dotted name, or a package above it."""
    if missing is None:
        return False
    # The dot keeps "models" from being a part of "models_old".
    return f"{name}.".startswith(f"{missing}.")


def _import_hint(error: Exception, path: Path) -> str | None:
    """Return what helps a file that cannot be imported alone: the dotted name in its package."""
    if not isinstance(error, ImportError) or "relative import" not in str(error):
        return None

    # 1. The packages around the file.
    file = path.resolve()
    names, folder = [file.stem], file.parent
    while (folder / "__init__.py").is_file() and folder.name.isidentifier():
        names.insert(0, folder.name)
        folder = folder.parent

    # 2. A folder without __init__.py is a package too, if it is imported by its name.
    if len(names) == 1:
        names.insert(0, file.parent.name)
        folder = file.parent.parent

    dotted = ".".join(names)
    return (
        f"from {folder}, name it as a module: {dotted}:CALLABLE (a file alone has no package "
        "to import from)"
    )


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """Let code next to a factory's file be imported by it, as if it were run from there."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


# -- building --------------------------------------------------------------------------------------
def build(
    spec: Factory, model_args: dict[str, Any] | None = None, seed: int = 0, *, init: bool = True
) -> nn.Module:
    """Call a factory with seeded random numbers.

    A model on the meta device is given memory.

    Args:
        spec: the factory, or "hf:CONFIG".
        model_args: its keyword arguments.
        seed: of the random numbers.
        init: whether a model on the meta device is given weights, too.

    Returns:
        The model.

    Raises:
        SourceError: the call raises, or returns no nn.Module.
    """
    if _is_config(spec):
        return _build_from_config(name_of(spec), model_args, seed)

    # 1. Call it.
    function, name = resolve(spec), name_of(spec)
    result = call(function, name, model_args or {}, seed)
    model = _checked_module(name, result)

    # 2. Give it memory.
    tensors = [*model.parameters(), *model.buffers()]
    if _any_on_meta(tensors):
        with seeded(seed):
            materialise(model, name, init=init)
    return model


def build_empty(
    spec: Factory, model_args: dict[str, Any] | None = None, seed: int = 0
) -> nn.Module:
    """Call a factory whose parameters are to be read from a file.

    They take no memory. The buffers are computed.

    Args:
        spec: the factory, or "hf:CONFIG".
        model_args: its keyword arguments.
        seed: of the random numbers.

    Returns:
        The model, its parameters on the meta device.

    Raises:
        SourceError: the call raises, or returns no nn.Module.
    """
    if _is_config(spec):
        with empty_parameters():
            return _build_from_config(name_of(spec), model_args, seed)

    # 1. Call it, its parameters without memory.
    function, name = resolve(spec), name_of(spec)
    try:
        with empty_parameters():
            result = call(function, name, model_args or {}, seed)
    # An initialization that needs numbers.
    except SourceError:
        return build(spec, model_args, seed, init=False)
    model = _checked_module(name, result)

    # 2. Compute its buffers.
    if _any_on_meta(model.buffers()):
        with seeded(seed):
            compute_buffers(model, name)
    return model


def _is_config(spec: Factory) -> bool:
    """Return whether a factory is `hf:CONFIG`."""
    return isinstance(spec, str) and spec.startswith("hf:")


def _checked_module(name: str, result: Any) -> nn.Module:
    """Return what a factory returned, if it is a module.

    Raises:
        SourceError: it is something else.
    """
    if isinstance(result, nn.Module):
        return result
    # Foreign code returns whatever it likes.
    raise not_a_module(name, result)


def _any_on_meta(tensors: Iterable[Tensor]) -> bool:
    """Return whether one of several tensors is on the meta device."""
    return any(tensor.is_meta for tensor in tensors)


def _build_from_config(spec: str, model_args: dict[str, Any] | None, seed: int) -> nn.Module:
    """Build the model of `hf:CONFIG`."""
    return huggingface.from_config(spec.removeprefix("hf:"), model_args or {}, seed)


def call(factory: Callable[..., Any], spec: str, arguments: dict[str, Any], seed: int) -> Any:
    """Call foreign code with seeded random numbers.

    Args:
        factory: the function.
        spec: its name, for messages.
        arguments: by name.
        seed: of torch's random numbers.

    Returns:
        What the function returns.

    Raises:
        SourceError: the arguments do not fit, or the code raises; the message shows its own frames.
    """
    _check_arguments(factory, spec, arguments)
    try:
        with seeded(seed):
            return factory(**arguments)
    except JacdiagError:
        raise
    except Exception as error:
        raise SourceError(f"'{spec}' raised", got=own_frames(error)) from error


def _check_arguments(factory: Callable[..., Any], spec: str, arguments: dict[str, Any]) -> None:
    """Raise unless a function can be called with the arguments."""
    # 1. Names.
    are_named = isinstance(arguments, dict) and all(isinstance(key, str) for key in arguments)
    if not are_named:
        raise SourceError("the arguments of a factory are a dict by name", got=repr(arguments)[:80])

    # 2. Those that it takes.
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        takes = ", ".join(inspect.signature(factory).parameters) or "no arguments"
        raise SourceError(
            f"'{spec}' cannot be called so", got=str(error), hint=f"--model-args; it takes {takes}"
        ) from error
    except ValueError:
        pass  # a builtin without a signature


def not_a_module(spec: str, result: Any) -> SourceError:
    """Return the error for a factory that returned something else than a module.

    Args:
        spec: the name of the factory.
        result: that it returned.
    """
    got = f"type {type(result).__name__}"
    hint = _RETURN_A_MODULE
    if result is None:
        hint = "it ends without `return`, or returns None: end it with `return model`"

    # The class in place of an instance of it.
    elif isinstance(result, type) and issubclass(result, nn.Module):
        got = f"the class {result.__name__}"
        hint = f"return an instance: `return {result.__name__}(...)`"

    # A container, which may hold the model.
    elif isinstance(result, tuple | list):
        types = ", ".join(type(item).__name__ for item in result)
        got = f"a {type(result).__name__} of {types or 'nothing'}"
        hint = _hint_of_place(spec, dict(enumerate(result)))
    elif isinstance(result, dict):
        keys = ", ".join(map(repr, list(result)[:4]))
        got = f"a dict with {keys or 'nothing'}"
        hint = _hint_of_dict(spec, result)
    return SourceError(f"'{spec}' returned no nn.Module", got=got, hint=hint)


def _hint_of_dict(spec: str, result: dict[Any, Any]) -> str:
    """Return what to try if a factory returned a dict: a state dict, or one with a model in it."""
    items = list(result.values())
    # An empty dict is nothing.
    is_state_dict = bool(items) and all(isinstance(item, Tensor) for item in items)
    if is_state_dict:
        return "these are weights: build the module, load_state_dict() them, and return the module"
    return _hint_of_place(spec, result)


def _hint_of_place(spec: str, items: Mapping[Any, Any]) -> str:
    """Return how to take the model out of a container.

    Args:
        spec: the name of the factory.
        items: index or key -> item of the container.
    """
    name = spec.rpartition(":")[2]
    for place, item in items.items():
        # the first module in it
        if isinstance(item, nn.Module):
            return f"return the model alone, such as `lambda: {name}()[{place!r}]`"

    # There is none.
    return _RETURN_A_MODULE
