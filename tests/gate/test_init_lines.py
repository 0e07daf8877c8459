"""The line of the user's code that draws a weight: where it is known, and where it is not."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from gate import net
from torch import nn

from jacdiag.gate import gate
from jacdiag.gate.init_lines import CodeLine, InitLines
from jacdiag.gate.source_location import located
from jacdiag.records import Finding

# What ends in a comment draws the parameter of that name.
MODEL = """
import copy

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.by_layer = nn.Linear(4, 4)  # by_layer.weight
        self.by_value = nn.Parameter(torch.randn(3) * 0.1)  # by_value
        self.by_init = nn.Linear(4, 4)  # by_init.bias
        nn.init.normal_(self.by_init.weight, std=0.02)  # by_init.weight
        self.rescaled = nn.Linear(4, 4)
        self.rescaled.weight.data.mul_(0.5)  # rescaled.weight
        self.a_row = nn.Linear(4, 4)
        with torch.no_grad():
            self.a_row.weight[0] = 0  # a_row.weight
        self.replaced = nn.Linear(4, 4)
        self.replaced.weight.data = torch.zeros(4, 4)  # replaced.weight
        self.a_copy = copy.deepcopy(self.by_layer)
        self.by_apply = nn.LayerNorm(4)  # by_apply.bias
        self.apply(self.draw)
        self.by_layer.weight.requires_grad_(False)
        self.by_layer.weight.view(16).t()

    def draw(self, module):
        if isinstance(module, nn.LayerNorm):
            nn.init.constant_(module.weight, 2.0)  # by_apply.weight


def in_half_precision():
    return Net().to(torch.bfloat16)
"""


@pytest.fixture
def module(tmp_path: Path) -> Any:
    path = tmp_path / "user_model.py"
    path.write_text(MODEL)
    spec = importlib.util.spec_from_file_location("user_model", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_the_last_line_that_wrote_a_weight_is_named(module: Any, tmp_path: Path) -> None:
    with InitLines(tmp_path) as lines:
        model = module.Net()
    written = lines.of(model)
    commented = [line.partition("  # ")[2] for line in MODEL.splitlines()]
    names = [name for name in commented if name]
    assert len(names) == 9
    for name in names:
        line = 1 + commented.index(name)
        assert written[name] == CodeLine(str(tmp_path / "user_model.py"), line), name


def test_a_copy_has_the_line_of_its_original(module: Any, tmp_path: Path) -> None:
    """A deep copy, and a model that is moved to another precision."""
    with InitLines(tmp_path) as lines:
        model = module.Net()
    with InitLines(tmp_path) as lines_of_cast:
        cast = module.in_half_precision()
    written = lines.of(model)
    assert written["a_copy.weight"] == written["by_layer.weight"]
    assert lines_of_cast.of(cast) == written


def test_weights_are_the_same_bits_while_lines_are_noted(module: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = module.Net()
    torch.manual_seed(0)
    with InitLines(tmp_path):
        noted = module.Net()
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, noted.state_dict()[name]), name


def test_a_line_outside_the_folder_is_not_named(module: Any, tmp_path: Path) -> None:
    with InitLines(tmp_path / "elsewhere") as lines:
        model = module.Net()
    assert lines.of(model) == {}


def test_a_later_write_by_other_code_takes_the_line_away(module: Any, tmp_path: Path) -> None:
    """As when a checkpoint is loaded into the model that a factory built."""
    with InitLines(tmp_path) as lines:
        model = module.Net()
        model.load_state_dict(module.Net().state_dict())
        model.by_layer = nn.Linear(4, 4)
    assert lines.of(model) == {}


def test_a_finding_of_a_weight_is_shown_at_its_line_and_one_of_a_norm_at_the_class() -> None:
    folder = Path(net.__file__).parent
    with InitLines(folder) as lines:
        model = net.model()
    weight = Finding("JD203", "warning", ["h.0.mlp"], "", {"parameters": ["h.0.mlp.c_fc.weight"]})
    norm = Finding("JD102", "warning", ["h.0.mlp"], "")
    at_line, at_class = located([weight, norm], model, "", folder, lines.of(model))

    place = at_line.evidence["location"]
    source = Path(net.__file__).read_text().splitlines()
    assert place["what"] == "draw" and "nn.init.normal_(p" in source[place["line"] - 1]
    assert at_class.evidence["location"] == {
        "file": "net.py",
        "line": inspect.getsourcelines(net.MLP)[1],
        "what": "class",
        "name": "MLP",
    }


def test_a_gate_of_a_module_in_memory_knows_no_line_and_names_the_class() -> None:
    """Nothing was watched while it was built."""
    model = net.model(broken=True, layers=2, d=32)
    outcome = gate(model, torch.zeros(1, 8, dtype=torch.long), seeds=1, products=False)
    [finding] = [finding for finding in outcome.report.findings if finding.code == "JD203"]
    assert finding.evidence["location"]["what"] == "class"
