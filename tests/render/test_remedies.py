"""Remedies in words: what was tried, how far it came, and that nothing unverified is called a
fix.
"""

from __future__ import annotations

import dataclasses

import pytest
import synthetic

from jacdiag.records import Finding, Outlook, RemedyRecord
from jacdiag.render.content import verdict as lines
from jacdiag.render.content.remedies import document, effect

BEFORE = Outlook([23.1, 23.5], [0.6, 0.7], 35.7, "met", "not met", "warn", ["JD102", "JD103"])
AFTER = Outlook([1.0, 1.4], [0.6, 0.7], 1.6, "met", "met", "pass")
HALF = Outlook([9.0, 9.1], [0.3, 0.4], 35.7, "met", "not met", "warn", ["JD102"], [])
GOOD = RemedyRecord(
    "scaled-embed",
    "multiply the embedding by 27.7",
    ["JD102", "JD103"],
    "no parameter",
    BEFORE,
    AFTER,
    sufficient=True,
    recommended=True,
    seeds=[0, 1, 2],
    patches={"pytorch": "x = 1\n", "megatron": "--f 1"},
)
POOR = RemedyRecord(
    "small-init", "draw all matrices anew", ["JD102", "JD103"], "anew", BEFORE, HALF, seeds=[0]
)
KEPT = RemedyRecord(
    "learned-scale",
    "y = x + a f(x)",
    [],
    "12 parameters",
    BEFORE,
    BEFORE,
    keeps_function=True,
    function_change=0.0,
    seeds=[0],
)


def with_remedies(*remedies: RemedyRecord):  # type: ignore[no-untyped-def]
    return dataclasses.replace(synthetic.vanilla(), remedies=list(remedies))


def test_the_recommended_one_with_before_and_after_and_price() -> None:
    advice = lines.to_do(with_remedies(POOR, GOOD))
    assert advice == [
        "multiply the embedding by 27.7 (scaled-embed)   jacdiag explain JD102",
        "tried on a copy, on seeds 0 to 2: worst branch norm 23.1 to 23.5 → 1.00 to 1.40, norm "
        "gain 35.7 → 1.60, "
        "both conditions met",
        "price: no parameter; the change as code: --patch FILE",
        "also tried: small-init: worst branch norm 23.1 to 23.5 → 9.00 to 9.10, small sub-layers "
        "met, "
        "large shortcut not met (left JD102)",
    ]


@pytest.mark.parametrize(
    ("seeds", "sequences", "said"),
    [
        ([0], None, ""),
        ([0], 2, ""),
        ([0], 1, ", on one sequence"),
        ([3, 4], 1, ", on seeds 3 and 4, one sequence each"),
        ([0, 1, 2], 1, ", on seeds 0 to 2, one sequence each"),
        ([0, 1, 2], 2, ", on seeds 0 to 2"),
    ],
)
def test_what_a_remedy_was_tried_on_is_said(
    seeds: list[int], sequences: int | None, said: str
) -> None:
    tried = dataclasses.replace(GOOD, seeds=seeds, sequences=sequences)
    assert f"tried on a copy{said}: worst" in lines.to_do(with_remedies(tried))[1]


def test_a_command_that_writes_the_change_is_not_offered_again() -> None:
    for remedies in ((POOR, GOOD), (POOR,)):
        report = with_remedies(*remedies)
        assert any("the change as code: --patch FILE" in line for line in lines.to_do(report))
        settings = {**report.settings, "command": "jacdiag audit hf:gpt2 --patch=fix.md"}
        report = dataclasses.replace(report, settings=settings)
        assert not any("--patch" in line for line in lines.to_do(report))


def test_insufficient_remedies_show_the_nearest_one() -> None:
    (line,) = lines.to_do(with_remedies(POOR))
    assert (
        line.startswith("one remedy was tried, and it was not enough: draw all matrices anew")
        and "left JD102" in line
    )


def test_those_that_keep_the_function() -> None:
    (line,) = lines.to_do(with_remedies(KEPT))
    assert "the function stays, to the last bit" in line and "12 parameters" in line
    (line,) = lines.to_do(with_remedies(dataclasses.replace(KEPT, function_change=None)))
    assert "could not be measured" in line


def test_an_unverified_fix_of_a_condition_is_not_shown() -> None:
    report = synthetic.vanilla()
    bare = [Finding("JD102", "warning", [], "small", fix="scale the embedding")]
    assert lines.to_do(dataclasses.replace(report, findings=bare)) == [
        "the page of JD102 says what helps   jacdiag explain JD102"
    ]


def test_the_document_has_a_row_for_each_and_code_for_the_best() -> None:
    text = document(with_remedies(POOR, GOOD))
    assert "| (as it is) | 23.1 to 23.5 | 35.7 | JD102, JD103 |" in text
    assert "| small-init | 9.00 to 9.10 | 35.7 | JD102 | no | anew |" in text
    assert "| scaled-embed | 1.00 to 1.40 | 1.60 | no warning or error | yes |" in text, (
        "an info may be left"
    )
    assert (
        "### PyTorch\n\n```python\nx = 1\n```" in text
        and "### Megatron-LM\n\n```sh\n--f 1\n```" in text
    )
    assert "None was tried: no finding asks for one." in document(synthetic.clean())


def test_every_remedy_for_a_trained_model_is_written_as_code() -> None:
    scaled = dataclasses.replace(POOR, name="branch-scale", patches={"pytorch": "x = 2\n"})
    kept = dataclasses.replace(KEPT, patches={"pytorch": "x = 3\n"})
    begun = with_remedies(kept, scaled)
    for report in (begun, dataclasses.replace(begun, settings={"remedies": "begun"})):
        text = document(report)
        assert (
            "(learned-scale)\n" in text
            and "(branch-scale)\n" in text
            and "x = 2" in text
            and "x = 3" in text
        )
        assert "not enough" not in text
    enough = dataclasses.replace(scaled, sufficient=True, recommended=True)
    text = document(
        dataclasses.replace(with_remedies(kept, enough), settings={"remedies": "begun"})
    )
    assert "x = 2" in text and "x = 3" in text


def test_why_none_was_tried() -> None:
    asks = dataclasses.replace(
        synthetic.vanilla(), findings=[Finding("JD102", "warning", [], "small")]
    )
    off = dataclasses.replace(asks, settings={"remedies": "none"})
    assert "JD102 asks for one, but remedies are switched off" in document(off)
    short = dataclasses.replace(
        asks, settings={"remedies": "first"}, notes=["no remedy was tried: too little memory"]
    )
    assert "JD102 asks for one, but too little memory." in document(short)
    assert "--remedies begun" in document(dataclasses.replace(asks, state="trained"))
    bare = dataclasses.replace(off, findings=[Finding("JD102", "info", [], "small")])
    assert "no finding asks for one" in document(bare)


def test_where_none_was_enough_the_nearest_is_written_and_marked() -> None:
    far = dataclasses.replace(POOR, name="far", after=BEFORE, patches={"pytorch": "x = 2\n"})
    near = dataclasses.replace(POOR, patches={"pytorch": "x = 3\n"})
    text = document(with_remedies(far, near))
    assert "None of 2 remedies was enough" in text and "(small-init): not enough\n" in text
    assert "(left JD102)" in text and "```python\nx = 3\n```" in text and "x = 2" not in text
    assert "not enough" not in document(with_remedies(POOR, GOOD))


def test_what_was_not_measured_is_left_out() -> None:
    unknown = Outlook(undecided=["JD101", "JD102"])
    blind = dataclasses.replace(GOOD, before=unknown, after=unknown)
    assert effect(blind) == "both conditions unknown"
    other = Outlook([9.0, 9.1], None, None, "not applicable", "not applicable", "warn", ["JD103"])
    post = dataclasses.replace(POOR, before=other, after=other)
    assert "nothing left" not in effect(post) and effect(post).endswith(
        "the conditions do not apply"
    )
    clean = dataclasses.replace(other, verdict="pass", fired=[])
    assert effect(dataclasses.replace(post, after=clean)).endswith("no warning or error left")


def test_conditions_that_were_not_selected_are_not_called_unknown() -> None:
    cleared = dataclasses.replace(GOOD, before=Outlook(fired=["JD204"]), after=Outlook())
    assert effect(cleared) == "no warning or error left"
    left = dataclasses.replace(GOOD, before=Outlook(), after=Outlook(fired=["JD204"]))
    assert effect(left) == "the two conditions were not selected"
    one = dataclasses.replace(GOOD, before=Outlook(), after=Outlook(small_sublayers="met"))
    assert effect(one) == "small sub-layers met"


def test_one_remedy_that_is_not_enough_is_named_in_the_singular() -> None:
    (line,) = lines.to_do(with_remedies(POOR))
    assert line.startswith(f"one remedy was tried, and it was not enough: {POOR.title}: ")
    assert "One remedy was tried, and it was not enough. It is" in document(with_remedies(POOR))
    (line,) = lines.to_do(with_remedies(POOR, POOR))
    assert line.startswith(f"none of 2 remedies was enough; nearest: {POOR.title}: ")
    assert "None of 2 remedies was enough." in document(with_remedies(POOR, POOR))
