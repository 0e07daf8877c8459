"""The sentences and numbers that every rendering shares."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from render import synthetic

from jacdiag.records import (
    AgainstRecord,
    Conditions,
    FiguresRecord,
    Finding,
    Interval,
    Plan,
    ProbeRecord,
    Report,
    RuleResult,
)
from jacdiag.records.number_format import between, outward, share, spoken, three
from jacdiag.records.placement_words import NO_NORM_AT_ENDS
from jacdiag.render.content import sentences as words
from jacdiag.render.content import verdict as lines
from jacdiag.render.content.number_cells import aligned

NAN, INF = float("nan"), float("inf")


def with_conditions(small: str, large: str) -> Report:
    conditions = Conditions(small, large)  # type: ignore[arg-type]
    return dataclasses.replace(synthetic.clean(2), conditions=conditions)


def line_of(report: Report, label: str) -> lines.Line | None:
    return next((line for line in lines.verdict_lines(report) if line.label == label), None)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Interval(5.81, 5.803, 6.0412), "5.80 to 6.05"),
        (Interval(22.5, 22.498, 23.28), "22.4 to 23.3"),
        (Interval(20.0, 19.9, 30.0), "19.9 to 30.0"),
        (Interval(9.85, 9.836, 10.01), "9.83 to 10.1"),
        (Interval(9.9995, 9.999, 9.9999), "9.99 to 10.0"),
        (Interval(0.0999, 0.09987, 0.1001), "0.0998 to 0.101"),
        (Interval.exact(0.0283), "0.0283"),
        (Interval.exact(9.999), "10.0"),
        (Interval.exact(44_842.0), "44,800"),
        (Interval.exact(999_499.0), "999,000"),
        (Interval(1234.0, 1233.0, 1300.0), "1233 to 1300"),
        (Interval(1234.4, 1234.4, 1234.4 * (1 + 1e-12)), "1234"),
        (Interval(44_842.0, 44_842.0, 44_951.0), "44,800 to 45,000"),
        (Interval.exact(2.5e19), "2.50e19"),
        (Interval(2.5e19, 2.4999e19, 2.511e19), "2.49e19 to 2.52e19"),
        (Interval(8.4, 8.3, INF), "8.30 to inf"),
        (Interval(NAN, NAN, INF), "nan"),
        (Interval(INF, INF, INF), "inf"),
        (Interval(0.0, 0.0, 0.0), "0"),
        (Interval(0.5, 0.0, 0.9), "0 to 0.900"),
        (None, "–"),
    ],
)
def test_an_interval_is_its_two_ends(value: Interval | None, text: str) -> None:
    assert spoken(value) == text


@pytest.mark.parametrize(
    "value", [10.0**power * digits for power in range(-4, 6) for digits in (1.0, 3.217, 9.876)]
)
def test_three_digits_and_no_power_of_ten_where_people_write_none(value: float) -> None:
    text = three(value)
    assert "e" not in text
    digits = (
        text.replace(",", "").replace(".", "").strip("0")
        if value < 1e4
        else text.replace(",", "").rstrip("0")
    )
    assert len(digits) <= 3 or 1e3 <= value < 1e4
    assert float(text.replace(",", "")) == pytest.approx(value, rel=5.1e-3)


def read(text: str) -> tuple[float, float]:
    """Return the ends of a printed interval."""
    lower, _, upper = text.partition(" to ")
    return float(lower.replace(",", "")), float((upper or lower).replace(",", ""))


@given(
    lower=st.floats(min_value=1e-30, max_value=1e30),
    width=st.floats(min_value=1.1e-9, max_value=10.0),
)
def test_the_printed_interval_contains_the_true_one_and_little_more(
    lower: float, width: float
) -> None:
    upper = lower * (1 + width)
    low, high = read(between(lower, upper))
    assert low <= lower and upper <= high
    assert low >= lower * 0.99 and high <= upper * 1.0101  # one unit of the third digit


@given(value=st.floats(min_value=1e-30, max_value=1e30), down=st.booleans())
def test_a_rounded_end_has_three_digits(value: float, down: bool) -> None:
    text = outward(value, down=down)
    mantissa = text.split("e")[0]
    whole = mantissa.replace(",", "").replace(".", "").lstrip("0")
    assert len(whole) == 3 or (float(mantissa.replace(",", "")) >= 1000 and "." not in mantissa)


def test_both_ends_of_intervals_stand_on_their_points() -> None:
    assert aligned(["0.456 to 0.502", "9.83 to 10.4", "–", "14.5", "1233 to 1300"]) == [
        "   0.456 to    0.502",
        "   9.83  to   10.4  ",
        "   –                ",
        "  14.5              ",
        "1233     to 1300    ",
    ]


def test_a_share_is_everything_only_when_it_is() -> None:
    assert (share(999_999, 1_000_000), share(7, 7), share(0, 7), share(1, 10**9)) == (
        "99.99%",
        "100%",
        "0%",
        "0.01%",
    )


@pytest.mark.parametrize(
    ("small", "large", "headline"),
    [
        ("met", "met", "Both conditions met"),
        ("not met", "not met", "Neither condition met"),
        ("partly", "partly", "Both conditions partly met"),
        ("unknown", "unknown", "Both conditions unknown"),
        ("met", "not met", "Large shortcut not met, small sub-layers met"),
        ("unknown", "met", "Large shortcut met, small sub-layers unknown"),
        ("not applicable", "not applicable", "Not pre-norm, the two conditions do not apply"),
    ],
)
def test_the_headline_says_the_verdict_in_words(small: str, large: str, headline: str) -> None:
    report = with_conditions(small, large)
    worst = max(
        report.sublayers, key=lambda row: row.branch_norm.estimate if row.branch_norm else 0
    )
    assert (
        words.headline(report)
        == f"{headline}: worst branch norm {spoken(worst.branch_norm)} at {worst.name}"
    )  # type: ignore[arg-type]


def test_error_comes_before_the_conditions() -> None:
    assert (
        words.headline(synthetic.broken()) == "JD906: transformer.h.0.mlp.c_fc.weight holds 3 NaN"
    )
    assert words.headline(synthetic.trained()).startswith(
        "Trained model: worst branch norm 6.33 to 6.56 at"
    )
    assert words.headline(synthetic.weights_tier()).startswith(
        "From the weights alone: the paper's bound is 40.3 at"
    )


def test_a_trained_model_that_was_compared_with_nothing_offers_the_comparison() -> None:
    alone = dataclasses.replace(synthetic.trained(), verdict="observed", findings=[])
    assert words.headline(alone).endswith("; nothing to compare it with")
    [offer] = lines.to_do(alone)
    assert offer.endswith("an earlier checkpoint, or with its JSON report (--against EARLIER)")
    gated = dataclasses.replace(
        alone, settings={**alone.settings, "command": "jacdiag gate build.py:model"}
    )
    assert lines.to_do(gated)[0].endswith("jacdiag audit NOW --against EARLIER")
    against = AgainstRecord("earlier.pt", "trained", compared=24)
    compared = dataclasses.replace(
        alone, verdict="pass", against=against, baseline=FiguresRecord("GPT", 1, 1, 1, 1)
    )
    assert words.headline(compared).endswith("; compared with earlier.pt")
    assert lines.to_do(compared) == ["nothing: no rule fired"]


def test_the_worst_branch_is_the_largest_finite_one() -> None:
    worst = words.worst_branch(synthetic.broken())
    assert worst is not None and worst[0].name == "transformer.h.0.attn"
    assert words.worst_branch(synthetic.weights_tier()) is None


def test_the_header_names_model_probe_and_plan() -> None:
    first, second = words.header(synthetic.vanilla())
    assert first == [
        "jacdiag 0.1.0",
        "checkpoint.pt",
        "GPT, 12 layers, width 768, 124M parameters (99.8% covered)",
        "init, pre-norm",
    ]
    assert second[0] == "probe: 2 x 128 random tokens, seed 0, 12 special or unused ids not drawn"
    assert second[1:] == [
        "float32 on cpu",
        "24 sub-layers, each interval at 99.9%",
        "no learning rate given",
    ]
    plan = Plan(lr=3e-4, warmup=2000, beta2=0.95)
    given = dataclasses.replace(
        synthetic.vanilla(1), plan=plan, probe=ProbeRecord(4, None, 0, "sample.txt")
    )
    assert words.header(given)[1][0] == "probe: batch 4 tokens of sample.txt"
    assert words.header(given)[1][-1] == "learning rate 0.0003, warmup 2000, beta2 0.95"
    assert "1 layer," in words.header(given)[0][2]
    without = [
        dataclasses.replace(given, plan=one) for one in (Plan(warmup=50), Plan(warmup=50, clip=1.0))
    ]
    assert [words.header(one)[1][-1] for one in without] == [
        "no learning rate given: warmup 50 says nothing without --lr",
        "no learning rate given: warmup 50 and clip 1 say nothing without --lr",
    ]
    assert words.header(synthetic.weights_tier())[1][0] == "weights only: no model was run"


def test_an_undecided_or_inapplicable_condition_never_reads_as_met() -> None:
    open_ = line_of(with_conditions("unknown", "met"), "small sub-layers")
    assert open_ is not None and (open_.status, open_.level) == ("unknown", "undecided")
    post = line_of(synthetic.post(), "large shortcut")
    assert post is not None and (post.status, post.text) == (
        "not applicable",
        "no pre-norm sub-layer",
    )
    rules = [RuleResult("JD103", "unknown", 3, "amplification", "too wide")]
    undecided = line_of(dataclasses.replace(synthetic.clean(), rules=rules), "undecided")
    assert undecided is not None and undecided.text == "JD103 amplification (too wide)"


def test_what_was_not_covered_is_named_with_its_share() -> None:
    line = line_of(synthetic.vanilla(), "not covered")
    assert line is not None and line.text.startswith(
        "0.2% of the parameters: transformer.ln_f.weight (the final norm"
    )
    assert (
        line_of(
            dataclasses.replace(
                synthetic.vanilla(),
                model=dataclasses.replace(synthetic.vanilla().model, uncovered=[]),
            ),
            "not covered",
        )
        is None
    )


def test_what_to_do_is_each_remedy_once_and_the_loudest_first() -> None:
    report = synthetic.broken()
    twice = dataclasses.replace(report.findings[0], level="warning")
    verified = Finding("JD102", "warning", [], "small", fix="scale the embedding", verified=True)
    untried = Finding("JD103", "warning", [], "large", fix="something nobody tried")
    advice = lines.to_do(
        dataclasses.replace(report, findings=[verified, twice, untried, report.findings[0]])
    )
    assert advice[0] == "load an earlier checkpoint   jacdiag explain JD906"
    assert len(advice) == 2 and "tried on a copy of this model: it helps" in advice[1]
    assert lines.to_do(synthetic.clean()) == ["nothing: no rule fired"]
    assert "--model FACTORY" in lines.to_do(synthetic.weights_tier())[0]


@pytest.mark.parametrize(
    ("norm", "words"),
    [
        (Interval(9.9, 9.0, 11.0), "--tol"),
        (Interval(5.0, 4.9, 5.1), "what could not be measured"),
        (None, "what could not be measured"),
    ],
)
def test_narrower_intervals_are_asked_for_only_if_one_lies_across_a_threshold(
    norm: Interval | None, words: str
) -> None:
    base = synthetic.clean(2)
    rows = [dataclasses.replace(base.sublayers[0], branch_norm=norm), *base.sublayers[1:]]
    rules = [RuleResult("JD103", "unknown", 4, "amplification")]
    open_ = dataclasses.replace(base, sublayers=rows, rules=rules, verdict="unknown")
    (advice,) = lines.to_do(open_)
    assert words in advice


def test_your_rung_on_the_ladder_stands_between_its_neighbours() -> None:
    line = line_of(synthetic.vanilla(), "other models")
    assert line is not None
    text = line.text.replace(lines.TIED, " ")
    assert "Pythia shape 5 · ▸yours 22 · GPT-2 24" in text and text.endswith(
        "(pre-norm, at init, same width)"
    )
    assert line_of(synthetic.trained(), "other models") is None


def placed(*placements: str) -> Report:
    """A report whose sub-layers have these placements in turn."""
    base = synthetic.vanilla()
    rows = [
        dataclasses.replace(row, placement=placements[place % len(placements)])
        for place, row in enumerate(base.sublayers)
    ]
    return dataclasses.replace(base, sublayers=rows)


def test_inits_of_another_placement_are_not_compared() -> None:
    """A norm behind the branch takes its gain away again: OLMo 2's 397 is no large value, and no
    pre-norm one.
    """
    pre, reordered = (
        line_of(report, "other models") for report in (placed("pre"), placed("reordered"))
    )
    assert pre is not None and "OLMo" not in pre.text
    assert reordered is not None and "GPT-2" not in reordered.text
    text = reordered.text.replace(lines.TIED, " ")
    assert (
        "▸yours 22 · OLMo 2 400" in text
        and "(reordered-norm, at init, width 1024; yours 768)" in text
    )


def test_where_no_init_of_the_placement_is_known_nothing_is_compared() -> None:
    for inside, kind in ((False, "without norms"), (True, f"with {NO_NORM_AT_ENDS}")):
        report = placed("none")
        rows = [dataclasses.replace(row, norm_inside=inside) for row in report.sublayers]
        line = line_of(dataclasses.replace(report, sublayers=rows), "other models")
        assert line is not None
        nothing = f"nothing is compared: no init of another model {kind} was measured"
        assert line.text == nothing
    mixed = line_of(placed("pre", "post"), "other models")
    assert mixed is not None and mixed.text.startswith(
        "nothing is compared: the sub-layers differ in placement"
    )
    without = dataclasses.replace(placed("pre"), ladder=[])
    assert line_of(without, "other models") is None, (
        "inits of this placement are known: the other sentence is false"
    )


def test_reasons_for_what_is_missing_are_said_once() -> None:
    notes = lines.footnotes(synthetic.post(12))
    assert notes.count("no norm gain: the branch does not begin with a norm (post)") == 1
    assert "no core norm at transformer.h.0.mlp: NaN in its weights" in lines.footnotes(
        synthetic.broken()
    )


def test_cost_sentence_has_forwards_seconds_and_memory() -> None:
    assert lines.cost(synthetic.vanilla()) == "612 forwards of one sub-layer, 41 s, peak 1.9 GB"
    assert (
        lines.cost(dataclasses.replace(synthetic.vanilla(), cost=type(synthetic.vanilla().cost)()))
        == "–"
    )


def test_characters_that_cannot_be_printed_are_replaced_everywhere() -> None:
    evil = Finding(
        "JD906", "error", ["a\x1b[31mb"], "line\nbreak\u2028and\ttab", {"x": ["\x07", 1.5, None]}
    )
    clean = words.legible(dataclasses.replace(synthetic.vanilla(1), findings=[evil]))
    assert clean.findings[0] == Finding(
        "JD906", "error", ["a\ufffd[31mb"], "line break and tab", {"x": ["\ufffd", 1.5, None]}
    )
    assert words.legible(synthetic.broken().network) is None
    assert words.legible(synthetic.vanilla()) == synthetic.vanilla()


@pytest.mark.parametrize(
    "norms", [[0.0, 1.0, 2.0], [NAN, 1.0], [1.0, 0.0], [INF, 1.0], [1.0], [2.0, 1.0], None]
)
def test_gradients_that_vanish_or_explode_break_nothing(norms: list[float] | None) -> None:
    base = synthetic.vanilla(2)
    assert base.network is not None
    log = norms[0] * 1e3 if norms else None
    report = dataclasses.replace(
        base, network=dataclasses.replace(base.network, gradient_norms=norms, gain_product_log=log)
    )
    gradient, depth = line_of(report, "gradient"), line_of(report, "whole network")
    assert (gradient is None) == (norms not in ([0.0, 1.0, 2.0], [2.0, 1.0])), (
        "no sentence about a ratio without end"
    )
    assert (depth is None) == (norms is None)
    assert depth is None or not {"e^nan", "e^inf"} & set(depth.text.replace(",", " ").split())


def test_a_product_that_the_network_does_not_reach_is_called_a_bound() -> None:
    base = synthetic.vanilla(2)
    assert base.network is not None
    gain = Interval(65.0, 64.0, 68.0, 0.999)
    texts = {}
    for log in (11.7, 4.3):  # far above the end-to-end gain, and near it
        network = dataclasses.replace(base.network, end_to_end=gain, gain_product_log=log)
        found = lines.verdict_lines(dataclasses.replace(base, network=network))
        place = next(k for k, line in enumerate(found) if line.label == "whole network")
        assert found[place].text.startswith("end-to-end gain 64.0 to 68.0: the largest factor")
        texts[log] = found[place + 1].text
    assert "(an upper bound that the network does not reach)" in texts[11.7]
    assert "upper bound" not in texts[4.3]


def test_each_finding_of_a_rule_has_a_line_and_the_label_stands_once() -> None:
    findings = [
        Finding("JD102", "info", [], "partly met in layer 1 (of 2): small"),
        Finding("JD102", "warning", [], "very small"),
    ]
    report = dataclasses.replace(with_conditions("met", "not met"), findings=findings)
    found = [line for line in lines.verdict_lines(report) if line.code == "JD102"]
    assert [(line.label, line.status, line.level) for line in found] == [
        ("large shortcut", "not met", "warning"),
        ("", "", "info"),
    ]
    # The outcome stands next to the sentence, and is not said twice.
    partly = dataclasses.replace(with_conditions("met", "partly"), findings=findings[:1])
    [line] = [line for line in lines.verdict_lines(partly) if line.code == "JD102"]
    assert (line.status, line.text) == ("partly met", "in layer 1 (of 2): small")


@pytest.mark.parametrize(
    ("norms", "words"),
    [
        ([1.0, 1.0], "norm 1.00 at the first shortcut, as large as at the top (1.00)"),
        ([1.0, 1.004], "norm 1.00 at the first shortcut, as large as at the top (1.00)"),
        ([1.0, 1.02], "norm 1.00 at the first shortcut, 1.02 times smaller than at the top (1.02)"),
        ([1.02, 1.0], "norm 1.02 at the first shortcut, 1.02 times that at the top (1.00)"),
    ],
)
def test_a_gradient_that_is_as_large_at_both_ends_has_no_factor(
    norms: list[float], words: str
) -> None:
    base = synthetic.vanilla(2)
    assert base.network is not None
    network = dataclasses.replace(base.network, gradient_norms=norms)
    line = line_of(dataclasses.replace(base, network=network), "gradient")
    assert line is not None and line.text == words


def test_a_note_that_stands_several_times_is_printed_once_with_its_count() -> None:
    notes = ["a sum at line 3", "a sum at line 4", "a sum at line 3"]
    report = dataclasses.replace(synthetic.vanilla(2), notes=notes)
    printed = [line.text for line in lines.verdict_lines(report) if line.label == "note"]
    assert printed == ["a sum at line 3 (2 times)", "a sum at line 4"]
    assert report.to_dict()["notes"] == notes
