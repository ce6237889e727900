"""Declare settings: each with its default, its range and one sentence of documentation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """The values that a number may take; each item of a list must lie in it.

    above, below: exclusive bounds. least, most: inclusive bounds. None is no bound.
    """

    above: float | None = None
    least: float | None = None
    below: float | None = None
    most: float | None = None

    def __str__(self) -> str:
        """Say the range in words, such as `above 0 and at most 1`; empty for none."""
        bounds = {
            "above": self.above,
            "at least": self.least,
            "below": self.below,
            "at most": self.most,
        }
        return " and ".join(
            f"{word} {_number(bound)}" for word, bound in bounds.items() if bound is not None
        )

    def problem(self, value: float) -> str | None:
        """Return what is wrong with a value, as the end of a sentence; None if nothing is."""
        if self == POSITIVE and value <= 0:
            return "must be positive"
        if self.least == 0 and value < 0:
            return "must not be negative"
        inside = (
            (self.above is None or value > self.above)
            and (self.least is None or value >= self.least)
            and (self.below is None or value < self.below)
            and (self.most is None or value <= self.most)
        )
        return None if inside else f"must be {self}"


POSITIVE = Range(above=0)
NOT_NEGATIVE = Range(least=0)
SHARE = Range(least=0, most=1)
SEED_LIMIT = 2**32  # exclusive: seeds are multiplied by up to 10**6 and must stay below 2**63
SEED = Range(least=0, below=SEED_LIMIT)


@dataclass(frozen=True)
class Setting:
    """One key of the vocabulary.

    key: dotted. hint: the type of its values. default: the value without a recipe. text: one
    sentence or more with unit and effect. range: the numbers it takes; None for no numbers.
    """

    key: str
    hint: Any
    default: Any
    text: str
    range: Range | None


def setting(default: Any, text: str, range: Range | None = None) -> Any:
    """Declare a field of a schema. A default that is a list or a section is made anew each time.

    text: one sentence or more, with the unit and the effect.
    """
    metadata = {"text": text, "range": range}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def section(schema: type) -> Any:
    """Declare a field that holds a section of further settings."""
    return field(default_factory=schema)


def settings_of(schema: type, prefix: str = "") -> Iterator[Setting]:
    """Yield the settings of a tree of schemas in the order in which they are declared."""
    hints = get_type_hints(schema)
    for item in dataclasses.fields(schema):
        hint, key = hints[item.name], prefix + item.name
        if dataclasses.is_dataclass(hint):
            yield from settings_of(hint, key + ".")  # pyright: ignore[reportArgumentType]
            continue
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        else:
            default = item.default
        yield Setting(key, hint, default, *_declared(item))


def out_of_range(schema: type, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each of the values, by dotted key, that its range refuses."""
    for each in settings_of(schema):
        value = values.get(each.key)
        if each.range is None or value is None:
            continue
        listed = isinstance(value, list) and get_origin(each.hint) is list
        for number in value if listed else [value]:
            if isinstance(number, list):  # a choice between a number and a list of indices
                continue
            if not math.isfinite(number):  # `values.not_finite` names it
                continue
            problem = each.range.problem(number)
            if problem is not None:
                yield f"{each.key}{': ' if listed else '='}{number} {problem}."


def _declared(item: dataclasses.Field) -> tuple[str, Range | None]:
    """Return text and range; a field that was not made by `setting` has neither."""
    return item.metadata.get("text", ""), item.metadata.get("range")


def is_optional(hint: Any) -> bool:
    """Return whether a setting of this type takes null."""
    return type(None) in get_args(hint)


def _number(bound: float) -> str:
    return "2^32" if bound == SEED_LIMIT else f"{bound:g}"
