"""The reproduction of the paper: golden numbers, the stream in closed form, layers one at a time,
what is written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from examples.reproduce_spike_no_more import blocks, depth, figure2, part
from examples.reproduce_spike_no_more.__main__ import PARTS, WHOLE, run
from examples.reproduce_spike_no_more.measuring import _block, _embedded, layer_by_layer, sublayers
from examples.reproduce_spike_no_more.paper import BREAK, FIGURE2, KEEP, LENGTH, SHAPE_1_7B
from examples.reproduce_spike_no_more.stream import closed_form, gelu, moment
from examples.reproduce_spike_no_more.trainings import Trial, agreed, gaps, outcomes, thinned
from examples.spike_lab.run import Setting
from jacdiag.measure.branch_norms import Effort
from jacdiag.measure.weight_statistics import initial_bound
from jacdiag.sources import gpt

RESULTS = Path(part.__file__).parent / "results"
WRITTEN = sorted(path.stem for path in RESULTS.glob("*.json"))
TINY: dict[str, Any] = {
    "layers": 2,
    "width": 16,
    "heads": 2,
    "length": 16,
    "steps": 12,
    "rows": 2,
    "lr": 1e-2,
}


# -- Figure 2 --------------------------------------------------------------------------------------
def test_the_anchors_at_the_first_ffn_of_the_large_shape() -> None:
    found = {
        recipe: initial_bound(recipe, SHAPE_1_7B["n_layer"], SHAPE_1_7B["n_embd"])
        for recipe in FIGURE2
    }
    golden = {"vanilla": 40.4, "xavier": 274, "scaled-embed": 1.82, "embed-ln": 1.52}
    assert {recipe: float(f"{value:.3g}") for recipe, value in found.items()} == golden


def test_the_order_holds_at_every_layer_of_the_shallow_third() -> None:
    config = gpt.config_of({**SHAPE_1_7B, "block_size": LENGTH})
    found = {recipe: closed_form(recipe, config, LENGTH) for recipe in FIGURE2}
    ratios = []
    for k in range(config.n_layer // 3):
        excess = {recipe: rows[k].bound - 1 for recipe, rows in found.items()}
        ratios.append(min(excess[r] for r in BREAK) / max(excess[r] for r in KEEP))
    # the least is xavier's at layer 8, whose stream grows the fastest
    assert ratios[0] > 30 and min(ratios) > 1.6


@pytest.mark.parametrize("recipe", FIGURE2)
def test_the_stream_grows_as_its_closed_form_says(recipe: str) -> None:
    config = gpt.config_of(
        {"n_layer": 4, "n_embd": 256, "n_head": 4, "block_size": 64, "vocab_size": 64}
    )
    torch.manual_seed(0)
    model = gpt.build(recipe, n_layer=4, n_embd=256, n_head=4, block_size=64, vocab_size=64)
    seen: list[float] = []
    for block in model.transformer["h"]:  # type: ignore[union-attr]
        block.ln_2.register_forward_pre_hook(
            lambda _, args: seen.append(float(args[0].std(-1).median()))
        )
    with torch.no_grad():
        model(torch.randperm(64)[None])
    told = [row.sigma_ffn for row in closed_form(recipe, config, 64)]
    assert seen == pytest.approx(told, rel=0.12)


def test_moments_of_two_correlated_normals() -> None:
    draws = torch.randn(2, 400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h, other = 0.6 * draws[0], 0.6 * (0.5 * draws[0] + math.sqrt(0.75) * draws[1])
    sampled = float((torch.nn.functional.gelu(h) * torch.nn.functional.gelu(other)).mean())
    assert moment(gelu, 0.36, 0.5) == pytest.approx(sampled, rel=0.02)


def test_a_layer_alone_measures_as_it_does_in_the_whole_stack() -> None:
    config = gpt.config_of(
        {"n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 8, "vocab_size": 64}
    )
    effort = Effort(tol=0.01)
    std = gpt.RECIPES["vanilla"].std
    whole = nn.Sequential(*(_block(std, config, k, seed=3) for k in range(2)))
    together = sublayers(whole, _embedded("vanilla", config, 8, seed=3), effort=effort)
    alone = [
        r for _, records in layer_by_layer("vanilla", config, 8, (0, 1), 3, effort) for r in records
    ]
    for one, other in zip(alone, together, strict=True):
        assert one.branch_norm is not None and other.branch_norm is not None
        assert one.branch_norm.estimate == pytest.approx(other.branch_norm.estimate, rel=0.01)
        assert (
            one.shortcut_std is not None
            and other.shortcut_std is not None
            and one.kind == other.kind
        )
        assert one.shortcut_std.median == pytest.approx(other.shortcut_std.median, rel=1e-5)
    assert [r.bound for r in alone if r.kind == "mlp"] == pytest.approx(
        [r.bound for r in together if r.kind == "mlp"]
    )
    only = dict(layer_by_layer("vanilla", config, 8, (1,), 3, effort))
    assert list(only) == [1] and only[1][1].branch_norm == alone[3].branch_norm


# -- training --------------------------------------------------------------------------------------
def test_a_trial_gives_the_same_numbers_again_and_its_scales_touch_one_layer(
    tmp_path: Path,
) -> None:
    trial = Trial("one", Setting.of({**TINY, "recipe": "scaled-embed"}), ((1, 3.0),))
    (tmp_path / "b" / trial.folder).mkdir(parents=True)
    # was cut short at its first step
    (tmp_path / "b" / trial.folder / "run.jsonl").write_text('{"type": "run"}\n')
    first, again = (outcomes([trial], part.Options(runs=tmp_path / name))[0] for name in ("a", "b"))
    assert first == again and len(first["loss"]) == TINY["steps"] and len(first["shares"]) == 2
    plain, scaled = Trial("zero", trial.setting).model().state_dict(), trial.model().state_dict()
    changed = [name for name in plain if not torch.equal(plain[name], scaled[name])]
    assert changed == ["sublayers.2.core.out.weight", "sublayers.3.core.out.weight"]


def test_one_layer_is_scaled_until_the_product_is_met() -> None:
    target = depth.figures(((0, 8.0),), True)["product_log"]
    factor = depth._meet(target, 0, True)
    assert depth.figures(((0, factor),), True)["product_log"] == pytest.approx(target, abs=0.05)


def test_seeds_are_compared_with_themselves() -> None:
    ours, theirs = (
        [{"seed": 0, "final": 2.0}, {"seed": 1, "final": 3.0}],
        [{"seed": 1, "final": 2.5}],
    )
    assert (
        gaps(ours, theirs) == [0.5]
        and not agreed([0.5])
        and agreed([0.5, 0.1])
        and not agreed([0.5, -0.1])
    )
    assert thinned([3.0, 1.0, 2.0, 9.0], 2) == [3.0, 9.0]


# -- blocks ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", blocks.KINDS)
def test_every_kind_of_block_gets_a_closed_form(kind: str) -> None:
    pytest.importorskip("transformers")
    rows = {row["kind"]: row for row in blocks._measured((kind, "scaled-embed", 1))}
    assert rows["attention"]["bound"] > 1 and rows["mlp"]["parallel"] == (kind == "parallel")
    key = "gated" if kind.startswith("SwiGLU") else "bound"
    assert rows["mlp"][key] - 1 > rows["mlp"]["branch"] > 0


def test_ranks_of_a_bound_that_orders_and_of_one_that_does_not() -> None:
    rows = [
        {
            "blocks": "parallel",
            "kind": "mlp",
            "init": str(k),
            "bound": k + 1.0,
            "branch": float(k),
            "odd": 9.0 - k,
        }
        for k in range(1, 5)
    ]
    data = {"rows": rows, "inits": list("1234")}
    assert blocks.ranks(data, "parallel", "mlp", "bound")["all"] == 1
    assert blocks.ranks(data, "parallel", "mlp", "odd")["inits"] == -1
    assert blocks.ranks(data, "SwiGLU", "mlp", "bound")["all"] is None


# -- what is written -------------------------------------------------------------------------------
def test_each_part_prints_its_time_and_redraws_its_plot_from_saved_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        figure2, "SMALL", {"n_layer": 3, "n_embd": 16, "n_head": 2, "vocab_size": 64}
    )
    monkeypatch.setattr(figure2, "PROBE", 4)
    monkeypatch.setattr(figure2, "_sizes", lambda quick: (figure2.SMALL, (0, 2)))
    run(figure2.PART, part.Options(runs=tmp_path / "runs", quick=True), tmp_path)
    assert capsys.readouterr().out.splitlines()[0].startswith("figure2: about ")
    files = {
        suffix: (tmp_path / f"figure2{suffix}").read_bytes() for suffix in (".json", ".md", ".png")
    }
    run(figure2.PART, part.Options(runs=tmp_path / "runs"), tmp_path, redraw=True)
    assert files == {suffix: (tmp_path / f"figure2{suffix}").read_bytes() for suffix in files}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_sentences_of_the_results_come_from_their_numbers(name: str) -> None:
    data = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert part.markdown(PARTS[name], data) == (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    assert (RESULTS / f"{name}.png").stat().st_size < 300_000


def texts() -> Iterator[str]:
    for path in RESULTS.glob("*.md"):
        yield path.read_text(encoding="utf-8")


def test_all_parts_exist_and_none_claims_to_predict_spikes() -> None:
    assert set(WHOLE) <= set(PARTS) and "figure2" in WRITTEN
    assert not any("will spike" in text.lower() for text in texts())


def test_numbers_are_plain_and_short() -> None:
    assert part.rounded({"a": [1.23456789, math.inf, 3, "x", None]}) == {
        "a": [1.23457, "inf", 3, "x", None]
    }
    assert [part.three(v) for v in (1234.5, 12.345, 0.012345, 0.0, None)] == [
        "1,234",
        "12.3",
        "0.0123",
        "0.00",
        "–",
    ]
    assert part.span([1.0, 2.0]) == "1.00 to 2.00" and part.mean_spread([1.0, 3.0]) == (
        2.0,
        math.sqrt(2),
    )
