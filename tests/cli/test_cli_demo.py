"""`jacdiag demo`: the first command of a newcomer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.rig import Done

from jacdiag.sources import demo_model
from jacdiag.sources.demo_model import DEMO_SOURCE, build_demo_model
from jacdiag.sources.gpt import GPT, build

pytestmark = pytest.mark.check("jacdiag demo")

Run = Callable[..., Done]


def test_demo_runs_in_an_empty_folder_and_names_the_next_commands(
    jd: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def smaller() -> GPT:
        return build("vanilla", n_layer=2, n_head=2, n_embd=64, vocab_size=64, block_size=16)

    monkeypatch.setattr(demo_model, "build_demo_model", smaller)
    done = jd("demo")
    assert (done.code, done.err) == (0, "")
    assert "This is an example: a GPT of 4 layers and width 112" in done.out
    assert "WARN  Large shortcut not met, small sub-layers met" in done.out
    assert f"Next         jacdiag audit {DEMO_SOURCE} --patch fix.md" in done.out
    assert "jacdiag audit checkpoint.pt" in done.out.split("For a model of your own:")[1]
    assert not list(tmp_path.iterdir())


def test_what_demo_says_of_its_model_is_true() -> None:
    model = build_demo_model()
    config = model.config
    assert (config.n_layer, config.n_embd) == (4, 112)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(
        0.64e6, rel=0.01
    )
    weights = model.state_dict()
    embedding = float(weights["transformer.wte.weight"].std())
    matrix = float(weights["transformer.h.0.attn.c_attn.weight"].std())
    assert embedding == pytest.approx(matrix, rel=0.05)


def test_demo_reads_no_configuration(
    jd: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder whose configuration would fail every audit."""
    (tmp_path / "jacdiag.toml").write_text('seq = 8\nfail-on = "info"\nformat = "json"\n')
    monkeypatch.setattr("jacdiag.pipeline.audit.run_audit", small_audit)
    done = jd("demo")
    assert done.code == 0
    with pytest.raises(json.JSONDecodeError):
        json.loads(done.out)
    assert "  layer  sub-layer" in done.out and done.out.endswith("means\n")


def small_audit(source: str, options: object) -> object:
    """A report that was made by hand, in place of an audit."""
    from render import synthetic

    assert source == DEMO_SOURCE
    return synthetic.vanilla(2)
