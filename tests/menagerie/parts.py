"""Modules that the specimens share, and seeded weights for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

D, T, B, V, LAYERS = 8, 5, 2, 11, 2


def seeded(make: Callable[[], nn.Module], seed: int = 0, scale: float = 1.0) -> nn.Module:
    """Builds a module with weights from a generator of its own: gains about 1, biases about 0."""
    with torch.random.fork_rng(devices=[]):
        model = make()
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    seen: set[int] = set()
    for module in model.modules():
        gains = type(module).__name__.endswith(("Norm", "Norm2d", "Norm1d", "RMS"))
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            values = normal(parameter)
            if parameter.dim() >= 2:
                fan_in = 1 if isinstance(module, nn.Embedding) else parameter[0].numel()
                values = scale * values / fan_in**0.5
            else:
                values = 1 + 0.3 * values if gains and name == "weight" else 0.2 * values
            parameter.data.copy_(values)
        for name, buffer in module.named_buffers(recurse=False):
            if name == "running_mean":
                buffer.copy_(0.3 * normal(buffer))
            elif name == "running_var":
                buffer.copy_(0.5 + normal(buffer).square())
    return model.eval()


def tokens(batch: int = B, length: int = T, vocabulary: int = V, seed: int = 1) -> Tensor:
    """Token ids (B, T)."""
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def floats(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class HandRMS(nn.Module):
    """RMSNorm as transformers writes it: in float32 whatever the input is, the gain applied
    last.
    """

    def __init__(self, d: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(dtype)


class HandLayerNorm(nn.Module):
    """LayerNorm from mean, var and sqrt."""

    centred = True

    def __init__(self, d: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = (
            nn.Parameter(torch.ones(d)),
            nn.Parameter(torch.zeros(d)),
            eps,
        )

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=-1, keepdim=True)
        var = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
        return (x - mean) / torch.sqrt(var + self.eps) * self.weight + self.bias


class AnnotatedLayerNorm(nn.Module):
    """LayerNorm as in the Annotated Transformer: the sample's std plus eps, and the gain before the
    division.
    """

    centred = True

    def __init__(self, d: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = (
            nn.Parameter(torch.ones(d)),
            nn.Parameter(torch.zeros(d)),
            eps,
        )

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        std = x.std(-1, keepdim=True)
        return self.weight * (x - mean) / (std + self.eps) + self.bias

    def factor(self, x: Tensor) -> Tensor:
        """What the centred x is multiplied by, one number per token."""
        return 1 / (x.std(-1) + self.eps)


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def rotary(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q, k (B, H, T, d_h)."""
    width, length = q.shape[-1], q.shape[-2]
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=q.dtype) / width)
    angle = torch.arange(length, dtype=q.dtype)[:, None] * frequency
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class Attention(nn.Module):
    """Multi-head attention with separate projections; grouped keys and rotary embedding on
    request.
    """

    def __init__(
        self,
        d: int = D,
        heads: int = 2,
        groups: int | None = None,
        *,
        causal: bool = True,
        turns: bool = False,
        by_hand: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.groups, self.causal, self.turns, self.by_hand = (
            heads,
            groups or heads,
            causal,
            turns,
            by_hand,
        )
        width = d // heads
        self.q, self.o = nn.Linear(d, d), nn.Linear(d, d)
        self.k, self.v = nn.Linear(d, self.groups * width), nn.Linear(d, self.groups * width)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        read = x if memory is None else memory
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.k(read).unflatten(-1, (self.groups, -1)).transpose(1, 2)
        v = self.v(read).unflatten(-1, (self.groups, -1)).transpose(1, 2)
        if self.turns:
            q, k = rotary(q, k)
        if self.groups != self.heads:
            k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))
        if self.by_hand:
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            if self.causal:
                mask = torch.full(scores.shape[-2:], float("-inf"), dtype=scores.dtype).triu(1)
                scores = scores + mask
            z = torch.softmax(scores, dim=-1) @ v
        else:
            z = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal and memory is None)
        return self.o(z.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two matrices and a GELU."""

    def __init__(
        self, d: int = D, hidden: int = 2 * D, act: Callable[[Tensor], Tensor] = F.gelu
    ) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(d, hidden), nn.Linear(hidden, d), act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class GatedMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, d: int = D, hidden: int = 12) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(d, hidden, bias=False), nn.Linear(d, hidden, bias=False)
        self.down = nn.Linear(hidden, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MoE(nn.Module):
    """Top-k routing by a loop over experts with index_add; the last experts never get a token."""

    def __init__(
        self, d: int = D, experts: int = 5, top: int = 2, idle: int = 1, *, shared: bool = False
    ) -> None:
        super().__init__()
        self.router, self.top, self.idle = nn.Linear(d, experts), top, idle
        self.experts = nn.ModuleList(MLP(d, d) for _ in range(experts))
        self.shared = MLP(d, d) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.weights(flat).topk(self.top, dim=-1)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            if token.numel():
                out.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        out = out.view_as(x)
        return out if self.shared is None else out + self.shared(x)

    def weights(self, flat: Tensor) -> Tensor:
        scores = self.router(flat)
        scores = scores - 1e4 * (torch.arange(scores.shape[-1]) >= scores.shape[-1] - self.idle).to(
            scores.dtype
        )
        return torch.softmax(scores, dim=-1)

    def truth(self, x: Tensor) -> Tensor:
        """Every expert on every token, unwanted ones times zero."""
        weights = self.weights(x)
        threshold = weights.topk(self.top, dim=-1).values[..., -1:]
        weights = weights * (weights >= threshold)
        out = sum(weights[..., k, None] * expert(x) for k, expert in enumerate(self.experts))
        return out if self.shared is None else out + self.shared(x)


class Decoder(nn.Module):
    """Embedding, blocks, final norm, head: tokens (B, T) -> logits (B, T, V)."""

    def __init__(
        self,
        block: Callable[[], nn.Module],
        norm: Callable[[int], nn.Module] | None = nn.LayerNorm,
        layers: int = LAYERS,
    ) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(V, D), nn.Embedding(16, D)
        self.blocks = nn.ModuleList(block() for _ in range(layers))
        self.final = nn.Identity() if norm is None else norm(D)
        self.head = nn.Linear(D, V, bias=False)

    def begin(self, ids: Tensor) -> Tensor:
        return self.embed(ids) + self.position(torch.arange(ids.shape[1]))

    def end(self, x: Tensor) -> Tensor:
        return self.head(self.final(x))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.begin(ids)
        for block in self.blocks:
            x = block(x)
        return self.end(x)
