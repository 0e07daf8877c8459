"""Formulas of an init contract, such as "0.02/sqrt(2*N)", read without eval.

sum     = product {("+" | "-") product}
product = sign {("*" | "/") sign}
sign    = ["-" | "+"] power
power   = atom [("^" | "**") sign]
atom    = number | name | function "(" sum {"," sum} ")" | "(" sum ")"
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from jacdiag.errors import UsageError

FUNCTIONS: dict[str, Callable[..., float]] = {
    "sqrt": math.sqrt,
    "log": math.log,
    "exp": math.exp,
    "min": min,
    "max": max,
}
_TOKEN = re.compile(
    r"\s*(?:(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)|([A-Za-z_]\w*)|(\*\*|[-+*/^(),]))"
)
_LONGEST, _DEEPEST = 200, 40

Node = tuple[str, tuple["Node", ...] | float | str]


@dataclass(frozen=True)
class Formula:
    """A formula that was read. `names` are the variables in it.

    Example:
        >>> Formula.read("0.02 / sqrt(2*N)").value({"N": 12})
        0.004082482904638631
    """

    text: str
    tree: Node
    names: frozenset[str]

    @classmethod
    def read(cls, text: str) -> Formula:
        """Parse a formula.

        Raises:
            UsageError: it is none; the message points at the place.
        """
        if len(text) > _LONGEST:
            raise UsageError(
                "a formula is too long", got=f"{len(text)} characters", hint=f"at most {_LONGEST}"
            )
        parser = _Parser(text)
        tree = parser.whole()
        return cls(text, tree, frozenset(parser.names))

    def value(self, variables: Mapping[str, float]) -> float | None:
        """Its value; None where a variable in it is not known, or the value is no finite number."""
        if not self.names <= variables.keys():
            return None
        try:
            value = _value(self.tree, variables)
        except (ArithmeticError, ValueError):
            return None
        return value if isinstance(value, float) and math.isfinite(value) else None

    def check(self, known: Mapping[str, object] | frozenset[str]) -> None:
        """Raise UsageError, with the closest name, for a variable that does not exist."""
        for name in sorted(self.names - set(known)):
            near = get_close_matches(name, sorted(known), n=3, cutoff=0.0)
            raise UsageError(
                f"the formula '{self.text}' uses '{name}'", hint=f"known: {', '.join(near)}"
            )


def _value(node: Node, variables: Mapping[str, float]) -> float:
    kind, content = node
    if kind == "number":
        return float(content)  # type: ignore[arg-type]
    if kind == "name":
        return float(variables[str(content)])
    values = [_value(part, variables) for part in content]  # type: ignore[union-attr,arg-type]
    if kind in FUNCTIONS:
        return float(FUNCTIONS[kind](*values))
    if kind == "neg":
        return -values[0]
    a, b = values
    if kind == "^":
        return float(math.pow(a, b))
    return a + b if kind == "+" else a - b if kind == "-" else a * b if kind == "*" else a / b


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.at, self.depth = text, 0, 0
        self.names: set[str] = set()
        self.tokens: list[tuple[str, str, int]] = []
        while self.at < len(text.rstrip()):
            found = _TOKEN.match(text, self.at)
            if found is None:
                raise self._wrong(self.at, "a character that has no meaning here")
            kind = ("number", "name", "sign")[(found.lastindex or 1) - 1]
            self.tokens.append(
                (kind, found[found.lastindex or 1], found.start(found.lastindex or 1))
            )
            self.at = found.end()
        self.tokens.append(("end", "", len(text)))
        self.at = 0

    def whole(self) -> Node:
        tree = self._sum()
        if self.tokens[self.at][0] != "end":
            raise self._wrong(self.tokens[self.at][2], "nothing should follow here")
        return tree

    def _wrong(self, place: int, why: str) -> UsageError:
        return UsageError(
            "a formula cannot be read",
            got=f"{self.text}\n{' ' * place}^ {why}",
            hint='for example "0.02/sqrt(2*N)"',
        )

    def _take(self, *wanted: str) -> str | None:
        kind, text, _ = self.tokens[self.at]
        if kind == "sign" and text in wanted:
            self.at += 1
            return text
        return None

    def _sum(self) -> Node:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise self._wrong(self.tokens[self.at][2], "too many levels")
        node = self._product()
        while sign := self._take("+", "-"):
            node = (sign, (node, self._product()))
        self.depth -= 1
        return node

    def _product(self) -> Node:
        node = self._sign()
        while sign := self._take("*", "/"):
            node = (sign, (node, self._sign()))
        return node

    def _sign(self) -> Node:
        negative = False
        while sign := self._take("-", "+"):
            negative ^= sign == "-"
        return ("neg", (self._power(),)) if negative else self._power()

    def _power(self) -> Node:
        node = self._atom()
        if self._take("^", "**"):
            self.depth += 1
            if self.depth > _DEEPEST:
                raise self._wrong(self.tokens[self.at][2], "too many levels")
            node = ("^", (node, self._sign()))
            self.depth -= 1
        return node

    def _atom(self) -> Node:
        kind, text, place = self.tokens[self.at]
        if kind == "number":
            self.at += 1
            return ("number", float(text))
        if kind == "name":
            self.at += 1
            if not self._take("("):
                self.names.add(text)
                return ("name", text)
            return self._call(text, place)
        if self._take("("):
            node = self._sum()
            if not self._take(")"):
                raise self._wrong(self.tokens[self.at][2], "a closing bracket is missing")
            return node
        raise self._wrong(place, "a number, a name or a bracket is missing")

    def _call(self, name: str, place: int) -> Node:
        if name not in FUNCTIONS:
            raise self._wrong(place, f"no function of that name; there are {', '.join(FUNCTIONS)}")
        parts = [self._sum()]
        while self._take(","):
            parts.append(self._sum())
        if not self._take(")"):
            raise self._wrong(self.tokens[self.at][2], "a closing bracket is missing")
        several = name in ("min", "max")
        if len(parts) > 1 and not several:
            raise self._wrong(place, f"{name} takes one number")
        if len(parts) < 2 and several:
            raise self._wrong(place, f"{name} takes several numbers")
        return (name, tuple(parts))
