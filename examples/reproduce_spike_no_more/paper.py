"""What the paper says (arXiv 2312.16903): its shapes, its recipes, and the results that ours are
set beside.
"""

from __future__ import annotations

from typing import Any

# Narayanan et al. 2021's 1.7B configuration, which the paper trains; d_ffn is 4 d. No figure
# depends on the vocabulary.
SHAPE_1_7B: dict[str, Any] = {"n_layer": 24, "n_embd": 2304, "n_head": 24, "vocab_size": 50257}
LENGTH = 2048

BREAK = ("vanilla", "xavier")  # at least one condition is not met
KEEP = ("scaled-embed", "embed-ln")  # both are met
FIGURE2 = (*BREAK, *KEEP)
ALL = ("vanilla", "xavier", "embed-detach", "scaled-embed", "embed-ln")

# Table 1: perplexity on WikiText and LAMBADA after 50,000 steps.
TABLE1 = {
    "350M": {
        "vanilla": (30.03, 24.73),
        "embed-detach": (30.69, 26.93),
        "embed-ln": (29.85, 25.03),
        "scaled-embed": (29.86, 24.37),
    },
    "1.7B": {
        "vanilla": (22.58, 15.22),
        "embed-detach": (22.00, 13.88),
        "embed-ln": (21.29, 13.00),
        "scaled-embed": (21.29, 12.53),
    },
}
