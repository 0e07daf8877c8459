"""Read and write the curves of the chance that a run goes wrong at a learning rate.

`risk.toml` holds one curve per placement of the norm. `jacdiag backtest RUN... --write-risk FILE`
writes such a file. A curve is

    chance = 1 / (1 + exp(-(a + b ln(figure) + c ln(lr) + d ln(warmup))))

The last term is left out if the runs did not differ in their warm-up. With each curve come the
covariance of (a, b, c, d) over resampled inits and the ranges that the runs spanned. Outside these
ranges there is no chance, and the report names the range.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from jacdiag.errors import UsageError, one_line
from jacdiag.records.risk import RiskCurve, RiskTable
from jacdiag.rules.risk_features import INIT

_HERE = Path(__file__).parent
_COEFFICIENTS = (3, 4)  # without and with the warm-up
_WRITTEN = "jacdiag backtest RUN... --write-risk FILE writes one"


def load_risk(path: Path = _HERE / "risk.toml") -> RiskTable:
    """Read the curves that ship with jacdiag, or a user's own.

    Raises:
        UsageError: the file cannot be read, holds no curve, or one in a figure or over a range that
            has no meaning.
    """
    # 1. Read the file.
    try:
        data = tomllib.loads(_text_of(path))
        curves = _curves_of(data)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"cannot read the curves '{path}'", got=one_line(error), hint=_WRITTEN
        ) from error

    # 2. Check what it holds.
    if not curves:
        raise UsageError(
            f"'{path}' holds no curve", got="no table [curve.PLACEMENT] in it", hint=_WRITTEN
        )
    for curve in curves.values():
        _check(curve, path)

    return RiskTable(curves, data.get("about", {}))


def _text_of(path: Path) -> str:
    """Return the text of a TOML file.

    Raises:
        ValueError: it begins with a byte order mark, which TOML does not allow.
    """
    text = path.read_text(encoding="utf-8")
    if text.startswith("\ufeff"):
        raise ValueError("a byte order mark (BOM) at its beginning: save it as UTF-8 without BOM")
    return text


def _curves_of(data: dict[str, Any]) -> dict[str, RiskCurve]:
    """Return the curves of a file by the placement of the norm."""
    curves: dict[str, RiskCurve] = {}
    for placement, table in data.get("curve", {}).items():
        curves[placement] = RiskCurve.from_dict({"placement": placement, **table})
    return curves


def _check(curve: RiskCurve, path: Path) -> None:
    """Raise UsageError if a curve cannot be evaluated."""
    if curve.figure not in INIT:
        raise UsageError(
            f"'{path}' has a curve in an unknown figure", got=curve.figure, hint=_WRITTEN
        )

    _check_coefficients(curve, path)

    # A curve takes the logarithm of both.
    for name in ("figure", "lr"):
        _check_range(curve, name, path)


def _check_coefficients(curve: RiskCurve, path: Path) -> None:
    """Raise UsageError unless the coefficients have a covariance of their size."""
    count = len(curve.coefficients)
    sizes = [len(row) for row in curve.covariance]
    if count in _COEFFICIENTS and sizes == [count] * count:
        return

    raise UsageError(
        f"'{path}' has a curve whose numbers do not belong together",
        got=f"[curve.{curve.placement}] has {count} coefficients and rows of {sizes} covariances",
        hint=f"3 coefficients, or 4 with the warm-up, and as many rows of as many; {_WRITTEN}",
    )


def _check_range(curve: RiskCurve, name: str, path: Path) -> None:
    """Raise UsageError unless a range is two numbers above 0."""
    span = curve.ranges.get(name)
    if _is_range(span):
        return

    raise UsageError(
        f"'{path}' has a curve over an impossible range",
        got=f"ranges.{name} of [curve.{curve.placement}] is {span}",
        hint=f"two numbers above 0, the least first; {_WRITTEN}",
    )


def _is_range(span: object) -> bool:
    """Return whether something is two numbers above 0, the least first."""
    if not isinstance(span, list) or len(span) != 2:
        return False

    # A file may hold anything.
    are_numbers = all(isinstance(end, int | float) for end in span)
    return are_numbers and 0 < span[0] <= span[1]


def risk_toml(table: RiskTable) -> str:
    """Return the table as TOML, for `load_risk`."""
    # 1. Where the curves come from.
    lines = [
        (
            "# The chance that a run goes wrong, by placement of the norm. From jacdiag backtest "
            "--write-risk."
        ),
        "",
        "[about]",
    ]
    for key, value in table.about.items():
        lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}")

    # 2. Each curve.
    for placement, curve in table.curves.items():
        lines += ["", f"[curve.{json.dumps(placement)}]", *_lines_of(curve)]
    return "\n".join(lines) + "\n"


def _lines_of(curve: RiskCurve) -> list[str]:
    """Return the entries of one curve as TOML, its ranges last."""
    lines: list[str] = []

    # The placement is the name of the table.
    for key, value in curve.to_dict().items():
        if key not in ("placement", "ranges"):
            lines.append(f"{key} = {_toml(value)}")
    for name, span in curve.ranges.items():
        lines.append(f"ranges.{name} = {_toml(span)}")

    return lines


def _toml(value: Any) -> str:
    """Return a number, a text or a list of them as TOML."""
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if not isinstance(value, float):
        return json.dumps(value, ensure_ascii=False)

    # Six digits are more than any of them is known to.
    short = f"{value:.6g}"

    # TOML tells floats by their point.
    is_float = "." in short or "e" in short
    if is_float:
        return short
    return f"{short}.0"
