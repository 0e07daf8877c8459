"""Weights into a model: by name, by shape, tied where the model ties, and nothing else."""

from __future__ import annotations

import pytest
import torch
from sources.rig import tiny, weights
from torch import Tensor, nn

from jacdiag.errors import SourceError
from jacdiag.sources.load_weights import fit

HEAD, TABLE = "lm_head.weight", "transformer.wte.weight"


def drawn() -> dict[str, Tensor]:
    torch.manual_seed(7)
    state = {name: torch.randn_like(t) for name, t in weights().items()}
    state[HEAD] = state[TABLE]
    return state


def loads(model: nn.Module, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    fit(model, state, "'x'")
    found = model.state_dict()
    assert all(torch.equal(found[name], t) for name, t in expected.items())
    ids = torch.arange(4)[None]
    reference = tiny()
    reference.load_state_dict(expected)
    assert torch.equal(model(ids), reference(ids))


def test_state_dict_with_all_names_is_loaded() -> None:
    loads(tiny(), drawn(), drawn())


@pytest.mark.parametrize("left_out", [HEAD, TABLE])
def test_one_name_of_a_tie_is_enough(left_out: str) -> None:
    state = drawn()
    expected = dict(state)
    del state[left_out]
    model = tiny()
    loads(model, state, expected)
    assert model.lm_head.weight is model.transformer["wte"].weight


def test_a_tie_that_the_file_breaks_is_refused() -> None:
    state = drawn()
    state[HEAD] = state[HEAD] + 1
    with pytest.raises(SourceError, match="are one parameter in the model, but differ"):
        fit(tiny(), state, "'x'")


def test_the_prefix_of_a_lightning_module() -> None:
    model = tiny()
    notes = fit(model, {f"model.{name}": t for name, t in drawn().items()}, "'x'")
    assert torch.equal(model.state_dict()[TABLE], drawn()[TABLE])
    assert notes == ["the prefix 'model.' was taken off every name"]


def test_the_precision_of_the_file_is_kept() -> None:
    model = tiny()
    fit(model, {name: t.bfloat16() for name, t in drawn().items()}, "'x'")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_loaded_weights_share_memory_with_the_state_dict() -> None:
    state, model = drawn(), tiny()
    fit(model, state, "'x'")
    assert model.transformer["wpe"].weight.data_ptr() == state["transformer.wpe.weight"].data_ptr()


def test_what_does_not_fit_is_listed_and_counted() -> None:
    state = drawn()
    layer = [name for name in state if ".h.1." in name]
    for name in layer:
        state[name.replace(".h.1.", ".h.9.")] = state.pop(name)
    state["transformer.wpe.weight"] = torch.ones(3, 16)
    with pytest.raises(SourceError) as refused:
        fit(tiny(), state, "'x.pt'", hint="look again")
    error = refused.value
    missing, unexpected, shapes = (error.got or "").splitlines()
    assert missing.startswith(f"{len(layer)} missing: {layer[0]}, ") and missing.endswith(
        f"({len(layer)} in all)"
    )
    assert unexpected.startswith(f"{len(layer)} unexpected: transformer.h.9.")
    assert shapes == "1 of another shape: transformer.wpe.weight 3x16, the model has 32x16"
    assert error.what == "'x.pt' does not fit GPT" and error.hint == "look again"


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(SourceError, match="together with its scales"):
        fit(tiny(), {name: t.to(dtype) for name, t in drawn().items()}, "'x'")


def test_a_model_that_does_not_fit_is_left_alone() -> None:
    model = tiny()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = drawn()
    state.pop("transformer.ln_f.bias")
    with pytest.raises(SourceError):
        fit(model, state, "'x'")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_buffers_of_any_dtype_are_loaded() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.register_buffer("mask", torch.ones(2, 2, dtype=torch.bool))
            self.steps = nn.Parameter(torch.zeros(2, dtype=torch.long), requires_grad=False)

    made, wanted = Counted(), Counted()
    wanted.norm.num_batches_tracked += 5
    wanted.norm.running_mean += 2
    wanted.mask[0] = False
    wanted.steps.data += 3
    fit(made, wanted.state_dict(), "'x'")
    assert all(torch.equal(t, wanted.state_dict()[name]) for name, t in made.state_dict().items())
