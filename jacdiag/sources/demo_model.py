"""The model of `jacdiag demo`: a small GPT, drawn on the spot."""

from __future__ import annotations

from jacdiag.sources.gpt import GPT, build

DEMO_SOURCE = "jacdiag.sources.demo_model:build_demo_model"


def build_demo_model() -> GPT:
    """Build a GPT of 4 layers and width 112, whose embedding is too small.

    Its init is the paper's "vanilla": matrices with s = √(2/(5d)), the output matrices scaled down
    with depth, the embedding left at s.

    Returns:
        The model, randomly initialised from torch's global generator.
    """
    return build("vanilla", n_layer=4, n_head=7, n_embd=112, vocab_size=256, block_size=64)
