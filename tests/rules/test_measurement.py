"""JD901 to JD907, and the engine: selection, profiles, verdicts, documentation."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rules.reports import LIMITS, findings, healthy, judged, report, status

from jacdiag.errors import UsageError
from jacdiag.records import ContractRecord, Interval, ModelRecord, WeightRecord
from jacdiag.render.content.sentences import headline
from jacdiag.render.content.verdict import to_do, verdict_lines
from jacdiag.rules import RULES, evaluate, rule
from jacdiag.rules.profile import profile_of

CODES = tuple(r.code for r in RULES)


@pytest.mark.parametrize(("covered", "level"), [(1000, None), (951, "info"), (949, "warning")])
def test_jd902_level_at_each_share_of_uncovered_parameters(covered: int, level: str | None) -> None:
    model = ModelRecord(
        "GPT", 1000, 2, covered_parameters=covered, uncovered=["adapter.weight"] if level else []
    )
    made = judged(healthy(), model=model)
    assert [f.level for f in findings(made, "JD902")] == ([level] if level else [])
    assert status(made, "JD902") == ("fired" if level else "clean")


def test_a_model_that_is_not_deterministic_is_an_error_and_nothing_else_is_claimed() -> None:
    made = judged([], settings={"checks": {"deterministic": False, "non_finite": []}})
    assert made.verdict == "fail" and [f.code for f in made.findings if f.level == "error"] == [
        "JD905"
    ]
    assert not findings(made, "JD904")


def test_non_finite_weights_are_named_with_their_sublayers() -> None:
    rows = healthy()
    rows[1] = replace(rows[1], parameters=["h.0.mlp.weight"], branch_norm=None, core_norm=None)
    made = judged(
        rows, settings={"checks": {"deterministic": True, "non_finite": ["h.0.mlp.weight"]}}
    )
    (finding,) = findings(made, "JD906")
    assert (
        finding.level == "error"
        and finding.where == ["h.0.mlp"]
        and "h.0.mlp.weight" in finding.what
    )
    assert made.verdict == "fail"


NAN = {"branch_norm": "not finite: NaN or Inf in the shortcut or the branch"}


@pytest.mark.parametrize("kind", ["mlp", "mixer"])
def test_what_could_not_be_measured_is_never_met(kind: str) -> None:
    """Nor where no threshold is calibrated for it: a NaN must not pass by the kind of what it
    broke.
    """
    rows = healthy()
    rows[3] = replace(
        rows[3], kind=kind, branch_norm=None, core_norm=None, norm_gain=None, notes=NAN
    )
    made = judged(rows)
    assert (
        made.conditions.small_sublayers
        == made.conditions.large_shortcut
        == made.verdict
        == "unknown"
    )
    assert {status(made, code) for code in ("JD101", "JD102", "JD103")} == {"unknown"}


def test_every_sublayer_that_was_not_measured_is_listed_whatever_its_placement() -> None:
    rows = [
        *healthy()[:2],
        *(replace(r, placement="none", branch_norm=None, notes=NAN) for r in healthy()[2:]),
    ]
    (finding,) = findings(judged(rows), "JD901")
    assert finding.where == ["h.1.attn", "h.1.mlp"]


def test_advice_on_a_nan_names_the_weight_and_not_more_products() -> None:
    rows = healthy()
    rows[1] = replace(rows[1], branch_norm=None, core_norm=None, norm_gain=None, notes=NAN)
    (finding,) = findings(
        judged(rows, settings={"checks": {"non_finite": ["h.0.mlp.weight"]}}), "JD901"
    )
    assert "h.0.mlp.weight" in finding.fix and "--max-products" not in finding.fix
    # A gate and an annotation have no table of their own.
    assert "the table of jacdiag audit says what could not be measured" in finding.fix
    rows[0] = replace(rows[0], branch_norm=Interval(1.0, 0.9, 1.1, 0.999))
    (finding,) = findings(judged(rows), "JD901")
    assert "NaN" in finding.fix and "--max-products" in finding.fix


def test_a_table_is_referred_to_only_if_a_norm_is_missing() -> None:
    rows = healthy()
    rows[0] = replace(rows[0], branch_norm=Interval(1.0, 0.9, 1.1, 0.999))
    (finding,) = findings(judged(rows), "JD901")
    assert finding.fix == "more products (--max-products), or --dtype float64"


def test_a_rule_that_matched_nothing_is_not_applicable_and_said() -> None:
    made = judged([])
    assert status(made, "JD101") == "not-applicable"
    assert findings(made, "JD904")[0].level == "warning" and made.verdict == "unknown"


def test_rules_that_were_not_selected_are_not_undecided() -> None:
    weight = WeightRecord(
        "h.0.mlp.weight",
        [64, 64],
        "W_1",
        "h.*.mlp.weight",
        0,
        "h.0.mlp",
        64,
        64,
        "normal",
        0.02,
        0.0195,
        0.0205,
        0.0,
    )
    made = replace(
        report([]),
        contract=ContractRecord("GPT", {"N": 1.0, "d": 64.0}, [weight], pinned={"W_1": "0.02"}),
    )
    asked = evaluate(made, thresholds=LIMITS)
    assert asked.verdict == "unknown" and findings(asked, "JD904"), (
        "norms were asked for, and none was judged"
    )
    for without in ({"select": ["JD2", "JD9"]}, {"ignore": ["JD1"]}):
        alone = evaluate(made, thresholds=LIMITS, **without)
        assert alone.verdict == "pass" and not findings(alone, "JD904")
        assert headline(alone) == "The two conditions were not selected"
        assert {line.status for line in verdict_lines(alone)[:2]} == {"not selected"}
        assert to_do(alone) == ["nothing: no rule fired"]
    nothing = evaluate(report(healthy()), thresholds=LIMITS, select=["JD9"])
    assert nothing.verdict == "unknown" and findings(nothing, "JD904")
    assert "--tol" not in to_do(nothing)[0]


def test_weights_alone_are_never_a_pass() -> None:
    made = evaluate(replace(report([]), tier="weights"), thresholds=LIMITS)
    assert made.verdict == "unknown" and made.conditions.small_sublayers == "unknown"


def test_select_and_ignore_take_prefixes() -> None:
    made = evaluate(report(healthy()), thresholds=LIMITS, select=["JD1"], ignore=["JD104"])
    assert [r.code for r in made.rules] == ["JD101", "JD102", "JD103", "JD105", "JD110"]
    with pytest.raises(UsageError, match="JD8"):
        evaluate(report(healthy()), thresholds=LIMITS, select=["JD8"])


def test_a_deselected_condition_is_unknown_not_met() -> None:
    made = evaluate(report(healthy()), thresholds=LIMITS, select=["JD102"])
    assert made.conditions.small_sublayers == "unknown" and made.conditions.large_shortcut == "met"


def test_codes_are_unique_ordered_and_documented() -> None:
    assert list(CODES) == sorted(set(CODES))
    for one in RULES:
        page = one.page
        assert all([page.summary, page.what, page.why, page.example, page.remedy]), one.code
        assert len(one.summary) < 120 and "\n" not in one.summary


def test_an_unknown_code_names_the_closest() -> None:
    assert rule("jd102").code == "JD102"
    with pytest.raises(UsageError, match="JD10"):
        rule("JD10")


def test_profiles_promote_levels_and_unknown_ones_are_refused() -> None:
    assert profile_of("paper", CODES).promoted("JD101", "warning") == "error"
    assert (
        profile_of({"name": "strict", "levels": {"JD103": "error"}}, CODES).promoted(
            "JD103", "info"
        )
        == "warning"
    )
    for bad in (
        "papr",
        {"levels": {"JD999": "error"}},
        {"levels": {"JD101": "loud"}},
        {"colour": 1},
    ):
        with pytest.raises(UsageError):
            profile_of(bad, CODES)


# -- what to do ---------------------------------------------
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"path": "a.pt", "format": "torch"}, "an earlier checkpoint; check the file's hash"),
        ({"format": "factory", "factory": "build.py:model"}, "what fills them in build.py:model: "),
        ({"format": "hf-config", "factory": "hf:gpt2"}, "what fills them in hf:gpt2: the init"),
        ({"format": "module", "factory": "nets.Net"}, "look for what wrote them last: the init"),
    ],
)
def test_the_advice_about_nan_fits_the_source(source: dict[str, str], words: str) -> None:
    checks = {"deterministic": True, "non_finite": ["h.0.mlp.w1"], "replay": {}}
    made = judged(healthy(), source=source, settings={"checks": checks})
    [finding] = findings(made, "JD906")
    assert words in finding.fix
    assert ("checkpoint" in finding.fix) == ("path" in source)
    assert ("hash" in finding.fix) == ("path" in source)


@pytest.mark.parametrize("device", ["cpu", "cuda:0", None])
def test_the_advice_about_runs_that_differ_names_what_eval_mode_leaves(device: str | None) -> None:
    checks = {"deterministic": False, "non_finite": [], "replay": {}}
    made = judged(healthy(), settings={"checks": checks, "device": device})
    [finding] = findings(made, "JD905")
    assert "model.eval()" not in finding.fix
    for cause in ("noise", "functional dropout with training=True", "a counter", "a cache"):
        assert cause in finding.fix
    assert ("a kernel on cuda:0 may differ" in finding.fix) == (device == "cuda:0")
