"""Values of the batch that are not finite: named where they are new, and not where a mask holds
them by design.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacdiag
from jacdiag.detectors.first_nonfinite import NonFiniteStep, explain_batch, explain_nonfinite
from jacdiag.pipeline.flight_replay import look_at_values
from jacdiag.records.batch_values import BatchValues, NonFiniteArgument
from jacdiag.records.flight_replay import BatchReplay, ReplayRecord
from jacdiag.records.run_log import Alert
from jacdiag.render.content.flight_replay import replay_facts
from jacdiag.sources.flight import read_flight

BAD = 4
ROWS = 6


class Masked(nn.Module):
    """A regression on images, with an additive float mask over positions and a part that can be
    broken.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 1)
        self.broken = False

    def forward(self, image: Tensor, mask: Tensor, target: Tensor) -> Tensor:
        weights = torch.softmax(self.inner(image) + mask, dim=-1)
        if self.broken:
            weights = weights * math.inf
        return (self.head(image + self.outer(weights)) - target).square().mean()


Spoil = Callable[[dict[str, Tensor], int, Masked], Any]


def go(spoil: Spoil, *, steps: int = BAD, **options: Any) -> Alert:
    torch.manual_seed(0)
    model = Masked()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with jacdiag.watch(
        model, optimizer, every=None, stats_every=None, quiet=True, strict=True, **options
    ) as w:
        for step in range(1, steps + 1):
            batch = {
                "image": torch.randn(ROWS, 4),
                "mask": torch.zeros(4),
                "target": torch.randn(ROWS, 1),
            }
            spoil(batch, step, model)
            loss = model(**batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            w.step(loss)
        w.flush()
        (alert,) = w.alerts
    assert (alert.step, alert.code) == (steps, "JD505")
    return alert


@pytest.fixture
def folder(tmp_path: Any) -> dict[str, Any]:
    return {"log_dir": tmp_path}


@pytest.mark.parametrize("name", ["image", "target"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_tensor_of_the_batch_is_named_with_its_sequences(
    name: str, value: float, folder: dict[str, Any]
) -> None:
    def spoil(batch: dict[str, Tensor], step: int, model: Masked) -> None:
        if step == BAD:
            batch[name][2, 0] = batch[name][5, 0] = value

    alert = go(spoil, **folder)
    kind = "NaN" if math.isnan(value) else "+inf"
    size = ROWS * (4 if name == "image" else 1)
    assert alert.where == [name] and alert.evidence["first"] == "batch"
    assert f"{name} has 2 {kind} among {size} values, in sequences 2, 5 of 6" in alert.what
    assert "the forward made it" not in alert.what
    (values,) = alert.evidence["batches"]
    assert values["arguments"][0]["sequences"] == [2, 5]


def test_a_finite_batch_is_said_to_be_finite(folder: dict[str, Any]) -> None:
    def spoil(batch: dict[str, Tensor], step: int, model: Masked) -> None:
        model.broken = step == BAD

    alert = go(spoil, **folder)
    assert alert.where == [] and alert.evidence["first"] == "forward"
    assert "every tensor that the forward got is finite, so that the forward made it" in alert.what
    assert "held" not in alert.what and alert.evidence["batches"][0]["arguments"] == []


def test_a_mask_that_always_holds_inf_is_not_blamed(folder: dict[str, Any]) -> None:
    def spoil(batch: dict[str, Tensor], step: int, model: Masked) -> None:
        batch["mask"][0] = -math.inf
        model.broken = step == BAD

    alert = go(spoil, **folder)
    assert alert.where == [] and alert.evidence["first"] == "forward"
    assert (
        "only these values are not finite: mask has 1 -inf among 4 values (as earlier batches: "
        "-inf)" in alert.what
    )
    assert "so that the forward made it" in alert.what


def test_a_mask_is_not_blamed_for_what_the_image_holds(folder: dict[str, Any]) -> None:
    def spoil(batch: dict[str, Tensor], step: int, model: Masked) -> None:
        batch["mask"][0] = -math.inf
        if step == BAD:
            batch["image"][1, 1] = math.nan

    alert = go(spoil, **folder)
    assert (
        alert.where == ["image"]
        and "image has 1 NaN among 24 values, in sequence 1 of 6; " not in alert.what
    )
    assert alert.what.index("image has 1 NaN") < alert.what.index("mask has 1 -inf")


def test_at_the_first_step_inf_is_not_blamed_and_nan_is(folder: dict[str, Any]) -> None:
    def masked(batch: dict[str, Tensor], step: int, model: Masked) -> None:
        batch["mask"][0] = -math.inf
        model.broken = True

    alert = go(masked, steps=1, log_dir=folder["log_dir"] / "inf")
    assert alert.where == [] and "whether that is usual is not known" in alert.what
    assert "the batch or the forward made it" in alert.what

    def nan(batch: dict[str, Tensor], step: int, model: Masked) -> None:
        batch["image"][0, 0] = math.nan

    assert go(nan, steps=1, log_dir=folder["log_dir"] / "nan").where == ["image"]


def test_without_kept_batches_nothing_is_said_of_the_batch(folder: dict[str, Any]) -> None:
    def spoil(batch: dict[str, Tensor], step: int, model: Masked) -> None:
        if step == BAD:
            batch["image"][0, 0] = math.nan

    alert = go(spoil, keep_batches=0, **folder)
    assert (
        alert.where == []
        and "the batch or the forward made it" in alert.what
        and "batches" not in alert.evidence
    )


# -- the sentences alone ---------------------------------------------------------------------------
NAN = BatchValues([NonFiniteArgument("x", {"NaN": 3}, 64, [1])], earlier=2, rows=4)
FINE = BatchValues(rows=4)


def alert_of(**figures: Any) -> Alert:
    found = explain_nonfinite(
        NonFiniteStep(**{"loss": math.nan, "weights": [], "gradients": ["w"], **figures})
    )
    return Alert(9, "JD505", "error", found.what, found.where, {"first": found.first})


def test_a_batch_is_not_blamed_where_a_weight_was_not_finite() -> None:
    alert = alert_of(weights=["w"])
    assert explain_batch(alert, [NAN]) == alert


def test_what_other_ranks_got_is_not_said_to_be_finite() -> None:
    alone, together = explain_batch(alert_of(), [FINE]), explain_batch(alert_of(), [FINE], ranks=2)
    assert "so that the forward made it" in alone.what and "rank" not in alone.what
    assert (
        "so that the forward made it" not in together.what
        and "a batch of another rank" in together.what
    )


def test_finite_losses_with_bad_gradients_keep_their_own_place() -> None:
    alert = alert_of(loss=1.0, gradients=["w"], parameters=3)
    said = explain_batch(alert, [FINE, NAN])
    assert (
        said.where == ["w"]
        and "x has 3 NaN among 64 values, in sequence 1 of 4 of micro-batch 2" in said.what
    )
    assert explain_batch(alert, [FINE]).what.endswith("Every tensor that the forward got is finite")
    everywhere = alert_of(loss=None, gradients=["w", "v"], parameters=2)
    assert explain_batch(everywhere, [NAN]).where == ["x"]


def test_nan_also_in_earlier_batches_is_noted_but_not_the_cause() -> None:
    usual = BatchValues([NonFiniteArgument("x", {"NaN": 3}, 64, [1], ["NaN"])], earlier=2, rows=4)
    said = explain_batch(alert_of(), [usual])
    assert (
        said.where == []
        and "x has 3 NaN among 64 values, in sequence 1 of 4 (as earlier batches: NaN)" in said.what
    )


def test_a_tensor_that_cannot_be_read_leaves_it_open() -> None:
    said = explain_batch(alert_of(), [BatchValues(unread=1)])
    assert "could not be looked at" in said.what and "the batch or the forward made it" in said.what


# -- the replay says the same of each kept batch ---------------------------------------------------
def test_a_replay_looks_at_each_kept_batch(folder: dict[str, Any]) -> None:
    def spoil(batch: dict[str, Tensor], step: int, model: Masked) -> None:
        batch["mask"][0] = -math.inf
        if step == BAD:
            batch["image"][1, 1] = math.nan

    go(spoil, keep_batches=4, **folder)
    flight = read_flight(folder["log_dir"] / f"flight-{BAD}")
    values = {kept.step: look_at_values(kept, flight.batches) for kept in flight.batches}
    assert [argument.name for argument in values[BAD].unusual] == ["image"]
    assert all(not values[step].unusual for step in range(1, BAD))
    assert values[1].arguments[0].usual == [] and values[2].arguments[0].usual == ["-inf"]


def test_a_replay_says_what_is_not_finite_and_that_nothing_is() -> None:
    def facts(loss: float, *values: BatchValues | None) -> str:
        batches = [
            BatchReplay("batch.pt", 9 - n, n == 0, loss, 1.0, values=v)
            for n, v in enumerate(values)
        ]
        record = ReplayRecord(
            "flight-9", 9, 9, "", 8, "", "not decided", "Not decided: so.", "", batches
        )
        assert ReplayRecord.from_dict(record.to_dict()).batches[0].values == values[0]
        return " | ".join(replay_facts(record))

    assert (
        "not finite in the batch of step 9: x has 3 NaN among 64 values, in sequence 1 of 4"
        in facts(1.0, NAN, FINE)
    )
    assert "every tensor of the 2 kept batches is finite" in facts(math.nan, FINE, FINE)
    assert "finite" not in facts(1.0, FINE, FINE), "there is nothing to explain"
    assert "finite" not in facts(math.nan, FINE, None), "one of them was not looked at"
