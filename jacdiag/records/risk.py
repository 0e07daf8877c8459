"""The chance that a run goes wrong at a learning rate, given its audit: fitted on recorded runs,
absent beyond them.

`risk.toml` holds one curve per placement of the norm, written by `jacdiag backtest RUN...
--write-risk FILE`:

    chance = 1 / (1 + exp(-(a + b ln(figure) + c ln(lr) + d ln(warmup))))

without the last where the runs did not differ in their warm-up, with the covariance of (a, b, c, d)
over resampled inits, and the ranges that the runs spanned. Outside of any of them there is no
chance, and the report says which one.
"""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jacdiag.errors import UsageError, one_line
from jacdiag.records.base import Record
from jacdiag.rules.risk_features import INIT

_HERE = Path(__file__).parent
_WRITTEN = "jacdiag backtest RUN... --write-risk FILE writes one"
Z = 1.959964  # of a 95% interval


@dataclass(frozen=True)
class Risk(Record):
    """The chance that a run at the planned learning rate goes wrong, as recorded runs tell it.

    Attributes:
        chance: None where the audit lies outside of what was recorded; `reason` says in what.
        lower, upper: 95%, over resampled inits.
        figure, value: the figure of the untrained model that it rests on.
        lr: the planned peak.
        range: what was recorded.
        source: the experiment.
    """

    chance: float | None = None
    lower: float | None = None
    upper: float | None = None
    figure: str = ""
    value: float | None = None
    lr: float | None = None
    range: str = ""
    source: str = ""
    reason: str = ""

    def __str__(self) -> str:
        """ "31% [18%, 47%]", or why there is none."""
        if self.chance is None or self.lower is None or self.upper is None:
            return self.reason
        return f"{self.chance:.0%} [{self.lower:.0%}, {self.upper:.0%}]"


@dataclass(frozen=True)
class RiskCurve(Record):
    """The chance for one placement, as a function of one figure of the untrained model, the peak
    rate and the warm-up.

    Attributes:
        figure: its name in `jacdiag.rules.risk_features`.
        coefficients: of 1, ln figure, ln lr and, where the runs differed in it, ln of the steps of
            warm-up.
        covariance: of these, over resampled inits.
        ranges: "figure", "lr", "warmup", "width", "layers", "clip", "beta2" -> [least, most] of the
            runs. Without an entry nothing is asked of that factor.
        runs, bad: how many there were, and how many went wrong.
        source: the experiment.
    """

    placement: str
    figure: str
    coefficients: list[float]
    covariance: list[list[float]]
    ranges: dict[str, list[float]]
    runs: int
    bad: int
    source: str = ""

    @property
    def by_warmup(self) -> bool:
        """Whether the chance hangs on the warm-up."""
        return len(self.coefficients) > 3

    def chance(
        self, figure: float, lr: float, warmup: float | None = None
    ) -> tuple[float, float, float]:
        """The chance and the ends of its 95% interval.

        Args:
            figure, lr: both above 0.
            warmup: steps; only asked for where the chance hangs on it.
        """
        steps = (math.log(max(warmup, 1.0)),) if self.by_warmup and warmup is not None else ()
        point = (1.0, math.log(figure), math.log(lr), *steps)
        middle = sum(c * x for c, x in zip(self.coefficients, point, strict=True))
        variance = sum(
            a * b * self.covariance[i][k] for i, a in enumerate(point) for k, b in enumerate(point)
        )
        half = Z * math.sqrt(max(variance, 0.0))
        return logistic(middle), logistic(middle - half), logistic(middle + half)


@dataclass(frozen=True)
class RiskTable(Record):
    """All curves, by placement; `about` says where they come from and how far they were tested."""

    curves: dict[str, RiskCurve] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def logistic(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def load_risk(path: Path = _HERE / "risk.toml") -> RiskTable:
    """Reads the curves that ship with jacdiag, or a user's own.

    Raises:
        UsageError: the file cannot be read, holds no curve, or one in a figure or over a range that
            has no meaning.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith("\ufeff"):
            raise ValueError(
                "a byte order mark (BOM) at its beginning: save it as UTF-8 without BOM"
            )
        data = tomllib.loads(text)
        curves = {
            k: RiskCurve.from_dict({"placement": k, **table})
            for k, table in data.get("curve", {}).items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"cannot read the curves '{path}'", got=one_line(error), hint=_WRITTEN
        ) from error
    if not curves:
        raise UsageError(
            f"'{path}' holds no curve", got="no table [curve.PLACEMENT] in it", hint=_WRITTEN
        )
    for curve in curves.values():
        _check(curve, path)
    return RiskTable(curves, data.get("about", {}))


def _check(curve: RiskCurve, path: Path) -> None:
    if curve.figure not in INIT:
        raise UsageError(
            f"'{path}' has a curve in an unknown figure", got=curve.figure, hint=_WRITTEN
        )
    for name in ("figure", "lr"):  # a curve takes the logarithm of both
        span = curve.ranges.get(name)
        pair = (
            isinstance(span, list)
            and len(span) == 2
            and all(isinstance(end, int | float) for end in span)
        )
        if span is None or not pair or not 0 < span[0] <= span[1]:
            where = f"ranges.{name} of [curve.{curve.placement}]"
            raise UsageError(
                f"'{path}' has a curve over an impossible range",
                got=f"{where} is {span}",
                hint=f"two numbers above 0, the least first; {_WRITTEN}",
            )


def written(table: RiskTable) -> str:
    """The table as TOML, for `load_risk`."""
    lines = [
        (
            "# The chance that a run goes wrong, by placement of the norm. From jacdiag backtest "
            "--write-risk."
        ),
        "",
    ]
    lines += [
        "[about]",
        *(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.about.items()),
    ]
    for name, curve in table.curves.items():
        lines += ["", f"[curve.{json.dumps(name)}]"]
        values = {k: v for k, v in curve.to_dict().items() if k not in ("placement", "ranges")}
        lines += [f"{key} = {_toml(value)}" for key, value in values.items()]
        lines += [f"ranges.{key} = {_toml(value)}" for key, value in curve.ranges.items()]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """Numbers, texts and lists of them; six digits are more than any of them is known to."""
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float):
        short = f"{value:.6g}"
        return short if "." in short or "e" in short else f"{short}.0"
    return json.dumps(value, ensure_ascii=False)
