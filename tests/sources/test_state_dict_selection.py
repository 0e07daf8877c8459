"""Which tensors of a file are read: names inside a state dict, several sets of weights, prefixes,
--key.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from jacdiag_cli.main import main
from safetensors.torch import save_file
from sources.rig import BUILD, SIZES, save, tiny, weights, whole
from torch import Tensor, nn

import jacdiag
from jacdiag.errors import SourceError, UsageError
from jacdiag.sources import Source, load
from jacdiag.sources.checkpoint import open_checkpoint

NANO = {"model_args": SIZES}
HEAD = "transformer.h.0.mlp.c_fc.weight"


def halved() -> dict[str, Tensor]:
    return {name: t * 0.5 for name, t in weights().items()}


def lead(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: t for name, t in state.items()}


def moments(state: dict[str, Tensor]) -> dict[Any, Any]:
    return {
        name: {"step": torch.tensor(3.0), "exp_avg": t * 0, "exp_avg_sq": t * 0}
        for name, t in state.items()
    }


def adam(state: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "state": dict(enumerate(moments(state).values())),
        "param_groups": [{"lr": 1.0, "params": [0]}],
    }


def opened(path: Path, **options: Any) -> Source:
    return load(str(path), model=BUILD, model_args=SIZES, **options)


def is_model(source: Source, state: dict[str, Tensor] | None = None) -> bool:
    """Return whether the source's model has exactly these weights."""
    expected = weights() if state is None else state
    held = whole(source).state_dict()
    return all(torch.equal(held[name], t) for name, t in expected.items())


class Scaled(nn.Module):
    """Weights whose names hold the words of schedulers, losses and random states."""

    def __init__(self) -> None:
        super().__init__()
        self.input_scaler = nn.Linear(3, 3)
        self.noise_scheduler = nn.Linear(3, 3)
        self.loss_head = nn.Linear(3, 3)
        self.optim_embed = nn.Parameter(torch.randn(3))
        self.rng_table = nn.Parameter(torch.randn(3, 3))
        self.ema_decay = nn.Parameter(torch.randn(()))


@pytest.fixture
def scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The state of such a module, and `scaled.py:Scaled` that builds one."""
    (tmp_path / "scaled.py").write_text(f"from {__name__} import Scaled\n")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    return dict(Scaled().state_dict())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "layout", ["bare.pt", "nested.ckpt", "bare.safetensors", "dcp", "dcp nested"]
)
def test_words_inside_names_are_no_reason_to_leave_weights_out(
    tmp_path: Path, scaled: dict[str, Tensor], layout: str
) -> None:
    if layout == "bare.safetensors":
        save_file(scaled, tmp_path / layout)
    elif layout.startswith("dcp"):
        held = scaled if layout == "dcp" else {"model": scaled, "optim": moments(scaled)}
        dcp.save(held, checkpoint_id=tmp_path / layout, no_dist=True)
    else:
        save(
            tmp_path / layout,
            scaled if layout == "bare.pt" else {"state_dict": scaled, "lr_schedulers": [{}]},
        )
    source = load(layout, model="scaled.py:Scaled")
    assert is_model(source, scaled)
    assert not [note for note in source.notes if "left out" in note]


# -- prefixes --------------------------------------------------------------------------------------
LIGHTNING = {
    "epoch": 3,
    "global_step": 1200,
    "pytorch-lightning_version": "2.5.0",
    "optimizer_states": [],
    "loops": {},
}


@pytest.mark.parametrize(
    ("prefix", "extra"),
    [
        ("model.", {"criterion.pos_weight": torch.tensor(3.2)}),
        ("net.", {"val_acc.correct": torch.tensor(3)}),
        ("module.model.", {"module.loss.weight": torch.ones(3, 3)}),
        ("model._orig_mod.", {"criterion.weight": torch.ones(9, 9)}),
        ("", {"criterion.weight": torch.ones(500, 500), "n_averaged": torch.tensor(4)}),
        ("student.", lead("teacher.", halved())),
        ("model.", lead("ema_model.", halved())),
        ("online_net.", lead("target_net.", halved())),
        ("policy.", {"value.0.weight": torch.ones(900, 16)}),
    ],
)
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_the_prefix_that_fits_the_model(
    tmp_path: Path, prefix: str, extra: dict[str, Tensor], suffix: str
) -> None:
    state = {name: t.clone() for name, t in {**extra, **lead(prefix, weights())}.items()}
    path = tmp_path / f"run{suffix}"
    if suffix == ".ckpt":
        save(path, {**LIGHTNING, "state_dict": state})
    else:
        save_file(state, path)
    source = opened(path)
    assert is_model(source)
    assert any("left out" in note for note in source.notes)
    assert any(next(iter(extra)).partition(".")[0] in other for other in source.info["others"])
    if suffix == ".ckpt":
        assert source.step == 1200


def test_different_wrapper_prefixes_in_one_file_are_stripped(tmp_path: Path) -> None:
    names = list(weights())
    state = {}
    for place, (name, t) in enumerate(weights().items()):
        inner = name.replace(".h.0.", ".h.0.module.").replace(
            ".h.1.", ".h.1._checkpoint_wrapped_module."
        )
        state[f"module._orig_mod.{inner}" if place % 2 else f"_orig_mod.{inner}"] = t
    assert len(state) == len(names)
    assert is_model(opened(save(tmp_path / "x.pt", state)))


def test_averaged_model_of_swa_is_read(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(tiny())
    path = save(tmp_path / "averaged.pt", averaged.state_dict())
    assert is_model(opened(path))
    alone = open_checkpoint(path)
    assert set(alone.state) == set(weights()), (
        "without --model the names are those of the model too"
    )


def test_weights_without_the_prefix_of_the_model_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b.py").write_text(
        "from torch import nn\nfrom jacdiag.sources import gpt\n"
        "class Lit(nn.Module):\n    def __init__(self, **sizes):\n        super().__init__()\n"
        "        self.model = gpt.build(**sizes)\n"
    )
    monkeypatch.chdir(tmp_path)
    source = load(str(save(tmp_path / "x.pt", weights())), model="b.py:Lit", model_args=SIZES)
    assert is_model(source, lead("model.", weights()))
    assert "the prefix 'model.' was put before every name" in source.notes


def test_weights_with_unexpected_layers_are_refused(tmp_path: Path) -> None:
    more = {name.replace(".h.1.", ".h.2."): t for name, t in weights().items()}
    with pytest.raises(SourceError, match="unexpected"):
        opened(save(tmp_path / "x.pt", {**more, **weights()}))


# -- several sets of weights -----------------------------------------------------------------------
@pytest.mark.parametrize(
    "other", ["ema", "state_dict_ema", "model_ema", "ema_state_dict", "swa_model", "teacher"]
)
@pytest.mark.parametrize("first", ["model", "state_dict", "network_g"])
@pytest.mark.parametrize("average_first", [True, False])
def test_a_model_and_its_average(
    tmp_path: Path, first: str, other: str, average_first: bool
) -> None:
    held = {first: weights(), other: halved(), "step": np.int64(10), "optimizer": adam(weights())}
    if average_first:
        held = {other: halved(), **held}
    path = save(tmp_path / "sets.pt", held)
    source = opened(path)
    assert is_model(source) and source.info["key"] == first and source.step == 10
    assert any(text.startswith(f"{other} (") for text in source.info["others"])
    assert any(text.startswith("optimizer (optimizer state") for text in source.info["others"])
    assert any(f"also fits the model: {other} (--key chooses)" in note for note in source.notes)
    assert is_model(opened(path, key=other), halved())
    assert open_checkpoint(path).where == first and open_checkpoint(path, key=other).where == other


def test_an_average_alone_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "ema.pt", {"ema": halved(), "step": 3})
    assert is_model(opened(path), halved()) and open_checkpoint(path).where == "ema"
    assert "others" not in opened(path).info


def test_model_selects_between_two_networks_in_a_file(tmp_path: Path) -> None:
    other = {"main.0.weight": torch.ones(700, 700), "main.0.bias": torch.ones(700)}
    path = save(tmp_path / "gan.pt", {"discriminator": other, "generator": weights()})
    assert is_model(opened(path))
    assert opened(path).info["others"] == ["discriminator (weights, 2 tensors)"]
    with pytest.raises(SourceError, match="2 networks") as caught:
        load(str(path))
    assert "generator" in str(caught.value) and "--key discriminator" in (caught.value.hint or "")
    assert load(str(path), key="generator").state.keys() == weights().keys()


def test_two_networks_that_both_fit_are_asked_about(tmp_path: Path) -> None:
    path = save(tmp_path / "two.pt", {"forward_net": weights(), "backward_net": halved()})
    with pytest.raises(SourceError, match="each of them fits GPT"):
        opened(path)
    assert is_model(opened(path, key="backward_net"), halved())


def test_a_deeper_model_does_not_fit_a_shallow_one(tmp_path: Path) -> None:
    """All names of the small model are in the large one too."""
    deeper = {
        name.replace(".h.1.", f".h.{k}."): t for k in (1, 2, 3) for name, t in halved().items()
    }
    path = save(tmp_path / "two.pt", {"draft": weights(), "model": deeper})
    assert is_model(opened(path)) and opened(path).info["key"] == "draft"


@pytest.mark.parametrize("shape", ["tuple", "list", "deep", "list below"])
def test_containers_around_the_weights(tmp_path: Path, shape: str) -> None:
    deep = {"checkpoint": {"state": {"model": weights(), "opt": adam(weights())}}}
    held = {
        "tuple": (weights(), 7),
        "list": [3, weights()],
        "deep": deep,
        "list below": {"models": [weights()]},
    }
    path = save(tmp_path / "x.pt", held[shape])
    assert is_model(opened(path))
    assert set(open_checkpoint(path).state) == set(weights())


def test_nanogpt_with_an_average_is_rebuilt(tmp_path: Path) -> None:
    source = load(str(save(tmp_path / "c.pt", {"ema": halved(), "model": weights(), **NANO})))
    assert is_model(source) and source.info["format"] == "nanogpt" and source.info["others"]


def test_losses_next_to_the_weights_do_not_hide_them(tmp_path: Path) -> None:
    held = {
        "model": weights(),
        "loss": torch.tensor(2.0),
        "step": torch.tensor(4),
        "rng": torch.zeros(9).byte(),
    }
    source = opened(save(tmp_path / "c.pt", held))
    assert is_model(source) and source.step == 4 and "others" not in source.info


# -- --key -----------------------------------------------------------------------------------------
def test_an_unknown_key_lists_what_is_there(tmp_path: Path) -> None:
    path = save(tmp_path / "c.pt", {"model": weights(), "ema": halved()})
    with pytest.raises(SourceError, match="nothing under the key 'nope'") as caught:
        opened(path, key="nope")
    assert "model (weights" in (caught.value.got or "") and "ema (moving average" in (
        caught.value.got or ""
    )
    assert "--key model" in (caught.value.hint or "")


def test_a_key_may_be_a_prefix_of_names(tmp_path: Path) -> None:
    state = {**lead("actor.", weights()), **lead("critic.", halved())}
    path = save(tmp_path / "c.ckpt", {"state_dict": state})
    assert is_model(opened(path, key="state_dict.critic"), halved())
    save_file({name: t.clone() for name, t in state.items()}, tmp_path / "c.safetensors")
    assert is_model(opened(tmp_path / "c.safetensors", key="critic"), halved())
    assert load(str(tmp_path / "c.safetensors"), key="critic").state.keys() == weights().keys()


@pytest.mark.parametrize("source", [f"{BUILD}", "hf:config.json"])
def test_a_key_without_a_file(source: str) -> None:
    with pytest.raises(UsageError, match="--key belongs to a checkpoint file"):
        load(source, key="ema")


# -- optimizer state -------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["policy and adam", "by name", "flat", "safetensors"])
def test_moments_are_no_weights(tmp_path: Path, layout: str) -> None:
    flat = {
        f"state.{name}.{kind}": t.clone()
        for name, t in weights().items()
        for kind in ("exp_avg", "exp_avg_sq")
    }
    named = {"state": moments(weights()), "param_groups": [{"params": list(weights())}]}
    held: dict[str, Any] = {
        "policy and adam": {"policy": weights(), "adam": moments(weights())},
        "by name": {"policy": weights(), "optim": named},
        "flat": {**weights(), **flat},
    }
    path = tmp_path / ("x.safetensors" if layout == "safetensors" else "x.pt")
    if layout == "safetensors":
        save_file({**{name: t.clone() for name, t in weights().items()}, **flat}, path)
    else:
        save(path, held[layout])
    source = load(str(path))
    assert set(source.state) == set(weights())
    assert any("optimizer state" in text for text in source.info["others"])
    assert is_model(opened(path))


@pytest.mark.parametrize("layout", ["torch", "by name", "flat", "nested", "one slot"])
def test_a_file_of_an_optimizer_alone(tmp_path: Path, layout: str) -> None:
    flat = {
        f"state.{name}.{kind}": t
        for name, t in weights().items()
        for kind in ("exp_avg", "exp_avg_sq")
    }
    held: dict[str, Any] = {
        "torch": adam(weights()),
        "by name": {"state": moments(weights())},
        "flat": flat,
        "nested": {"optimizer": adam(weights()), "epoch": 1},
        "one slot": {"momentum_buffer": torch.ones(9, 9)},
    }
    path = save(tmp_path / "x.pt", held[layout])
    for options in ({}, {"model": BUILD, "model_args": SIZES}):
        with pytest.raises(SourceError, match="the state of an optimizer only"):
            load(str(path), **options)


# -- what the report says --------------------------------------------------------------------------
def test_the_header_says_what_was_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = str(save(tmp_path / "both.pt", {"model": weights(), "ema": halved(), **NANO}))
    alone = str(save(tmp_path / "alone.pt", {"model": weights(), **NANO}))
    line = "also in the file: ema (moving average"
    quick = ["--batch", "1", "--seq", "8"]
    for command in (["audit", "--fail-on", "never", "--remedies", "none", "--decide"], ["sites"]):
        assert main([command[0], both, *command[1:], *quick]) == 0
        printed = capsys.readouterr().out
        assert "read: model" in printed and line in printed
        assert main([command[0], alone, *command[1:], *quick]) == 0
        assert "also in the file" not in capsys.readouterr().out
    assert main(["sites", both, *quick, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["source"]["others"][0].startswith("ema (")


def test_the_key_of_an_audit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(save(tmp_path / "both.pt", {"model": weights(), "ema": halved(), **NANO}))
    report = jacdiag.audit(path, key="ema", batch=1, seq=8, products=False)
    assert report.source["key"] == "ema"
    assert (
        main(["diff", path, path, "--key", "ema", "--batch", "1", "--seq", "8", "--contract-only"])
        == 0
    )
    assert main(["audit", path, "--key", "nope"]) == 2
    assert "nothing under the key 'nope'" in capsys.readouterr().err


# -- words inside keys -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "key", ["lossless_net", "charngram", "parametric_model", "optimus", "upscaler", "schedulable"]
)
def test_words_inside_keys_are_no_reason_either(tmp_path: Path, key: str) -> None:
    path = save(tmp_path / "w.pt", {key: weights(), "ema": halved()})
    source = opened(path)
    assert is_model(source) and source.info["key"] == key
    assert source.info["others"] == [f"ema (moving average, {len(weights())} tensors)"]


@pytest.mark.parametrize("key", ["loss", "lossFn", "GradScaler", "lr_scheduler", "rng_states"])
def test_keys_that_name_something_else(tmp_path: Path, key: str) -> None:
    held = {key: {"weight": torch.ones(3, 3)}, "net": weights()}
    source = opened(save(tmp_path / "w.pt", held))
    assert is_model(source)
    assert source.info["others"] == [f"{key} (other tensors, 1 tensor)"]


def state_of(kind: str, weight: Tensor) -> dict[str, Any]:
    """Return what an optimizer stores for one parameter."""
    step = torch.tensor(3.0)
    quantised = weight.to(torch.uint8)
    states: dict[str, dict[str, Any]] = {
        "Adagrad": {"step": step, "sum": weight},
        "Rprop": {"step": step, "prev": weight, "step_size": weight},
        "Adafactor": {"step": step, "row_var": weight, "col_var": weight},
        "ASGD": {"step": step, "eta": step, "mu": step, "ax": weight},
        "AdaBelief": {"exp_avg": weight, "exp_avg_var": weight},
        "CAME": {"exp_avg": weight, "exp_avg_res_row": weight},
        "bitsandbytes": {"step": 3, "state1": quantised, "qmap1": torch.ones(256)},
    }
    return states[kind]


@pytest.mark.parametrize(
    "kind", ["Adagrad", "Rprop", "Adafactor", "ASGD", "AdaBelief", "CAME", "bitsandbytes"]
)
def test_moments_of_every_optimizer_are_no_weights(tmp_path: Path, kind: str) -> None:
    states = {name: state_of(kind, weight) for name, weight in weights().items()}
    path = save(tmp_path / "w.pt", {"policy": weights(), "states": states})
    checkpoint = open_checkpoint(path)
    assert checkpoint.where == "policy"
    assert ["optimizer state" in other for other in checkpoint.others] == [True]

    # Alone, they are no weights either, in a tree and by dotted names.
    flat = {}
    for name, state in states.items():
        for key, value in state.items():
            flat[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
    for held in (states, flat):
        with pytest.raises(SourceError, match="state of an optimizer only"):
            open_checkpoint(save(tmp_path / "o.pt", held))


def test_weights_that_are_called_as_moments_are(tmp_path: Path) -> None:
    held = {"net": {"sum": torch.ones(3, 3), "z": torch.ones(3, 3)}, "step": 3}
    assert open_checkpoint(save(tmp_path / "a.pt", held)).state.keys() == {"sum", "z"}

    # A count next to other weights makes no optimizer of them.
    held = {"step": torch.tensor(3.0), "sum": torch.ones(3, 3), "proj": torch.ones(3, 3)}
    assert "proj" in open_checkpoint(save(tmp_path / "b.pt", {"net": held})).state
