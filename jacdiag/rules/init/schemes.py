"""Init schemes: the std that each role should have, as formulas."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from jacdiag.errors import UsageError
from jacdiag.records import WeightRecord
from jacdiag.rules.init.formula import Formula

RESIDUAL = ("W_O", "W_2")  # the matrices that write to the shortcut
INNER = (
    "W_Q",
    "W_K",
    "W_V",
    "W_QK",
    "W_QV",
    "W_KV",
    "W_QKV",
    "W_Q_a",
    "W_K_a",
    "W_V_a",
    "W_KV_a",
    "W_QKV_a",
    "W_1",
    "W_gate",
    "W_gate_up",
)
MATRICES = (*INNER, *RESIDUAL)
OUTSIDE = ("embedding", "positions", "cls", "head", "projection", "router")
VECTORS = ("norm_gain", "scale", "bias")
ROLES = (*MATRICES, *OUTSIDE, *VECTORS)
_DESCRIPTION = ("title", "source", "families", "family")  # keys of a scheme that are no formulas
VARIABLES = frozenset(
    {
        "N",
        "d",
        "V",
        "H",
        "d_head",
        "fan_in",
        "fan_out",
        "l",
        "initializer_range",
        "initializer_factor",
    }
)


def _is_pattern(key: str) -> bool:
    """Return whether a key of a scheme is a name or a pattern of names, and no role."""
    return "." in key or "*" in key


@dataclass(frozen=True)
class Scheme:
    """One way to initialise.

    Attributes:
        title, source: its name, and where it was published.
        formulas: role -> its std (its value for a gain or a bias); several where there are
            variants. "matrix" stands for every matrix of a sub-layer that has none of its own.
        families: model types or classes whose published init it is.
        family: of the draws of its matrices, where only one will do (orthogonal); "" for any.
    """

    name: str
    title: str
    source: str
    formulas: Mapping[str, tuple[Formula, ...]]
    families: tuple[str, ...] = ()
    family: str = ""

    @property
    def free(self) -> bool:
        """Whether its base std s is taken from the model itself."""
        for variants in self.formulas.values():
            for formula in variants:
                if "s" in formula.names:
                    return True

        return False

    def of(self, weight: WeightRecord) -> tuple[Formula, ...]:
        """Return the formulas for a weight: by name, by role, else that of every matrix.

        Returns:
            () if the scheme states none.
        """
        named = self.named(weight)
        if named:
            return named

        # "matrix" stands for every matrix without a formula of its own.
        if weight.role in MATRICES:
            return self.formulas.get("matrix", ())
        return ()

    def named(self, weight: WeightRecord) -> tuple[Formula, ...]:
        """Return the formulas that are stated for just this weight, by name or by role."""
        # 1. Its name or its name pattern, as it stands.
        for key in (weight.parameter, weight.pattern):
            if key in self.formulas:
                return self.formulas[key]

        # 2. A pattern with wildcards.
        for key in self._patterns:
            if fnmatchcase(weight.parameter, key):
                return self.formulas[key]

        # 3. Its role.
        return self.formulas.get(weight.role, ())

    @cached_property
    def _patterns(self) -> list[str]:
        """Keys that are names or patterns of names, in their order."""
        return list(filter(_is_pattern, self.formulas))


@cache
def _data() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / "schemes.toml").read_text(encoding="utf-8"))


@cache
def catalogue() -> tuple[tuple[Scheme, ...], tuple[Scheme, ...]]:
    """Return the schemes that ship.

    The first are those that a model may follow, the second the published inits of families.
    """
    data = _data()
    return tuple(_schemes(data["scheme"])), tuple(_schemes(data["published"]))


@cache
def allowed_with_any_scheme() -> Mapping[str, tuple[Formula, ...]]:
    """Return what embedding, positions and head may be instead, with any scheme of the matrices."""
    return formulas_of(_data()["allowed"])


def _schemes(data: Mapping[str, Mapping[str, object]]) -> Iterable[Scheme]:
    for name, entry in data.items():
        formulas = {key: value for key, value in entry.items() if key not in _DESCRIPTION}
        families: Any = entry.get("families", ())
        yield Scheme(
            name,
            str(entry["title"]),
            str(entry["source"]),
            formulas_of(formulas),
            tuple(families),
            str(entry.get("family", "")),
        )


def formulas_of(data: Mapping[str, object]) -> dict[str, tuple[Formula, ...]]:
    """Read the formulas of a table.

    Args:
        data: role -> a text, a number, or a list of them (variants).
    """
    formulas: dict[str, tuple[Formula, ...]] = {}
    for role, value in data.items():
        # A single formula is a list of one variant.
        variants = value if isinstance(value, list | tuple) else [value]
        texts = map(str, variants)
        formulas[role] = tuple(map(Formula.read, texts))

    return formulas


def checked_contract(pinned: Mapping[str, object] | None) -> dict[str, str]:
    """Return a pinned contract as texts.

    Raises:
        UsageError: a key that is neither a role nor a name pattern, a value that is no formula, an
            unknown variable.

    Example:
        >>> checked_contract({"W_O": "0.02/sqrt(2*N)", "norm_gain": 1})
        {'W_O': '0.02/sqrt(2*N)', 'norm_gain': '1'}
    """
    if pinned is None:
        return {}

    # Each entry by itself.
    contract: dict[str, str] = {}
    for key, value in pinned.items():
        _check_key(key)
        contract[key] = _checked_formula(key, value)

    return contract


def _check_key(key: object) -> None:
    """Raise UsageError unless a key of a pinned contract is a role or a pattern of names."""
    if not isinstance(key, str):
        raise UsageError(
            "an init contract maps roles to formulas", got=repr(key), hint='{"W_O": "0.02"}'
        )

    # "matrix" stands for every matrix of a sub-layer.
    roles = (*ROLES, "matrix")
    if key in roles or _is_pattern(key):
        return
    near = get_close_matches(key, roles, n=3, cutoff=0.0)
    hint = f"closest: {', '.join(near)}; or a name pattern such as 'h.*.mlp.c_proj.weight'"
    raise UsageError(f"an init contract has no role '{key}'", hint=hint)


def _checked_formula(key: str, value: object) -> str:
    """Return the formula of one key as text.

    Raises:
        UsageError: the value is no formula, or has an unknown variable.
    """
    # True and False are numbers of Python.
    is_formula = isinstance(value, str | int | float) and not isinstance(value, bool)
    if not is_formula:
        raise UsageError(
            f"'{key}' of the init contract takes a formula",
            got=repr(value),
            hint='for example "0.02/sqrt(2*N)"',
        )

    # Read it once, so that a mistake is named before anything is measured.
    text = str(value)
    Formula.read(text).check(VARIABLES)
    return text


def published_for(family: str) -> Scheme | None:
    """Return the published init of a model type or class."""
    _, published = catalogue()
    for scheme in published:
        if family in scheme.families:
            return scheme

    # Most families have none.
    return None
