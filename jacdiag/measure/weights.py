"""What weights say without a forward: std and norm of each matrix, the paper's closed forms, the weights-only tier."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jacdiag.errors import UsageError
from jacdiag.measure.by_name import contract_by_name
from jacdiag.measure.draws import std_of
from jacdiag.measure.figures import spread_of
from jacdiag.measure.finite import non_finite_weights
from jacdiag.measure.state import detect_state
from jacdiag.report.schema import Kind, ModelRecord, Report, Spread, SublayerRecord, WeightStats
from jacdiag.sources import Source, gpt
from jacdiag.spectra import DenseOperator, top_singular
from jacdiag.trace.tensors import is_finite

_NORM_WIDTH = 1e-3


def bound_ffn(s1: float, s2: float, sigma: float, d: int, d_ffn: int) -> float:
    """Eq. 15: |dy/dx'| <= 1 + s1 s2 / sigma C_ffn, C_ffn = (sqrt(d) + sqrt(d_ffn))^2.

    Args:
        s1, s2: std of W_1 and W_2.
        sigma: std of the shortcut.
        d, d_ffn: widths.

    Example:
        >>> round(bound_ffn(0.02, 0.02, 1.0, 1024, 4096), 3)
        4.686
    """
    return 1 + s1 * s2 / sigma * (math.sqrt(d) + math.sqrt(d_ffn)) ** 2


def bound_attention(s_o: float, sigma: float, d: int, jz: float) -> float:
    """Eq. 20: |dx'/dx| <= 1 + s_O / sigma C_attn, C_attn = 2 sqrt(d) |J^Z|.

    Args:
        s_o: std of W_O.
        sigma: std of the shortcut.
        d: width.
        jz: spectral norm of the Jacobian of the concatenated heads, measured.
    """
    return 1 + s_o / sigma * 2 * math.sqrt(d) * jz


def initial_bound(recipe: str, n_layer: int, n_embd: int) -> float:
    """Eq. 15 at the first FFN of a recipe of the paper, the attention's contribution to sigma_x' left out.

    Args:
        recipe: a name of `jacdiag.sources.gpt.RECIPES`.
        n_layer, n_embd: sizes; d_ffn is four times n_embd.

    Raises:
        UsageError: unknown recipe.

    Example:
        >>> round(initial_bound("vanilla", 24, 1024), 1), round(initial_bound("scaled-embed", 24, 1024), 2)
        (27.3, 1.82)
    """
    if recipe not in gpt.RECIPES:
        raise UsageError("unknown recipe", got=recipe, hint=f"one of {', '.join(gpt.RECIPES)}")
    config = gpt.config_of({"n_layer": n_layer, "n_embd": n_embd, "n_head": 1})
    std, change = gpt.RECIPES[recipe].std, gpt.RECIPES[recipe].change(config)

    def of(name: str, *shape: int) -> float:
        return std(name, torch.empty(shape, device="meta"), config)

    sigma = of("transformer.wte.weight", config.vocab_size, n_embd) * float(change.get("embed_scale", 1.0))
    if change.get("embed_norm"):
        sigma = 1.0
    w1 = of("transformer.h.0.mlp.c_fc.weight", 4 * n_embd, n_embd)
    w2 = of("transformer.h.0.mlp.c_proj.weight", n_embd, 4 * n_embd)
    return bound_ffn(w1, w2, sigma, n_embd, 4 * n_embd)


def weight_stats(
    name: str, tensor: Tensor, seed: int = 0, norm: bool = True, std: float | None = None
) -> WeightStats | None:
    """Std and spectral norm of a weight matrix, raised to float32 where it is stored lower.

    Args:
        name: for the record.
        tensor: (m, n), or (E, m, n) for stacked experts, whose largest norm is given. `norm` is the upper end of an
            interval of 0.1%, so that a product of norms bounds. Tensors of other shapes get a std only.
        norm: whether the spectral norm is wanted: it costs some hundred products with the matrix.
        std: where it is known already.

    Returns:
        None for a vector or a tensor without memory.
    """
    if tensor.dim() < 2 or tensor.is_meta or not tensor.is_floating_point():
        return None
    if std is None and tensor.numel():
        std = std_of(tensor)
    if not norm:
        return WeightStats(name, list(tensor.shape), std if std is not None and math.isfinite(std) else None)
    matrix = tensor.detach()
    if matrix.dim() > 3 or not matrix.numel() or not is_finite(matrix):
        return WeightStats(name, list(tensor.shape), std if std is not None and math.isfinite(std) else None)
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.float()
    generator = torch.Generator().manual_seed(seed)
    solution = top_singular(DenseOperator(matrix), tol=_NORM_WIDTH, max_products=400, generator=generator)
    return WeightStats(name, list(tensor.shape), std, float(solution.upper.max()))


# -- the weights-only tier --------------------------------------------------------------------------------------------
_LAYER = re.compile(r"^(.*?\.)?(\d+)\.(.+)$")
_ATTENTION = re.compile(r"attn|attention|(^|[._])(q|k|v|o|qkv|query|key|value)(_proj|_lin|_b_proj)?([._]|$)", re.I)
_OUTPUT = re.compile(r"(^|[._])(o_proj|out_proj|c_proj|wo|proj|dense|o|out_lin|output)([._]|$)", re.I)
_GATE = re.compile(r"gate|(^|[._])w1([._]|$)", re.I)
_EMBEDDING = re.compile(
    r"(^|[._])(wte|tok_embeddings|embed_tokens|embed_in|word_embeddings?|token_emb\w*|shared|embed\w*)([._]|$)", re.I
)
_POSITION = re.compile(r"wpe|pos(ition)?", re.I)
_HEAD = re.compile(r"(^|[._])(lm_head|output|head|embed_out)([._]|$)", re.I)
_LETTERS = (
    ("W_QKV", r"c_attn|qkv|query_key_value|in_proj|wqkv|attn_qkv"),
    ("W_Q", r"(^|[._])(w?q|q_proj|query)([._]|$)"),
    ("W_K", r"(^|[._])(w?k|k_proj|key)([._]|$)"),
    ("W_V", r"(^|[._])(w?v|v_proj|value)([._]|$)"),
)


@dataclass
class _Part:
    """The matrices of one sub-layer, found by name."""

    name: str
    layer: int
    kind: Kind
    weights: dict[str, WeightStats] = field(default_factory=dict)


def weights_report(source: Source) -> Report:
    """The report of a state dict without a model: roles by name and shape, std, norm, Eq. 15 at the embedding's sigma.

    Nothing is run, so that no Jacobian is measured, and placements are unknown. Eq. 15 is given at the first layer,
    where sigma_x' is that of the embedding's rows; a scale or a norm on the embedding is not visible in weights.
    """
    state = {name: t for name, t in source.state.items() if t.is_floating_point()}
    matrices = [name for name, t in state.items() if t.dim() >= 2]
    phase = "init" if source.step == 0 else detect_state(state, [n for n in matrices if _LAYER.match(n)])
    embedding = next(
        (n for n in matrices if _EMBEDDING.search(n) and not _POSITION.search(n) and not _LAYER.match(n)), None
    )
    rows = spread_of(state[embedding]) if embedding is not None else None
    parts = _parts({name: state[name] for name in matrices})
    records = [_record(k, part, phase, rows) for k, part in enumerate(parts)]
    outside = {n: s for n in matrices if not _LAYER.match(n) and (s := _plain(n, state[n])) is not None}
    covered = {s.parameter for part in parts for s in part.weights.values()} | set(outside)
    left = [name for name in state if name not in covered and state[name].dim() >= 2]
    broken = non_finite_weights(state)
    notes = [*([f"weights only: {source.why_weights}"] if source.why_weights else []), *source.notes]
    return Report(
        source=source.info,
        tier="weights",
        state=phase,
        probe=None,
        model=ModelRecord(
            name="",
            parameters=sum(t.numel() for t in state.values()),
            layers=len({part.layer for part in parts}),
            width=int(state[embedding].shape[1]) if embedding else None,
            covered_parameters=sum(t.numel() for n, t in state.items() if n in covered or t.dim() < 2),
            uncovered=left,
            uncovered_reasons=dict.fromkeys(left, "no role could be told from its name and shape"),
            weights=outside,
        ),
        sublayers=records,
        settings={"checks": {"non_finite": broken.names}},
        notes=[*notes, *broken.notes],
        contract=contract_by_name(
            state, len({part.layer for part in parts}), int(state[embedding].shape[1]) if embedding else None
        ),
    )


def _plain(name: str, tensor: Tensor) -> WeightStats | None:
    """An embedding or a head: the std only; the norm of a table of 50,000 rows says nothing here."""
    kind = "embedding" if _EMBEDDING.search(name) or _POSITION.search(name) else "head" if _HEAD.search(name) else ""
    return WeightStats(name, list(tensor.shape), float(tensor.double().std(correction=0))) if kind else None


def _parts(matrices: Mapping[str, Tensor]) -> list[_Part]:
    """Groups the matrices of each layer into attention and FFN."""
    found: dict[tuple[str, str], _Part] = {}
    for name, tensor in matrices.items():
        match = _LAYER.match(name)
        if match is None or tensor.dim() < 2 or min(tensor.shape[-2:]) < 2:
            continue
        stem, layer, inner = match[1] or "", int(match[2]), match[3]
        attention = _ATTENTION.search(inner) is not None
        first = inner.split(".")[0] if "." in inner.removesuffix(".weight") else ("attn" if attention else "mlp")
        kind: Kind = "attention" if attention else "moe" if "expert" in inner else "mlp"
        part = found.setdefault((f"{stem}{layer}", kind), _Part(f"{stem}{layer}.{first}", layer, kind))
        stats = weight_stats(name, tensor)
        if stats is not None:
            part.weights[_role(kind, inner, tensor, part)] = stats
    return sorted(found.values(), key=lambda p: p.layer)


def _role(kind: str, inner: str, tensor: Tensor, part: _Part) -> str:
    if kind == "attention":
        role = next((r for r, pattern in _LETTERS if re.search(pattern, inner)), "W_O" if _OUTPUT.search(inner) else "")
    else:
        down = _OUTPUT.search(inner) or re.search(r"down|fc2|fc_out|w2|dense_4h_to_h|wo", inner)
        role = "W_2" if down else "W_gate" if _GATE.search(inner) else "W_1"
    return role if role and role not in part.weights else inner


def _record(index: int, part: _Part, phase: str, rows: Spread | None) -> SublayerRecord:
    why = "weights only: no model was run"
    fields = (
        "shortcut_std",
        "branch_norm",
        "residual_norm",
        "core_norm",
        "norm_gain",
        "placement",
        "bound",
        "tightness",
    )
    notes = dict.fromkeys(fields, why)
    bound = None
    if part.layer == 0 and part.kind == "mlp" and rows is not None:
        bound, notes["bound"] = _first_bound(part, phase, rows)
        notes["shortcut_std"] = (
            "that of the embedding's rows; a scale or a norm on the embedding is not visible in weights"
        )
    elif part.kind == "mlp":
        notes["bound"] = "Eq. 15 needs sigma_x', which only the first layer's embedding gives"
    return SublayerRecord(
        name=part.name,
        index=index,
        depth=part.layer,
        kind=part.kind,
        placement=None,
        shortcut_std=rows if part.layer == 0 else None,
        shortcut_gain=None,
        bound=bound,
        weights=part.weights,
        parameters=[s.parameter for s in part.weights.values()],
        notes={key: note for key, note in notes.items() if note},
    )


def _first_bound(part: _Part, phase: str, rows: Spread) -> tuple[float | None, str]:
    w1, w2 = part.weights.get("W_1"), part.weights.get("W_2")
    if phase != "init":
        return None, "Eq. 15 describes an initial state; these weights are trained"
    if w1 is None or w2 is None or w1.std is None or w2.std is None or len(part.weights) != 2 or not rows.median > 0:
        return None, "Eq. 15 is for an FFN of two matrices"
    return bound_ffn(w1.std, w2.std, rows.median, min(w1.shape), max(w1.shape)), ""
