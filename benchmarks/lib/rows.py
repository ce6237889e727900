"""The rows of the step benchmark: what each changes of a recipe, as a model that takes steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from longreel.sparse.grid import TokenGrid
from longreel.trainer import flow
from longreel.trainer.config.fields import settings_of
from longreel.trainer.config.recipe import load
from longreel.trainer.config.schema import Config
from longreel.trainer.config.values import split_arguments
from longreel.trainer.families import FAMILIES
from longreel.trainer.families.base import ModelFamily
from longreel.trainer.families.text import Text
from longreel.trainer.job import Job
from longreel.trainer.plan.advice import as_argument
from longreel.trainer.run.progress import open_console
from longreel.trainer.step import Learner, LoadedModel, Setup

from .blocks import Counts
from .parts import Profile, profiled
from .untrained import random_batch, untrained

DENSE = ("sparse.pattern.name=dense",)
# Reset to their defaults, these train as diffusers and PEFT do: whole blocks are checkpointed, the
# adapter computes in fp32, and nothing else is optimised.
NEUTRAL = (
    "memory.recompute",
    "memory.offload",
    "memory.mlp_chunk",
    "speed.fused_norms",
    "speed.fused_modulation",
    "train.optimizer",
    "lora.compute_dtype",
)
DEFAULTS = {setting.key: setting.default for setting in settings_of(Config)}
PLAIN = tuple(as_argument(key, DEFAULTS[key]) for key in NEUTRAL)
CHUNK = 16384  # tokens, as in docs/memory.md
SCALE = 0.02  # of the adapter's weights where gradients are compared
SHORT_FRAMES = 4  # latent frames of a warm-up that does little more than compile


@dataclass(frozen=True)
class Row:
    """Holds a row of the benchmark.

    settings: added to the recipe's. stock: use diffusers' own processors and checkpointing.
    """

    name: str
    about: str
    settings: tuple[str, ...] = ()
    stock: bool = False

    def config(self, overrides: Sequence[str]) -> Config:
        """Load the recipe and settings in `overrides`, with the row's own settings on top."""
        given, own = split_arguments(overrides), split_arguments(self.settings)
        if "sparse.pattern.name" in own:  # another pattern's settings do not fit it
            of_pattern = ("sparse.pattern.", "sparse.density")
            given = {k: v for k, v in given.items() if not k.startswith(of_pattern)}
        config = load([f"{key}={value}" for key, value in (given | own).items()])
        # Accumulation repeats what is measured.
        return replace(config, train=replace(config.train, gradient_accumulation=1))


def rows_for(config: Config) -> dict[str, Row]:
    """Return the rows by name, one of them for each memory option of `config` switched alone."""
    memory, speed, optimizer = config.memory, config.speed, config.train.optimizer
    keeps_attention = memory.recompute == "all_but_attention"
    fp32 = config.lora.compute_dtype == "float32"
    turned: dict[str, Any] = {
        "memory.recompute": "all" if keeps_attention else "all_but_attention",
        "memory.offload": not memory.offload,
        "memory.mlp_chunk": 0 if memory.mlp_chunk else CHUNK,
        "speed.fused_norms": not speed.fused_norms,
        "memory.base_dtype": "bfloat16" if memory.base_dtype == "float8" else "float8",
        "train.optimizer": "adamw" if optimizer == "adamw8bit" else "adamw8bit",
    }
    if FAMILIES[config.family].blocks.fuses_modulation:
        turned["speed.fused_modulation"] = not speed.fused_modulation
    if memory.base_dtype != "float32":  # fp32 weights do not allow bf16 products
        turned["lora.compute_dtype"] = "bfloat16" if fp32 else "float32"
    rows = [
        Row("stock", "diffusers + PEFT, padded text under a mask", (*DENSE, *PLAIN), stock=True),
        Row("dense", "dense, blocks checkpointed whole, text trimmed", (*DENSE, *PLAIN)),
        Row("fair", "dense, with the recipe's memory settings", DENSE),
        Row("radial", "the recipe"),
        Row("sparse", "the recipe without dense layers", ("sparse.dense_layers=0",)),
    ]
    for key, value in turned.items():
        setting = as_argument(key, value)
        rows.append(Row(key.partition(".")[2], f"the recipe with {setting}", (setting,)))
    return {row.name: row for row in rows}


@dataclass
class Point:
    """Holds one measured model of a row.

    seconds: time of each counted step. held: bytes of weights and optimizer moments. peak: held
    plus all that a step takes, bytes. profile: of the first counted step, None on a CPU.
    """

    counts: Counts
    seconds: list[float] = field(default_factory=list)
    held: int = 0
    peak: int = 0
    profile: Profile | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Caption:
    """Holds the caption's length.

    tokens: None for as many as the model takes. padded: pad captions to the model's maximum.
    """

    tokens: int | None = None
    padded: bool = False


class StockLearner(Learner):
    """Leaves the choice of the dense attention kernel to torch."""

    def dense_kernels(self) -> AbstractContextManager[object]:
        return nullcontext()


class Stepper:
    """Holds a model with the trainer's own adapter and optimizer, and runs single steps."""

    def __init__(
        self, job: Job, shared: dict[str, nn.Parameter], device: torch.device, caption: Caption
    ) -> None:
        family = _stock(job.family) if caption.padded else job.family
        self.job = replace(job, family=untrained(family, device, shared))
        self.stock, self.device, self.steps = caption.padded, device, 0
        open_console(True)
        setup = Setup.of_job(self.job)
        learner = StockLearner if self.stock else Learner
        self.learner = learner(setup, LoadedModel.load(setup))
        if self.stock:
            self.learner.transformer.enable_gradient_checkpointing()  # with diffusers' own
        batches = [
            random_batch(self.job, setup.dtype, setup.clip_part, frames)
            for frames in (None, SHORT_FRAMES)
        ]
        for text in (text for batch in batches for text in batch["texts"]):
            text["prompt_embeds"] = text["prompt_embeds"][: caption.tokens]
        self.batches, self.short = (repeat(batch) for batch in batches)

    @property
    def grid(self) -> TokenGrid:
        """Return the grid of the last step."""
        current = self.learner.attention.current
        assert current is not None
        return current.grid

    def pin(self, size: float) -> None:
        """Make memory.offload allocate `size` bytes of host memory ahead of the first step."""
        if self.learner.offload is not None:
            pool = self.learner.offload.pool
            pool.give_back(pool.take(int(size)))

    def warm(self, short: bool) -> None:
        self._timed(self.short if short else self.batches)

    def step(self, point: Point) -> None:
        """Run a counted step; the first one is profiled as well."""
        before = self._start_counting()
        if point.profile is None and self.device.type == "cuda":
            seconds, point.profile = profiled(lambda: self._timed(self.batches))
        else:
            seconds = self._timed(self.batches)
        point.seconds.append(seconds)
        point.held = self.held()
        if self.device.type == "cuda":
            # Other models waiting for their turn hold memory too.
            taken = torch.cuda.max_memory_allocated() - before
            point.peak = max(point.peak, point.held + taken)

    def gradients(self, kernels: AbstractContextManager[object]) -> dict[str, Tensor]:
        """Return the adapter's gradients for one clip at one noise level, equal in all processes.

        Neither factor of the LoRA is zero. kernels: context that selects dense attention's kernels.
        """
        learner, generator = self.learner, torch.Generator().manual_seed(1)
        for parameter in learner.parameters.values():
            parameter.data.copy_(SCALE * torch.randn(parameter.shape, generator=generator))
        batch = random_batch(self.job, learner.dtype)  # the whole clip, not this process's part
        clean = batch["latents"].to(self.device)
        noise, sigma = flow.sample(clean, self.job.config.train.sigma, generator)
        with kernels, learner.engine.batch(last=True):
            learner.engine.backward(learner.loss_at(clean, noise, sigma, batch["texts"]))
        gradients = {n: p.grad for n, p in learner.parameters.items() if p.grad is not None}
        assert len(gradients) == len(learner.parameters)
        learner.engine.skip()
        return gradients

    def held(self) -> int:
        state = self.learner.optimizer.state.values()
        moments = [x for of_one in state for x in of_one.values() if isinstance(x, Tensor)]
        return sum(x.nbytes for x in (*self.learner.transformer.parameters(), *moments))

    def _start_counting(self) -> int:
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def _timed(self, batches: Iterator[dict[str, Any]]) -> float:
        started, self.steps = time.perf_counter(), self.steps + 1
        self.learner.update(self.steps, batches)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def _stock(family: ModelFamily) -> ModelFamily:
    """Return the family as diffusers has it: stock processors, captions padded under a mask."""

    class StockAttention(type(family.attention)):
        def set_processors(self, transformer: Any, attention: Any, fused_norms: bool) -> None:
            pass

    class PaddedText(type(family.text)):
        def collate(self, texts: Sequence[Text]) -> Text:
            embeds = texts[0]["prompt_embeds"]
            longest = texts[0] | {
                "prompt_embeds": embeds.new_zeros(self.max_tokens, embeds.shape[1])
            }
            padded = super().collate([*texts, longest])
            return {name: x[:-1] for name, x in padded.items()}

    return replace(family, attention=StockAttention(), text=PaddedText(family.names))
