"""jacdiag's own figures of one untrained model, or of one that is too large to stand in memory, a
layer at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from jacdiag.measure.branch_norms import Effort
from jacdiag.measure.sublayer_norms import measure_group
from jacdiag.measure.weight_statistics import all_weight_stats
from jacdiag.records import SublayerRecord, WeightStats
from jacdiag.sources import gpt
from jacdiag.trace import sites

from .paper import BREAK

EFFORT = Effort(tol=0.1)


def sublayers(
    model: nn.Module, *inputs: Any, effort: Effort = EFFORT, weight_norms: bool = False
) -> list[SublayerRecord]:
    """The records of all sub-layers, as an audit gives them, without the figures of the network as
    a whole.

    Args:
        weight_norms: measure |W| of every matrix too, for `bound_norms`.
    """
    found = sites(model, *inputs)

    def figures(names: Sequence[str]) -> Mapping[str, WeightStats | None]:
        weights = {name: found.skeleton.params[name] for name in names}
        return all_weight_stats(weights, {}, norm=weight_norms)

    groups = found.by_shortcut()
    return [
        record
        for members in groups
        for record in measure_group(members, effort, None, "init", figures)
    ]


def layer_by_layer(
    recipe: str,
    config: gpt.GPTConfig,
    length: int,
    layers: Collection[int],
    seed: int,
    effort: Effort = EFFORT,
) -> Iterator[tuple[int, list[SublayerRecord]]]:
    """Measures chosen layers of an untrained GPT of which one block exists at a time; the stream
    runs through all.

    Only the embedding's rows that a sequence of `length` different tokens needs are drawn. The
    first layer gets the norms of its weights as well, where the recipe is one of the two that draw
    them differently.

    Yields:
        The layer's number from 0, and the records of its attention and its FFN.
    """
    made = gpt.RECIPES[recipe]
    config = replace(config, **made.change(config))
    x = _embedded(recipe, config, length, seed)
    for k in range(config.n_layer):
        block = _block(made.std, config, k, seed)
        if k in layers:
            yield k, sublayers(block, x, effort=effort, weight_norms=k == 0 and recipe in BREAK)
        with torch.no_grad():
            x = block(x)


def _embedded(recipe: str, config: gpt.GPTConfig, length: int, seed: int) -> Tensor:
    generator, std = torch.Generator().manual_seed(seed), gpt.RECIPES[recipe].std
    rows, places = torch.empty(length, config.n_embd), torch.empty(length, config.n_embd)
    rows.normal_(0.0, std("transformer.wte.weight", rows, config), generator=generator)
    places.normal_(0.0, std("transformer.wpe.weight", places, config), generator=generator)
    x = rows * config.embed_scale + places
    return (torch.nn.functional.layer_norm(x, x.shape[-1:]) if config.embed_norm else x)[None]


@torch.no_grad()
def _block(std: gpt.Std, config: gpt.GPTConfig, k: int, seed: int) -> gpt.Block:
    """One block with weights of its own seed, so that a layer is the same whichever others are
    measured.
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + k + 1)
    with torch.device("meta"):  # no draw of torch's own
        block = gpt.Block(config)
    block.to_empty(device="cpu")
    for name, weight in block.named_parameters(prefix=f"transformer.h.{k}"):
        if weight.dim() >= 2:
            weight.normal_(0.0, std(name, weight, config), generator=generator)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
    return block
