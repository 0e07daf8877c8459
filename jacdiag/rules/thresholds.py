"""The numbers that rules compare with, and the ladder of mainstream inits."""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Mapping, Sequence
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
        known = set()
        for cut in (self.info, self.warning, self.error):
            if cut is not None:
                known.add(cut)
        return tuple(sorted(known))


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
            cuts: dict[str, float] = {}
            for cut in CUTS:
                value = getattr(limits, cut)
                if value is not None:
                    cuts[cut] = value
            table[_dotted(key)] = cuts
        return table


def _dotted(key: tuple[str, str]) -> str:
    """Return the name of an entry: "figure", or "figure.stratum"."""
    figure, stratum = key
    if not stratum:
        return figure
    return f"{figure}.{stratum}"


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
    # 1. Check the types.
    if overrides is not None and not isinstance(overrides, Mapping):
        hint = "a dict such as {'norm_gain': {'error': 30}}"
        raise UsageError(
            "thresholds are of the wrong type", got=f"type {type(overrides).__name__}", hint=hint
        )
    if risk is not None and not isinstance(risk, str | os.PathLike | bytes):
        hint = "a file that `jacdiag backtest --write-risk` wrote"
        raise UsageError("risk is of the wrong type", got=f"type {type(risk).__name__}", hint=hint)

    # 2. The thresholds that ship, then those of the user.
    table = _flat(tomllib.loads((_HERE / "thresholds.toml").read_text(encoding="utf-8")))
    for figure, value in (overrides or {}).items():
        for key in _keys_of(table, figure, value):
            stratum = key[1]
            cuts = value.get(stratum, value)
            table[key] = _overridden(table[key], _dotted(key), cuts)

    # 3. The curves.
    curves = load_risk() if risk is None else load_risk(Path(os.fsdecode(risk)))
    return Thresholds(table, curves)


def _flat(data: Mapping[str, Any]) -> dict[tuple[str, str], Limits]:
    """Return the limits by figure and stratum; a stratum inherits what is no cut."""
    table: dict[tuple[str, str], Limits] = {}
    for figure, section in data.items():
        # 1. Tables are strata, anything else is of the figure itself.
        strata: dict[str, dict[str, Any]] = {}
        own: dict[str, Any] = {}
        inherited: dict[str, Any] = {}
        for key, value in section.items():
            if isinstance(value, dict):
                strata[key] = value
                continue
            own[key] = value
            if key not in CUTS:
                inherited[key] = value

        # 2. A figure without a cut of its own has those of its strata alone.
        if any(cut in own for cut in CUTS):
            table[figure, ""] = Limits(**own)
        for stratum, limits in strata.items():
            table[figure, stratum] = Limits(**{**inherited, **limits})
    return table


def _keys_of(
    table: Mapping[tuple[str, str], Limits], figure: str, value: Any
) -> list[tuple[str, str]]:
    """Return which entries an override changes: some strata, or all of a figure.

    Raises:
        UsageError: the figure, a stratum or a cut does not exist, or the override is no table.
    """
    keys = [key for key in table if key[0] == figure]
    if not keys:
        known = ", ".join(sorted({known_figure for known_figure, _ in table}))
        raise UsageError(f"no threshold is called '{figure}'", hint=f"there are {known}")
    strata = [stratum for _, stratum in keys]
    _check_override(figure, value, strata)

    # A cut changes all strata. Without one, only those that are named change.
    has_cut = any(name in CUTS for name in value)
    named = [(figure, stratum) for stratum in strata if stratum and stratum in value]
    if has_cut or not named:
        return keys
    return named


def _check_override(figure: str, value: Any, strata: Sequence[str]) -> None:
    """Raise unless an override is a table of cuts and strata that a figure has.

    Args:
        figure: its name.
        value: the override.
        strata: of the figure; "" for its own cuts.
    """
    if not isinstance(value, Mapping):
        raise UsageError(
            f"the threshold '{figure}' must be a table",
            got=repr(value),
            hint=f"{figure} = {{ warning = 10 }}",
        )

    names_known = {*CUTS, *strata}
    for name in value:
        if name in names_known:
            continue
        named_strata = sorted(stratum for stratum in strata if stratum)
        known = ", ".join([*CUTS, *named_strata])
        raise UsageError(f"the threshold '{figure}' has no '{name}'", hint=f"it has {known}")


def _overridden(limits: Limits, name: str, value: Mapping[str, Any]) -> Limits:
    """Return the limits with the cuts of an override.

    Args:
        limits: those that ship.
        name: of the entry, for errors.
        value: the new cuts.

    Raises:
        UsageError: A cut that does not exist, or that is no number; cuts that do not ascend.
    """
    # 1. Check the cuts.
    cuts: dict[str, float] = {}
    for cut, number in value.items():
        if cut not in CUTS or not _is_number(number):
            raise UsageError(
                f"the threshold '{name}' cannot be set so",
                got=f"{cut} = {number!r}",
                hint="a number, as in warning = 10",
            )
        cuts[cut] = float(number)

    # 2. They must ascend together with those that ship.
    changed = replace(limits, **cuts, origin="user", source="given by the user", range="")
    all_cuts = {cut: getattr(changed, cut) for cut in CUTS}
    existing = [number for number in all_cuts.values() if number is not None]
    if existing != sorted(existing):
        raise UsageError(
            f"the cuts of '{name}' must ascend",
            got=", ".join(f"{cut} {number}" for cut, number in all_cuts.items()),
        )
    return changed


def _is_number(value: Any) -> bool:
    """Return whether a value is a number other than NaN; True and False are none."""
    if isinstance(value, bool):
        return False
    if not isinstance(value, int | float):
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
    # 1. The rungs of the placement.
    ladder = tomllib.loads((_HERE / "healthy.toml").read_text(encoding="utf-8"))
    rungs: list[dict[str, Any]] = ladder.get("rung", [])
    if placement is not None:
        rungs = [rung for rung in rungs if rung["placement"] == placement]
    if width is None:
        return rungs

    # 2. Of each name the nearest width.
    nearest: dict[str, dict[str, Any]] = {}
    for rung in rungs:
        other = nearest.get(rung["name"])
        if other is None or _apart(rung["width"], width) < _apart(other["width"], width):
            nearest[rung["name"]] = rung
    return list(nearest.values())


def _apart(a: int, b: int) -> float:
    return abs(math.log(a / b))
