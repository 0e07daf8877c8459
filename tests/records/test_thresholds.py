"""The thresholds file: where each number comes from, what a user may change."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from jacdiag.errors import UsageError
from jacdiag.rules import thresholds
from jacdiag.rules.thresholds import load_healthy, load_thresholds

pytestmark = pytest.mark.check("records")

ROOT = Path(__file__).parents[2]
TOML = Path(thresholds.__file__).parent / "thresholds.toml"


def test_every_number_says_where_it_comes_from() -> None:
    for key, limits in load_thresholds().table.items():
        assert limits.cuts, key
        assert limits.origin in ("derived", "published", "calibrated", "convention"), key
        assert limits.source and limits.range, key
        assert list(limits.cuts) == sorted(limits.cuts), key


def test_calibrated_numbers_are_those_of_the_measurement() -> None:
    cuts = json.loads((ROOT / "benchmarks" / "results" / "calibration.json").read_text())["cuts"]
    table = load_thresholds()
    for name, values in cuts.items():
        figure, _, stratum = name.partition(".")
        for cut in ("info", "warning"):
            given = getattr(table.limits(figure, stratum), cut)
            assert given == pytest.approx(values[cut], rel=0.02), (name, cut)


def test_the_ladder_is_that_of_the_measurement() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "ladder.json").read_text())
    assert [(r["name"], r["width"], r["worst_branch_gain"]) for r in load_healthy()] == [
        (r["name"], r["width"], r["worst_branch_gain"]) for r in measured
    ]
    near = load_healthy(width=500)
    assert len(near) == len({r["name"] for r in measured}) and {r["width"] for r in near} == {512}


def test_a_ladder_has_one_placement() -> None:
    assert {r["name"] for r in load_healthy(256, "reordered")} == {"OLMo 2"}
    assert {r["placement"] for r in load_healthy(256, "pre")} == {"pre"} and len(
        load_healthy(256, "pre")
    ) > 4
    assert load_healthy(256, "none") == []


@pytest.mark.parametrize("placement", ["post", "sandwich", "reordered"])
def test_a_placement_without_recipes_is_worth_an_info_at_three_times_the_ladder(
    placement: str,
) -> None:
    rungs = json.loads((ROOT / "benchmarks" / "results" / "ladder.json").read_text())
    largest = max(r["worst_branch_gain"] for r in rungs if r["placement"] == placement)
    limits = load_thresholds().limits("branch_norm", placement)
    assert limits.info == pytest.approx(3 * largest, rel=0.02) and limits.warning is None


@pytest.mark.parametrize(
    ("figure", "state"),
    [("checkpoint_growth", "earlier trained"), ("growth_from_init", "earlier at init")],
)
def test_growth_is_cut_between_healthy_and_wrecked_runs(figure: str, state: str) -> None:
    data = json.loads((ROOT / "benchmarks" / "results" / "growth.json").read_text())["calibration"]
    limits = {
        name: load_thresholds().limits(figure, name)
        for name in ("pre", "post", "sandwich", "reordered", "none")
    }
    for placement in ("pre", "post"):
        healthy, wrecked = (
            data[f"{placement}, {state}"][key] for key in ("healthy_max", "wrecked_min")
        )
        assert limits[placement].info == pytest.approx(
            healthy * (wrecked / healthy) ** (1 / 3), rel=0.01
        )
        assert limits[placement].warning == pytest.approx(
            healthy * (wrecked / healthy) ** (2 / 3), rel=0.01
        )
    largest = max(entry["healthy_max"] for entry in data.values())
    for placement in ("sandwich", "reordered", "none"):
        # Healthy and wrecked runs overlap, or no wrecked one stayed finite: no growth is known to
        # be healthy.
        wrecked = data[f"{placement}, {state}"]["wrecked_min"]
        assert wrecked is None or wrecked < data[f"{placement}, {state}"]["healthy_max"]
        assert limits[placement].info is None and limits[placement].warning == pytest.approx(
            3 * largest, rel=0.01
        )


def test_no_threshold_is_an_error_by_itself_but_a_chance() -> None:
    """A chance is calibrated for the given learning rate, and absent elsewhere."""
    data = tomllib.loads(TOML.read_text(encoding="utf-8"))
    assert data.pop("risk")["error"] == 0.5
    assert "error =" not in str(data) and not any("error" in section for section in data.values())
    assert not any(
        "error" in s for section in data.values() for s in section.values() if isinstance(s, dict)
    )


def test_a_user_may_set_a_figure_or_one_stratum() -> None:
    table = load_thresholds({"norm_gain": {"error": 99}, "branch_norm": {"post": {"warning": 7}}})
    assert table.limits("norm_gain").error == 99.0 and table.limits("norm_gain").origin == "user"
    assert table.limits("branch_norm", "post").warning == 7.0
    assert table.limits("branch_norm", "pre") == load_thresholds().limits("branch_norm", "pre")


@pytest.mark.parametrize(
    "bad",
    [
        {"norm_gian": {"warning": 1}},
        {"norm_gain": 5},
        {"norm_gain": {"warn": 5}},
        {"norm_gain": {"warning": "5"}},
        {"norm_gain": {"warning": float("nan")}},
        {"norm_gain": {"warning": True}},
        {"branch_norm": {"prenorm": {"warning": 5}}},
        {"norm_gain": {"info": 50, "warning": 5}},
    ],
)
def test_bad_thresholds_are_refused(bad: dict) -> None:
    with pytest.raises(UsageError):
        load_thresholds(bad)
