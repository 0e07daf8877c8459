"""The numbers that rules compare with, and the ladder of mainstream inits."""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jacdiag.errors import UsageError
from jacdiag.records.report import Level
from jacdiag.records.risk import RiskTable
from jacdiag.rules.risk_curves import load_risk

_HERE = Path(__file__).parent
CUTS: tuple[Level, ...] = ("info", "warning", "error")


@dataclass(frozen=True)
class Limits:
    """The values beyond which a figure is worth an info, a warning, an error.

    None stands for a cut that does not exist.

    For the two conditions of the paper, "met" ends at `info` and "not met" begins at `warning`.

    Attributes:
        origin: derived, published, calibrated, or user.
        source: the experiment or the paper.
        range: what it holds for.
    """

    info: float | None = None
    warning: float | None = None
    error: float | None = None
    origin: str = ""
    source: str = ""
    range: str = ""

    @property
    def cuts(self) -> tuple[float, ...]:
        """The cuts that exist, in ascending order."""
        return tuple(
            sorted({cut for cut in (self.info, self.warning, self.error) if cut is not None})
        )


@dataclass(frozen=True)
class Thresholds:
    """Limits by figure and stratum, and the curves of the chance at a learning rate.

    A stratum is a kind of sub-layer or a placement, as in ("branch_norm", "pre").
    """

    table: Mapping[tuple[str, str], Limits]
    risk: RiskTable = field(default_factory=RiskTable)

    def limits(self, figure: str, stratum: str = "") -> Limits:
        """Return the limits of a stratum, else those of the figure, else empty ones.

        Args:
            figure: such as "core_norm".
            stratum: a kind of sub-layer or a placement, as the figure asks for.
        """
        return self.table.get((figure, stratum)) or self.table.get((figure, "")) or Limits()

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Return plain cuts by "figure" or "figure.stratum", for a report."""
        table: dict[str, dict[str, float]] = {}
        for key, limits in self.table.items():
            cuts = {cut: getattr(limits, cut) for cut in CUTS}
            name = ".".join(part for part in key if part)
            table[name] = {cut: value for cut, value in cuts.items() if value is not None}
        return table


def load_thresholds(
    overrides: Mapping[str, Any] | None = None, risk: str | os.PathLike[str] | None = None
) -> Thresholds:
    """Read the thresholds that ship, with a user's own on top.

    Args:
        overrides: figure -> {"warning": number, ...}, or figure -> stratum -> {...}; an "error"
            makes the rule fail.
        risk: a file of `jacdiag backtest --write-risk`, in place of the curves that ship.

    Raises:
        UsageError: a file of curves that cannot be read, an unknown figure, stratum or cut, a value
            that is no number, or cuts that do not ascend.

    Example:
        >>> load_thresholds({"norm_gain": {"error": 30}}).limits("norm_gain").error
        30.0
    """
    if overrides is not None and not isinstance(overrides, Mapping):
        hint = "a dict such as {'norm_gain': {'error': 30}}"
        raise UsageError(
            "thresholds are of the wrong type", got=f"type {type(overrides).__name__}", hint=hint
        )
    if risk is not None and not isinstance(risk, str | os.PathLike | bytes):
        hint = "a file that `jacdiag backtest --write-risk` wrote"
        raise UsageError("risk is of the wrong type", got=f"type {type(risk).__name__}", hint=hint)
    table = _flat(tomllib.loads((_HERE / "thresholds.toml").read_text(encoding="utf-8")))
    for figure, value in (overrides or {}).items():
        for key in _keys_of(table, figure, value):
            inner = value.get(key[1], value) if key[1] in value else value
            table[key] = _overridden(table[key], ".".join(filter(None, key)), inner)
    return Thresholds(table, load_risk() if risk is None else load_risk(Path(os.fsdecode(risk))))


def _flat(data: Mapping[str, Any]) -> dict[tuple[str, str], Limits]:
    """Return the limits by figure and stratum; a stratum inherits what is no cut."""
    table: dict[tuple[str, str], Limits] = {}
    for figure, section in data.items():
        strata = {key: value for key, value in section.items() if isinstance(value, dict)}
        own = {key: value for key, value in section.items() if key not in strata}
        if any(cut in own for cut in CUTS):
            table[figure, ""] = Limits(**own)
        inherited = {key: value for key, value in own.items() if key not in CUTS}
        for stratum, limits in strata.items():
            table[figure, stratum] = Limits(**{**inherited, **limits})
    return table


def _keys_of(
    table: Mapping[tuple[str, str], Limits], figure: str, value: Any
) -> list[tuple[str, str]]:
    """Return which entries an override changes: some strata, or all of a figure."""
    # 1. Check the override.
    keys = [key for key in table if key[0] == figure]
    if not keys:
        known = ", ".join(sorted({known_figure for known_figure, _ in table}))
        raise UsageError(f"no threshold is called '{figure}'", hint=f"there are {known}")
    if not isinstance(value, Mapping):
        raise UsageError(
            f"the threshold '{figure}' must be a table",
            got=repr(value),
            hint=f"{figure} = {{ warning = 10 }}",
        )
    strata = [stratum for _, stratum in keys if stratum]
    known_names = {*CUTS, *(stratum for _, stratum in keys)}
    unknown = [name for name in value if name not in known_names]
    if unknown:
        known = ", ".join([*CUTS, *sorted(strata)])
        raise UsageError(f"the threshold '{figure}' has no '{unknown[0]}'", hint=f"it has {known}")

    # 2. A cut changes all strata; without one, only those that are named change.
    named = [(figure, stratum) for stratum in strata if stratum in value]
    has_cut = any(name in CUTS for name in value)
    return named if named and not has_cut else keys


def _overridden(limits: Limits, name: str, value: Mapping[str, Any]) -> Limits:
    """Return the limits with the cuts of an override.

    Raises:
        UsageError: A cut that does not exist, or that is no number; cuts that do not ascend.
    """
    cuts: dict[str, float] = {}
    for cut, number in value.items():
        if cut not in CUTS or not _is_number(number):
            raise UsageError(
                f"the threshold '{name}' cannot be set so",
                got=f"{cut} = {number!r}",
                hint="a number, as in warning = 10",
            )
        cuts[cut] = float(number)
    changed = replace(limits, **cuts, origin="user", source="given by the user", range="")  # type: ignore[arg-type]
    existing = [getattr(changed, cut) for cut in CUTS if getattr(changed, cut) is not None]
    if existing != sorted(existing):
        raise UsageError(
            f"the cuts of '{name}' must ascend",
            got=", ".join(f"{cut} {getattr(changed, cut)}" for cut in CUTS),
        )
    return changed


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return not math.isnan(value)


def load_healthy(width: int | None = None, placement: str | None = None) -> list[dict[str, Any]]:
    """Return the ladder of mainstream inits as measured.

    Each rung is {"name", "worst_branch_gain", "width", "layers"}.

    Only inits of one placement of the norms are compared with a model. A norm after the branch
    takes most of the branch's gain away again, so a branch norm of 100 is usual there and large in
    pre-norm.

    Args:
        width: of the model at hand; of each name, the rung nearest to it is returned. All of them
            if not given.
        placement: of the model at hand; only rungs with this placement are returned. All of them if
            not given.

    Returns:
        The rungs; none if no init with this placement was measured.

    Example:
        >>> [rung["name"] for rung in load_healthy(256, "sandwich")]
        ['Gemma 2']
        >>> load_healthy(256, "none")
        []
    """
    rungs = tomllib.loads((_HERE / "healthy.toml").read_text(encoding="utf-8")).get("rung", [])
    if placement is not None:
        rungs = [rung for rung in rungs if rung["placement"] == placement]
    if width is None:
        return rungs
    nearest: dict[str, dict[str, Any]] = {}
    for rung in rungs:
        other = nearest.get(rung["name"])
        if other is None or _apart(rung["width"], width) < _apart(other["width"], width):
            nearest[rung["name"]] = rung
    return list(nearest.values())


def _apart(a: int, b: int) -> float:
    return abs(math.log(a / b))
