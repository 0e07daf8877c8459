"""The small GPT of `net.py` with the norm after the sum."""

import net
from torch import nn


class Block(net.Block):
    def forward(self, x):
        x = self.ln_1(x + self.attn(x))
        return self.ln_2(x + self.mlp(x))


class Net(net.Net):
    def __init__(self, layers=4, d=64):
        super().__init__(layers=layers, d=d)
        blocks = nn.ModuleList(Block(d) for _ in range(layers))
        blocks.load_state_dict(self.h.state_dict())
        self.h = blocks


def model(**kw):
    return Net(**kw)
