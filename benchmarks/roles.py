"""Compare the roles that names give with those of the dataflow, for 105 families of transformers.

    python benchmarks/roles.py [FAMILY ...]

For each family it reads the roles twice: from one recorded forward, and from the names and
shapes of the state dict alone. A difference is an error unless DIFFERENCES says why it is
right. The same is done for the number of layers, the width and the names of the sub-layers,
with FACTS. Without names it writes results/roles.md.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical"}

# Only while this is imported: tests import it, and the folder holds modules that are called as
# folders of tests are.
sys.path.insert(0, str(Path(__file__).parent))
try:
    from _coverage.build import build
finally:
    sys.path.remove(str(Path(__file__).parent))

import jacdiag
from jacdiag.measure.roles_by_name import NamedModel, read_names
from jacdiag.trace import Sites
from jacdiag.trace.discovery.weight_roles import uses_of

RESULTS = Path(__file__).parent / "results"
FAMILIES = {
    "causal-lm": (
        "gpt2 llama gpt_neox opt bloom gptj mixtral qwen2_moe falcon mpt deepseek_v3 mamba gpt_neo "
        "mistral qwen2 gemma2 phi phi3 olmo2 deepseek_v2 codegen gpt_bigcode rwkv jamba stablelm "
        "starcoder2 persimmon cohere granitemoe "
        "mamba2 xglm biogpt ctrl openai-gpt nemotron glm dbrx jetmoe recurrent_gemma olmoe "
        "qwen3_moe gemma3_text "
        "gpt_oss falcon_mamba falcon_h1 exaone4 xlnet qwen3_next lfm2 llama4_text phimoe bamba"
    ).split(),
    "masked-lm": (
        "bert roberta distilbert albert electra deberta deberta-v2 esm modernbert mpnet "
        "mobilebert fnet nystromformer "
        "convbert xlm roformer xlm-roberta longformer funnel ibert squeezebert megatron-bert "
        "data2vec-text layoutlm "
        "flaubert"
    ).split(),
    "seq2seq": (
        "t5 bart umt5 mbart pegasus marian m2m_100 blenderbot led prophetnet longt5 "
        "switch_transformers fsmt nllb-moe"
    ).split(),
    "image": (
        "vit deit beit swin swinv2 convnext convnextv2 dinov2 resnet segformer vit_msn pvt "
        "clip siglip"
    ).split(),
}


@dataclass(frozen=True)
class Difference:
    """Weights whose name and dataflow differ, and why.

    Attributes:
        families: regular expression of the families.
        names: regular expression that is searched in the weight's name.
        why: which of the two is right, or why neither is wrong.
    """

    families: str
    names: str
    why: str


DIFFERENCES = (
    # The name says less.
    Difference(
        "clip",
        r"class_embedding",
        "a token that joins those of the image; the name may be a table of classes",
    ),
    Difference(
        "pvt", r"cls_token", "the name lies in a numbered patch embedding, which is read as a layer"
    ),
    Difference(
        "prophetnet",
        r"ngram_embeddings",
        "rows that join the stream; the name does not say how they are used",
    ),
    Difference(
        "mamba2?|falcon_mamba|falcon_h1|jamba|bamba|qwen3_next",
        r"A_log|\.D$",
        "decay and skip of a state-space layer are no gain of a norm, no scale and no bias: no "
        "role by name",
    ),
    Difference(
        "rwkv", r"time_(mix_\w+|decay|first)$", "vectors of the time mixing: no role by name"
    ),
    Difference("recurrent_gemma", r"rg_lru", "inner weights of the recurrence: no role by name"),
    Difference(
        "convbert",
        r"key_conv_attn_layer|conv_kernel_layer|conv_out_layer",
        "a convolution in an attention",
    ),
    Difference("nystromformer", r"attention\.self\.conv", "a convolution in an attention"),
    Difference(
        "segformer|pvt",
        r"sequence_reduction",
        "shortens keys and values by a convolution: no role by name",
    ),
    Difference(
        "xlnet|funnel",
        r"rel_attn\.r$|r_kernel|seg_embed",
        "maps positions, not the stream: no role by name",
    ),
    Difference(
        "prophetnet",
        r"relative_pos_embeddings",
        "maps the stream to positions: no role by name",
    ),
    Difference("gpt_oss", r"sinks", "attention sinks are no bias: no role by name"),
    Difference("siglip", r"head\.probe", "a learned query: no role by name"),
    Difference("swinv2", r"logit_scale", "the temperature of an attention is no gain of a norm"),
    Difference("convnextv2", r"grn\.", "a norm over space inside the FFN: no role by name"),
    Difference(
        "resnet",
        r"convolution",
        "which convolution of a branch is its first or last is not in the name",
    ),
    # The dataflow says something else.
    Difference(
        "convnext(v2)?",
        r"downsampling_layer",
        "between stages: the dataflow takes it for a gain",
    ),
    Difference(
        "convnext(v2)?",
        r"pwconv2",
        "on a map of one pixel no positions mix, so that the dataflow sees an FFN",
    ),
    Difference(
        "llama4_text",
        r"router",
        "its result multiplies the experts' input, as W_1 in a gated FFN",
    ),
    Difference(
        "jetmoe",
        r"router",
        "its result weighs the experts of an attention, where the dataflow has no routers",
    ),
    Difference(
        "rwkv",
        r"feed_forward\.receptance",
        "a gate of the result: no product follows it, as for W_O",
    ),
    Difference(
        "fsmt",
        r"encoder\.embed_tokens",
        "of two embeddings the dataflow calls the second positions",
    ),
    Difference("xlm-roberta", r"lm_head\.decoder", "tied to the embedding: both names are right"),
    Difference(
        "funnel",
        r"[kv]_head",
        "pooled queries: the keys' map is read before the layer's first sub-layer",
    ),
    Difference(
        "dbrx",
        r"experts\.mlp\.w2",
        "all experts in one matrix, whose rows are those of every expert",
    ),
    Difference(
        "mobilebert",
        r"",
        "four FFNs and a narrower stream inside one branch: the dataflow sees one attention",
    ),
)
FACTS = {  # (family, fact) -> why the names cannot give it
    ("albert", "layers"): "one layer runs several times",
    ("albert", "sublayers"): "one layer runs several times",
    ("fnet", "sublayers"): "its Fourier mixing has no weights",
    ("mobilebert", "width"): "most matrices work at a smaller width",
    ("mobilebert", "sublayers"): "the stream's branch spans attention and FFNs",
    ("squeezebert", "width"): "grouped convolutions hide the width",
    (
        "squeezebert",
        "sublayers",
    ): "one call of its encoder makes all layers, which are numbered",
    ("convnext", "sublayers"): "on a map of one pixel no positions mix: mlp, not mixer",
    ("convnextv2", "sublayers"): "on a map of one pixel no positions mix: mlp, not mixer",
    ("resnet", "width"): "no role in its names says which convolution reads the stream",
    ("resnet", "sublayers"): "blocks whose shortcut is a convolution have no residual",
    ("siglip", "sublayers"): "its pooling attention has no residual",
}


@dataclass
class Outcome:
    """What one family showed.

    Attributes:
        compared: weights to which the dataflow gives a role.
        wrong: differences that nothing explains, as sentences.
        excused: differences that DIFFERENCES or FACTS explains.
    """

    task: str
    family: str
    compared: int = 0
    wrong: list[str] = field(default_factory=list)
    excused: int = 0
    reasons: set[str] = field(default_factory=set)


def compare_family(task: str, family: str) -> Outcome:
    """Build a family, and compare what its names say with what its dataflow says."""
    built = build(task, family)
    sites = jacdiag.sites(built.model, **built.inputs)
    state = {
        name: tensor
        for name, tensor in built.model.state_dict().items()
        if tensor.is_floating_point()
    }
    named = read_names({name: tuple(tensor.shape) for name, tensor in state.items()})
    outcome = Outcome(task, family)
    compare_roles(outcome, sites, named, {name: tensor.dim() for name, tensor in state.items()})
    compare_facts(outcome, sites, named)
    return outcome


def compare_roles(outcome: Outcome, sites: Sites, named: NamedModel, dims: dict[str, int]) -> None:
    """Compare the role, the layer and the fan-in of every weight to which the dataflow gives a
    role.
    """
    for name, use in uses_of(sites).items():
        weight = named.weights.get(name)
        if weight is None or not use.role:
            continue
        outcome.compared += 1
        has_layer = bool(weight.kind) and use.layer is not None
        has_fans = dims[name] == 2 and use.fan_in is not None and use.fan_in != use.fan_out
        if weight.role != use.role:
            sentence = f"{name} is {weight.role or 'unknown'} by name, {use.role} by dataflow"
        elif has_layer and weight.layer != use.layer:
            sentence = f"{name} is in layer {weight.layer} by name, {use.layer} by dataflow"
        elif has_fans and weight.fan_in != use.fan_in:
            sentence = f"{name} has fan-in {weight.fan_in} by name, {use.fan_in} by dataflow"
        else:
            continue
        _add(outcome, name, sentence)


def _add(outcome: Outcome, name: str, sentence: str) -> None:
    for known in DIFFERENCES:
        is_family = re.fullmatch(known.families, outcome.family) is not None
        if is_family and re.search(known.names, name):
            outcome.excused += 1
            outcome.reasons.add(known.why)
            return
    outcome.wrong.append(sentence)


def compare_facts(outcome: Outcome, sites: Sites, named: NamedModel) -> None:
    """Compare the number of layers, the width, and the names and kinds of the sub-layers."""
    first = sites[0]
    measured: dict[str, Any] = {
        "layers": sites.layers,
        "width": int(first.shortcut.shape[first.feature_dim]),
        "sublayers": [(site.name, site.kind) for site in sites if not site.nested],
    }
    by_name = {
        "layers": named.layers,
        "width": named.width,
        "sublayers": [(sublayer.name, sublayer.report_kind) for sublayer in named.sublayers],
    }
    for fact, value in measured.items():
        if by_name[fact] == value:
            continue
        why = FACTS.get((outcome.family, fact))
        if why is None:
            outcome.wrong.append(f"{fact}: {by_name[fact]} by name, {value} by dataflow")
        else:
            outcome.excused += 1
            outcome.reasons.add(f"{fact}: {why}")


def write_table(outcomes: list[Outcome]) -> None:
    """Write results/roles.md."""
    import torch
    import transformers

    compared = sum(outcome.compared for outcome in outcomes)
    lines = [
        "# Roles by name against roles by dataflow",
        "",
        f"{len(outcomes)} families of transformers {transformers.__version__}, torch "
        f"{torch.__version__}. "
        f"{compared} weights have a role by dataflow. `python benchmarks/roles.py` makes this "
        "file.",
        "",
        "| Family | Task | Weights compared | Unexplained | Explained | Why |",
        "|---|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        why = "; ".join(sorted(outcome.reasons))
        cells = [
            outcome.family,
            outcome.task,
            outcome.compared,
            len(outcome.wrong),
            outcome.excused,
            why,
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    (RESULTS / "roles.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", nargs="*")
    chosen = parser.parse_args().family
    outcomes = []
    for task, families in FAMILIES.items():
        for family in families:
            if chosen and family not in chosen:
                continue
            outcome = compare_family(task, family)
            outcomes.append(outcome)
            print(
                f"{task} {family}: {outcome.compared} weights, {len(outcome.wrong)} differ",
                flush=True,
            )
            for sentence in outcome.wrong:
                print(f"    {sentence}")
    if not chosen:
        write_table(outcomes)
    agree = sum(not outcome.wrong for outcome in outcomes)
    print(f"{agree} of {len(outcomes)} families agree")
    return int(agree < len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
