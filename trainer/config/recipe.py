"""Recipes: one vocabulary of keys for files, the command line and the saved run.

`recipe=NAME a.b=c` merges defaults < `recipes/NAME.yaml` < the command line into a frozen `Config`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from ...data.files import replacing
from ...sparse.patterns import PATTERNS, SparsePattern, pattern_name
from . import values
from .checks import check
from .renamed import KEYS, with_new_names
from .schema import Config
from .values import (
    ConfigError,
    build,
    check_known,
    did_you_mean,
    leaf_types,
    parse,
    parse_text,
    read_yaml,
    split_arguments,
)

log = logging.getLogger(__name__)

RECIPES = Path(__file__).parents[2] / "recipes"
PATTERN = "sparse.pattern."
DEFAULT_PATTERN = "radial"

T = TypeVar("T")


def load(argv: list[str]) -> Config:
    """Return the config of `recipe=NAME_OR_PATH key.path=value ...`.

    A value is everything after the first `=`, taken verbatim where the setting is a text: a path or
    caption may hold `#`, `:`, `=` or commas. Raises ConfigError, naming the key and what was meant,
    before anything heavy is imported.
    """
    given = split_arguments(argv)
    recipe = given.pop("recipe", None)
    if not recipe:
        raise ConfigError(f"recipe=NAME is missing. Recipes: {', '.join(recipe_names())}.")
    path = _recipe_path(recipe)
    in_file, renamed_in_file = with_new_names(read_yaml(path))
    given, renamed = with_new_names(given)
    for line in (*(f"{path}: {line}" for line in renamed_in_file), *renamed):
        log.warning(line)
    return _merge(in_file | {"recipe": path.stem}, given)


def split_options(schema: type[T], argv: Sequence[str]) -> tuple[T, list[str]]:
    """Return a command's own options, an instance of `schema`, and the arguments of its recipe.

    Raises ConfigError for a key that is neither an option nor a setting.
    """
    names = leaf_types(schema)
    keys = list(split_arguments(argv))
    plain = [key for key in keys if "." not in key]
    check_known(plain, ["recipe", *names, *leaf_types(Config)])
    own = [argument for argument, key in zip(argv, keys, strict=True) if key in names]
    return parse(schema, own), [argument for argument in argv if argument not in own]


def load_file(path: str | Path) -> Config:
    """Return a resolved config as `save` wrote it, now or under the names of an earlier version."""
    return _merge(with_new_names(read_yaml(Path(path)))[0], {})


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def to_dict(config: Config) -> dict[str, Any]:
    """Return plain containers; the pattern is `{"name": ..., parameters}`."""
    plain = dataclasses.asdict(config)
    pattern = config.sparse.pattern
    plain["sparse"]["pattern"] = pattern_to_dict(pattern)
    return plain


def pattern_to_dict(pattern: SparsePattern) -> dict[str, Any]:
    return {"name": pattern_name(pattern), **dataclasses.asdict(pattern)}  # type: ignore[call-overload]


def pattern_from_dict(plain: dict[str, Any]) -> SparsePattern:
    """Undo `pattern_to_dict`; raise ConfigError for unknown names, keys and types."""
    parameters = dict(plain)
    cls = _pattern_class(parameters.pop("name", DEFAULT_PATTERN))
    hints = leaf_types(cls)
    check_known((PATTERN + key for key in parameters), (PATTERN + key for key in ("name", *hints)))
    try:
        return build(cls, parameters, PATTERN)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{PATTERN}{error}") from error


def to_yaml(config: Config) -> str:
    return values.to_yaml(to_dict(config))


def save(config: Config, path: Path) -> None:
    """Write the resolved config so that `load_file` gives it back equal."""
    with replacing(path) as temporary:
        temporary.write_text(to_yaml(config), encoding="utf-8")


def config_hash(config: Config) -> str:
    """Return twelve hex digits that identify a resolved config."""
    text = json.dumps(to_dict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _recipe_path(recipe: str) -> Path:
    """Find a recipe by its name in `recipes/`, or by the path of a YAML file anywhere."""
    if recipe.endswith((".yaml", ".yml")) or os.sep in recipe:
        if not Path(recipe).is_file():
            raise ConfigError(
                f"recipe={recipe}: no such file. Recipes by name: {', '.join(recipe_names())}."
            )
        return Path(recipe)
    if recipe not in recipe_names():
        raise ConfigError(f"recipe={recipe} is unknown.{did_you_mean(recipe, recipe_names())}")
    return RECIPES / f"{recipe}.yaml"


def _merge(recipe: dict[str, Any], arguments: dict[str, str]) -> Config:
    """Merge defaults < the recipe's settings < arguments; all by dotted key."""
    name_key = PATTERN + "name"
    name = recipe.get(name_key, DEFAULT_PATTERN)
    if arguments.get(name_key, name) != name:
        # The recipe's parameters belong to the recipe's pattern.
        recipe = {key: value for key, value in recipe.items() if not key.startswith(PATTERN)}
        name = arguments[name_key]

    hints = leaf_types(Config)
    del hints["sparse.pattern"]
    hints |= {name_key: str} | leaf_types(_pattern_class(name), PATTERN)
    check_known([*recipe, *arguments], hints, KEYS)
    merged = recipe | {key: parse_text(key, text, hints[key]) for key, text in arguments.items()}

    pattern = {k.removeprefix(PATTERN): v for k, v in merged.items() if k.startswith(PATTERN)}
    config = build(Config, {k: v for k, v in merged.items() if not k.startswith(PATTERN)})
    sparse = dataclasses.replace(
        config.sparse,
        pattern=pattern_from_dict(pattern),
        dense_layers=_first_or_listed("sparse.dense_layers", config.sparse.dense_layers),
        dense_steps=_first_or_listed("sparse.dense_steps", config.sparse.dense_steps),
    )
    config = dataclasses.replace(config, sparse=sparse)
    check(config)
    return config


def _first_or_listed(key: str, value: Any) -> int | list[int]:
    """Return a number as it is, and indices in ascending order, each once."""
    try:
        return sorted({int(item) for item in value}) if isinstance(value, list) else int(value)
    except (TypeError, ValueError):
        shown = "null" if value is None else value
        raise ConfigError(
            f"{key}={shown} must be a whole number, or a list of indices such as [0, -1]."
        ) from None


def _pattern_class(name: Any) -> type:
    if not isinstance(name, str) or name not in PATTERNS:
        raise ConfigError(f"{PATTERN}name={name} is unknown.{did_you_mean(str(name), PATTERNS)}")
    return PATTERNS[name]
