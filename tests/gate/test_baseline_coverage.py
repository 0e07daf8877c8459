"""What is said of a baseline of another size, with other names, or that is written again."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gate import net
from jacdiag_cli.main import main

from jacdiag.comparison.baseline_coverage import (
    describe_losses,
    describe_uncompared,
    differs_in_size,
)
from jacdiag.errors import UsageError
from jacdiag.gate import gate, write_baseline
from jacdiag.records import FiguresRecord

IDS = torch.randint(0, 256, (1, 16), generator=torch.Generator().manual_seed(0))
NORMS = {"h.0.mlp": {"branch_norm": [0.9, 1.0, 1.1]}}
WEIGHTS = {"h.0.mlp.weight": {"family": "normal", "std": 0.02, "shape": [8, 32]}}
FIGURES = FiguresRecord(
    model="GPT", parameters=256, layers=2, width=8, seeds=3, sublayers=NORMS, weights=WEIGHTS
)
other = partial(dataclasses.replace, FIGURES)


def baseline_of(path: Path, **sizes: int) -> Path:
    """Write a baseline of the small GPT, of weights alone."""
    build = partial(net.model, **sizes)
    write_baseline(path, gate(build, IDS, seeds=1, products=False).figures)
    return path


# -- another size ----------------------------------------------------------------------------------
@pytest.mark.parametrize("sizes", [{"layers": 3, "d": 32}, {"layers": 2, "d": 64}])
@pytest.mark.parametrize("products", [False, True])
def test_a_baseline_of_another_depth_or_width_is_refused(
    tmp_path: Path, sizes: dict[str, int], products: bool
) -> None:
    path = baseline_of(tmp_path / "b.json", layers=2, d=32)
    with pytest.raises(UsageError, match="of another model size") as caught:
        gate(partial(net.model, **sizes), IDS, seeds=1, products=products, baseline=path)
    message = str(caught.value)
    assert "2 layers, width 32, 41,856 parameters; now " in message
    assert f"{sizes['layers']} layers, width {sizes['d']}, " in message
    assert "--model-args" in message and "--write-baseline" in message


def test_the_size_is_said_before_the_probe(tmp_path: Path) -> None:
    """A smaller model often has a shorter context. The size is the reason of both."""
    path = tmp_path / "b.json"
    build = partial(net.model, layers=1, d=32)
    write_baseline(path, gate(build, IDS, seeds=1, max_products=20).figures)
    with pytest.raises(UsageError, match="of another model size"):
        gate(partial(net.model, layers=2, d=32), IDS[:, :8], seeds=1, baseline=path)
    with pytest.raises(UsageError, match="another probe"):
        gate(build, IDS[:, :8], seeds=1, baseline=path)


def test_a_width_that_is_not_known_is_no_other_width() -> None:
    assert differs_in_size(other(width=16), FIGURES) and differs_in_size(other(layers=3), FIGURES)
    assert not differs_in_size(other(width=None), FIGURES)
    assert not differs_in_size(other(parameters=300), FIGURES)


# -- what was not compared -------------------------------------------------------------------------
def test_the_same_figures_leave_nothing_to_say() -> None:
    assert describe_uncompared(FIGURES, FIGURES) == []


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (other(sublayers={}), "the norms of 1 sub-layer in the baseline were not compared"),
        (
            other(sublayers={"new": {}, **NORMS}),
            "1 sub-layer not in the baseline, and not compared",
        ),
        (other(weights={}), "1 weight of the baseline not in the model: h.0.mlp.weight"),
        (other(parameters=300), "the model has 300 parameters, that of the baseline 256"),
        (other(sublayers={"h.0.mlp": {}}), "not compared: branch norm of h.0.mlp"),
        (
            other(weights={"h.0.mlp.weight": {"std": 0.02, "shape": [8, 64]}}),
            "compared, although the shape differs: h.0.mlp.weight (8 x 32 -> 8 x 64)",
        ),
    ],
)
def test_each_kind_of_difference_has_its_sentence(now: FiguresRecord, said: str) -> None:
    assert said in "\n".join(describe_uncompared(now, FIGURES))


def test_a_baseline_of_weights_alone_lists_no_sublayer_as_new() -> None:
    [sentence] = describe_uncompared(FIGURES, other(sublayers={}))
    assert sentence.startswith("norms were not compared: the baseline holds weights alone")


def test_a_baseline_without_shapes_says_nothing_of_shapes() -> None:
    old = other(weights={"h.0.mlp.weight": {"std": 0.02}})
    assert describe_uncompared(FIGURES, old) == []


def test_tensors_of_a_bare_file_are_not_counted_as_parameters() -> None:
    assert describe_uncompared(other(parameters=300), FIGURES, is_traced=False) == []


def test_a_long_list_of_names_is_cut() -> None:
    weights = {f"w{index}": {} for index in range(5)}
    [sentence, *_] = describe_uncompared(other(weights={**WEIGHTS, **weights}), FIGURES)
    assert sentence.endswith("w0, w1, w2 and 2 more")


# -- what is lost if a baseline is written again ---------------------------------------------------
def test_a_baseline_that_checks_as_much_has_lost_nothing() -> None:
    assert describe_losses(FIGURES, FIGURES) == []
    assert describe_losses(FIGURES, other(seeds=1, sublayers={})) == []


def test_lost_norms_and_seeds_are_said() -> None:
    norms, seeds = describe_losses(other(seeds=1, sublayers={}), FIGURES)
    assert norms.startswith("the norms of 1 sub-layer are gone from it")
    assert "holds 1 seed and held 3" in seeds and "--seeds 3" in seeds


# -- on the command line ---------------------------------------------------------------------------
@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    shutil.copy(Path(net.__file__), tmp_path / "net.py")
    monkeypatch.chdir(tmp_path)

    def call(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        sizes = '{"layers": 1, "d": 32}'
        code = main(
            ["gate", "net.py:model", "--model-args", sizes, "--seq", "8", "--batch", "1"]
            + ["--seeds", "1", "--baseline", "init.json", *args]
        )
        left = capsys.readouterr()
        return code, left.out, left.err

    return call


def test_weights_alone_written_over_norms_are_said_to_lose_them(run: Any) -> None:
    code, _, err = run("--write-baseline")
    assert code == 0 and "gone" not in err
    code, out, _ = run("--contract-only")
    assert code == 0 and "the norms of 2 sub-layers in the baseline were not compared" in out

    code, _, err = run("--contract-only", "--write-baseline")
    assert code == 0 and "the norms of 2 sub-layers are gone from it" in err
    assert json.loads(Path("init.json").read_text())["sublayers"] == {}
    code, _, err = run("--contract-only", "--write-baseline")
    assert code == 0 and "gone" not in err


def test_a_gate_without_the_comparing_rule_does_not_claim_to_compare(run: Any) -> None:
    assert run("--contract-only", "--write-baseline")[0] == 0
    code, out, _ = run("--contract-only")
    assert code == 0 and "against the baseline of" in out and "nothing was compared" not in out
    code, out, _ = run("--contract-only", "--select", "JD2")
    assert code == 0 and "against the baseline of" not in out
    assert "nothing was compared with the baseline: JD110" in out


@pytest.mark.parametrize("name", ["github", "markdown", "junit"])
def test_every_format_says_what_was_not_compared(run: Any, name: str) -> None:
    assert run("--contract-only", "--write-baseline")[0] == 0
    figures = json.loads(Path("init.json").read_text())
    del figures["weights"]["head.weight"]
    Path("init.json").write_text(json.dumps(figures))
    code, out, _ = run("--contract-only", "--format", name)
    assert code == 0 and "1 weight not in the baseline, and not compared: head.weight" in out
