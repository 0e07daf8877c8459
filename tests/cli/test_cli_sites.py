"""`jacdiag sites`: what was found, and where every parameter went."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.rig import Done

pytestmark = pytest.mark.check("jacdiag sites")

Run = Callable[..., Done]
NAMES = ["h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp"]


def test_sites_table_has_a_row_for_each_sublayer(jd: Run, factory: str) -> None:
    done = jd("sites", f"{factory}build", "--seq", 16)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert "4 sub-layers in 2 layers" in lines[0] and "covered" in lines[0]
    rows = [line.split() for line in lines if line.split()[:1] and line.split()[0].isdigit()]
    assert [row[1] for row in rows] == NAMES
    assert rows[0][2:4] == ["attention", "pre"] and rows[1][2] == "mlp"
    assert rows[0][-1].startswith("build.py:")
    assert any(line.startswith("embedding") and "wte.weight" in line for line in lines)
    assert any(line.startswith("head") and "head.weight" in line for line in lines)
    assert any(line.startswith("norms outside") and "ln_f.weight" in line for line in lines)


def test_what_is_not_covered_is_listed_with_its_reason(jd: Run, factory: str) -> None:
    out = jd("sites", f"{factory}build", "--seq", 16).out
    head, row = out[out.index("not covered") :].splitlines()
    assert head.split() == ["not", "covered", "shape", "reason"]
    assert row.startswith("spare") and "not read in this forward" in row


@pytest.mark.parametrize("command", ["sites", "audit"])
def test_probe_longer_than_an_undeclared_limit_suggests_seq(
    jd: Run, factory: str, command: str
) -> None:
    done = jd(command, f"{factory}build")
    assert done.code == 2 and "IndexError" in done.err
    assert "--seq 32: the model's table of positions has 32 rows" in done.err


def test_every_parameter_is_somewhere(jd: Run, factory: str) -> None:
    from torch import nn

    namespace: dict[str, Callable[[], nn.Module]] = {}
    from cli.rig import MODEL

    exec(MODEL, namespace)
    expected = {name for name, _ in namespace["build"]().named_parameters()}
    data = json.loads(jd("sites", f"{factory}build", "--seq", 16, "--format", "json").out)
    inside = [set(site["parameters"]) for site in data["sublayers"]]
    groups = [*inside, *(set(data[key]) for key in ("embedding", "head", "norms", "uncovered"))]
    assert set().union(*groups) == expected
    assert sum(len(group) for group in groups) == len(expected)
    assert data["uncovered"] == {"spare": {"shape": [3], "reason": "not read in this forward"}}
    assert data["model"]["covered_parameters"] == data["model"]["parameters"] - 3


def test_json_describes_a_site(jd: Run, factory: str) -> None:
    data = json.loads(
        jd("sites", f"{factory}build", "--seq", 16, "--batch", 3, "--format", "json").out
    )
    site = data["sublayers"][1]
    assert site["shape"] == [3, 16, 16] and "build.py:" in site["line"]
    assert site["parameters"]["h.0.mlp.0.weight"] == [64, 16]
    assert {
        key: site[key]
        for key in ("index", "name", "depth", "kind", "placement", "parallel", "nested")
    } == {
        "index": 1,
        "name": "h.0.mlp",
        "depth": 0,
        "kind": "mlp",
        "placement": "pre",
        "parallel": False,
        "nested": False,
    }


def test_what_the_model_prints_is_talk(jd: Run, factory: str) -> None:
    done = jd(
        "sites",
        f"{factory}build",
        "--model-args",
        '{"talk": true}',
        "--seq",
        16,
        "--format",
        "json",
    )
    json.loads(done.out)
    assert "number of parameters" in done.err


def test_nothing_found_says_what_was_looked_for(jd: Run, factory: str) -> None:
    done = jd("sites", f"{factory}no_residual", "--seq", 16)
    assert done.code == 0
    assert "No residual sub-layer was found" in done.out and "linear 1" in done.out
    assert (
        "no sub-layer was found" in done.err
        and "audit" in done.err
        and len(done.err.splitlines()) == 1
    )
    done = jd("sites", f"{factory}no_residual", "--seq", 16, "--format", "json")
    assert (
        done.code == 0
        and json.loads(done.out)["sublayers"] == []
        and "no sub-layer was found" in done.err
    )


@pytest.mark.parametrize(
    ("name", "message"), [("raises", "the router lost its way"), ("leaves", "sys.exit(0)")]
)
def test_a_model_that_does_not_run(jd: Run, factory: str, name: str, message: str) -> None:
    done = jd("sites", f"{factory}{name}", "--seq", 16)
    assert (done.code, done.out) == (2, "") and message in done.err


def test_cuda_that_is_not_there(jd: Run, factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = jd("sites", f"{factory}build", "--device", "cuda")
    assert done.code == 2 and "CUDA was asked for" in done.err and "--device cpu" in done.err


# -- what the dataflow does not show ---------------------------------------------------------------
FUSED = """
import torch
from torch import nn


class FusedAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, f):
        return x + f

    @staticmethod
    def backward(ctx, grad):
        return grad, grad


class Block(nn.Module):
    def __init__(self, d=16):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.ff = nn.Sequential(nn.Linear(d, 32), nn.GELU(), nn.Linear(32, d))

    def forward(self, x):
        return FusedAdd.apply(x, self.ff(self.norm(x)))


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(64, 16), Block(), Block(), nn.Linear(16, 64))
"""
DECLARED = '[tool.jacdiag.sites.ff]\nshortcut = "*.norm"\nbranch = "*.ff"\n'


def test_what_is_hidden_is_named_in_full_at_any_width(jd: Run, tmp_path: Path) -> None:
    (tmp_path / "fused.py").write_text(FUSED)
    done = jd("sites", "fused.py:build", "--seq", 8)
    assert done.code == 0 and "No residual sub-layer was found" in done.out
    assert "0% covered" in done.out and "no sub-layer was found" in done.out
    assert "hidden: FusedAdd (a custom autograd.Function) adds at" in done.out
    assert 'declare shortcut = "1.norm", branch = "1.ff"' in done.out
    assert "declare the hidden sub-layers" in done.err
    assert jd("audit", "fused.py:build", "--seq", 8).code == 2


@pytest.mark.parametrize("width", [40, 60, 80])
def test_the_first_lines_are_wrapped_on_a_narrow_terminal(
    jd: Run, factory: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jacdiag_cli.sites.room", lambda: width)
    out = jd("sites", f"{factory}build", "--seq", 8).out
    assert max(map(len, out.splitlines())) <= width
    first = out.partition("\n\n")[0]
    assert "% covered" in " ".join(first.split()) and "…" not in first
    assert ("or --format json shows all" in " ".join(out.split())) == (width < 80)


def test_the_configuration_declares_sites_for_both_commands(jd: Run, tmp_path: Path) -> None:
    (tmp_path / "fused.py").write_text(FUSED)
    (tmp_path / "pyproject.toml").write_text(DECLARED)
    data = json.loads(jd("sites", "fused.py:build", "--seq", 8, "--format", "json").out)
    assert [(s["name"], s["kind"], s["placement"]) for s in data["sublayers"]] == [
        ("1.ff", "mlp", "pre"),
        ("2.ff", "mlp", "pre"),
    ]
    assert data["hidden"] == [] and data["notes"] == [] and data["culprit"] is None
    done = jd(
        "audit",
        "fused.py:build",
        "--seq",
        8,
        "--batch",
        1,
        "--format",
        "json",
        "--fail-on",
        "never",
    )
    assert [row["name"] for row in json.loads(done.out)["sublayers"]] == ["1.ff", "2.ff"]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ('[sites.a]\nshortcut = "*.norm"\n', "a table with the strings `shortcut` and `branch`"),
        ('[sites.a]\nshortcut = "*.nrom"\nbranch = "*.ff"\n', "closest: 2.norm"),
        ("sites = 3\n", "must be a table"),
    ],
)
def test_a_declaration_with_a_mistake(jd: Run, tmp_path: Path, table: str, words: str) -> None:
    (tmp_path / "fused.py").write_text(FUSED)
    (tmp_path / "jacdiag.toml").write_text(table)
    done = jd("sites", "fused.py:build", "--seq", 8)
    assert done.code == 2 and done.out == "" and words in done.err


def test_help_says_how_to_declare(jd: Run) -> None:
    out = jd("sites", "-h").out
    assert "[tool.jacdiag.sites.attention]" in out and "PATH:in" in out


def test_a_model_that_draws_is_named_with_its_call(jd: Run, tmp_path: Path) -> None:
    code = FUSED.replace(
        "FusedAdd.apply(x, self.ff(self.norm(x)))",
        "x + nn.functional.dropout(self.ff(self.norm(x)))",
    )
    (tmp_path / "drops.py").write_text(code)
    out = jd("sites", "drops.py:build", "--seq", 8).out
    assert "two runs differ: dropout draws random numbers (in '1'" in out and "drops.py:" in out
