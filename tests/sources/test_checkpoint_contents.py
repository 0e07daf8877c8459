"""Files whose tensors are no weights as they stand, and formats that are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jacdiag_cli.main import main
from safetensors.torch import save_file
from sources.rig import BUILD, SIZES, same, save, weights, whole
from torch import Tensor

from jacdiag.errors import SourceError
from jacdiag.sources import load
from jacdiag.sources.checkpoint import open_checkpoint

OPTIONS: list[dict[str, Any]] = [{}, {"model": BUILD, "model_args": SIZES}]


def matrices() -> dict[str, Tensor]:
    return {name: t for name, t in weights().items() if ".h." in name and t.dim() == 2}


def fp8() -> dict[str, Tensor]:
    return {name: t.to(torch.float8_e4m3fn) if t.dim() == 2 else t for name, t in weights().items()}


def fp8_scaled() -> dict[str, Tensor]:
    return {**fp8(), **{f"{name}_scale_inv": torch.ones(1, 1) for name in matrices()}}


def int8() -> dict[str, Tensor]:
    return {name: t.to(torch.int8) if name in matrices() else t for name, t in weights().items()}


def bitsandbytes() -> dict[str, Tensor]:
    return {**int8(), **{name.replace(".weight", ".SCB"): torch.ones(3) for name in matrices()}}


def four_bit() -> dict[str, Tensor]:
    state = dict(weights())
    for name in matrices():
        state[name] = torch.zeros(99, 1, dtype=torch.uint8)
        state[f"{name}.absmax"] = torch.ones(9)
        state[f"{name}.quant_state.bitsandbytes__nf4"] = torch.zeros(9, dtype=torch.uint8)
    return state


def gptq() -> dict[str, Tensor]:
    state = {name: t for name, t in weights().items() if name not in matrices()}
    for name in matrices():
        stem = name.removesuffix(".weight")
        state[f"{stem}.qweight"] = torch.zeros(4, 4, dtype=torch.int32)
        state[f"{stem}.qzeros"] = torch.zeros(4, 4, dtype=torch.int32)
        state[f"{stem}.scales"] = torch.ones(4, 4).half()
        state[f"{stem}.g_idx"] = torch.zeros(4, dtype=torch.int32)
    return state


def awq() -> dict[str, Tensor]:
    return {name: t for name, t in gptq().items() if "g_idx" not in name}


SCHEMES: list[tuple[Callable[[], dict[str, Tensor]], str]] = [
    (fp8, "fp8"),
    (fp8_scaled, "fp8"),
    (int8, "int8"),
    (bitsandbytes, "int8 of bitsandbytes"),
    (four_bit, "4-bit of bitsandbytes"),
    (gptq, "GPTQ"),
    (awq, "GPTQ or AWQ"),
]


@pytest.mark.parametrize(
    ("scheme", "name"), SCHEMES, ids=lambda value: getattr(value, "__name__", value)
)
@pytest.mark.parametrize("layout", ["bare.pt", "nested.pt", "x.safetensors"])
@pytest.mark.parametrize("options", OPTIONS, ids=["alone", "with a model"])
def test_quantised_weights_are_refused_by_their_scheme(
    tmp_path: Path,
    scheme: Callable[[], dict[str, Tensor]],
    name: str,
    layout: str,
    options: dict[str, Any],
) -> None:
    if layout == "x.safetensors":
        save_file({key: t.clone() for key, t in scheme().items()}, tmp_path / layout)
    else:
        save(tmp_path / layout, scheme() if layout == "bare.pt" else {"model": scheme(), "step": 3})
    with pytest.raises(SourceError, match=rf"quantised weights \({name}\)") as caught:
        load(str(tmp_path / layout), **options)
    assert "bfloat16" in (caught.value.hint or "")


def test_all_tensors_of_the_type_are_counted(tmp_path: Path) -> None:
    state = {name: tensor.to(torch.int8) for name, tensor in weights().items()}
    torch.save(state, tmp_path / "all.pt")
    with pytest.raises(SourceError) as caught:
        load(str(tmp_path / "all.pt"))
    count = f"{len(state)} of {len(state)} tensors are int8"
    assert count in (caught.value.got or "")


def test_masks_and_counters_are_not_quantised_weights(tmp_path: Path) -> None:
    buffers = {
        "transformer.h.0.attn.mask": torch.ones(8, 8, dtype=torch.uint8),
        "position_ids": torch.arange(8)[None],
        "scales": torch.ones(3),
        "causal": torch.ones(8, 8, dtype=torch.bool),
    }
    assert set(open_checkpoint(save(tmp_path / "x.pt", {**weights(), **buffers})).state) == {
        *weights(),
        *buffers,
    }


# -- DeepSpeed -------------------------------------------------------------------------------------
@pytest.mark.parametrize("partly", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=["alone", "with a model"])
def test_one_rank_of_zero_3(tmp_path: Path, partly: bool, options: dict[str, Any]) -> None:
    module = {f"module.{name}": torch.empty(0) for name in weights()}
    if partly:
        module |= {name: torch.ones(4) for name in list(module)[::2]}
    saved = {"module": module, "ds_version": "0.14", "optimizer": None, "param_shapes": [{}]}
    path = save(tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt", saved)
    with pytest.raises(SourceError, match="ZeRO-3") as caught:
        load(str(path), **options)
    assert "python zero_to_fp32.py . OUTPUT" in (caught.value.hint or "")


def test_a_bare_file_of_empty_weights(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="ZeRO-3") as caught:
        load(
            str(save(tmp_path / "pytorch_model.bin", {name: torch.empty(0) for name in weights()}))
        )
    assert "zero_to_fp32.py" in (caught.value.hint or "")


def test_the_model_states_of_zero_1_are_whole(tmp_path: Path) -> None:
    saved = {"module": weights(), "ds_version": "0.14", "param_shapes": [{}], "global_steps": 900}
    source = load(
        str(save(tmp_path / "mp_rank_00_model_states.pt", saved)), model=BUILD, model_args=SIZES
    )
    assert source.step == 900


@pytest.mark.parametrize(
    ("stage", "way"), [(1, "mp_rank_00_model_states.pt"), (3, "zero_to_fp32.py")]
)
def test_optimizer_shard_of_zero_is_refused(tmp_path: Path, stage: int, way: str) -> None:
    state = {"zero_stage": stage, "partition_count": 2, "fp32_flat_groups": [torch.ones(9)]}
    saved = {"optimizer_state_dict": state, "ds_config": {}, "ds_version": "0.14"}
    with pytest.raises(SourceError, match=f"ZeRO-{stage}") as caught:
        load(str(save(tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt", saved)))
    assert way in (caught.value.hint or "")


# -- adapters, states of a run ---------------------------------------------------------------------
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("options", OPTIONS, ids=["alone", "with a model"])
def test_lora_adapter_without_its_base_is_refused(
    tmp_path: Path, suffix: str, options: dict[str, Any]
) -> None:
    state = {f"base_model.model.h.0.q.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
    path = tmp_path / f"adapter_model{suffix}"
    if suffix == ".bin":
        save(path, state)
    else:
        save_file(state, path)
    with pytest.raises(SourceError, match="LoRA adapter") as caught:
        load(str(path), **options)
    assert "merge_and_unload" in (caught.value.hint or "")


def unmerged() -> dict[str, Tensor]:
    """Return a model with a LoRA adapter on every matrix and a head that was trained in full, as
    PEFT saves them.
    """
    state = {}
    for name, t in weights().items():
        place = f"base_model.model.{name}"
        stem = place.removesuffix(".weight")
        if name in matrices():
            state[f"{stem}.base_layer.weight"] = t
            state[f"{stem}.lora_A.default.weight"] = torch.ones(2, t.shape[1])
            state[f"{stem}.lora_B.default.weight"] = torch.zeros(t.shape[0], 2)
        elif name == "lm_head.weight":
            state[f"{stem}.original_module.weight"] = torch.zeros_like(t)
            state[f"{stem}.modules_to_save.default.weight"] = t
        else:
            state[place] = t
    return state


@pytest.mark.parametrize("key", ["", "model"], ids=["flat", "under a key"])
@pytest.mark.parametrize("options", OPTIONS, ids=["alone", "with a model"])
def test_lora_adapter_next_to_its_base_is_ignored_with_a_note(
    tmp_path: Path, options: dict[str, Any], key: str
) -> None:
    state: dict[str, Any] = unmerged()
    path = save(tmp_path / "w.pt", {key: state} if key else state)
    source = load(str(path), **options)
    if options:
        assert source.model is not None
        assert same(dict(whole(source).state_dict()), weights())
    else:
        assert same(source.state, weights())
    (note,) = [note for note in source.notes if "LoRA" in note]
    assert f"({2 * len(matrices())} tensors) were not applied" in note


def test_no_adapter_is_named_where_there_is_none(tmp_path: Path) -> None:
    plain = {name.replace(".mlp.", ".base_layer."): t for name, t in weights().items()}
    source = load(str(save(tmp_path / "w.pt", plain)))
    assert same(source.state, plain)
    assert not [note for note in source.notes if "LoRA" in note]


@pytest.mark.parametrize(
    ("name", "held", "said"),
    [
        (
            "scheduler.bin",
            {"base_lrs": [0.1], "last_epoch": 3, "_step_count": 4},
            "learning-rate scheduler",
        ),
        (
            "optimizer.bin",
            {"state": {}, "param_groups": [{"lr": 1.0}]},
            "state of an optimizer only",
        ),
        ("rng_state.pth", {"cpu": torch.zeros(9, dtype=torch.uint8)}, "holds no weights"),
    ],
)
def test_states_of_a_run(tmp_path: Path, name: str, held: Any, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        load(str(save(tmp_path / name, held)))


def test_trainer_state_gives_the_step(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 500}))
    assert open_checkpoint(save(tmp_path / "pytorch_model.bin", weights())).step == 500
    assert open_checkpoint(save(tmp_path / "own.pt", {"model": weights(), "step": 7})).step == 7
    for broken in ("[]", "{", '{"global_step": "x"}', '{"global_step": -1}'):
        (tmp_path / "trainer_state.json").write_text(broken)
        assert open_checkpoint(tmp_path / "pytorch_model.bin").step is None


@pytest.mark.parametrize("step", [np.int64(7), np.array(7), np.array([7]), torch.tensor([7]), 7.0])
def test_steps_of_every_kind(tmp_path: Path, step: Any) -> None:
    assert open_checkpoint(save(tmp_path / "c.pt", {"model": weights(), "step": step})).step == 7


# -- other formats ---------------------------------------------------------------------------------
ONNX = b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:" + bytes(64)


@pytest.mark.parametrize(
    ("name", "content", "said", "way"),
    [
        ("model.gguf", b"GGUF\x03\0\0\0" + bytes(64), "GGUF", "gguf_file='model.gguf'"),
        (
            "pytorch_model.bin",
            b"GGUF\x03\0\0\0" + bytes(64),
            "GGUF",
            "gguf_file='pytorch_model.bin'",
        ),
        ("model.onnx", b"anything", "ONNX", "PyTorch checkpoint"),
        ("model.bin", ONNX, "ONNX", "PyTorch checkpoint"),
        ("tf_model.h5", b"\x89HDF\r\n\x1a\n", "HDF5", "PyTorch checkpoint"),
        ("flax_model.msgpack", b"\x81\xa1a", "msgpack", "PyTorch checkpoint"),
        ("model.tflite", b"\x1c\0\0\0TFL3", "TensorFlow Lite", "PyTorch checkpoint"),
        ("model.ckpt.data-00000-of-00001", b"x", "TensorFlow", "PyTorch checkpoint"),
        ("random_states_0.pkl", b"\x80\x04}.", "random states", "model.safetensors"),
        ("weights.pkl", b"\x80\x04}.", "a pickle", "torch.save"),
        ("model.safetensors.index.json", b"{}", "index of a checkpoint", "audit the folder"),
    ],
)
def test_other_formats_are_refused_by_name(
    tmp_path: Path,
    name: str,
    content: bytes,
    said: str,
    way: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=said) as caught:
        load(str(tmp_path / name))
    assert way in (caught.value.hint or "")
    assert main(["audit", str(tmp_path / name)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [".pt", ".jit", ".ts"])
def test_torchscript_archive_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    torch.jit.trace(torch.nn.Linear(3, 3), torch.ones(3)).save(str(path))
    with pytest.raises(SourceError, match="TorchScript archive") as caught:
        load(str(path))
    assert f"torch.jit.load('m{suffix}').state_dict()" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["weights.npz", "weights.pt"])
def test_numpy_archive_is_refused(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as file:
        np.savez(file, a=np.ones((3, 3)))
    with pytest.raises(SourceError, match="archive of NumPy arrays") as caught:
        load(str(tmp_path / name))
    assert f"numpy.load('{name}')" in (caught.value.hint or "")


def test_a_container_without_end(tmp_path: Path) -> None:
    """A few bytes that describe 2**40 containers, and one that holds itself."""
    node: dict[str, Any] = {"w": torch.ones(2, 2)}
    for _ in range(30):
        node = {"a": node, "b": node}
    with pytest.raises(SourceError, match="too many containers"):
        load(str(save(tmp_path / "wide.pt", node)))
    ring: dict[str, Any] = {"model": weights()}
    ring["again"] = ring
    assert open_checkpoint(save(tmp_path / "ring.pt", ring)).where == "model"
