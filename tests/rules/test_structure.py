"""JD212 to JD216 and JD407 to JD410: what must be named, what must not, and the boundaries."""

from __future__ import annotations

import copy
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacdiag
from jacdiag.errors import TraceError
from jacdiag.measure.computed_tables import narrower_type, table_of, tables_of
from jacdiag.measure.low_rank_adapters import adapters_of
from jacdiag.measure.state_space_rates import rates_of
from jacdiag.measure.tied_weights import declared_tie
from jacdiag.records import ContractRecord, Finding, Report, WeightRecord
from jacdiag.rules.init.computed_tables import fault_of
from jacdiag.rules.init.modulation import drawn_beside_zero

WIDTH = 32


# -- a model ----------
class Branch(nn.Module):
    """Feed-forward branch behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """Decoder of such branches. `combine` adds the branch of layer k to the stream."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, WIDTH)
        self.layers = nn.ModuleList(Branch() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 64, bias=False)

    def combine(self, x: Tensor, branch: Tensor, k: int) -> Tensor:
        return x + branch

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for k, layer in enumerate(self.layers):
            x = self.combine(x, layer(x), k)
        return self.head(x)


def tokens() -> Tensor:
    return torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0))


def build(cls: type[nn.Module] = Model, **options: Any) -> Any:
    torch.manual_seed(0)
    return cls(**options)


def audited(model: nn.Module) -> Report:
    return jacdiag.audit(model, tokens(), state="init", decide=True)


def found(model: nn.Module, code: str) -> list[Finding]:
    return [finding for finding in audited(model).findings if finding.code == code]


def loud(model: nn.Module, *codes: str) -> set[str]:
    """Return the codes at warning or above among some."""
    return {finding.code for finding in audited(model).findings if finding.level != "info"} & set(
        codes
    )


NEW = (
    "JD212",
    "JD213",
    "JD214",
    "JD215",
    "JD216",
    "JD401",
    "JD402",
    "JD407",
    "JD408",
    "JD409",
    "JD410",
)


def test_a_healthy_model_has_none() -> None:
    assert not loud(build(), *NEW)


# -- JD212: frequencies ----------
def frequencies(base: float = 10000.0, width: int = 64) -> Tensor:
    return base ** (-torch.arange(0, width, 2).float() / width)


def llama3(base: float = 500000.0) -> Tensor:
    plain = frequencies(base, 128)
    waves = 2 * math.pi / plain
    smooth = (8192 / waves - 1) / 3
    blended = (1 - smooth) * plain / 8 + smooth * plain
    return torch.where(waves > 8192, plain / 8, torch.where(waves < 2048, plain, blended))


def yarn(factor: float = 16.0) -> Tensor:
    plain = frequencies()
    ramp = ((torch.arange(32).float() - 8) / 12).clamp(0, 1)
    return plain / factor * ramp + plain * (1 - ramp)


CORRECT = {
    "plain": frequencies(),
    "small head": frequencies(width=8),
    "base 500,000": frequencies(500000.0, 128),
    "base 1,000,000": frequencies(1e6, 128),
    "linear scaling": frequencies() / 4,
    "NTK": frequencies(10000.0 * 8 ** (64 / 62)),
    "llama3": llama3(),
    "YaRN": yarn(),
    "LongRoPE": frequencies() / torch.linspace(1.0, 37.3, 32),
    "partial, with zeros": torch.cat([frequencies(width=32), torch.zeros(16)]),
    "for two axes": torch.cat([frequencies(width=32), frequencies(width=32)]),
    "ascending": frequencies().flip(0),
    "powers of two": 2.0 ** torch.arange(10),
    "powers of two times pi": math.pi * 2.0 ** torch.arange(10),
    "integers": torch.arange(1.0, 65.0),
    "evenly spaced": torch.linspace(1.0, 32.0, 64),
    "Fourier features": 16 * torch.randn(64, generator=torch.Generator().manual_seed(0)),
    "bfloat16 as such": frequencies().bfloat16(),
    "double": frequencies().double(),
}


@pytest.mark.parametrize("values", CORRECT.values(), ids=CORRECT.keys())
def test_no_scaling_of_frequencies_is_blamed(values: Tensor) -> None:
    assert fault_of(table_of("inv_freq", values, "frequencies")) == ""


@pytest.mark.parametrize(
    "name", ["plain", "small head", "linear scaling", "NTK", "llama3", "YaRN", "LongRoPE"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_frequencies_are_named(name: str, dtype: torch.dtype) -> None:
    rounded = CORRECT[name].to(dtype).float()
    assert "was rounded" in fault_of(table_of("inv_freq", rounded, "frequencies"))


def test_one_number_that_was_not_rounded_is_enough() -> None:
    values = frequencies().bfloat16().float()
    values[3] = frequencies()[3]
    assert narrower_type(values) == ""


def test_rounding_is_not_found_by_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    for width in (8, 16, 64, 128):
        for _ in range(200):
            base = float(10 ** (2 + 5 * torch.rand((), generator=generator)))
            assert narrower_type(frequencies(base, width)) == "", (base, width)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (torch.zeros(8), "is zero in every element"),
        (torch.full((8,), math.nan), "NaN or Inf in 8 of 8"),
        (torch.cat([frequencies(width=14), torch.tensor([math.inf])]), "NaN or Inf in 1 of 8"),
        (torch.tensor([0.0, 4.6e-41, 1e-22, 0.0]), "closer to it than 1e-30"),
    ],
)
def test_erased_frequencies_are_named(values: Tensor, words: str) -> None:
    assert words in fault_of(table_of("inv_freq", values, "frequencies"))


class Rotated(Model):
    """Model whose stream is multiplied by a sine and a cosine of a table of any name."""

    steps: Tensor

    def __init__(self, values: Tensor, both: bool = True) -> None:
        super().__init__()
        self.both = both
        self.register_buffer("steps", values, persistent=False)

    def combine(self, x: Tensor, branch: Tensor, k: int) -> Tensor:
        angles = torch.arange(x.shape[1])[:, None].float() * self.steps
        turned = branch * angles.cos()
        return x + (turned + branch * angles.sin() if self.both else turned)


def test_frequencies_are_known_by_the_dataflow_whatever_their_name() -> None:
    values = frequencies(width=2 * WIDTH)
    record = tables_of(jacdiag.sites(build(Rotated, values=values), tokens()))[0]
    assert (record.name, record.meaning) == ("steps", "frequencies")
    alone = tables_of(jacdiag.sites(build(Rotated, values=values, both=False), tokens()))[0]
    assert alone.meaning == ""


def test_a_finding_names_the_buffer_and_what_to_do() -> None:
    (finding,) = found(build(Rotated, values=torch.zeros(WIDTH)), "JD212")
    assert finding.level == "warning" and finding.evidence["parameters"] == ["steps"]
    assert "to_empty()" in finding.fix
    (finding,) = found(
        build(Rotated, values=frequencies(width=2 * WIDTH).bfloat16().float()), "JD212"
    )
    assert "after the cast" in finding.fix and "bfloat16" in finding.what
    assert not found(build(Rotated, values=frequencies(width=2 * WIDTH)), "JD212")


def test_a_trained_model_is_not_judged_by_its_tables() -> None:
    report = jacdiag.audit(
        build(Rotated, values=torch.zeros(WIDTH)), tokens(), state="trained", decide=True
    )
    assert not [finding for finding in report.findings if finding.code == "JD212"]


# -- JD212: other tables ----------
MASK = torch.full((4, 4), -math.inf).triu(1)
OTHERS = [
    ("causal_mask", "mask", MASK, False),
    ("causal_mask", "mask", torch.zeros(4, 4), True),
    ("causal_mask", "mask", torch.ones(4, 4, dtype=torch.bool).tril(), False),
    ("causal_mask", "mask", torch.zeros(4, 4, dtype=torch.bool), True),
    ("alibi", "slopes", 2.0 ** -torch.arange(1.0, 9.0), False),
    ("alibi", "slopes", 2.0 ** -torch.arange(0.0, 8.0), True),
    ("alibi", "slopes", 2.0 ** -(torch.arange(1.0, 9.0) / 2), False),
    ("alibi", "slopes", torch.zeros(8), True),
    ("alibi", "slopes", torch.ones(8), False),
    ("running_var", "variance", torch.ones(8), False),
    ("running_var", "variance", torch.full((8,), 0.9), False),
    ("running_var", "variance", torch.zeros(8), True),
    ("running_var", "variance", torch.tensor([1.0, 0.0, 1.0]), True),
    ("cos_cached", "rotation", torch.ones(4, 4), False),
    ("cos_cached", "rotation", torch.zeros(4, 4), True),
    ("freqs_cis", "rotation", torch.polar(torch.ones(4), torch.arange(4.0)), False),
    ("freqs_cis", "rotation", torch.zeros(4, dtype=torch.complex64), True),
    ("sinusoids", "sinusoid", torch.arange(16.0).view(4, 4).sin(), False),
    ("sinusoids", "sinusoid", torch.zeros(4, 4), True),
    # A buffer of no known meaning is left alone, unless it holds leftover memory and nothing else.
    ("window", "", torch.exp(-torch.linspace(-14, 14, 64).square() / 2), False),
    ("offset", "", torch.zeros(8), False),
    ("bound", "", torch.tensor([math.inf]), False),
    ("state", "", torch.tensor([-1e38]), False),
    ("scale", "", torch.tensor([0.0, 4.6e-41, 1.2e-22]), True),
]


@pytest.mark.parametrize(("name", "meaning", "values", "fires"), OTHERS)
def test_computed_tables_with_faults_are_found(
    name: str, meaning: str, values: Tensor, fires: bool
) -> None:
    assert bool(fault_of(table_of(name, values, meaning))) is fires


class Named(Model):
    """Model with one buffer of a name."""

    def __init__(self, name: str, values: Tensor) -> None:
        super().__init__()
        self.register_buffer(name, values)


@pytest.mark.parametrize(
    ("name", "shape", "meaning"),
    [
        ("inv_freq", (8,), "frequencies"),
        ("original_inv_freq", (8,), "frequencies"),
        ("cos_cached", (8, 8), "rotation"),
        ("sin", (8, 8), "rotation"),
        ("cosine_schedule", (8,), ""),
        ("running_var", (8,), "variance"),
        ("running_mean", (8,), ""),
        ("alibi_slopes", (8,), "slopes"),
        ("causal_mask", (8, 8), "mask"),
        ("mask", (8,), ""),
        ("masked_bias", (1,), ""),
        ("pe", (8, 8), "sinusoid"),
        ("pos_embed", (1, 8, 8), "sinusoid"),
        ("shape", (8,), ""),
    ],
)
def test_meaning_of_a_computed_table_by_its_name(
    name: str, shape: tuple[int, ...], meaning: str
) -> None:
    model = build(Named, name=name, values=torch.rand(shape))
    records = tables_of(jacdiag.sites(model, tokens()))
    assert [record.meaning for record in records] == [meaning]


def test_the_name_of_the_module_does_not_count() -> None:
    """I-BERT keeps zeros for the quantised weights of its position embeddings."""
    model = build()
    model.position_embeddings = nn.Module()
    model.position_embeddings.register_buffer("weight_integer", torch.zeros(8, 8))
    assert [record.meaning for record in tables_of(jacdiag.sites(model, tokens()))] == [""]
    assert not found(model, "JD212")


# -- JD213: time steps and decay rates ----------
class Recurrent(nn.Module):
    """Branch with a decay and a drive, both multiplied by a time step; `delta` leaves the drive out
    of it.
    """

    def __init__(self, delta: bool = False) -> None:
        super().__init__()
        self.delta = delta
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.dt_proj = nn.Linear(WIDTH, WIDTH)
        self.A_log = nn.Parameter(torch.rand(WIDTH).add(1).log())
        self.out = nn.Linear(WIDTH, WIDTH)
        step = torch.exp(torch.empty(WIDTH).uniform_(math.log(1e-3), math.log(0.1)))
        with torch.no_grad():
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        signal, step = self.inner(y), F.softplus(self.dt_proj(y))
        decay = torch.exp(-torch.exp(self.A_log) * step)
        return self.out(decay * signal if self.delta else decay * signal + step * signal)


class StateSpace(Model):
    """Model of such branches."""

    def __init__(self, delta: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Recurrent(delta) for _ in range(3))


def with_biases(values: Tensor | float, **options: Any) -> nn.Module:
    model = build(StateSpace, **options)
    with torch.no_grad():
        for layer in model.layers:
            layer.dt_proj.bias.copy_(torch.as_tensor(values))
    return model


def inverse(step: Tensor) -> Tensor:
    return step + torch.log(-torch.expm1(-step))


def test_published_time_steps_are_clean() -> None:
    assert not found(build(StateSpace), "JD213")


@pytest.mark.parametrize("bias", [0.0, 1.0, 0.02 * torch.ones(WIDTH)])
def test_overwritten_time_steps_are_named(bias: Tensor | float) -> None:
    (finding,) = found(with_biases(bias), "JD213")
    assert finding.level == "warning"
    assert finding.evidence["parameters"] == [f"layers.{k}.dt_proj.bias" for k in range(3)]
    assert "inverse softplus" in finding.fix


@pytest.mark.parametrize(("family", "level"), [("jamba", "info"), ("mamba", "warning")])
def test_families_whose_code_writes_constants_are_observed(family: str, level: str) -> None:
    model = with_biases(0.0)
    model.config = SimpleNamespace(model_type=family)  # type: ignore[assignment]
    (finding,) = found(model, "JD213")
    assert finding.level == level
    assert (f"the code of {family} in transformers writes these values" in finding.what) is (
        level == "info"
    )
    assert bool(finding.fix) is (level == "warning")


@pytest.mark.parametrize(
    ("step", "fires"),
    [(0.1, False), (0.11, True), (1e-4, False), (0.9e-4, True), (0.01, False)],
)
def test_the_ends_of_the_published_range(step: float, fires: bool) -> None:
    bias = inverse(torch.full((WIDTH,), step, dtype=torch.float64)).float()
    assert bool(found(with_biases(bias), "JD213")) is fires


def test_one_step_inside_the_range_is_enough() -> None:
    bias = torch.zeros(WIDTH)
    bias[5] = inverse(torch.tensor(0.01))
    assert not found(with_biases(bias), "JD213")


def test_a_softplus_of_the_decay_alone_is_not_judged() -> None:
    assert not found(with_biases(1.0, delta=True), "JD213")
    records = rates_of(jacdiag.sites(with_biases(1.0, delta=True), tokens()))
    assert {record.meaning for record in records} == {"decay"}


def test_a_softplus_without_decay_rates_is_not_judged() -> None:
    model = with_biases(1.0)
    for layer in model.layers:  # type: ignore[union-attr]
        layer.rates = layer.A_log
        del layer.A_log
        layer.A_log = 0.5  # a number, as a model without decay rates has it
        layer.forward = lambda x, own=layer: own.out(
            own.inner(own.norm(x)) * F.softplus(own.dt_proj(own.norm(x)))
        )
    assert rates_of(jacdiag.sites(model, tokens())) == []


def test_an_infinite_logarithm_of_a_decay_rate_is_named() -> None:
    model = build(StateSpace)
    with torch.no_grad():
        model.layers[1].A_log[3] = -math.inf
    (finding,) = found(model, "JD213")
    assert finding.evidence["parameters"] == ["layers.1.A_log"] and "1 elements" in finding.what


# -- JD214: ties ----------
def tied(said: Any, *, shared: bool, equal: bool = False, **more: Any) -> nn.Module:
    model = build()
    if said is not None:
        model.config = SimpleNamespace(model_type="x", tie_word_embeddings=said, **more)
    if shared:
        model.head.weight = model.embed.weight
    elif equal:
        with torch.no_grad():
            model.head.weight.copy_(model.embed.weight)
    return model


@pytest.mark.parametrize(
    ("said", "shared", "equal", "words"),
    [
        (True, True, False, ""),
        (False, False, False, ""),
        (None, False, False, ""),
        (None, True, False, ""),
        (True, False, False, "two tensors with different values"),
        (True, False, True, "two tensors with the same values at this moment"),
        (False, True, False, "is false, but the head reads embed.weight"),
    ],
)
def test_jd214_fires_when_config_and_tying_disagree(
    said: bool | None, shared: bool, equal: bool, words: str
) -> None:
    findings = found(tied(said, shared=shared, equal=equal), "JD214")
    assert bool(findings) is bool(words)
    assert all(words in finding.what and finding.fix for finding in findings)


def test_head_and_embedding_of_unlike_shapes_are_no_pair() -> None:
    model = tied(True, shared=False)
    model.head = nn.Linear(WIDTH, 48, bias=False)
    assert not found(model, "JD214")


def test_embedding_accessors_of_the_model_select_the_tensors() -> None:
    model = tied(True, shared=False)
    model.get_input_embeddings = lambda: model.embed
    model.get_output_embeddings = lambda: model.head
    (finding,) = found(model, "JD214")
    assert finding.evidence["parameters"] == ["head.weight", "embed.weight"]


def test_a_head_that_shares_another_table_is_tied() -> None:
    model = tied(True, shared=False)
    model.decoder_embed = nn.Embedding(64, WIDTH)
    model.head.weight = model.decoder_embed.weight
    model.get_input_embeddings = lambda: model.embed
    model.get_output_embeddings = lambda: model.head
    assert not found(model, "JD214")


@pytest.mark.parametrize(
    ("outer", "inner", "keys", "expected"),
    [
        (True, None, "unset", (True, "config.tie_word_embeddings")),
        (None, True, "unset", (True, "config.text_config.tie_word_embeddings")),
        (False, True, "unset", (None, "")),
        (True, True, "unset", (True, "config.tie_word_embeddings")),
        (True, None, None, (None, "")),
        (True, None, ["head.weight"], (True, "config.tie_word_embeddings")),
    ],
)
def test_source_of_the_tying_option_in_config_and_keys(
    outer: bool | None, inner: bool | None, keys: Any, expected: tuple[bool | None, str]
) -> None:
    model = nn.Module()
    model.config = SimpleNamespace()  # type: ignore[assignment]
    if outer is not None:
        model.config.tie_word_embeddings = outer
    if inner is not None:
        model.config.text_config = SimpleNamespace(tie_word_embeddings=inner)
    if keys != "unset":
        model._tied_weights_keys = keys
    assert declared_tie(model) == expected


# -- JD215: adapters ----------
class Adapted(nn.Module):
    """A linear map with a low-rank addition."""

    def __init__(self, base: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def adapted(kind: str) -> nn.Module:
    model = build()
    for layer in model.layers:
        layer.up = Adapted(layer.up)
        first, second = layer.up.lora_A.weight, layer.up.lora_B.weight
        if kind in ("second zero", "both zero"):
            nn.init.zeros_(second)
        if kind in ("first zero", "both zero"):
            nn.init.zeros_(first)
        if kind == "decomposed":
            left, values, right = torch.linalg.svd(
                layer.up.base_layer.weight.detach(), full_matrices=False
            )
            root = values[:8].sqrt()
            with torch.no_grad():
                second.copy_(left[:, :8] * root)
                first.copy_(root[:, None] * right[:8])
    return model


@pytest.mark.parametrize(
    ("kind", "words", "names"),
    [
        ("second zero", "", ""),
        ("first zero", "", ""),
        ("decomposed", "", ""),
        ("both zero", "no gradient can reach either", "lora_[AB]"),
        ("both drawn", "not its base at the start", "lora_B"),
    ],
)
def test_jd215_names_low_rank_adapters_without_gradient(kind: str, words: str, names: str) -> None:
    findings = found(adapted(kind), "JD215")
    assert bool(findings) is bool(words)
    for finding in findings:
        assert words in finding.what and finding.fix
        assert all("lora_B" in name for name in finding.evidence["parameters"]) is (
            names == "lora_B"
        )


def test_no_gradient_reaches_an_adapter_that_is_zero_on_both_sides() -> None:
    model = adapted("both zero")
    model(tokens()).square().sum().backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None and not parameter.grad.any()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("q.lora_A", "q.lora_B"),
        ("q.lora_A.default.weight", "q.lora_B.default.weight"),
        ("q.lora_embedding_A.default", "q.lora_embedding_B.default"),
        ("unet.lora_down.weight", "unet.lora_up.weight"),
        ("processor.to_q_lora_down.weight", "processor.to_q_lora_up.weight"),
    ],
)
def test_adapter_factors_are_paired_by_name(first: str, second: str) -> None:
    pairs = adapters_of(
        {first: torch.zeros(2, 4), second: torch.zeros(4, 2), "flora_A": torch.zeros(1)}
    )
    assert [(pair.first, pair.second) for pair in pairs] == [(first, second)]


class Diagonal(Adapted):
    """A low-rank addition with a factor for each of its ranks, as AdaLoRA has it."""

    def __init__(self, base: nn.Linear, middle: str) -> None:
        super().__init__(base)
        self.middle = middle
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.lora_A["default"] = nn.Parameter(torch.randn(8, base.in_features) * 0.02)
        self.lora_B["default"] = nn.Parameter(torch.randn(base.out_features, 8) * 0.02)
        holder = nn.ParameterDict({"default": nn.Parameter(torch.randn(8, 1) * 0.02)})
        setattr(self, middle, holder)

    def forward(self, x: Tensor) -> Tensor:
        scales = getattr(self, self.middle)["default"]
        return (
            self.base_layer(x) + x @ (self.lora_A["default"] * scales).T @ self.lora_B["default"].T
        )


def three_factors(*zeros: str, middle: str = "lora_E") -> set[str]:
    """Return the words of JD215 for AdaLoRA's product of three factors, some of them zero."""
    model = build()
    for layer in model.layers:
        layer.up = Diagonal(layer.up, middle)
        for name, parameter in layer.up.named_parameters():
            if name.removesuffix(".default") in zeros:
                nn.init.zeros_(parameter)
    return {finding.what.rpartition(": ")[2] for finding in found(model, "JD215")}


def test_adapters_of_three_factors() -> None:
    dead, changed = "no gradient can reach either", "the adapted model is not its base at the start"
    assert three_factors("lora_E") == three_factors("lora_B") == set()
    assert three_factors() == {changed}
    assert three_factors("lora_A", "lora_E") == three_factors("lora_B", "lora_E") == {dead}
    # A zero bias of the addition is no factor.
    assert three_factors("lora_bias", middle="lora_bias") == {changed}


# -- JD216: modulations ----------
def modulations(blocks: str, last: str, name: str = "adaLN_modulation.1.weight") -> ContractRecord:
    weights = [
        WeightRecord(f"blocks.{k}.{name}", [8, 8], "", f"blocks.*.{name}", family=blocks)
        for k in range(3)
    ]
    return ContractRecord(
        "x", {}, [*weights, WeightRecord(f"final_layer.{name}", [8, 8], "", "", family=last)]
    )


@pytest.mark.parametrize(
    ("blocks", "last", "name", "fires"),
    [
        ("normal", "zero", "adaLN_modulation.1.weight", True),
        ("zero", "normal", "adaLN_modulation.1.weight", True),
        ("zero", "zero", "adaLN_modulation.1.weight", False),
        ("normal", "uniform", "adaLN_modulation.1.weight", False),
        ("normal", "zero", "img_modulation.linear.weight", True),
        ("normal", "zero", "proj.weight", False),
        ("normal", "zero", "modulations.list", False),
    ],
)
def test_modulations_drawn_next_to_zero_ones_are_found(
    blocks: str, last: str, name: str, fires: bool
) -> None:
    pairs = drawn_beside_zero(modulations(blocks, last, name))
    assert bool(pairs) is fires
    for drawn, zero in pairs:
        assert {weight.family for weight in zero} == {"zero"} and len(drawn) + len(zero) == 4


# -- JD402: gates outside the branch, buffers, two zeros ----------
class Gated(Model):
    """Model whose branches are multiplied by a gate that is computed from the tokens, outside
    them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.condition = nn.Linear(WIDTH, WIDTH)
        self.gates = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in self.layers)
        for gate in self.gates:
            nn.init.zeros_(gate.weight)
            nn.init.zeros_(gate.bias)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        condition = F.silu(
            self.condition(ids.float().mean(1, keepdim=True).unsqueeze(-1).expand(-1, 1, WIDTH))
        )
        for layer, gate in zip(self.layers, self.gates, strict=True):
            x = x + gate(condition) * layer(x)
        return self.head(x)


def test_zero_gates_outside_all_branches_are_an_init() -> None:
    (finding,) = found(build(Gated), "JD402")
    assert finding.level == "info" and "a zero-initialised branch" in finding.what
    assert set(finding.evidence["parameters"]) == {
        f"gates.{k}.{part}" for k in range(3) for part in ("weight", "bias")
    }


def test_a_zero_gate_outside_one_branch_is_a_warning() -> None:
    model = build(Gated)
    for gate in (model.gates[0], model.gates[2]):
        nn.init.normal_(gate.weight)
    (finding,) = found(model, "JD402")
    assert finding.level == "warning" and finding.where == ["layers.1"]
    assert "gates.1.weight" in finding.evidence["parameters"] and "gates.1.weight" in finding.fix


class Scaled(Model):
    """Model whose branches are multiplied by buffers."""

    def __init__(self, value: float) -> None:
        super().__init__()
        for layer in self.layers:
            layer.register_buffer("factor", torch.tensor(value))

    def combine(self, x: Tensor, branch: Tensor, k: int) -> Tensor:
        return x + self.layers[k].factor * branch


def test_a_zero_buffer_is_no_init() -> None:
    (finding,) = found(build(Scaled, value=0.0), "JD402")
    assert finding.level == "warning" and "in a buffer, which no step changes" in finding.what
    assert finding.evidence["parameters"] == [f"layers.{k}.factor" for k in range(3)]
    assert "to_empty()" in finding.fix
    assert all("factor" in finding.what for finding in found(build(Scaled, value=0.0), "JD401"))
    assert not loud(build(Scaled, value=0.1), "JD401", "JD402")


class TwoZeros(Model):
    """Model whose branches end in two projections."""

    def __init__(self, zeros: int, bias: bool) -> None:
        super().__init__()
        for layer in self.layers:
            layer.down = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
            for part in list(layer.down)[:zeros]:
                nn.init.zeros_(part.weight)
            if not bias:
                nn.init.zeros_(layer.down[0].bias)


@pytest.mark.parametrize(
    ("zeros", "bias", "level"), [(1, False, "info"), (2, False, "warning"), (2, True, "info")]
)
def test_two_zeros_in_a_row_block_one_another(zeros: int, bias: bool, level: str) -> None:
    """A bias between them lets the second matrix learn, and then the first."""
    (finding,) = found(build(TwoZeros, zeros=zeros, bias=bias), "JD402")
    assert finding.level == level
    assert ("no gradient reaches any of them" in finding.what) is (level == "warning")
    assert ("all but one" in finding.fix) is (level == "warning")


# -- JD407: a zero shortcut ----------
class Factor(Model):
    """Model with a learned factor on shortcut or branch."""

    def __init__(self, value: float, operand: str) -> None:
        super().__init__()
        self.operand = operand
        self.alpha = nn.ParameterList(torch.full((1,), value) for _ in self.layers)

    def combine(self, x: Tensor, branch: Tensor, k: int) -> Tensor:
        if self.operand == "branch":
            return x + self.alpha[k] * branch
        return self.alpha[k] * x + branch


@pytest.mark.parametrize(
    ("value", "operand", "fires"),
    [
        (0.0, "shortcut", True),
        (1e-6, "shortcut", False),
        (1.0, "shortcut", False),
        (0.0, "branch", False),
    ],
)
def test_jd407_fires_for_a_zero_factor_on_the_shortcut(
    value: float, operand: str, fires: bool
) -> None:
    findings = found(build(Factor, value=value, operand=operand), "JD407")
    assert bool(findings) is fires
    for finding in findings:
        assert finding.evidence["parameters"] == [f"alpha.{k}" for k in range(3)]
        assert finding.level == "warning" and "not the shortcut" in finding.fix


class NoShortcut(Model):
    def combine(self, x: Tensor, branch: Tensor, k: int) -> Tensor:
        return 0.0 * x + branch if k == 1 else x + branch


def test_a_zero_that_is_no_parameter_is_not_blamed_on_one() -> None:
    (finding,) = found(build(NoShortcut), "JD407")
    assert (
        finding.evidence["parameters"] == [] and "no parameter on the way is zero" in finding.what
    )
    assert finding.where == ["layers.1"] and not finding.fix


# -- JD410: no shortcut ----------
class NoSum(Model):
    """Model of which some layers have no sum."""

    cut: tuple[int, ...] = (1,)

    def combine(self, x: Tensor, branch: Tensor, k: int) -> Tensor:
        return branch if k in self.cut else x + branch


class NoSums(NoSum):
    cut = (0, 2)


@pytest.mark.parametrize(
    ("cls", "parts", "like"),
    [(NoSum, ["layers.1"], "layers.0"), (NoSums, ["layers.0", "layers.2"], "layers.1")],
)
@pytest.mark.parametrize("state", ["init", "trained"])
def test_jd410_names_the_layers_without_a_shortcut(
    cls: type[Model], parts: list[str], like: str, state: Any
) -> None:
    report = jacdiag.audit(build(cls), tokens(), state=state, decide=True)
    (finding,) = [finding for finding in report.findings if finding.code == "JD410"]
    assert finding.where == parts and finding.level == "warning"
    assert finding.what.endswith(f"as one does around {like}")
    assert all(name in finding.what and name in finding.fix for name in parts)
    assert [record.part for record in report.model.missing_shortcuts] == parts
    assert Report.from_dict(report.to_dict()).model == report.model
    assert report.verdict not in ("pass", "observed")


def test_jd410_is_clean_where_every_layer_has_a_shortcut() -> None:
    (rule,) = [rule for rule in audited(build()).rules if rule.code == "JD410"]
    assert rule.status == "clean" and rule.matched


# -- JD408: DeepNorm ----------
class PostNorm(nn.Module):
    """Post-norm feed-forward and attention, with Xavier times beta and a factor on one of the
    operands.
    """

    def __init__(
        self, beta: float, on_shortcut: float = 1.0, on_branch: float = 1.0, layers: int = 4
    ) -> None:
        super().__init__()
        self.on_shortcut, self.on_branch = on_shortcut, on_branch
        self.embed = nn.Embedding(64, WIDTH)
        names = ("q", "k", "v", "o", "up", "down")
        sizes = {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {name: nn.Linear(*sizes.get(name, (WIDTH, WIDTH)), bias=False) for name in names}
            )
            for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * layers))
        self.head = nn.Linear(WIDTH, 64, bias=False)
        for layer in self.layers:
            for name in names:
                nn.init.xavier_normal_(layer[name].weight, 1.0 if name in ("q", "k") else beta)

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        x = x if self.on_shortcut == 1 else self.on_shortcut * x
        return x + (branch if self.on_branch == 1 else self.on_branch * branch)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for k, layer in enumerate(self.layers):
            mixed = F.scaled_dot_product_attention(layer["q"](x), layer["k"](x), layer["v"](x))
            x = self.norms[2 * k](self.add(x, layer["o"](mixed)))
            x = self.norms[2 * k + 1](self.add(x, layer["down"](layer["up"](x).relu())))
        return self.head(x)


@pytest.mark.parametrize(
    ("options", "fires"),
    [
        ({"beta": 32**-0.25, "on_shortcut": 8**0.25}, False),
        ({"beta": 32**-0.25, "on_branch": 8**0.25}, True),
        ({"beta": 32**-0.25}, True),
        ({"beta": 1.0}, False),
        ({"beta": 0.5}, False),
    ],
)
def test_jd408_fires_for_incomplete_deepnorm(options: dict[str, float], fires: bool) -> None:
    findings = found(build(PostNorm, **options), "JD408")
    assert bool(findings) is fires
    for finding in findings:
        assert finding.evidence["expected"] == pytest.approx(8**0.25) and "1.68" in finding.fix


# -- JD401 and JD409: detached operands ----------
class Detached(Model):
    """Model with a detach in its second layer."""

    def __init__(self, what: str, everywhere: bool = False) -> None:
        super().__init__()
        self.what, self.everywhere = what, everywhere
        if what == "inner":
            cut = range(len(self.layers)) if everywhere else [1]
            self.extra = nn.ModuleDict({str(k): nn.Linear(WIDTH, WIDTH) for k in cut})

    def combine(self, x: Tensor, branch: Tensor, k: int) -> Tensor:
        if k != 1 and not self.everywhere:
            return x + branch
        match self.what:
            case "shortcut":
                return x.detach() + branch
            case "branch":
                return x + branch.detach()
            case "data":
                return x + branch.data
            case "inner":
                return x + self.extra[str(k)](branch.detach())
            case "input":
                return x + self.layers[k](x.detach())
            case "straight-through":
                return x + branch + (x.round() - x).detach()
            case _:
                return x + branch


@pytest.mark.parametrize(
    ("what", "codes"),
    [
        ("shortcut", {"JD409"}),
        ("branch", {"JD401"}),
        ("straight-through", set()),
        ("nothing", set()),
    ],
)
def test_jd409_and_jd401_name_the_detached_operand(what: str, codes: set[str]) -> None:
    model = build(Detached, what=what)
    assert loud(model, "JD401", "JD409") == codes
    for finding in audited(model).findings:
        if finding.code in codes:
            assert (
                "detach in" in finding.what and "test_structure.py" in finding.what and finding.fix
            )
            assert all(
                "layers.1" in name or "model" in name or ".py:" in name for name in finding.where
            )


def test_a_detached_branch_that_is_frozen_is_meant() -> None:
    model = build(Detached, what="branch")
    model.layers[1].requires_grad_(False)
    assert not loud(model, "JD401", "JD409")


@pytest.mark.parametrize("what", ["shortcut", "branch"])
def test_model_whose_operands_are_all_detached_gets_a_clear_error(what: str) -> None:
    with pytest.raises(jacdiag.JacdiagError, match=f"cuts the {what} of an addition"):
        audited(build(Detached, what=what, everywhere=True))


def without_gradient(model: nn.Module) -> set[str]:
    """Return the parameters in training that autograd gives no gradient."""
    model.zero_grad()
    model(tokens()).square().mean().backward()
    return {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}


def refusal(model: nn.Module) -> TraceError:
    with pytest.raises(TraceError) as caught:
        audited(model)
    return caught.value


@pytest.mark.parametrize("what", ["branch", "data", "inner"])
def test_refusal_names_the_parameters_before_a_detach(what: str) -> None:
    model = build(Detached, what=what, everywhere=True)
    error = refusal(model)
    assert set(error.parameters) == without_gradient(model) != set()
    assert "no gradient arrives: layers.*." in str(error) and "without the detach" in str(error)


@pytest.mark.parametrize("what", ["branch", "data", "inner"])
def test_all_parameters_of_a_detached_branch_are_named(what: str) -> None:
    model = build(Detached, what=what)
    (finding,) = found(model, "JD401")
    assert finding.level == "warning" and set(finding.where) == without_gradient(model)


def test_a_refusal_blames_no_frozen_branch() -> None:
    model = build(Detached, what="branch", everywhere=True)
    model.layers.requires_grad_(False)
    error = refusal(model)
    assert (
        error.parameters == []
        and "no gradient" not in str(error)
        and "without the detach" not in str(error)
    )

    # Only the trained part of a branch misses its gradient.
    model.layers[0].norm.requires_grad_(True)
    assert (
        set(refusal(model).parameters)
        == without_gradient(model)
        == {"layers.0.norm.weight", "layers.0.norm.bias"}
    )


@pytest.mark.parametrize("what", ["shortcut", "input"])
def test_a_refusal_names_no_parameter_that_learns(what: str) -> None:
    """Behind a cut shortcut, and in a branch that reads a detached stream, all parameters learn."""
    model = build(Detached, what=what, everywhere=True)
    assert not without_gradient(model)
    error = refusal(model)
    assert error.parameters == [] and "no gradient" not in str(error)


def test_a_parameter_that_is_read_twice_is_not_cut_off() -> None:
    model = build(Detached, what="branch", everywhere=True)
    model.head.weight = model.layers[0].up.weight
    named = set(refusal(model).parameters)
    assert named == without_gradient(model)
    assert "layers.0.up.weight" not in named and "layers.0.up.bias" in named


# -- the report ----------
def test_structure_records_survive_json_and_older_reports_load() -> None:
    model = build(Rotated, values=frequencies(width=2 * WIDTH))
    model.config = SimpleNamespace(tie_word_embeddings=True)
    report = audited(model)
    assert (
        report.contract is not None and report.contract.tables and report.contract.tie is not None
    )
    assert Report.from_json(report.to_json()).contract == report.contract

    data = json.loads(report.to_json())
    for key in ("tables", "rates", "adapters", "tie", "zero_shortcuts"):
        del data["contract"][key]
    del data["network"]["backward"]["cut_shortcuts"]
    old = Report.from_json(json.dumps(data))
    assert old.contract is not None and old.contract.tables == [] and old.contract.tie is None


def test_the_model_is_left_as_it_was() -> None:
    model = build(Gated)
    model.register_buffer("inv_freq", torch.zeros(4))
    before = copy.deepcopy(model.state_dict())
    audited(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
