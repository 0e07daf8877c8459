"""What `jacdiag explain CODE` says of JD301 to JD305 (forward) and JD401 to JD406 (backward)."""

from __future__ import annotations

from jacdiag.rules.texts import Text

VARIANCE = Text(
    summary="variance growth: the variance of the residual stream over depth",
    what="""\
The variance of the shortcut over features, averaged over tokens, at each depth. Two figures are compared. The first
is the variance at the end divided by that in the middle: growth that is linear in depth gives at most 2, quadratic
growth at most 4, exponential growth more. The second is the largest absolute activation: above 65,504 it is Inf
in float16.""",
    why="""\
Each branch adds its variance to the stream. "Peri-LN" (arXiv 2502.02732) finds linear growth with norms at both
ends of a branch, and exponential growth in trained pre-norm models, up to values that float16 cannot hold. The
"curse of depth" (arXiv 2502.05795) finds that deep layers do little where the variance has grown. A large shortcut
is good elsewhere (JD102), so growth alone is an observation.""",
    example="""\
    x = x + f(norm(x))          with std of f equal at each depth: linear, end / middle 2          # clean
    x = 2 * x + f(norm(x))      the variance is multiplied by 4 at each depth                      # fires""",
    remedy="""\
Scale W_O and W_2 with 1/√(2N), or put a norm on the branch's output. Train in bfloat16 if the largest activation
does not fit into float16.""",
)

MASSIVE = Text(
    summary="massive activations: a few values of the stream are far above all others",
    what="""\
The largest absolute activation at each depth. It is massive above 100 and above 1,000 times the median of the
absolute activations there. The report names the depth, the token and the feature.""",
    why="""\
Trained language models hold such values at the first token and at separators. They act as constant biases of
attention, and stand in the way of quantisation. They appear early in training and stay, so one checkpoint
proves nothing: this is an observation. Rules about norms use the 99th percentile over tokens for that reason.""",
    example="""\
A value of 2,400 at feature 1,415 of the first token, with a median of 0.3.""",
    remedy="""\
Nothing by itself. Compare with an earlier checkpoint: growth from one to the next is what matters.""",
)

LOGITS = Text(
    summary="attention logits: the largest score that enters a softmax",
    what="""\
The maximum of q·k/√d_head over heads, queries and visible keys, with the model's own scale, bias and soft cap. It is
read from the calls of scaled_dot_product_attention and of a softmax over scores. Attention by other kernels is not
read, and the report says so for each sub-layer.""",
    why="""\
A softmax of very large scores is one-hot, and its gradient is zero. Runs whose largest score passed 10,000 diverged
(arXiv 2309.14322). Kimi K2 keeps it below 100 by scaling W_Q and W_K (arXiv 2507.20534).""",
    example="""\
W_Q and W_K with 10 times their std make scores 100 times as large.""",
    remedy="""\
A norm on queries and keys (QK-norm), a soft cap on the scores, or smaller W_Q and W_K.""",
)

ENTROPY = Text(
    summary="attention entropy: attention that looks at one key only",
    what="""\
The entropy -sum A ln A of the attention weights in nats, averaged over heads and queries. It is divided by the mean
of ln(visible keys), so that 1 is uniform and 0 looks at one key. The rule compares 1 minus that ratio. The report
also holds the entropy of the lowest head.""",
    why="""\
Entropy that falls towards 0 goes with unstable training ("entropy collapse", arXiv 2303.06296). The paper gives no
threshold, and trained heads that look at one key are common: this is an observation.""",
    example="""\
At init the scores are small and the ratio is near 1. With scores of ±1,000 it is 0.""",
    remedy="""\
As for JD303: QK-norm, a soft cap, or smaller W_Q and W_K.""",
)

RANK = Text(
    summary="rank collapse: the vectors of all tokens point the same way",
    what="""\
The mean cosine between the shortcuts of two different tokens of the probe, at each depth. 1 means that all tokens
have the same direction.""",
    why="""\
Attention averages tokens. Without a shortcut that is large enough, deep layers see the same vector everywhere, and
the gradient of W_Q and W_K vanishes (arXiv 2206.03126). The paper gives no threshold. Trained models are
anisotropic, and reach high cosines in health: this is an observation.""",
    example="""\
Blocks without shortcuts: the cosine is above 0.99 after a few layers.""",
    remedy="""\
Keep the shortcut, and scale branches down with depth (1/√(2N)).""",
)

NO_GRADIENT = Text(
    summary="no gradient: a part of the model gets none at all",
    what="""\
One forward and one backward of the loss. The rule fires if the gradient at the first shortcut is exactly zero, or
if no parameter of a sub-layer gets any, although the loss depends on it. Matrices outside all sub-layers are
named too, if all their ways to the loss pass a call without a derivative: a branch that is detached as a whole is
no sub-layer. A cause is named only if it was tried: with other values in the named parameters a gradient arrives,
or all ways to the loss pass the named calls. Otherwise the report says that the cause is not known. Parameters
that are frozen (requires_grad=False) behind a detach are left out. Two cases are an info: a zero matrix of the
output head alone, which is a published init and gets a gradient itself, and a part whose parameters are used
again where a gradient reaches them.""",
    why="""\
Such a part learns nothing at the first step, and often never does. No figure of a Jacobian shows it: the
sub-layers below a zero final gain have perfect norms.""",
    example="""\
    nn.init.zeros_(model.norm.weight)                  # fires
    x = x.detach()                                     # fires, unless all before it is frozen
    nn.init.zeros_(model.lm_head.weight)               # info""",
    remedy="""\
Set the named gain to one, draw the named matrix, or remove the named detach or no_grad.""",
)

DEAD_BRANCH = Text(
    summary="dead branch: a branch with parameters does not depend on its input at all",
    what="""\
The branch has a Jacobian of exactly zero at the probe: its value is zero, or constant. A parameter is named if it
is constant and the branch depends on its input with other values in it. Buffers of the branch are tried as well,
and weight and bias of a gate that is computed outside the branch from a condition. It is an info if each named
one is a parameter and zero in every layer that has it, as in zero-initialised W_O and W_2, ReZero, LayerScale or
adaLN-zero. It is a warning if several zeros of one branch block one another: only all of them together let
anything through, and no gradient of the loss reaches any.""",
    why="""\
A gain of 0 reads like a small sub-layer, the best that there is. It is an init on purpose, or a lost weight.""",
    example="""\
    for block in blocks: nn.init.zeros_(block.mlp.w2.weight)        # info
    nn.init.zeros_(blocks[2].mlp.w2.weight)                         # fires
    for block in blocks: block.scale.zero_()      a buffer          # fires
    nn.init.constant_(blocks[2].mlp.w1.bias, -100)    before a ReLU # fires""",
    remedy="""\
Draw the named parameters as in the other layers.""",
)

GROWTH = Text(
    summary="growth exponents: activations and gradients that grow or shrink over depth",
    what="""\
ln(norm at the last point / norm at the first) of the stream's activations, and of the gradients from the top
down. Divided by the number of layers it is the growth exponent of OLMo 2 (arXiv 2501.00656); the report holds
that. The rule compares the whole, which hardly depends on the number of layers.""",
    why="""\
Exponents near 0 keep signals of one size over depth and width. OLMo 2 chose its init by them. They follow from JD102
and JD104 in most models, so this is an observation.""",
    example="""\
The recipes of "Spike No More" on a GPT of width 256: embed-ln 0.06, scaled-embed 0.16, vanilla 2.0, xavier 4.""",
    remedy="""\
As for JD101 and JD102.""",
)

EMBEDDING_GRADIENT = Text(
    summary="embedding gradient: the embedding's gradient compared with that of the other matrices",
    what="""\
The gradient norm of the embedding, divided by the median over the other matrices.""",
    why="""\
GLM-130B saw it rise a few steps before each collapse, and shrank the embedding's gradient to 0.1 of it. It is a
signal over time, and no threshold is published. At init it does not tell good recipes from bad ones: embed-ln has
more (10 to 15) than vanilla (1.5), and fresh models of transformers lie between 0.1 and 10 million. So no
threshold ships; the figure is in the report, and you can set one (embedding_gradient = { info = 50 }).""",
    example="""\
An embedding of std 1e-4 before a pre-norm block: the first norm multiplies the gradient by 10,000.""",
    remedy="""\
See JD102. A tied head adds its own gradient to the embedding's.""",
)

UPDATE = Text(
    summary="update ratio: how much the first step of Adam changes each weight matrix",
    what="""\
Applies if --lr is given. The first step of Adam changes every entry by the learning rate, whatever the gradient
is, so norm of update / norm of weight is lr / rms(W) for each matrix. With --warmup W the first rate is lr / W.
It assumes Adam or AdamW, and is not measured.""",
    why="""\
A ratio of about 1e-3 is usual, above 1e-2 is an alarm (folklore; WeSaR, arXiv 2410.05052). Later steps are smaller:
Adam's entries are below the rate once gradients change sign. So it is an observation; in a run, jacdiag.watch
measures the ratio itself.""",
    example="""\
lr 3e-3 without warm-up and matrices of std 0.02: 0.15.""",
    remedy="""\
A warm-up, a lower rate, or larger matrices.""",
)

NOT_FINITE_GRADIENT = Text(
    summary="gradient not finite: the backward of the loss gives NaN or Inf",
    what="""\
The gradients of the stream and of the parameters, from one backward of the loss.""",
    why="""\
The first step writes NaN into the weights. The forward does not show it: the derivative of √x at 0 is infinite.""",
    example="""\
    x.pow(2).sum(-1).sqrt()      at a vector that is zero             # fires
    torch.where(mask, x / y, 0)  with y = 0 where the mask is False   # fires""",
    remedy="""\
Add an epsilon inside the root or the quotient, or select the argument before the function.""",
)

CUT_SHORTCUT = Text(
    summary="cut shortcut: a residual addition whose shortcut carries no gradient",
    what="""\
An addition of a value and a function of it, where the value passes a detach on its way into the sum. The forward
is that of a residual branch. The tracer finds no sub-layer there, since no gradient takes the shortcut. A
straight-through estimator is not named: no matrix product lies on its way.""",
    why="""\
The gradient that reaches the layers below is multiplied by the branch's Jacobian in place of one plus it. Over a
few such layers it vanishes, and the loss does not show why.""",
    example="""\
    x = x.detach() + f(norm(x))          # fires
    x = x + (quantised - x).detach()     # clean""",
    remedy="""\
Remove the detach.""",
)
