"""Recipes: one vocabulary of keys for files, the command line and the saved run.

`recipe=NAME a.b=c` merges defaults < `recipes/NAME.yaml` < the command line into a frozen `Config`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..sparse.patterns import PATTERNS, SparsePattern, pattern_name
from ..sparse.patterns.radial import Radial

RECIPES = Path(__file__).parent.parent / "recipes"


class ConfigError(ValueError):
    """A mistake of the user's: commands print the message alone and end."""


@dataclass(frozen=True)
class Model:
    """path: a Hub repository, a local folder in its layout, or `tiny` for small random weights."""

    path: str | None = None  # None: the family's documented repository
    revision: str | None = None


@dataclass(frozen=True)
class Extend:
    """factor: how many times the native length to train at. native: frames; None: the family's."""

    factor: int | None = None
    native: int | None = None


@dataclass(frozen=True)
class Sparse:
    """The attention pattern and where it does not apply.

    pattern: `sparse.pattern.name` and that pattern's own parameters.
    block: tokens of a block. backend: auto, triton, flex or reference.
    dense_layers: the first layers that run dense (the paper trains with 2).
    dense_steps: the first diffusion steps that run dense when sampling.
    """

    pattern: Any = field(default_factory=Radial)
    block: int = 128
    backend: Literal["auto", "triton", "flex", "reference"] = "auto"
    dense_layers: int = 2
    dense_steps: int = 2


@dataclass(frozen=True)
class Lora:
    """rank; alpha (None: equal to rank); targets: a regex of module names (None: the family's)."""

    rank: int = 128
    alpha: float | None = None
    targets: str | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class Data:
    """path: folder of videos with captions. windows: clips of a video, `first` or `all` that fit.

    stride: frames between the starts of two windows (0: no overlap). strict: stop at the first
    unusable video instead of reporting and skipping it.
    """

    path: str | None = None
    windows: Literal["first", "all"] = "first"
    stride: int = 0
    strict: bool = False


@dataclass(frozen=True)
class Cache:
    """dir: where latents, text embeddings and tiny models are kept between runs."""

    dir: str = "cache"


@dataclass(frozen=True)
class Sigma:
    """Noise levels in training: uniform or logit-normal(mean, std), then shifted.

    shift: s -> shift * s / (1 + (shift - 1) * s); above 1 favours high noise, as long videos want.
    """

    name: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0


@dataclass(frozen=True)
class Train:
    """steps: optimizer updates. batch: clips per process and forward. clip: of the gradient norm.

    A clip of 0 does not clip. warmup: steps of linear warm-up. workers: that read the cache.
    """

    steps: int = 2000
    batch: int = 1
    accumulate: int = 1
    lr: float = 1e-4
    weight_decay: float = 0.0
    warmup: int = 100
    schedule: Literal["cosine", "constant"] = "constant"
    clip: float = 1.0
    seed: int = 0
    workers: int = 2
    sigma: Sigma = field(default_factory=Sigma)


@dataclass(frozen=True)
class Checkpoint:
    """every: steps between checkpoints (the last step always saves). keep_last: how many stay."""

    every: int = 250
    keep_last: int = 2


@dataclass(frozen=True)
class Memory:
    """checkpoint: recompute each block in backward. base_dtype: of the frozen weights."""

    checkpoint: bool = True
    base_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"


@dataclass(frozen=True)
class Validate:
    """Held-out loss and sample videos: before step one, every `every` steps and after the last.

    clips: videos held out of training. sigmas: noise levels of the held-out loss. prompts: of the
    sample videos (none: no samples). frames: of the samples (None: the training length).
    steps, guidance, seed: of the sampler.
    """

    every: int = 500
    clips: int = 1
    sigmas: list[float] = field(default_factory=lambda: [0.2, 0.4, 0.6, 0.8])
    prompts: list[str] = field(default_factory=list)
    frames: int | None = None
    steps: int = 30
    guidance: float = 5.0
    seed: int = 0


@dataclass(frozen=True)
class Log:
    """wandb: also log there (offline without a key). every: steps between lines of metrics.csv."""

    wandb: bool = True
    project: str = "longreel"
    every: int = 1


@dataclass(frozen=True)
class Run:
    """dir: checkpoints, adapter, metrics and samples; None: `runs/RECIPE`."""

    dir: str | None = None


@dataclass(frozen=True)
class Config:
    """One training run, complete. Lengths count frames of the video, sizes its pixels."""

    recipe: str = ""
    family: str = "wan"
    frames: int | None = None
    height: int = 480
    width: int = 832
    fps: int | None = None  # None: the family's
    model: Model = field(default_factory=Model)
    extend: Extend = field(default_factory=Extend)
    sparse: Sparse = field(default_factory=Sparse)
    lora: Lora = field(default_factory=Lora)
    data: Data = field(default_factory=Data)
    cache: Cache = field(default_factory=Cache)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    memory: Memory = field(default_factory=Memory)
    validate: Validate = field(default_factory=Validate)
    log: Log = field(default_factory=Log)
    run: Run = field(default_factory=Run)

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir or f"runs/{self.recipe}")

    @property
    def lora_alpha(self) -> float:
        return self.lora.rank if self.lora.alpha is None else self.lora.alpha


def load(argv: list[str]) -> Config:
    """Config from `recipe=NAME_OR_PATH key.path=value ...`.

    A value is everything after the first `=`: `validate.prompts` aside, strings are taken verbatim,
    so a path or caption may hold `#`, `:`, `=` or commas. Raises ConfigError, naming the key and
    what was meant, before anything heavy is imported.
    """
    given = _overrides(argv)
    recipe = given.pop("recipe", None)
    if not recipe:
        raise ConfigError(f"recipe=NAME is missing. Recipes: {', '.join(recipe_names())}.")
    path = _recipe_path(recipe)
    return _merge(_read(path), given, path.stem)


def load_file(path: str | Path) -> Config:
    """A resolved config as `save` wrote it."""
    return _merge(_read(Path(path)), {}, None)


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def to_dict(config: Config) -> dict[str, Any]:
    """Plain containers; the pattern is `{"name": ..., parameters}`."""
    plain = dataclasses.asdict(config)
    pattern = config.sparse.pattern
    plain["sparse"]["pattern"] = pattern_to_dict(pattern)
    return plain


def pattern_to_dict(pattern: SparsePattern) -> dict[str, Any]:
    return {"name": pattern_name(pattern), **dataclasses.asdict(pattern)}  # type: ignore[call-overload]


def pattern_from_dict(plain: dict[str, Any]) -> SparsePattern:
    """The inverse of `pattern_to_dict`; raises ConfigError for unknown names, keys and types."""
    plain = dict(plain)
    name = plain.pop("name", "radial")
    if name not in PATTERNS:
        raise ConfigError(f"sparse.pattern.name={name} is unknown.{_did_you_mean(name, PATTERNS)}")
    try:
        return _to_object(PATTERNS[name], plain, "sparse.pattern.")
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"sparse.pattern: {error}") from error


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def save(config: Config, path: Path) -> None:
    """Write the resolved config so that `load_file` gives it back equal."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(to_yaml(config))
    os.replace(temporary, path)


def config_hash(config: Config) -> str:
    """Twelve hex digits that name a resolved config."""
    text = json.dumps(to_dict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _overrides(argv: list[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raise ConfigError(f"{argument!r} is not of the form key=value.")
        if key in given:
            raise ConfigError(f"{key} is given twice: {given[key]!r} and {value!r}.")
        given[key] = value
    return given


def _recipe_path(recipe: str) -> Path:
    """A name in `recipes/`, or a path to a YAML file anywhere."""
    if recipe.endswith((".yaml", ".yml")) or os.sep in recipe:
        path = Path(recipe)
        if not path.is_file():
            raise ConfigError(f"recipe={recipe}: no such file.")
        return path
    path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        raise ConfigError(f"recipe={recipe} is unknown.{_did_you_mean(recipe, recipe_names())}")
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        node = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # PyYAML raises a family of its own
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{path} must hold `key: value` lines.")
    plain = OmegaConf.to_container(node)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _merge(recipe: dict[str, Any], overrides: dict[str, str], name: str | None) -> Config:
    merged = dict(recipe)
    if name is not None:
        merged["recipe"] = name
    fields = _leaf_types(Config)
    for key, text in overrides.items():
        _put(merged, key, _parse(key, text, fields))
    sparse = merged.get("sparse")
    pattern: dict[str, Any] = {}
    if isinstance(sparse, dict) and "pattern" in sparse:
        sparse = merged["sparse"] = dict(sparse)
        given = sparse.pop("pattern")
        if not isinstance(given, dict):
            raise ConfigError(f"sparse.pattern={given!r}: write sparse.pattern.name={given}.")
        pattern = given
        if "sparse.pattern.name" in overrides and pattern["name"] != _name_in(recipe):
            # The recipe's parameters belong to the recipe's pattern.
            prefix = "sparse.pattern."
            pattern = {k: v for k, v in pattern.items() if prefix + k in overrides}
    config = _to_object(Config, merged, "")
    config = dataclasses.replace(
        config, sparse=dataclasses.replace(config.sparse, pattern=pattern_from_dict(pattern))
    )
    _check(config)
    return config


def _name_in(recipe: dict[str, Any]) -> str:
    sparse = recipe.get("sparse") or {}
    return (sparse.get("pattern") or {}).get("name", "radial")


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        child = tree.get(parent)
        tree[parent] = dict(child) if isinstance(child, dict) else {}
        tree = tree[parent]
    tree[leaf] = value


def _parse(key: str, text: str, fields: dict[str, str]) -> Any:
    """Strings verbatim, everything else as YAML reads it."""
    kind = fields.get(key, "")
    if text in ("null", "None") and "None" in kind:
        return None
    if kind.startswith(("str", "Literal")):
        return text
    if kind.startswith("list[str]") and not text.startswith("["):
        return [text]  # one prompt, as it stands
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"x={text}"]))["x"]  # type: ignore[index]
    except Exception as error:
        raise ConfigError(f"{key}={text} cannot be read: {error}") from error


def _verbatim(tree: Any) -> Any:
    """The same tree, in which OmegaConf sees no interpolation: a prompt may hold `${`."""
    if isinstance(tree, dict):
        return {key: _verbatim(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_verbatim(value) for value in tree]
    return tree.replace("${", "\\${") if isinstance(tree, str) else tree


def _leaf_types(schema: Any, prefix: str = "") -> dict[str, str]:
    """Annotations, as written, of every leaf key of a tree of dataclasses."""
    types: dict[str, str] = {}
    for item in dataclasses.fields(schema):
        sub = item.default_factory() if callable(item.default_factory) else None  # type: ignore[misc]
        if dataclasses.is_dataclass(sub) and item.name != "pattern":
            types |= _leaf_types(sub, f"{prefix}{item.name}.")
        elif item.name == "pattern":
            types[f"{prefix}pattern.name"] = "str"
            for cls in PATTERNS.values():
                types |= _leaf_types(cls, f"{prefix}pattern.")
        else:
            types[prefix + item.name] = str(item.type)
    return types


def _to_object(cls: type, plain: dict[str, Any], prefix: str) -> Any:
    _check_keys(cls, plain, prefix)
    try:
        schema = OmegaConf.structured(cls)
        return OmegaConf.to_object(OmegaConf.merge(schema, _verbatim(plain)))
    except OmegaConfBaseException as error:
        key = prefix + (getattr(error, "full_key", None) or "")
        message = str(error.msg if hasattr(error, "msg") else error).splitlines()[0]
        raise ConfigError(f"{key}: {message}.") from error


def _check_keys(cls: type, plain: dict[str, Any], prefix: str) -> None:
    """Unknown keys fail with the nearest known one, wherever in the tree it stands."""
    names = {item.name: item for item in dataclasses.fields(cls)}
    for key, value in plain.items():
        item = names.get(key)
        if item is None:
            where = f"{prefix}{key}"
            raise ConfigError(
                f"{where} is not a setting.{_did_you_mean(where, _leaf_types(Config))}"
            )
        sub = item.default_factory() if callable(item.default_factory) else None  # type: ignore[misc]
        if dataclasses.is_dataclass(sub) and key != "pattern":
            if not isinstance(value, dict):
                raise ConfigError(
                    f"{prefix}{key}={value!r}: it has settings of its own, such as "
                    f"{prefix}{key}.{dataclasses.fields(sub)[0].name}."
                )
            _check_keys(type(sub), value, f"{prefix}{key}.")


def _did_you_mean(name: str, options: Any) -> str:
    options = list(options)
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if not near:  # the last part alone: `lr` for `train.lr`
        leaf = name.rsplit(".", 1)[-1]
        near = [option for option in options if option.rsplit(".", 1)[-1] == leaf][:1]
    if near:
        return f" Did you mean {near[0]}?"
    return f" Known: {', '.join(options)}." if len(options) <= 20 else ""


def _check(config: Config) -> None:
    """Ranges that hold for every model; what depends on the model is checked by its family."""
    problems = list(_problems(config))
    if problems:
        raise ConfigError("\n".join(problems))


def _problems(config: Config) -> Iterator[str]:
    train, validate = config.train, config.validate
    positive = {
        "height": config.height,
        "width": config.width,
        "sparse.block": config.sparse.block,
        "lora.rank": config.lora.rank,
        "train.steps": train.steps,
        "train.batch": train.batch,
        "train.accumulate": train.accumulate,
        "train.lr": train.lr,
        "train.sigma.shift": train.sigma.shift,
        "train.sigma.std": train.sigma.std,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep_last": config.checkpoint.keep_last,
        "validate.every": validate.every,
        "validate.steps": validate.steps,
        "log.every": config.log.every,
    }
    not_negative = {
        "sparse.dense_layers": config.sparse.dense_layers,
        "sparse.dense_steps": config.sparse.dense_steps,
        "data.stride": config.data.stride,
        "train.weight_decay": train.weight_decay,
        "train.warmup": train.warmup,
        "train.clip": train.clip,
        "train.workers": train.workers,
        "validate.clips": validate.clips,
        "lora.dropout": config.lora.dropout,
    }
    optional = {
        "frames": config.frames,
        "fps": config.fps,
        "extend.factor": config.extend.factor,
        "extend.native": config.extend.native,
        "lora.alpha": config.lora.alpha,
        "validate.frames": validate.frames,
    }
    positive |= {key: value for key, value in optional.items() if value is not None}
    yield from (f"{key}={value} must be positive." for key, value in positive.items() if value <= 0)
    yield from (
        f"{key}={value} must not be negative." for key, value in not_negative.items() if value < 0
    )
    block = config.sparse.block
    if block > 0 and (block < 16 or block & (block - 1)):
        yield f"sparse.block={block} must be a power of two, at least 16; 128 is the tuned one."
    if config.frames is None and config.extend.factor is None:
        yield (
            "Neither frames nor extend.factor is set: give the length to train at, e.g. "
            "extend.factor=2."
        )
    if config.lora.dropout >= 1:
        yield f"lora.dropout={config.lora.dropout} must be below 1."
    if train.warmup > train.steps:
        yield f"train.warmup={train.warmup} is more than train.steps={train.steps}."
    yield from (
        f"validate.sigmas: {sigma} is not between 0 and 1 (noise level)."
        for sigma in validate.sigmas
        if not 0 < sigma <= 1
    )
