"""Decide whether a rule that stands out alerts, is noted, or is the same event as before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

QUIET = 200
"""Steps after an alert in which the same rule does not fire again about the same thing."""

_ANY = "*"  # in the place of a name: everything that the rule can name


class Reaction(Enum):
    """What follows if a rule stands out.

    Attributes:
        ALERT: it fires.
        REPEAT: another event in the quiet time of the rule.
        NOTHING: the event goes on that has been reported.
    """

    ALERT = "alert"
    REPEAT = "repeat"
    NOTHING = "nothing"


@dataclass(frozen=True, kw_only=True)
class Occurrence:
    """A rule that stands out at a step.

    Attributes:
        topic: the rule, and what it is about. After an alert the topic is quiet.
        step: the step.
        since: the first step of what stands out.
        names: weights or sub-layers that the rule names. Each has a quiet time of its own. Without
            names, the topic has one.
        has_more: the rule is about more weights than those that are named.
        goes_on: it is known to be the event of the last time.
    """

    topic: str
    step: int
    since: int
    names: Sequence[str] = ()
    has_more: bool = False
    goes_on: bool = False


class QuietTime:
    """What the rules of a run have reported, and when.

    An event lasts as long as its rule stands out at every step. `extend` makes it last longer.
    """

    def __init__(self) -> None:
        """Begin without alerts."""
        self._last_alert: dict[str, int] = {}  # topic, or topic and name -> step
        self._held_back: dict[str, int] = {}  # topic -> alerts since the last one
        self._event_end: dict[str, int] = {}  # topic -> the last step of its last event
        self._step = -1
        self._step_before = -1

    def begin_step(self, step: int) -> None:
        """Note which step is judged now, and so which one came before it."""
        self._step_before = self._step
        self._step = step

    def extend(self, topics: Sequence[str]) -> None:
        """Let events that lasted until the step before, or the one at hand, last until this one."""
        for topic in topics:
            # An event that has not ended yet.
            end = self._event_end.get(topic, -1)
            is_going_on = end >= max(self._step_before, 0)

            if is_going_on:
                self._event_end[topic] = self._step

    def react(self, occurrence: Occurrence) -> Reaction:
        """Return what follows from an occurrence, and remember it."""
        # 1. Whether the event has been reported, and goes on.
        topic, step = occurrence.topic, occurrence.step
        event_end = self._event_end.get(topic)
        is_same_event = occurrence.goes_on
        if event_end is not None and event_end >= min(occurrence.since, self._step_before):
            is_same_event = True
        self._event_end[topic] = step

        # 2. Fire about what is not quiet. A name that is new is reported in any case, unless it is
        # known how it is connected with what was reported.
        is_quiet = self._is_quiet(topic, occurrence)
        if occurrence.goes_on and self._is_recent(topic, step):
            is_quiet = True
        if not is_quiet:
            self._remember(topic, occurrence)
            return Reaction.ALERT

        # 3. Count what is held back.
        self._held_back[topic] = self._held_back.get(topic, 0) + 1
        if is_same_event:
            return Reaction.NOTHING
        return Reaction.REPEAT

    def _is_quiet(self, topic: str, occurrence: Occurrence) -> bool:
        """Return whether all that an occurrence is about was reported a short time ago."""
        step = occurrence.step
        if not occurrence.names:
            return self._is_recent(topic, step)
        if self._is_recent(_name_key(topic, _ANY), step):
            return True
        return all(self._is_recent(_name_key(topic, name), step) for name in occurrence.names)

    def _is_recent(self, key: str, step: int) -> bool:
        last_step = self._last_alert.get(key)
        return last_step is not None and step - last_step < QUIET

    def _remember(self, topic: str, occurrence: Occurrence) -> None:
        # 1. The names, and whether there are more of them.
        names = list(occurrence.names)
        if occurrence.has_more:
            names.append(_ANY)

        # 2. The topic, and each name in it.
        self._last_alert[topic] = occurrence.step
        for name in names:
            self._last_alert[_name_key(topic, name)] = occurrence.step

    def last_alert(self, topic: str) -> int | None:
        """Return the step of the last alert of a topic; None if there was none."""
        return self._last_alert.get(topic)

    def take_held_back(self, topic: str) -> int:
        """Return how many alerts were held back since the last one, and count from zero."""
        return self._held_back.pop(topic, 0)

    # -- where the loop is -------------------------------------------------------------------------
    def renumber(self, old: int, new: int) -> None:
        """Give step `old` the number `new`."""
        for steps in (self._last_alert, self._event_end):
            for key, step in steps.items():
                if step == old:
                    steps[key] = new

    def rewind(self, base: int) -> None:
        """Go on from an earlier step. What was reported stays reported."""
        for steps in (self._last_alert, self._event_end):
            for key, step in steps.items():
                steps[key] = min(step, base)
        self._step = min(self._step, base)

    # -- memory ------------------------------------------------------------------------------------
    def state(self) -> dict[str, int]:
        """Return what `load` goes on from: the step of the last alert of each topic and name."""
        return dict(self._last_alert)

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. One of an older version has topics alone, some with a colon."""
        self._last_alert = {key.removesuffix(":"): step for key, step in state.items()}


def _name_key(topic: str, name: str) -> str:
    return f"{topic}/{name}"
