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
from jacdiag.rules.grouping import group_by
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
    def named_cuts(self) -> dict[Level, float]:
        """The cuts that exist, by their level."""
        known: dict[Level, float] = {}
        for cut in CUTS:
            # A figure need not have all three.
            limit: float | None = getattr(self, cut)
            if limit is not None:
                known[cut] = limit

        return known

    @property
    def cuts(self) -> tuple[float, ...]:
        """The cuts that exist, in ascending order."""
        values = set(self.named_cuts.values())
        return tuple(sorted(values))

    def with_info_below_warning(self, factor: float) -> Limits:
        """Return these limits with an info so many times below the warning, if there is one."""
        if self.warning is None:
            return replace(self, info=None)

        return replace(self, info=self.warning / factor)

    def beyond(self, value: float) -> Level | None:
        """Return the highest cut that a value lies above; None for none, and for NaN.

        Args:
            value: in the unit of the cuts.
        """
        highest: Level | None = None

        # The cuts ascend.
        for cut, limit in self.named_cuts.items():
            if value > limit:
                highest = cut

        return highest


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

    def of_warnings(self) -> Thresholds:
        """Return the lowest cut of each figure from which on a rule is louder than an info.

        To decide these alone takes fewer products.
        """
        table = {}
        for key, limits in self.table.items():
            has_warning = limits.warning is not None
            error = None if has_warning else limits.error
            table[key] = replace(limits, info=None, error=error)
        return replace(self, table=table)

    def with_infos_below_warnings(self, factor: float) -> Thresholds:
        """Return the same cuts, with an info where a figure comes near a warning.

        Args:
            factor: above 1: how many times the info's cut is below the warning's.
        """
        table = {key: limits.with_info_below_warning(factor) for key, limits in self.table.items()}
        return replace(self, table=table)

    def without_infos(self, figure: str) -> Thresholds:
        """Return the same cuts, without the infos of a figure where it has warnings too.

        Args:
            figure: such as "branch_norm".
        """
        table = dict(self.table)
        for key, limits in self.table.items():
            name, _ = key
            has_warning = limits.warning is not None

            # An only cut decides whether a rule applies.
            if name == figure and has_warning:
                table[key] = replace(limits, info=None)
        return replace(self, table=table)

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Return plain cuts by "figure" or "figure.stratum", for a report."""
        table: dict[str, dict[str, float]] = {}
        for key, limits in self.table.items():
            table[_dotted(key)] = dict[str, float](limits.named_cuts.items())
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
    _check_types(overrides, risk)

    # 1. The thresholds that ship, then those of the user.
    table = _flat(tomllib.loads((_HERE / "thresholds.toml").read_text(encoding="utf-8")))
    if overrides is not None:
        for figure, value in overrides.items():
            _override(table, figure, value)

    # 2. The curves.
    curves = load_risk() if risk is None else load_risk(Path(os.fsdecode(risk)))
    return Thresholds(table, curves)


def _check_types(overrides: object, risk: object) -> None:
    """Raise UsageError if what a user gave is neither a table nor a file."""
    # 1. The thresholds.
    if overrides is not None and not isinstance(overrides, Mapping):
        hint = "a dict such as {'norm_gain': {'error': 30}}"
        raise UsageError(
            "thresholds are of the wrong type", got=f"type {type(overrides).__name__}", hint=hint
        )

    # 2. The curves.
    if risk is not None and not isinstance(risk, str | os.PathLike | bytes):
        hint = "a file that `jacdiag backtest --write-risk` wrote"
        raise UsageError("risk is of the wrong type", got=f"type {type(risk).__name__}", hint=hint)


def _override(table: dict[tuple[str, str], Limits], figure: str, value: Any) -> None:
    """Put the cuts of one override into a table.

    Args:
        table: the thresholds so far, by figure and stratum.
        figure: whose thresholds change.
        value: the cuts, or strata with their cuts.

    Raises:
        UsageError: the figure, a stratum or a cut does not exist, or a cut cannot be set so.
    """
    for key in _keys_of(table, figure, value):
        _, stratum = key
        cuts = value.get(stratum, value)
        table[key] = _overridden(table[key], _dotted(key), cuts)


def _flat(data: Mapping[str, Any]) -> dict[tuple[str, str], Limits]:
    """Return the limits by figure and stratum; a stratum inherits what is no cut."""
    table: dict[tuple[str, str], Limits] = {}
    for figure, section in data.items():
        for stratum, limits in _strata_of(section).items():
            table[figure, stratum] = limits

    return table


def _strata_of(section: Mapping[str, Any]) -> dict[str, Limits]:
    """Return the limits of one figure by stratum; "" for those of the figure itself."""
    # 1. Tables are strata, anything else is of the figure itself.
    tables = {key: value for key, value in section.items() if isinstance(value, dict)}
    own = {key: value for key, value in section.items() if key not in tables}

    # 2. A figure without a cut of its own has those of its strata alone.
    strata: dict[str, Limits] = {}
    has_cut = not own.keys().isdisjoint(CUTS)
    if has_cut:
        strata[""] = Limits(**own)

    # 3. Where the cuts come from holds for all strata.
    inherited = {key: value for key, value in own.items() if key not in CUTS}
    for stratum, table in tables.items():
        strata[stratum] = Limits(**{**inherited, **table})

    return strata


def _keys_of(
    table: Mapping[tuple[str, str], Limits], figure: str, value: Any
) -> list[tuple[str, str]]:
    """Return which entries an override changes: some strata, or all of a figure.

    Raises:
        UsageError: the figure, a stratum or a cut does not exist, or the override is no table.
    """
    # 1. The entries of the figure.
    keys_by_figure = group_by(table, _figure_of)
    if figure not in keys_by_figure:
        known = ", ".join(sorted(keys_by_figure))
        raise UsageError(f"no threshold is called '{figure}'", hint=f"there are {known}")

    # 2. The override must be about them.
    keys = keys_by_figure[figure]
    _check_override(figure, value, [stratum for _, stratum in keys])

    # 3. A cut changes all strata.
    has_cut = any(name in CUTS for name in value)
    if has_cut:
        return keys

    # 4. Without one, only those that are named change.
    named = [key for key in keys if _is_named_in(value, key)]
    return named or keys


def _figure_of(key: tuple[str, str]) -> str:
    figure, _ = key
    return figure


def _is_named_in(override: Mapping[str, Any], key: tuple[str, str]) -> bool:
    """Return whether an override names the stratum of an entry."""
    _, stratum = key
    return stratum != "" and stratum in override


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

    # The first name that is neither a cut nor a stratum.
    names_known = {*CUTS, *strata}
    for name in value:
        if name not in names_known:
            named_strata = sorted(filter(None, strata))
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
    # 1. The new cuts.
    cuts: dict[str, float] = {}
    for cut, number in value.items():
        _check_cut(name, cut, number)
        cuts[cut] = float(number)

    # 2. They must ascend together with those that ship.
    changed = replace(limits, **cuts, origin="user", source="given by the user", range="")
    existing = list(changed.named_cuts.values())
    if existing != sorted(existing):
        all_cuts = {cut: getattr(changed, cut) for cut in CUTS}
        listed = ", ".join(f"{cut} {number}" for cut, number in all_cuts.items())
        raise UsageError(f"the cuts of '{name}' must ascend", got=listed)
    return changed


def _check_cut(name: str, cut: str, number: object) -> None:
    """Raise UsageError unless an entry of an override is a cut with a number."""
    if cut in CUTS and _is_number(number):
        return

    raise UsageError(
        f"the threshold '{name}' cannot be set so",
        got=f"{cut} = {number!r}",
        hint="a number, as in warning = 10",
    )


def _is_number(value: Any) -> bool:
    """Return whether a value is a number other than NaN; True and False are none."""
    if isinstance(value, bool):
        return False

    if not isinstance(value, int | float):
        return False

    # NaN compares with nothing.
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

    # 2. Of each name the nearest width; the first of two that are as near.
    def distance(rung: Mapping[str, Any]) -> float:
        return _apart(rung["width"], width)

    by_name = group_by(rungs, lambda rung: rung["name"])
    return [min(of_name, key=distance) for of_name in by_name.values()]


def _apart(a: int, b: int) -> float:
    return abs(math.log(a / b))
