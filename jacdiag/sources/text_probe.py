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

from jacdiag.errors import ProbeError, one_line
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

    Raises:
        ProbeError: the text cannot be read or tokenised, or nothing is known that could.
    """
    bytes_are_ids = LEAST_BYTES <= vocabulary <= MOST_BYTES
    folder = next(filter(has_tokenizer, _folders(source)), None)
    if folder is None:
        if bytes_are_ids:
            return _as_bytes(path, vocabulary, tokens)
        raise ProbeError(
            f"'{path}' is text, and no tokenizer for this model is known",
            got=f"a vocabulary of {vocabulary:,}, and no tokenizer files with the model",
            hint="a Hugging Face folder with its tokenizer, or token ids in a .npy or .bin "
            "(uint16) file; "
            f"bytes are ids for a vocabulary of {LEAST_BYTES} to {MOST_BYTES}",
        )
    try:
        tokenizer = load_tokenizer(folder, trust_code=trust_code)
    except ProbeError:
        if bytes_are_ids and folder != source.folder:
            return _as_bytes(path, vocabulary, tokens)
        raise
    if bytes_are_ids and folder != source.folder and len(tokenizer) > vocabulary:
        # the tokenizer next to the file is another model's
        return _as_bytes(path, vocabulary, tokens)
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
    text = (Path(__file__).parent / "probe.txt").read_text(encoding="utf-8")
    try:
        tokenizer = load_tokenizer(folder, trust_code=trust_code)
        ids = _encode(tokenizer, text, folder)
    # nobody asked for text: random tokens are left, and the report says off-distribution
    except ProbeError:
        return None
    if not len(ids) or int(ids.max()) >= vocabulary or _unknown(tokenizer, ids) > _MOSTLY_UNKNOWN:
        return None
    if not repeat:
        return ids[:tokens]
    repeats = -(-tokens // len(ids))
    return ids.repeat(repeats)[:tokens]


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds the files of a tokenizer.

    `AutoTokenizer` does not say: from a config.json alone it builds one with an empty vocabulary.
    """
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:
        return False
    if any(fnmatch(name, pattern) for name in names for pattern in _VOCABULARIES):
        return True
    settings = _settings(folder)
    return settings.get("tokenizer_class") in _WITHOUT_VOCABULARY or _own_code(settings)


def load_tokenizer(folder: Path, *, trust_code: bool) -> Any:
    """Load the tokenizer of a folder, from this machine only.

    Args:
        folder: with the tokenizer's files.
        trust_code: let its own Python code run.

    Raises:
        ProbeError: it cannot be loaded, or only by running its code.
    """
    if (
        _own_code(_settings(folder))
        and not trust_code
        and not (folder / "tokenizer.json").is_file()
    ):
        raise ProbeError(
            f"the tokenizer of '{folder}' is Python code of its own",
            got="auto_map in tokenizer_config.json",
            hint=(
                "--trust-pickle lets it run, with all your rights; or give token ids as .npy or "
                ".bin (uint16)"
            ),
        )
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_code
        )
    except Exception as error:  # a tokenizer is foreign code and foreign files
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
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST)
    except OSError as error:
        raise ProbeError(f"cannot read the text '{path}'", got=error.strerror) from error
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        # The last character may have been cut; incremental decoding leaves it out.
        whole = len(data) < _LARGEST
        text = codecs.getincrementaldecoder(encoding)().decode(data, final=whole)
    except UnicodeDecodeError as error:
        raise ProbeError(
            f"'{path}' is no UTF-8 text",
            got=f"byte 0x{data[error.start]:02x} at position {error.start}",
            hint=f"for example: iconv -f latin1 -t utf-8 '{path}' > utf8.txt",
        ) from error
    return (
        "\n".join(_lines_of(path, text, whole=whole)) if path.suffix.lower() == ".jsonl" else text
    )


def _lines_of(path: Path, text: str, *, whole: bool) -> Iterator[str]:
    """Yield the "text" of every line of a .jsonl file; the last line may have been cut."""
    lines = text.splitlines()
    for number, line in enumerate(lines if whole else lines[:-1], start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ProbeError(
                f"cannot read the text '{path}'", got=f"line {number}: {one_line(error)}"
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ProbeError(
                f"'{path}' has a line without text",
                got=f"line {number}",
                hint='{"text": "..."} in each',
            )
        yield row["text"]


def _folders(source: Source) -> Iterator[Path]:
    """Yield the folders in which a source's tokenizer may be."""
    if source.folder is not None:
        yield source.folder
    named = source.info.get("path")
    spec = str(source.info.get("factory") or "")
    places = [named, spec.removeprefix("hf:") if spec.startswith("hf:") else None]
    if source.model is not None and source.info.get("format") == "module":
        config = getattr(unwrap(source.model), "config", None)
        places.append(getattr(config, "_name_or_path", None))
    for place in places:
        if not isinstance(place, str) or not place:
            continue
        path = Path(place)
        if path.is_dir():
            yield path
        elif path.is_file():
            yield path.parent


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _own_code(settings: dict[str, Any]) -> bool:
    classes = settings.get("auto_map")
    return isinstance(classes, dict) and "AutoTokenizer" in classes


def _as_bytes(path: Path, vocabulary: int, tokens: int) -> Tokenized:
    text = read_text(path) if path.suffix.lower() == ".jsonl" else None
    data = path.read_bytes()[:_LARGEST] if text is None else text.encode()
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    if encoding is not None:
        data = read_text(path).encode()
    notes = []
    if vocabulary > LEAST_BYTES:
        notes.append(
            f"'{path.name}': bytes are taken as ids 0 to 255; the model's other "
            f"{vocabulary - LEAST_BYTES} ids are "
            "taken as special ones after them"
        )
    ids = (
        torch.frombuffer(bytearray(data[:tokens]), dtype=torch.uint8).long()
        if data
        else torch.zeros(0).long()
    )
    return Tokenized(ids=ids, name=path.name, notes=notes)


def _through(tokenizer: Any, folder: Path, path: Path, tokens: int) -> Tokenized:
    """Tokenise as much of a text as is needed: a slow tokenizer takes minutes for all of it."""
    text = read_text(path)
    characters = max(4096, 8 * tokens)
    while True:
        ids = _encode(tokenizer, text[:characters], folder)
        # The cut may fall into a word, so the last tokens of a part are not those of the text.
        if len(ids) >= tokens + 16 or characters >= len(text):
            break
        characters *= 4
    ids = ids[:tokens]
    kind = type(tokenizer).__name__
    name = f"{path.name} through {kind} of {folder.resolve().name}"
    if text.strip() and not len(ids):
        raise ProbeError(
            f"the tokenizer of '{folder}' makes no token of '{path}'",
            got=f"{kind} with {len(tokenizer):,} tokens",
            hint="its files may be incomplete; token ids can be given as .npy or .bin (uint16)",
        )
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
    return Tokenized(ids=ids, name=name, notes=notes)


def _encode(tokenizer: Any, text: str, folder: Path) -> Tensor:
    """Return the ids of a text, (tokens,), without special tokens around it."""
    try:
        ids = torch.as_tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        if ids.dim() != 1 or (len(ids) and ids.dtype.is_floating_point):
            raise ValueError(f"ids of shape {tuple(ids.shape)}, {ids.dtype}")
    except Exception as error:  # a tokenizer is foreign code
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
    return float((ids == unknown).double().mean())
