"""Why a job of several ranks ended, as plain data that every rank can read."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jacdiag.errors import JacdiagError, RankError, Stopped, one_line
from jacdiag.records.base import Record

Told = tuple[str, str | None, str | None]  # what, got, try


@dataclass(frozen=True)
class Failure(Record):
    """What ended the job.

    Attributes:
        rank: whose failure it is.
        kind: "died" (it cannot speak for itself), "error", or "interrupted" (Ctrl-C).
        what, got, hint: of the message; `what` begins with the rank's name and host.
        trace: of an error that jacdiag did not raise on purpose.
    """

    rank: int
    kind: Literal["died", "error", "interrupted"]
    what: str = ""
    got: str | None = None
    hint: str | None = None
    trace: str = ""

    def error(self) -> BaseException:
        """Return the exception for a rank: KeyboardInterrupt after Ctrl-C, else a RankError.

        A RankError names the rank.
        """
        if self.kind == "interrupted":
            return KeyboardInterrupt()
        return RankError(self.what, got=self.got, hint=self.hint, trace=self.trace)

    @classmethod
    def of(
        cls,
        error: BaseException,
        rank: int,
        name: str,
        explain: Callable[[BaseException], Told | None],
    ) -> Failure:
        """The failure that an exception on this rank makes.

        Args:
            error: what was raised.
            rank, name: of this rank.
            explain: what, got and try of an error that is no fault of jacdiag's; None for one that
                may be.
        """
        if isinstance(error, KeyboardInterrupt):
            return cls(rank, "interrupted")
        told = explain(error)
        if told is not None:
            return cls(rank, "error", f"{name}: {told[0]}", *told[1:])
        trace = "".join(traceback.format_exception(error))
        return cls(
            rank,
            "error",
            f"{name}: this is a bug in jacdiag",
            one_line(error),
            "please report it with the lines above",
            trace,
        )


def explained(error: BaseException) -> Told | None:
    """What, got and try of an error that was raised on purpose."""
    if isinstance(error, Stopped):
        return ("stopped from outside (SIGTERM)", None, None)
    return (error.what, error.got, error.hint) if isinstance(error, JacdiagError) else None
