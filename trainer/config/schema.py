"""The settings of a run: every key with its unit, effect, default and range.

`recipe.py` reads them from files and the command line into a frozen `Config`; `checks.py` says
which of them go together. docs/settings.md is generated from this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...sparse.patterns.radial import Radial
from .fields import NOT_NEGATIVE, POSITIVE, SEED, SHARE, Range, section, setting

EngineName = Literal["ddp", "zero2", "zero3", "fsdp2"]
RopeName = Literal["native", "riflex", "interpolate"]


@dataclass(frozen=True)
class Model:
    """The pretrained model."""

    path: str | None = setting(
        None,
        "A Hub repository, a local folder in its layout, or `tiny` for small random weights; null "
        "takes the family's published repository.",
    )
    revision: str | None = setting(
        None, "Branch, tag or commit of the Hub repository; null takes its main branch."
    )


@dataclass(frozen=True)
class Extend:
    """The length to train at, relative to the model's own."""

    factor: int | None = setting(
        None, "How many times the native length to train at; must agree with `frames`.", POSITIVE
    )
    native: int | None = setting(
        None, "Frames that the model was trained for; null takes the family's.", POSITIVE
    )


@dataclass(frozen=True)
class Sparse:
    """The attention pattern and the layers and steps that stay dense (docs/patterns.md)."""

    pattern: Any = setting(
        Radial(),
        "The attention pattern: `sparse.pattern.name` and that pattern's own parameters, which "
        "docs/patterns.md lists.",
    )
    block: int = setting(
        128,
        "Tokens of a block, the unit that is kept or skipped: 16, 32, 64 or 128. The kernels are "
        "tuned for 128.",
        POSITIVE,
    )
    backend: Literal["auto", "triton", "flex", "fa4", "reference"] = setting(
        "auto",
        "The kernel: our Triton kernels, PyTorch's flex_attention, flash-attn-4 (installed apart), "
        "or the slow reference; `auto` takes Triton on a GPU and the reference on a CPU.",
    )
    density: float | None = setting(
        None,
        "Share of all token pairs that a sparse layer computes at the training length. It sets the "
        "pattern's width, whatever the recipe says; null keeps the pattern's own parameter.",
        Range(above=0, most=1),
    )
    dense_layers: Any = setting(  # int | list[int], which OmegaConf cannot express
        2,
        "Layers that stay dense: the first so many (the paper trains with 2), or a list of "
        "indices, of which negative ones count from the last layer.",
        NOT_NEGATIVE,
    )
    dense_steps: Any = setting(
        2,
        "Diffusion steps that stay dense when sampling: the first so many, or a list of indices "
        "as for `sparse.dense_layers`.",
        NOT_NEGATIVE,
    )


@dataclass(frozen=True)
class Rope:
    """Temporal positions beyond the native length; spatial ones never change (docs/rope.md)."""

    policy: RopeName = setting(
        "native",
        "`native` continues to count, `interpolate` scales positions into the native length, "
        "`riflex` lowers the one frequency that makes videos repeat.",
    )
    k: int | None = setting(
        None,
        "The frequency that riflex lowers, counted from 1, the highest; null takes the first whose "
        "period is at least the native length.",
        POSITIVE,
    )


@dataclass(frozen=True)
class Lora:
    """The adapter."""

    rank: int = setting(128, "Rank of the update of each layer.", POSITIVE)
    alpha: float | None = setting(
        None,
        "Scale of the update, which is multiplied by alpha / rank; null is the rank.",
        POSITIVE,
    )
    targets: str | None = setting(
        None,
        "The layers that get an adapter: a set that the family names, or a regular expression for "
        "whole module names; null takes the family's first set.",
    )
    dropout: float = setting(
        0.0,
        "Probability with which an element of an adapter's input is zeroed in training.",
        Range(least=0, below=1),
    )
    compute_dtype: Literal["float32", "bfloat16"] = setting(
        "float32",
        "Precision of the adapter's products; bfloat16 is faster and keeps less for backward. "
        "Parameters, gradients and moments are fp32 either way.",
    )


@dataclass(frozen=True)
class Synthetic:
    """Clips that are drawn for the run, for data.source=synthetic:NAME (docs/synthetic.md)."""

    clips: int = setting(64, "How many are drawn, at the training length and size.", POSITIVE)
    seed: int = setting(
        0, "Seed of their content; the clips of a seed are the same in every run.", SEED
    )


@dataclass(frozen=True)
class Data:
    """The videos, and which clips of them (docs/data.md)."""

    source: str = setting(
        "folder",
        "`folder`, `openvid` (OpenVid-1M's layout), `datasets`, or `synthetic:NAME` with bounce, "
        "occlude, cross, spin, pan, clock or mix, which are drawn and whose coherence can be "
        "measured.",
    )
    path: str | None = setting(
        None,
        "The folder of videos with captions; for `datasets`, a name on the Hub or a local copy.",
    )
    subset: str | None = setting(None, "Configuration of a data set from `datasets`.")
    split: str = setting("train", "Split of a data set from `datasets`.")
    revision: str | None = setting(None, "Revision of a data set from `datasets`.")
    video: str | None = setting(
        None, "Column of a table with the video's file; null looks for `file_name` or `video`."
    )
    caption: str | None = setting(
        None, "Column of a table with the caption; null looks for `caption` or `text`."
    )
    filter: str = setting(
        "",
        'A rule over a table\'s columns, such as `aesthetic > 5.2 and "motion score" > 3`; empty '
        "keeps all.",
    )
    top_k: int | None = setting(
        None, "Keep this many videos, those with the greatest `data.top_by`; null is all.", POSITIVE
    )
    top_by: str | None = setting(None, "Column that `data.top_k` ranks videos by.")
    synthetic: Synthetic = section(Synthetic)
    windows: Literal["first", "all"] = setting(
        "first", "Clips of a video: the `first` one, or `all` that fit."
    )
    stride: int = setting(
        0,
        "Frames between the starts of two clips of a video; 0 lets them not overlap.",
        NOT_NEGATIVE,
    )
    lengths: list[int] = setting(
        [],
        "Frames of further, shorter clips, made of videos and ends of videos that are too short "
        "for `frames`.",
        POSITIVE,
    )
    aspects: list[str] = setting(
        [],
        "Aspect ratios such as 16:9. A video is cropped to the nearest one, in at most as many "
        "pixels as height x width; empty crops all to height x width.",
    )
    least_scale: float = setting(
        0.5,
        "Smallest share of a clip's height and width that a video must have: 0.5 enlarges it at "
        "most twice, 0 any number of times.",
        SHARE,
    )
    shots: bool = setting(False, "Find cuts, and let no clip cross one.")
    canonical: bool = setting(
        False, "Make a copy of each video with a constant frame rate in the cache, and use that."
    )
    strict: bool = setting(False, "Stop at unusable videos instead of reporting and skipping them.")


@dataclass(frozen=True)
class Cache:
    """The cache, which is kept between runs."""

    dir: str = setting("cache", "Folder of latents, text embeddings and tiny models.")


@dataclass(frozen=True)
class Sigma:
    """The distribution of noise levels in training, in [0, 1]."""

    name: Literal["uniform", "logit_normal"] = setting(
        "uniform", "The distribution before the shift."
    )
    mean: float = setting(0.0, "Mean of the logit, for logit_normal.")
    std: float = setting(1.0, "Standard deviation of the logit, for logit_normal.", POSITIVE)
    shift: float = setting(
        1.0,
        "Maps a level s to shift * s / (1 + (shift - 1) * s); above 1 favours high noise, as long "
        "videos want.",
        POSITIVE,
    )


@dataclass(frozen=True)
class Train:
    """Optimization."""

    steps: int = setting(2000, "Optimizer updates of the whole run.", POSITIVE)
    batch: int = setting(1, "Clips of one forward in each process.", POSITIVE)
    gradient_accumulation: int = setting(
        1, "Forwards and backwards whose gradients one update averages.", POSITIVE
    )
    lr: float = setting(1e-4, "Peak learning rate.", POSITIVE)
    weight_decay: float = setting(0.0, "Decoupled weight decay of AdamW.", NOT_NEGATIVE)
    warmup: int = setting(
        100, "Updates over which the learning rate rises linearly to its peak.", NOT_NEGATIVE
    )
    schedule: Literal["cosine", "constant"] = setting(
        "constant", "Learning rate after the warm-up: constant, or half a cosine down to 0."
    )
    optimizer: Literal["adamw", "adamw8bit"] = setting(
        "adamw",
        "adamw, or adamw8bit (bitsandbytes, installed apart), which keeps moments in 8 bits.",
    )
    max_grad_norm: float = setting(
        1.0, "Gradients are scaled down to this norm; 0 leaves them as they are.", NOT_NEGATIVE
    )
    seed: int = setting(0, "Seed of data order, noise, noise levels and the adapter.", SEED)
    workers: int = setting(
        2,
        "Threads that read the cache, each a batch ahead; 0 reads a batch when its step begins.",
        NOT_NEGATIVE,
    )
    caption_dropout: float = setting(
        0.0,
        "Share of clips that train with the empty caption, which keeps classifier-free guidance "
        "alive.",
        SHARE,
    )
    guidance: float | None = setting(
        None,
        "Guidance that a guidance-distilled model (HunyuanVideo) is given in training; null takes "
        "the family's, which differs from the one for sampling.",
        POSITIVE,
    )
    max_skips: int = setting(
        4,
        "Consecutive updates that may be skipped because loss or gradient is NaN or Inf; one more "
        "ends the run.",
        NOT_NEGATIVE,
    )
    sigma: Sigma = section(Sigma)


@dataclass(frozen=True)
class Checkpoint:
    """Saved states that a run resumes from; the last step is always saved."""

    every: int = setting(250, "Steps between checkpoints.", POSITIVE)
    every_minutes: float = setting(
        30.0,
        "Minutes since the last checkpoint after which a step saves too; 0 counts steps alone.",
        NOT_NEGATIVE,
    )
    keep_last: int = setting(2, "Checkpoints that stay on disk.", POSITIVE)
    retry_minutes: float = setting(
        30.0,
        "Minutes for which a save that the run cannot do without (after its last step, or when it "
        "is told to stop) is tried again if it fails, as on a full disk. Other saves that fail are "
        "tried again a minute later while training goes on.",
        NOT_NEGATIVE,
    )


@dataclass(frozen=True)
class Memory:
    """Methods that trade time for GPU memory (docs/memory.md has figures)."""

    recompute: Literal["none", "all", "all_but_attention"] = setting(
        "all",
        "Activation checkpointing: what backward computes again of a block from its inputs. "
        "`all_but_attention` keeps the result of self-attention, which takes about as much memory "
        "again as the inputs; `none` keeps everything.",
    )
    offload: bool = setting(
        False,
        "Keep what blocks save for backward in pinned host memory, which must hold all of it.",
    )
    offload_keep: int = setting(
        1, "Last blocks whose tensors stay on the GPU under `memory.offload`.", NOT_NEGATIVE
    )
    mlp_chunk: int = setting(
        0,
        "Tokens that a block's MLP takes at a time, each chunk recomputed by itself; 0 takes all "
        "at once.",
        NOT_NEGATIVE,
    )
    base_dtype: Literal["bfloat16", "float32", "float8"] = setting(
        "bfloat16",
        "Precision of the frozen weights. float8 (e4m3, GPUs since Ada) applies to the linear "
        "layers of the blocks and their forward products, and rounds coarsely.",
    )
    trial_step: bool | None = setting(
        None,
        "Try one step before the run and discard it, so that a run that does not fit ends at once; "
        "null does so on a GPU.",
    )


@dataclass(frozen=True)
class Speed:
    """Fused kernels; forward results stay the same, gradients round once."""

    fused_norms: bool = setting(
        False, "Compute norms and RoPE of queries and keys in one Triton kernel."
    )
    fused_modulation: bool = setting(
        False,
        "Compute Wan's and Mochi's block norms with their scale and shift, and Wan's gated sums, "
        "in one Triton kernel each.",
    )


@dataclass(frozen=True)
class Parallel:
    """Several processes (docs/parallel.md)."""

    sequence: int = setting(
        1,
        "Neighbouring processes that share the tokens of each clip and count as one elsewhere. "
        "Divides the model's heads and the number of processes.",
        POSITIVE,
    )
    engine: EngineName | None = setting(
        None,
        "How processes hold the model: whole (`ddp`), or in shards (`fsdp2`; `zero2` and `zero3` "
        "are DeepSpeed's, installed apart); null takes what accelerate was launched for, else ddp.",
    )
    timeout: float = setting(
        30.0,
        "Minutes that a process may take for one part of a step, such as a backward, until the run "
        "counts as stuck and ends.",
        POSITIVE,
    )


@dataclass(frozen=True)
class Validate:
    """Held-out loss and sample videos: before step one, every so many steps and after the last."""

    every: int = setting(500, "Steps between validations.", POSITIVE)
    videos: int = setting(1, "Videos held out of training.", NOT_NEGATIVE)
    sigmas: list[float] = setting(
        [0.2, 0.4, 0.6, 0.8], "Noise levels of the held-out loss.", Range(above=0, most=1)
    )
    prompts: list[str] = setting([], "Prompts of the sample videos; empty samples none.")
    frames: int | None = setting(
        None, "Frames of the sample videos; null takes the training length.", POSITIVE
    )
    steps: int = setting(30, "Diffusion steps of a sample video.", POSITIVE)
    guidance: float | None = setting(
        None, "Guidance of the sample videos; null takes the family's."
    )
    seed: int = setting(0, "Seed of the noise of held-out losses and sample videos.", SEED)


@dataclass(frozen=True)
class Log:
    """Metrics."""

    wandb: bool = setting(True, "Log to wandb too; offline if there is no key.")
    project: str = setting("longreel", "Project in wandb.")
    every: int = setting(1, "Steps between lines of metrics.csv.", POSITIVE)


@dataclass(frozen=True)
class Run:
    """The run's files."""

    dir: str | None = setting(
        None, "Folder of checkpoints, adapter, metrics and samples; null is `runs/RECIPE`."
    )


@dataclass(frozen=True)
class Config:
    """One training run, complete. Lengths count frames of the video, sizes count its pixels."""

    recipe: str = setting("", "Name in `recipes/`, or path of a YAML file, that the rest changes.")
    family: str = setting("wan", "The model family: wan, hunyuan or mochi.")
    frames: int | None = setting(
        None, "Frames of a training clip; null takes `extend.factor` times the native.", POSITIVE
    )
    height: int = setting(480, "Height of a training clip in pixels.", POSITIVE)
    width: int = setting(832, "Width of a training clip in pixels.", POSITIVE)
    fps: int | None = setting(
        None, "Frames a second that clips are sampled at; null takes the family's.", POSITIVE
    )
    model: Model = section(Model)
    extend: Extend = section(Extend)
    sparse: Sparse = section(Sparse)
    rope: Rope = section(Rope)
    lora: Lora = section(Lora)
    data: Data = section(Data)
    cache: Cache = section(Cache)
    train: Train = section(Train)
    checkpoint: Checkpoint = section(Checkpoint)
    memory: Memory = section(Memory)
    speed: Speed = section(Speed)
    parallel: Parallel = section(Parallel)
    validate: Validate = section(Validate)
    log: Log = section(Log)
    run: Run = section(Run)

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir or f"runs/{self.recipe}")

    @property
    def lora_alpha(self) -> float:
        return float(self.lora.rank if self.lora.alpha is None else self.lora.alpha)
