"""The levels at which rules fire: the default, the paper's conditions as errors, or a user's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jacdiag.errors import UsageError
from jacdiag.records import LEVELS, Level


@dataclass(frozen=True)
class Profile:
    """A profile: for some rules, the level at which they fire beyond `warning`."""

    name: str
    levels: Mapping[str, Level] = field(default_factory=dict)

    def promoted(self, code: str, cut: Level) -> Level:
        """Return the level for a value beyond a cut.

        What is beyond `info` only rises by as much as `warning` does.
        """
        if code not in self.levels:
            return cut

        shift = LEVELS.index(self.levels[code]) - LEVELS.index("warning")
        return LEVELS[min(max(LEVELS.index(cut) + shift, 0), len(LEVELS) - 1)]


BUILT_IN = {
    "default": Profile("default"),
    "paper": Profile("paper", {"JD101": "error", "JD102": "error"}),
}


def profile_of(wanted: str | Mapping[str, Any], codes: tuple[str, ...]) -> Profile:
    """Return a profile by name, or the one that a table describes.

    A table is {"name": ..., "levels": {"JD103": "error"}}.

    Raises:
        UsageError: unknown name, rule code or level.
    """
    if isinstance(wanted, str):
        return _built_in(wanted)

    # 1. The table holds levels and a name, and nothing else.
    unknown = set(wanted) - {"name", "levels"}
    levels = wanted.get("levels", {})
    if unknown or not isinstance(levels, Mapping):
        raise UsageError(
            "a profile holds a table `levels`",
            got=", ".join(sorted(unknown)) or repr(levels),
            hint='levels = { JD103 = "error" }',
        )

    # 2. Each level is that of a rule.
    for code, level in levels.items():
        if code not in codes or level not in LEVELS:
            raise UsageError(
                "a profile maps rule codes to levels",
                got=f"{code} = {level!r}",
                hint=f"levels: {', '.join(LEVELS)}",
            )

    return Profile(str(wanted.get("name", "custom")), dict(levels))


def _built_in(name: str) -> Profile:
    """Return the profile of a name.

    Raises:
        UsageError: there is no such profile.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]

    raise UsageError(
        f"unknown profile '{name}'",
        hint=f"built in: {', '.join(BUILT_IN)}; others: [tool.jacdiag.profiles.NAME]",
    )
