"""Whatever a Python caller hands in works, or is an error that says what to pass; never a raw
one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import jacdiag
from jacdiag.errors import JacdiagError, ProbeError, SourceError, TraceError, UsageError
from jacdiag.gate import gate, read_baseline
from jacdiag.records.run_log import read_run
from jacdiag.sources import factory, load
from jacdiag.sources.gpt import build

SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 32, "block_size": 8}
SMALL: dict[str, Any] = {"seq": 4, "batch": 1, "max_products": 4}


def tiny(**sizes: int) -> nn.Module:
    return build(**{**SIZES, **sizes})


class Pathlike:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


@pytest.mark.parametrize("kind", [str, os.fsencode, Path, Pathlike])
def test_every_kind_of_path_opens(tmp_path: Path, kind: Any) -> None:
    path = tmp_path / "weights.pt"
    torch.save(tiny().state_dict(), path)
    assert jacdiag.audit(kind(path)).tier == "weights"
    assert load(kind(path)).state
    assert jacdiag.audit(kind(path), model=tiny, **SMALL).tier == "measured"


def test_functions_and_classes_build_the_model() -> None:
    report = jacdiag.audit(tiny, model_args={"n_layer": 2}, **SMALL)
    assert len(report.sublayers) == 4
    assert report.source["factory"].endswith(".tiny")
    assert gate(tiny, seeds=1, **SMALL).exit_code in (0, 1, 3)


@pytest.mark.parametrize(
    "given,hint",
    [
        (None, "a torch.nn.Module"),
        (3, "a torch.nn.Module"),
        ([], "a torch.nn.Module"),
        ({}, "checkpoint file"),
        (tiny().state_dict(), "load_state_dict"),
        ([tiny()], "one module"),
        (torch.optim.SGD(tiny().parameters()), "not its optimizer"),
        ("a\0b", "checkpoint"),
        ("", "checkpoint"),
    ],
)
def test_what_is_no_model_says_what_to_pass(given: Any, hint: str) -> None:
    for call in (jacdiag.audit, gate):
        with pytest.raises(SourceError) as refused:
            call(given)  # type: ignore[operator]
        assert hint in (refused.value.hint or "")


@pytest.mark.parametrize(
    "given", [None, 3, "x.pt", Path("x.pt"), tiny().state_dict(), tiny, nn.Linear]
)
def test_sites_and_watch_ask_for_a_module(given: Any) -> None:
    with pytest.raises(UsageError, match=r"jacdiag\.sites takes a torch\.nn\.Module"):
        jacdiag.sites(given, torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(UsageError, match=r"jacdiag\.watch takes a torch\.nn\.Module"):
        jacdiag.watch(given, torch.optim.SGD(tiny().parameters()), quiet=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": 3},
        {"batch": None},
        {"seed": None},
        {"seed": 2**70},
        {"tol": None},
        {"confidence": "high"},
        {"device": []},
        {"dtype": 3},
        {"state": "foo"},
        {"profile": None},
        {"profile": []},
        {"select": 3},
        {"select": [3]},
        {"ignore": None},
        {"thresholds": 3},
        {"thresholds": "x"},
        {"risk": 3},
        {"max_products": None},
        {"declared": 3},
        {"contract": 3},
        {"contract": {1: 2}},
        {"optimizer": 3},
        {"optimizer": "x"},
        {"optimizer": [{"params": 3}]},
        {"remedies": 3},
        {"baseline": "x"},
        {"progress": 3},
        {"model_args": [1]},
        {"input_factory": 3},
    ],
    ids=str,
)
def test_an_argument_of_the_wrong_type_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(JacdiagError):
        jacdiag.audit(tiny(), **{**SMALL, **wrong})


def test_codes_may_be_text_and_numbers_numpy() -> None:
    report = jacdiag.audit(tiny(), select="JD1", seed=np.int64(3), **SMALL)
    assert {rule.code[:3] for rule in report.rules} == {"JD1"}
    assert report.settings["seed"] == 3


@pytest.mark.parametrize(
    "inputs", [{1: torch.zeros(1)}, torch.zeros(0, 4).long(), torch.zeros(2, 0).long(), 3, "x"]
)
def test_inputs_of_the_wrong_kind(inputs: Any) -> None:
    with pytest.raises(ProbeError):
        jacdiag.audit(tiny(), inputs)


@pytest.mark.parametrize("path", [3, None, b"nope", "nope"])
def test_a_baseline_that_is_no_path(path: Any) -> None:
    with pytest.raises(JacdiagError):
        read_baseline(path)


class Residual(nn.Module):
    """One residual branch; what it returns, and what it raises when, is chosen."""

    calls = 0

    def __init__(self, result: Any = None, error: Exception | None = None, at: int = 0) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        self.result, self.error, self.at = result, error, at

    def forward(self, x: torch.Tensor) -> Any:
        Residual.calls += 1
        if self.error is not None and Residual.calls >= self.at:
            raise self.error
        y = x + self.linear(self.norm(x))
        return y if self.result is None else self.result(y)


@pytest.mark.parametrize(
    "result",
    [
        lambda y: [],
        lambda y: 3,
        lambda y: {},
        lambda y: "x",
        lambda y: y > 0,
        lambda y: y.argmax(-1),
        lambda y: y.sum(),
    ],
)
def test_outputs_without_a_loss_are_a_note(result: Any) -> None:
    report = jacdiag.audit(Residual(result), torch.randn(2, 3, 8), max_products=4)
    assert report.sublayers[0].branch_norm is not None
    assert report.network is not None
    assert "no floating tensor" in report.network.notes["gradient_norms"]
    plain = jacdiag.audit(Residual(), torch.randn(2, 3, 8), max_products=4)
    assert plain.network is not None and "gradient_norms" not in plain.network.notes


@pytest.mark.parametrize("at", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("error", [TypeError("own"), IndexError("own"), StopIteration("own")])
def test_what_the_model_raises_late_is_its_own_error(error: Exception, at: int) -> None:
    Residual.calls = 0
    try:
        report = jacdiag.audit(Residual(error=error, at=at), torch.randn(2, 3, 8), max_products=4)
    except TraceError as refused:
        assert "own" in (refused.got or "")
    else:
        row = report.sublayers[0]
        assert row.branch_norm is None and "own" in row.notes["branch_norm"]


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.LazyLinear(8)), torch.jit.script(nn.Linear(8, 8)), Residual().to("meta")],
    ids=["lazy", "scripted", "meta"],
)
def test_modules_that_cannot_run(model: nn.Module) -> None:
    with pytest.raises(JacdiagError):
        jacdiag.audit(model, torch.randn(2, 3, 8))


FACTORIES = """
from torch import nn
from os.path import join
number = 3
def model(): return nn.Linear(2, 2)
def pair(): return nn.Linear(2, 2), "tokenizer"
def swapped(): return ["x", nn.Linear(2, 2)]
def table(): return {"model": nn.Linear(2, 2), "tokenizer": 1}
def weights(): return nn.Linear(2, 2).state_dict()
def nothing(): pass
def cls(): return Net
class Net(nn.Module): pass
"""


@pytest.mark.parametrize(
    "name,hint",
    [
        ("pair", "pair()[0]"),
        ("swapped", "swapped()[1]"),
        ("table", "table()['model']"),
        ("weights", "load_state_dict"),
        ("nothing", "return model"),
        ("cls", "Net(...)"),
        ("nope", "model, pair"),
        ("modle", "one of model"),
        ("number", "one of"),
    ],
)
def test_a_factory_that_is_wrong_says_what_to_change(tmp_path: Path, name: str, hint: str) -> None:
    path = tmp_path / "build.py"
    path.write_text(FACTORIES)
    with pytest.raises(SourceError) as refused:
        factory.build(f"{path}:{name}")
    assert hint in (refused.value.hint or "")
    assert "join" not in (refused.value.hint or "")


def test_relative_imports_name_the_module(tmp_path: Path) -> None:
    package = tmp_path / "pack"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "parts.py").write_text("from torch import nn\n")
    (package / "build.py").write_text(
        "from .parts import nn\ndef model(): return nn.Linear(2, 2)\n"
    )
    with pytest.raises(SourceError) as refused:
        factory.build(f"{package}/build.py:model")
    assert "pack.build:CALLABLE" in (refused.value.hint or "")
    (tmp_path / "plain.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(SourceError) as other:
        factory.build(f"{tmp_path}/plain.py:model")
    assert other.value.hint is None


class WrongPathlike:
    """An object whose path is no text."""

    def __fspath__(self) -> Any:
        return 3


def test_a_path_that_is_none_is_named_by_every_reader(tmp_path: Path) -> None:
    with pytest.raises(JacdiagError, match="path is expected"):
        jacdiag.audit(WrongPathlike())  # type: ignore[arg-type]
    with pytest.raises(SourceError, match="names no source"):
        load(WrongPathlike())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="a run is read from a path"):
        read_run(None)  # type: ignore[arg-type]
    with pytest.raises(SourceError, match="cannot read the run log"):
        read_run(os.fsencode(tmp_path / "none"))


def test_a_key_that_is_no_text(tmp_path: Path) -> None:
    torch.save({"net": tiny().state_dict()}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match="key is of the wrong type"):
        jacdiag.audit(tmp_path / "w.pt", key=5)  # type: ignore[arg-type]
    assert jacdiag.audit(tmp_path / "w.pt", key="net").tier == "weights"


def test_a_model_in_a_file_is_no_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate builds the model with several seeds, so that a function is needed."""
    monkeypatch.chdir(tmp_path)
    text = "from torch import nn\nnet = nn.Linear(3, 3)\n"
    (tmp_path / "built.py").write_text(text)
    with pytest.raises(SourceError, match="is a model, and a function that builds one") as caught:
        load("built.py:net")

    # What the hint says works.
    line, source = str(caught.value.hint).split(", then ")
    (tmp_path / "built.py").write_text(f"{text}{line}\n")
    assert isinstance(load(source).model, nn.Linear)
