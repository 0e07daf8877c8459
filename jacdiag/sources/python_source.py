"""Whatever a Python caller passes as a model: a path, a module, a function that builds one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from jacdiag.errors import SourceError, UsageError
from jacdiag.sources import factory
from jacdiag.sources.source import Source, load


def source_of(
    given: Any,
    *,
    model: Any = None,
    model_args: dict[str, Any] | None = None,
    key: str | None = None,
    trust_pickle: bool = False,
    seed: int = 0,
) -> Source:
    """Return the source for whatever a caller handed in.

    Args:
        given: a SOURCE string, a path, a module, a function or class that builds one, or a
            `Source`.
        model: what builds the module of a bare state dict.
        model_args: keyword arguments of what builds the module.
        key: which weights to read, if a file holds several sets.
        trust_pickle: let a pickle that holds more than tensors run code.
        seed: before a factory is called.

    Returns:
        The source.

    Raises:
        SourceError: it cannot be read, or is of a kind that holds no model; the message says what
            to pass.
    """
    # 1. What is in memory already. A module can be called too, so it comes before functions.
    if isinstance(given, Source):
        return given
    if isinstance(given, nn.Module):
        return Source.of_module(given)

    # 2. What is to be read or built.
    if isinstance(given, str | bytes | os.PathLike):
        text = path_text(given)
        return load(
            text, model=model, model_args=model_args, key=key, trust_pickle=trust_pickle, seed=seed
        )
    if not callable(given):
        raise SourceError(
            "this is no model that can be audited", got=kind_of(given), hint=_way_from(given)
        )
    name = factory.name_of(given)
    if model is not None:
        raise UsageError(
            "model= belongs to a checkpoint file",
            got=f"model={model!r} with the function {name}",
        )
    rebuild = partial(factory.build, given, model_args)
    return Source(rebuild(seed), {"format": "factory", "factory": name}, name, rebuild=rebuild)


def check_module(given: Any, caller: str) -> None:
    """Raise unless a value is a module.

    Args:
        given: what was passed as the model.
        caller: the function that needs it, for the message.

    Raises:
        UsageError: it is something else; the message says how to get a module from it.
    """
    if isinstance(given, nn.Module):
        return

    # The hint says how to get a module from it.
    if isinstance(given, str | bytes | os.PathLike):
        hint = "jacdiag.sources.load(SOURCE).model is the module that a file or factory holds"
    elif callable(given):
        hint = f"call it first: pass {factory.name_of(given)}(...), the model that it builds"
    else:
        hint = _way_from(given)

    raise UsageError(f"{caller} takes a torch.nn.Module", got=kind_of(given), hint=hint)


def path_text(given: Any) -> str:
    """Return a path as text.

    Raises:
        UsageError: it is no path.
    """
    if not isinstance(given, str | bytes | os.PathLike):
        raise UsageError("a path is expected", got=kind_of(given), hint="text or a pathlib.Path")

    try:
        return os.fsdecode(given)
    # a PathLike of somebody else's
    except TypeError as error:
        raise UsageError(
            "a path is expected", got=str(error), hint="text or a pathlib.Path"
        ) from error


def kind_of(value: Any) -> str:
    """Return what a value is, for a message."""
    if value is None:
        return "None"

    # the type of a class is no help
    if isinstance(value, type):
        return f"the class {value.__name__}"

    return f"type {type(value).__name__}"


def _way_from(given: Any) -> str:
    """Return what to pass in place of a value that is no model."""
    # 1. What a file may hold.
    if _is_state_dict(given):
        return (
            "a state dict has no forward: load it into its module, model.load_state_dict(state), "
            "and pass the module; "
            "or torch.save(state, 'weights.pt') and pass that file, with model= for the function "
            "that builds the module"
        )
    if isinstance(given, Mapping):
        return "the module, or the path of the checkpoint file that holds this"

    # 2. What stands next to a model in a training script.
    if _holds_module(given):
        return "one module: pass the one to look at, such as models[0]"
    if hasattr(given, "param_groups"):
        return "the module, not its optimizer"
    return (
        "a torch.nn.Module, a function that builds one, or a SOURCE such as 'checkpoint.pt' or "
        "'build.py:model'"
    )


def _is_state_dict(value: Any) -> bool:
    """Return whether a value is a mapping of tensors and nothing else."""
    if not isinstance(value, Mapping):
        return False

    # An empty mapping is no state dict.
    values = list(value.values())
    return bool(values) and all(isinstance(item, Tensor) for item in values)


def _holds_module(value: Any) -> bool:
    """Return whether a value is a list or tuple with a module in it."""
    # A module that is iterable is one itself.
    items = value if isinstance(value, list | tuple) else ()
    return any(isinstance(item, nn.Module) for item in items)
