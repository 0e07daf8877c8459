"""What `jacdiag explain JD2xx` teaches."""

from __future__ import annotations

from jacdiag.rules.texts import Text

PINNED = Text(
    summary="a weight departs from the init contract that the user pinned",
    what="""\
For each role (embedding, positions, W_Q, W_K, W_V, W_O, W_1, W_gate, W_2, router, head, norm_gain, bias, or "matrix"
for every matrix of a sub-layer) or name pattern of the contract, the std of every weight of it must lie within the
sampling interval of its size: chi-square for a normal, by its known kurtosis for the other families, at a chance of a
false alarm of 1e-6 per weight. Gains and biases must have the value itself.

The contract is left out for weights that are known to be trained: by --state trained, or by a step or an optimizer
state in their file. Where the state is a guess, from the name of the file or from the weights, it is judged.""",
    why="""\
A refactor that drops an exemption or a factor changes no test and no shape. The contract is the one place that says
what was meant.""",
    example="""\
    [tool.jacdiag.contract]
    matrix = "0.02"
    W_O = "0.02/sqrt(2*N)"
    W_2 = "0.02/sqrt(2*N)"
    embedding = 1
    norm_gain = 1""",
    remedy="""\
Restore the initialisation, or change the contract together with it. Formulas may use N (layers), d (width), V, fan_in,
fan_out, l (the layer, from 0), H (heads), d_head, initializer_range, initializer_factor; + - * / ^, sqrt, log, exp,
min, max.""",
)

PUBLISHED = Text(
    summary="a weight departs from the published init of its model family",
    what="""\
The model type of a Hugging Face config is looked up; for a family whose init is known, each weight's std is compared
with the published formula, within the sampling interval of its size.""",
    why="""\
Frameworks have lost their own init for releases: GPT-2 without its depth-scaled residual projections, an embedding
exemption dropped in a refactor, 0.4 where sqrt(0.4) was meant.""",
    example="""\
    model_type gpt2, initializer_range 0.02: mlp.c_fc of std 0.03 fires""",
    remedy="""\
Use the family's own init; if the change is meant, pin a contract ([tool.jacdiag.contract]) and ignore JD202.""",
)

DEPTH = Text(
    summary="scaling with depth is missing, applied twice, or on the wrong matrix",
    what="""\
W_O and W_2 write to the shortcut; many schemes divide their std by √(2N), N the number of layers, or by √(2(l + 1)) at
layer l. Where the family or the rest of the model says so, a weight that is off by just that factor is named.""",
    why="""\
Each of 2N sub-layers adds its output to the shortcut. Without the factor the variance grows with depth and the
sub-layers are not small (Eq. 15, 18); applied twice they hardly contribute.""",
    example="""\
    transformer.h.*.mlp.c_proj (12 of 12): std 0.0200, expected 0.02/sqrt(2*N) = 0.00408""",
    remedy="""\
Divide the std of W_O and W_2, and of no other matrix, by √(2N), once. A loop over names misses matrices that were
renamed.""",
)

CONSISTENT = Text(
    summary="a weight differs from the scheme that the rest of the model follows",
    what="""\
Of the published schemes (GPT-2, small init, GPT-NeoX, GPT-J, TinyLlama, Xavier, DS-Init, Kaiming, PyTorch's default,
DeepNorm, T-Fixup, muP, T5, torchtitan, OLMo, CLIP, orthogonal, plain) the one is found that leaves the fewest mistakes
to explain, with the model's own base std where that is free. A scheme states one formula for each role. Each matrix of
an attention or FFN that does not agree is reported. In a fused matrix queries, keys and values are judged one by one
where the scheme treats them differently.

Two mistakes of an entire model are known. Either every matrix has the std that Xavier, Kaiming, LeCun or PyTorch's
default gives with fan_in and fan_out exchanged, or the variance in place of the std, in at least two different values.

Four more signs need no scheme. A matrix, embedding or head of one value other than zero. Numbers that lie more than 20
times the spread of the rest away from it. A matrix with a std above 1. An untied head of N(0, 1) whose logits have a
std above 5. A head is also reported if it alone keeps the default of nn.Linear.

Not reported are output matrices (W_O, W_2) that are zero in all layers alike, nor matrices that start at zero next to
another of their role (adaLN-zero). Embedding, positions and head are judged only where one of them agrees with the
scheme; nn.Embedding's N(0, 1), positions of zero or 0.02 and a head of zero are right with any scheme. A matrix inside
a recurrent or convolutional mixer, a depthwise kernel and an adapter are compared with the other layers only (JD205).
A model that follows no scheme is judged by the four signs only.""",
    why="""\
A matrix that a new module brought along, with the default of its library, is the usual way for an init to break.""",
    example="""\
    every matrix N(0, 0.02), a new gate left at PyTorch's default""",
    remedy="""\
Initialise it as the rest, or pin a contract that says what is meant. Draw truncated normals in float32.""",
)

LAYERS = Text(
    summary="some layers are initialised differently from the others",
    what="""\
Weights of one name over the layers must agree with the scheme at every layer; where no scheme is known they must lie on
one smooth course over depth, constant or a power of l + 1.""",
    why="""\
An off-by-one in a loop over layers, or one layer that was built elsewhere.""",
    example="""\
    W_O divided by √(2N) in layers 0 to 10 of 12""",
    remedy="""\
Initialise every layer by the same code.""",
)

TIED = Text(
    summary=(
        "an embedding that was scaled up in its weights is tied to the head: logits are far "
        "too large"
    ),
    what="""\
Where the head reads the embedding's weights, the std of the logits at init is taken from the model's own output, else
from the std of the embedding times √d.""",
    why="""\
An embedding of std 1 is what a large shortcut wants (JD102), but as the head it makes logits of std √d: the first loss
is ln V plus half their variance.""",
    example="""\
    nn.init.normal_(wte.weight, std=1.0); lm_head.weight = wte.weight""",
    remedy="""\
Multiply by √d in the forward (scaled-embed), or untie the head.""",
)

DECAYED = Text(
    summary="the embedding, norm gains or biases are in a parameter group with weight decay",
    what="""\
Given an optimizer or its parameter groups, every parameter is looked up. Biases are an info.""",
    why="""\
Weight decay shrinks the embedding, and with it the shortcut of the first layer (JD102); it pulls gains from 1 to 0.""",
    example="""\
    torch.optim.AdamW(model.parameters(), weight_decay=0.1)""",
    remedy="""\
A group with weight_decay=0 for embeddings, gains and biases.""",
)
