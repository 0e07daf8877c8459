"""Text as a probe: read from a file, and turned into token ids by the model's own tokenizer."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacdiag.errors import ProbeError, SourceError, one_line
from jacdiag.sources.formats.json_files import read_json
from jacdiag.sources.module_wrappers import unwrap
from jacdiag.sources.source import Source

SUFFIXES = (".txt", ".text", ".md", ".jsonl")
# size of a vocabulary of bytes: all 256, and up to eight special ids after them
LEAST_BYTES, MOST_BYTES = 256, 264

_LARGEST = 1 << 22  # bytes of a text that are read: more than any probe needs
_MOSTLY_UNKNOWN = 0.5  # share of unknown tokens above which a tokenizer does not know the text
_VOCABULARIES = (
    "tokenizer.json",
    "*.model",
    "vocab*",
    "*.spm",
    "*.tiktoken",
    "tekken.json",
    "bpe.codes",
)
# they work on bytes or code points
_WITHOUT_VOCABULARY = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True, kw_only=True)
class Tokenized:
    """Token ids of a text.

    Attributes:
        ids: (tokens,).
        name: what the report says: the file, and what made ids of it.
        notes: what a reader of the report should know.
    """

    ids: Tensor
    name: str
    notes: list[str]


def is_text(path: Path) -> bool:
    """Return whether a file's suffix says that it holds text."""
    return path.suffix.lower() in SUFFIXES


def tokenize_file(
    path: Path, source: Source, vocabulary: int, tokens: int, *, trust_code: bool
) -> Tokenized:
    """Return the first tokens of a text file.

    A tokenizer in the source's own folder is used first, or one next to its weights file. Without
    one, bytes are ids if the vocabulary is one of bytes.

    Args:
        path: of the text: UTF-8, or UTF-16 or UTF-32 with a byte order mark. A .jsonl file has a
            "text" in each line.
        source: with a model.
        vocabulary: how many ids the model knows.
        tokens: how many are wanted; fewer are returned if the text is shorter.
        trust_code: let a tokenizer's own Python code run.

    Returns:
        The ids, with what the report says about them.

    Raises:
        ProbeError: the text cannot be read or tokenised, or nothing is known that could.
    """
    # 1. Without a tokenizer.
    bytes_are_ids = LEAST_BYTES <= vocabulary <= MOST_BYTES
    folder = next(filter(has_tokenizer, _folders(source)), None)
    if folder is None and bytes_are_ids:
        return _as_bytes(path, vocabulary, tokens)
    if folder is None:
        raise ProbeError(
            f"'{path}' is text, and no tokenizer for this model is known",
            got=f"a vocabulary of {vocabulary:,}, and no tokenizer files with the model",
            hint="a Hugging Face folder with its tokenizer, or token ids in a .npy or .bin "
            "(uint16) file; "
            f"bytes are ids for a vocabulary of {LEAST_BYTES} to {MOST_BYTES}",
        )

    # 2. A tokenizer next to the file of a model on bytes may be another model's.
    may_be_foreign = bytes_are_ids and folder != source.folder
    try:
        tokenizer = load_tokenizer(folder, trust_code=trust_code)
    except ProbeError:
        if may_be_foreign:
            return _as_bytes(path, vocabulary, tokens)
        raise
    if may_be_foreign and len(tokenizer) > vocabulary:
        return _as_bytes(path, vocabulary, tokens)

    # 3. With the tokenizer.
    return _through(tokenizer, folder, path, tokens)


def tokenize_sample(
    folder: Path, vocabulary: int, tokens: int, *, trust_code: bool, repeat: bool = True
) -> Tensor | None:
    """Return the first tokens of the text that ships with jacdiag, repeated if there are too few.

    Args:
        folder: with a tokenizer.
        vocabulary: how many ids the model knows.
        tokens: how many are wanted.
        trust_code: let a tokenizer's own Python code run.
        repeat: fill up with the text again; else fewer tokens are returned if there are too few.

    Returns:
        The ids (tokens,), or None if this tokenizer cannot be loaded, does not know the text, or is
        another model's.
    """
    # 1. Nobody asked for text: if it fails, random tokens are left, and the report says
    #    off-distribution.
    text = (Path(__file__).parent / "probe.txt").read_text(encoding="utf-8")
    try:
        tokenizer = load_tokenizer(folder, trust_code=trust_code)
        ids = _encode(tokenizer, text, folder)
    except ProbeError:
        return None

    # an empty vocabulary
    if not len(ids):
        return None

    # 2. A tokenizer of another model, or of another language.
    is_outside = int(ids.max()) >= vocabulary
    if is_outside or _unknown(tokenizer, ids) > _MOSTLY_UNKNOWN:
        return None

    # 3. As many as are wanted.
    if repeat:
        repeats = -(-tokens // len(ids))  # rounded up
        ids = ids.repeat(repeats)
    return ids[:tokens]


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds the files of a tokenizer.

    `AutoTokenizer` does not say: from a config.json alone it builds one with an empty vocabulary.
    """
    # 1. A vocabulary.
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:
        return False
    if any(_is_vocabulary(name) for name in names):
        return True

    # 2. A tokenizer that needs none, or brings its own code.
    settings = _settings(folder)
    if settings.get("tokenizer_class") in _WITHOUT_VOCABULARY:
        return True
    return _own_code(settings)


def _is_vocabulary(name: str) -> bool:
    """Return whether a file is called as vocabularies are."""
    return any(fnmatch(name, pattern) for pattern in _VOCABULARIES)


def load_tokenizer(folder: Path, *, trust_code: bool) -> Any:
    """Load the tokenizer of a folder, from this machine only.

    Args:
        folder: with the tokenizer's files.
        trust_code: let its own Python code run.

    Returns:
        The tokenizer of transformers.

    Raises:
        ProbeError: it cannot be loaded, or only by running its code.
    """
    # 1. Code that may not run. A tokenizer.json can be read without it.
    needs_code = _own_code(_settings(folder)) and not (folder / "tokenizer.json").is_file()
    if needs_code and not trust_code:
        raise ProbeError(
            f"the tokenizer of '{folder}' is Python code of its own",
            got="auto_map in tokenizer_config.json",
            hint=(
                "--trust-pickle lets it run, with all your rights; or give token ids as .npy or "
                ".bin (uint16)"
            ),
        )

    # 2. Foreign code and foreign files may raise anything.
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_code
        )
    except Exception as error:
        raise ProbeError(
            f"cannot load the tokenizer of '{folder}'",
            got=one_line(error),
            hint="give token ids as .npy or .bin (uint16) in place of text",
        ) from error


def read_text(path: Path) -> str:
    """Return the text of a file, up to 4 MiB of it.

    Args:
        path: UTF-8 with or without a byte order mark; UTF-16 and UTF-32 with one. Of a .jsonl file,
            the "text" of every line.

    Raises:
        ProbeError: it cannot be read, or is in another encoding.
    """
    # 1. The bytes.
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST)
    except OSError as error:
        raise ProbeError(f"cannot read the text '{path}'", got=error.strerror) from error

    # 2. The text. The last character may have been cut; incremental decoding leaves it out.
    is_complete = len(data) < _LARGEST
    decoder = codecs.getincrementaldecoder(_marked_encoding(data) or "utf-8")()
    try:
        text = decoder.decode(data, final=is_complete)
    except UnicodeDecodeError as error:
        raise ProbeError(
            f"'{path}' is no UTF-8 text",
            got=f"byte 0x{data[error.start]:02x} at position {error.start}",
            hint=f"for example: iconv -f latin1 -t utf-8 '{path}' > utf8.txt",
        ) from error

    # 3. Of a .jsonl file, one field of each line.
    if not _is_jsonl(path):
        return text
    return "\n".join(_lines_of(path, text, is_complete=is_complete))


def _is_jsonl(path: Path) -> bool:
    """Return whether a file has a JSON object in each line."""
    return path.suffix.lower() == ".jsonl"


def _marked_encoding(data: bytes) -> str | None:
    """Return the encoding that a byte order mark says; None if there is no mark."""
    for mark, name in _MARKS:
        if data.startswith(mark):
            return name
    return None


def _lines_of(path: Path, text: str, *, is_complete: bool) -> Iterator[str]:
    """Yield the "text" of every line of a .jsonl file; the last line may have been cut."""
    lines = text.splitlines()
    if not is_complete:
        lines = lines[:-1]
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _text_in(line, number, path)


def _text_in(line: str, number: int, path: Path) -> str:
    """Return the "text" of a line of a .jsonl file.

    Raises:
        ProbeError: the line is no JSON, or has no text.
    """
    # 1. Read the line.
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProbeError(
            f"cannot read the text '{path}'", got=f"line {number}: {one_line(error)}"
        ) from error

    # 2. Take its text.
    text = None
    if isinstance(row, dict):
        text = row.get("text")
    if not isinstance(text, str):
        raise ProbeError(
            f"'{path}' has a line without text",
            got=f"line {number}",
            hint='{"text": "..."} in each',
        )
    return text


def _folders(source: Source) -> Iterator[Path]:
    """Yield the folders in which a source's tokenizer may be."""
    if source.folder is not None:
        yield source.folder
    for place in _places(source):
        # A place may be a name on a hub.
        if not isinstance(place, str) or not place:
            continue
        path = Path(place)
        if path.is_dir():
            yield path
        elif path.is_file():
            yield path.parent


def _places(source: Source) -> Iterator[Any]:
    """Yield what a source says about where it is from: texts, or anything in a config."""
    # 1. Its weights, and its config.
    yield source.info.get("path")
    spec = str(source.info.get("factory") or "")
    if spec.startswith("hf:"):
        yield spec.removeprefix("hf:")

    # 2. A module of transformers that is already in memory knows its folder.
    if source.model is not None and source.info.get("format") == "module":
        config = getattr(unwrap(source.model), "config", None)
        yield getattr(config, "_name_or_path", None)


def _settings(folder: Path) -> dict[str, Any]:
    """Return the tokenizer_config.json of a folder; nothing if it cannot be read."""
    try:
        settings = read_json(folder / "tokenizer_config.json")
    except SourceError:
        return {}
    # JSON may be anything
    if not isinstance(settings, dict):
        return {}
    return settings


def _own_code(settings: dict[str, Any]) -> bool:
    """Return whether a tokenizer comes with Python code of its own."""
    classes = settings.get("auto_map")
    return isinstance(classes, dict) and "AutoTokenizer" in classes


def _as_bytes(path: Path, vocabulary: int, tokens: int) -> Tokenized:
    """Return the bytes of a text in UTF-8 as ids."""
    data = _utf8_of(path)[:tokens]
    ids = torch.tensor(list(data), dtype=torch.long)
    notes = []
    if vocabulary > LEAST_BYTES:
        notes.append(
            f"'{path.name}': bytes are taken as ids 0 to 255; the model's other "
            f"{vocabulary - LEAST_BYTES} ids are "
            "taken as special ones after them"
        )
    return Tokenized(ids=ids, name=path.name, notes=notes)


def _utf8_of(path: Path) -> bytes:
    """Return the bytes of a text, in UTF-8 if the file says which encoding it has.

    Without a byte order mark the bytes are taken as they are: a model on bytes knows any encoding.
    """
    if _is_jsonl(path):
        return read_text(path).encode()

    data = path.read_bytes()[:_LARGEST]
    # UTF-16 and UTF-32 are decoded, and a mark of UTF-8 is left out
    if _marked_encoding(data) is not None:
        return read_text(path).encode()
    return data


def _through(tokenizer: Any, folder: Path, path: Path, tokens: int) -> Tokenized:
    """Return the ids of a text file through a tokenizer.

    Args:
        tokenizer: of transformers.
        folder: that holds it.
        path: of the text.
        tokens: how many are wanted.

    Raises:
        ProbeError: the tokenizer makes no token of the text, or does not know it.
    """
    # 1. Tokens of the text.
    text = read_text(path)
    ids = _first_tokens(tokenizer, folder, text, tokens)
    kind = type(tokenizer).__name__
    if text.strip() and not len(ids):
        raise ProbeError(
            f"the tokenizer of '{folder}' makes no token of '{path}'",
            got=f"{kind} with {len(tokenizer):,} tokens",
            hint="its files may be incomplete; token ids can be given as .npy or .bin (uint16)",
        )

    # 2. Tokens that it knows.
    unknown = _unknown(tokenizer, ids)
    if unknown > _MOSTLY_UNKNOWN:
        raise ProbeError(
            f"the tokenizer of '{folder}' does not know the text '{path}'",
            got=f"{unknown:.0%} of the first {len(ids)} tokens are {tokenizer.unk_token!r}",
            hint="give text of the kind that the model was trained on",
        )
    notes = []
    if unknown > 0:
        notes.append(
            f"{unknown:.1%} of the probe's tokens are unknown to the tokenizer "
            f"({tokenizer.unk_token})"
        )
    name = f"{path.name} through {kind} of {folder.resolve().name}"
    return Tokenized(ids=ids, name=name, notes=notes)


def _first_tokens(tokenizer: Any, folder: Path, text: str, tokens: int) -> Tensor:
    """Return the first tokens of a text, (tokens,).

    As much of it as is needed is tokenised: a slow tokenizer takes minutes for all of a text.
    """
    characters = max(4096, 8 * tokens)
    while True:
        ids = _encode(tokenizer, text[:characters], folder)
        # The cut may fall into a word, so the last tokens of a part are not those of the text.
        is_enough = len(ids) >= tokens + 16
        if is_enough or characters >= len(text):
            return ids[:tokens]

        # one token may be many characters
        characters *= 4


def _encode(tokenizer: Any, text: str, folder: Path) -> Tensor:
    """Return the ids of a text, (tokens,), without special tokens around it."""
    # a tokenizer is foreign code, and may raise anything
    try:
        ids = torch.as_tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        # no tokens are a tensor of floating-point numbers
        are_integers = not len(ids) or not ids.dtype.is_floating_point
        if ids.dim() != 1 or not are_integers:
            raise ValueError(f"ids of shape {tuple(ids.shape)}, {ids.dtype}")
    except Exception as error:
        raise ProbeError(
            f"the tokenizer of '{folder}' raised",
            got=one_line(error),
            hint="give token ids as .npy or .bin (uint16) in place of text",
        ) from error
    return ids.long()


def _unknown(tokenizer: Any, ids: Tensor) -> float:
    """Return the share of unknown tokens; 0 for a tokenizer without such a token."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if not isinstance(unknown, int) or not len(ids):
        return 0.0

    is_unknown = ids == unknown
    return float(is_unknown.double().mean())
