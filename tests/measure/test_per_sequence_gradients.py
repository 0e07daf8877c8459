"""Loss and gradient of a batch and of its sequences, against plain autograd of the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from jacdiag.errors import MeasureError
from jacdiag.measure.sequence_losses import (
    Arguments,
    BatchFigures,
    Targets,
    find_loss,
    measure_batch,
    own_loss,
    prepared,
    ready_for_gradients,
)

V, ROWS, T = 11, 3, 6


class Words(nn.Module):
    """Embedding, mixing over positions, head. `answer` makes the output from logits and targets."""

    def __init__(self, answer: Callable[[Tensor, Any], Any], norm: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head = nn.Embedding(V, 8), nn.Linear(8, 8), nn.Linear(8, V)
        self.norm, self.answer = norm or nn.Identity(), answer
        self.drop = nn.Dropout(0.5)

    def forward(self, idx: Tensor, targets: Any = None) -> Any:
        h = self.norm(self.mix(self.embed(idx)).cumsum(1).tanh().flatten(0, 1)).view(*idx.shape, 8)
        return self.answer(self.head(self.drop(h)), targets)


def mean(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def shifted(logits: Tensor, labels: Tensor) -> Tensor:
    return mean(logits[:, :-1], labels[:, 1:])


def ids(seed: int = 1) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(V, (ROWS, T + 1), generator=torch.Generator().manual_seed(seed))
    return drawn[:, :-1], drawn[:, 1:]


def masked(targets: Tensor) -> Tensor:
    """All of the last sequence but one target, and the first target of the first."""
    targets = targets.clone()
    targets[-1, 1:] = -100
    targets[0, 0] = -100
    return targets


def measured(model: nn.Module, arguments: Arguments) -> tuple[BatchFigures, str]:
    with ready_for_gradients(model) as (used, parameters, dtype):
        ready = prepared(arguments, torch.device("cpu"), dtype)
        reader = find_loss(used, ready)
        return measure_batch(used, ready, reader, parameters), reader.words


def truth(model: nn.Module, loss: Tensor) -> float:
    gradients = torch.autograd.grad(
        loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True
    )
    return float(torch.cat([g.double().flatten() for g in gradients if g is not None]).norm())


def check(model: nn.Module, figures: BatchFigures, losses: Callable[[slice], Tensor]) -> None:
    """Compare the batch, and each sequence, with one backward of its own."""
    model.eval()
    whole = losses(slice(None))
    assert figures.loss == pytest.approx(float(whole), rel=1e-5)
    assert figures.gradient == pytest.approx(truth(model, whole), rel=1e-4)
    for row, sequence in enumerate(figures.sequences):
        alone = losses(slice(row, row + 1))
        assert sequence.loss == pytest.approx(float(alone), rel=1e-5)
        assert sequence.gradient == pytest.approx(truth(model, alone), rel=1e-4)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(
    "form", ["tuple", "dict", "object", "scalar", "logits", "shifted", "place"]
)
def test_a_batch_of_any_form(form: str, mask: bool) -> None:
    answers: dict[str, Callable[[Tensor, Any], Any]] = {
        "tuple": lambda logits, y: (logits, mean(logits, y)),
        "dict": lambda logits, y: {"logits": logits, "aux": logits.mean(), "loss": mean(logits, y)},
        "object": lambda logits, y: type(
            "Output", (), {"loss": mean(logits, y), "logits": logits}
        )(),
        "scalar": lambda logits, y: mean(logits, y),
        "logits": lambda logits, y: logits,
        "shifted": lambda logits, y: (shifted(logits, y), logits),
        "place": lambda logits, y: logits,
    }
    model = Words(answers[form])
    x, y = ids()
    wanted = masked(y) if mask else y
    loss_of = shifted if form == "shifted" else mean
    if form == "shifted":
        wanted = masked(x) if mask else x
        if mask:
            wanted[-1, 1] = x[-1, 1]  # one target is left after the shift
    arguments: Arguments = (
        ((x, wanted), {}) if form == "place" else ((), {"idx": x, "targets": wanted})
    )
    figures, words = measured(model, arguments)

    def losses(rows: slice) -> Tensor:
        return loss_of(
            model.head(model.norm(model.mix(model.embed(x[rows])).cumsum(1).tanh())), wanted[rows]
        )

    # no logits: how many targets a sequence has is not known, the whole is run
    if form == "scalar" and mask:
        assert "run as a whole" in figures.note and "tokens are not known" in words
    else:
        assert not figures.note
    check(model, figures, losses)
    assert ("returns" in words) == (form not in ("logits", "place"))
    if form != "scalar":
        counts = [len(s.tokens.losses) if s.tokens else None for s in figures.sequences]
        assert counts == [
            int((w[1:] >= 0).sum() if form == "shifted" else (w >= 0).sum()) for w in wanted
        ]
    assert all(p.grad is None for p in model.parameters())


def test_logits_without_targets_use_next_token_loss_and_a_note() -> None:
    model = Words(lambda logits, y: logits)
    x, _ = ids()
    figures, words = measured(model, ((x,), {}))
    assert "next-token cross entropy" in words and "holds no targets" in words
    check(model, figures, lambda rows: shifted(model.eval()(x[rows]), x[rows]))
    # Images have no next token: no loss is made up.
    picture = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    with pytest.raises(MeasureError, match="no loss can be computed"):
        measured(picture, ((torch.randn(4, 3, 4),), {}))


def test_image_classifier_loss_and_gradient_per_sample() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(12, 5)

        def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.head(pixel_values.flatten(1))
            return {"loss": cross_entropy(logits, labels), "logits": logits}

    model = Classifier()
    pixels, labels = torch.randn(4, 3, 4), torch.tensor([0, 4, 2, 2])
    figures, _ = measured(model, ((), {"pixel_values": pixels, "labels": labels}))
    check(
        model,
        figures,
        lambda rows: cross_entropy(model.head(pixels[rows].flatten(1)), labels[rows]),
    )


def test_a_sequence_of_padding_alone_has_no_loss_and_does_not_count() -> None:
    model = Words(lambda logits, y: (logits, mean(logits, y)))
    x, y = ids()
    y = y.clone()
    y[1] = -100
    figures, _ = measured(model, ((), {"idx": x, "targets": y}))
    assert figures.loss == pytest.approx(float(model.eval()(x, y)[1]), rel=1e-5)
    assert figures.gradient == pytest.approx(truth(model, model(x, y)[1]), rel=1e-4)
    assert figures.sequences[1].loss != figures.sequences[1].loss  # nan
    # The first sequence may be the one of padding, and the batch may have nothing else.
    swapped, words = measured(model, ((), {"idx": x.flip(0)[1:], "targets": y.flip(0)[1:]}))
    assert "cross entropies" in words and swapped.sequences[0].loss != swapped.sequences[0].loss
    assert swapped.loss == pytest.approx(float(model(x[:1], y[:1])[1]), rel=1e-5)
    y[:] = -100
    nothing, _ = measured(model, ((), {"idx": x, "targets": y}))
    # nan, as in the run
    assert nothing.loss != nothing.loss and nothing.gradient != nothing.gradient


def test_sequences_that_influence_each_other_get_a_note() -> None:
    class Contrast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(V, 8)

        def forward(self, idx: Tensor) -> Tensor:
            h = self.embed(idx).mean(1)
            return cross_entropy(h @ h.t() * 3, torch.arange(len(idx)))

    model = Contrast()
    x, _ = ids()
    figures, _ = measured(model, ((x,), {}))
    assert "run as a whole" in figures.note
    assert figures.loss == pytest.approx(float(model(x)), rel=1e-5)
    assert figures.gradient == pytest.approx(truth(model, model(x)), rel=1e-4)


def test_half_precision_is_run_on_a_copy_and_the_model_is_as_it_was() -> None:
    model = Words(lambda logits, y: (logits, mean(logits, y)))
    x, y = ids()
    for parameter in model.parameters():
        # values that both precisions have
        parameter.data = parameter.data.to(torch.float16).float()
    reference, _ = measured(model, ((), {"idx": x, "targets": y}))
    low = Words(lambda logits, y: (logits, mean(logits, y))).half()
    low.load_state_dict(model.state_dict())
    low.train()
    figures, _ = measured(low, ((), {"idx": x, "targets": y}))
    assert figures.gradient == pytest.approx(reference.gradient, rel=1e-6)
    assert all(p.dtype is torch.float16 and p.grad is None for p in low.parameters())
    assert low.training and low.drop.training


def test_frozen_weights_do_not_count_unless_all_are_frozen() -> None:
    model = Words(lambda logits, y: (logits, mean(logits, y)))
    x, y = ids()
    everything, _ = measured(model, ((), {"idx": x, "targets": y}))
    model.embed.requires_grad_(False)
    figures, _ = measured(model, ((), {"idx": x, "targets": y}))
    assert figures.gradient == pytest.approx(truth(model.eval(), model(x, y)[1]), rel=1e-4)
    assert figures.gradient < everything.gradient
    model.requires_grad_(False)
    figures, _ = measured(model, ((), {"idx": x, "targets": y}))
    assert figures.gradient == pytest.approx(everything.gradient, rel=1e-6)
    assert not any(p.requires_grad for p in model.parameters())


def test_the_count_of_a_trainer_is_left_out() -> None:
    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = Words(lambda logits, y: logits)

        def forward(self, input_ids: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> Any:
            logits = self.words(input_ids)
            loss = shifted(logits, labels)
            if num_items_in_batch is not None:
                loss = loss * (labels[:, 1:] >= 0).sum() / num_items_in_batch
            return {"loss": loss, "logits": logits}

    model = Trained()
    x, _ = ids()
    kept = {"input_ids": x, "labels": x, "num_items_in_batch": torch.tensor(1000)}
    figures, words = measured(model, ((), kept))
    assert (
        figures.loss == pytest.approx(float(shifted(model.eval().words(x), x)), rel=1e-5)
        and "mean" in words
    )


def test_a_loss_is_known_by_its_name() -> None:
    scalar, other = torch.tensor(1.0), torch.tensor(2.0)
    assert own_loss({"aux_loss": other, "loss": scalar}) is not None
    assert float(own_loss({"aux_loss": other, "loss": scalar})) == 1.0  # type: ignore[arg-type]
    assert own_loss({"aux_loss": other, "logits": torch.ones(2, 3)}) is None
    assert own_loss((torch.ones(2, 3), other)) is other
    assert Targets("labels", shift=True).shift
