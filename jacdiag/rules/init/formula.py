"""Formulas of an init contract, such as "0.02/sqrt(2*N)", read without eval.

sum     = product {("+" | "-") product}
product = sign {("*" | "/") sign}
sign    = ["-" | "+"] power
power   = atom [("^" | "**") sign]
atom    = number | name | function "(" sum {"," sum} ")" | "(" sum ")"
"""

from __future__ import annotations

import math
import operator
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

    def __hash__(self) -> int:
        # The text determines the rest, and Python keeps its hash.
        return hash(self.text)

    @classmethod
    def read(cls, text: str) -> Formula:
        """Parse a formula.

        Args:
            text: such as "0.02/sqrt(2*N)".

        Raises:
            UsageError: it is none; the message points at the place.
        """
        if len(text) > _LONGEST:
            raise UsageError(
                "a formula is too long", got=f"{len(text)} characters", hint=f"at most {_LONGEST}"
            )

        # The parser collects the names of the variables on its way.
        parser = _Parser(text)
        tree = parser.parse()
        return cls(text, tree, frozenset(parser.names))

    def value(self, variables: Mapping[str, float]) -> float | None:
        """Return the value of the formula.

        Args:
            variables: by name; others than those in the formula do no harm.

        Returns:
            None where a variable in it is not known, or the value is no finite number.
        """
        if not self.names <= variables.keys():
            return None

        try:
            value = _value(self.tree, variables)
        except (ArithmeticError, ValueError):
            return None

        # A power of a negative number may be complex.
        if not isinstance(value, float):
            return None

        return value if math.isfinite(value) else None

    def check(self, known: Mapping[str, object] | frozenset[str]) -> None:
        """Raise for a variable that does not exist.

        Args:
            known: the variables that exist.

        Raises:
            UsageError: a variable is none of them; the hint names the closest.
        """
        for name in sorted(self.names - set(known)):
            near = get_close_matches(name, sorted(known), n=3, cutoff=0.0)
            raise UsageError(
                f"the formula '{self.text}' uses '{name}'", hint=f"known: {', '.join(near)}"
            )


_OPERATORS: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "^": math.pow,
}


def _value(node: Node, variables: Mapping[str, float]) -> float:
    """Return the value of a part of a formula.

    Raises:
        ArithmeticError: such as a division by zero.
        ValueError: such as the root of a negative number.
    """
    # 1. A number, or a variable.
    kind, content = node
    if kind == "number":
        return float(content)  # type: ignore[arg-type]
    if kind == "name":
        return float(variables[str(content)])

    # 2. A function, a sign, or an operator of two parts.
    values = [_value(part, variables) for part in content]  # type: ignore[union-attr,arg-type]
    if kind in FUNCTIONS:
        return float(FUNCTIONS[kind](*values))
    if kind == "neg":
        return -values[0]

    left, right = values
    return _OPERATORS[kind](left, right)


class _Parser:
    """Reads a formula from left to right, one method per line of the grammar above."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.depth = 0
        self.names: set[str] = set()
        self.tokens: list[tuple[str, str, int]] = []  # kind, text and place of each

        # 1. Cut the text into tokens.
        place = 0
        while place < len(text.rstrip()):
            match = _TOKEN.match(text, place)
            if match is None:
                raise self._error(place, "a character that has no meaning here")

            group = match.lastindex or 1
            kind = ("number", "name", "sign")[group - 1]
            self.tokens.append((kind, match[group], match.start(group)))
            place = match.end()
        self.tokens.append(("end", "", len(text)))

        # 2. The next token to read.
        self.at = 0

    def parse(self) -> Node:
        """Return the tree of the entire formula."""
        tree = self._sum()
        kind, _, place = self.tokens[self.at]
        if kind != "end":
            raise self._error(place, "nothing should follow here")

        return tree

    def _error(self, place: int, why: str) -> UsageError:
        """Return the error that points at a place of the text."""
        return UsageError(
            "a formula cannot be read",
            got=f"{self.text}\n{' ' * place}^ {why}",
            hint='for example "0.02/sqrt(2*N)"',
        )

    def _error_here(self, why: str) -> UsageError:
        """Return the error that points at the next token."""
        return self._error(self.tokens[self.at][2], why)

    def _enter(self) -> None:
        """Count one more level of brackets or powers."""
        self.depth += 1

        # Deeper formulas would exhaust Python's stack.
        if self.depth > _DEEPEST:
            raise self._error_here("too many levels")

    def _take(self, *signs: str) -> str | None:
        """Move over the next token if it is one of some signs, and return it."""
        kind, text, _ = self.tokens[self.at]
        is_expected = kind == "sign" and text in signs
        if not is_expected:
            return None

        self.at += 1
        return text

    def _sum(self) -> Node:
        self._enter()
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
        is_negative = False
        while sign := self._take("-", "+"):
            if sign == "-":
                is_negative = not is_negative

        node = self._power()
        if is_negative:
            return ("neg", (node,))

        return node

    def _power(self) -> Node:
        node = self._atom()
        if self._take("^", "**"):
            self._enter()
            node = ("^", (node, self._sign()))
            self.depth -= 1
        return node

    def _atom(self) -> Node:
        # 1. A number.
        kind, text, place = self.tokens[self.at]
        if kind == "number":
            self.at += 1
            return ("number", float(text))

        # 2. A variable or a function.
        if kind == "name":
            self.at += 1
            if self._take("("):
                return self._call(text, place)

            self.names.add(text)
            return ("name", text)

        # 3. A bracket.
        if not self._take("("):
            raise self._error(place, "a number, a name or a bracket is missing")

        node = self._sum()
        self._close_bracket()
        return node

    def _close_bracket(self) -> None:
        if not self._take(")"):
            raise self._error_here("a closing bracket is missing")

    def _call(self, name: str, place: int) -> Node:
        """Return the call of a function whose opening bracket was read."""
        # 1. Its name and its arguments.
        if name not in FUNCTIONS:
            raise self._error(place, f"no function of that name; there are {', '.join(FUNCTIONS)}")

        parts = [self._sum()]
        while self._take(","):
            parts.append(self._sum())
        self._close_bracket()

        # 2. How many arguments it takes.
        takes_several = name in ("min", "max")
        has_several = len(parts) > 1
        if has_several and not takes_several:
            raise self._error(place, f"{name} takes one number")
        if takes_several and not has_several:
            raise self._error(place, f"{name} takes several numbers")

        return (name, tuple(parts))
