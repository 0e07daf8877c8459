"""The weights-only tier: the report of a state dict whose model is not known. Nothing is run.

Three steps: read the names (`roles_by_name`), summarise each matrix (std, spectral norm, draw),
build the report.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from jacdiag.measure.init_contract import TABLES, record_of, with_sections, without_adapters
from jacdiag.measure.init_distribution import copies_of, draw_of
from jacdiag.measure.init_or_trained import State, decide_state, judge_weights
from jacdiag.measure.moments import std_of
from jacdiag.measure.nonfinite_weights import non_finite_weights
from jacdiag.measure.repeated_draws import streams_of
from jacdiag.measure.roles_by_name import NamedModel, NamedSublayer, is_matrix, read_names
from jacdiag.measure.token_statistics import spread_of
from jacdiag.measure.weight_statistics import bound_ffn, weight_stats
from jacdiag.records.init_contract import ContractRecord
from jacdiag.records.report import ModelRecord, Report, Spread, SublayerRecord, WeightStats
from jacdiag.sources import Source
from jacdiag.sources.training_history import history_of

NOT_MEASURED = (
    "shortcut_std",
    "branch_norm",
    "residual_norm",
    "core_norm",
    "norm_gain",
    "placement",
    "bound",
    "tightness",
)
OUTSIDE = ("embedding", "positions", "cls", "projection", "head")
NO_ROLE = "no role could be told from its name and shape"
NO_WEIGHT = "a mask or a table that the model computes, as its name says"

# BERT's `embeddings.LayerNorm`, BLOOM's `word_embeddings_layernorm`, BART's
# `layernorm_embedding`, RWKV's `pre_ln`.
_NORM_OF_EMBEDDING = re.compile(
    r"(?i)emb\w*[._](\w*norm|ln)|norm_emb|ln_(emb|pre)|pre_(ln|layer_?norm)"
)


@dataclass(frozen=True)
class EmbeddingFacts:
    """What the embedding's rows say of the stream.

    Attributes:
        rows: std of each row, summarised; None where the rows are not what enters the first
            layer.
        note: the reason, or what limits the numbers.
    """

    rows: Spread | None
    note: str


def weights_report(source: Source, given: State | None = None) -> Report:
    """Return the report of a state dict without a model.

    Nothing is run, so that no Jacobian is measured and placements are unknown. Eq. 15 is given
    at the first layer, where sigma_x' is the std of the embedding's rows.

    Args:
        source: holds the state dict; its model is None.
        given: the state, if the user said it.
    """
    # 1. Classify.
    state = {name: tensor for name, tensor in source.state.items() if tensor.is_floating_point()}
    model = read_names({name: tuple(tensor.shape) for name, tensor in state.items()})

    # 2. Summarise.
    decision = decide_state(
        given,
        history_of(source),
        lambda: judge_weights({name: state[name] for name in _matrices(model)}),
    )
    phase = decision.state
    embedding = summarise_embedding(state, model)
    stats = summarise_weights(state, model)

    # 3. Build.
    records = [
        build_sublayer(index, sublayer, model, stats, phase, embedding)
        for index, sublayer in enumerate(model.sublayers)
    ]
    broken = non_finite_weights(state)
    notes = []
    if source.why_weights:
        notes.append(f"weights only: {source.why_weights}")
    return Report(
        source=source.info,
        tier="weights",
        state=phase,
        state_reason=decision.reason,
        state_basis=decision.basis,
        probe=None,
        model=build_model(state, model, stats),
        sublayers=records,
        settings={"checks": {"non_finite": broken.names}},
        notes=[*notes, *_notes_on_layers(model), *source.notes, *broken.notes],
        contract=build_contract(state, model),
    )


# -- Summarise -------------------------------------------------------------------------------------
def _matrices(model: NamedModel) -> list[str]:
    """Return the matrices of sub-layers and those around them, not what the model computes."""
    names = [*_matrices_of_sublayers(model), *_matrices_outside(model)]
    return list(dict.fromkeys(names))


def _matrices_of_sublayers(model: NamedModel) -> list[str]:
    """Return the matrices of all sub-layers, in their order."""
    names: list[str] = []
    for sublayer in model.sublayers:
        names += sublayer.roles
    return names


def _matrices_outside(model: NamedModel) -> list[str]:
    """Return the matrices around the layers: embeddings, positions and heads."""
    return [name for name, weight in model.weights.items() if weight.role in OUTSIDE]


def summarise_weights(state: Mapping[str, Tensor], model: NamedModel) -> dict[str, WeightStats]:
    """Return std and norm of every matrix of a sub-layer, and the std of every other matrix.

    The norm of an embedding of 50,000 rows costs much and says nothing here.
    """
    stats: dict[str, WeightStats] = {}
    # 1. The matrices of sub-layers, with their norms.
    for name in _matrices_of_sublayers(model):
        figures = weight_stats(name, state[name])
        if figures is not None:
            stats[name] = figures

    # 2. Those outside, with their std only.
    for name in _matrices_outside(model):
        if name in stats:
            continue
        figures = weight_stats(name, state[name], norm=False, std=std_of(state[name]))
        if figures is not None:
            stats[name] = figures
    return stats


def summarise_embedding(state: Mapping[str, Tensor], model: NamedModel) -> EmbeddingFacts:
    """Return what the widest embedding says of the stream before the first layer."""
    # 1. The widest table must be one of the stream's width.
    tables = _embedding_tables(state, model)
    if not tables:
        return EmbeddingFacts(
            None, "Eq. 15 needs sigma_x', and no weight's name is that of an embedding"
        )
    widest = max(tables, key=lambda name: state[name].shape[0])
    features = state[widest].shape[1]
    if features != model.width:
        return EmbeddingFacts(
            None,
            f"Eq. 15 needs sigma_x', and the embedding's {features} features are not those of the "
            "stream",
        )

    # 2. No norm may follow it.
    for name, weight in model.weights.items():
        if _is_norm_of_embedding(name, weight.role):
            return EmbeddingFacts(
                None, f"Eq. 15 needs sigma_x', and a norm follows the embedding: {name}"
            )

    # 3. Its rows are the stream.
    limits = (
        "that of the embedding's rows; a scale or a norm on the embedding is not visible in weights"
    )
    return EmbeddingFacts(spread_of(state[widest]), limits)


def _embedding_tables(state: Mapping[str, Tensor], model: NamedModel) -> list[str]:
    """Return the embeddings that have a row for each token."""
    return [name for name in model.with_role("embedding") if state[name].dim() == 2]


def _is_norm_of_embedding(name: str, role: str) -> bool:
    """Return whether a weight is the gain of a norm that follows the embedding."""
    return role == "norm_gain" and _NORM_OF_EMBEDDING.search(name) is not None


# -- Build -----------------------------------------------------------------------------------------
def build_model(
    state: Mapping[str, Tensor], model: NamedModel, stats: Mapping[str, WeightStats]
) -> ModelRecord:
    """Return the model's sizes, and which of its weights have no role."""
    # 1. Which weights have no role, and how many numbers the others hold.
    uncovered: dict[str, str] = {}
    parameters = 0
    covered = 0
    for name, tensor in state.items():
        parameters += tensor.numel()
        if tensor.dim() < 2 or name in stats:
            covered += tensor.numel()
        elif is_matrix(name, tensor.shape):
            uncovered[name] = NO_ROLE
        else:
            uncovered[name] = NO_WEIGHT

    # 2. The weights outside all layers.
    return ModelRecord(
        name="",
        parameters=parameters,
        layers=model.layers,
        width=model.width,
        covered_parameters=covered,
        uncovered=list(uncovered),
        uncovered_reasons=uncovered,
        weights={name: stats[name] for name in _matrices_outside(model)},
    )


def build_sublayer(
    index: int,
    sublayer: NamedSublayer,
    model: NamedModel,
    stats: Mapping[str, WeightStats],
    phase: str,
    embedding: EmbeddingFacts,
) -> SublayerRecord:
    """Return the record of a sub-layer, with the bound of Eq. 15 at the first FFN.

    Args:
        index: position among all sub-layers.
        sublayer: as its names show it.
        model: that it belongs to.
        stats: of every matrix.
        phase: "init" or "trained".
        embedding: gives sigma_x' at the first layer.
    """
    # 1. The bound, at the first FFN.
    notes = dict.fromkeys(NOT_MEASURED, "weights only: no model was run")
    bound = None
    is_ffn = sublayer.kind == "mlp"
    is_first = sublayer.layer == 0
    if is_ffn and is_first:
        bound, why = bound_of_first_ffn(sublayer, model, stats, phase, embedding)
        notes["bound"] = why
        notes["shortcut_std"] = embedding.note
    elif is_ffn:
        notes["bound"] = "Eq. 15 needs sigma_x', which only the first layer's embedding gives"

    # 2. The weights by role.
    weights, others = _weights_by_role(sublayer, stats)
    if others:
        notes["weights"] = (
            "of several matrices of one role, that of the largest norm is given: "
            f"{', '.join(others)}"
        )

    # 3. What enters the first layer is the embedding.
    shortcut_std = None
    if is_first:
        shortcut_std = embedding.rows

    return SublayerRecord(
        name=sublayer.name,
        index=index,
        depth=sublayer.layer,
        kind=sublayer.report_kind,
        placement=None,
        shortcut_std=shortcut_std,
        shortcut_gain=None,
        bound=bound,
        weights=weights,
        parameters=list(sublayer.roles),
        notes={key: note for key, note in notes.items() if note},
    )


def _weights_by_role(
    sublayer: NamedSublayer, stats: Mapping[str, WeightStats]
) -> tuple[dict[str, WeightStats], list[str]]:
    """Return one matrix for each role, that of the largest norm, and the roles of several.

    A matrix without a role is listed by its own name inside the sub-layer. Experts share their
    roles.
    """
    # 1. The matrices of each role.
    by_role: dict[str, list[WeightStats]] = {}
    several: dict[str, None] = {}
    for name, role in sublayer.roles.items():
        if name not in stats or role == "positions":
            continue
        key = role or name.removeprefix(f"{sublayer.name}.").removesuffix(".weight")
        if key in by_role:
            several[key] = None
        by_role.setdefault(key, []).append(stats[name])

    # 2. The largest of each, the first of equal ones.
    weights = {role: max(matrices, key=_norm_or_zero) for role, matrices in by_role.items()}
    return weights, list(several)


def _norm_or_zero(weight: WeightStats) -> float:
    """Return the spectral norm of a matrix; 0 if it was not measured."""
    return weight.norm or 0.0


def bound_of_first_ffn(
    sublayer: NamedSublayer,
    model: NamedModel,
    stats: Mapping[str, WeightStats],
    phase: str,
    embedding: EmbeddingFacts,
) -> tuple[float | None, str]:
    """Return the bound of Eq. 15, or None and the reason."""
    # 1. The paper's case: an FFN of two matrices at init, after a known embedding.
    if phase != "init":
        return None, "Eq. 15 describes an initial state; these weights are trained"
    if sorted(sublayer.roles.values()) != ["W_1", "W_2"]:
        return None, "Eq. 15 is for an FFN of two matrices"
    if embedding.rows is None:
        return None, embedding.note

    # 2. Its numbers.
    names = {role: name for name, role in sublayer.roles.items()}
    first_std = stats[names["W_1"]].std
    second_std = stats[names["W_2"]].std
    sigma = embedding.rows.median
    if first_std is None or second_std is None or not sigma > 0:
        return None, "Eq. 15 needs finite weights and an embedding that is not zero"

    # 3. Its sizes.
    sizes = model.weights[names["W_1"]]
    if sizes.fan_in is None or sizes.fan_out is None:
        return None, "Eq. 15 needs the sizes of W_1, which its shape does not give"
    return bound_ffn(first_std, second_std, sigma, sizes.fan_in, sizes.fan_out), ""


def build_contract(state: Mapping[str, Tensor], model: NamedModel) -> ContractRecord:
    """Return the contract record: roles by name, sizes by shape. Tensors are read one at a time."""
    # 1. The sizes.
    sizes = _sizes_in_formulas(state, model)

    # 2. How each weight was drawn, and which numbers it shares with another.
    uses = without_adapters({name: weight.use for name, weight in model.weights.items()})
    draws = {}
    for name, weight in model.weights.items():
        draws[name] = draw_of(state[name], table=weight.role in TABLES)
    copies = copies_of(draws, state)
    streams = streams_of(draws, state)

    # 3. One record for each.
    weights = []
    for name, weight in model.weights.items():
        record = record_of(name, state[name].shape, uses[name], draws[name], kind=weight.kind)
        record = replace(record, same_as=copies.get(name, ""), stream_of=streams.get(name, ""))
        weights.append(record)
    return ContractRecord(family="", sizes=sizes, weights=with_sections(weights, state))


def _sizes_in_formulas(state: Mapping[str, Tensor], model: NamedModel) -> dict[str, float]:
    """Return the variables of formulas: N (layers), d (width) and V (vocabulary)."""
    sizes: dict[str, float] = {"N": model.layers}
    if model.width:
        sizes["d"] = model.width

    # The largest table is that of the tokens.
    tables = _embedding_tables(state, model)
    if tables:
        sizes["V"] = max(state[name].shape[0] for name in tables)
    return sizes


def _notes_on_layers(model: NamedModel) -> list[str]:
    """Return a note if layers share weights (ALBERT), or if no name is that of a residual layer."""
    if not model.sublayers:
        return [
            "no weight has a name that is known from a residual layer, so no layer is counted: "
            "their roles come from the model itself with --model FACTORY"
        ]

    # ALBERT runs each group of layers several times.
    if any("layer_groups" in sublayer.stack for sublayer in model.sublayers):
        return [
            "layers that share their weights are counted once: how often they run is not in the "
            "weights"
        ]
    return []
