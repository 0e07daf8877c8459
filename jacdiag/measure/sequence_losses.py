"""Loss and gradient norm of a batch and of each sequence in it, one sequence at a time.

The gradient of a batch is the sum of its sequences' gradients, weighted by how many targets each
has. So one backward per sequence gives both, and the memory that it takes is that of one sequence
and of two gradients.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from jacdiag.devices.accelerators import borrowed_generators
from jacdiag.errors import MeasureError
from jacdiag.measure.gradients import loss_input, sum_of_squares
from jacdiag.trace.execution.precision import map_leaves
from jacdiag.trace.execution.tensors import collect_deep

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

# relative difference below which two float32 losses are the same one; measured differences are
# below 1e-5
_SAME = 1e-3
_TARGET_NAMES = ("labels", "targets", "target", "label", "tgt", "y")
_INPUT_NAMES = ("input_ids", "idx", "ids", "tokens", "inputs", "x")
# The Trainer of transformers passes the count of the entire step, which turns the mean into a part
# of a mean.
_NOT_OF_THE_LOSS = ("num_items_in_batch",)


@dataclass(frozen=True)
class TokenLosses:
    """Cross entropies of the targets of one sequence.

    Attributes:
        losses: of the targets that count.
        positions: where they stand.
        targets: their ids.
    """

    losses: Tensor
    positions: Tensor
    targets: Tensor


@dataclass(frozen=True)
class SequenceFigures:
    """One sequence, run alone. `tokens` is None if the losses of its tokens are not known."""

    loss: float
    gradient: float
    tokens: TokenLosses | None = None


@dataclass(frozen=True)
class BatchFigures:
    """A batch.

    `gradient` is that of the batch's loss. `note` says if it is not the sum of the sequences'
    gradients.
    """

    loss: float
    gradient: float
    sequences: list[SequenceFigures] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class Targets:
    """Where the targets of the cross entropy are.

    Attributes:
        key: place or name of the tensor among the arguments.
        shift: a position's logits predict the target of the next position.
    """

    key: int | str
    shift: bool


@dataclass(frozen=True)
class LossReader:
    """How the loss is read from a model's output.

    Attributes:
        own: the model returns its loss.
        targets: where the targets of the token losses are; None if they are not known.
        words: what is computed, for a reader.
    """

    own: bool
    targets: Targets | None
    words: str

    def read(self, output: Any, arguments: Arguments) -> tuple[Tensor, TokenLosses | None]:
        """Return the loss as a scalar, and the losses of the tokens if they are known.

        Args:
            output: of the model.
            arguments: of the call that made it.

        Raises:
            MeasureError: the output holds no loss.
        """
        # 1. The losses of the tokens.
        tokens = None
        if self.targets is not None:
            tokens = token_losses(output, arguments, self.targets)

        # 2. The model's own loss.
        if self.own:
            loss = own_loss(output)
            if loss is None:
                what = "the model returned a loss for another batch, and none for this one"
                raise MeasureError(what)
            return loss.float(), tokens

        # 3. Else the mean over the tokens. It is NaN if all are masked.
        if tokens is None:
            raise MeasureError("the logits do not fit the targets of this batch")

        return tokens.losses.mean().float(), tokens


def find_loss(model: nn.Module, arguments: Arguments) -> LossReader:
    """Decide how the loss of a model is read.

    The model is run on the first sequence of a batch that has a loss.

    A loss that the model returns is taken as it is. The losses of its tokens are those whose mean
    is that loss: which of the integer inputs are the targets, and whether they are shifted, is
    tried out and not assumed.

    Args:
        model: in evaluation mode.
        arguments: a batch.

    Raises:
        MeasureError: the model returns no loss, and the batch holds nothing that could be its
            targets.
    """
    rows = count_sequences(arguments)
    reader = None
    for row in range(rows):
        part = sequence_of(arguments, row, rows)
        reader = _find_loss(model, part)
        has_targets = reader.targets is not None or not reader.own
        if has_targets:
            return reader

        # The mean over a sequence of padding is not finite, and tells nothing.
        with torch.no_grad():
            loss, _ = reader.read(model(*part[0], **part[1]), part)
        if bool(torch.isfinite(loss)):
            return reader

    assert reader is not None
    return reader


def _find_loss(model: nn.Module, arguments: Arguments) -> LossReader:
    """Decide how the loss of a model is read from its output for one sequence."""
    with torch.no_grad():
        output = model(*arguments[0], **arguments[1])
    loss = own_loss(output)
    candidates = list(_candidates(output, arguments))

    # 1. The model's own loss.
    if loss is not None:
        return _reader_of_own_loss(output, arguments, candidates, float(loss))

    # 2. Logits alone: the targets that were passed, else the next token.
    reader = _reader_of_passed_targets(arguments, candidates)
    if reader is None:
        reader = _reader_of_next_tokens(candidates)
    if reader is not None:
        return reader

    raise MeasureError(
        "no loss can be computed",
        got="the model returns no loss, and the kept batch holds nothing that could be its targets",
        hint="pass the targets to the model's forward, so that the flight recorder keeps them",
    )


def _reader_of_passed_targets(
    arguments: Arguments, candidates: Iterable[Targets]
) -> LossReader | None:
    """Return the reader of the cross entropy with targets that were passed; None without them."""
    for targets in candidates:
        if targets.shift:
            continue

        # An argument without a name is no mask if it holds more than 0 and 1.
        tensor = argument(arguments, targets.key)
        by_place = isinstance(targets.key, int) and int(tensor.max()) > 1
        if not by_place and targets.key not in _TARGET_NAMES:
            continue

        # Targets that repeat the input are shifted by the loss.
        name = f"argument {targets.key}" if by_place else f"'{targets.key}'"
        words = f"cross entropy of the logits with {name}"
        shifted = _is_copy_of_the_input(tensor, targets.key, arguments)
        if shifted:
            words += ", shifted by one"
        return LossReader(False, Targets(targets.key, shifted), words)

    return None


def _reader_of_next_tokens(candidates: Iterable[Targets]) -> LossReader | None:
    """Return the reader of the cross entropy with the next token; None without token ids."""
    words = (
        "next-token cross entropy of the input ids: the kept batch holds no targets, "
        "so that the loss of the run may have been another"
    )
    for targets in candidates:
        if targets.shift:
            return LossReader(False, targets, words)

    return None


def _reader_of_own_loss(
    output: Any, arguments: Arguments, candidates: list[Targets], loss: float
) -> LossReader:
    """Return the reader of a loss that the model returns, with its targets if they are found."""
    # 1. The targets whose mean cross entropy is that loss.
    for targets in candidates:
        tokens = token_losses(output, arguments, targets)
        if tokens is None or not len(tokens.losses):
            continue
        if _same(float(tokens.losses.mean()), loss):
            words = "the loss that the model returns, a mean of cross entropies"
            return LossReader(True, targets, words)

    # 2. It is another loss, or one with a weight.
    words = "the loss that the model returns (the losses of its tokens are not known)"
    return LossReader(True, None, words)


def own_loss(output: Any) -> Tensor | None:
    """Return the scalar loss in a model's output; None if there is none.

    An output that names its parts has the loss under that name: another scalar may be an auxiliary
    one.
    """
    # 1. Under its name.
    if isinstance(output, Mapping):
        return _mean_of(output.get("loss"))
    if hasattr(output, "loss"):
        return _mean_of(output.loss)

    # 2. Without names: the first scalar.
    tensors: list[Tensor] = []
    collect_deep(output, tensors)
    for tensor in tensors:
        if tensor.dim() == 0 and tensor.is_floating_point():
            return tensor

    return None


def _mean_of(loss: Any) -> Tensor | None:
    """Return a loss as a scalar: under DataParallel there is one value for each replica."""
    if not isinstance(loss, Tensor):
        return None

    return loss.mean()


def token_losses(output: Any, arguments: Arguments, targets: Targets) -> TokenLosses | None:
    """Return the cross entropies of the targets that count.

    A target below 0 is masked, whatever value the loop uses (-100, -1).

    Returns:
        None if logits and targets do not fit each other.
    """
    # 1. Logits and ids of one shape.
    logits = loss_input(output)
    ids = argument(arguments, targets.key)
    if logits is None or not isinstance(ids, Tensor):
        return None
    if logits.shape[:-1] != ids.shape:
        return None

    # 2. Each position with its target.
    ids = ids.to(logits.device).long()
    positions = torch.arange(ids.shape[-1], device=ids.device).expand(ids.shape)
    if targets.shift:
        logits = logits[..., :-1, :]
        ids = ids[..., 1:]
        positions = positions[..., 1:]
    is_too_large = ids >= logits.shape[-1]
    if bool(is_too_large.any()):
        return None

    # 3. Those that count.
    counts = ids >= 0
    losses = cross_entropy(logits[counts].float(), ids[counts], reduction="none")
    return TokenLosses(losses, positions[counts], ids[counts])


def argument(arguments: Arguments, key: int | str) -> Any:
    """Return one of the arguments of a call, by its place or its name."""
    args, kwargs = arguments
    if isinstance(key, int):
        return args[key]

    return kwargs.get(key)


def _candidates(output: Any, arguments: Arguments) -> Iterator[Targets]:
    """Yield what could be the targets: integer inputs of the logits' shape.

    The likely names come first.
    """
    logits = loss_input(output)
    if logits is None or logits.dim() < 2:
        return

    for key in _keys_by_likelihood(arguments):
        # 1. Integers, one for each position.
        ids = argument(arguments, key)
        if key == "attention_mask":
            continue
        if not _are_ids_of(ids, logits):
            continue

        # 2. Each as it is, unless it is the input.
        is_input = key == 0 or key in _INPUT_NAMES
        if not is_input:
            yield Targets(key, shift=False)

        # 3. Shifted by one token, if there are several.
        has_next = ids.dim() > 1 and ids.shape[-1] > 1
        if has_next:
            yield Targets(key, shift=True)


def _keys_by_likelihood(arguments: Arguments) -> list[int | str]:
    """Return places and names of all arguments, those that are likely targets first.

    These are keywords by name, names of targets first and of inputs last; then positions from the
    end.
    """
    args, kwargs = arguments
    names = sorted(kwargs, key=lambda name: (name not in _TARGET_NAMES, name in _INPUT_NAMES))
    return [*names, *reversed(range(len(args)))]


def _are_ids_of(value: Any, logits: Tensor) -> bool:
    """Return whether an argument holds an integer for each position of the logits."""
    if not _holds_integers(value):
        return False
    has_positions: bool = value.shape == logits.shape[:-1]
    return has_positions


def _holds_integers(value: Any) -> bool:
    """Return whether an argument is a tensor of integers."""
    if not isinstance(value, Tensor):
        return False

    is_mask = value.dtype is torch.bool
    return not is_mask and not value.is_floating_point()


def _is_copy_of_the_input(tensor: Tensor, key: int | str, arguments: Arguments) -> bool:
    """Return whether the targets are the input ids, apart from masked ones.

    They need a shift then.
    """
    counts = tensor >= 0
    if not bool(counts.any()):
        return False

    # Any other argument may be the input.
    args, kwargs = arguments
    for name, other in [*enumerate(args), *kwargs.items()]:
        if name == key or not _is_discrete(other):
            continue
        if other.shape == tensor.shape and bool((tensor[counts] == other[counts]).all()):
            return True

    return False


def _is_discrete(value: Any) -> bool:
    """Return whether an argument is a tensor of integers, or a mask."""
    return isinstance(value, Tensor) and not value.is_floating_point()


def _same(a: float, b: float) -> bool:
    """Return whether two float32 losses are the same one."""
    return math.isclose(a, b, rel_tol=_SAME, abs_tol=_SAME)


# -- one batch -------------------------------------------------------------------------------------
def measure_batch(
    model: nn.Module, arguments: Arguments, reader: LossReader, parameters: list[Tensor]
) -> BatchFigures:
    """Measure a batch and each sequence in it.

    Args:
        model: in evaluation mode; nothing of it is changed.
        arguments: of its forward, on its device.
        reader: of its loss.
        parameters: whose gradients count.

    Raises:
        MeasureError: no loss can be read.
    """
    rows = count_sequences(arguments)
    if rows == 1:
        alone, _ = _run(model, arguments, reader, parameters)
        return BatchFigures(alone.loss, alone.gradient, [alone])

    # 1. Each sequence alone. Their gradients add up to that of the batch.
    total = _Sum(parameters)
    sequences: list[SequenceFigures] = []
    for row in range(rows):
        figures, gradients = _run(model, sequence_of(arguments, row, rows), reader, parameters)
        sequences.append(figures)
        if _weight(figures):
            total.add(gradients, _weight(figures))
    if not total.weight:
        return BatchFigures(
            math.nan, math.nan, sequences, "no target of the batch counts: all are masked"
        )

    loss = total.loss(sequences)
    gradient = math.nan
    if math.isfinite(loss):
        gradient = total.norm()

    # 2. Whether the batch is the sum of its sequences: in one forward of the batch.
    try:
        with torch.no_grad():
            together, _ = reader.read(model(*arguments[0], **arguments[1]), arguments)
    except torch.OutOfMemoryError:
        return BatchFigures(
            loss, gradient, sequences, "not compared with the whole batch, which does not fit"
        )
    loss_of_batch = float(together)
    if _same(loss_of_batch, loss) or not math.isfinite(loss_of_batch):
        return BatchFigures(loss, gradient, sequences)

    # 3. It is not: its loss mixes the sequences.
    whole, _ = _run(model, arguments, reader, parameters)
    note = (
        "the loss of the batch is not the mean over its sequences: the batch was run as a "
        "whole, each sequence alone"
    )
    return BatchFigures(whole.loss, whole.gradient, sequences, note)


class _Sum:
    """The weighted sum of the sequences' gradients."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.gradients: list[Tensor | None] = [None for _ in parameters]
        self.weight = 0.0

    def add(self, gradients: list[Tensor | None], weight: float) -> None:
        """Add the gradients of one sequence. Each is let go at once."""
        self.weight += weight
        for place, gradient in enumerate(gradients):
            # A parameter that the sequence did not use.
            if gradient is None:
                continue

            held = self.gradients[place]
            if held is None:
                self.gradients[place] = gradient * weight
            else:
                held.add_(gradient, alpha=weight)
            gradients[place] = None

    def loss(self, sequences: list[SequenceFigures]) -> float:
        """Return the weighted mean of the sequences' losses."""
        weighted = []
        for figures in sequences:
            weight = _weight(figures)
            # Padding alone has no loss.
            if weight:
                weighted.append(weight * figures.loss)

        return math.fsum(weighted) / self.weight

    def norm(self) -> float:
        """Return the norm of the gradient of the batch."""
        return _norm(self.gradients) / self.weight


def _weight(figures: SequenceFigures) -> float:
    """Return how much a sequence counts in the mean of the batch.

    It counts as many times as it has targets, 0 times if it is padding alone.
    """
    tokens = figures.tokens
    if tokens is None:
        return 1.0

    return float(len(tokens.losses))


def _run(
    model: nn.Module, arguments: Arguments, reader: LossReader, parameters: list[Tensor]
) -> tuple[SequenceFigures, list[Tensor | None]]:
    """Run forward and backward once. Gradients are returned, and never put into `.grad`."""
    # 1. Forward and backward.
    gradients: list[Tensor | None] = [None for _ in parameters]
    with torch.enable_grad():
        loss, tokens = reader.read(model(*arguments[0], **arguments[1]), arguments)
        if loss.requires_grad:
            gradients = list(torch.autograd.grad(loss, parameters, allow_unused=True))

    # 2. Figures, without the graph that made them.
    if tokens is not None:
        tokens = TokenLosses(
            tokens.losses.detach().cpu(), tokens.positions.cpu(), tokens.targets.cpu()
        )
    value = float(loss.detach())
    # A mean over no target is not finite, and has a gradient of zeros.
    gradient = math.nan
    if math.isfinite(value):
        gradient = _norm(gradients)
    return SequenceFigures(value, gradient, tokens), gradients


def _norm(gradients: list[Tensor | None]) -> float:
    """Return the joint norm of the gradients that there are."""
    squares = []
    for gradient in gradients:
        if gradient is not None:
            squares.append(float(sum_of_squares(gradient)))

    return math.sqrt(math.fsum(squares))


# -- parts of a batch ------------------------------------------------------------------------------
def count_sequences(arguments: Arguments) -> int:
    """Return the size of the batch dimension, 1 if there is none.

    It is that of the first tensor with two dimensions.
    """
    tensors: list[Tensor] = []
    collect_deep(arguments, tensors)
    for tensor in tensors:
        has_batch = tensor.dim() >= 2
        if has_batch:
            return max(int(tensor.shape[0]), 1)

    return 1


def sequence_of(arguments: Arguments, row: int, rows: int) -> Arguments:
    """Return one sequence of a batch, as a batch of its own.

    What has no batch dimension stays as it is.

    Args:
        arguments: of a batch.
        row: which sequence.
        rows: size of the batch.
    """

    def cut(leaf: Any) -> Any:
        # A scalar, or an option.
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            return leaf
        if leaf.shape[0] != rows:
            return leaf

        return leaf[row : row + 1]

    args, kwargs = arguments
    places = tuple(map_leaves(cut, value) for value in args)
    named = {name: map_leaves(cut, value) for name, value in kwargs.items()}
    return places, named


def prepared(arguments: Arguments, device: torch.device, dtype: torch.dtype | None) -> Arguments:
    """Return a kept batch as the model takes it.

    It is moved to the model's device and precision, without the count of a Trainer.

    Args:
        arguments: of the batch.
        device: of the model.
        dtype: of the model; None leaves the precision as it is.
    """

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        # Token ids stay integers.
        if dtype is not None and leaf.is_floating_point():
            return leaf.to(device).to(dtype)

        return leaf.to(device)

    args, kwargs = arguments
    places = tuple(map_leaves(moved, value) for value in args)
    named = {}
    for name, value in kwargs.items():
        if name not in _NOT_OF_THE_LOSS:
            named[name] = map_leaves(moved, value)

    return places, named


# -- the model -------------------------------------------------------------------------------------
def _has_half_precision(model: nn.Module) -> bool:
    """Return whether some weights of a model are in 16 bits."""
    types = {parameter.dtype for parameter in model.parameters()}
    return not types.isdisjoint((torch.float16, torch.bfloat16))


@contextmanager
def ready_for_gradients(
    model: nn.Module,
) -> Iterator[tuple[nn.Module, list[Tensor], torch.dtype | None]]:
    """Lend the model in evaluation mode, with the parameters that train.

    The precision of a copy comes with them. Weights in half precision are copied to float32:
    gradients in float16 would lose what is small. The mode of every module and the random state are
    given back.

    Yields:
        The model or its copy, the parameters whose gradients count, and float32 if it is a copy.
    """
    # 1. A copy in float32, if some weights are in half precision.
    lent = model
    precision = None
    if _has_half_precision(model):
        lent = copy.deepcopy(model).float()
        precision = torch.float32
    modes = [(module, module.training) for module in lent.modules()]

    # 2. The parameters that train; all of them in a model that was loaded for inference.
    floating: list[Tensor] = [p for p in lent.parameters() if p.is_floating_point()]
    parameters = [parameter for parameter in floating if parameter.requires_grad]
    unfrozen: list[Tensor] = []
    if not parameters:
        unfrozen = floating
        parameters = floating

    # 3. Lend it, and put everything back.
    try:
        for parameter in unfrozen:
            parameter.requires_grad_(True)
        lent.eval()
        with borrowed_generators():
            yield lent, parameters, precision
    finally:
        for parameter in unfrozen:
            parameter.requires_grad_(False)
        for module, training in modes:
            module.training = training
