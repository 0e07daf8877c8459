"""One name for each call of a module that is applied at several depths.

The trace names the first call of a module "attention" and its fifth "attention@5", which stands at
depth 4. A reader would take the number for the depth. So everything that is shown names both.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jacdiag.records import Report
from jacdiag.records.base import Record

_CALL = re.compile(r"@(?P<call>\d+)(?=$|[:.])")
_CALL_IN_TEXT = re.compile(r"[\w.]+@\d+(?:\.\w+)*")
_NO_NAMES = ("kind", "role", "placement", "command")  # fields whose words are no names
_FIRST_CALL = re.compile(r"(?<=\bat )[A-Za-z_][\w.]*(?=$|[ ,;:)])")


def shown_names(depths: Mapping[str, int]) -> dict[str, str]:
    """Return the name of each sub-layer as it is shown.

    A module that is applied at several depths is named with the depth and the number of the call.

    Args:
        depths: name of each sub-layer in the trace -> its depth.

    >>> shown_names({"attention": 0, "attention@2": 1, "h.0.mlp": 0})["attention@2"]
    'attention at depth 1 (call 2)'
    """
    shown = {name: name for name in depths}
    for name, (module, depth) in depths_of_shared_names(depths).items():
        call = _CALL.search(name)
        number = "1"
        if call:
            number = call["call"]
        shown[name] = f"{module} at depth {depth} (call {number})"
    return shown


def depths_of_shared_names(depths: Mapping[str, int]) -> dict[str, tuple[str, int]]:
    """Return module and depth of each call of a module that is applied at several depths.

    Args:
        depths: name of each sub-layer in the trace -> its depth.
    """
    # 1. The modules of which a further call has a number.
    shared = set()
    for name in depths:
        if _CALL.search(name):
            shared.add(_CALL.sub("", name))

    # 2. All their calls, the first one too.
    calls = {}
    for name, depth in depths.items():
        module = _CALL.sub("", name)
        if module in shared:
            calls[name] = (module, depth)
    return calls


class ShownNames:
    """The names of the sub-layers of one model, as they are shown in sentences.

    Args:
        depths: name of each sub-layer in the trace -> its depth.

    >>> ShownNames({"attention": 0, "attention@2": 1}).in_text("norm 3 at attention@2")
    'norm 3 at attention at depth 1 (call 2)'
    """

    def __init__(self, depths: Mapping[str, int]) -> None:
        shared = depths_of_shared_names(depths)
        names = shown_names(depths)
        self.of_shared = {name: names[name] for name in shared}

    def in_text(self, text: str) -> str:
        """Return a text in which calls of shared modules have their shown names.

        Args:
            text: a name, or a sentence with names in it.
        """
        # 1. Nothing is shared, or the text is a name.
        if not self.of_shared:
            return text
        if text in self.of_shared:
            return self.of_shared[text]

        # 2. Names in a sentence. Without its number a name may be a plain word: only after "at".
        text = _FIRST_CALL.sub(self._shown, text)
        return _CALL_IN_TEXT.sub(self._shown, text)

    def _shown(self, match: re.Match[str]) -> str:
        """Return what stands in place of a name that was found."""
        return self.of_shared.get(match[0], match[0])


def with_shown_names(report: Report) -> Report:
    """Return a report whose sub-layers have their shown names, in texts too.

    Args:
        report: of either tier and state.
    """
    # 1. Most models share nothing.
    names = ShownNames({row.name: row.depth for row in report.sublayers})
    if not names.of_shared:
        return report

    # 2. Every text of the report.
    renamed: Report = _renamed(report, names)
    return renamed


def _renamed(value: Any, names: ShownNames, field: str = "") -> Any:
    """Return a part of a report with shown names in its texts.

    Args:
        value: of a field.
        names: of the sub-layers.
        field: its name; the kind of a sub-layer may be the word that its module is called.
    """
    # 1. Texts.
    if isinstance(value, str):
        if field in _NO_NAMES:
            return value
        return names.in_text(value)

    # 2. What holds others.
    if isinstance(value, Record):
        changes = {}
        for entry in dataclasses.fields(value):  # type: ignore[arg-type]
            changes[entry.name] = _renamed(getattr(value, entry.name), names, entry.name)
        return dataclasses.replace(value, **changes)  # type: ignore[type-var]
    if isinstance(value, dict):
        renamed = {}
        for key, item in value.items():
            renamed[names.in_text(str(key))] = _renamed(item, names, str(key))
        return renamed
    if isinstance(value, list):
        return [_renamed(item, names, field) for item in value]

    # 3. Numbers and None.
    return value
