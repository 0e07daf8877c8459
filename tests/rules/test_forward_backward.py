"""JD301 to JD305 and JD401 to JD406 on records made by hand: must fire, must not, on the
boundary.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from rules.reports import healthy, report

from jacdiag.records import (
    Finding,
    Growth,
    NetworkRecord,
    Plan,
    Report,
    StreamRange,
    SublayerRecord,
)
from jacdiag.records.signal_propagation import (
    AttentionRecord,
    BackwardRecord,
    DeadBranch,
    DeadPath,
    ForwardRecord,
    Peak,
)
from jacdiag.rules import RULES, evaluate
from jacdiag.rules.thresholds import load_thresholds

pytestmark = pytest.mark.check("rules")

LIMITS = load_thresholds()
POINTS = ["h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp", "end"]


def judged(
    network: NetworkRecord | None = None, rows: list[SublayerRecord] | None = None, **other: object
) -> Report:
    return evaluate(report(rows or healthy(), network=network, **other), thresholds=LIMITS)


def found(made: Report, code: str) -> list[Finding]:
    return [finding for finding in made.findings if finding.code == code]


def levels(made: Report, code: str) -> list[str]:
    return [finding.level for finding in found(made, code)]


def status(made: Report, code: str) -> str:
    return next(rule.status for rule in made.rules if rule.code == code)


def forward(**fields: object) -> NetworkRecord:
    return NetworkRecord(forward=ForwardRecord(POINTS, **fields))  # type: ignore[arg-type]


def backward(**fields: object) -> NetworkRecord:
    return NetworkRecord(gradient_norms=[1.0, 1.0], backward=BackwardRecord(**fields))  # type: ignore[arg-type]


# -- forward ---------------------------------------------
LINEAR = [1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("variance", "fires"),
    [
        (LINEAR, False),
        ([0.0, 1.0, 2.0, 3.0, 4.0], False),  # linear from nothing: exactly 2
        ([1.0, 1.0, 1.0, 2.0, 4.0], False),  # on the boundary
        ([1.0, 1.0, 1.0, 2.0, 4.01], True),
        ([4.0**k for k in range(5)], True),
        ([16.0, 8.0, 4.0, 2.0, 1.0], False),
    ],
)
def test_jd301_at_each_growth_of_the_variance(variance: list[float], fires: bool) -> None:
    made = judged(forward(variance=variance))
    assert levels(made, "JD301") == (["info"] if fires else [])
    assert status(made, "JD301") == ("fired" if fires else "clean")


@pytest.mark.parametrize(
    ("value", "level"), [(65504.0, []), (65505.0, ["warning"]), (math.inf, [])]
)
def test_what_float16_cannot_hold(value: float, level: list[str]) -> None:
    """An activation that is infinite already is another rule's."""
    peaks = [Peak(1.0, 1.0, 0)] * 4 + [Peak(value, 1.0, 0)]
    made = judged(forward(variance=LINEAR, peaks=peaks))
    assert levels(made, "JD301") == level
    if level:
        assert "float16" in found(made, "JD301")[0].what and found(made, "JD301")[0].where == [
            "end"
        ]


@pytest.mark.parametrize(
    ("value", "median", "fires"),
    [
        (2400.0, 0.3, True),
        (100.0, 0.01, False),
        (100.1, 0.1, True),
        (1000.0, 1.0, False),
        (90.0, 0.001, False),
    ],
)
def test_massive_activations_need_both(value: float, median: float, fires: bool) -> None:
    peaks = [Peak(1.0, 1.0, 0)] * 4 + [Peak(value, median, 7, 0, 3, 1234)]
    made = judged(forward(peaks=peaks))
    assert levels(made, "JD302") == (["info"] if fires else [])
    if fires:
        assert "feature 7, position 3 (token 1234)" in found(made, "JD302")[0].what


def with_attention(record: AttentionRecord | None) -> list[SublayerRecord]:
    return [
        replace(row, attention=record if row.kind == "attention" else None) for row in healthy()
    ]


@pytest.mark.parametrize(
    ("logit", "level"),
    [(5.0, []), (100.0, []), (101.0, ["info"]), (1e4, ["info"]), (10001.0, ["warning"])],
)
def test_jd303_level_at_each_largest_attention_logit(logit: float, level: list[str]) -> None:
    made = judged(rows=with_attention(AttentionRecord(logit, 1.0, 0.5, None, 8)))
    assert levels(made, "JD303") == level


@pytest.mark.parametrize(
    ("share", "fires"), [(1.0, False), (0.051, False), (0.0499, True), (0.0, True)]
)
def test_jd304_fires_below_its_entropy_threshold(share: float, fires: bool) -> None:
    made = judged(rows=with_attention(AttentionRecord(1.0, share, share, None, 8)))
    assert levels(made, "JD304") == (["info"] if fires else [])


@pytest.mark.parametrize(("cosine", "fires"), [(0.2, False), (0.95, False), (0.951, True)])
def test_jd305_fires_above_its_cosine_threshold(cosine: float, fires: bool) -> None:
    made = judged(forward(token_cosine=[0.0, 0.1, 0.1, 0.1, cosine]))
    assert levels(made, "JD305") == (["info"] if fires else [])


def test_what_was_not_measured_is_not_applicable_and_says_why() -> None:
    rows = [
        replace(row, notes={"attention": "no call was recorded"}) for row in with_attention(None)
    ]
    network = NetworkRecord(
        notes={"gradient_norms": "the loss has no value"},
        forward=ForwardRecord(
            POINTS, notes=dict.fromkeys(("variance", "peaks", "token_cosine"), "NaN at h.0.attn")
        ),
        backward=BackwardRecord(notes={"dead": "no loss", "embedding_norm": "no embedding"}),
    )
    made = judged(network, rows)
    notes = {rule.code: (rule.status, rule.note) for rule in made.rules}
    for code in ("JD301", "JD302", "JD305"):
        assert notes[code] == ("not-applicable", "NaN at h.0.attn")
    assert notes["JD303"] == notes["JD304"] == ("not-applicable", "no call was recorded")
    assert notes["JD401"] == ("not-applicable", "no loss") and notes["JD404"] == (
        "not-applicable",
        "no embedding",
    )
    assert notes["JD403"] == notes["JD406"] == ("not-applicable", "the loss has no value")


def test_without_a_network_nothing_is_said() -> None:
    made = judged(None)
    flow = [rule for rule in made.rules if rule.code.startswith(("JD3", "JD4"))]
    structural = ("JD402", "JD410")
    assert {rule.status for rule in flow if rule.code not in structural} == {"not-applicable"}
    assert made.verdict == "pass"


# -- backward ---------------------------------------------
WHERE = ["h.0.attn", "h.0.mlp"]


def dead(**fields: object) -> list[Finding]:
    path = DeadPath(WHERE, True, "unknown")
    return found(judged(backward(dead=[replace(path, **fields)])), "JD401")  # type: ignore[arg-type]


def test_no_dead_path_is_clean() -> None:
    made = judged(backward(dead=[]))
    assert status(made, "JD401") == "clean" and made.verdict == "pass"


def test_an_unknown_cause_is_called_unknown() -> None:
    [finding] = dead()
    assert finding.level == "warning" and "not known" in finding.what and finding.fix == ""


@pytest.mark.parametrize(
    ("own", "words"), [(0.5, "first step changes"), (0.0, "no step changes"), (None, "")]
)
def test_a_zero_gain_says_whether_it_can_end(own: float | None, words: str) -> None:
    [finding] = dead(cause="zero", parameters=["norm.weight"], values=[0.0], own_gradient=own)
    assert (
        finding.level == "warning" and "norm.weight is 0" in finding.what and words in finding.what
    )
    if own is None:
        assert "step" not in finding.what


def test_the_head_alone_is_an_info() -> None:
    assert [f.level for f in dead(cause="zero", parameters=["head"], values=[0.0], head=True)] == [
        "info"
    ]


def test_a_cut_names_its_calls_and_is_meant_where_all_is_frozen() -> None:
    [finding] = dead(cause="cut", calls=["detach in model.py:3"])
    assert "detach in model.py:3" in finding.what and "detach in model.py:3" in finding.fix
    assert dead(cause="cut", calls=["detach in model.py:3"], frozen=True) == []
    assert len(dead(cause="zero", parameters=["norm.weight"], values=[0.0], frozen=True)) == 1


@pytest.mark.parametrize(("alike", "level"), [(True, "info"), (False, "warning")])
def test_jd402_level_of_a_branch_with_zero_output(alike: bool, level: str) -> None:
    rows = healthy()
    rows[1] = replace(rows[1], dead_branch=DeadBranch(True, ["h.0.mlp.w2"], [0.0], alike=alike))
    made = judged(rows=rows)
    assert levels(made, "JD402") == [level] and made.verdict == ("pass" if alike else "warn")
    assert ("zero-initialised" in found(made, "JD402")[0].what) == alike


def test_a_branch_that_was_not_measured_is_no_dead_one() -> None:
    rows = [replace(row, branch_norm=None) for row in healthy()]
    assert status(judged(rows=rows), "JD402") == "not-applicable"


@pytest.mark.parametrize(
    ("name", "whole", "fires"),
    [
        ("gradient", 0.84, False),
        ("gradient", 0.86, True),
        ("gradient", -0.86, True),
        ("activation", 0.79, False),
        ("activation", 0.81, True),
        ("activation", -0.81, True),
    ],
)
def test_growth_over_the_whole_depth(name: str, whole: float, fires: bool) -> None:
    """The records are of two layers."""
    growth = Growth(**{name: whole / 2})
    made = judged(NetworkRecord(gradient_norms=[1.0, 1.0], growth=growth))
    assert levels(made, "JD403") == (["info"] if fires else [])
    if fires:
        assert ("grows" if whole > 0 else "shrinks") in found(made, "JD403")[0].what


@pytest.mark.parametrize(("share", "fires"), [(15.0, False), (50.0, False), (51.0, True)])
def test_the_embeddings_gradient_has_a_threshold_of_the_user_only(
    share: float, fires: bool
) -> None:
    network = backward(dead=[], embedding="wte.weight", embedding_norm=share, others_median=1.0)
    assert levels(judged(network), "JD404") == []
    own = load_thresholds({"embedding_gradient": {"info": 50.0}})
    made = evaluate(report(healthy(), network=network), thresholds=own)
    assert levels(made, "JD404") == (["info"] if fires else [])


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (Plan(), "not-applicable"),
        (Plan(lr=1.9e-4), "clean"),  # the matrices have std 0.02
        (Plan(lr=2.0e-4), "clean"),
        (Plan(lr=2.1e-4), "fired"),
        (Plan(lr=2.1e-2, warmup=200), "clean"),
    ],
)
def test_jd405_fires_above_its_first_update_threshold(plan: Plan, expected: str) -> None:
    made = judged(plan=plan)
    assert status(made, "JD405") == expected
    assert all("assumed" in f.what and f.level == "info" for f in found(made, "JD405"))


def test_a_gradient_that_is_not_finite() -> None:
    network = replace(
        backward(dead=[], not_finite=["wte.weight"]), loss={"kind": "x", "value": 1.0}
    )
    assert levels(judged(network), "JD406") == ["warning"]
    assert "although the loss is finite" in found(judged(network), "JD406")[0].what
    broken = replace(network, loss={"kind": "x", "value": math.nan})
    assert "although" not in found(judged(broken), "JD406")[0].what


# -- the report ---------------------------------------------
def test_flow_records_survive_json_and_older_reports_load() -> None:
    network = replace(
        forward(variance=LINEAR, peaks=[Peak(1.0, 1.0, 0)], token_cosine=[0.1]),
        backward=BackwardRecord(
            "wte", 1.0, 0.5, [DeadPath(WHERE, True, "cut", calls=["detach"])], ["x"]
        ),
    )
    rows = with_attention(AttentionRecord(1.0, 2.0, 0.5, None, 8))
    rows[1] = replace(
        rows[1], dead_branch=DeadBranch(parameters=["w2"], values=[0.0]), gradient_norm=0.5
    )
    made = report(rows, network=network)
    assert Report.from_json(made.to_json()) == made

    data = json.loads(made.to_json())
    for key in ("forward", "backward"):
        del data["network"][key]
    for row in data["sublayers"]:
        for key in ("attention", "gradient_norm", "dead_branch"):
            del row[key]
    old = Report.from_json(json.dumps(data))
    assert old.network is not None and old.network.forward is None
    assert evaluate(old, thresholds=LIMITS).verdict == "pass"


def test_the_contracts_codes_are_there() -> None:
    codes = {rule.code for rule in RULES}
    assert {"JD301", "JD302", "JD303", "JD304", "JD305"} <= codes
    assert {f"JD40{k}" for k in range(1, 7)} <= codes


# -- a part of the model ---------------------------------------------
PART = StreamRange("h.0.attn", "h.0.mlp", sublayers=2, of=4, layers=1)


def test_growth_over_a_part_of_the_model_names_its_ends_and_counts_its_layers() -> None:
    exponent = math.log(50.0)
    made = judged(NetworkRecord(growth=Growth(exponent, exponent), stream=PART))
    sentences = [finding.what for finding in found(made, "JD403")]
    ways = (
        "from the shortcut of h.0.attn to the sum of h.0.mlp, 2 of 4 sub-layers",
        "from the sum of h.0.mlp to the shortcut of h.0.attn, 2 of 4 sub-layers",
    )
    assert len(sentences) == 2
    for sentence, way in zip(sentences, ways, strict=True):
        assert f"grows 50.0-fold {way} (" in sentence

    # Over all sub-layers it is from the input to the top.
    whole = replace(PART, sublayers=4, layers=2)
    made = judged(NetworkRecord(growth=Growth(exponent, exponent), stream=whole))
    assert "2,500-fold from the input to the top (" in found(made, "JD403")[0].what


def test_variance_that_grows_over_a_part_of_the_model_names_its_end() -> None:
    growing = ForwardRecord(POINTS, variance=[1.0, 1.0, 1.0, 1.0, 100.0])
    part = found(judged(NetworkRecord(forward=growing, stream=PART)), "JD301")
    assert "from h.1.attn to the sum of h.0.mlp (linear" in part[0].what
    whole = found(judged(NetworkRecord(forward=growing)), "JD301")
    assert "from h.1.attn to the end (linear" in whole[0].what
