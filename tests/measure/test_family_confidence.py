"""The confidence of all intervals of a report together, and how it is shared out."""

from __future__ import annotations

from typing import Any

import pytest
from menagerie import CORE

import jacdiag
from jacdiag.errors import UsageError
from jacdiag.gate import gate
from jacdiag.records import Interval, Report
from jacdiag.render.content.sentences import header

GPT = "jacdiag.sources.gpt:build"
SMALL: dict[str, Any] = {
    "model_args": {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64, "block_size": 32},
    "batch": 1,
    "seq": 16,
}


def probabilistic(report: Report) -> list[Interval]:
    """The intervals of a report that may miss: not those of a closed form."""
    found = []
    for row in report.sublayers:
        found += [row.branch_norm, row.residual_norm]
        if row.core_norm != row.branch_norm:  # without an input norm they are one map
            found.append(row.core_norm)
    # Parallel branches share one joint norm.
    joint = [
        row.joint_residual_norm for row in report.sublayers if row.joint_residual_norm is not None
    ]
    found += [one for place, one in enumerate(joint) if one not in joint[:place]]
    if report.network is not None:
        found.append(report.network.end_to_end)
    return [interval for interval in found if interval is not None and interval.confidence < 1]


def test_the_chance_of_a_miss_is_divided_by_the_number_of_intervals() -> None:
    report = jacdiag.audit(GPT, confidence_all=0.99, **SMALL)
    told = report.settings["confidence_all"]
    # Three norms of four sub-layers, the norm of the heads of two, and the end-to-end norm.
    assert (told["level"], told["intervals"], told["method"]) == (0.99, 15, "Bonferroni")
    assert told["each"] == pytest.approx(1 - 0.01 / 15) and told["shared_with_remedies"] is False
    assert report.settings["confidence"] == told["each"]
    intervals = probabilistic(report)
    assert len(intervals) == 13 and {interval.confidence for interval in intervals} == {
        told["each"]
    }
    line = " ".join(header(report)[-1])
    assert "each interval at 99.933%, all 15 together at 99% (Bonferroni)" in line


def test_family_confidence_equals_the_audit_at_the_confidence_of_each() -> None:
    together = jacdiag.audit(GPT, confidence_all=0.99, **SMALL)
    alone = jacdiag.audit(GPT, confidence=together.settings["confidence"], **SMALL)
    usual = jacdiag.audit(GPT, confidence=0.99, **SMALL)
    assert probabilistic(together) == probabilistic(alone)
    assert together.cost.products is not None and usual.cost.products is not None
    assert together.cost.products > usual.cost.products, (
        "all together are dearer than each for itself"
    )


PLACEMENTS = ("pre", "post", "sandwich", "reordered", "none", "parallel left")


@pytest.mark.parametrize("name", PLACEMENTS)
def test_no_interval_is_left_out_of_the_count(name: str) -> None:
    """Parallel branches have a joint norm too; a branch without an input norm has no core of its
    own.
    """
    specimen = next(one for one in CORE if one.name == name)
    args, kwargs = specimen.arguments()
    report = jacdiag.audit(specimen.build(), kwargs or args, confidence_all=0.9, state="init")
    count = report.settings["confidence_all"]["intervals"]
    # Eq. 20 has one for each, which no row shows
    heads = sum(row.kind == "attention" for row in report.sublayers)
    assert count - heads <= len(probabilistic(report)) <= count


def test_the_trials_of_remedies_have_half_of_the_chance() -> None:
    report = jacdiag.audit(GPT, confidence_all=0.99, remedies="first", **SMALL)
    told = report.settings["confidence_all"]
    assert report.remedies and told["shared_with_remedies"] is True
    assert told["each"] == pytest.approx(1 - 0.005 / 15)
    assert "all 15 and those of remedies together at 99% (Bonferroni)" in " ".join(
        header(report)[-1]
    )


def test_the_seeds_of_a_gate_share_it() -> None:
    outcome = gate(GPT, seeds=2, confidence_all=0.99, decide=False, fail_on="never", **SMALL)
    told = outcome.report.settings["confidence_all"]
    assert (told["level"], told["seeds"]) == (0.99, 2)
    assert told["each"] == pytest.approx(1 - 0.005 / 15)
    assert "and of 2 seeds together at 99%" in " ".join(header(outcome.report)[-1])


def test_header_names_the_confidence_of_each_interval_by_default() -> None:
    report = jacdiag.audit(GPT, **SMALL)
    line = " ".join(header(report)[-1])
    assert (
        "each interval at 99.9%" in line
        and "together" not in line
        and "confidence_all" not in report.settings
    )


def test_confidence_and_confidence_all_together_are_refused() -> None:
    for run in (jacdiag.audit, gate):
        with pytest.raises(UsageError, match="the confidence is given twice"):
            run(GPT, confidence=0.999, confidence_all=0.99, **SMALL)
