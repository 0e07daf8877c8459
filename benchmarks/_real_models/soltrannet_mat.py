"""SolTranNet from the classes of its package, probed with the graph of ethanol."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

CLASSES = "soltrannet/transformer.py"


def build() -> nn.Module:
    """Build the architecture with the defaults of the package.

    The file of the classes is imported by its path: the package itself imports RDKit.
    """
    entries = os.environ["PYTHONPATH"].split(os.pathsep)
    file = next(Path(entry) / CLASSES for entry in entries if (Path(entry) / CLASSES).is_file())
    spec = importlib.util.spec_from_file_location("soltrannet_transformer", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_model()


def inputs() -> dict[str, Any]:
    """Describe ethanol, C-C-O, after the dummy atom that the package puts first."""
    carbon, oxygen, neighbours, hydrogens, charge = 2, 4, 12, 18, 24
    atoms = torch.zeros(1, 4, 28)
    atoms[0, 0, 0] = 1.0
    ethanol = [(carbon, 1, 3), (carbon, 2, 2), (oxygen, 1, 1)]
    for row, (element, heavy, light) in enumerate(ethanol, start=1):
        atoms[0, row, [element, neighbours + heavy, hydrogens + light, charge]] = 1.0

    bonds = torch.zeros(1, 4, 4)
    bonds[0, 1:, 1:] = torch.eye(3)
    bonds[0, [1, 2, 2, 3], [2, 1, 3, 2]] = 1.0
    mask = torch.ones(1, 4, dtype=torch.bool)
    return {"src": atoms, "src_mask": mask, "adj_matrix": bonds, "edges_att": None}
