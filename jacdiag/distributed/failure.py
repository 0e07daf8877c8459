"""Why a job of several ranks ended, as plain data that every rank can read."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jacdiag.errors import JacdiagError, RankError, Stopped, one_line
from jacdiag.records.base import Record

# The parts of an error message: what, got, try.
Explanation = tuple[str, str | None, str | None]


@dataclass(frozen=True)
class Failure(Record):
    """What ended the job.

    Attributes:
        rank: the rank that failed.
        kind: "died" (other ranks report it), "error", or "interrupted" (Ctrl-C).
        what, got, hint: of the message. `what` begins with the rank's name and host.
        trace: of an error that jacdiag did not raise on purpose.
    """

    rank: int
    kind: Literal["died", "error", "interrupted"]
    what: str = ""
    got: str | None = None
    hint: str | None = None
    trace: str = ""

    def error(self) -> BaseException:
        """Return the exception to raise: KeyboardInterrupt after Ctrl-C, else a RankError."""
        if self.kind == "interrupted":
            return KeyboardInterrupt()
        return RankError(self.what, got=self.got, hint=self.hint, trace=self.trace)

    @classmethod
    def of(
        cls,
        error: BaseException,
        rank: int,
        name: str,
        explain: Callable[[BaseException], Explanation | None],
    ) -> Failure:
        """Return the failure for an exception on this rank.

        Args:
            error: what was raised.
            rank: of this rank.
            name: of this rank.
            explain: returns what, got and try of an error that is not a bug in jacdiag; None for
                one that may be a bug.
        """
        if isinstance(error, KeyboardInterrupt):
            return cls(rank, "interrupted")
        explanation = explain(error)
        if explanation is not None:
            what, got, hint = explanation
            return cls(rank, "error", f"{name}: {what}", got, hint)

        # An error that jacdiag did not raise on purpose.
        trace = "".join(traceback.format_exception(error))
        return cls(
            rank,
            "error",
            f"{name}: this is a bug in jacdiag",
            one_line(error),
            "please report it with the lines above",
            trace,
        )


def explained(error: BaseException) -> Explanation | None:
    """Return what, got and try of an error that was raised on purpose; None for any other."""
    if isinstance(error, Stopped):
        return "stopped from outside (SIGTERM)", None, None
    if isinstance(error, JacdiagError):
        return error.what, error.got, error.hint
    return None
