"""JD110 between two checkpoints of a run: growth as in healthy training passes, growth far beyond
it fails.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from rules.reports import findings, healthy, narrow, report, status

from jacdiag.comparison import compare_with_earlier
from jacdiag.comparison.seed_spread import figures_of
from jacdiag.records import Interval, ProbeRecord, Report
from jacdiag.render.content.sentences import headline
from jacdiag.render.content.verdict import to_do, verdict_lines
from jacdiag.rules import evaluate
from jacdiag.rules.thresholds import load_thresholds

LIMITS = load_thresholds({"checkpoint_growth": {"pre": {"info": 4.0, "warning": 10.0}}})


def with_branch(value: Interval, placement: str = "pre") -> list:
    """Rows of which the third has another branch norm than the rest."""
    rows = healthy(placement=placement)
    rows[2] = replace(rows[2], branch_norm=value)
    return rows


def compared(
    now: list, earlier: list, states: tuple[str, str] = ("trained", "trained"), **other
) -> Report:
    made = report(now, state=states[0], **other)
    record, figures = compare_with_earlier(
        made, report(earlier, state=states[1]), "earlier.pt", 0.35
    )
    made = replace(made, against=record, baseline=figures, figures=figures_of([made], 0.35))
    return evaluate(made, thresholds=LIMITS)


def exact_growth(factor: float) -> Interval:
    """A branch norm with which 1 + |J| is so many times that of 0.5."""
    return Interval.exact(1.5 * factor - 1)


@pytest.mark.parametrize(
    ("factor", "level", "verdict"),
    [
        (1.0, None, "pass"),
        (3.99, "info", "pass"),
        (4.0, "info", "pass"),  # on the cut: not beyond it
        (4.01, "warning", "warn"),
        (10.0, "warning", "warn"),
        (10.01, "error", "fail"),
        (5000.0, "error", "fail"),
    ],
)
def test_growth_on_both_sides_of_each_cut(factor: float, level: str | None, verdict: str) -> None:
    earlier = with_branch(Interval.exact(0.5))
    made = compared(with_branch(exact_growth(factor)), earlier)
    assert [f.level for f in findings(made, "JD110")] == ([level] if level else [])
    assert made.verdict == verdict
    if level:
        (finding,) = findings(made, "JD110")
        assert finding.where == ["h.1.attn"] and "of earlier.pt" in finding.what
        assert ("go back to the earlier checkpoint" in finding.fix) == (level != "info")


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (2.0, "2 of 4 branches grew without a warning"),
        (5.0, "2 of 4 branches grew beyond the warning"),
        (20.0, "2 of 4 branches grew beyond the error"),
    ],
)
def test_several_branches_are_counted_by_how_far_they_grew(factor: float, words: str) -> None:
    def rows(value: Interval) -> list:
        two = healthy()
        two[2], two[3] = (replace(row, branch_norm=value) for row in two[2:4])
        return two

    made = compared(rows(exact_growth(factor)), rows(Interval.exact(0.5)))
    (finding,) = findings(made, "JD110")
    assert finding.what.endswith(words)


def test_a_branch_that_was_zero_is_judged_by_what_it_adds() -> None:
    """A zero-initialised branch that learns has grown without limit, and multiplies a gradient by
    little.
    """
    made = compared(with_branch(narrow(1.2)), with_branch(Interval.exact(0.0)))
    assert [f.level for f in findings(made, "JD110")] == ["info"] and made.verdict == "pass"
    far = compared(with_branch(narrow(1200.0)), with_branch(Interval.exact(0.0)))
    assert far.verdict == "fail"


def test_what_shrank_is_no_finding_and_is_kept() -> None:
    made = compared(with_branch(narrow(0.01)), with_branch(narrow(40.0)))
    assert not findings(made, "JD110") and made.verdict == "pass"
    [change] = made.against.changes
    assert (change.where, change.figure, change.grew) == ("h.1.attn", "branch_norm", False)
    line = next(line for line in verdict_lines(made) if line.label == "against")
    assert "of 4 branch norms 0 grew and 1 shrank" in line.text


def test_overlapping_intervals_are_no_growth() -> None:
    wide = Interval(1.0, 0.9, 60.0, 0.999)
    made = compared(with_branch(Interval(50.0, 49.0, 70.0, 0.999)), with_branch(wide))
    assert not findings(made, "JD110") and not made.against.changes and made.verdict == "pass"


def test_a_norm_that_was_measured_once_only_leaves_it_open() -> None:
    made = compared(with_branch(narrow(0.5)), with_branch(None))  # type: ignore[arg-type]
    assert (
        made.against.missing == ["h.1.attn"]
        and status(made, "JD110") == "unknown"
        and made.verdict == "unknown"
    )
    assert compared(with_branch(None), with_branch(narrow(0.5))).verdict == "unknown"  # type: ignore[arg-type]


@pytest.mark.parametrize("placement", ["sandwich", "reordered", "none"])
def test_placements_without_a_boundary_are_observed_and_fail_only_far_beyond(
    placement: str,
) -> None:
    earlier = with_branch(narrow(0.5), placement)
    made = compared(with_branch(exact_growth(50.0), placement), earlier)
    note = next(r.note for r in made.rules if r.code == "JD110")
    assert made.verdict == "observed" and "not known for" in note
    assert {f.level for f in findings(made, "JD110")} == {"info"}
    assert compared(with_branch(exact_growth(500.0), placement), earlier).verdict == "fail"


def test_random_tokens_cap_it_at_a_warning() -> None:
    probe = ProbeRecord(2, 8, 0, off_distribution=True)
    made = compared(with_branch(narrow(9000.0)), with_branch(narrow(0.5)), probe=probe)
    assert [f.level for f in findings(made, "JD110")] == ["warning"] and made.verdict == "warn"


def test_from_init_more_growth_is_healthy() -> None:
    earlier = with_branch(narrow(0.5))
    made = compared(with_branch(exact_growth(20.0)), earlier, ("trained", "init"))
    assert [f.level for f in findings(made, "JD110")] == ["info"]
    assert (
        compared(with_branch(exact_growth(200.0)), earlier, ("trained", "init")).verdict == "fail"
    )


def test_two_models_at_init_are_compared_as_with_a_baseline() -> None:
    states = ("init", "init")
    earlier = with_branch(narrow(0.5))
    for value, fires in ((0.6, False), (0.8, True)):  # a seed may differ by 35%
        made = compared(with_branch(narrow(value)), earlier, states)
        assert [f.level for f in findings(made, "JD110")] == (["error"] if fires else [])
        gated = report(with_branch(narrow(value)))
        gated = replace(
            gated, figures=figures_of([gated], 0.35), baseline=figures_of([report(earlier)], 0.35)
        )
        as_gate = findings(evaluate(gated, thresholds=LIMITS), "JD110")
        assert [f.evidence["value"] for f in as_gate] == [
            f.evidence["value"] for f in findings(made, "JD110")
        ]
        for finding in findings(made, "JD110"):
            assert "earlier.pt up to" in finding.what and "--write-baseline" not in finding.fix


# -- nothing to compare with -----------------------------------------------------------------------
def test_a_trained_model_alone_is_observed_whatever_its_norms() -> None:
    for value in (0.5, 7410.0):
        made = evaluate(report(with_branch(narrow(value)), state="trained"), thresholds=LIMITS)
        assert made.verdict == "observed" and {f.level for f in made.findings} <= {"info"}
        assert headline(made).endswith("nothing to compare it with")
        assert any("--against EARLIER" in line for line in to_do(made))
        assert not any(line.startswith("nothing") for line in to_do(made))
        assert "nothing to compare it with" in next(r.note for r in made.rules if r.code == "JD110")


def test_at_init_nothing_is_observed_and_no_comparison_is_offered() -> None:
    made = evaluate(report(healthy()), thresholds=LIMITS)
    assert made.verdict == "pass" and not any("--against" in line for line in to_do(made))


def test_what_fires_still_fails_or_warns() -> None:
    broken = {"checks": {"deterministic": True, "non_finite": ["h.0.mlp.weight"], "replay": {}}}
    assert (
        evaluate(report(healthy(), "trained", settings=broken), thresholds=LIMITS).verdict == "fail"
    )
    off = report(healthy(), "trained", probe=ProbeRecord(2, 8, 0, off_distribution=True))
    assert evaluate(off, thresholds=LIMITS).verdict == "warn"
    rows = [replace(r, core_norm=narrow(50.0)) for r in healthy()]
    assert evaluate(report(rows, "trained"), thresholds=LIMITS, profile="paper").verdict == "fail"


def test_an_observation_across_a_threshold_leaves_nothing_open() -> None:
    made = evaluate(
        report(with_branch(Interval(1.3, 1.2, 1.5, 0.999)), "trained"), thresholds=LIMITS
    )
    assert status(made, "JD103") == "unknown" and made.verdict == "observed"
    at_init = evaluate(report(with_branch(Interval(1.3, 1.2, 1.5, 0.999))), thresholds=LIMITS)
    assert at_init.verdict == "unknown"


def test_without_a_norm_nothing_was_observed() -> None:
    made = evaluate(report(with_branch(None), "trained"), thresholds=LIMITS)  # type: ignore[arg-type]
    assert made.verdict == "unknown"
