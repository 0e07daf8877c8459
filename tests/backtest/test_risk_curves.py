"""Curves of the chance against chances that were chosen, and against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import norm

from jacdiag.backtest.risk_fit import fit
from jacdiag.errors import UsageError
from jacdiag.records.risk import RiskCurve, RiskTable, Z
from jacdiag.records.risk import logistic as plain_logistic
from jacdiag.rules.risk_curves import load_risk, risk_toml

TRUE = np.array([6.0, 1.5, 2.0])


def drawn(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    figure, lr = np.exp(draw.normal(size=count)), 10 ** draw.uniform(-3, 0, size=count)
    chance = expit(TRUE[0] + TRUE[1] * np.log(figure) + TRUE[2] * np.log(lr))
    return figure, lr, draw.random(count) < chance


def test_fit_recovers_coefficients_and_their_covariance() -> None:
    figure, lr, bad = drawn(4000)
    curve = fit(figure, lr, bad, range(4000), times=60)
    assert curve is not None
    spread = np.sqrt(np.diag(curve.covariance))
    assert np.all(np.abs(curve.coefficients - TRUE) < 4 * spread) and np.all(spread < 0.2 * TRUE)
    # The usual large-sample covariance, (X' W X)^-1.
    X = np.stack([np.ones(4000), np.log(figure), np.log(lr)], axis=1)
    p = expit(X @ TRUE)
    theory = np.sqrt(np.diag(np.linalg.inv(X.T @ (X * (p * (1 - p))[:, None]))))
    assert spread == pytest.approx(theory, rel=0.4)


def test_runs_that_are_separated_give_a_finite_curve() -> None:
    lr = np.array([1e-3, 1e-2, 1e-1, 1.0])
    curve = fit(np.ones(4), lr, lr > 0.05, range(4), times=0)
    assert (
        curve is not None
        and np.all(np.isfinite(curve.coefficients))
        and curve.coefficients[1] == 0.0
    )
    chances = curve.chances(np.ones(4), lr)
    assert np.all(np.diff(chances) > 0) and chances[1] < 0.5 < chances[2]


def test_no_slope_is_below_nothing() -> None:
    figure, lr, bad = drawn(500)
    curve = fit(1 / figure, lr, bad, range(500), times=0)
    assert curve is not None and curve.coefficients[1] == pytest.approx(0.0, abs=1e-9)


def test_the_warm_up_enters_where_runs_differ_in_it() -> None:
    figure, lr, _ = drawn(4000)
    draw = np.random.default_rng(1)
    warmup = 10 ** draw.uniform(1, 3, size=4000)
    bad = draw.random(4000) < expit(
        TRUE[0] + TRUE[1] * np.log(figure) + TRUE[2] * np.log(lr) - 0.8 * np.log(warmup)
    )
    curve = fit(figure, lr, bad, range(4000), warmup=warmup, times=40)
    assert curve is not None and curve.covariance.shape == (4, 4)
    assert np.all(
        np.abs(curve.coefficients - [*TRUE, -0.8]) < 4 * np.sqrt(np.diag(curve.covariance))
    )
    longer = curve.chances(figure, lr, 2 * warmup)
    assert (
        np.all(longer < curve.chances(figure, lr, warmup))
        and np.isnan(curve.chances(figure, lr)).all()
    )
    kept = RiskCurve("pre", "f", curve.coefficients.tolist(), curve.covariance.tolist(), {}, 1, 1)
    assert kept.by_warmup and kept.chance(figure[0], lr[0], warmup[0])[0] == pytest.approx(
        curve.chances(figure, lr, warmup)[0]
    )


@pytest.mark.parametrize(
    "warmup", [np.full(500, 20.0), np.where(np.arange(500) == 3, np.nan, np.arange(500.0))]
)
def test_a_warm_up_that_is_always_the_same_or_not_always_known_does_not_enter(
    warmup: np.ndarray,
) -> None:
    figure, lr, bad = drawn(500)
    curve, plain = (fit(figure, lr, bad, range(500), warmup=w, times=0) for w in (warmup, None))
    assert (
        curve is not None
        and plain is not None
        and np.array_equal(curve.coefficients, plain.coefficients)
    )


def test_a_shorter_warm_up_is_never_better() -> None:
    figure, lr, bad = drawn(500)
    curve = fit(figure, lr, bad, range(500), warmup=np.where(bad, 500.0, 5.0), times=0)
    assert curve is not None and curve.coefficients[3] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("bad", [[True, True], [False, False]])
def test_one_class_alone_fits_nothing(bad: list[bool]) -> None:
    assert fit(np.ones(2), np.ones(2), np.array(bad), range(2)) is None


def test_what_was_not_measured_has_no_chance() -> None:
    figure, lr, bad = drawn(200)
    figure[:3] = math.nan, 0.0, -1.0
    curve = fit(figure, lr, bad, range(200), times=0)
    assert curve is not None
    assert (
        np.isnan(curve.chances(figure, lr)[:3]).all()
        and not np.isnan(curve.chances(figure, lr)[3:]).any()
    )


@given(st.floats(-800, 800))
def test_the_logistic_does_not_overflow(x: float) -> None:
    assert plain_logistic(x) == pytest.approx((1 + math.tanh(x / 2)) / 2, abs=1e-15)


# -- as it is kept ---------------------------------------------------------------------------------
CURVE = RiskCurve(
    "pre",
    "mean branch norm",
    [6.0, 1.5, 2.0],
    [[0.5, 0.1, 0.0], [0.1, 0.2, 0.0], [0.0, 0.0, 0.1]],
    {"figure": [0.5, 40.0], "lr": [1e-3, 0.25], "width": [32.0, 128.0]},
    120,
    40,
    'a "lab"',
)


def test_a_chance_has_the_interval_of_its_covariance() -> None:
    chance, lower, upper = CURVE.chance(3.0, 0.01)
    x = np.array([1.0, math.log(3.0), math.log(0.01)])
    middle, half = (
        x @ np.array(CURVE.coefficients),
        norm.ppf(0.975) * math.sqrt(x @ np.array(CURVE.covariance) @ x),
    )
    assert pytest.approx(Z, abs=1e-6) == norm.ppf(0.975)
    assert (chance, lower, upper) == pytest.approx(
        tuple(expit([middle, middle - half, middle + half])), rel=1e-6
    )


def test_curves_are_read_as_they_were_risk_toml(tmp_path: Path) -> None:
    table = RiskTable({"pre": CURVE}, {"runs": 120, "held_out_seed_auroc": 0.91})
    path = tmp_path / "risk.toml"
    path.write_text(risk_toml(table), encoding="utf-8")
    assert load_risk(path) == table


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("curve = 3", "cannot read the curves"),
        ("[curve.pre]\nfigure = 'mean branch norm'", "cannot read the curves"),
        ("not toml", "cannot read the curves"),
        (
            risk_toml(RiskTable({"pre": CURVE})).replace("mean branch norm", "the weather"),
            "unknown figure",
        ),
        ("x = 1", "holds no curve"),
        ("", "holds no curve"),
        (risk_toml(RiskTable()), "holds no curve"),
        *(
            (
                risk_toml(RiskTable({"pre": replace(CURVE, ranges={**CURVE.ranges, name: span})})),
                f"ranges.{name} of",
            )
            for name, span in (
                ("figure", [0.0, 40.0]),
                ("figure", [-1.0, 40.0]),
                ("lr", [0.0, 0.1]),
                ("lr", [0.1, 0.01]),
                ("lr", [0.1]),
            )
        ),
        *(
            (risk_toml(RiskTable({"pre": replace(CURVE, **changed)})), "do not belong together")
            for changed in (
                {"covariance": CURVE.covariance[:-1]},
                {"covariance": [row[:-1] for row in CURVE.covariance]},
                {"coefficients": CURVE.coefficients[:2]},
            )
        ),
        (
            risk_toml(RiskTable({"pre": replace(CURVE, ranges={"lr": [0.1, 0.2]})})),
            "ranges.figure of .* is None",
        ),
    ],
)
def test_files_that_hold_no_curves_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "risk.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        load_risk(path)


def test_the_curves_that_ship_can_be_read() -> None:
    for placement, curve in load_risk().curves.items():
        assert curve.placement == placement and curve.by_warmup and curve.source
        assert len(curve.coefficients) == len(curve.covariance) == 4
        assert min(curve.coefficients[1:3]) >= 0 >= curve.coefficients[3]
        assert np.all(np.linalg.eigvalsh(np.array(curve.covariance)) > -1e-9)
