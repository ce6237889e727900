"""The settings of a run: every key, its unit and effect, and the values that it takes.

`recipe.py` reads them from files and the command line into a frozen `Config`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...kernels.block_sparse.op import BLOCKS
from ...sparse.patterns.radial import Radial
from .values import ConfigError, flatten, not_finite

EngineName = Literal["ddp", "zero2", "zero3", "fsdp2"]
RopeName = Literal["native", "riflex", "interpolate"]
SEEDS = 2**32  # seeds are below it: what is drawn of one multiplies it, within 64 bits


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
    block: tokens of a block. backend: auto, triton, flex, fa4 (flash-attn-4, installed apart) or
        reference.
    density: computed share of the token pairs of a sparse layer, in (0, 1], at the training length;
        sets the pattern's width, whatever it was (None: the width is the pattern's parameter).
    dense_layers: the layers that run dense: a number of first layers (the paper trains with 2), or
        a list of indices, of which those below 0 count from the last.
    dense_steps: the same for diffusion steps when sampling.
    """

    pattern: Any = field(default_factory=Radial)
    block: int = 128
    backend: Literal["auto", "triton", "flex", "fa4", "reference"] = "auto"
    density: float | None = None
    dense_layers: Any = 2  # int | list[int], which OmegaConf cannot say
    dense_steps: Any = 2


@dataclass(frozen=True)
class Rope:
    """Temporal positions beyond the native length; spatial ones stay as they are (docs/rope.md).

    policy: `native` goes on counting, `interpolate` scales positions to the native length, `riflex`
        lowers the one frequency that makes videos repeat.
    k: of riflex, which frequency, from 1, the highest (None: the first whose period is not shorter
        than the native length).
    """

    policy: RopeName = "native"
    k: int | None = None


@dataclass(frozen=True)
class Lora:
    """rank; alpha (None: equal to rank); targets: a set of layers that the family names, or a regex
    of whole module names (None: the family's first set).

    compute_dtype: of the adapter's products; its parameters, gradients and moments are fp32 either
    way. bfloat16 is faster and keeps less for backward.
    """

    rank: int = 128
    alpha: float | None = None
    targets: str | None = None
    dropout: float = 0.0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class Synthetic:
    """clips: how many are drawn for data.source=synthetic:NAME, at the training length and size.

    seed: of what they show; the clips of a seed are the same in every run.
    """

    clips: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Data:
    """Which videos, and which clips of them (docs/data.md).

    source: folder, openvid (OpenVid-1M's layout) or datasets; or `synthetic:` and bounce, occlude,
        cross, spin, pan, clock or mix: clips whose coherence can be measured, drawn for the run
        (docs/synthetic.md).
    path: the folder; for `datasets` a name on the Hub or a local copy, and subset, split and
        revision of it.
    video, caption: columns of tables (None: `file_name` or `video`, `caption` or `text`).
    filter: a rule over a table's columns, such as aesthetic > 5.2 and "motion score" > 3.
    top_k: keep so many videos, those with the greatest top_by, a column (None: all).
    windows: clips of a video, `first` or `all` that fit. stride: frames between the starts of two
        windows (0: no overlap).
    lengths: frames of further, shorter clips, for videos and ends of videos that are too short for
        `frames`. aspects: such as 16:9; a video is cropped to the nearest one, in at most as many
        pixels as height x width (none: height x width for all).
    least_scale: smallest share of a clip's height and width that a video must have; 0.5 lets it be
        enlarged twice, 0 any number of times.
    shots: find cuts, and let no clip cross one. canonical: first make a copy of each video of
        constant frame rate in the cache, and use that.
    strict: stop at unusable videos instead of reporting and skipping them.
    """

    source: str = "folder"
    path: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    video: str | None = None
    caption: str | None = None
    filter: str = ""
    top_k: int | None = None
    top_by: str | None = None
    synthetic: Synthetic = field(default_factory=Synthetic)
    windows: Literal["first", "all"] = "first"
    stride: int = 0
    lengths: list[int] = field(default_factory=list)
    aspects: list[str] = field(default_factory=list)
    least_scale: float = 0.5
    shots: bool = False
    canonical: bool = False
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

    A clip of 0 does not clip. warmup: steps of linear warm-up. workers: threads that read the
    cache, each a batch ahead; 0 reads a batch when its step begins.
    caption_dropout: share of clips that train with the empty caption, which keeps classifier-free
    guidance alive. guidance: what a guidance-distilled model (HunyuanVideo) is told in training;
    None for the family's, which differs from what samples are told. max_skips: updates in a row
    that are skipped because their loss or gradient is NaN or Inf; one more ends the run.
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
    caption_dropout: float = 0.0
    guidance: float | None = None
    max_skips: int = 4
    sigma: Sigma = field(default_factory=Sigma)


@dataclass(frozen=True)
class Checkpoint:
    """every: steps between checkpoints (the last step always saves). every_minutes: since the last
    one, after which a step saves too (0: steps alone count). keep_last: how many stay.

    retry_minutes: for which a save that the run cannot do without, after its last step or when it
        is told to stop, is tried again where it fails, as on a full disk. Others that fail are
        tried again a minute later, and training goes on.
    """

    every: int = 250
    every_minutes: float = 30.0
    keep_last: int = 2
    retry_minutes: float = 30.0


@dataclass(frozen=True)
class Memory:
    """What is traded for GPU memory and time; see docs/memory.md for figures.

    checkpoint: what backward recomputes of a block from its inputs: `full`, everything;
        `attention`, all but self-attention, whose result is kept (as much memory again as the
        inputs); `none`, nothing, and everything is kept.
    offload: what blocks keep waits in pinned host memory, which needs room for all of it.
    offload_keep: last blocks whose tensors stay on the GPU.
    mlp_chunk: tokens that a block's MLP takes at a time, recomputed by themselves (0: all).
    base_dtype: of the frozen weights; float8 (e4m3, GPUs since Ada) is for the linear layers of the
        blocks and their forward products, and rounds coarsely.
    fused_norms: norms and RoPE of queries and keys in one Triton kernel; gradients round once.
    fused_modulation: Wan's and Mochi's block norms with their scale and shift, and Wan's gated
        sums, in one Triton kernel each; gradients round once. Not yet measured on a GPU.
    optimizer: adamw, or adamw8bit (bitsandbytes, installed apart): moments of 8 bits.
    probe: before the run, try one step and throw it away, so that a run that does not fit ends
        before it began (None: on a GPU).
    """

    checkpoint: Literal["none", "full", "attention"] = "full"
    offload: bool = False
    offload_keep: int = 1
    mlp_chunk: int = 0
    base_dtype: Literal["bfloat16", "float32", "float8"] = "bfloat16"
    fused_norms: bool = False
    fused_modulation: bool = False
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    probe: bool | None = None


@dataclass(frozen=True)
class Parallel:
    """sequence: processes, neighbours in rank, that share the tokens of their clips and count as
    one elsewhere. Divides the model's heads and the number of processes (docs/parallel.md).

    engine: how processes hold the model: whole (`ddp`), or in shards; zero2 and zero3 are
        DeepSpeed's, installed apart (None: what accelerate was launched for, else ddp).
    timeout: minutes that a process may take for one part of a step, such as a backward, until the
        run counts as stuck and ends.
    """

    sequence: int = 1
    engine: EngineName | None = None
    timeout: float = 30.0


@dataclass(frozen=True)
class Validate:
    """Held-out loss and sample videos: before step one, every `every` steps and after the last.

    clips: videos held out of training. sigmas: noise levels of the held-out loss. prompts: of the
    sample videos (none: no samples). frames: of the samples (None: the training length).
    steps, guidance, seed: of the sampler; guidance None for the family's.
    """

    every: int = 500
    clips: int = 1
    sigmas: list[float] = field(default_factory=lambda: [0.2, 0.4, 0.6, 0.8])
    prompts: list[str] = field(default_factory=list)
    frames: int | None = None
    steps: int = 30
    guidance: float | None = None
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
    rope: Rope = field(default_factory=Rope)
    lora: Lora = field(default_factory=Lora)
    data: Data = field(default_factory=Data)
    cache: Cache = field(default_factory=Cache)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    memory: Memory = field(default_factory=Memory)
    parallel: Parallel = field(default_factory=Parallel)
    validate: Validate = field(default_factory=Validate)
    log: Log = field(default_factory=Log)
    run: Run = field(default_factory=Run)

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir or f"runs/{self.recipe}")

    @property
    def lora_alpha(self) -> float:
        return float(self.lora.rank if self.lora.alpha is None else self.lora.alpha)


def check(config: Config) -> None:
    """Raise ConfigError for values out of the ranges that hold for every model, all at once; what
    depends on the model is checked by its family."""
    found = list(problems(config))
    if found:
        raise ConfigError("\n".join(found))


def problems(config: Config) -> Iterator[str]:
    """What `check` refuses, a sentence each."""
    train, validate = config.train, config.validate
    yield from not_finite(flatten(dataclasses.asdict(config)))
    positive = {
        "height": config.height,
        "width": config.width,
        "sparse.block": config.sparse.block,
        "lora.rank": config.lora.rank,
        "data.synthetic.clips": config.data.synthetic.clips,
        "train.steps": train.steps,
        "train.batch": train.batch,
        "train.accumulate": train.accumulate,
        "train.lr": train.lr,
        "train.sigma.shift": train.sigma.shift,
        "train.sigma.std": train.sigma.std,
        "parallel.sequence": config.parallel.sequence,
        "parallel.timeout": config.parallel.timeout,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep_last": config.checkpoint.keep_last,
        "validate.every": validate.every,
        "validate.steps": validate.steps,
        "log.every": config.log.every,
    }
    seeds = {
        "data.synthetic.seed": config.data.synthetic.seed,
        "train.seed": train.seed,
        "validate.seed": validate.seed,
    }
    not_negative = {
        **seeds,
        "data.stride": config.data.stride,
        "data.least_scale": config.data.least_scale,
        "train.weight_decay": train.weight_decay,
        "train.warmup": train.warmup,
        "train.clip": train.clip,
        "train.workers": train.workers,
        "train.max_skips": train.max_skips,
        "checkpoint.every_minutes": config.checkpoint.every_minutes,
        "checkpoint.retry_minutes": config.checkpoint.retry_minutes,
        "validate.clips": validate.clips,
        "lora.dropout": config.lora.dropout,
        "memory.offload_keep": config.memory.offload_keep,
        "memory.mlp_chunk": config.memory.mlp_chunk,
    }
    optional = {
        "frames": config.frames,
        "fps": config.fps,
        "extend.factor": config.extend.factor,
        "extend.native": config.extend.native,
        "rope.k": config.rope.k,
        "lora.alpha": config.lora.alpha,
        "train.guidance": train.guidance,
        "data.top_k": config.data.top_k,
        "validate.frames": validate.frames,
    }
    for key in ("dense_layers", "dense_steps"):
        chosen = getattr(config.sparse, key)
        not_negative |= {} if isinstance(chosen, list) else {f"sparse.{key}": chosen}
    positive |= {key: value for key, value in optional.items() if value is not None}
    yield from (f"{key}={value} must be positive." for key, value in positive.items() if value <= 0)
    yield from (
        f"{key}={value} must not be negative." for key, value in not_negative.items() if value < 0
    )
    yield from (
        f"{key}={value} must be below 2^32." for key, value in seeds.items() if value >= SEEDS
    )
    density = config.sparse.density
    if density is not None and not 0 < density <= 1:
        yield f"sparse.density={density} must be above 0 and at most 1."
    block = config.sparse.block
    if block > 0 and block not in BLOCKS:
        yield f"sparse.block={block} must be 16, 32, 64 or 128; the kernels are tuned for 128."
    if config.rope.k is not None and config.rope.policy != "riflex":
        yield f"rope.k={config.rope.k} is of rope.policy=riflex alone, not {config.rope.policy}."
    if config.frames is None and config.extend.factor is None:
        yield (
            "Neither frames nor extend.factor is set: give the length to train at, e.g. "
            "extend.factor=2."
        )
    if config.memory.offload and config.memory.checkpoint == "none":
        yield (
            "memory.offload=true moves what checkpointed blocks keep: it needs memory.checkpoint="
            "full or attention."
        )
    if config.memory.checkpoint == "attention" and config.sparse.backend == "flex":
        yield (
            "memory.checkpoint=attention keeps the results of our kernels and of SDPA, and "
            "sparse.backend=flex is neither: use memory.checkpoint=full, or another backend."
        )
    if config.lora.compute_dtype == "bfloat16" and config.memory.base_dtype == "float32":
        yield (
            "lora.compute_dtype=bfloat16 is for a base of bfloat16 or float8, and memory.base_dtype"
            "=float32."
        )
    yield from engine_problems(config)
    if config.lora.dropout >= 1:
        yield f"lora.dropout={config.lora.dropout} must be below 1."
    if not 0 <= train.caption_dropout <= 1:
        yield f"train.caption_dropout={train.caption_dropout} is not between 0 and 1."
    if train.warmup > train.steps:
        yield f"train.warmup={train.warmup} is more than train.steps={train.steps}."
    yield from (
        f"validate.sigmas: {sigma} is not between 0 and 1 (noise level)."
        for sigma in validate.sigmas
        if not 0 < sigma <= 1
    )
    yield from _data_problems(config.data)
    if validate.clips and not validate.sigmas:
        yield "validate.sigmas is empty: name noise levels, or hold none out (validate.clips=0)."


def engine_problems(config: Config) -> Iterator[str]:
    """What does not go with `parallel.engine`."""
    sharded = config.parallel.engine not in (None, "ddp")
    if sharded and config.memory.optimizer == "adamw8bit":
        yield (
            f"parallel.engine={config.parallel.engine} shards the moments, which memory.optimizer="
            "adamw8bit keeps in blocks of its own: use memory.optimizer=adamw, or parallel.engine="
            "ddp."
        )
    if config.parallel.engine == "zero3" and config.memory.base_dtype == "float8":
        yield (
            "parallel.engine=zero3 knows no float8 weights: use fsdp2, or another memory."
            "base_dtype."
        )


def _data_problems(data: Data) -> Iterator[str]:
    if data.least_scale > 1:
        yield f"data.least_scale={data.least_scale} is a share: give 0 to 1."
    if (data.top_k is None) != (data.top_by is None):
        given, missing = ("top_k", "top_by") if data.top_by is None else ("top_by", "top_k")
        yield f"data.{given} is set and data.{missing} is not: they work together."
    yield from (f"data.lengths: {n} must be positive." for n in data.lengths if n <= 0)
    yield from (
        f"data.aspects: {text} is not of the form WIDTH:HEIGHT, such as 16:9."
        for text in data.aspects
        if not re.fullmatch(r"0*[1-9]\d*:0*[1-9]\d*", text)
    )
