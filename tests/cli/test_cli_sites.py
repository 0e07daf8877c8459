"""`jacdiag sites`: what was found, and where every parameter went."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from cli.rig import Done

Run = Callable[..., Done]
NAMES = ["h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp"]


def test_table(jd: Run, factory: str) -> None:
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
    data = json.loads(jd("sites", f"{factory}build", "--seq", 16, "--batch", 3, "--format", "json").out)
    site = data["sublayers"][1]
    assert site["shape"] == [3, 16, 16] and "build.py:" in site["line"]
    assert site["parameters"]["h.0.mlp.0.weight"] == [64, 16]
    assert {key: site[key] for key in ("index", "name", "depth", "kind", "placement", "parallel", "nested")} == {
        "index": 1, "name": "h.0.mlp", "depth": 0, "kind": "mlp", "placement": "pre", "parallel": False,
        "nested": False,
    }  # fmt: skip


def test_what_the_model_prints_is_talk(jd: Run, factory: str) -> None:
    done = jd("sites", f"{factory}build", "--model-args", '{"talk": true}', "--seq", 16, "--format", "json")
    json.loads(done.out)
    assert "number of parameters" in done.err


def test_nothing_found_says_what_was_looked_for(jd: Run, factory: str) -> None:
    done = jd("sites", f"{factory}no_residual", "--seq", 16)
    assert done.code == 0
    assert "No residual sub-layer was found" in done.out and "linear 1" in done.out


@pytest.mark.parametrize(("name", "message"), [("raises", "the router lost its way"), ("leaves", "sys.exit(0)")])
def test_a_model_that_does_not_run(jd: Run, factory: str, name: str, message: str) -> None:
    done = jd("sites", f"{factory}{name}", "--seq", 16)
    assert (done.code, done.out) == (2, "") and message in done.err


def test_cuda_that_is_not_there(jd: Run, factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = jd("sites", f"{factory}build", "--device", "cuda")
    assert done.code == 2 and "CUDA was asked for" in done.err and "--device cpu" in done.err
