"""JD214: head and embedding are two tensors although the model says that they are one, or the
reverse.
"""

from __future__ import annotations

from jacdiag.records import Finding
from jacdiag.records.structure import TieRecord
from jacdiag.rules.rule import NOT_APPLICABLE, Context, Outcome, Rule
from jacdiag.rules.texts import Text

TEXT = Text(
    summary=(
        "tie: the config says that head and embedding share one tensor, and they do not, or "
        "the reverse"
    ),
    what="""\
Compares `config.tie_word_embeddings` with the tensors. Head and embedding are those of get_output_embeddings()
and get_input_embeddings(), else the last product and the table that token ids pick from. It does not apply if the
model has no config with that entry, if an outer and an inner config differ, or if a class of transformers lists
no tied weights.""",
    why="""\
A tie is lost where a module is moved or materialised tensor by tensor, as from the meta device, and where the
flag stands in a config that is not read. The head is then a random matrix of its own, or a copy that drifts away
in training. A checkpoint that holds one of the two leaves the other random.""",
    example="""\
    model.lm_head.weight = nn.Parameter(model.embed_tokens.weight.clone())     # fires, if the config says tied""",
    remedy="""\
Tie after the last move: model.tie_weights(), or lm_head.weight = embed_tokens.weight. If it was meant, set the
flag.""",
)


def _check(context: Context, rule: Rule) -> Outcome:
    contract = context.report.contract
    if contract is None or context.report.state not in rule.states or contract.tie is None:
        return NOT_APPLICABLE
    tie = contract.tie
    if tie.said == tie.shared:
        return Outcome(1)
    names = list(dict.fromkeys((tie.head, tie.embedding)))
    evidence = {"parameters": names, "said": tie.said, "shared": tie.shared, "equal": tie.equal}
    what, fix = _words(tie)
    return Outcome(
        1,
        [
            Finding(
                rule.code, context.level(rule, "warning"), names, what, evidence, rule.summary, fix
            )
        ],
    )


def _words(tie: TieRecord) -> tuple[str, str]:
    """Return what is said of a tie, and what to do."""
    if tie.shared:
        what = f"{tie.by} is false, and the head reads {tie.embedding} all the same"
        return what, f"set {tie.by} to true, or give the head a tensor of its own"
    values = "the same values at this moment" if tie.equal else "different values"
    what = f"{tie.by} is true, and {tie.head} and {tie.embedding} are two tensors with {values}"
    return (
        what,
        f"tie them after the last move or init ({tie.head} = {tie.embedding}), or set {tie.by} to "
        "false",
    )


RULE = Rule("JD214", "tie-as-said", "warning", **TEXT, check=_check, states=("init",))
