"""SCEPTR's BERT without its package, whose imports need a database of T-cell receptors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
FIRST_LETTER = 3  # after null, mask and cls
CLS = 2
CDR3B = 6  # index of the compartment


class OneHot(nn.Module):
    """Fixed table: a row of zeros for null, then the unit vectors."""

    def __init__(self, size: int) -> None:
        super().__init__()
        table = torch.cat([torch.zeros(1, size), torch.eye(size)])
        self.register_buffer("_token_embeddings", table)

    def forward(self, indices: Tensor) -> Tensor:
        return self._token_embeddings[indices]


class Embedder(nn.Module):
    """One-hot letter, relative position and one-hot compartment."""

    def __init__(self) -> None:
        super().__init__()
        self._token_embedding = OneHot(22)
        self._compartment_embedding = OneHot(6)

    def forward(self, tokens: Tensor) -> Tensor:
        position = (tokens[..., 1] - 1) / (tokens[..., 2] - 1)
        position = torch.where(position.isnan(), 0.5, position)
        position = torch.where(tokens[..., 1] == 0, 0.0, position)
        letter = self._token_embedding(tokens[..., 0])
        compartment = self._compartment_embedding(tokens[..., 3])
        return torch.cat([letter, position.unsqueeze(-1).to(letter.dtype), compartment], dim=-1)


class Builtins(nn.Module):
    """torch's own encoder, under the name that the package gives it."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            d_model=64, nhead=8, dim_feedforward=256, batch_first=True
        )
        self._self_attention_stack = nn.TransformerEncoder(layer, num_layers=3)

    def forward(self, hidden: Tensor) -> Tensor:
        return self._self_attention_stack(hidden)


class Stack(nn.Module):
    """Projection of the embeddings, then the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self._initial_projector = nn.Linear(29, 64, bias=False)
        self._standard_stack = Builtins()

    def forward(self, embeddings: Tensor) -> Tensor:
        return self._standard_stack(self._initial_projector(embeddings))


class Projector(nn.Module):
    """Head for masked letters."""

    def __init__(self) -> None:
        super().__init__()
        self.projector = nn.Linear(64, len(LETTERS))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.projector(hidden)


class Sceptr(nn.Module):
    """The network, with the parameter names of its checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self._token_embedder = Embedder()
        self._self_attention_stack = Stack()
        self._mlm_token_prediction_projector = Projector()

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self._self_attention_stack(self._token_embedder(tokens))
        return self._mlm_token_prediction_projector(hidden)


def build() -> nn.Module:
    """Build the architecture that the package's config.json describes."""
    return Sceptr()


def inputs() -> Tensor:
    """Tokenize the loop of one receptor: letter, position, length and compartment."""
    loop = "CASSLGQAYEQYF"
    rows = [[CLS, 0, 0, 0]]
    for place, letter in enumerate(loop, start=1):
        rows.append([FIRST_LETTER + LETTERS.index(letter), place, len(loop), CDR3B])
    return torch.tensor([rows])
