"""Findings on models of transformers that its own code, or the code that a model comes from, shows
to be true.
"""

from __future__ import annotations

_BATCH_NORMS = (
    "transformers draws the gains of its batch norms around 0; the code that the model "
    "comes from starts them at 1: "
)
_CVNETS = "apple/ml-cvnets at 0c0f798, cvnets/misc/init_utils.py, initialize_norm_layers"
_MODERNBERT = (
    "PreTrainedModel._init_weights sets the padding row to 0, and the model's own init, which "
    "runs on the module "
    "around it, draws the whole table again"
)
# Family -> rule -> what the source says. Read in transformers 5.24.
_CONFIRMED = {
    "nemotron": {
        "JD208": "transformers starts w at 1 and uses 1 + w; NVIDIA/Megatron-LM at 00caa53, "
        "megatron/core/fusions/fused_layer_norm.py, reset_parameters, starts such a w at 0"
    },
    "efficientnet": {
        "JD208": _BATCH_NORMS + "huggingface/pytorch-image-models at 0141934, "
        "timm/models/_efficientnet_builder.py, _init_weight_goog"
    },
    "mobilevit": {"JD208": _BATCH_NORMS + _CVNETS},
    "mobilevitv2": {"JD208": _BATCH_NORMS + _CVNETS},
    "modernbert": {"JD208": _MODERNBERT},
    "modernbert-decoder": {"JD208": _MODERNBERT},
    "modernvbert": {"JD208": _MODERNBERT},  # its text model
    "luke": {
        "JD214": "config.tie_word_embeddings is true, and get_output_embeddings() returns a "
        "matrix of its own: "
        "_tied_weights_keys of LukeForMaskedLM names the table of entities only"
    },
}


def source_of(family: str, finding: str) -> str:
    """Return the source that confirms a finding; "" if none is known.

    Args:
        family: model type.
        finding: a sentence that begins with the code of its rule.
    """
    rules = _CONFIRMED.get(family, {})
    return next((source for code, source in rules.items() if finding.startswith(code)), "")
