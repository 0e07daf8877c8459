"""Formulas: values against Python's own arithmetic, and everything that is none."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jacdiag.errors import UsageError
from jacdiag.rules.init.formula import Formula

VALUES = {"N": 12.0, "d": 768.0, "fan_in": 3072.0, "l": 3.0}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.02", 0.02),
        ("0.02/sqrt(2*N)", 0.02 / math.sqrt(24)),
        ("(8*N)^(-1/4)", 96**-0.25),
        ("2**3**2", 512.0),
        ("-2^2", -4.0),
        ("2^-1", 0.5),
        ("8/4/2", 1.0),
        ("1 - 2 - 3", -4.0),
        ("max(1, min(d, 4), 2)", 4.0),
        ("1e-3*exp(0) + log(1)", 1e-3),
        (".5*l", 1.5),
        ("--1", 1.0),
        ("+fan_in", 3072.0),
    ],
)
def test_formula_values_equal_python_arithmetic(text: str, value: float) -> None:
    assert Formula.read(text).value(VALUES) == pytest.approx(value, rel=1e-15)


numbers = st.floats(0.1, 10).map(lambda x: f"{x:.3f}")
terms = st.recursive(
    numbers | st.sampled_from(sorted(VALUES)),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        inner.map(lambda t: f"sqrt(({t})*({t}))"),
        inner.map(lambda t: f"-{t}"),
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(terms)
def test_as_python_computes_it(text: str) -> None:
    if len(text) > 200:
        return
    try:
        # of our own making, in a test
        truth = eval(text, {"__builtins__": {}}, {**VALUES, "sqrt": math.sqrt})
    except (ZeroDivisionError, OverflowError, ValueError):
        assert Formula.read(text).value(VALUES) is None
        return
    found = Formula.read(text).value(VALUES)
    assert (
        found is None
        if not math.isfinite(truth)
        else found == pytest.approx(truth, rel=1e-12, abs=1e-12)
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "1 +",
        "(1",
        "1)",
        "sqrt()",
        "sqrt(1, 2)",
        "max(1)",
        "os.system('x')",
        "__import__('os')",
        "1; 2",
        "N N",
        "2(3)",
        "a b",
        "lambda: 1",
        "[1]",
        "'x'",
        "1 if 1 else 2",
        "open(1)",
        "N.real",
        "((((" * 20 + "1",
        "(" * 60 + "1" + ")" * 60,
        "1" + "+1" * 200,
        "2^" * 60 + "2",
    ],
)
def test_what_is_no_formula(text: str) -> None:
    with pytest.raises(UsageError):
        Formula.read(text)


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=250))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(UsageError):
        Formula.read(text).value(VALUES)


def test_the_message_points_at_the_place() -> None:
    with pytest.raises(UsageError) as refused:
        Formula.read("0.02/sqrt(2*N")
    assert refused.value.got == "0.02/sqrt(2*N\n             ^ a closing bracket is missing"
    with pytest.raises(UsageError, match="uses 'n_layer'"):
        Formula.read("0.02/n_layer").check({"N": 1})


@pytest.mark.parametrize(
    "text", ["1/0", "log(0)", "sqrt(-1)", "10^400", "(-1)^0.5", "exp(1000)", "fan_out"]
)
def test_formula_without_a_finite_value_is_none(text: str) -> None:
    assert Formula.read(text).value(VALUES) is None
