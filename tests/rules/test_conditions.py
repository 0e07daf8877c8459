"""JD101 to JD104 on records made by hand: one that must fire, one that must not, one on the
boundary.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from rules.reports import (
    LAYERS,
    LIMITS,
    SCALE,
    findings,
    gain,
    healthy,
    judged,
    narrow,
    report,
    status,
)

from jacdiag.records import (
    Conditions,
    Growth,
    Interval,
    JudgedSublayers,
    NetworkRecord,
    ProbeRecord,
    RemedyRecord,
    Report,
    Spread,
    StreamRange,
    SublayerRecord,
)
from jacdiag.records.number_format import spoken
from jacdiag.render.content.condition_panels import build_condition_panels
from jacdiag.render.content.remedies import effect
from jacdiag.render.content.sentences import headline
from jacdiag.render.content.verdict import verdict_lines
from jacdiag.render.formats.markdown import render
from jacdiag.rules import decision_points, evaluate, rule
from jacdiag.rules.finding_numbers import span
from jacdiag.rules.remedy_targets import outlook
from jacdiag.rules.thresholds import load_thresholds

pytestmark = pytest.mark.check("rules")


def test_a_healthy_model_passes() -> None:
    made = judged(healthy())
    assert made.verdict == "pass" and not made.findings
    assert (made.conditions.small_sublayers, made.conditions.large_shortcut) == ("met", "met")
    assert {status(made, code) for code in ("JD101", "JD102", "JD103")} == {"clean"}


@pytest.mark.parametrize(
    ("value", "condition", "level"),
    [
        (1.99, "met", None),
        (2.01, "partly", "info"),
        (3.99, "partly", "info"),
        (4.01, "not met", "warning"),
    ],
)
def test_small_sublayers_on_both_sides_of_each_cut(
    value: float, condition: str, level: str | None
) -> None:
    rows = healthy()
    rows[1] = replace(rows[1], core_norm=Interval.exact(value / SCALE))
    made = judged(rows)
    assert made.conditions.small_sublayers == condition
    assert [f.level for f in findings(made, "JD101")] == ([level] if level else [])
    assert not findings(made, "JD102")
    for finding in findings(made, "JD101"):
        assert finding.where == ["h.0.mlp"] and finding.evidence["value"] == pytest.approx(value)


def test_an_interval_across_a_threshold_is_unknown_and_never_a_pass() -> None:
    rows = healthy()
    rows[0] = replace(rows[0], core_norm=Interval(2.0 / SCALE, 1.95 / SCALE, 2.05 / SCALE, 0.999))
    made = judged(rows)
    assert made.conditions.small_sublayers == "unknown"
    assert status(made, "JD101") == "unknown" and made.verdict == "unknown"
    assert findings(made, "JD901")[0].where == ["h.0.attn"]


def test_across_error_but_above_warning_is_a_fired_warning_with_error_undecided() -> None:
    limits = load_thresholds({"core_norm": {"info": 2.0, "warning": 4.0, "error": 6.0}})
    rows = healthy()
    rows[0] = replace(rows[0], core_norm=Interval(6.0 / SCALE, 5.5 / SCALE, 6.5 / SCALE, 0.999))
    made = evaluate(report(rows), thresholds=limits)
    assert [f.level for f in findings(made, "JD101")] == ["warning"]
    assert made.conditions.small_sublayers == "not met"
    assert findings(made, "JD901")[0].where == ["h.0.attn"]


def test_a_report_holds_the_cuts_of_cores_by_kind_in_the_units_of_its_figures() -> None:
    limits = load_thresholds({"core_norm": {"mlp": {"info": 2.0, "warning": 4.0}}})
    cuts = evaluate(report(healthy()), thresholds=limits).settings["thresholds"]
    assert cuts["core_norm.mlp"] == {"info": 2.0 / SCALE, "warning": 4.0 / SCALE}
    shipped = load_thresholds().limits("core_norm", "attention").info
    assert shipped is not None
    assert cuts["core_norm.attention"]["info"] == pytest.approx(shipped / SCALE)
    assert "core_norm.moe" not in cuts, "the model has no such sub-layer"


def test_large_shortcut_uses_the_99th_percentile_not_the_maximum() -> None:
    made = judged(healthy())  # the largest token is ten times beyond
    assert made.conditions.large_shortcut == "met"
    rows = healthy()
    rows[0] = replace(rows[0], norm_gain=gain(8.01))
    (finding,) = findings(judged(rows), "JD102")
    assert finding.level == "warning" and "position 7" in finding.what and "1234" in finding.what
    assert "in layer 0 (of 2)" in finding.what and "√d = 8" in finding.fix


def test_excess_at_every_depth_is_distinguished_from_depth_0_alone() -> None:
    rows = [replace(r, norm_gain=gain(20.0)) for r in healthy()]
    (finding,) = findings(judged(rows), "JD102")
    assert "in all 2 layers" in finding.what and finding.evidence["depths"] == [0, 1]


def test_the_guilty_factor_is_named_by_the_rule_that_fires() -> None:
    rows = healthy()
    rows[0] = replace(rows[0], core_norm=narrow(9 / SCALE), branch_norm=narrow(9.0))
    made = judged(rows)
    assert findings(made, "JD101") and findings(made, "JD103") and not findings(made, "JD102")
    assert "no depth scaling is seen" in findings(made, "JD101")[0].fix


@pytest.mark.parametrize(("value", "level"), [(0.99, None), (1.01, "info"), (5.01, "warning")])
def test_jd103_level_at_each_branch_norm(value: float, level: str | None) -> None:
    rows = healthy()
    rows[3] = replace(rows[3], branch_norm=Interval.exact(value))
    assert [f.level for f in findings(judged(rows), "JD103")] == ([level] if level else [])


def test_the_paper_profile_makes_conditions_errors() -> None:
    rows = [replace(r, norm_gain=gain(20.0)) for r in healthy()]
    assert judged(rows).verdict == "warn"
    strict = judged(rows, profile="paper")
    assert strict.verdict == "fail" and findings(strict, "JD102")[0].level == "error"
    assert (
        findings(judged([replace(r, norm_gain=gain(4.0)) for r in healthy()], "paper"), "JD102")[
            0
        ].level
        == "warning"
    )


def test_on_a_trained_model_the_conditions_are_observations() -> None:
    rows = [
        replace(r, norm_gain=gain(20.0), core_norm=narrow(9.0), branch_norm=narrow(50.0))
        for r in healthy()
    ]
    made = judged(rows, state="trained")
    assert {f.level for f in made.findings} == {"info"} and made.verdict == "observed"
    assert made.conditions.small_sublayers == "not met"


def test_off_distribution_caps_levels_at_warning() -> None:
    probe = ProbeRecord(2, 8, 0, off_distribution=True)
    rows = [replace(r, norm_gain=gain(20.0)) for r in healthy()]
    made = judged(rows, state="trained", probe=probe)
    assert "error" not in {f.level for f in made.findings}
    assert findings(made, "JD903")[0].level == "warning"


def test_a_condition_that_is_not_met_fails_under_the_paper_profile_in_any_state() -> None:
    rows = [replace(r, norm_gain=gain(20.0)) for r in healthy()]
    for state, off_distribution in (("init", False), ("trained", False), ("trained", True)):
        made = judged(
            rows,
            "paper",
            state=state,
            probe=ProbeRecord(2, 8, 0, off_distribution=off_distribution),
        )
        assert made.conditions.large_shortcut == "not met" and made.verdict == "fail"


@pytest.mark.parametrize("placement", ["post", "sandwich", "reordered", "none"])
def test_the_conditions_are_for_pre_norm_only(placement: str) -> None:
    made = judged(healthy(placement=placement))
    assert (made.conditions.small_sublayers, made.conditions.large_shortcut) == (
        "not applicable",
        "not applicable",
    )
    assert status(made, "JD101") == status(made, "JD102") == "not-applicable"


def test_other_placements_reach_info_at_most() -> None:
    for placement in ("post", "sandwich", "reordered", "none"):
        rows = healthy(placement=placement)
        rows[0] = replace(rows[0], branch_norm=narrow(1e6))
        made = evaluate(report(rows), thresholds=load_thresholds())
        assert {f.level for f in findings(made, "JD103")} <= {"info"}


def test_a_kind_without_a_calibrated_threshold_is_not_called_met() -> None:
    made = judged(healthy(kind="mixer"))
    assert status(made, "JD101") == "not-applicable" and "mixer" in next(
        r.note for r in made.rules if r.code == "JD101"
    )
    assert made.conditions.small_sublayers == "not applicable"


def test_what_was_not_measured_is_unknown() -> None:
    rows = healthy()
    rows[2] = replace(rows[2], core_norm=None, branch_norm=None)
    made = judged(rows)
    assert made.conditions.small_sublayers == "unknown" and made.verdict == "unknown"


def test_a_replay_that_differs_makes_its_figures_unknown() -> None:
    settings = {"checks": {"deterministic": True, "non_finite": [], "replay": {"h.0.attn": 0.7}}}
    made = judged(healthy(), settings=settings)
    assert findings(made, "JD907")[0].where == ["h.0.attn"]
    assert made.conditions.small_sublayers == "unknown"


@pytest.mark.parametrize(
    ("log", "fires"), [(9.9, False), (10.0, False), (10.1, True), (None, None)]
)
def test_jd104_fires_above_its_threshold_only(log: float | None, fires: bool | None) -> None:
    made = judged(healthy(), network=NetworkRecord(gain_product_log=log, growth=Growth()))
    expected = "not-applicable" if fires is None else "fired" if fires else "clean"
    assert status(made, "JD104") == expected
    assert all(f.level == "info" for f in findings(made, "JD104"))


def test_a_depth_product_stands_next_to_the_true_norm_or_says_that_it_was_not_measured() -> None:
    alone = findings(
        judged(healthy(), network=NetworkRecord(gain_product_log=11.0, growth=Growth())), "JD104"
    )[0]
    assert alone.what.endswith(
        "an upper bound whose true value, the end-to-end gain, was not measured"
    )
    assert alone.evidence["end_to_end"] is None
    whole = NetworkRecord(
        gain_product_log=11.0, end_to_end=Interval(31.0, 30.5, 32.0), growth=Growth()
    )
    both = findings(judged(healthy(), network=whole), "JD104")[0]
    assert (
        both.what.endswith("the measured end-to-end gain is 30.5 to 32.0")
        and "not measured" not in both.what
    )
    assert both.evidence["end_to_end"] == [30.5, 32.0]


@pytest.mark.parametrize(
    ("log", "level"),
    [(10.0, None), (10.1, "info"), (20.0, "info"), (20.1, "warning"), (30.1, "error")],
)
def test_depth_product_beyond_cuts_of_the_user(log: float, level: str | None) -> None:
    limits = load_thresholds({"gain_product": {"info": 10.0, "warning": 20.0, "error": 30.0}})
    made = evaluate(
        report(healthy(), network=NetworkRecord(gain_product_log=log, growth=Growth())),
        thresholds=limits,
    )
    assert [f.level for f in findings(made, "JD104")] == ([level] if level else [])
    assert all(f.evidence["threshold"] < log for f in findings(made, "JD104"))


def test_nested_sublayers_are_left_out() -> None:
    rows = healthy()
    rows.append(
        replace(rows[0], name="lora", nested=True, core_norm=narrow(1e3), branch_norm=narrow(1e3))
    )
    assert judged(rows).verdict == "pass"


def test_decision_points_are_the_cuts_in_the_fields_own_units() -> None:
    points = decision_points(kind="mlp", placement="pre", layers=LAYERS, thresholds=LIMITS)
    assert points["branch_norm"] == (1.0, 5.0)
    assert points["core_norm"] == pytest.approx((2.0 / SCALE, 4.0 / SCALE))
    post = decision_points(kind="mlp", placement="post", layers=2, thresholds=LIMITS)
    assert "core_norm" not in post


@pytest.mark.parametrize(
    ("lower", "upper"), [(2.057, 10.31), (0.001234, 0.4567), (9.999, 1234.1), (1.2e6, 3.456e7)]
)
def test_the_ends_in_a_finding_are_those_of_the_renderings_and_hold_the_real_ones(
    lower: float, upper: float
) -> None:
    interval = Interval(math.sqrt(lower * upper), lower, upper, 0.999)
    ends = span(interval).split(" to ")
    assert spoken(interval) == span(interval)
    low, high = (float(end.replace(",", "")) for end in ends)
    assert low <= lower and upper <= high


# -- placements of which the paper says nothing ----------------------------------------------------
@pytest.mark.parametrize(
    ("placement", "words"),
    [
        ("post", "post-norm"),
        ("sandwich", "sandwich-norm"),
        ("reordered", "reordered-norm"),
        ("none", "no norm found at either end of a branch"),
    ],
)
def test_elsewhere_the_conditions_do_not_apply_and_what_is_looked_at_is_said(
    placement: str, words: str
) -> None:
    out = None if placement == "none" else Interval.exact(9.26)
    rows = [
        replace(r, placement=placement, norm_gain=None, core_norm=r.branch_norm) for r in healthy()
    ]
    rows[2] = replace(rows[2], out_norm_gain=out)
    made = judged(rows)
    assert (made.conditions.small_sublayers, made.conditions.large_shortcut) == (
        "not applicable",
        "not applicable",
    )
    for code in ("JD101", "JD102"):
        result = next(r for r in made.rules if r.code == code)
        assert (result.status, result.note) == (
            "not-applicable",
            f"the paper states it for pre-norm; this model has {words}",
        )
    lines = {line.label: line for line in verdict_lines(made)}
    assert words in lines["small sub-layers"].text
    assert "shortcut std" not in lines["large shortcut"].text
    looked = lines["looked at"].text
    assert ("9.26 at h.1.attn" in looked) == (out is not None)
    assert ("the norm after the sum" in looked) == (placement == "post")
    assert ("judged by no rule" in looked) == (placement == "none")
    text = render(made)
    assert "not applicable" in text and "looked at" in text
    conditions = made.to_dict()["conditions"]
    assert (conditions["small_sublayers"], conditions["large_shortcut"]) == ("not applicable",) * 2
    names = ["h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp"]
    nowhere = {"judged": 0, "of": 4, "not_judged": {words: names}}
    assert conditions["small_sublayers_judged"] == nowhere
    assert "judged at" not in headline(made)


def test_a_pre_norm_model_has_its_conditions_and_no_such_line() -> None:
    assert "looked at" not in {line.label for line in verdict_lines(judged(healthy()))}
    rows = healthy()
    rows[3] = replace(rows[3], placement="post", norm_gain=None)
    made = judged(rows)
    assert made.conditions.large_shortcut == "met" and status(made, "JD102") == "clean"


@pytest.mark.parametrize("code", ["JD101", "JD102"])
def test_rule_pages_state_that_they_are_for_pre_norm(code: str) -> None:
    assert "pre-norm" in rule(code).page.what and "out-norm gain" in rule(code).page.what


def half_sandwich(core: float = 50.0, sigma: float = 0.001) -> list[SublayerRecord]:
    """Return sub-layers of which the attention is sandwich-norm, with figures that no rule judges.

    Args:
        core: norm of the core of attention.
        sigma: smallest std of its shortcut.
    """
    rows = healthy()
    for index in (0, 2):
        rows[index] = replace(
            rows[index],
            placement="sandwich",
            core_norm=narrow(core),
            shortcut_std=Spread(sigma, sigma, sigma),
        )
    return rows


def test_a_condition_quotes_the_figure_of_the_sublayers_that_were_judged() -> None:
    # The largest core and the smallest shortcut are those of sub-layers that no rule judges.
    made = judged(half_sandwich())
    assert (made.conditions.small_sublayers, made.conditions.large_shortcut) == ("met", "met")
    lines = {line.label: line for line in verdict_lines(made)}
    left_out = "judged at 2 of 4 sub-layers, not at h.0.attn, h.1.attn (sandwich-norm)"
    small, large = lines["small sub-layers"].text, lines["large shortcut"].text
    assert small == f"largest core norm times √(2N) 0.999 to 1.01, at h.0.mlp; {left_out}"
    assert large == f"smallest shortcut std 0.0500, at h.0.mlp (target: about 1); {left_out}"


def test_the_banner_and_every_rendering_say_that_a_condition_was_judged_in_part() -> None:
    words = "Both conditions met (judged at 2 of 4 sub-layers)"
    made = judged(half_sandwich())
    assert headline(made).startswith(f"{words}: worst branch norm")
    assert words in render(made)
    conditions = made.to_dict()["conditions"]
    assert conditions["large_shortcut_judged"] == {
        "judged": 2,
        "of": 4,
        "not_judged": {"sandwich-norm": ["h.0.attn", "h.1.attn"]},
    }
    titles = [panel.title for panel in build_condition_panels(made)]
    assert titles[0] == "Small sub-layers: met, 2 of 4 sub-layers judged"
    assert Report.from_json(made.to_json()).conditions == made.conditions

    # Judged everywhere, it says nothing of it.
    everywhere = judged(healthy())
    assert headline(everywhere).startswith("Both conditions met: worst branch norm")
    assert "judged at" not in render(everywhere)
    assert all("judged" not in panel.title for panel in build_condition_panels(everywhere))


def test_a_condition_that_is_not_met_counts_the_sublayers_that_were_judged() -> None:
    rows = half_sandwich()
    rows[1] = replace(rows[1], norm_gain=gain(9.0))
    made = judged(rows)
    [finding] = findings(made, "JD102")
    assert "; 1 of 2 pre-norm sub-layers, in layer 0 (of 2)" in finding.what
    lines = {line.label: line for line in verdict_lines(made)}
    assert lines["large shortcut"].status == "not met"
    assert lines["large shortcut"].text.endswith("not at h.0.attn, h.1.attn (sandwich-norm)")
    assert headline(made).startswith(
        "Large shortcut not met (judged at 2 of 4 sub-layers), small sub-layers met (judged at 2 "
    )

    # All of them are pre-norm.
    rows = healthy()
    rows[1] = replace(rows[1], norm_gain=gain(9.0))
    [finding] = findings(judged(rows), "JD102")
    assert "; 1 of 4 sub-layers, in layer 0 (of 2)" in finding.what


def test_sublayers_without_a_threshold_are_named_next_to_the_figure() -> None:
    limits = load_thresholds()  # it has cuts for attention, MLP and experts alone
    rows = healthy()
    rows[0] = replace(rows[0], kind="mixer", core_norm=narrow(50.0))
    made = evaluate(report(rows), thresholds=limits)
    assert made.conditions.small_sublayers == "met"
    lines = {line.label: line for line in verdict_lines(made)}
    assert lines["small sub-layers"].text == (
        "largest core norm times √(2N) 0.999 to 1.01, at h.0.mlp; judged at 3 of 4 sub-layers, not "
        "at h.0.attn (no threshold is calibrated for mixer)"
    )
    assert headline(made).startswith(
        "Large shortcut met, small sub-layers met (judged at 3 of 4 sub-layers): worst"
    )

    # Without any that was judged there is no figure.
    rows = [replace(row, kind="mixer") for row in rows]
    made = evaluate(report(rows), thresholds=limits)
    lines = {line.label: line for line in verdict_lines(made)}
    assert lines["small sub-layers"].status == "not applicable"
    assert lines["small sub-layers"].text == "no threshold is calibrated for mixer (pre)"


def test_the_outlook_of_a_remedy_says_where_the_conditions_were_judged() -> None:
    after = outlook(judged(half_sandwich()))
    remedy = RemedyRecord("x", "X", ["JD102"], "free", before=after, after=after)
    assert effect(remedy).endswith(", both conditions met (judged at 2 of 4 sub-layers)")
    assert after.large_shortcut_judged == JudgedSublayers(2, 4)
    everywhere = outlook(judged(healthy()))
    remedy = replace(remedy, before=everywhere, after=everywhere)
    assert effect(remedy).endswith(", both conditions met")


def one_unmeasured() -> list[SublayerRecord]:
    """Return healthy sub-layers, the last of which has no norm. Its shortcut is known."""
    rows = healthy()
    why = {"branch_norm": "a backward in it has no derivative"}
    rows[3] = replace(rows[3], branch_norm=None, core_norm=None, notes=why)
    return rows


def test_a_sublayer_without_a_norm_is_not_judged() -> None:
    made = judged(one_unmeasured())
    small = JudgedSublayers(3, 4, {"not measured": ["h.1.mlp"]})
    assert made.conditions == Conditions("unknown", "met", small, JudgedSublayers(4, 4))
    lines = {line.label: line for line in verdict_lines(made)}
    assert lines["small sub-layers"].text == (
        "largest core norm times √(2N) 0.999 to 1.01, at h.0.attn; judged at 3 of 4 sub-layers, "
        "not at h.1.mlp (not measured)"
    )
    assert "judged at" not in lines["large shortcut"].text
    assert headline(made) == (
        "Large shortcut met, small sub-layers unknown (judged at 3 of 4 sub-layers): worst branch "
        "norm 0.499 to 0.501 at h.0.attn (known at 3 of 4 sub-layers)"
    )
    titles = [panel.title for panel in build_condition_panels(made)]
    assert titles == [
        "Small sub-layers: undecided, 3 of 4 sub-layers judged",
        "Large shortcut: met",
    ]
    after = outlook(made)
    assert after.small_sublayers_judged == JudgedSublayers(3, 4)
    assert after.large_shortcut_judged == JudgedSublayers(4, 4)


def test_an_interval_across_a_threshold_was_judged() -> None:
    rows = healthy()
    rows[3] = replace(rows[3], core_norm=Interval(2.0 / SCALE, 1.95 / SCALE, 2.05 / SCALE, 0.999))
    made = judged(rows)
    assert made.conditions.small_sublayers == "unknown"
    assert made.conditions.small_sublayers_judged == JudgedSublayers(4, 4)


def test_a_shortcut_that_is_not_known_was_not_judged() -> None:
    rows = one_unmeasured()
    rows[3] = replace(rows[3], norm_gain=None, shortcut_std=None)
    made = judged(rows)
    judged_at = JudgedSublayers(3, 4, {"not measured": ["h.1.mlp"]})
    assert made.conditions == Conditions("unknown", "unknown", judged_at, judged_at)
    assert headline(made).startswith("Both conditions unknown (judged at 3 of 4 sub-layers): ")


def test_without_any_norm_the_line_says_that_nothing_was_judged() -> None:
    rows = [replace(row, branch_norm=None, core_norm=None) for row in healthy()]
    made = judged(rows)
    assert made.conditions.small_sublayers_judged == JudgedSublayers(
        0, 4, {"not measured": [row.name for row in rows]}
    )
    lines = {line.label: line for line in verdict_lines(made)}
    assert lines["small sub-layers"].text == (
        "not judged at h.0.attn, h.0.mlp, h.1.attn and 1 more (not measured)"
    )
    assert headline(made) == "Large shortcut met, small sub-layers unknown"


def test_no_sentence_quotes_a_figure_whose_replay_differs() -> None:
    rows = healthy()
    rows[0] = replace(rows[0], core_norm=narrow(50.0), branch_norm=narrow(40.0))
    trusted = {"checks": {"deterministic": True, "non_finite": [], "replay": {}}}
    differs = {"checks": {**trusted["checks"], "replay": {"h.0.attn": 0.7}}}

    # 1. It differs at one sub-layer, the one with the largest norms.
    made = judged(rows, settings=differs)
    assert made.conditions.small_sublayers_judged == JudgedSublayers(
        3, 4, {"its replay differs from the whole model": ["h.0.attn"]}
    )
    lines = {line.label: line for line in verdict_lines(made)}
    assert lines["small sub-layers"].text == (
        "largest core norm times √(2N) 0.999 to 1.01, at h.0.mlp; judged at 3 of 4 sub-layers, "
        "not at h.0.attn (its replay differs from the whole model)"
    )
    assert "0.501 at h.0.mlp (known at 3 of 4 sub-layers)" in headline(made)
    assert outlook(made).branch_norm == pytest.approx([0.4995, 0.5005])
    (finding,) = findings(made, "JD901")
    assert "--max-products" not in finding.fix

    # 2. It agrees everywhere.
    made = judged(rows, settings=trusted)
    assert made.conditions.small_sublayers_judged == JudgedSublayers(4, 4)
    assert headline(made).endswith("at h.0.attn")
    assert outlook(made).branch_norm == pytest.approx([39.96, 40.04])


def test_the_worst_branch_that_no_rule_judges_says_at_how_many_it_is_known() -> None:
    rows = [replace(row, placement="sandwich") for row in one_unmeasured()]
    for group, is_partial in ((rows, True), (rows[:3], False)):
        lines = {line.label: line for line in verdict_lines(judged(group))}
        assert lines["looked at"].text.endswith("; known at 3 of 4 sub-layers)") == is_partial


def test_a_report_of_an_older_version_quotes_the_pre_norm_sublayers() -> None:
    made = judged(half_sandwich())
    old = replace(made, conditions=Conditions("met", "met"))
    lines = {line.label: line for line in verdict_lines(old)}
    assert lines["large shortcut"].text == (
        "smallest shortcut std 0.0500, at h.0.mlp (target: about 1)"
    )
    assert headline(old).startswith("Both conditions met: ")


PART = StreamRange("h.0.attn", "h.0.mlp", sublayers=2, of=4, layers=1)


def product_of(log: float, stream: StreamRange | None, **other: object) -> NetworkRecord:
    return NetworkRecord(gain_product_log=log, growth=Growth(), stream=stream, **other)  # type: ignore[arg-type]


def test_jd104_on_a_part_of_the_network_names_it_and_never_passes() -> None:
    made = judged(healthy(), network=product_of(11.0, PART))
    [finding] = findings(made, "JD104")
    assert finding.what == (
        "the product of the gains from h.0.attn to h.0.mlp, 2 of 4 sub-layers is e^11.0 (Eq. 7), "
        "above e^10; an upper bound whose true value was not measured"
    )
    measured = product_of(11.0, PART, end_to_end=Interval(31.0, 30.5, 32.0))
    [finding] = findings(judged(healthy(), network=measured), "JD104")
    assert finding.what.endswith("; the measured gain of that part is 30.5 to 32.0")

    # Below the threshold nothing is known of the others.
    made = judged(healthy(), network=product_of(9.0, PART))
    assert status(made, "JD104") == "not-applicable"
    note = next(rule.note for rule in made.rules if rule.code == "JD104")
    assert note == "the product is known from h.0.attn to h.0.mlp, 2 of 4 sub-layers alone"
    whole = replace(PART, sublayers=4)
    assert status(judged(healthy(), network=product_of(9.0, whole)), "JD104") == "clean"


def test_jd104_says_nothing_of_a_product_that_is_no_bound() -> None:
    gaps = replace(PART, sublayers=4, gaps=[["h.0.attn", "h.0.mlp"]])
    for log in (9.0, 11.0):
        made = judged(healthy(), network=product_of(log, gaps))
        assert status(made, "JD104") == "not-applicable" and not findings(made, "JD104")
        note = next(rule.note for rule in made.rules if rule.code == "JD104")
        assert note == (
            "the product is no bound: between h.0.attn and h.0.mlp the stream passes calls that no "
            "gain covers"
        )
