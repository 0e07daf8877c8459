"""Letters in place of marks and symbols, for output that cannot hold them.

Such encodings are ascii, latin-1 and cp1252.

Python's own `errors="replace"` prints "?" for all of them, and "?" is the mark of an undecided
rule.
"""

from __future__ import annotations

import codecs
import json
import re
import unicodedata
from typing import Literal

Form = Literal["text", "markdown", "json", "xml"]

ERRORS = "jacdiag.letters"  # name of the codec error handler

_LETTERS = {
    # Levels and outcomes: each differs from all others, and from "?".
    "●": "E",
    "▲": "!",
    "✓": "+",
    "✗": "x",
    # Mathematics.
    "σ": "std",
    "ε": "eps",
    "∂": "d",
    "‖": "|",
    "√": "sqrt",
    "±": "+-",
    "−": "-",
    "·": ".",
    "×": "x",
    "≤": "<=",
    "≥": ">=",
    "≈": "~",
    "∞": "inf",
    "²": "^2",
    # Punctuation. A cut name stays as wide as it was cut to.
    "–": "-",
    "—": "-",
    "…": "~",
    "→": "->",
    "←": "<-",
    "▸": ">",
    "◀": "<",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
    "\u00a0": " ",
    "\ufffd": "#",
    # Curves and shades, from low to high.
    "▁": "_",
    "▂": ".",
    "▃": ":",
    "▄": "-",
    "▅": "=",
    "▆": "+",
    "▇": "*",
    "█": "#",
    "░": ":",
    "▒": "=",
    "▓": "*",
    "■": "#",
    # Frames.
    "─": "-",
    "━": "-",
    "│": "|",
    "┃": "|",
    "╸": "-",
    "╺": "-",
}
_BRAILLE = range(0x2800, 0x2900)  # a spinner
_BOXES = range(0x2500, 0x2580)
_SEPARATOR = re.compile(r"(?<=  )·(?=  )")
_PRODUCT = re.compile(r"(?<=[‖|\w)])·(?=[√‖|\w(])")


def letters_of(character: str) -> str:
    """Return ASCII letters for one character: the nearest that is readable, else its escape.

    Example:
        >>> letters_of("▲"), letters_of("é"), letters_of("中")
        ('!', 'e', '\\\\u4e2d')
    """
    # 1. Characters that this program prints.
    if character in _LETTERS:
        return _LETTERS[character]
    if ord(character) in _BRAILLE:
        return "*"
    if ord(character) in _BOXES:
        return "+"

    # 2. Any other: without its accents, or as an escape.
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    is_readable = plain.strip() and "?" not in plain
    if is_readable:
        return plain
    return character.encode("ascii", "backslashreplace").decode()


def spelled(text: str, encoding: str | None, form: Form = "text") -> str:
    """Return a text that an encoding can hold; it is unchanged if it already can.

    Letters that are wider than the character take their room from the next gap between columns, so
    that a table stays aligned.

    Args:
        text: lines to be printed.
        encoding: of the stream; UTF-8 if not known.
        form: "text" for people, "markdown" (in which a bar would end a cell), "json" or "xml" (in
            which characters have escapes that lose nothing).

    Example:
        >>> spelled("core ‖J‖·√(2N)  ·  σ_x ▲", "ascii")
        'core |J|*sqrt(2N) | std_x !'
    """
    encoding = encoding or "utf-8"
    if _holds(text, encoding):
        return text

    # 1. Syntaxes that have escapes.
    if form == "json":
        return _escaped_for_json(text, encoding)
    if form == "xml":
        return text.encode(encoding, "xmlcharrefreplace").decode(encoding)

    # 2. Others, line by line.
    if form == "markdown":
        text = _spelled_bars(text, encoding)
    lines = text.splitlines(keepends=True)
    return "".join(_spelled_line(line, encoding) for line in lines)


def _escaped_for_json(text: str, encoding: str) -> str:
    """Return JSON in which escapes stand for what an encoding cannot hold."""
    characters = []
    for character in text:
        if not _holds(character, encoding):
            character = json.dumps(character)[1:-1]  # the escape without its quotes
        characters.append(character)
    return "".join(characters)


def _spelled_bars(text: str, encoding: str) -> str:
    """Return Markdown in which bars and stars that stand for signs are escaped."""
    if not _holds("‖", encoding):
        text = text.replace("‖", "\\|")
    if not _holds("·", encoding):
        text = _PRODUCT.sub(r"\\*", text)
    return text


def register() -> str:
    """Register the codec error handler that prints letters, and return its name.

    It is for what reaches a stream in other ways than through `spelled`.
    """
    codecs.register_error(ERRORS, _handle)
    return ERRORS


def _handle(error: UnicodeError) -> tuple[str, int]:
    """Return letters in place of what could not be encoded, and where to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    unencodable = error.object[error.start : error.end]
    return "".join(map(letters_of, unencodable)), error.end


def _holds(text: str, encoding: str) -> bool:
    """Return whether an encoding has all characters of a text."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    except LookupError:
        # An encoding that Python does not know: its stream decides.
        return True
    return True


def _spelled_line(line: str, encoding: str) -> str:
    """Return one line in letters, with its columns where they were as far as there is room."""
    if _holds(line, encoding):
        return line

    # 1. The dot has two meanings that one letter cannot have.
    if not _holds("·", encoding):
        line = _SEPARATOR.sub("|", line)
        line = _PRODUCT.sub("*", line)

    # 2. Spell what does not fit, and count how much wider the line has become.
    pieces: list[str] = []
    wider = 0
    for piece in re.findall(r" {2,}|[^ ]| ", line):
        if piece.startswith("  "):
            # 3. A gap gives room back, down to one space.
            reduction = min(wider, len(piece) - 1)
            wider -= reduction
            piece = piece[reduction:]
        elif not _holds(piece, encoding):
            letters = letters_of(piece)
            wider += len(letters) - 1
            piece = letters
        pieces.append(piece)
    return "".join(pieces)
