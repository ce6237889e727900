"""Text to typed settings: the rules that recipes and the command line share.

Every scalar is text until its field says what it means, so a revision `1.10` stays as written and
`2e-5` is a number. Keys are dotted paths in a tree of dataclasses, such as `train.sigma.name`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .fields import Setting, is_optional, out_of_range

T = TypeVar("T")


class ConfigError(ValueError):
    """Reports a mistake of the user's: commands print the message alone and end."""


def split_arguments(arguments: Iterable[str]) -> dict[str, str]:
    """Split `["a.b=c", ...]` into keys and texts; a text is all that follows the first `=`."""
    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            raise ConfigError(f"{argument!r} is not of the form key=value.")
        if key in given:
            raise ConfigError(f"{key} is given twice: {given[key]!r} and {text!r}.")
        given[key] = text
    return given


def parse(schema: type[T], argv: Iterable[str]) -> T:
    """Return an instance of a command's own schema from `key=value ...`.

    Raises ConfigError for unknown keys and for values of a wrong type or out of range, all at once.
    """
    given, hints = split_arguments(argv), leaf_types(schema)
    check_known(given, hints)
    made = build(schema, {key: parse_text(key, text, hints[key]) for key, text in given.items()})
    values = {key: getattr(made, key) for key in given}
    problems = [*not_finite(values), *out_of_range(schema, values)]
    if problems:
        raise ConfigError("\n".join(problems))
    return made


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the settings of a YAML file by dotted key; scalars are text, `null` is None."""
    try:
        with path.open(encoding="utf-8") as file:
            tree = yaml.load(file, _TextLoader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold `key: value` lines.")
    return flatten(tree)


def to_yaml(tree: dict[str, Any]) -> str:
    """Return YAML that `read_yaml` gives back as the same text."""
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a tree by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def not_finite(flat: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each number among the values that is NaN or infinite."""
    for key, value in flat.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{key}={value} is not a finite number."


def leaf_types(schema: Any, prefix: str = "") -> dict[str, Any]:
    """Return the type of every leaf of a tree of dataclasses, by dotted key."""
    hints, types = get_type_hints(schema), {}
    for item in dataclasses.fields(schema):
        key = prefix + item.name
        if dataclasses.is_dataclass(hints[item.name]):
            types |= leaf_types(hints[item.name], key + ".")
        else:
            types[key] = hints[item.name]
    return types


def check_known(
    keys: Iterable[str], known: Iterable[str], old_names: Mapping[str, str] | None = None
) -> None:
    """Raise ConfigError for the first key that is not known, with the nearest one that is.

    old_names: what known keys were called before, which a typo may be near to.
    """
    known = list(known)
    for key in keys:
        if key in known:
            continue
        inside = [name for name in known if name.startswith(key + ".")]
        if inside:
            raise ConfigError(f"{key} is a group of settings: give one of {', '.join(inside)}.")
        raise ConfigError(f"{key} is not a setting.{_suggest(key, known, old_names or {})}")


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return a sentence with the nearest option, or with all of them."""
    options = list(options)
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else f" Known: {', '.join(options)}."


def parse_text(key: str, text: str, hint: Any) -> Any:
    """Return the value of an argument's text for a field of type `hint`, as `read_yaml` would.

    `null` (or `None`) unsets what is not a text. A list is written `[a, b]`; any other text is its
    one item, so that a prompt needs no quotes. `Any` is a text or a list, as written.
    """
    if text in ("null", "None") and hint is not str:
        return None
    if hint is not Any and get_origin(hint) is not list:
        return text
    if not text.startswith("["):
        return text if hint is Any else [text]
    try:
        return yaml.load(text, _TextLoader)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{key}={text} is not a list such as [a, b]; an item with commas or brackets needs "
            'quotes: ["a, b", c].'
        ) from error


def build(schema: type[T], flat: Mapping[str, Any], prefix: str = "") -> T:
    """Build an instance of `schema` from known dotted keys; ConfigError names a wrong type.

    prefix: how the keys begin for the user, when `schema` is a part of a larger tree.
    """
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        if isinstance(value, list) and any(isinstance(item, (list, dict)) for item in value):
            raise ConfigError(
                f"{prefix}{key}={value} must be a plain list; an item with `: ` or brackets needs "
                "quotes."
            )
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = _literal(value)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), tree)
        return OmegaConf.to_object(merged)  # pyright: ignore[reportReturnType]
    except OmegaConfBaseException as error:
        key = re.sub(r"\[\d+\]$", "", error.full_key or "")
        value = "null" if flat.get(key) is None else flat[key]
        kind = in_words(leaf_types(schema)[key])
        raise ConfigError(f"{prefix}{key}={value} must be {kind}.") from error


def _suggest(key: str, known: list[str], old_names: Mapping[str, str]) -> str:
    """Suggest a key for a typo in the last part or in a group's name, or a prefix left out."""
    group, _, leaf = key.rpartition(".")
    old = difflib.get_close_matches(key, old_names, 1, cutoff=0.9)
    if old:
        return f" Did you mean {old_names[old[0]]}?"
    siblings = {n.rpartition(".")[2]: n for n in known if n.rpartition(".")[0] == group}
    leaves = {name.rpartition(".")[2]: name for name in reversed(known)}
    near = (
        [siblings[name] for name in difflib.get_close_matches(leaf, siblings, 1)]
        or ([] if siblings else difflib.get_close_matches(key, known, 1, cutoff=0.75))
        or [leaves[name] for name in difflib.get_close_matches(leaf, leaves, 1, cutoff=0.8)]
    )
    if near:
        return f" Did you mean {near[0]}?"
    if group and siblings:
        return f" Known: {', '.join(siblings.values())}."
    return f" Known: {', '.join(dict.fromkeys(name.partition('.')[0] for name in known))}."


def in_words(hint: Any) -> str:
    """Return a field's type as a person would say it."""
    kinds = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        Any: "a whole number or a list of indices",
    }
    if hint in kinds:
        return kinds[hint]
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    if get_origin(hint) is list:
        return (
            "a list of " + {str: "texts", float: "numbers", int: "whole numbers"}[get_args(hint)[0]]
        )
    inner = next(part for part in get_args(hint) if part is not NoneType)
    return f"{in_words(inner)}, or null"


def accepted(setting: Setting) -> str:
    """Return the values that a setting takes, in words: type, range, and whether null."""
    words = in_words(setting.hint)
    if setting.range is None:
        return words
    null = ", or null" * is_optional(setting.hint)
    return f"{words.removesuffix(', or null')} {setting.range}{null}"


def shown(value: Any) -> str:
    """Return a setting's value as it is typed."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    return "null" if value is None else str(value)


def _literal(value: Any) -> Any:
    r"""Escape what OmegaConf would take for an interpolation: `${a}` becomes `\${a}`."""
    if isinstance(value, list):
        return [_literal(item) for item in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)


class _TextLoader(yaml.BaseLoader):
    """Loads YAML with scalars as text, except `null`; a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=True)
        if len(mapping) < len(node.value):
            seen: set[str] = set()
            for key, _ in node.value:
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return mapping


_NULL = "tag:yaml.org,2002:null"
_TextLoader.add_implicit_resolver(
    _NULL, re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_TextLoader.add_constructor(_NULL, lambda loader, node: None)
