"""Largest singular values of dense Jacobians, in float64, without jacdiag."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Only while this is imported: a test imports it, and the folder holds modules that are called as
# folders of tests are.
sys.path.insert(0, str(Path(__file__).parents[1]))
try:
    from _real_models.branches import BUILDERS, Branch, Run
finally:
    sys.path.remove(str(Path(__file__).parents[1]))

FACTORIES = Path(__file__).parent


def measure(entry: dict[str, Any], package: Path, token_ids: list[int]) -> list[float]:
    """Return the spectral norms of the sub-layers that an entry of models.toml names.

    Args:
        entry: of models.toml.
        package: folder of the unpacked wheel.
        token_ids: of the probe; empty if the entry has a factory of inputs.
    """
    path = package / entry["path"]
    if "factory" in entry:
        model = call_factory(entry["factory"])
        prefix = entry.get("prefix", "")
        state = read_state(path)
        own = {}
        for name, value in state.items():
            if name.startswith(prefix):
                own[name.removeprefix(prefix)] = value
        model.load_state_dict(own)
    else:
        model = load_transformers(entry["architecture"], path)
    model = model.double().eval()
    cast_inputs(model)
    run = build_run(model, entry, token_ids)
    builder = BUILDERS[entry["architecture"]]
    return [largest_singular_value(builder(model, run, index)) for index in entry["references"]]


def largest_singular_value(branch: Branch) -> float:
    """Return the spectral norm of the Jacobian, from all its singular values."""

    def flat(x: Tensor) -> Tensor:
        return branch.function(x.view_as(branch.point)).reshape(-1)

    jacobian = torch.autograd.functional.jacobian(flat, branch.point.detach().reshape(-1))
    return float(torch.linalg.svdvals(jacobian)[0])


def build_run(model: nn.Module, entry: dict[str, Any], token_ids: list[int]) -> Run:
    """Return a function that runs the model on the probe."""
    if "inputs" not in entry:
        ids = torch.tensor([token_ids])
        return lambda: model(ids)
    probe = call_factory(entry["inputs"])
    if isinstance(probe, Tensor):
        return lambda: model(probe)
    wide = {name: _widen(value) for name, value in probe.items()}
    return lambda: model(**wide)


def cast_inputs(model: nn.Module) -> None:
    """Cast the input of every linear map to float64: some code calls `.float()` on its features."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _module, args: (args[0].double(),))


def _widen(value: Any) -> Any:
    """Return floats in float64 and anything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value


def call_factory(name: str) -> Any:
    """Call a factory of this folder, given as `file.py:function`."""
    file, function = name.split(":")
    spec = importlib.util.spec_from_file_location(Path(file).stem, FACTORIES / file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)()


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint file.

    Code inside the pickle can run: the wheel's sha256 is pinned.
    """
    content = torch.load(path, map_location="cpu", weights_only=False)
    for key in ("model_state_dict", "state_dict", "model"):
        if key in content:
            return content[key]
    return content


def load_transformers(architecture: str, folder: Path) -> nn.Module:
    """Load the body of a model with the class of transformers that its package uses."""
    import transformers

    classes: dict[str, tuple[Any, Any]] = {
        "albert": (transformers.AlbertConfig, transformers.AlbertModel),
        "bert": (transformers.BertConfig, transformers.BertModel),
        "gpt2": (transformers.GPT2Config, transformers.GPT2Model),
    }
    config_class, model_class = classes[architecture]
    config = config_class.from_json_file(str(folder / "config.json"))
    config._attn_implementation = "eager"
    return model_class.from_pretrained(folder, config=config, local_files_only=True)


def main() -> None:
    """Read a job from standard input and write its norms to standard output."""
    job = json.load(sys.stdin)
    norms = measure(job["entry"], Path(job["package"]), job["token_ids"])
    json.dump(norms, sys.stdout)


if __name__ == "__main__":
    main()
