"""What `jacdiag explain JD5xx` teaches."""

from __future__ import annotations

from jacdiag.rules.texts import Text

JOINT = Text(
    summary="loss and gradient norm stand far above what they were, several steps on end",
    what="""\
Both over 6 standard deviations of a rolling window of 1,000 steps, or one of them over 8, three steps in a row,
after 60 steps. Values that stand out are kept out of the window. What no single step shows: the means of the last 4 or
16 steps, both over 5 standard deviations of such means, or one over 8 and the other over 2.5; they are held against the
median of 201 steps before them, so that neither a fall nor a slow rise counts. And updates: of three sub-layers in a
row, in turn, over 1e-2 of the weights and ten times the usual, with a vote of loss or gradient norm.

A young run's first fall spoils the mean of 1,000 steps. So the same is asked of the line through the last 48 steps:
both over 6 deviations, or one over 8 and the other over 2.5, three steps in a row. The rule is ready after 60
steps.""",
    why="""\
A single threshold alarms all the time: one z-score over 2.5 alarms 62 times in 10,000 Gaussian steps, and one
threshold on the loss from step 0 on alarmed in 4 of 6 healthy public runs. The published pair of 6 and 8 alarmed in
none of them; the means and the updates were not held against those runs. The line through the last 48 steps, three
steps in a row, is passed by none of 375,000 healthy steps of the lab.""",
    example="""\
step 4210: loss 9.1 and gradient norm 31 standard deviations above their last 1,000 steps, 3 steps in a row since step
4208 (loss 7.2, usually 2.9; gradient norm 18, usually 0.6); h.0.attn moved first (gradient norm 9, usually 0.2, since
step 4206)""",
    remedy="""\
Look at the sub-layer that moved first, and at the batch, which the flight recorder keeps with keep_batches=10 (jacdiag
audit CHECKPOINT --replay DIR). A lower learning rate or a checkpoint from before the alert are the usual ways on.""",
)

LOSS_SPIKE = Text(
    summary="one step on which several signals agree: a spike of the loss that the gradient feels",
    what="""\
Either of two. Loss more than 8 standard deviations over the line through the last 48 steps and over their usual value
by 0.1, with the gradient norm more than 2.5 over its own line. If both stand more than 8 over their lines, the 0.1 is
not asked for: the loss of a model of which little is trained hardly moves. If the gradient norm is only known after
clipping, it has no say. The line is Tukey's resistant line, and the deviation comes from the median distance to
it: ready after 60 steps.

Or loss at least 7 standard deviations over the rolling mean of the last 1,000 (OLMo 2), over the rolling median of
201 steps by 0.1 (arXiv 2608.30320), and the gradient norm at z > 2.5 of its exponential average (ZClip), in one step.
Each of them alone is a vote in the log and no alert.""",
    why="""\
A corrupted batch lasts for one step: a rule that waits for three does not see it, and one signal alone sees too
much. In a young run the loss falls by more than a corrupted batch lifts it, so that it is compared with its own line.
In 375,000 steps of the lab's healthy runs the first of the two is true once.""",
    example="""\
step 190: the loss stands 31 and the gradient norm 35 standard deviations above the line of the last 48 steps (loss
5.81, usually 1.19; gradient norm 31.9, usually 1.74); none moved first: all sub-layers that stand out have since step
190""",
    remedy="""\
Look at the batch, kept with jacdiag.watch(..., keep_batches=10): jacdiag audit CHECKPOINT --replay DIR, or the tokens
in DIR/batch.pt themselves.""",
)

GRADIENT_SPIKE = Text(
    summary="the gradient norm stands out at one step: a vote, never an alert by itself",
    what="""\
At least 7 standard deviations over the rolling mean of the last 1,000 (OLMo 2), or z > 2.5 of an exponential average
with alpha 0.97 after 25 steps (ZClip, arXiv 2504.02507).""",
    why="""\
Gradient norms have heavy tails: spikes of one step are common in healthy runs, and clipping takes care of them.""",
    example="""\
{"type": "step", "step": 730, "votes": ["JD503"], ...}""",
    remedy="""\
Nothing by itself. Their share over the run is in the last line of the log; OLMo 2 took it from 0.40 to 0.03 percent by
its init.""",
)

DRIFT = Text(
    summary=(
        "a sub-layer's gain, the size of its branch or shortcut, or its logits leave the "
        "run's own trend"
    ),
    what="""\
A straight line through the logarithm of the last 3 to 8 rounds predicts the next one. A figure at twice or half of
that, and of its last value, beyond six standard errors of the prediction, at two rounds in a row, is a departure. Of
fewer than six rounds the scatter is that of the figure in all sub-layers. Gains are compared at every probe, branch
and shortcut sizes and the largest attention logits at every round of statistics.""",
    why="""\
The level of a trained model's gains proves nothing, and a slow monotone drift is normal; a sudden change of one
sub-layer is what comes before the loss moves.""",
    example="""\
step 3400: branch ‖J‖ of transformer.h.3.mlp is 3.1 times what its own trend predicted: 4.4 now, 1.4 before step 3200,
since which it has been so""",
    remedy="""\
Compare checkpoints on both sides of that step (jacdiag audit); look at that sub-layer's update norms and gradient.""",
)

NON_FINITE = Text(
    summary="the loss or a gradient is not finite, or a loss scaler skips step after step",
    what="""\
NaN or Inf in the loss, in the gradient of a step that was made, or ten steps in a row that the optimizer did not make.
A few skipped steps are how a loss scaler finds its scale, and say nothing. Gradients and weights are looked at before
the optimizer's step, which spreads what is not finite: a weight is named if it was not finite then, a gradient if it is
the only one. If clipping has spread one gradient to all, or the forward made it, the sentence says so and names
none.""",
    why="""\
One NaN in a step that is made is in every weight after it.""",
    example="""\
step 96: the weight transformer.h.5.attn.c_proj.weight was not finite before the optimizer's step, every other weight
was; the loss and the gradients of step 95 were finite""",
    remedy="""\
Go back to a checkpoint from before it; the flight recorder holds the last steps, and the batch with
keep_batches=10.""",
)

UPDATE_JUMP = Text(
    summary=(
        "a sub-layer's update norm, over weight norm and learning rate, doubles against its "
        "own median: a vote"
    ),
    what="""\
|delta W| / |W| / learning rate of one sub-layer a step, in turn, against the median of its last 32 samples. Silent
while the learning rate moves and after a resume.""",
    why="""\
The ratio of update to weight is about 1e-3 in healthy runs (folklore; WeSaR, arXiv 2410.05052); a sudden doubling at a
constant rate says that the optimiser's averages no longer fit the gradient.""",
    example="""\
{"type": "step", "step": 5120, "update": {"where": "transformer.h.2.mlp", "ratio": 0.004}, "votes": ["JD506"]}""",
    remedy="""\
Nothing by itself: see whether others vote at the same time.""",
)

STABLE_RANK = Text(
    summary="the stable rank of a weight matrix has halved: a vote",
    what="""\
|W|_F^2 / |W|_2^2 of the matrices of every sub-layer at every probe, against the largest value seen in the run.""",
    why="""\
It fell before failure in a 5M model, from step 20,000 on, which failed at 30,000 (MSign, arXiv 2602.01734); no
threshold was published.""",
    example="""\
{"type": "probe", "step": 20000, "votes": ["JD507:transformer.h.1.mlp.c_proj.weight"], ...}""",
    remedy="""\
Nothing by itself: an observation to set beside the others.""",
)

WRITTEN = Text(
    summary="weights changed by as much as they are, between two steps of the optimizer",
    what="""\
A sample of 128 elements of each weight matrix is read when the optimizer's step has ended, and again when the next one
begins. The rule fires if the sample of a weight has changed by at least its own norm, the smaller of before and after:
a doubling, a halving, a new draw. The factors in the sentence are those of the samples. A change of 1 to 100 percent
is a note in the log, once in a run. One that is undone before the next step is not seen, such as an average that is
swapped in for an evaluation.

A run that goes on from a checkpoint with the watch's own state compares the weights with those that the state was made
with. Not looked at: vectors, weights that no watched optimizer holds, the step after one that was compiled, and the
first step after the watch was attached. Of sharded weights those of the leading rank are, and not across a resume.""",
    why="""\
The loss may not show for hundreds of steps that a scaling was lost, a layer was drawn anew, or another checkpoint was
loaded. No optimizer is involved, so that neither learning rate nor clipping bounds it.""",
    example="""\
step 250: 6 of 14 weight matrices were written outside the optimizer, after its step 249 and before step 250, as
samples of their elements show: h.0.attn.c_proj.weight, h.0.mlp.c_proj.weight, h.1.attn.c_proj.weight and 3 more,
each multiplied by 2.45""",
    remedy="""\
If the loop writes weights there on purpose (a reset, a merge of adapters, pruning), nothing is wrong. Otherwise look
for what runs between the two steps: callbacks, a load_state_dict, an average that was not swapped back.""",
)
