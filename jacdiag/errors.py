"""The errors of jacdiag: each says what is wrong, what was found, and what to try."""

from __future__ import annotations

from collections.abc import Iterable

# What to try if two runs of a model on one input differ. Every run is in eval mode.
REPEAT_THE_FORWARD = (
    "the model ran in eval mode: look for what the forward draws (noise, random routing, a "
    "functional dropout with training=True) or changes (a counter, a cache), and leave it out, or "
    "seed it inside the forward"
)


def printable(text: str) -> str:
    """Make text of a foreign file fit for a terminal.

    Control characters become escapes. Line ends stay.
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def clipped(text: str, most: int) -> str:
    """Text of at most that many characters, with a sign that something was cut."""
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def one_line(error: BaseException) -> str:
    """An error in one line: its class, and the first line of its text where it has one."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


class JacdiagError(Exception):
    """Base of every error that jacdiag raises on purpose.

    The command line turns it into exit code 2.

    Args:
        what: one sentence: what cannot be done.
        got: what was found instead (optional).
        hint: what to try next (optional).
    """

    def __init__(self, what: str, *, got: str | None = None, hint: str | None = None) -> None:
        self.what, self.got, self.hint = what, got, hint
        super().__init__("\n".join(part for part in (what, got, hint) if part))


class SourceError(JacdiagError):
    """A source cannot be read, is unsafe, or does not fit its model."""


class ProbeError(JacdiagError):
    """The probe does not fit the model.

    Token ids may be outside the vocabulary, a sequence too long, or an input of the wrong kind.
    """


class TraceError(JacdiagError):
    """The model's forward cannot be recorded or run again.

    Args:
        what, got, hint: as in every error.
        parameters: names of the parameters that the message is about.
    """

    def __init__(
        self,
        what: str,
        *,
        got: str | None = None,
        hint: str | None = None,
        parameters: Iterable[str] = (),
    ) -> None:
        super().__init__(what, got=got, hint=hint)
        self.parameters = list(parameters)


class MeasureError(JacdiagError):
    """A norm cannot be measured."""


class UsageError(JacdiagError):
    """An option or argument has no meaning here."""


class Stopped(BaseException):
    """SIGTERM came, or another rank has failed.

    It unwinds the main thread past `except Exception`, as Ctrl-C does.
    """


class RankError(JacdiagError):
    """A rank of a job on several processes died or failed, or has another model than the others.

    Args:
        what, got, hint: as in every error; `what` begins with the rank's name.
        trace: the traceback of an error that was not raised on purpose.
    """

    def __init__(
        self, what: str, *, got: str | None = None, hint: str | None = None, trace: str = ""
    ) -> None:
        super().__init__(what, got=got, hint=hint)
        self.trace = trace
