"""What `jacdiag explain CODE` teaches: for each rule what it measures, why it matters, an example,
a remedy.
"""

from __future__ import annotations

from typing import TypedDict


class Text(TypedDict):
    """The documentation of a rule. `summary` is one line."""

    summary: str
    what: str
    why: str
    example: str
    remedy: str


SMALL = Text(
    summary=(
        "small sub-layers: a branch behind its norm must have a small Jacobian, or gradients "
        "grow layer by layer"
    ),
    what="""\
core_norm is the spectral norm of d f / d z, z the normalised shortcut: what a pre-norm branch does to a
perturbation after its norm, its learned gain included. It falls like 1/√(2N) with depth N where W_O and W_2
are scaled by depth, so core_norm·√(2N) is compared; the thresholds were measured on the recipes of the
paper. The paper states this condition for pre-norm. It is not applicable to post-norm, sandwich, reordered and no
norm: there the branch norm (JD103) is looked at, and the out-norm gain is shown.""",
    why="""\
The gradient norm is bounded by a product over sub-layers (Eq. 7), whose factors are 1 + core_norm / sigma_x
(Eq. 10, 18; for an FFN 1 + s1 s2 C_ffn / sigma_x', C_ffn = (√d + √d_ffn)^2, Eq. 15). Sub-layers that are
not small make every factor large: the bound, and with it the gradient, can grow exponentially in depth. The
paper's vanilla init meets this condition, Xavier init does not.""",
    example="""\
    nn.init.xavier_normal_(mlp.c_fc.weight)                                                # fires
    nn.init.xavier_normal_(mlp.c_proj.weight)
    s = math.sqrt(2 / (5 * d))
    nn.init.normal_(mlp.c_fc.weight, std=s)                                                # clean
    nn.init.normal_(mlp.c_proj.weight, std=s / math.sqrt(2 * n_layer))""",
    remedy="""\
Initialise with N(0, s^2), s = √(2/(5d)), and divide the std of the two matrices that write to the shortcut
(W_O, W_2) by √(2N). On a trained model the split into core and norm is not identifiable; there this is an
observation.""",
)

LARGE = Text(
    summary=(
        "large shortcut: its std must be near 1, or every norm on it multiplies the gradient "
        "by 1/sigma"
    ),
    what="""\
norm_gain is 1/√(sigma_x^2 + eps), the gain of a branch's input norm without its learned gain, per token;
the 99th percentile over tokens is compared. At the first layer sigma_x is the std of the embedding. The paper
states this condition for pre-norm. In post-norm the norm reads x + f(x), in sandwich and reordered also the
branch's end: its 1/sigma is shown as out-norm gain. No cut-off is published for it, so the condition is not
applicable there, and no rule judges it.""",
    why="""\
The Jacobian of LayerNorm is (1/sigma_x)(I - z z^T / d) (Eq. 12, 14): its norm is about 1/sigma_x. With an
embedding of std 0.02 the first sub-layers multiply a perturbation by up to 50. "Spike No More" (arXiv
2312.16903) finds that the runs whose embedding has std near 1 (scaled-embed, embed-ln) do not spike where
vanilla and embed-detach do. It is a condition, not a fate: GPT-2's own init does not meet it, and that run
finished.""",
    example="""\
    nn.init.normal_(wte.weight, std=0.02); x = wte(idx)                       # fires
    x = wte(idx) * math.sqrt(d)      with std √(2/(5d)): sigma_x = 0.63          # clean
    x = nn.LayerNorm(d)(wte(idx))                 sigma_x = 1                    # clean""",
    remedy="""\
Multiply the embedding by √d (scaled-embed), or put a LayerNorm on it (embed-ln). If the head is tied to the
embedding, scale in the forward, not in the weights, so that the logits stay as they were; leave the
embedding out of weight decay.""",
)

AMPLIFICATION = Text(
    summary=(
        "a branch multiplies a perturbation of its shortcut by more than is usual for its placement"
    ),
    what="""\
branch_norm is the spectral norm of J = d f / d x, the Jacobian of the whole branch. Unlike its two factors
it is a property of the function: dividing a norm's gain by 10 and multiplying the next matrix by 10 changes
nothing. Each placement of the norm has thresholds of its own: pre-norm a warning, post, sandwich and reordered
an info at three times what a mainstream model has at init, no norm none. On a trained model they are shown as
observations.""",
    why="""\
dL/dx = (I + J)^T dL/dy (Eq. 8, 9, 16, 17): a branch norm far above 1 at many depths lets the gradient grow
by that factor at each. At the first layer only it is common, also in runs that finish; where it persists
over depth it is rarer.""",
    example="""\
A Llama-shaped SwiGLU with plain N(0, 0.02) and an embedding of std 0.02 has a branch norm of several
hundred at layer 0.""",
    remedy="""\
At init: see which factor is large, the sub-layer (JD101) or the shortcut (JD102), and change that one. On a
trained model: compare with an earlier checkpoint (jacdiag audit NOW --against EARLIER); the level alone proves
nothing, and without a comparison the verdict is observed.""",
)

PRODUCT = Text(
    summary="the product over depth of the sub-layers' gains",
    what="""\
gain_product_log is the natural logarithm of the product of residual_norm over depth, the norm of a I + J
(followed by the norm behind the sum for post-norm). Beside it stands the true end-to-end norm of d y_N / d
x_1, by Lanczos on the chain. Where that was not measured, the product is called an upper bound whose true value is
not known.""",
    why="""\
Eq. 7 bounds the gradient at the embedding by this product. The end-to-end norm shows how much of it is
real: singular directions of neighbouring layers do not line up, and the rest cancels.""",
    example="""\
A product of e^19 beside an end-to-end gain of 310 means: the bound is loose by e^13 here.""",
    remedy="""\
Nothing by itself: it is an observation. JD101 and JD102 name the factors that carry it. Where you give it a cut of
its own (gain_product = { warning = 20 }), the remedies of both are tried against it.""",
)

RISK = Text(
    summary=(
        "the chance that a run at the planned learning rate goes wrong, as recorded small "
        "runs tell it"
    ),
    what="""\
With --lr and --warmup: a logistic curve in one figure of the untrained model, the peak learning rate and the
steps of warm-up, one for each placement of the norm, fitted on recorded runs (examples/spike_lab, jacdiag
backtest). Wrong means that the loss diverged, spiked, or stayed 0.4 above what the same or a lower rate
reached. The interval is over resampled inits: what other inits might have shown. Outside of the widths, depths,
rates, warm-ups and figures that were run there is no chance, and the report says which one is outside. The same
holds for --clip and --beta2 if they are given: the runs of the curves that ship clip at 1 and have beta2 0.95. A
warning where the whole interval lies above 30%, an error where above one half. In a run, jacdiag.watch asks the
same curve at the highest rate so far, with the warm-up that its steepest rise comes to, and speaks once a
level; there a longer rise than any that was run counts as the longest, a shorter one as the shortest.""",
    why="""\
The same init is harmless at one learning rate and breaks a run at another; neither the figure nor the rate
says it alone. How well curves foretell runs that they have not seen, jacdiag backtest --hold-out says.""",
    example="""\
The curves that ship were fitted on runs of d 32 to 128 (examples/spike_lab): they say something of d 64
and nothing of d 4,096, where no chance is given.""",
    remedy="""\
A lower peak learning rate, a longer warm-up, or the init that JD101 and JD102 ask for. Fit a curve on your own runs:
jacdiag backtest RUN... --write-risk FILE, and name the file as `risk` in [tool.jacdiag].""",
)

UNDECIDED = Text(
    summary=(
        "an interval lies across a threshold, or a figure could not be measured: the rule has "
        "no answer"
    ),
    what="""\
A spectral norm is an interval: the lower end is a Ritz value, the upper end holds with the asked
confidence. A rule whose threshold lies inside has no answer; neither has one whose figure could not be
measured. Such a rule is unknown, never clean.""",
    why="""\
A threshold crossed by a number without an error bar is an accident; one crossed by an interval is a fact.""",
    example="""\
core_norm·√(2N) between 4.8 and 5.2 with a threshold of 5.""",
    remedy="""\
More products (--max-products), a narrower --tol, --dtype float64; for a figure that could not be measured,
the table says why.""",
)

UNCOVERED = Text(
    summary=(
        "parameters that belong to no sub-layer, embedding, head or norm: nothing was said "
        "about them"
    ),
    what="""\
Every parameter belongs to a sub-layer, the embedding, the head, a norm outside, or is listed as not
covered.""",
    why="""\
A diagnosis of part of a model is one only if it says which part. Below 5% of the parameters this is info,
above a warning.""",
    example="""\
An encoder of another modality that the probe never calls.""",
    remedy="""\
`jacdiag sites SOURCE` lists them with the reason. A probe that reaches them (--inputs) often helps.""",
)

OFF_DISTRIBUTION = Text(
    summary="a trained model was probed with random tokens: its figures on text may differ",
    what="""\
At init random tokens see everything. A trained model has learned what text looks like; random tokens are
far from it.""",
    why="""\
Gains and shortcut sizes depend on the input. Levels are capped at warning with such a probe, unless the profile
names a level for the rule.""",
    example="""\
jacdiag audit trained.pt                 (no tokenizer beside the file)""",
    remedy="""\
--tokens FILE with a few thousand real tokens (.npy, .bin, .pt), or with text (.txt, .md, .jsonl) for a Hugging
Face folder with its tokenizer.""",
)

NO_MATCH = Text(
    summary="no rule about the model applied: nothing was checked",
    what="""\
None of the selected rules JD1xx matched a sub-layer, because of the state, the placements, or the
selection. If no norm was asked for (--contract-only, --select JD2) one of the init contract's rules is enough. A gate
in which this fires exits with 3, unless something else made it fail.""",
    why="""\
A check that matches nothing and passes is worse than none.""",
    example="""\
A state dict without a model: no Jacobian can be measured from weights alone.""",
    remedy="""\
--model FACTORY for a bare state dict; `jacdiag sites SOURCE` shows what was found; widen --select.""",
)

NON_DETERMINISTIC = Text(
    summary="two runs of the same probe gave different values: no norm was measured",
    what="""\
The model is run twice on the same input before any product is spent.""",
    why="""\
A Jacobian of a function that changes from call to call is not defined, and Lanczos on it gives noise.""",
    example="""\
Dropout in train mode; random routing; noise in the forward.""",
    remedy="""\
model.eval(), or a fixed seed inside the forward.""",
)

NON_FINITE = Text(
    summary="weights hold NaN or Inf: the sub-layers they belong to cannot be measured",
    what="""\
Every parameter is checked; the names are listed, and the sub-layers that they reach become unknown. A mask or a
distance table may hold -inf on purpose: it counts only if an activation is not finite. Buffers are named if they
make one so. A weight that the forward does not read is a note.""",
    why="""\
One NaN spreads to everything behind it.""",
    example="""\
A checkpoint that was written after a divergence, or a broken download.""",
    remedy="""\
Go back to an earlier checkpoint; check the file's hash.""",
)

REPLAY = Text(
    summary="a branch that was run again differs from the whole model: its figures are not used",
    what="""\
For every sub-layer J^T w is compared with that of a run of the whole model.""",
    why="""\
A cache, or a value that reaches the branch past its shortcut, would give a Jacobian of something else.""",
    example="""\
A model that writes its keys and values into a buffer of its own.""",
    remedy="""\
Switch caches off in the probe (use_cache=False); report the model, so that it can be supported.""",
)
