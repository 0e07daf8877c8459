"""No gradient, and branches without a Jacobian: what is said, what is named, and what is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from measure import flow_models as models
from torch import Tensor, nn

import jacdiag
from jacdiag.measure.gradients import gradient_profile
from jacdiag.records import Finding, Report

Decoder = models.Decoder


def audited(model: nn.Module, **options: object) -> Report:
    return jacdiag.audit(model, models.ids(), decide=True, state="init", **options)  # type: ignore[arg-type]


def found(model: nn.Module, code: str = "JD401", **options: object) -> list[Finding]:
    return [finding for finding in audited(model, **options).findings if finding.code == code]


# -- figures ---------------------------------------------
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_parameters_are_those_of_a_plain_backward(tied: bool) -> None:
    model, ids = models.decoder(tied=tied), models.ids()
    profile = gradient_profile(jacdiag.sites(model, ids), ids)
    assert profile is not None and profile.parameters is not None
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert profile.parameters[name] == pytest.approx(
            float(parameter.grad.norm()), rel=1e-4, abs=1e-7
        ), name


def test_the_model_keeps_its_own_gradients() -> None:
    model, ids = models.decoder(), models.ids()
    model(ids).sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    audited(model)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.equal(parameter.grad, before[name])


def test_the_embedding_is_compared_with_the_median_of_the_other_matrices() -> None:
    model, ids = models.decoder(), models.ids()
    report = audited(model)
    F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    norms = {
        name: float(p.grad.norm())
        for name, p in model.named_parameters()
        if p.grad is not None and p.dim() > 1
    }
    own = norms.pop("wte.weight")
    others = sorted(norms.values())
    middle = len(others) // 2
    median = others[middle] if len(others) % 2 else (others[middle - 1] + others[middle]) / 2
    assert report.network is not None and report.network.backward is not None
    assert report.network.backward.embedding == "wte.weight"
    assert report.network.backward.embedding_share == pytest.approx(own / median, rel=1e-4)


def test_low_precision_has_a_reason_and_still_a_stream() -> None:
    report = audited(models.decoder().bfloat16())
    assert report.network is not None and report.network.gradient_norms is not None
    assert report.network.backward is not None and report.network.backward.dead == []
    assert "converted" in report.network.backward.notes["embedding_norm"]
    assert all(
        row.gradient_norm is None and "converted" in row.notes["gradient_norm"]
        for row in report.sublayers
    )


# -- weights ---------------------------------------------
def zero(*names: str) -> nn.Module:
    model = models.decoder()
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).zero_()
    return model


def test_a_healthy_model_has_no_finding() -> None:
    report = audited(models.decoder())
    assert not [f for f in report.findings if f.code.startswith("JD4")]
    assert {r.status for r in report.rules if r.code in ("JD401", "JD402", "JD406")} == {"clean"}


def test_a_zero_final_gain_is_named_and_gets_a_gradient_itself() -> None:
    [finding] = found(zero("norm.weight"))
    assert finding.level == "warning" and finding.evidence["parameters"] == ["norm.weight"]
    assert len(finding.where) == 6
    assert "norm.weight is 0" in finding.what and "the first step changes" in finding.what


def test_a_zero_head_alone_is_an_info() -> None:
    [finding] = found(zero("head.weight"))
    assert finding.level == "info" and finding.evidence["parameters"] == ["head.weight"]
    assert "the first step changes" in finding.what


def test_a_zero_gain_and_a_zero_head_are_named_together() -> None:
    [finding] = found(zero("norm.weight", "head.weight"))
    assert finding.level == "warning" and set(finding.evidence["parameters"]) == {
        "norm.weight",
        "head.weight",
    }
    assert "all of them" in finding.what and "no step changes" in finding.what


def test_other_constants_are_not_named() -> None:
    """All gains are one and many biases zero: constant, and not the cause."""
    model = zero("norm.weight", *(f"h.{k}.mlp.w{n}.bias" for k in range(3) for n in (1, 2)))
    [finding] = found(model)
    assert finding.evidence["parameters"] == ["norm.weight"]


def test_a_cause_that_is_no_constant_is_not_guessed() -> None:
    class Dead(Decoder):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.wte(ids)
            for block in self.h:
                x = block(x)
            return self.head(F.relu(self.norm(x) - 1e6) + 1)

    [finding] = found(models.decoder(Dead))
    assert finding.level == "warning" and "the cause is not known" in finding.what
    assert finding.evidence["parameters"] == [] and finding.fix == ""


# -- code ---------------------------------------------
def cut_by(cut: Callable[[Tensor], Tensor]) -> type[Decoder]:
    class Cut(Decoder):
        def between(self, x: Tensor, index: int) -> Tensor:
            return cut(x) if index == 2 else x

    return Cut


def without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x * 1


CUTS = {"detach": lambda x: x.detach(), "data": lambda x: x.data, "no_grad": without_grad}
LOWER = ["h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp"]


@pytest.mark.parametrize("name", CUTS)
def test_a_stream_that_is_cut_names_the_call_and_all_below_it(name: str) -> None:
    [finding] = found(models.decoder(cut_by(CUTS[name])))
    assert finding.level == "warning" and finding.where == LOWER
    [call] = finding.evidence["calls"]
    assert call.startswith(f"{name} in ") and "test_dead_paths.py:" in call and call in finding.what


@pytest.mark.parametrize("name", CUTS)
def test_what_is_frozen_below_a_cut_is_not_blamed(name: str) -> None:
    model = models.decoder(cut_by(CUTS[name]))
    for part in (model.wte, model.h[0], model.h[1]):
        part.requires_grad_(False)
    report = audited(model)
    assert not [f for f in report.findings if f.code == "JD401"]
    assert "frozen" in next(r.note for r in report.rules if r.code == "JD401")


def test_an_embedding_that_is_cut_off_is_named() -> None:
    class Cut(Decoder):
        def between(self, x: Tensor, index: int) -> Tensor:
            return x.detach() if index == 0 else x

    [finding] = found(models.decoder(Cut))
    assert finding.level == "warning" and finding.where == ["wte.weight"]
    assert finding.evidence["calls"][0].startswith("detach in ")
    model = models.decoder(Cut)
    model.wte.requires_grad_(False)
    assert not found(model)


def test_blocks_that_run_again_with_a_gradient_are_an_info() -> None:
    """All but the last of several cycles through the same weights run without a gradient, on
    purpose.
    """

    class Cycles(Decoder):
        def forward(self, ids: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.wte(ids) * 1
                for block in self.h:
                    x = block(x)
            x = x + self.wte(ids)
            for block in self.h:
                x = block(x)
            return self.head(self.norm(x))

    [finding] = found(models.decoder(Cycles))
    assert finding.level == "info" and "uses them again" in finding.what and finding.fix == ""


def test_a_frozen_model_is_not_blamed_and_stays_frozen() -> None:
    model = models.decoder().requires_grad_(False)
    assert not found(model)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_frozen_model_with_a_zero_gain_is() -> None:
    model = zero("norm.weight").requires_grad_(False)
    assert [f.evidence["parameters"] for f in found(model)] == [["norm.weight"]]


def test_no_grad_inside_a_branch_names_that_branch_only() -> None:
    class Inside(models.Attention):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    model = models.decoder()
    inner = Inside()
    inner.load_state_dict(model.h[1].attn.state_dict())
    model.h[1].attn = inner
    [finding] = found(model)
    assert finding.where == ["h.1.attn"] and finding.evidence["calls"][0].startswith("no_grad in ")


def test_stream_that_does_not_reach_the_loss_is_not_blamed() -> None:
    """The loss is of the first output; the blocks lead to the second alone."""

    class Beside(Decoder):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.wte(ids)
            logits = self.head(x)
            for block in self.h:
                x = block(x)
            return logits, self.norm(x)  # type: ignore[return-value]

    report = audited(models.decoder(Beside))
    assert not [f for f in report.findings if f.code == "JD401"]
    rule = next(r for r in report.rules if r.code == "JD401")
    assert rule.status == "not-applicable" and "loss" in rule.note


# -- branches ---------------------------------------------
def test_zero_initialised_outputs_of_all_layers_are_an_info() -> None:
    names = [
        f"h.{k}.{part}"
        for k in range(3)
        for part in ("attn.o.weight", "mlp.w2.weight", "mlp.w2.bias")
    ]
    model = zero(*names)
    [finding] = found(model, "JD402")
    assert (
        finding.level == "info" and len(finding.where) == 6 and "zero-initialised" in finding.what
    )
    assert not found(model)


def test_one_zero_output_among_others_is_a_warning() -> None:
    [finding] = found(zero("h.1.mlp.w2.weight", "h.1.mlp.w2.bias"), "JD402")
    assert finding.level == "warning" and finding.where == ["h.1.mlp"]
    assert (
        finding.evidence["parameters"] == ["h.1.mlp.w2.weight"]
        and "not so in every layer" in finding.what
    )


class Gated(nn.Module):
    """ReZero: each branch times a learned number that begins at zero; matrices in nn.Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in range(3))
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)) for _ in range(3)
        )
        self.embed, self.head = (
            nn.Embedding(models.VOCABULARY, 16),
            nn.Linear(16, models.VOCABULARY),
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for gate, part in zip(self.gates, self.parts, strict=True):
            x = x + gate * part(x)
        return self.head(x)


def test_rezero_is_an_info_and_its_gates_learn() -> None:
    torch.manual_seed(0)
    model = Gated()
    [finding] = found(model, "JD402")
    assert finding.level == "info" and finding.evidence["parameters"] == [
        "gates.0",
        "gates.1",
        "gates.2",
    ]
    assert not found(model)


def test_rezero_with_zero_matrices_never_learns() -> None:
    torch.manual_seed(0)
    model = Gated()
    with torch.no_grad():
        for part in model.parts:
            part[2].weight.zero_()
            part[2].bias.zero_()
    dead = found(model)
    assert [f.where for f in dead] == [["parts.0"], ["parts.1"], ["parts.2"]]
    assert all(f.level == "warning" and "no step changes" in f.what for f in dead)
    # all layers alike, and yet no init: the zeros block one another
    [branches] = found(model, "JD402")
    assert branches.level == "warning" and "no gradient reaches any of them" in branches.what


@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_layer_whose_relu_is_never_active_is_a_warning(bias: float) -> None:
    model = models.decoder()
    with torch.no_grad():
        model.h[1].mlp.w1.bias.fill_(-100.0)
        model.h[1].mlp.w2.bias.fill_(bias)
    [finding] = found(model, "JD402")
    assert finding.level == "warning" and finding.where == ["h.1.mlp"]
    assert finding.evidence["parameters"] == ["h.1.mlp.w1.bias"] and "is -100" in finding.what
    assert ("is zero, the value is not" in finding.what) == bool(bias)
    assert ("exactly zero, value and Jacobian" in finding.what) != bool(bias)


def test_a_dead_relu_of_unlike_biases_has_no_named_cause() -> None:
    model = models.decoder()
    with torch.no_grad():
        model.h[1].mlp.w1.bias.copy_(-100.0 - torch.arange(2 * models.WIDTH))
    [finding] = found(model, "JD402")
    assert finding.level == "warning" and "the cause is not known for h.1.mlp" in finding.what


class PostNorm(Decoder):
    """The same blocks with the norm behind each sum."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        for block in self.h:
            x = block.norm1(x + block.attn(x))
            x = block.norm2(x + block.mlp(x))
        return self.head(x)


def test_a_zero_gain_in_the_middle_of_a_post_norm_model() -> None:
    model = models.decoder(PostNorm)
    with torch.no_grad():
        model.h[1].norm2.weight.zero_()
        model.h[1].norm2.bias.zero_()
    dead = found(model)
    assert dead[0].where == LOWER and dead[0].evidence["parameters"] == ["h.1.norm2.weight"]
    behind = [f for f in dead[1:] if f.evidence["cause"] != "input"]
    assert not behind, "what stands behind it reads a stream of zeros, and says so"
    assert not found(model, "JD402")


# -- not finite ---------------------------------------------
def test_a_gradient_of_nan_is_not_called_zero() -> None:
    class Root(Decoder):
        def between(self, x: Tensor, index: int) -> Tensor:
            return x + (x * 0).pow(2).sum(-1, keepdim=True).sqrt() if index == 1 else x

    model = models.decoder(Root)
    [finding] = found(model, "JD406")
    assert finding.level == "warning" and "the stream at h.0.attn" in finding.evidence["names"]
    assert "although the loss is finite" in finding.what
    assert not found(model)


# -- numbers next to nothing ---------------------------------------------
def with_tiny(*names: str) -> nn.Module:
    """Return a model whose named parameters hold what empty memory may hold: numbers below
    1e-25.
    """
    model = models.decoder()
    with torch.no_grad():
        for name in names:
            parameter = model.get_parameter(name)
            parameter.copy_(torch.rand_like(parameter) * 1e-25)
    return model


def test_numbers_next_to_nothing_are_a_cause_and_their_size_is_said() -> None:
    matrices = ["h.1.mlp.w1.weight", "h.1.mlp.w2.weight"]
    [finding] = found(with_tiny(*matrices, "h.1.mlp.w1.bias"), "JD402")
    assert finding.level == "warning" and finding.where == ["h.1.mlp"]
    assert finding.evidence["parameters"] == matrices
    assert "h.1.mlp.w2.weight is at most 1e-25 in size" in finding.what
    assert (
        finding.fix
        == "no init writes such numbers; initialise: h.1.mlp.w1.weight, h.1.mlp.w2.weight"
    )


def test_numbers_next_to_nothing_that_are_not_the_cause_are_not_named() -> None:
    model = with_tiny("h.1.mlp.w2.bias")
    with torch.no_grad():
        model.h[1].mlp.w1.bias.fill_(-100.0)
    [finding] = found(model, "JD402")
    assert finding.evidence["parameters"] == ["h.1.mlp.w1.bias"] and "in size" not in finding.what


def test_small_numbers_that_let_a_gradient_through_have_no_finding() -> None:
    model = models.decoder()
    with torch.no_grad():
        model.h[1].mlp.w2.weight.mul_(1e-10)
    assert not found(model, "JD402") and not found(model)


def test_zero_gain_next_to_batch_norm_does_not_name_running_variance() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(8, 8, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.norm(self.conv(x))

    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), Block()).eval()
    for block in model:
        nn.init.zeros_(block.norm.weight)
    report = jacdiag.audit(model, torch.randn(2, 8, 12), decide=True, state="init")
    [finding] = [finding for finding in report.findings if finding.code == "JD402"]
    assert finding.level == "info"
    assert finding.evidence["parameters"] == [f"{k}.norm.weight" for k in range(3)]


# -- calls whose derivative is zero ---------------------------------------------
class Rounded(nn.Module):
    """A stack of MLPs, one of which has a function of the test's choice between its products."""

    def __init__(self, inner: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for k in range(3):
            hidden = self.up[k](self.norms[k](x))
            if k == 1:
                hidden = self.inner(hidden)
            x = x + self.down[k](hidden)
        return x


def dead_branches(inner: Callable[[Tensor], Tensor]) -> list[Finding]:
    ids = torch.arange(8).reshape(1, 8)
    report = jacdiag.audit(Rounded(inner), ids, decide=True, state="init")
    return [finding for finding in report.findings if finding.code == "JD402"]


def test_a_branch_through_round_has_no_derivative_but_is_not_called_constant() -> None:
    [finding] = dead_branches(lambda x: torch.round(x * 100) / 100)
    assert "constant" not in finding.what and "the cause is not known" not in finding.what
    assert "is zero, the value is not; every way through passes round in" in finding.what
    assert finding.what.endswith(", whose derivative is zero")
    [call] = finding.evidence["calls"]
    assert call.startswith("round in test_dead_paths.py:")


def test_round_is_not_named_where_a_way_goes_around_it() -> None:
    # 1. The branch has a derivative then.
    assert dead_branches(lambda x: x + torch.round(x * 100)) == []

    # 2. Or zeros are the cause.
    [finding] = dead_branches(lambda x: 0 * (x + torch.round(x)))
    assert "round" not in finding.what


# -- a stream of zeros -----------------------------------------------------------------------------
class Multiplied(nn.Module):
    """Pre-norm layers on an embedding that is multiplied by a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.factor = factor
        self.table = nn.Embedding(32, 16)
        self.norms = nn.ModuleList([nn.LayerNorm(16) for _ in range(2)])
        self.ups = nn.ModuleList([nn.Linear(16, 32, bias=False) for _ in range(2)])
        self.downs = nn.ModuleList([nn.Linear(32, 16, bias=False) for _ in range(2)])
        self.head = nn.Linear(16, 32, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) * self.factor
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + down(torch.tanh(up(norm(x))))
        return self.head(x)


def test_matrices_that_read_a_stream_of_zeros_are_named_though_biases_get_a_gradient() -> None:
    ids = torch.arange(16).reshape(2, 8)
    options = {"state": "init", "select": ["JD401"], "remedies": "none"}
    report = jacdiag.audit(Multiplied(0.0), ids, **options)  # type: ignore[arg-type]
    said = [finding.what for finding in report.findings]
    assert any(what == "no gradient reaches table.weight: the cause is not known" for what in said)
    words = "gets a gradient: the stream that they read is zero for every token"
    assert any(what.startswith("no matrix of ") and what.endswith(words) for what in said)

    # A small number leaves a gradient everywhere.
    assert not jacdiag.audit(Multiplied(0.01), ids, **options).findings  # type: ignore[arg-type]
