"""Residual branches written by hand for each architecture, in float64.

Nothing of jacdiag is imported. A branch is a function of its sub-layer's shortcut, built from the
model's own modules. Its input is what a forward hook sees in a full forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Branch:
    """A residual branch and the point at which its Jacobian is taken.

    Attributes:
        function: maps the shortcut to what is added to it.
        point: the shortcut.
    """

    function: Callable[[Tensor], Tensor]
    point: Tensor


@dataclass(frozen=True)
class Call:
    """Arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Run = Callable[[], Any]
Builder = Callable[[Any, Run, int], Branch]


def record_calls(module: nn.Module, run: Run) -> list[Call]:
    """Return the arguments of every call of a module during one forward pass of the model."""
    calls: list[Call] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(args, kwargs))

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            run()
    finally:
        handle.remove()
    return calls


def bert(model: Any, run: Run, index: int) -> Branch:
    """Return a branch of BERT: attention at even positions, feed-forward at odd ones."""
    layer = model.encoder.layer[index // 2]
    if index % 2 == 0:
        point = record_calls(layer.attention, run)[0].args[0]
        return Branch(lambda x: layer.attention.output.dense(layer.attention.self(x)[0]), point)
    point = record_calls(layer.intermediate, run)[0].args[0]
    return Branch(lambda x: layer.output.dense(layer.intermediate(x)), point)


def albert(model: Any, run: Run, index: int) -> Branch:
    """Return a branch of ALBERT, whose only layer is applied many times."""
    layer = model.encoder.albert_layer_groups[0].albert_layers[0]
    turn = index // 2
    if index % 2 == 0:
        point = record_calls(layer.attention, run)[turn].args[0]
        return Branch(
            lambda x: _output_of(layer.attention.dense, lambda: layer.attention(x)), point
        )
    point = record_calls(layer.ffn, run)[turn].args[0]
    return Branch(lambda x: layer.ffn_output(layer.activation(layer.ffn(x))), point)


def _output_of(module: nn.Module, run: Run) -> Tensor:
    """Return what a module inside a call returns."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        run()
    finally:
        handle.remove()
    return outputs[0]


def gpt2(model: Any, run: Run, index: int) -> Branch:
    """Return a branch of GPT-2, which normalises before its sub-layers."""
    block = model.h[index // 2]
    if index % 2 == 1:
        point = record_calls(block.ln_2, run)[0].args[0]
        return Branch(lambda x: block.mlp(block.ln_2(x)), point)
    point = record_calls(block.ln_1, run)[0].args[0]
    mask = record_calls(block.attn, run)[0].kwargs.get("attention_mask")
    return Branch(lambda x: block.attn(block.ln_1(x), attention_mask=mask)[0], point)


def fairseq_roberta(model: Any, run: Run, index: int) -> Branch:
    """Return a branch of fairseq's RoBERTa, which normalises after its sub-layers."""
    layer = model.decoder.sentence_encoder.layers[index // 2]
    if index % 2 == 0:
        return Branch(layer.self_attn, record_calls(layer.self_attn, run)[0].args[0])
    return Branch(layer.feed_forward, record_calls(layer.fc1, run)[0].args[0])


def torch_encoder(model: Any, run: Run, index: int) -> Branch:
    """Return a branch of torch.nn.TransformerEncoder, which normalises after its sub-layers."""
    stack = model._self_attention_stack._standard_stack
    layer = stack._self_attention_stack.layers[index // 2]
    # The layer's fast path calls no modules. It is off while gradients are on.
    entry = _inputs_with_gradients(layer, run)
    if index % 2 == 0:
        return Branch(lambda x: _self_attention(layer.self_attn, x), entry)

    middle = layer.norm1(entry + _self_attention(layer.self_attn, entry)).detach()
    return Branch(lambda x: layer.linear2(layer.activation(layer.linear1(x))), middle)


def _inputs_with_gradients(module: nn.Module, run: Run) -> Tensor:
    """Return the input of a module in a forward pass that records gradients."""
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, args: inputs.append(args[0].detach()))
    try:
        run()
    finally:
        handle.remove()
    return inputs[0]


def _self_attention(attention: nn.MultiheadAttention, hidden: Tensor) -> Tensor:
    """Return the output of torch's attention from its formula."""
    width, heads = hidden.shape[-1], attention.num_heads
    packed = hidden @ attention.in_proj_weight.T + attention.in_proj_bias
    split = (*hidden.shape[:2], heads, width // heads)
    parts = packed.split(width, dim=-1)
    query, key, value = (part.reshape(split).transpose(1, 2) for part in parts)

    scores = query @ key.transpose(-2, -1) / (width // heads) ** 0.5
    mixed = scores.softmax(dim=-1) @ value
    return attention.out_proj(mixed.transpose(1, 2).flatten(2))


# Sums of ProteinMPNN in the order of the list. The first messages are left out, since
# their shortcut is zero.
_ENCODER_STEPS = ("messages", "edges", "dense")
_DECODER_STEPS = ("messages", "dense")


def protein_mpnn(model: Any, run: Run, index: int) -> Branch:
    """Return a branch of ProteinMPNN: messages, feed-forward, or the update of the edges.

    A branch is differentiated along all paths from its shortcut. Messages read edges that the last
    layer updated from the same nodes, and edges are updated from nodes that read the same edges.
    """
    position = index + 1
    encoder_sums = len(_ENCODER_STEPS) * len(model.encoder_layers)
    if position >= encoder_sums:
        depth, step = divmod(position - encoder_sums, len(_DECODER_STEPS))
        if _DECODER_STEPS[step] != "dense":
            raise NotImplementedError("no reference is written for the messages of the decoder")
        dense = model.decoder_layers[depth].dense
        return Branch(dense, record_calls(dense, run)[0].args[0])

    depth, step = divmod(position, len(_ENCODER_STEPS))
    layer = model.encoder_layers[depth]
    if _ENCODER_STEPS[step] == "dense":
        return Branch(layer.dense, record_calls(layer.dense, run)[0].args[0])

    nodes, edges, neighbours = record_calls(layer, run)[0].args[:3]
    if _ENCODER_STEPS[step] == "edges":
        return Branch(lambda x: _updated_by(layer, nodes, x, neighbours), edges)

    last = model.encoder_layers[depth - 1]
    edges_before = record_calls(last, run)[0].args[1]

    def messages(x: Tensor) -> Tensor:
        updated = last.norm3(edges_before + _edge_update(last, x, edges_before, neighbours))
        return _messages(layer, x, updated, neighbours)

    return Branch(messages, nodes)


def _updated_by(layer: Any, nodes: Tensor, edges: Tensor, neighbours: Tensor) -> Tensor:
    """Return the update of the edges as a function of the edges, through the nodes too."""
    nodes = layer.norm1(nodes + _messages(layer, nodes, edges, neighbours))
    nodes = layer.norm2(nodes + layer.dense(nodes))
    return _edge_update(layer, nodes, edges, neighbours)


def _messages(layer: Any, nodes: Tensor, edges: Tensor, neighbours: Tensor) -> Tensor:
    """Return the mean of what the neighbours send."""
    hidden = layer.act(layer.W1(_pairs(nodes, edges, neighbours)))
    return layer.W3(layer.act(layer.W2(hidden))).sum(-2) / layer.scale


def _edge_update(layer: Any, nodes: Tensor, edges: Tensor, neighbours: Tensor) -> Tensor:
    """Return what is added to the edges."""
    hidden = layer.act(layer.W11(_pairs(nodes, edges, neighbours)))
    return layer.W13(layer.act(layer.W12(hidden)))


def _pairs(nodes: Tensor, edges: Tensor, neighbours: Tensor) -> Tensor:
    """Return node, edge and neighbour for every edge."""
    center = nodes.unsqueeze(-2).expand(-1, -1, edges.shape[-2], -1)
    around = nodes[0][neighbours[0]].unsqueeze(0)
    return torch.cat([center, edges, around], dim=-1)


def soltrannet(model: Any, run: Run, index: int) -> Branch:
    """Return a branch of SolTranNet, which normalises before its sub-layers."""
    layer = model.encoder.layers[index // 2]
    connection = layer.sublayer[index % 2]
    point = record_calls(connection.norm, run)[0].args[0]
    if index % 2 == 1:
        return Branch(lambda x: layer.feed_forward(connection.norm(x)), point)
    mask, bonds, edges = record_calls(layer, run)[0].args[1:]

    def attention(x: Tensor) -> Tensor:
        hidden = connection.norm(x)
        return layer.self_attn(hidden, hidden, hidden, bonds, edges, mask)

    return Branch(attention, point)


# Sums of a layer of Transkun in the order of computation: over frequencies, then over frames.
_TRANSKUN_BLOCKS = ("mhaBlockF", "fnnBlockF", "mhaBlockT", "fnnBlockT")


def transkun(model: Any, run: Run, index: int) -> Branch:
    """Return a branch of Transkun, whose keys and values come from the input of its layer."""
    layer = model.encoderLayers[index // 4]
    name = _TRANSKUN_BLOCKS[index % 4]
    block = getattr(layer, name)
    args = record_calls(block, run)[0].args
    if name == "mhaBlockF":
        # The input of the layer is the shortcut too, so keys and values vary with it.
        return Branch(lambda x: block.module(block.norm(x), x) * block.scale, args[0])
    if name == "mhaBlockT":
        return Branch(lambda x: block.module(block.norm(x), args[1]) * block.scale, args[0])
    return Branch(lambda x: block.module(block.norm(x)) * block.scale, args[0])


BUILDERS: dict[str, Builder] = {
    "albert": albert,
    "bert": bert,
    "fairseq_roberta": fairseq_roberta,
    "gpt2": gpt2,
    "protein_mpnn": protein_mpnn,
    "soltrannet": soltrannet,
    "torch_encoder": torch_encoder,
    "transkun": transkun,
}
