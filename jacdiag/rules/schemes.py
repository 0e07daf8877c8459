"""Init schemes: what std each role should have, as formulas; and which of them a model follows."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from jacdiag.errors import UsageError
from jacdiag.report import ContractRecord, WeightRecord
from jacdiag.report.formula import Formula

RESIDUAL = ("W_O", "W_2")  # the matrices that write to the shortcut
INNER = ("W_Q", "W_K", "W_V", "W_QK", "W_QV", "W_KV", "W_QKV", "W_Q_a", "W_K_a", "W_V_a", "W_KV_a", "W_QKV_a", "W_1",
         "W_gate", "W_gate_up")  # fmt: skip
MATRICES = (*INNER, *RESIDUAL)
OUTSIDE = ("embedding", "positions", "cls", "head", "projection", "router")
VECTORS = ("norm_gain", "scale", "bias")
ROLES = (*MATRICES, *OUTSIDE, *VECTORS)
VARIABLES = frozenset({"N", "d", "V", "H", "d_head", "fan_in", "fan_out", "l", "initializer_range",
                       "initializer_factor"})  # fmt: skip
_ENOUGH = 0.6  # share of a model's matrices that must agree before a scheme is called its own


@dataclass(frozen=True)
class Scheme:
    """One way to initialise.

    Attributes:
        title, source: its name, and where it was published.
        formulas: role -> its std (its value for a gain or a bias); several where there are variants. "matrix" stands
            for every matrix of a sub-layer that has none of its own.
        families: model types or classes whose published init it is.
    """

    name: str
    title: str
    source: str
    formulas: Mapping[str, tuple[Formula, ...]]
    families: tuple[str, ...] = ()

    @property
    def free(self) -> bool:
        """Whether its base std s is taken from the model itself."""
        return any("s" in f.names for fs in self.formulas.values() for f in fs)

    def of(self, weight: WeightRecord) -> tuple[Formula, ...]:
        """The formulas for a weight: by name, by role, else that of every matrix; () where it says nothing."""
        for key in (weight.parameter, weight.pattern):
            if key in self.formulas:
                return self.formulas[key]
        for key, formulas in self.formulas.items():
            if ("*" in key or "." in key) and fnmatchcase(weight.parameter, key):
                return formulas
        if weight.role in self.formulas:
            return self.formulas[weight.role]
        return self.formulas.get("matrix", ()) if weight.role in MATRICES else ()


@dataclass(frozen=True)
class Followed:
    """A scheme as a model follows it: `s` is its base std where that is free, `share` the weights that agree."""

    scheme: Scheme
    s: float | None
    share: float
    agree: int
    values: int = 0
    spread: tuple[float, float] = field(default=(1.0, 1.0))  # interval of s, relative


def variables(contract: ContractRecord, weight: WeightRecord, s: float | None = None) -> dict[str, float]:
    """What a formula may use for one weight."""
    found = dict(contract.sizes)
    for name, value in (("fan_in", weight.fan_in), ("fan_out", weight.fan_out), ("l", weight.layer), ("s", s)):
        if value is not None:
            found[name] = float(value)
    return found


def expected(contract: ContractRecord, weight: WeightRecord, scheme: Scheme, s: float | None = None) -> list[float]:
    """The values that a scheme allows for a weight; [] where it says nothing, or uses what is not known here."""
    values = (f.value(variables(contract, weight, s)) for f in scheme.of(weight))
    return [v for v in values if v is not None]


def holds(weight: WeightRecord, value: float, spread: tuple[float, float] = (1.0, 1.0)) -> bool:
    """Whether a weight can have been drawn with the std `value` (or, a vector, be that value)."""
    if weight.role in ("norm_gain", "bias", "scale") or len(weight.shape) < 2:
        exact = weight.family in ("zero", "constant") and weight.mean is not None
        return exact and math.isclose(weight.mean or 0.0, value, rel_tol=1e-3, abs_tol=1e-12)
    if weight.lower is None or weight.upper is None:
        return True  # not measured: another rule speaks
    if value == 0 or weight.family in ("zero", "constant"):
        return weight.family == "zero" and value == 0
    low, high = weight.lower / spread[1], weight.upper / spread[0]
    return low <= value <= high or low <= value * weight.truncation <= high


@cache
def catalogue() -> tuple[tuple[Scheme, ...], tuple[Scheme, ...]]:
    """The schemes that ship: those that a model may be found to follow, and the published inits of families."""
    data = tomllib.loads((Path(__file__).parent / "schemes.toml").read_text(encoding="utf-8"))
    return tuple(_schemes(data["scheme"])), tuple(_schemes(data["published"]))


def _schemes(data: Mapping[str, Mapping[str, object]]) -> Iterable[Scheme]:
    for name, entry in data.items():
        own = {k: v for k, v in entry.items() if k not in ("title", "source", "families")}
        families: Any = entry.get("families", ())
        yield Scheme(name, str(entry["title"]), str(entry["source"]), formulas_of(own), tuple(families))


def formulas_of(data: Mapping[str, object]) -> dict[str, tuple[Formula, ...]]:
    """Reads the formulas of a table: a text, a number, or a list of them (variants) by role."""
    found = {}
    for key, value in data.items():
        texts = value if isinstance(value, list | tuple) else [value]
        found[key] = tuple(Formula.read(str(text)) for text in texts)
    return found


def checked_contract(pinned: Mapping[str, object] | None) -> dict[str, str]:
    """A pinned contract as texts.

    Raises:
        UsageError: a key that is neither a role nor a name pattern, a value that is no formula, an unknown variable.

    Example:
        >>> checked_contract({"W_O": "0.02/sqrt(2*N)", "norm_gain": 1})
        {'W_O': '0.02/sqrt(2*N)', 'norm_gain': '1'}
    """
    found = {}
    for key, value in (pinned or {}).items():
        if not isinstance(key, str):
            raise UsageError("an init contract maps roles to formulas", got=repr(key), hint='{"W_O": "0.02"}')
        if key not in (*ROLES, "matrix") and "." not in key and "*" not in key:
            near = get_close_matches(key, (*ROLES, "matrix"), n=3, cutoff=0.0)
            hint = f"closest: {', '.join(near)}; or a name pattern such as 'h.*.mlp.c_proj.weight'"
            raise UsageError(f"an init contract has no role '{key}'", hint=hint)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise UsageError(f"'{key}' of the init contract takes a formula", got=repr(value),
                             hint='for example "0.02/sqrt(2*N)"')  # fmt: skip
        text = str(value)
        Formula.read(text).check(VARIABLES)
        found[key] = text
    return found


def published_for(family: str) -> Scheme | None:
    """The published init of a model type or class."""
    return next((scheme for scheme in catalogue()[1] if family in scheme.families), None)


def followed(contract: ContractRecord) -> Followed | None:
    """The scheme that most of a model's weights agree with; None if none fits the greater part of its matrices.

    Of schemes that fit equally many weights the one that explains more different values comes first: that two roles
    have exactly std s / sqrt(2N) is no accident, that two have s may be one.
    """
    weights = [w for w in contract.weights if w.lower is not None and w.role in (*MATRICES, *OUTSIDE)]
    if not any(w.role in MATRICES for w in weights):
        return None
    found = [made for scheme in catalogue()[0] for made in _fits(contract, scheme, weights)]
    best = max(found, key=lambda f: (f.agree, f.values, not f.scheme.free), default=None)
    return best if best is not None and best.share >= _ENOUGH and best.agree >= 2 else None


def _fits(contract: ContractRecord, scheme: Scheme, weights: list[WeightRecord]) -> Iterable[Followed]:
    """A scheme at every base std that some of the weights suggest."""
    bases: list[tuple[float | None, tuple[float, float]]] = [(None, (1.0, 1.0))]
    if scheme.free:
        bases = list(_bases(contract, scheme, weights))
    for s, spread in bases:
        stated = [(w, v) for w in weights if (v := expected(contract, w, scheme, s))]
        matched = [w for w, v in stated if any(holds(w, x, spread) for x in v)]
        inside = [w for w in stated if w[0].role in MATRICES]
        agree = [w for w in matched if w.role in MATRICES]
        kinds = {f"{x:.4g}" for w, v in stated if w in matched for x in v if holds(w, x, spread)}
        if inside:
            yield Followed(scheme, s, len(agree) / len(inside), len(matched), len(kinds), spread)


def _bases(
    contract: ContractRecord, scheme: Scheme, weights: list[WeightRecord]
) -> Iterable[tuple[float, tuple[float, float]]]:
    """Candidates of s: pooled over the weights that agree with that of one name pattern."""
    factors = [(w, f[0]) for w in weights if w.role in MATRICES and w.std and (f := expected(contract, w, scheme, 1.0))]
    seen: set[str] = set()
    for pattern in dict.fromkeys(w.pattern for w, _ in factors):
        group = sorted((w.std or 0.0) / f for w, f in factors if w.pattern == pattern)
        s = group[len(group) // 2]
        for _ in range(2):
            inside = [(w, f) for w, f in factors if w.lower and w.upper and w.lower * 0.97 <= s * f <= w.upper * 1.03]
            size = sum(math.prod(w.shape) for w, _ in inside)
            if size:
                total = sum(math.prod(w.shape) * ((w.std or 0.0) / f) ** 2 for w, f in inside)
                s = math.sqrt(total / size)
        if inside and f"{s:.5g}" not in seen:
            seen.add(f"{s:.5g}")
            half = 4.9 / math.sqrt(2 * size)
            yield s, (1 - half, 1 + half)
