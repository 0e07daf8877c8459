"""Writes a layout into a folder: a tiny model of the family, its weights renamed and stored as
published.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from _coverage.build import _disturb, config_of, facts_of, seeded
from safetensors.torch import load_file, save_file
from torch import Tensor

from _layouts.catalog import Layout, Refused
from _layouts.edits import Files


def write_layout(layout: Layout, folder: Path) -> Any:
    """Write a folder like the published one.

    Returns:
        The tiny config that it was made of.
    """
    import transformers

    # 1. The model of the class that was saved.
    facts = facts_of(layout.task, layout.family)
    config = config_of(layout.family, facts)
    for name, value in layout.config.items():
        if value is not None and name != "auto_map":
            setattr(config, name, value)
    kind = getattr(transformers, layout.saved)
    with seeded(0):
        model = kind._from_config(config).eval()
        _disturb(model)

    # 2. Its weights by the names that transformers writes, changed as published.
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary)
        state = load_file(Path(temporary) / "model.safetensors")
        data = json.loads((Path(temporary) / "config.json").read_text())
    for edit in layout.edits:
        state = edit(state)
    write_weights(state, folder, layout.files)

    # 3. The config.
    data["architectures"] = [layout.saved if layout.opened is None else layout.opened]
    if layout.opened == "":
        del data["architectures"]
    for name, value in layout.config.items():
        if value is None:
            data.pop(name, None)
        else:
            data[name] = value
    (folder / "config.json").write_text(json.dumps(data))
    for name in layout.others:
        (folder / name).write_text('{"weight_map": {"a": "not-here"}}')
    return config


def write_weights(state: dict[str, Tensor], folder: Path, files: Files) -> None:
    """Write the weights into one file, or into shards with an index."""
    stem, suffix = (
        ("model", "safetensors") if files.kind == "safetensors" else ("pytorch_model", "bin")
    )
    names = sorted(state)
    weight_map = {}
    for number in range(files.shards):
        file = f"{stem}.{suffix}"
        if files.shards > 1:
            file = f"{stem}-{number + 1:05}-of-{files.shards:05}.{suffix}"
        part = {name: state[name].contiguous() for name in names[number :: files.shards]}
        weight_map |= dict.fromkeys(part, file)
        if files.kind == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
    if files.shards > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def write_refused(case: Refused, folder: Path) -> None:
    """Write a folder that cannot be opened as it is."""
    method = case.files.get("quantization_config")
    if case.edits:
        llama = Layout(
            name="", task="causal-lm", family="llama", saved="LlamaForCausalLM", edits=case.edits
        )
        write_layout(llama, folder)
        config = folder / "config.json"
        if method is None:
            config.unlink()
        else:
            changed = {
                **json.loads(config.read_text()),
                "quantization_config": {"quant_method": method},
            }
            config.write_text(json.dumps(changed))
    for name, text in case.files.items():
        file = folder / name
        if name == "quantization_config" or file.exists():
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
