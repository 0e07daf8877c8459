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


# Sums of ProteinMPNN in the order of computation. The first sum of the encoder is left out, since
# its shortcut is zero.
_ENCODER_STEPS = ("nodes", "dense", "edges")
_DECODER_STEPS = ("nodes", "dense")


def protein_mpnn(model: Any, run: Run, index: int) -> Branch:
    """Return a branch of ProteinMPNN: messages, feed-forward, or the update of the edges."""
    position = index + 1
    encoder_sums = len(_ENCODER_STEPS) * len(model.encoder_layers)
    if position < encoder_sums:
        layer = model.encoder_layers[position // 3]
        step = _ENCODER_STEPS[position % 3]
    else:
        layer = model.decoder_layers[(position - encoder_sums) // 2]
        step = _DECODER_STEPS[(position - encoder_sums) % 2]

    if step == "dense":
        return Branch(layer.dense, record_calls(layer.dense, run)[0].args[0])
    if position < encoder_sums:
        return _encoder_branch(layer, step, record_calls(layer, run)[0].args)

    # The decoder gathers the neighbours' states outside its layers.
    raise NotImplementedError("no reference is written for the messages of the decoder")


def _encoder_branch(layer: Any, step: str, args: tuple[Any, ...]) -> Branch:
    """Return a branch of an encoder layer: messages to the nodes, or the update of the edges."""
    nodes, edges, neighbours = args[:3]

    def pairs_of(x: Tensor, features: Tensor) -> Tensor:
        center = x.unsqueeze(-2).expand(-1, -1, features.shape[-2], -1)
        around = x[0][neighbours[0]].unsqueeze(0)
        return torch.cat([center, features, around], dim=-1)

    def messages(x: Tensor) -> Tensor:
        hidden = layer.act(layer.W2(layer.act(layer.W1(pairs_of(x, edges)))))
        return layer.W3(hidden).sum(-2) / layer.scale

    if step == "nodes":
        return Branch(messages, nodes)

    after = layer.norm1(nodes + messages(nodes))
    after = layer.norm2(after + layer.dense(after)).detach()

    def update(x: Tensor) -> Tensor:
        hidden = layer.act(layer.W12(layer.act(layer.W11(pairs_of(after, x)))))
        return layer.W13(hidden)

    return Branch(update, edges)


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
