"""`jacdiag gate`: exit codes, seeds, baselines, budget, safeguards."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gate import net
from jacdiag_cli.main import main

from jacdiag.errors import SourceError, UsageError
from jacdiag.gate import gate, read_baseline, write_baseline

FAST: tuple[Any, ...] = ("--seq", "16", "--batch", "1", "--tol", "0.3")
SMALL = '{"layers": 2, "d": 32}'
SMALL_BROKEN = '{"layers": 2, "d": 32, "broken": true}'
QUICK: dict[str, Any] = {"batch": 1, "seq": 16, "tol": 0.3}
small = partial(net.model, layers=2, d=32)


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    shutil.copy(Path(net.__file__), tmp_path / "net.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CI", raising=False)

    def call(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["gate", *map(str, args)])
        left = capsys.readouterr()
        return code, left.out, left.err

    return call


def test_a_sound_model_passes(run: Any) -> None:
    code, out, _ = run("net.py:model", *FAST)
    assert code == 0 and "gate: PASS over 3 seeds" in out


def test_a_broken_one_is_named_with_its_line(run: Any) -> None:
    broken = ("--model-args", '{"broken": true}', *FAST, "--fail-on", "warning", "--select", "JD2")
    code, out, _ = run("net.py:model", *broken)
    lines = Path("net.py").read_text().splitlines()
    line = next(k for k, text in enumerate(lines, 1) if "nn.init.normal_(p" in text)
    assert code == 1
    assert "h.*.mlp.c_proj (4 of 4): std 0.0200" in out and f"net.py:{line}\n" in out
    assert "gate: FAIL" in out


@pytest.mark.check("gate")
def test_a_warning_fails_only_if_asked(run: Any) -> None:
    assert run("net.py:model", "--model-args", '{"broken": true}', *FAST, "--select", "JD2")[0] == 0


def test_a_pinned_contract_in_the_configuration_fails(run: Any, tmp_path: Path) -> None:
    text = '[contract]\nmatrix = "0.02"\nW_O = "0.02/sqrt(2*N)"\nW_2 = "0.02/sqrt(2*N)"\n'
    (tmp_path / "jacdiag.toml").write_text(text)
    assert run("net.py:model", *FAST, "--select", "JD2")[0] == 0
    code, out, _ = run("net.py:model", "--model-args", '{"broken": true}', *FAST, "--select", "JD2")
    assert code == 1 and "JD201 pinned-contract" in out


def test_a_contract_from_a_file(run: Any, tmp_path: Path) -> None:
    (tmp_path / "contract.toml").write_text('W_2 = "0.03"\n')
    assert run("net.py:model", *FAST, "--select", "JD2", "--contract", "contract.toml")[0] == 1
    (tmp_path / "contract.toml").write_text('W_2 = "0.03/"\n')
    code, _, err = run("net.py:model", *FAST, "--contract", "contract.toml")
    assert code == 2 and "a formula cannot be read" in err
    assert run("net.py:model", *FAST, "--contract", "missing.toml")[0] == 2


# -- seeds and budget ------------------------------------------------------------------------------
def test_seeds_that_are_none_count_as_one(run: Any) -> None:
    code, out, _ = run("net.py:model", "--model-args", '{"seeded": true}', *FAST, "--select", "JD2")
    assert code == 0 and "the factory seeds itself" in out and "over" not in out.splitlines()[-1]


def test_a_budget_that_ran_out_is_no_pass(run: Any) -> None:
    code, out, _ = run("net.py:model", *FAST, "--budget", "0.01")
    assert code == 3 and "gate: UNDECIDED" in out and "budget of 0.01 s ran out" in out


def test_undecided_is_no_pass(run: Any) -> None:
    # A threshold inside the interval of so few products, and no way to spend more within the
    # budget.
    limits = {"branch_norm": {"pre": {"info": 1.99, "warning": 2.0}}}
    out = gate(
        net.model,
        torch.randint(0, 256, (1, 16)),
        seeds=1,
        thresholds=limits,
        max_products=6,
        budget=1e-3,
        select=["JD103"],
    )
    assert out.exit_code == 3 and out.report.settings["gate"]["undecided"] == ["JD103"]


def test_products_are_spent_until_decided() -> None:
    limits = {"branch_norm": {"pre": {"info": 1.99, "warning": 2.0}}}
    out = gate(
        net.model,
        torch.randint(0, 256, (1, 16)),
        seeds=1,
        thresholds=limits,
        max_products=6,
        select=["JD103"],
    )
    assert out.exit_code == 0 and not out.report.settings["gate"]["undecided"]


def test_every_seed_is_looked_at() -> None:
    """One layer is broken for every second model that is built."""
    built = []

    def sometimes() -> torch.nn.Module:
        made = net.model()
        if len(built) % 2:
            made.get_parameter("h.1.mlp.c_fc.weight").data.mul_(1.5)
        built.append(made)
        return made

    out = gate(
        sometimes, torch.randint(0, 256, (1, 16)), seeds=2, select=["JD2"], fail_on="warning"
    )
    [one] = out.report.findings
    assert (
        out.exit_code == 1
        and one.evidence["parameters"] == ["h.1.mlp.c_fc.weight"]
        and one.evidence["seeds"] == [1]
    )


# -- baseline --------------------------------------------------------------------------------------
def test_another_seed_passes_and_another_std_does_not(run: Any) -> None:
    sound = ("net.py:model", "--model-args", SMALL, *FAST, "--baseline", "init.json")
    assert run(*sound, "--write-baseline")[0] == 0
    for seed in ("10", "20"):
        code, out, _ = run(*sound, "--seeds", "1", "--seed", seed)
        assert code == 0 and "against the baseline of 20" in out
    args = ("net.py:model", "--model-args", SMALL_BROKEN, *FAST, "--baseline", "init.json")
    args = (*args, "--seeds", "1")
    code, out, _ = run(*args)
    assert code == 1 and "JD110 regression" in out
    # 0.02/sqrt(2*2) -> 0.02
    assert re.search(r"h\.\d\.mlp\.c_proj\.weight: std 0\.0(09|10)\d* -> 0\.0(19|20)\d", out)
    assert "accept the new figures: jacdiag gate net.py:model" in out and "--write-baseline" in out
    assert run(*args, "--write-baseline")[0] == 0 and run(*args)[0] == 0


def test_a_baseline_knows_its_probe(run: Any, tmp_path: Path) -> None:
    args = ("net.py:model", "--model-args", SMALL, "--seeds", "1", "--baseline", "init.json")
    assert run(*args, *FAST, "--write-baseline")[0] == 0
    kept = json.loads((tmp_path / "init.json").read_text())
    assert kept["probe"] == {"batch": 1, "seq": 16, "tokens": "random", "dtype": "float32"}
    code, _, err = run(*args, "--seq", "8", "--batch", "3")
    assert (
        code == 2
        and "another probe" in err
        and "1 x 16 random tokens, float32, against 3 x 8" in err
    )
    assert "--batch 1 --seq 16, as in the baseline" in err and "--write-baseline" in err
    code, _, err = run(*args, *FAST, "--dtype", "float64")
    assert code == 2 and "--dtype float32, as in" in err
    assert run(*args, "--seq", "8", "--contract-only")[0] == 0, "weights know no probe"
    del kept["probe"]
    # as it was written before the probe was kept
    (tmp_path / "init.json").write_text(json.dumps(kept))
    assert run(*args, "--seq", "8", "--batch", "1")[0] in (0, 1)
    (tmp_path / "init.json").write_text(json.dumps({**kept, "probe": 3}))
    assert run(*args, *FAST)[0] == 2


def test_the_other_probe_of_another_model_is_not_what_is_said(tmp_path: Path) -> None:
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 64}
    figures = gate("jacdiag.sources.gpt:build", seeds=1, batch=1, seq=8, model_args=sizes).figures
    assert figures.probe
    write_baseline(tmp_path / "b.json", figures)
    with pytest.raises(UsageError, match="of another model"):
        gate(small, torch.randint(0, 256, (1, 16)), seeds=1, baseline=tmp_path / "b.json")


def test_only_what_changed_is_named(tmp_path: Path) -> None:
    ids = torch.randint(0, 256, (1, 16))
    build = partial(net.model, layers=3, d=32)
    write_baseline(tmp_path / "b.json", gate(build, ids, seeds=2, decide=False).figures)

    def changed() -> torch.nn.Module:
        made = build()
        made.get_parameter("h.2.attn.c_attn.weight").data.mul_(1.3)
        return made

    out = gate(changed, ids, seeds=1, seed=9, baseline=tmp_path / "b.json", select=["JD110"])
    [one] = [f for f in out.report.findings if f.evidence["parameters"]]
    assert one.evidence["parameters"] == ["h.2.attn.c_attn.weight"] and one.level == "error"


def test_the_baseline_is_stable_text(tmp_path: Path) -> None:
    figures = gate(small, torch.randint(0, 256, (1, 16)), seeds=2, decide=False).figures
    write_baseline(tmp_path / "b.json", figures)
    assert read_baseline(tmp_path / "b.json") == figures
    first = (tmp_path / "b.json").read_bytes()
    write_baseline(tmp_path / "b.json", read_baseline(tmp_path / "b.json"))
    assert (tmp_path / "b.json").read_bytes() == first


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"sublayers": 1, "weights": 2}',
        "[" * 100_000,
        "\x00",
        '{"sublayers": {}, "weights": {}, "schema_version": 1}',
    ],
)
def test_files_that_are_no_baseline(run: Any, tmp_path: Path, text: str) -> None:
    (tmp_path / "b.json").write_text(text)
    code, _, err = run("net.py:model", *FAST, "--baseline", "b.json")
    assert code == 2 and "baseline" in err and "Traceback" not in err


def test_baselines_that_cannot_be_used(run: Any, tmp_path: Path) -> None:
    assert run("net.py:model", "--baseline", "none.json")[0] == 2
    assert run("net.py:model", "--write-baseline")[0] == 2
    with pytest.raises(SourceError, match="no such baseline"):
        read_baseline(tmp_path / "none.json")
    (tmp_path / "new.json").write_text(
        json.dumps({"schema_version": 9, "sublayers": {}, "weights": {}})
    )
    with pytest.raises(UsageError, match="another version"):
        read_baseline(tmp_path / "new.json")


def test_a_baseline_of_another_model(tmp_path: Path) -> None:
    write_baseline(
        tmp_path / "b.json",
        gate(
            "jacdiag.sources.gpt:build",
            seeds=1,
            **QUICK,
            products=False,
            model_args={"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 64},
        ).figures,
    )
    with pytest.raises(UsageError, match="of another model"):
        gate(
            net.model,
            torch.randint(0, 256, (1, 16)),
            seeds=1,
            products=False,
            baseline=tmp_path / "b.json",
        )


# -- the contract alone, other sources, safeguards -------------------------------------------------
@pytest.mark.check("gate", "jacdiag gate")
def test_the_contract_alone_spends_no_product(run: Any) -> None:
    code, out, _ = run("net.py:model", *FAST, "--contract-only", "--format", "json", "--seeds", "1")
    report = json.loads(out)
    assert code == 0 and report["sublayers"] == [] and report["contract"]["weights"]


def test_the_contract_alone_is_enough_where_no_norm_was_asked_for(run: Any) -> None:
    args = (
        "net.py:model",
        *FAST,
        "--contract-only",
        "--format",
        "json",
        "--seeds",
        "1",
        "--fail-on",
        "warning",
    )
    code, out, err = run(*args)
    report = json.loads(out)
    assert (code, report["verdict"], report["findings"]) == (0, "pass", []) and "gate: PASS" in err
    # no rule of the contract applies to a trained model
    code, out, _ = run(*args, "--state", "trained")
    assert code == 1 and "JD904" in {f["code"] for f in json.loads(out)["findings"]}


def test_a_checkpoint_has_one_set_of_weights(run: Any, tmp_path: Path) -> None:
    torch.save(net.model().state_dict(), tmp_path / "w.pt")
    args = ("w.pt", "--model", "net.py:model", *FAST, "--state", "init", "--select", "JD2")
    code, out, _ = run(*args)
    assert code == 0 and "seeds" not in out.splitlines()[-1]


def test_trust_pickle_is_refused_in_ci(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(net.model().state_dict(), tmp_path / "w.pt")
    args = ("w.pt", "--model", "net.py:model", "--trust-pickle", *FAST, "--select", "JD2")
    code, _, err = run(*args)
    assert code == 0 and "code in the file may run" in err
    monkeypatch.setenv("CI", "true")
    code, _, err = run(*args)
    assert code == 2 and "--trust-pickle is refused in CI" in err
    (tmp_path / "jacdiag.toml").write_text("allow-trust-pickle = true\n")
    assert run(*args)[0] == 0
    (tmp_path / "jacdiag.toml").write_text('allow-trust-pickle = "yes"\n')
    assert run(*args)[0] == 2


def test_a_build_that_raises() -> None:
    def broken() -> torch.nn.Module:
        raise RuntimeError("no such layer")

    with pytest.raises(SourceError, match="broken' raised"):
        gate(broken, seeds=1)
    with pytest.raises(SourceError, match=r"no nn\.Module"):
        gate(lambda: 3, seeds=1)  # type: ignore[arg-type,return-value]
    with pytest.raises(UsageError, match="unknown level"):
        gate(net.model, fail_on="loud")


def test_the_callers_random_numbers_are_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    gate(
        net.model,
        torch.randint(0, 256, (1, 16), generator=torch.Generator().manual_seed(0)),
        seeds=1,
        products=False,
    )
    assert torch.equal(before, torch.get_rng_state())


def test_a_baseline_goes_through_links_and_to_stdout(run: Any, tmp_path: Path) -> None:
    (tmp_path / "init.json").symlink_to("real.json")
    args = (
        "net.py:model",
        "--model-args",
        SMALL,
        *FAST,
        "--seeds",
        "1",
        "--write-baseline",
        "--baseline",
    )
    code, _, err = run(*args, "init.json")
    assert code == 0 and "wrote init.json" in err
    assert (tmp_path / "init.json").is_symlink() and "sublayers" in json.loads(
        (tmp_path / "real.json").read_text()
    )
    code, out, err = run(*args, "-")
    assert code == 0 and json.loads(out)["sublayers"] and "gate: PASS" in err and "wrote" not in err
    code, _, err = run(*args, "/dev/full")
    assert code == 2 and "No space left" in err and Path("/dev/full").is_char_device()


def test_a_report_does_not_write_over_the_baseline(run: Any, tmp_path: Path) -> None:
    (tmp_path / "init.json").write_text("{}")
    code, _, err = run("net.py:model", "--baseline", "init.json", "--json", "init.json")
    assert code == 2 and "would write over what --baseline reads" in err
    code, _, err = run(
        "net.py:model", "--baseline", "init.json", "--write-baseline", "--json", "init.json"
    )
    assert code == 2 and "--json and --baseline name the same file" in err
    assert (tmp_path / "init.json").read_text() == "{}"


# -- what a gate says if no rule can fail ----------------------------------------------------------
def test_a_gate_in_which_no_rule_applied_is_no_pass(run: Any, tmp_path: Path) -> None:
    """Rules of pre-norm on a post-norm model; a trained model under the contract alone; weights
    without a model.
    """
    torch.save({"layer.weight": torch.randn(16, 16).pow(3)}, tmp_path / "bare.pt")
    shutil.copy(Path(__file__).parent / "post.py", tmp_path / "post.py")
    for args in (
        ("post.py:model", *FAST, "--seeds", "1", "--select", "JD101,JD102"),
        ("net.py:model", *FAST, "--seeds", "1", "--contract-only", "--state", "trained"),
        ("net.py:model", *FAST, "--seeds", "1", "--select", "JD906"),
        ("bare.pt",),
    ):
        code, out, _ = run(*args)
        assert (
            code == 3 and "gate: UNDECIDED" in out and "no rule applied, so nothing can pass" in out
        ), args
        assert "PASS" not in out
    code, out, _ = run("post.py:model", *FAST, "--seeds", "1")
    assert code == 0 and "gate: PASS" in out and "no rule applied" not in out
    assert "JD101: the paper states it for pre-norm; this model has post-norm" in out


def test_a_trained_model_without_a_baseline_is_observed(run: Any) -> None:
    args = (
        "net.py:model",
        "--model-args",
        SMALL,
        *FAST,
        "--seeds",
        "1",
        "--state",
        "trained",
    )
    # JD903 warns about random tokens. That is no comparison.
    for ignored in (("--ignore", "JD903"), ()):
        code, out, _ = run(*args, *ignored)
        assert (code, "gate: OBSERVED" in out, "PASS" in out) == (0, True, False)
        assert "compared with nothing" in out
        assert ("JD903 off-distribution" in out) == (not ignored)
        assert run(*args, *ignored, "--fail-on", "warning")[0] == int(not ignored)
    code, out, _ = run(*args, "--contract-only")
    assert code == 3 and "OBSERVED" not in out
    args = (*args, "--ignore", "JD903")
    for name in ("markdown", "github", "junit", "sarif", "json"):
        code, out, err = run(*args, "--format", name)
        assert code == 0 and "observed" in out.lower() and "gate: OBSERVED" in err, name
    assert run(*args, "--baseline", "b.json", "--write-baseline")[0] == 0
    code, out, _ = run(*args, "--baseline", "b.json")
    assert code == 0 and "gate: PASS" in out
