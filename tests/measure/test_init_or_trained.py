"""Fresh or trained: known facts first, then the share of matrices that are no draw of an init."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import jacdiag
from jacdiag.gate import gate
from jacdiag.measure.independence_test import examine_draw
from jacdiag.measure.init_or_trained import decide_state, judge_weights, level_of_one
from jacdiag.records import Report
from jacdiag.sources.optimizer_state import optimizer_stepped
from jacdiag.sources.training_history import History, name_says

EXAMPLES = Path(__file__).parents[2] / "examples" / "checkpoints"
BUILT = History(state="init", reason="built here by f", basis="built")


def drawn(count: int, width: int = 32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"w{k}": torch.randn(width, 2 * width, generator=generator) for k in range(count)}


def with_direction(weight: Tensor, size: float = 3.0) -> Tensor:
    """Add a matrix of rank one, as training does."""
    left, right = weight[:, 0], weight[0]
    return (
        weight
        + size * torch.outer(left / left.norm(), right / right.norm()) * max(weight.shape) ** 0.5
    )


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


def fresh() -> nn.Module:
    return nn.Sequential(Block(), Block(), Block())


def loaded() -> nn.Module:
    """Build a model that loads weights of its own: the same ones whatever the seed is."""
    model = fresh()
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(with_direction(torch.randn_like(parameter), 6.0))
    return model


def strange() -> nn.Module:
    """Draw matrices with a direction of their own, other ones for each seed."""
    model = fresh()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(with_direction(torch.randn_like(parameter), 6.0))
    return model


@pytest.mark.parametrize(
    "scaled", ["as drawn", "rows", "columns", "offset", "bfloat16", "uniform", "orthogonal"]
)
def test_no_init_by_rows_or_columns_fails(scaled: str) -> None:
    for seed in range(20):
        weight = drawn(1, seed=seed)["w0"]
        if scaled == "rows":
            weight[: len(weight) // 3] *= 10
        elif scaled == "columns":
            weight *= torch.logspace(0, 3, weight.shape[1])
        elif scaled == "offset":
            weight += 5
        elif scaled == "bfloat16":
            weight = weight.bfloat16()
        elif scaled == "uniform":
            weight.uniform_()
        elif scaled == "orthogonal":
            nn.init.orthogonal_(weight)
        result = examine_draw(weight)
        assert result is not None and result.probability > 1e-4


def test_a_direction_of_training_fails() -> None:
    result = examine_draw(with_direction(drawn(1)["w0"]))
    assert result is not None and result.probability < 1e-9


def test_what_is_no_matrix_is_not_tested() -> None:
    assert examine_draw(torch.zeros(32, 32)) is None
    assert examine_draw(torch.arange(32.0).expand(32, 32)) is None
    assert examine_draw(torch.randn(64, 1, 4)) is None
    assert examine_draw(torch.full((32, 32), float("nan"))) is None


def test_one_matrix_never_decides_and_a_third_does() -> None:
    weights = drawn(9)
    for number, name in enumerate(list(weights)[:3], 1):
        weights[name] = with_direction(weights[name])
        assert judge_weights(weights).trained == (number == 3)  # a third of nine
    assert not judge_weights({"w": with_direction(drawn(1)["w0"])}).trained


def test_copies_of_a_matrix_are_one_witness() -> None:
    weights = drawn(4)
    wave = torch.sin(torch.arange(64.0)[:, None] / 10 ** torch.linspace(0, 2, 32))
    assert not judge_weights(weights | {f"table{k}": wave.clone() for k in range(4)}).trained


def test_false_alarms_are_counted_over_all_matrices() -> None:
    # two of four, by the binomial distribution
    assert 6 * level_of_one(4, 2) ** 2 == pytest.approx(1e-9, rel=1e-3)
    assert level_of_one(1, 2) == 0.0


def test_what_is_known_comes_first() -> None:
    trained = judge_weights({name: with_direction(w) for name, w in drawn(6).items()})
    untouched = judge_weights(drawn(6))
    saved = History(state="trained", reason="saved at step 5", basis="file")

    assert decide_state("init", saved, lambda: trained).basis == "given"
    assert decide_state(None, saved, lambda: untouched).reason == "saved at step 5"
    assert (
        decide_state(None, None, lambda: trained).reason == "6 of 6 matrices are no draw of an init"
    )
    assert decide_state(None, None, lambda: untouched).state == "init"
    assert decide_state(None, BUILT, lambda: untouched).reason == "built here by f"


def test_a_factory_that_loads_weights_is_not_fresh() -> None:
    report = jacdiag.audit(loaded, torch.randn(1, 4, 16), max_products=8)
    assert report.state == "trained" and "but 6 of 6 matrices" in report.state_reason
    kept = jacdiag.audit(strange, torch.randn(1, 4, 16), max_products=8)
    assert kept.state == "init" and any("pass --state trained" in note for note in kept.notes)
    assert jacdiag.audit(fresh, torch.randn(1, 4, 16), max_products=8).state_basis == "built"


def test_a_gate_takes_every_seed_as_fresh() -> None:
    report = gate(loaded, torch.randn(1, 4, 16), seeds=1, max_products=8).report
    assert report.state == "init" and any("pass --state trained" in note for note in report.notes)


def test_a_guess_leaves_a_pinned_contract_on() -> None:
    def of_contract(**options: object) -> str:
        probe = torch.randn(1, 4, 16)
        report = jacdiag.audit(
            loaded(), probe, contract={"matrix": "0.02"}, max_products=8, **options
        )
        assert report.state == "trained"
        return next(rule.status for rule in report.rules if rule.code == "JD201")

    assert of_contract() == "fired"
    assert of_contract(state="trained") == "not-applicable"


def test_a_vector_that_was_drawn_says_nothing() -> None:
    model = fresh()
    model.token = nn.Parameter(torch.randn(16))
    report = jacdiag.audit(model, torch.randn(1, 4, 16), max_products=8)
    assert report.state == "init" and report.state_basis == "weights"
    assert Report.from_json(report.to_json()).state_reason == report.state_reason


def test_examples_by_their_weights() -> None:
    for name in ("vanilla", "scaled-embed"):
        for part, trained in (("step0", False), ("trained", True)):
            state = torch.load(EXAMPLES / f"{name}-{part}.pt", weights_only=True)
            weights = state.get("model", state)
            assert judge_weights(weights).trained == trained


@pytest.mark.parametrize(
    ("path", "state"),
    [
        ("step0.pt", "init"),
        ("step-0000.pt", "init"),
        ("iter_100.pt", "trained"),
        ("run/checkpoint-5/model.pt", "trained"),
        ("epoch=0.ckpt", None),
        ("epoch=3.ckpt", "trained"),
        ("tiny-random-gpt/model.safetensors", "init"),
        ("untrained.pt", "init"),
        ("best-init.pt", None),
        ("llama-7b.pt", None),
        ("run1/model.pt", None),
    ],
)
def test_what_a_name_says(path: str, state: str | None) -> None:
    said = name_says(path)
    assert (said.state if said is not None else None) == state


def test_an_optimizer_that_has_stepped() -> None:
    layer = nn.Linear(2, 2)
    for kind in (torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)):
        optimizer = kind(layer.parameters())
        assert not optimizer_stepped({"optimizer": optimizer.state_dict()})
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        assert optimizer_stepped({"optimizer_states": [optimizer.state_dict()]})
