"""The types of `jacdiag.audit`'s arguments, checked before any work: each error says what was
expected.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from jacdiag.errors import UsageError
from jacdiag.records import FiguresRecord
from jacdiag.sources.python_source import kind_of

_NEVER_NONE = ("batch", "seed", "tol", "max_products", "probes")
_PATHS = ("tokens",)
_STATES = ("init", "trained")


def check_arguments(**given: Any) -> None:
    """Raise unless every argument has a type that it may have.

    Ranges of numbers are checked elsewhere (`jacdiag.records.option_ranges`).

    Raises:
        UsageError: one has another type; the message names it.
    """
    for name in _NEVER_NONE:
        if given[name] is None:
            raise UsageError(f"{name} cannot be None", hint="leave it out for its default")
    for name in _PATHS:
        _check(name, given[name], str | bytes | os.PathLike, "a path, as text or a pathlib.Path")
    if given["state"] is not None and given["state"] not in _STATES:
        raise UsageError(
            f"state cannot be {given['state']!r}", hint=f"one of {', '.join(_STATES)}, or None"
        )

    _check(
        "device", given["device"], str | torch.device, "a device by name, such as 'cpu' or 'cuda:1'"
    )
    _check("dtype", given["dtype"], str | torch.dtype, "'float32' or 'float64'")
    _check("remedies", given["remedies"], str, "a way by name, such as 'first'", optional=False)
    _check(
        "profile",
        given["profile"],
        str | Mapping,
        "a profile by name, or a table of levels",
        optional=False,
    )
    _check("model_args", given["model_args"], dict, "a dict of keyword arguments")
    _check(
        "baseline",
        given["baseline"],
        FiguresRecord,
        "what jacdiag.gate.read_baseline(FILE) returns",
    )
    _check("contract", given["contract"], Mapping, "a dict, role or name pattern -> formula")
    _check(
        "declared", given["declared"], Iterable, "a list of jacdiag.declare(...)", optional=False
    )

    progress = given["progress"]
    if progress is not None and not all(
        hasattr(progress, name) for name in ("start", "advance", "stop")
    ):
        raise UsageError("progress needs start, advance and stop", got=kind_of(progress))
    _check_optimizer(given["optimizer"])


def check_one_confidence(confidence: float | None, confidence_all: float | None) -> None:
    """Raise if both a confidence per interval and a family-wise one are given: the second sets the
    first.

    Raises:
        UsageError: both are given.
    """
    if confidence is not None and confidence_all is not None:
        got = f"--confidence {confidence:g} and --confidence-all {confidence_all:g}"
        hint = (
            "give one of them: --confidence is said of each interval, --confidence-all of all "
            "of them together"
        )
        raise UsageError("the confidence is given twice", got=got, hint=hint)


def codes_of(name: str, given: Any) -> tuple[str, ...]:
    """Return rule codes or prefixes as a tuple; a single one may be given as text, several with
    commas.

    Raises:
        UsageError: something else.

    Example:
        >>> codes_of("select", "JD1,JD2"), codes_of("select", ["JD1"])
        (('JD1', 'JD2'), ('JD1',))
    """
    if isinstance(given, str):
        given = [code.strip() for code in given.split(",") if code.strip()]
    if not isinstance(given, Iterable):
        raise UsageError(
            f"{name} is a list of rule codes", got=kind_of(given), hint=f'{name}=["JD1"]'
        )
    codes = tuple(given)
    wrong = [code for code in codes if not isinstance(code, str)]
    if wrong:
        raise UsageError(
            f"{name} is a list of rule codes", got=repr(wrong[0]), hint=f'{name}=["JD1"]'
        )
    return codes


def _check(name: str, value: Any, kinds: Any, expected: str, *, optional: bool = True) -> None:
    if value is None and optional:
        return
    if not isinstance(value, kinds):
        raise UsageError(f"{name} is of the wrong type", got=kind_of(value), hint=expected)


def _check_optimizer(given: Any) -> None:
    if given is None or hasattr(given, "param_groups"):
        return
    groups = given if isinstance(given, list | tuple) else [given]
    if not all(
        isinstance(group, Mapping) and isinstance(group.get("params"), list | tuple)
        for group in groups
    ):
        hint = "a torch optimizer, or its param_groups"
        raise UsageError("optimizer is of the wrong type", got=kind_of(given), hint=hint)
