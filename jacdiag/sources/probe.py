"""Probe inputs: random tokens over the rows in use, tokens of a file, text, or a factory."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jacdiag.errors import ProbeError, TraceError, UsageError
from jacdiag.records import ProbeRecord
from jacdiag.sources import factory
from jacdiag.sources import input_facts as facts
from jacdiag.sources import text_probe as text
from jacdiag.sources.module_wrappers import unwrap
from jacdiag.sources.source import Source

OWN_TEXT = "text through its own tokenizer"  # the text that ships with jacdiag

_DEFAULT_SEQ = 128
_READABLE = ".npy, .bin (uint16) or .pt with token ids, or text in .txt, .md or .jsonl"
_LENGTHWISE = r"sequence|seq_?len|length|position|context|block_?size"
_MOST_TOKENS, _MOST_ROWS = 1 << 22, 4096  # that are read of a file
_ROWS = 1024  # of an embedding at a time: a table may be large, and stored in less than float32
# a row whose std is under this share of the median row's was never trained, or is padding
_DEAD = 0.1


@dataclass(frozen=True)
class Probe:
    """What the model is called with: `model(*args, **kwargs)`.

    Attributes:
        token_ids: (B, T) ids, where the input is token ids.
        record: for the report.
        notes: for the report.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    token_ids: Tensor | None
    record: ProbeRecord
    notes: list[str] = field(default_factory=list)
    limit: int | None = None  # rows of the model's table of positions

    @classmethod
    def of_inputs(cls, inputs: Any, seed: int = 0) -> Probe:
        """Return the probe of an input: a tensor, a tuple of arguments, or a dict by keyword.

        Args:
            inputs: as the model's forward takes it.
            seed: for the record, of what was drawn.

        Raises:
            ProbeError: it holds no tensor, or an empty one.
        """
        # 1. The arguments of the model's forward.
        args, kwargs = _as_arguments(inputs)
        tensors = list(_tensors((args, kwargs)))
        if not tensors:
            raise ProbeError(
                "the probe input holds no tensor",
                got=f"a {type(inputs).__name__}",
                hint="a tensor, a tuple of arguments, or a dict of keyword arguments",
            )
        if not tensors[0].numel():
            got = f"a tensor of shape {tuple(tensors[0].shape)}"
            raise ProbeError(
                "the probe input is empty", got=got, hint="at least one sequence of one token"
            )

        # 2. The token ids among them, and the size.
        ids = next(filter(_are_ids, tensors), None)
        shape = tensors[0].shape if ids is None else ids.shape
        batch = shape[0] if shape else 1
        seq = shape[1] if len(shape) > 1 else None
        return cls(args, kwargs, ids, ProbeRecord(batch, seq, seed, tokens="inputs"))

    @property
    def described(self) -> ProbeRecord:
        """The record with the digest of the input: equal if two reports used the same one."""
        return replace(self.record, digest=self.digest())

    def digest(self) -> str:
        """Return a hash of the token ids, or of all tensors of an input that has none."""
        tensors = list(_tensors((self.args, self.kwargs)))
        if self.token_ids is not None:
            tensors = [self.token_ids]

        hashed = hashlib.sha256()
        for tensor in tensors:
            # The type that a device or a loader chose does not count.
            plain = tensor.detach().cpu()
            plain = plain.double() if plain.is_floating_point() else plain.long()
            hashed.update(str(tuple(plain.shape)).encode())
            hashed.update(plain.contiguous().numpy().tobytes())
        return hashed.hexdigest()[:16]

    def for_model(self, model: nn.Module) -> Probe:
        """Return the same input, handed in as another model takes it.

        Args:
            model: the model to run; token ids that were chosen here are passed by the name that it
                has for them.
        """
        if self.token_ids is None or self.record.tokens == "inputs":
            return self
        args, kwargs = _call(model, self.token_ids)
        return replace(self, args=args, kwargs=kwargs)

    def to(self, device: torch.device | str) -> Probe:
        """Return the same probe on another device."""
        args = tuple(_moved(value, device) for value in self.args)
        kwargs = {name: _moved(value, device) for name, value in self.kwargs.items()}
        token_ids = _moved(self.token_ids, device)
        return replace(self, args=args, kwargs=kwargs, token_ids=token_ids)

    @contextmanager
    def suspected(self) -> Iterator[None]:
        """Add a hint to an error of the model's code if the probe may be too long for it."""
        try:
            yield
        except TraceError as error:
            if error.hint or not self._may_be_too_long(error.__cause__):
                raise
            hint = self._hint_on_length()
            raise TraceError(error.what, got=error.got, hint=hint) from error.__cause__

    def _hint_on_length(self) -> str:
        """Return what to try if the probe may be too long."""
        length = self.record.seq or 0

        # The table of positions says how long it may be.
        if self.limit is not None and self.limit < length:
            return f"--seq {self.limit}: the model's table of positions has {self.limit} rows"

        # Nothing does: half of it is a guess.
        return (
            f"if the model takes less than the probe's {length} tokens a sequence: --seq "
            f"{length // 2}"
        )

    def _may_be_too_long(self, error: BaseException | None) -> bool:
        """Return whether an error can be about the length of the tokens that were chosen here."""
        # 1. Inputs that were passed are what the caller wants.
        if self.token_ids is None or self.record.tokens == "inputs":
            return False
        length = self.record.seq or 0
        if length < 2:
            return False

        # 2. An assertion or an index says little about its reason.
        if isinstance(error, AssertionError | IndexError):
            return True
        if not isinstance(error, RuntimeError | ValueError):
            return False
        pattern = rf"{_LENGTHWISE}|\b{length}\b"
        return re.search(pattern, str(error), re.IGNORECASE) is not None


def _as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return an input as positional arguments and keyword arguments."""
    if isinstance(inputs, dict):
        return (), _by_name(inputs)
    # a tokenizer's BatchEncoding
    if hasattr(inputs, "keys") and hasattr(inputs, "data"):
        return (), dict(inputs.items())
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def _by_name(inputs: dict[Any, Any]) -> dict[str, Any]:
    """Return keyword arguments; raise if a key is no name."""
    for key in inputs:
        if not isinstance(key, str):
            hint = "a dict of keyword arguments, such as {'input_ids': ids}"
            raise ProbeError(
                "the probe input is a dict with keys that are no names", got=repr(key), hint=hint
            )

    return dict(inputs)


def _moved(value: Any, device: torch.device | str) -> Any:
    """Return a value with its tensors on a device.

    Args:
        value: a tensor, or lists, tuples and dicts with tensors in them. Any other object stays as
            it is.
        device: where they go.
    """
    if isinstance(value, Tensor):
        return value.to(device)

    # Of a subclass of these, nothing is known.
    if type(value) in (list, tuple):
        items = [_moved(item, device) for item in value]
        return type(value)(items)
    if type(value) is dict:
        return {key: _moved(item, device) for key, item in value.items()}

    return value


def _are_ids(tensor: Tensor) -> bool:
    """Return whether a tensor can be token ids: integers, (B, T)."""
    if tensor.dim() != 2:
        return False

    # masks are no ids
    is_mask = tensor.dtype == torch.bool
    return not is_mask and not tensor.is_floating_point()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
        return

    # Of a dict, the values.
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def build_probe(
    source: Source,
    *,
    batch: int = 2,
    seq: int | None = None,
    seed: int = 0,
    tokens: str | os.PathLike[str] | None = None,
    inputs: str | os.PathLike[str] | Callable[..., Any] | None = None,
    trust_code: bool = False,
    number: int = 0,
) -> Probe:
    """Build the probe for a source.

    Args:
        source: with a model.
        batch: sequences of random tokens.
        seq: tokens per sequence; 128, or what the model allows if that is less.
        seed: of random tokens.
        tokens: a file of token ids (.npy, .bin in uint16, .pt), or of text (.txt, .md, .jsonl),
            which goes through the source's tokenizer. Bytes are ids for a vocabulary of 256 to 264
            without a tokenizer.
        inputs: a factory of the probe input, for a model that takes no token ids.
        trust_code: let a tokenizer's own Python code run.
        number: which of several probes, from 0. Random input is drawn with the seed plus this
            number. Of a file, each probe is the next part.

    Returns:
        The probe, on the CPU.

    Raises:
        UsageError: both `tokens` and `inputs` are given.
        ProbeError: tokens out of the vocabulary, a sequence too long, an input that cannot be
            guessed.

    Example:
        >>> from jacdiag.sources import load
        >>> sizes = {"n_layer": 1, "n_embd": 12, "block_size": 8}
        >>> gpt = load("jacdiag.sources.gpt:build", model_args=sizes)
        >>> build_probe(gpt, batch=3).token_ids.shape
        torch.Size([3, 8])
    """
    model = source.model
    assert model is not None
    check_one_probe(tokens=tokens, input_factory=inputs)
    seed += number

    # 1. Input that is no token ids.
    if inputs is not None:
        values = factory.call(factory.resolve(inputs), factory.name_of(inputs), {}, seed)
        return Probe.of_inputs(values, seed)
    kind = facts.main_input(model)
    if kind == "pixels" and tokens is None:
        return _pixels(model, batch, seed)
    if kind != "tokens" or source.vocab_size is None:
        raise ProbeError(
            f"what {type(model).__name__} takes as its input cannot be told",
            got="no token embedding and no vocabulary in its config",
            hint="--inputs FACTORY builds the probe input; in Python: jacdiag.audit(model, inputs)",
        )

    # 2. Token ids: of a file, of the text that ships, or random.
    length = _length(source, seq)
    if tokens is not None:
        size = _Size(batch=batch, length=length, is_length_given=seq is not None, number=number)
        chosen = _of_file(Path(tokens), source, size, trust_code=trust_code)
    else:
        size = _Size(batch=batch, length=length, number=number)
        chosen = _of_no_file(source, size, seed, trust_code=trust_code)

    # 3. The arguments that pass them.
    ids = chosen.ids
    record = ProbeRecord(
        ids.shape[0], ids.shape[1], seed, tokens=chosen.name, excluded_rows=chosen.excluded_rows
    )
    args, kwargs = _call(model, ids)
    return Probe(args, kwargs, ids, record, chosen.notes, limit=facts.position_rows(model))


def check_one_probe(*, tokens: Any = None, input_factory: Any = None, inputs: Any = None) -> None:
    """Raise if the probe is given in more than one way: one of them would be left out in silence.

    Args:
        tokens: a file of tokens or text.
        input_factory: a factory of the probe input.
        inputs: the probe itself.

    Raises:
        UsageError: more than one is given.
    """
    ways = []
    if tokens is not None:
        ways.append(f"--tokens {tokens}")
    if input_factory is not None:
        ways.append(f"--inputs {factory.name_of(input_factory)}")
    if inputs is not None:
        ways.append("inputs that were passed")
    if len(ways) > 1:
        raise UsageError(
            "the probe is given twice", got=" and ".join(ways), hint="give one of them"
        )


def check_varied(probes: Sequence[Probe], factory_given: Any) -> None:
    """Raise if two of several probes are the same input: their spread would say nothing.

    Args:
        probes: all that are measured.
        factory_given: what `--inputs` named, None if nothing.

    Raises:
        UsageError: the factory of the input gives the same tensors with another seed.
    """
    # Tokens of a file or of the text differ by their place, random ones by their seed.
    if factory_given is None:
        return
    first = _inputs_of(probes[0])
    for number, probe in enumerate(probes[1:], start=1):
        if _all_same(first, _inputs_of(probe)):
            raise UsageError(
                "--probes needs an input that varies",
                got=(
                    f"--inputs {factory.name_of(factory_given)} gives the same tensors with "
                    f"another seed ({number})"
                ),
                hint=(
                    "draw the input with torch's random numbers, seeded anew for each probe; or "
                    "leave --probes out"
                ),
            )


def _inputs_of(probe: Probe) -> list[Tensor]:
    """Return the tensors of a probe."""
    return list(_tensors((probe.args, probe.kwargs)))


def _all_same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Return whether two inputs are the same tensors, in order."""
    if len(first) != len(second):
        return False

    return all(map(_same, first, second))


def _same(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors are equal."""
    return first.shape == second.shape and torch.equal(first, second)


def _length(source: Source, seq: int | None) -> int:
    """Return how many tokens a sequence has.

    Raises:
        ProbeError: the model allows fewer than were given.
    """
    # 1. As the model allows.
    most = source.max_seq
    if not seq:
        return min(_DEFAULT_SEQ, most or _DEFAULT_SEQ)

    # 2. As given.
    if most is not None and seq > most:
        raise ProbeError(
            "the sequence is longer than the model allows",
            got=f"--seq {seq}, the model says {most}",
            hint=f"--seq {most}",
        )
    return seq


@dataclass(frozen=True, kw_only=True)
class _Size:
    """The size of a probe, and of several probes which one it is.

    Attributes:
        batch, length: sequences, and tokens of each.
        is_length_given: whether a length was given; else a table of ids keeps its own.
        number: from 0; each probe takes the tokens after those of the one before.
    """

    batch: int
    length: int
    is_length_given: bool = False
    number: int = 0

    @property
    def tokens(self) -> int:
        """Return how many tokens this probe and those before it take."""
        return (self.number + 1) * self.batch * self.length


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """Token ids (B, T) with what the report says about them."""

    ids: Tensor
    name: str
    excluded_rows: int = 0
    notes: list[str] = field(default_factory=list)


def _of_file(path: Path, source: Source, size: _Size, *, trust_code: bool) -> _Chosen:
    """Return the ids of a file, or of its text."""
    vocab = source.vocab_size
    assert vocab is not None
    if not path.is_file():
        what = f"no such token file: '{path}'"
        if path.exists():
            what = f"'{path}' is a folder or a device, not a file of tokens"
        raise ProbeError(
            what,
            hint=f"{_READABLE}; without it the probe is random tokens",
        )

    # 1. Ids.
    if not text.is_text(path):
        ids = _rows(_read_tokens(path), path, size)
        return _Chosen(ids=_checked(ids, vocab, path.name), name=path.name)

    # 2. Text, which may be too short for all sequences.
    tokenized = text.tokenize_file(path, source, vocab, size.tokens, trust_code=trust_code)
    ids = _rows(tokenized.ids, path, size)
    notes = list(tokenized.notes)
    if len(ids) < size.batch:
        notes.append(
            f"'{path.name}' has {len(tokenized.ids)} tokens: they fill {len(ids)} of {size.batch} "
            "sequences"
        )
    return _Chosen(ids=_checked(ids, vocab, tokenized.name), name=tokenized.name, notes=notes)


def _of_no_file(source: Source, size: _Size, seed: int, *, trust_code: bool) -> _Chosen:
    """Return the text that ships if the source has a tokenizer for it, else random tokens."""
    # 1. Text. A model that was not trained knows no text.
    vocab = source.vocab_size
    assert vocab is not None
    ids = None
    if source.step != 0:
        ids = _shipped_text(source, size, vocab, trust_code=trust_code)
    if ids is not None:
        return _Chosen(ids=ids, name=OWN_TEXT)

    # 2. Random tokens.
    alive = living_rows(source, vocab)
    generator = torch.Generator().manual_seed(seed)
    drawn = alive[torch.randint(len(alive), (size.batch, size.length), generator=generator)]
    return _Chosen(ids=drawn, name="random", excluded_rows=vocab - len(alive))


def _shipped_text(source: Source, size: _Size, vocab: int, *, trust_code: bool) -> Tensor | None:
    """Return ids (B, T) of the text that ships; None if the source has no tokenizer for it.

    Args:
        source: with a model.
        size: of the probe.
        vocab: how many ids the model knows.
        trust_code: let a tokenizer's own Python code run.

    Raises:
        ProbeError: the text is too short for so many probes.
    """
    folder = source.folder
    if folder is None or not text.has_tokenizer(folder):
        return None
    # A single probe may repeat the text. Several that are the same would say nothing.
    ids = text.tokenize_sample(
        folder, vocab, size.tokens, repeat=size.number == 0, trust_code=trust_code
    )
    if ids is None:
        return None
    if len(ids) < size.tokens:
        what, more = "the text that ships with jacdiag", "--tokens FILE with more text"
        raise _too_few(len(ids), what, size, more)
    return ids[-size.batch * size.length :].view(size.batch, size.length)


def living_rows(source: Source, vocab: int) -> Tensor:
    """Return ids of the embedding rows that a probe may draw from.

    Those are not special, not padding, not near zero and no twins.

    Args:
        source: with a model.
        vocab: how many ids the model knows.

    Returns:
        The ids (rows,), in order; all of them if fewer than two are left.
    """
    model = source.model
    assert model is not None
    usable = torch.ones(vocab, dtype=torch.bool)

    # 1. Special ids, by the config.
    special = [i for i in facts.special_ids(model) if 0 <= i < vocab]
    usable[special] = False

    # 2. Rows that were never trained, by the table.
    table = facts.embedding(model)
    if table is not None:
        usable &= _trained_rows(table, source.value_of(table.weight), vocab)
    alive = usable.nonzero().squeeze(1)
    if len(alive) < 2:
        return torch.arange(vocab)
    return alive


def _trained_rows(table: nn.Embedding, weight: Tensor | None, vocab: int) -> Tensor:
    """Return which rows of a table are not padding, not near zero and no twins, (vocab,).

    Args:
        table: the embedding.
        weight: its values, (rows, d); all rows count as trained if they are not known.
        vocab: how many rows the model uses.
    """
    # 1. The row of padding gets no gradient.
    trained = torch.ones(vocab, dtype=torch.bool)
    if weight is None:
        return trained
    if table.padding_idx is not None and table.padding_idx < vocab:
        trained[table.padding_idx] = False

    # 2. Rows near zero. A chunk at a time: a table may be large, and stored in less than float32.
    chunks = weight[:vocab].split(_ROWS)
    std = torch.cat([_std_of_rows(chunk.float().cpu()) for chunk in chunks])
    trained &= std >= _DEAD * std.median()

    # 3. Twins.
    return trained & ~_twins(weight[:vocab])


def _std_of_rows(rows: Tensor) -> Tensor:
    """Return the std of each row of (n, d), in several times less time than `Tensor.std` takes."""
    centred = rows - rows.mean(dim=1, keepdim=True)
    return torch.linalg.vector_norm(centred, dim=1) / math.sqrt(rows.shape[1])


def _twins(rows: Tensor) -> Tensor:
    """Return which rows equal another one to the bit: they fill up a table, never trained."""
    # Equal rows have equal products with a random vector, and others practically never.
    mark = torch.randn(
        rows.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    key = torch.cat([chunk.cpu().double() @ mark for chunk in rows.split(_ROWS)])
    _, place, count = key.unique(return_inverse=True, return_counts=True)
    return count[place] > 1


def _call(model: nn.Module, ids: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments that pass ids to a model.

    Models of transformers get them by name, with caches off; others as the first argument.
    """
    if not facts.takes(model, "input_ids"):
        return (ids,), {}

    kwargs: dict[str, Any] = {"input_ids": ids}
    # nothing is generated, so that no cache is needed
    if facts.takes(model, "use_cache"):
        kwargs["use_cache"] = False
    # both sides of an encoder-decoder model get the same ids
    if facts.takes(model, "decoder_input_ids"):
        kwargs["decoder_input_ids"] = ids

    return (), kwargs


def _pixels(model: nn.Module, batch: int, seed: int) -> Probe:
    """Return random images of the size that the model's config names."""
    config: Any = getattr(unwrap(model), "config", None)
    # 1. The size: one number, or several of which the last two are those of the image.
    size = getattr(config, "image_size", 224)
    if isinstance(size, int):
        height, width = size, size
    else:
        height, width = tuple(size)[-2:]

    # 2. The images.
    shape = (batch, getattr(config, "num_channels", 3), height, width)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    record = ProbeRecord(batch, None, seed, tokens="random pixels")
    return Probe((), {"pixel_values": pixels}, None, record)


# -- files and text --------------------------------------------------------------------------------
def _rows(ids: Tensor, path: Path, size: _Size) -> Tensor:
    """Cut ids into sequences: at most `size.batch` of them, (B, T).

    A table keeps its own length if none was given.
    """
    # 1. A table.
    if ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise ProbeError(
            f"'{path}' holds no token ids",
            got=f"{ids.dtype}".removeprefix("torch."),
            hint="integers are expected",
        )
    ids = ids.long()
    is_table = ids.dim() == 2 and ids.numel() > 0
    if is_table and not size.is_length_given:
        return _table_rows(ids[:, : size.length], path, size)

    # 2. Tokens in a row: those after the probes before this one.
    flat = ids.flatten()
    if size.number and len(flat) < size.tokens:
        raise _too_few(len(flat), f"'{path}'", size, "more tokens")
    flat = flat[size.tokens - size.batch * size.length :]
    if len(flat) < size.length:
        raise ProbeError(
            f"'{path}' has too few tokens",
            got=f"{len(flat)}, a sequence takes {size.length}",
            hint=f"--seq {len(flat)}" if len(flat) else None,
        )
    rows = min(size.batch, len(flat) // size.length)
    return flat[: rows * size.length].view(rows, size.length)


def _table_rows(rows: Tensor, path: Path, size: _Size) -> Tensor:
    """Return the rows of a table of ids that a probe takes."""
    start = size.number * size.batch
    end = start + size.batch
    # The first probe may have fewer rows than it should.
    if size.number == 0 or len(rows) >= end:
        return rows[start:end]

    hint = "more rows, or a smaller --batch"
    complete = len(rows) // size.batch
    if complete > 1:
        hint = f"--probes {complete}, or a smaller --batch"
    got = f"{len(rows)} rows; the first {size.number + 1} probes take {end}"
    raise ProbeError(f"'{path}' has too few sequences for so many probes", got=got, hint=hint)


def _too_few(have: int, what: str, size: _Size, more: str) -> ProbeError:
    """Return the error of a text that does not fill another probe.

    Args:
        have: how many tokens there are.
        what: holds them.
        size: of the probe.
        more: what to give in its place.
    """
    hint = f"{more}, or a smaller --batch or --seq"
    complete = have // (size.batch * size.length)
    if complete > 1:
        hint = f"--probes {complete}, or {more}"
    got = (
        f"{have} tokens; the first {size.number + 1} probes of {size.batch} x {size.length} "
        f"take {size.tokens}"
    )
    return ProbeError(f"{what} has too few tokens for so many probes", got=got, hint=hint)


def _read_tokens(path: Path) -> Tensor:
    """Return the first tokens of a file.

    Raises:
        ProbeError: it cannot be read, or is of another format.
    """
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise ProbeError(
            f"'{path}' is no token file", got=path.suffix or "no suffix", hint=_READABLE
        )

    # a stranger's bytes in the readers of others: they may raise anything
    try:
        return reader(path)
    except Exception as error:
        got = _said(error)
        raise ProbeError(f"cannot read tokens from '{path}'", got=got) from error


def _read_raw(path: Path) -> Tensor:
    """Return the first tokens of a .bin file, as nanoGPT writes it: uint16, little-endian."""
    import numpy as np

    tokens = np.fromfile(path, dtype="<u2", count=_MOST_TOKENS)
    return torch.from_numpy(tokens.astype("int64"))


def _read_torch(path: Path) -> Tensor:
    """Return the tensor of a .pt file."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, Tensor):
        raise ValueError(f"it holds a {type(content).__name__}, not a tensor")
    return content


def _said(error: Exception) -> str:
    """Return the first line of an error that may have no text."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _read_numpy(path: Path) -> Tensor:
    """Return the first tokens of a .npy file: of a table its first rows."""
    import numpy as np

    # 1. The first tokens. The rest stays on the disk.
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"an array of {array.dtype}")
    if array.ndim == 2:
        first = array[:_MOST_ROWS]
    else:
        first = array.reshape(-1)[:_MOST_TOKENS]

    # 2. As torch takes them. Floating-point numbers are refused later, with what to do.
    kind = "float32" if array.dtype.kind == "f" else "int64"
    return torch.from_numpy(np.array(first).astype(kind))


_READERS = {".npy": _read_numpy, ".bin": _read_raw, ".pt": _read_torch}


def _checked(ids: Tensor, vocab: int, name: str) -> Tensor:
    """Return ids that lie in the vocabulary.

    Raises:
        ProbeError: one of them does not.
    """
    outside = ((ids < 0) | (ids >= vocab)).nonzero()
    if len(outside) == 0:
        return ids
    row, column = outside[0].tolist()
    first = f"id {int(ids[row, column])} at position {column} of sequence {row}"
    raise ProbeError(
        f"'{name}' holds tokens out of the vocabulary",
        got=f"{first}, {len(outside)} in all; the model knows 0 to {vocab - 1}",
    )
