"""The numbers that rules compare with, read from `thresholds.toml`, and the ladder of mainstream
inits.
"""

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
    """Where a figure begins to be worth an info, a warning, an error; None where there is no such
    cut.

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
    """Limits by figure and stratum, such as ("branch_norm", "pre"), and the curves of the chance at
    a learning rate.
    """

    table: Mapping[tuple[str, str], Limits]
    risk: RiskTable = field(default_factory=RiskTable)

    def limits(self, figure: str, stratum: str = "") -> Limits:
        """Returns the limits of a stratum, else those of the figure as a whole, else empty ones.

        Args:
            figure: such as "core_norm".
            stratum: a kind of sub-layer or a placement, as the figure asks for.
        """
        return self.table.get((figure, stratum)) or self.table.get((figure, "")) or Limits()

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Plain cuts by "figure" or "figure.stratum", for a report."""
        return {
            ".".join(part for part in key if part): {
                c: v for c in CUTS if (v := getattr(limits, c)) is not None
            }
            for key, limits in self.table.items()
        }


def load_thresholds(
    overrides: Mapping[str, Any] | None = None, risk: str | os.PathLike[str] | None = None
) -> Thresholds:
    """Reads the thresholds that ship, with a user's own on top.

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
    table: dict[tuple[str, str], Limits] = {}
    for figure, section in data.items():
        strata = {k: v for k, v in section.items() if isinstance(v, dict)}
        own = {k: v for k, v in section.items() if not isinstance(v, dict)}
        if any(cut in own for cut in CUTS):
            table[figure, ""] = Limits(**own)
        for stratum, limits in strata.items():
            table[figure, stratum] = Limits(
                **{**{k: v for k, v in own.items() if k not in CUTS}, **limits}
            )
    return table


def _keys_of(
    table: Mapping[tuple[str, str], Limits], figure: str, value: Any
) -> list[tuple[str, str]]:
    """Which entries an override speaks of: one stratum, or all of a figure."""
    keys = [key for key in table if key[0] == figure]
    if not keys:
        raise UsageError(
            f"no threshold is called '{figure}'",
            hint=f"there are {', '.join(sorted({k[0] for k in table}))}",
        )
    if not isinstance(value, Mapping):
        raise UsageError(
            f"the threshold '{figure}' must be a table",
            got=repr(value),
            hint=f"{figure} = {{ warning = 10 }}",
        )
    strata = [key for key in keys if key[1] in value and key[1]]
    unknown = [k for k in value if k not in CUTS and k not in {key[1] for key in keys}]
    if unknown:
        known = ", ".join([*CUTS, *sorted(key[1] for key in keys if key[1])])
        raise UsageError(f"the threshold '{figure}' has no '{unknown[0]}'", hint=f"it has {known}")
    return strata if strata and not set(value) & set(CUTS) else keys


def _overridden(limits: Limits, name: str, value: Mapping[str, Any]) -> Limits:
    cuts: dict[str, float] = {}
    for cut, number in value.items():
        if (
            cut not in CUTS
            or isinstance(number, bool)
            or not isinstance(number, int | float)
            or math.isnan(number)
        ):
            raise UsageError(
                f"the threshold '{name}' cannot be set so",
                got=f"{cut} = {number!r}",
                hint="a number, as in warning = 10",
            )
        cuts[cut] = float(number)
    made = replace(limits, **cuts, origin="user", source="given by the user", range="")  # type: ignore[arg-type]
    given = [getattr(made, cut) for cut in CUTS if getattr(made, cut) is not None]
    if given != sorted(given):
        raise UsageError(
            f"the cuts of '{name}' must ascend",
            got=", ".join(f"{c} {getattr(made, c)}" for c in CUTS),
        )
    return made


def load_healthy(width: int | None = None, placement: str | None = None) -> list[dict[str, Any]]:
    """Return the ladder: mainstream inits as measured, {"name", "worst_branch_gain", "width",
    "layers"} each.

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
