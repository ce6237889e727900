"""Parse and apply rules over the columns of a table: `aesthetic > 5.2 and "motion score" > 3`.

    rule:       any number of comparisons with `and`, `or`, `not` and parentheses
    comparison: column < <= > >= == != value, or: column contains 'text'
    column:     a name, in double quotes if it has spaces
    value:      a number, or text in single quotes

The grammar is complete: the text is parsed here and never evaluated as code. A row without a value
for a column fails every comparison with that column.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

TOKEN = re.compile(
    r"""\s*(?:
        (?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?![\w.])
      | "(?P<column>[^"]+)"
      | '(?P<text>[^']*)'
      | (?P<word>[A-Za-z_]\w*)
      | (?P<sign><=|>=|==|!=|<|>|\(|\))
    )""",
    re.VERBOSE,
)
COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
WORDS = ("and", "or", "not", "contains")
MAX_DEPTH = 50  # nesting of parentheses and `not`


@dataclass(frozen=True)
class Comparison:
    """Compares a column with a number or a text."""

    column: str
    sign: str
    value: float | str

    def __call__(self, row: Mapping[str, Any]) -> bool:
        found = row.get(self.column)
        if self.sign == "contains":
            return isinstance(found, str) and str(self.value).lower() in found.lower()
        if isinstance(self.value, str):
            return isinstance(found, str) and COMPARE[self.sign](found, self.value)
        number = as_number(found)
        return number is not None and COMPARE[self.sign](number, self.value)


@dataclass(frozen=True)
class Not:
    """Passes rows that `part` does not pass."""

    part: Node

    def __call__(self, row: Mapping[str, Any]) -> bool:
        return not self.part(row)


@dataclass(frozen=True)
class Both:
    """Passes rows that all `parts` pass."""

    parts: tuple[Node, ...]

    def __call__(self, row: Mapping[str, Any]) -> bool:
        return all(part(row) for part in self.parts)


@dataclass(frozen=True)
class Either:
    """Passes rows that at least one of `parts` passes."""

    parts: tuple[Node, ...]

    def __call__(self, row: Mapping[str, Any]) -> bool:
        return any(part(row) for part in self.parts)


Node = Comparison | Not | Both | Either


@dataclass(frozen=True)
class Rule:
    """Holds a parsed rule; calling it with a row returns True if the row passes.

    text: the rule as written. columns: the columns it reads. what: name of the setting.
    """

    text: str
    node: Node
    columns: tuple[str, ...]
    what: str

    def __call__(self, row: Mapping[str, Any]) -> bool:
        return self.node(row)

    def check_columns(self, known: Iterable[str]) -> None:
        """Raise ValueError if the rule reads a column that is not among `known`."""
        known = sorted(known)
        for column in self.columns:
            if column in known:
                continue
            near = difflib.get_close_matches(column, known, n=1, cutoff=0.5)
            meant = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(known)}."
            if not known:
                meant = "No column of numbers or texts came with these videos."
            raise ValueError(f"{self.what}={self.text}: there is no column {column!r}. {meant}")

    def explain(self, row: Mapping[str, Any]) -> str:
        """Return the row's values of the columns that the rule reads, as text."""
        return ", ".join(f"{column} is {_shown(row.get(column))}" for column in self.columns)

    @staticmethod
    def number(row: Mapping[str, Any], column: str) -> float | None:
        """Return the number in a column, None if there is none."""
        return as_number(row.get(column))


def as_number(value: Any) -> float | None:
    """Convert a number, or its text as CSV holds it, to a finite float; None for anything else."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def parse(text: str, what: str = "data.filter") -> Rule:
    """Parse a rule. what: name of the setting, for messages.

    Raises ValueError, with the position, for text outside the grammar.
    """
    return _Parser(text, what).rule()


class _Parser:
    """Parses a rule by recursive descent.

    `either` parses parts joined by `or`, `both` parts joined by `and`, `single` a comparison, a
    negation or a parenthesis.
    """

    def __init__(self, text: str, what: str) -> None:
        self.text, self.what = text, what
        self.tokens: list[tuple[str, str, int]] = []  # kind, text, place
        self.next, self.depth = 0, 0
        self.columns: dict[str, None] = {}
        place, end = 0, len(text.rstrip())
        while place < end:
            found = TOKEN.match(text, place)
            if found is None:
                place += len(text[place:]) - len(text[place:].lstrip())
                raise self.error(place, f"{text[place : place + 12]!r} is not understood")
            kind = found.lastgroup or ""
            start = found.start(kind) - (kind in ("column", "text"))
            self.tokens.append((kind, found[kind], start))
            place = found.end()

    def rule(self) -> Rule:
        node = self.either()
        if self.next < len(self.tokens):
            _, text, place = self.tokens[self.next]
            raise self.error(place, f"{text!r} follows a complete rule; join rules by and, or")
        return Rule(self.text, node, tuple(self.columns), self.what)

    def either(self) -> Node:
        parts = [self.both()]
        while self.take("word", "or"):
            parts.append(self.both())
        return parts[0] if len(parts) == 1 else Either(tuple(parts))

    def both(self) -> Node:
        parts = [self.single()]
        while self.take("word", "and"):
            parts.append(self.single())
        return parts[0] if len(parts) == 1 else Both(tuple(parts))

    def single(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.error(self.place, "too many parentheses")
        if self.take("word", "not"):
            node: Node = Not(self.single())
        elif self.take("sign", "("):
            node = self.either()
            if not self.take("sign", ")"):
                raise self.error(self.place, "a closing parenthesis is missing")
        else:
            node = self.comparison()
        self.depth -= 1
        return node

    def comparison(self) -> Comparison:
        kind, column, place = self.peek("a column's name")
        if kind not in ("word", "column") or (kind == "word" and column in WORDS):
            raise self.error(place, f"a column's name is expected, not {column!r}")
        self.next += 1
        self.columns[column] = None
        kind, sign, place = self.peek("a comparison")
        if sign not in COMPARE and (kind, sign) != ("word", "contains"):
            signs = " ".join(COMPARE)
            raise self.error(place, f"one of {signs} contains is expected, not {sign!r}")
        self.next += 1
        kind, value, place = self.peek("a number or 'text'")
        if kind not in ("number", "text") or (sign == "contains" and kind != "text"):
            wanted = "text in single quotes" if sign == "contains" else "a number or 'text'"
            raise self.error(place, f"{wanted} is expected, not {value!r}")
        self.next += 1
        return Comparison(column, sign, float(value) if kind == "number" else value)

    @property
    def place(self) -> int:
        return self.tokens[self.next][2] if self.next < len(self.tokens) else len(self.text)

    def peek(self, wanted: str) -> tuple[str, str, int]:
        if self.next == len(self.tokens):
            raise self.error(len(self.text), f"{wanted} is missing at the end")
        return self.tokens[self.next]

    def take(self, kind: str, text: str) -> bool:
        if self.next < len(self.tokens) and self.tokens[self.next][:2] == (kind, text):
            self.next += 1
            return True
        return False

    def error(self, place: int, reason: str) -> ValueError:
        return ValueError(
            f"{self.what}={self.text}: {reason} (character {place + 1}). An example of a rule is "
            'aesthetic > 5.2 and "motion score" > 3; names with spaces need double quotes, '
            "texts need single quotes."
        )


def _shown(value: Any) -> str:
    number = as_number(value)
    if number is not None:
        return f"{number:g}"
    return "missing" if value is None or value == "" else repr(str(value)[:40])
