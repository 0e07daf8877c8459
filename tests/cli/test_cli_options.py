"""Options: what is refused at the door, what reaches the audit, and what a configuration adds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli.rig import Done, Stub, files

Run = Callable[..., Done]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--fail-on", "sometimes"], "--fail-on"),
        (["--format", "yaml"], "--format"),
        (["--dtype", "float16"], "--dtype"),
        (["--state", "frozen"], "--state"),
        (["--sort", "name"], "--sort"),
        (["--batch", "0"], "--batch"),
        (["--batch", "two"], "--batch"),
        (["--seq", "-1"], "--seq"),
        (["--seed", "-1"], "--seed"),
        (["--tol", "0"], "--tol"),
        (["--tol", "nan"], "--tol"),
        (["--tol", "inf"], "--tol"),
        (["--confidence", "1"], "--confidence"),
        (["--confidence", "0"], "--confidence"),
        (["--confidence-all", "1"], "--confidence-all"),
        (["--confidence-all", "0"], "--confidence-all"),
        (["--confidence-all", "nan"], "--confidence-all"),
        (["--probes", "0"], "--probes"),
        (["--probes", "2.5"], "--probes"),
        (["--max-products", "3"], "--max-products"),
        (["--lr", "0"], "--lr"),
        (["--lr", "-0.5"], "--lr"),
        (["--warmup", "1.5"], "--warmup"),
        (["--clip", "0"], "--clip"),
        (["--beta2", "1"], "--beta2"),
        (["--device", "0"], "--device"),
        (["--device", "cuda:x"], "--device"),
        (["--model-args", "{"], "--model-args"),
        (["--model-args", "[1]"], "--model-args"),
        (["--select", "JD7"], "--select"),
        (["--ignore", "E501"], "--ignore"),
    ],
    ids=" ".join,
)
def test_a_value_without_meaning(
    jd: Run, stub: Stub, tmp_path: Path, args: list[str], named: str
) -> None:
    done = jd("audit", "x.pt", *args, "--json", "report.json")
    assert (done.code, done.out, stub.calls) == (2, "", 0)
    assert f"invalid value for '{named}'" in done.err and args[-1] in done.err
    assert files(tmp_path) == set()


def test_what_reaches_the_audit(jd: Run, stub: Stub) -> None:
    done = jd(
        "audit",
        "run.pt",
        "--model",
        "b.py:f",
        "--model-args",
        '{"n": 1}',
        "--trust-pickle",
        "--tokens",
        "t.npy",
        "--batch",
        3,
        "--seq",
        9,
        "--seed",
        5,
        "--device",
        "cpu",
        "--dtype",
        "float64",
        "--tol",
        0.1,
        "--confidence",
        0.99,
        "--decide",
        "--max-products",
        50,
        "--state",
        "trained",
        "--lr",
        3e-4,
        "--warmup",
        10,
        "--clip",
        1,
        "--beta2",
        0.95,
        "--profile",
        "paper",
        "--select",
        "jd101,JD102",
        "--select",
        "JD9",
        "--ignore",
        "JD104",
        "--remedies",
        "all",
    )
    assert done.code == 0, done.err
    asked = dict(stub.asked)
    assert asked.pop("progress") is not None
    assert asked == {
        "source": "run.pt",
        "model": "b.py:f",
        "model_args": {"n": 1},
        "key": None,
        "trust_pickle": True,
        "tokens": "t.npy",
        "input_factory": None,
        "batch": 3,
        "seq": 9,
        "seed": 5,
        "device": "cpu",
        "dtype": "float64",
        "tol": 0.1,
        "confidence": 0.99,
        "decide": True,
        "max_products": 50,
        "state": "trained",
        "lr": 3e-4,
        "warmup": 10,
        "clip": 1.0,
        "beta2": 0.95,
        "profile": "paper",
        "select": ("JD101", "JD102", "JD9"),
        "ignore": ("JD104",),
        "thresholds": None,
        "declared": (),
        "contract": {},
        "ranks": False,
        "inputs": None,
        "optimizer": None,
        "products": True,
        "baseline": None,
        "remedies": "all",
        "risk": None,
        "confidence_all": None,
        "probes": 1,
        "against": None,
        "replay": None,
    }


def test_a_confidence_of_all_intervals_stands_in_place_of_that_of_each(jd: Run, stub: Stub) -> None:
    assert jd("audit", "run.pt", "--confidence-all", 0.99, "--probes", 3).code == 0
    assert (stub.asked["confidence"], stub.asked["confidence_all"], stub.asked["probes"]) == (
        None,
        0.99,
        3,
    )


@pytest.mark.parametrize("command", ["audit", "gate"])
@pytest.mark.parametrize("each", ["0.99", "0.999"])  # the second is the default, given all the same
def test_both_confidences_are_refused(jd: Run, stub: Stub, command: str, each: str) -> None:
    done = jd(command, "run.pt", "--confidence", each, "--confidence-all", "0.99")
    assert (done.code, done.out, stub.calls) == (2, "", 0)
    assert "the confidence is given twice" in done.err and "--confidence-all 0.99" in done.err


def test_a_confidence_on_the_command_line_wins_over_the_other_one_in_a_file(
    jd: Run, stub: Stub, tmp_path: Path
) -> None:
    (tmp_path / "jacdiag.toml").write_text("confidence = 0.9\n")
    assert jd("audit", "run.pt", "--confidence-all", 0.99).code == 0
    assert (stub.asked["confidence"], stub.asked["confidence_all"]) == (None, 0.99)
    (tmp_path / "jacdiag.toml").write_text("confidence-all = 0.9\n")
    assert jd("audit", "run.pt", "--confidence", 0.99).code == 0
    assert (stub.asked["confidence"], stub.asked["confidence_all"]) == (0.99, None)
    (tmp_path / "jacdiag.toml").write_text("confidence-all = 0.9\nconfidence = 0.9\n")
    assert jd("audit", "run.pt").code == 2


def test_defaults_are_the_librarys(jd: Run, stub: Stub) -> None:
    from jacdiag.pipeline.options import AuditOptions

    jd("audit", "run.pt")
    del stub.asked["source"], stub.asked["progress"]
    assert stub.asked.pop("remedies") == "first", (
        "a person wants to know what to do; a program asks for it"
    )
    defaults = vars(AuditOptions())
    assert stub.asked == {name: defaults[name] for name in stub.asked}


def test_command_line_has_every_audit_option(jd: Run, stub: Stub) -> None:
    from dataclasses import fields

    from jacdiag_cli.audit import audit

    from jacdiag.pipeline.options import AuditOptions

    # Said otherwise: --inputs is a factory, --replay holds a batch, the configuration declares.
    in_code_only = {"inputs", "input_factory", "progress", "optimizer", "products", "baseline"}
    in_code_only |= {"ranks", "declared", "thresholds"}
    options = {param.name for param in audit.params}
    missing = {field.name for field in fields(AuditOptions)} - options - in_code_only
    assert not missing, f"the command line cannot say {missing}"


@pytest.mark.parametrize("name", ["jacdiag.toml", "pyproject.toml"])
def test_options_are_read_from_jacdiag_toml_and_pyproject(
    jd: Run, stub: Stub, tmp_path: Path, name: str
) -> None:
    table = "tool.jacdiag" if name == "pyproject.toml" else None
    head = f"[{table}]\n" if table else ""
    inner = f"[{table}.thresholds.norm_gain]" if table else "[thresholds.norm_gain]"
    text = (
        f'{head}tol = 0.2\nbatch = 4\nselect = ["JD1", "JD9"]\nfail-on = "warning"\nmodel = '
        '"sub/b.py:f"\n'
    )
    (tmp_path / name).write_text(f"{text}{inner}\nwarning = 30.0\n")
    assert jd("audit", "run.pt", "--batch", 1).code == 1
    asked = stub.asked
    assert (asked["tol"], asked["batch"], asked["select"]) == (0.2, 1, ("JD1", "JD9"))
    assert asked["model"] == str(tmp_path / "sub/b.py:f")
    assert asked["thresholds"] == {"norm_gain": {"warning": 30.0}}


def test_one_text_is_one_value(jd: Run, stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "jacdiag.toml").write_text('ignore = "JD101,JD9"\n')
    assert jd("audit", "run.pt").code == 0
    assert stub.asked["ignore"] == ("JD101", "JD9")


def test_jacdiag_toml_goes_first_and_parents_are_searched(
    jd: Run, stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.jacdiag]\nseed = 1\n")
    (tmp_path / "jacdiag.toml").write_text("seed = 2\n")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "pyproject.toml").write_text('[project]\nname = "no settings of ours"\n')
    monkeypatch.chdir(tmp_path / "deep" / "er")
    jd("audit", "run.pt")
    assert stub.asked["seed"] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tol = ", "cannot read"),
        ("tool = 0.1", "the closest known one is 'tol'"),
        ("trust-pickle = true", "cannot be set in"),
        ("trust_pickle = true", "cannot be set in"),
        ("tol = -1", "(from"),
        ('fail-on = "often"', "(from"),
        ("thresholds = 3", "must be a table"),
        ('profile = "mine"', "unknown profile 'mine'"),
        ("batch = [1, 2]", "'batch' in the configuration takes one value"),
        ("tol = { a = 1 }", "'tol' in the configuration takes one value"),
        ('select = [["JD1"]]', "'select' in the configuration takes one value"),
        ("select = 3", "no rule begins with '3'"),
        ("select = [1]", "no rule begins with '1'"),
        ("model-args = [1]", "'model-args' in the configuration takes one value"),
        ("batch = 1.5", "(from"),
        ("batch = true", "(from"),
        ("[tool.jacdiag]\ntol = 1", "without [tool.jacdiag]"),
        ("thresholds = { norm_gan = { warning = 1 } }", "norm_gain"),
        ("thresholds = { norm_gain = { waning = 1 } }", "has no 'waning'"),
        ('json = "nowhere/report.json"', "its folder does not exist"),
        ('plot = "gain.gif"', ".png, .svg or .pdf"),
    ],
)
def test_a_configuration_that_has_no_meaning(
    jd: Run, stub: Stub, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "jacdiag.toml").write_text(text + "\n")
    done = jd("audit", "run.pt")
    assert (done.code, stub.calls) == (2, 0)
    assert message in done.err and "Traceback" not in done.err
    assert jd("audit", "-h").code == 0


def test_the_command_line_is_blamed_for_its_own(jd: Run, stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "jacdiag.toml").write_text("tol = 0.1\n")
    assert "(from" not in jd("audit", "run.pt", "--tol", "-1").err


PROFILES = """
[thresholds.norm_gain]
warning = 3.0
error = 90.0
[profiles.strict]
select = ["JD1"]
fail-on = "info"
[profiles.strict.levels]
JD103 = "error"
[profiles.strict.thresholds.norm_gain]
info = 1.5
warning = 2.0
"""


def test_user_profile_in_the_configuration_is_applied(jd: Run, stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "jacdiag.toml").write_text(PROFILES)
    assert jd("audit", "run.pt", "--profile", "strict").code == 1
    assert stub.asked["profile"] == {"name": "strict", "levels": {"JD103": "error"}}
    assert stub.asked["select"] == ("JD1",)
    assert stub.asked["thresholds"] == {"norm_gain": {"info": 1.5, "warning": 2.0, "error": 90.0}}


def test_the_command_line_wins_over_a_profile(jd: Run, stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "jacdiag.toml").write_text(PROFILES)
    done = jd("audit", "run.pt", "--profile", "strict", "--fail-on", "never", "--select", "JD102")
    assert (done.code, stub.asked["select"]) == (0, ("JD102",))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"levels": '{ JD103 = "loud" }'}, "JD103 = 'loud'"),
        ({"levels": '{ JD777 = "error" }'}, "JD777"),
        ({"thresholds": "{ colour = { warning = 1 } }"}, "colour"),
        ({"colour": "1"}, "unknown key 'colour'"),
        ({"fail-on": '"often"'}, "'fail-on' of profile"),
        ({"select": '["X1"]'}, "'select' of profile"),
        ({"thresholds": "2"}, "must be a table"),
    ],
)
def test_a_profile_without_meaning(
    jd: Run, stub: Stub, tmp_path: Path, table: dict[str, Any], message: str
) -> None:
    lines = "".join(f"{key} = {value}\n" for key, value in table.items())
    (tmp_path / "jacdiag.toml").write_text(f"[profiles.p]\n{lines}")
    done = jd("audit", "run.pt", "--profile", "p")
    assert (done.code, stub.calls) == (2, 0)
    assert message in done.err and "Traceback" not in done.err


@pytest.mark.parametrize("text", ["[tool]\njacdiag = 3\n", "[[tool.jacdiag]]\nseed = 1\n"])
def test_settings_of_a_pyproject_that_are_no_table(
    jd: Run, stub: Stub, tmp_path: Path, text: str
) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    done = jd("audit", "run.pt")
    assert (done.code, stub.calls) == (2, 0) and "must be a table" in done.err


def test_pyproject_whose_tool_entry_is_a_number_is_ignored(
    jd: Run, stub: Stub, tmp_path: Path
) -> None:
    (tmp_path / "pyproject.toml").write_text("tool = 3\n")
    assert jd("audit", "run.pt").code == 0


def test_a_table_for_the_factory(jd: Run, stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "jacdiag.toml").write_text('model = "b:f"\n[model-args]\nn_layer = 2\n')
    assert jd("audit", "run.pt").code == 0
    assert stub.asked["model_args"] == {"n_layer": 2}
