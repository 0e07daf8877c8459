"""Layers in a sentence: all that are meant, and no other."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rules.reports import SCALE, findings, gain, healthy, judged, narrow

from jacdiag.rules.wording import name_layers

pytestmark = pytest.mark.check("rules")


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([0], "layer 0"),
        ([5, 4], "layers 4 and 5"),
        ([1, 2, 3], "layers 1 to 3"),
        ([0, 2, 3, 4, 6], "layers 0, 2 to 4 and 6"),
        (list(range(0, 20, 2)), "layers 0, 2, 4, 6, 8, 10 and 4 more"),
    ],
)
def test_neighbours_are_joined_and_a_long_list_is_counted(layers: list[int], words: str) -> None:
    assert name_layers(layers) == words


@given(layers=st.sets(st.integers(0, 30), min_size=1))
def test_the_words_name_exactly_the_layers(layers: set[int]) -> None:
    words = name_layers(layers)
    words, _, beyond = (
        words.partition(" more")[0].rpartition(" and ") if "more" in words else (words, "", "0")
    )
    named: set[int] = set()
    for first, last in re.findall(r"(\d+)(?: to (\d+))?", words):
        named.update(range(int(first), int(last or first) + 1))
    assert named <= layers
    assert len(named) + int(beyond) == len(layers)


def test_a_finding_says_in_which_layers_and_of_how_many() -> None:
    rows = healthy()
    rows[0] = replace(rows[0], norm_gain=gain(20.0))
    [one] = findings(judged(rows), "JD102")
    assert "in layer 0 (of 2)" in one.what and "(target: about 1; " in one.what
    everywhere = [replace(row, norm_gain=gain(20.0)) for row in healthy()]
    [all_of_them] = findings(judged(everywhere), "JD102")
    assert "in all 2 layers" in all_of_them.what


def test_a_condition_that_is_partly_met_says_so_and_one_that_is_not_does_not() -> None:
    rows = healthy()
    rows[1] = replace(rows[1], core_norm=narrow(3.0 / SCALE))
    [partly] = findings(judged(rows), "JD101")
    assert partly.what.startswith("partly met in layer 0 (of 2): core norm times √(2N) is ")
    rows[1] = replace(rows[1], core_norm=narrow(9.0 / SCALE))
    [unmet] = findings(judged(rows), "JD101")
    assert "partly met" not in unmet.what and "(not met above 4.00)" in unmet.what
