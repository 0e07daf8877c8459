"""Models from code: what is imported, how it is called, what the meta device needs, and whose error
is shown.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sources.rig import BUILD, SIZES, tiny
from torch import nn

from jacdiag.errors import SourceError, UsageError
from jacdiag.sources import factory

CODE = """
import helper
from torch import nn
import torch

def plain(d=4): return nn.Sequential(nn.Linear(d, d), nn.LayerNorm(d))
def meta(d=4):
    with torch.device("meta"):
        return plain(d)
class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 3))
        self.register_buffer("table", torch.empty(3), persistent=False)
    def init_weights(self):
        nn.init.normal_(self.weight)
        self.table.copy_(torch.arange(3.0))
def meta_own():
    with torch.device("meta"):
        return Own()
def meta_lost():
    with torch.device("meta"):
        made = plain()
        made.extra = nn.Parameter(torch.empty(2))
        return made
def strict(n, *, width=3): return plain(width)
def raises():
    helper.inner()
def nothing(): return None
class Holder:
    build = staticmethod(plain)
number = 3
"""
HELPER = "def inner():\n    raise ValueError('no disk')\n"


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "models_here.py").write_text(CODE)
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "no_syntax.py").write_text("def f(:\n")
    (tmp_path / "needs_more.py").write_text("import something_that_is_not_there\n")
    (tmp_path / "divides.py").write_text("def f(): pass\n1 / 0\n")
    monkeypatch.chdir(tmp_path)
    for name in ("helper", "models_here"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "models_here.py"


def test_a_file_a_package_and_a_nested_name(code: str) -> None:
    before = list(sys.path)
    for spec in (f"{code}:plain", "models_here:plain", f"{code}:Holder.build", f"./{code}:plain"):
        assert factory.is_factory(spec)
        assert isinstance(factory.build(spec, {"d": 6}), nn.Sequential)
    assert sys.path == before


def test_the_seed_decides_and_the_stream_goes_on(code: str) -> None:
    before = torch.get_rng_state()
    one, same, other = (factory.build(f"{code}:plain", seed=seed)[0].weight for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_meta_device_through_reset_parameters(code: str) -> None:
    made, same = factory.build(f"{code}:meta", seed=1), factory.build(f"{code}:meta", seed=1)
    assert not any(p.is_meta for p in made.parameters())
    assert (
        torch.equal(made[0].weight, same[0].weight) and 0 < float(made[0].weight.detach().std()) < 1
    )
    assert torch.equal(made[1].weight, torch.ones(4))


def test_the_meta_device_through_init_weights(code: str) -> None:
    made: Any = factory.build(f"{code}:meta_own")
    assert float(made.weight.detach().std()) > 0.1 and made.table.tolist() == [0, 1, 2]


def test_the_meta_device_of_transformers(code: str, tmp_path: Path) -> None:
    """Their `init_weights` skips what it believes to be initialised; the std must be that of the
    config.
    """
    (tmp_path / "theirs.py").write_text(
        "import torch, transformers as hf\n"
        "def build():\n"
        "    config = hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, "
        "n_positions=64)\n"
        "    with torch.device('meta'):\n"
        "        return hf.GPT2LMHeadModel(config)\n"
    )
    made: Any = factory.build("theirs.py:build")
    state = made.state_dict()
    assert not any(t.is_meta or not bool(torch.isfinite(t).all()) for t in state.values())
    assert float(state["transformer.h.0.attn.c_attn.weight"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(state["transformer.h.0.mlp.c_proj.weight"].std()) == pytest.approx(
        0.02 / 2, rel=0.05
    )
    assert made.lm_head.weight is made.transformer.wte.weight


def test_what_nothing_initialises_is_named(code: str) -> None:
    with pytest.raises(SourceError) as refused:
        factory.build(f"{code}:meta_lost")
    assert refused.value.got == "1 of 5: extra"
    filled = factory.build(f"{code}:meta_lost", init=False)  # a checkpoint will fill it
    assert filled.extra.shape == (2,)


@pytest.mark.parametrize(
    ("spec", "args", "said"),
    [
        ("models_here.py:strict", {}, "missing a required argument: 'n'"),
        ("models_here.py:strict", {"n": 1, "wdith": 2}, "unexpected keyword argument 'wdith'"),
        ("models_here.py:nothing", {}, "returned no nn.Module\ntype NoneType"),
        ("models_here.py:number", {}, "cannot be called\ntype int"),
        ("models_here.py:palin", {}, "NAME with one of plain"),
        ("models_here.py:Holder.biuld", {}, "NAME with one of build"),
        ("missing.py:f", {}, "no such file"),
        ("no_syntax.py:f", {}, "at no_syntax.py:1: def f(:"),
        (
            "needs_more.py:f",
            {},
            "No module named 'something_that_is_not_there'\nat needs_more.py:1",
        ),
        ("needs_more:f", {}, "No module named 'something_that_is_not_there'\nat needs_more.py:1"),
        ("divides.py:f", {}, "ZeroDivisionError: division by zero\nat divides.py:2"),
        ("no_such_package.at_all:f", {}, "no module named 'no_such_package'"),
        ("not a name:f", {}, "is no module name"),
        ("models_here.py", {}, "a factory is written"),
        ("models_here.py:", {}, "a factory is written"),
        ("models_here.py:raises", {}, "ValueError: no disk\nat helper.py:2 in inner"),
    ],
)
def test_what_cannot_be_built(code: str, spec: str, args: dict[str, Any], said: str) -> None:
    with pytest.raises(SourceError) as refused:
        factory.build(spec, args)
    assert said in str(refused.value)


def test_the_callers_frames_come_last_and_ours_never(code: str) -> None:
    with pytest.raises(SourceError) as refused:
        factory.build(f"{code}:raises")
    error, *frames = (refused.value.got or "").splitlines()
    assert error == "ValueError: no disk"
    assert [frame.split(":")[0] for frame in frames] == ["at helper.py", "at models_here.py"]


def test_a_refusal_of_our_own_keeps_its_words() -> None:
    with pytest.raises(UsageError, match="unknown size of the reference GPT"):
        factory.build(BUILD, {**SIZES, "colour": 1})
    assert isinstance(factory.build(BUILD, SIZES), type(tiny()))


def test_a_name_that_no_file_can_have() -> None:
    assert factory.is_factory("a" * 5000 + ":f") and not factory.there(Path("a" * 5000))
