"""A small imitation of ProteinMPNN: message passing with a node stream and an edge stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def gather_nodes(nodes, idx):
    flat = idx.reshape(idx.shape[0], -1, 1).expand(-1, -1, nodes.size(2))
    return torch.gather(nodes, 1, flat).view(*idx.shape[:3], -1)


def cat_neighbors(nodes, edges, idx):
    return torch.cat([edges, gather_nodes(nodes, idx)], -1)


class FF(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.W_in = nn.Linear(d, 4 * d)
        self.W_out = nn.Linear(4 * d, d)

    def forward(self, x):
        return self.W_out(F.gelu(self.W_in(x)))


class Enc(nn.Module):
    def __init__(self, d, n_in, scale=30):
        super().__init__()
        self.scale = scale
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.dropout1, self.dropout2, self.dropout3 = (
            nn.Dropout(0.1),
            nn.Dropout(0.1),
            nn.Dropout(0.1),
        )
        self.W1, self.W2, self.W3 = nn.Linear(d + n_in, d), nn.Linear(d, d), nn.Linear(d, d)
        self.W11, self.W12, self.W13 = nn.Linear(d + n_in, d), nn.Linear(d, d), nn.Linear(d, d)
        self.dense = FF(d)

    def forward(self, h_V, h_E, idx, mask_V, mask_attend):
        h_EV = cat_neighbors(h_V, h_E, idx)
        h_EV = torch.cat([h_V.unsqueeze(-2).expand(-1, -1, h_EV.size(-2), -1), h_EV], -1)
        m = self.W3(F.gelu(self.W2(F.gelu(self.W1(h_EV)))))
        m = mask_attend.unsqueeze(-1) * m
        h_V = self.norm1(h_V + self.dropout1(m.sum(-2) / self.scale))
        h_V = self.norm2(h_V + self.dropout2(self.dense(h_V)))
        h_V = mask_V.unsqueeze(-1) * h_V
        h_EV = cat_neighbors(h_V, h_E, idx)
        h_EV = torch.cat([h_V.unsqueeze(-2).expand(-1, -1, h_EV.size(-2), -1), h_EV], -1)
        m = self.W13(F.gelu(self.W12(F.gelu(self.W11(h_EV)))))
        h_E = self.norm3(h_E + self.dropout3(m))
        return h_V, h_E


class Dec(nn.Module):
    def __init__(self, d, n_in, scale=30):
        super().__init__()
        self.scale = scale
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.dropout1, self.dropout2 = nn.Dropout(0.1), nn.Dropout(0.1)
        self.W1, self.W2, self.W3 = nn.Linear(d + n_in, d), nn.Linear(d, d), nn.Linear(d, d)
        self.dense = FF(d)

    def forward(self, h_V, h_E, mask_V):
        h_EV = torch.cat([h_V.unsqueeze(-2).expand(-1, -1, h_E.size(-2), -1), h_E], -1)
        m = self.W3(F.gelu(self.W2(F.gelu(self.W1(h_EV)))))
        h_V = self.norm1(h_V + self.dropout1(m.sum(-2) / self.scale))
        h_V = self.norm2(h_V + self.dropout2(self.dense(h_V)))
        return mask_V.unsqueeze(-1) * h_V


class MPNN(nn.Module):
    def __init__(self, d=16, k=5, layers=3, vocab=21):
        super().__init__()
        self.k = k
        self.edge_embedding = nn.Linear(16, d, bias=False)
        self.norm_edges = nn.LayerNorm(d)
        self.W_e = nn.Linear(d, d)
        self.W_s = nn.Embedding(vocab, d)
        self.encoder_layers = nn.ModuleList([Enc(d, 2 * d) for _ in range(layers)])
        self.decoder_layers = nn.ModuleList([Dec(d, 3 * d) for _ in range(layers)])
        self.W_out = nn.Linear(d, vocab)

    def forward(self, X, S):
        D = torch.sqrt(((X[:, None] - X[:, :, None]) ** 2).sum(-1) + 1e-6)
        dist, idx = torch.topk(D, self.k, dim=-1, largest=False)
        mu = torch.linspace(2.0, 22.0, 16)
        E = self.norm_edges(
            self.edge_embedding(torch.exp(-(((dist.unsqueeze(-1) - mu) / 1.25) ** 2)))
        )
        h_V = torch.zeros(E.shape[0], E.shape[1], E.shape[-1])
        h_E = self.W_e(E)
        mask = torch.ones(X.shape[:2])
        mask_attend = gather_nodes(mask.unsqueeze(-1), idx).squeeze(-1)
        for l in self.encoder_layers:
            h_V, h_E = l(h_V, h_E, idx, mask, mask_attend)
        h_S = self.W_s(S)
        h_ES = cat_neighbors(h_S, h_E, idx)
        h_EX = cat_neighbors(torch.zeros_like(h_S), h_E, idx)
        h_EXV = cat_neighbors(h_V, h_EX, idx)
        order = torch.arange(X.shape[1])
        bw = (idx < order[None, :, None]).float().unsqueeze(-1)
        fwd = (1 - bw) * h_EXV
        for l in self.decoder_layers:
            h_ESV = cat_neighbors(h_V, h_ES, idx)
            h_V = l(h_V, bw * h_ESV + fwd, mask)
        return F.log_softmax(self.W_out(h_V), -1)
