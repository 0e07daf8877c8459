"""Figures of matplotlib as the bytes of a file, the same for the same figure, and their suffixes.

Every picture is drawn and written here, with a style of its own: neither the style nor the current
figure of the user plays a part in it, and both stay as they are.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jacdiag.errors import UsageError
from jacdiag.records.output_file import is_streamed, leads_to_stdout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
STYLE: Mapping[str, Any] = {
    "font.family": "DejaVu Sans",
    "svg.hashsalt": "jacdiag",
    "svg.fonttype": "path",
}

# By suffix, the entry that would hold the time of writing.
_UNDATED: Mapping[str, dict[str, Any]] = {
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
    ".png": {},
}


def check_suffix(path: str | os.PathLike[str]) -> str:
    """Return the suffix that chooses a picture's format.

    What is written through (stdout, a device, a pipe) needs none of them: PNG is the default there.

    Args:
        path: where the picture goes.

    Raises:
        UsageError: no picture format has this suffix, or the picture would go to a terminal.
    """
    # 1. A terminal would show the bytes of a picture as text.
    if leads_to_stdout(path) and sys.stdout.isatty():
        raise UsageError(
            "a picture cannot be written to a terminal", hint="redirect stdout, or name a file"
        )

    # 2. The suffix.
    suffix = Path(path).suffix.lower()
    if suffix in FORMATS:
        return suffix

    # 3. PNG where there need be none.
    if is_streamed(path):
        return ".png"

    raise UsageError(
        f"cannot draw to '{path}'", got=f"suffix '{suffix}'", hint="end it in .png, .svg or .pdf"
    )


def picture_bytes(
    draw: Callable[[], Figure], suffix: str, *, dpi: int, style: Mapping[str, Any] = STYLE
) -> bytes:
    """Return a figure as the bytes of a file, without the time of writing.

    Args:
        draw: builds the figure; it is called with the style set.
        suffix: of the format: .png, .svg or .pdf.
        dpi: dots per inch of a PNG.
        style: settings of matplotlib, on top of its defaults.
    """
    from matplotlib import style as matplotlib_style

    buffer = io.BytesIO()
    with matplotlib_style.context(dict(style), after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name may hold characters that the font lacks
        figure = draw()
        figure.savefig(buffer, format=suffix[1:], dpi=dpi, metadata=_UNDATED[suffix])
    return buffer.getvalue()
