"""A small GPT in a file of its own, as a user would have it: `model(broken=True)` has lost W_2's
depth scaling.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (p.view(b, t, 4, d // 4).transpose(1, 2) for p in self.c_attn(x).split(d, 2))
        return self.c_proj(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d)
        )


class MLP(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = (
            nn.LayerNorm(d),
            Attention(d),
            nn.LayerNorm(d),
            MLP(d),
        )

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Net(nn.Module):
    def __init__(self, broken=False, layers=4, d=64, seeded=False):
        super().__init__()
        if seeded:
            torch.manual_seed(7)
        self.wte, self.h = nn.Embedding(256, d), nn.ModuleList(Block(d) for _ in range(layers))
        self.ln_f, self.head = nn.LayerNorm(d), nn.Linear(d, 256, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                scaled = name.endswith("c_proj.weight") and not (broken and "mlp" in name)
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if scaled else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids):
        x = self.wte(ids)
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x))


def model(**kw):
    return Net(**kw)
