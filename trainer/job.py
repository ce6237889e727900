"""A job: a config whose open choices are settled from the model's JSON files, not its weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import exp, log, prod, sqrt
from pathlib import Path
from typing import Any

from ..data.cache import Bucket
from ..kernels.block_sparse.op import HEAD_DIMS
from ..sparse.attention import SparseAttention
from ..sparse.density import with_density
from ..sparse.grid import TokenGrid
from ..sparse.patterns import SparsePattern, pattern_name
from .config.recipe import config_hash, pattern_to_dict
from .config.schema import Config
from .config.source import check_source
from .config.values import ConfigError
from .families import FAMILIES
from .families.base import ModelFamily
from .families.geometry import Geometry
from .families.published import published_geometry
from .families.rope import NATIVE, RopePolicy
from .parallel.sequence import check_sequence


@dataclass(frozen=True)
class Job:
    """A config whose open choices are settled, with the model that it names.

    config: as given, with `frames`, `fps`, `extend.native`, `rope.k`, `lora.alpha`, `model.path`
        and `run.dir` settled; loading it back gives the same job.
    model_path: the folder or Hub repository that the model is read from.
    """

    config: Config
    family: ModelFamily
    geometry: Geometry
    model_path: str

    @classmethod
    def from_config(cls, config: Config, *, published: bool = False) -> Job:
        """Settle a config; raise ConfigError for lengths, sizes, layers or files that cannot work.

        published: take the sizes of a model in `families.published` from there, not from its files.
        """
        if config.family not in FAMILIES:
            raise ConfigError(
                f"family={config.family} is unknown. Families: {', '.join(FAMILIES)}."
            )
        family = FAMILIES[config.family]
        check_source(config)
        path = config.model.path or family.names.repository
        model_path = family.loader.resolve(path, config.cache.dir)
        revision = config.model.revision
        geometry = published_geometry(family, model_path, revision) if published else None
        geometry = geometry or family.read_geometry(model_path, revision)
        config = replace(config, model=replace(config.model, path=path))
        config = _settle(config, family, geometry)
        job = cls(config, family, geometry, model_path)
        job.buckets()
        return job

    @property
    def frames(self) -> int:
        """Frames of a training clip."""
        assert self.config.frames is not None
        return self.config.frames

    @property
    def native_frames(self) -> int:
        """Frames that the base model was trained for."""
        assert self.config.extend.native is not None
        return self.config.extend.native

    @property
    def fps(self) -> int:
        assert self.config.fps is not None
        return self.config.fps

    def latent_shape(self, frames: int) -> tuple[int, int, int, int]:
        """`(channels, frames, height, width)` of a clip's latents."""
        height, width = self.config.height, self.config.width
        return self.geometry.latent_shape(frames, height, width, self.rope)

    def grid(self, frames: int) -> TokenGrid:
        """Return the tokens of a clip of `frames` frames, with a caption of the greatest length."""
        shape, text = self.latent_shape(frames), self.family.text.sequence_tokens
        return self.geometry.grid(shape, text)

    def buckets(self) -> tuple[Bucket, ...]:
        """Return the shapes of training clips, from `data.lengths` and `data.aspects`.

        None has more tokens than `frames` x `height` x `width`, for which memory is planned. Raises
        ConfigError for lengths that the model does not accept or that are too long.
        """
        config = self.config
        sizes = [self._size_of(aspect) for aspect in config.data.aspects]
        found = []
        for frames in sorted({self.frames, *config.data.lengths}, reverse=True):
            _check_frames("data.lengths", frames, self.geometry, self.rope)
            if frames > self.frames:
                raise ConfigError(
                    f"data.lengths: {frames} is more than the {self.frames} frames that memory, "
                    "density and positions are set for: make it frames, and this a length."
                )
            for height, width in sizes or [(config.height, config.width)]:
                shape = self.geometry.latent_shape(frames, height, width, self.rope)
                tokens = self.geometry.grid(shape).video
                found.append(Bucket(frames, height, width, tokens, self._latent_bytes(shape)))
        return tuple(dict.fromkeys(found))

    def _latent_bytes(self, shape: tuple[int, int, int, int]) -> int:
        each = 4 if self.config.memory.base_dtype == "float32" else 2
        return each * prod(shape)

    def _size_of(self, aspect: str) -> tuple[int, int]:
        """Return height and width on the model's grid for an aspect `W:H`.

        They have at most as many pixels as the config's height x width.
        """
        wide, high = map(int, aspect.split(":"))
        down, right = (self.geometry.spatial * patch for patch in self.geometry.patch[1:])
        area = self.config.height * self.config.width
        least = int(sqrt(area * high / wide)) // down * down
        sizes = []
        for height in (h for h in (least, least + down) if h):
            column = int(height * wide / high) // right * right
            widths = {column, column + right, area // height // right * right}
            sizes += [(height, w) for w in sorted(widths) if w and height * w <= area]
        if not sizes:
            raise ConfigError(
                f"data.aspects: {aspect} does not fit in {self.config.height} x "
                f"{self.config.width} pixels on the model's grid of {down} x {right}."
            )

        def used(size: tuple[int, int]) -> float:
            """Return the pixels, reduced by the share of the picture that is cropped."""
            height, width = size
            return height * width * exp(-abs(log(width * high / (height * wide))))

        return max(sizes, key=used)

    @cached_property
    def pattern(self) -> SparsePattern:
        """The config's pattern, at the width that meets `sparse.density` if that is set.

        Solving takes seconds at great lengths, so it is done on first use. Raises ConfigError for a
        density that cannot be met.
        """
        sparse = self.config.sparse
        if sparse.density is None:
            return sparse.pattern
        if sparse.pattern.width is None:
            raise ConfigError(
                f"sparse.density={sparse.density}: {pattern_name(sparse.pattern)} has no width for "
                "it to set; leave it out, or choose another sparse.pattern.name."
            )
        grid, heads = self.grid(self.frames), self.geometry.heads
        try:
            return with_density(sparse.pattern, grid, sparse.density, sparse.block, heads)[0]
        except ValueError as error:
            raise ConfigError(f"sparse.{error}") from error

    @property
    def rope(self) -> RopePolicy:
        """The policy of temporal positions at this run's lengths."""
        return _rope_policy(self.config, self.geometry, self.native_frames, self.frames)

    def attention(self) -> SparseAttention:
        """Return a new sparse attention with the config's settings."""
        sparse = self.config.sparse
        return SparseAttention(
            self.pattern,
            block=sparse.block,
            backend=sparse.backend,
            dense_layers=sparse.dense_layers,
            dense_steps=sparse.dense_steps,
        )

    def adapter_entry(self) -> dict[str, Any]:
        """Return the entry of the adapter file, from which sampling restores attention and RoPE."""
        config, sparse = self.config, self.config.sparse
        path = config.model.path
        assert path is not None
        if path != "tiny" and Path(path).is_dir():
            path = str(Path(path).absolute())  # sampling may start in another folder
        return {
            # Readers of version 1 would silently apply native RoPE.
            "version": 1 if self.rope.policy == "native" else 2,
            "family": self.family.name,
            "model": {"path": path, "revision": config.model.revision},
            "pattern": pattern_to_dict(self.pattern),
            "block": sparse.block,
            "dense_layers": sparse.dense_layers,
            "dense_steps": sparse.dense_steps,
            "native_frames": self.native_frames,
            "frames": self.frames,
            "height": config.height,
            "width": config.width,
            "fps": self.fps,
            "rope": asdict(self.rope),
            "guidance": config.train.guidance,
            "config_hash": config_hash(config),
        }


def _settle(config: Config, family: ModelFamily, geometry: Geometry) -> Config:
    native = config.extend.native or family.defaults.native_frames
    _check_frames("extend.native", native, geometry, NATIVE)
    family.defaults.check_steps("validate.steps", config.validate.steps)
    family.blocks.check_modulation(config.speed.fused_modulation)
    _check_dense_steps(config.sparse.dense_steps, config.validate.steps)
    if config.train.guidance is not None and not geometry.guidance_embeds:
        raise ConfigError(
            f"train.guidance={config.train.guidance}: this model takes no guidance; remove the "
            "setting."
        )
    frames = config.frames
    if config.extend.factor is not None:
        extended = geometry.extended_frames(native, config.extend.factor)
        if frames not in (None, extended):
            raise ConfigError(
                f"frames={frames} and extend.factor={config.extend.factor} disagree: "
                f"{config.extend.factor} x {native} native frames is {extended}. Set one of them."
            )
        frames = extended
    assert frames is not None
    if frames < native:
        raise ConfigError(f"frames={frames} is less than the native length of {native} frames.")
    rope = _rope_policy(config, geometry, native, frames)
    geometry.latent_shape(frames, config.height, config.width, rope)
    if config.validate.frames is not None:
        _check_frames("validate.frames", config.validate.frames, geometry, rope)
    if geometry.head_dim not in HEAD_DIMS:
        raise ConfigError(
            f"The model's heads have {geometry.head_dim} channels; the kernels take {HEAD_DIMS}."
        )
    check_sequence(config.parallel.sequence, geometry.heads)
    sparse = replace(
        config.sparse, dense_layers=_dense_layers(config.sparse.dense_layers, geometry.layers)
    )
    return replace(
        config,
        frames=frames,
        fps=config.fps or family.defaults.fps,
        extend=replace(config.extend, native=native),
        sparse=sparse,
        rope=replace(config.rope, k=rope.k),
        lora=replace(config.lora, alpha=config.lora_alpha),
        train=replace(config.train, guidance=_train_guidance(config, family, geometry)),
        validate=replace(config.validate, guidance=_sample_guidance(config, family)),
        run=replace(config.run, dir=str(config.run_dir)),
    )


def _check_frames(name: str, frames: int, geometry: Geometry, rope: RopePolicy) -> None:
    try:
        geometry.check_frames(frames, rope)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def _rope_policy(config: Config, geometry: Geometry, native: int, frames: int) -> RopePolicy:
    lengths = {"native": geometry.positions(native), "target": geometry.positions(frames)}
    return RopePolicy.resolve(config.rope, **lengths, axis=geometry.rope)


def _dense_layers(chosen: int | list[int], layers: int) -> int | list[int]:
    """Return the choice with negative indices, which count from the last layer, made positive."""
    listed = isinstance(chosen, list)
    beyond = [i for i in chosen if not -layers <= i < layers] if listed else chosen > layers
    if beyond:
        raise ConfigError(f"sparse.dense_layers={chosen}, but the model has {layers} layers.")
    return sorted({index % layers for index in chosen}) if listed else chosen


def _check_dense_steps(chosen: int | list[int], steps: int) -> None:
    """Raise ConfigError for indices past the schedule, which would silently choose nothing."""
    beyond = [] if isinstance(chosen, int) else [i for i in chosen if not -steps <= i < steps]
    if beyond:
        raise ConfigError(
            f"sparse.dense_steps={chosen}: {beyond} are not among the validate.steps={steps} "
            "diffusion steps of a sample."
        )


def _train_guidance(config: Config, family: ModelFamily, geometry: Geometry) -> float | None:
    if not geometry.guidance_embeds:
        return None
    given = config.train.guidance
    return family.defaults.train_guidance if given is None else given


def _sample_guidance(config: Config, family: ModelFamily) -> float:
    given = config.validate.guidance
    return family.defaults.guidance if given is None else given
