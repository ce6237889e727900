"""The training step: a checked job, the loaded model, and one optimizer update after another."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..data.dataset import joined
from ..kernels.block_sparse import resolve_backend
from ..sparse.attention import SparseAttention
from ..sparse.grid import TokenGrid
from . import flow
from .adapter import lora
from .config.schema import Config
from .config.values import ConfigError
from .families.text import Text
from .job import Job
from .memory import float8
from .memory.checkpointing import block_checkpoint
from .memory.device import fastest_dense, grow_segments
from .memory.offload import Offload
from .optimizer import build_optimizer, check_installed, lr_factor
from .parallel.engine import Engine
from .parallel.open import Processes, open_processes
from .plan.advice import check_memory
from .plan.trial_step import TrialStep, run_trial_step
from .run.checkpoint import State
from .run.metrics import AttentionCost, Row, peak_memory_gib
from .run.progress import quiet_libraries
from .run.watchdog import Watch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """A job on the device of this process, checked before any weights are read.

    dtype: of activations, and of the frozen weights unless those are float8. backend: the kernel
    that computes sparse attention. attention: the one that the model will call. memory_warning: one
    sentence if a step is predicted not to fit the device, else None.
    """

    job: Job
    processes: Processes
    dtype: torch.dtype
    backend: str
    attention: SparseAttention
    memory_warning: str | None

    @classmethod
    def of_job(cls, job: Job) -> Setup:
        """Open the processes of a run; raise ConfigError for whatever cannot work on them.

        All processes must call it.
        """
        grow_segments()
        config, geometry = job.config, job.geometry
        waiting = timedelta(days=1)  # for rank 0 to fill the cache, or to decode a sample
        processes = open_processes(config, geometry.heads, waiting)
        quiet_libraries()
        base_dtype = config.memory.base_dtype
        dtype = torch.float32 if base_dtype == "float32" else torch.bfloat16
        if base_dtype == "float8":
            float8.check_device(processes.device)
        check_installed(config.train.optimizer)
        backend = _check_backend(config, geometry.head_dim, processes.device, dtype)
        lora.check_targets(
            job.family.loader.blank_transformer(job.model_path, config.model.revision),
            job.family.layers.target_pattern(config.lora.targets),
        )
        warning = check_memory(job, processes.device, processes.count)
        return cls(job, processes, dtype, backend, job.attention(), warning)

    @property
    def device(self) -> torch.device:
        return self.processes.device

    @property
    def clip_part(self) -> tuple[int, int]:
        """`(rank, size)`: which slice of each clip this process reads."""
        return self.processes.sequence.rank, self.processes.sequence.size

    @cached_property
    def grid(self) -> TokenGrid:
        """The tokens of a training clip at full length, with a caption of the greatest length."""
        return self.job.grid(self.job.frames)

    @cached_property
    def cost(self) -> AttentionCost:
        """The cost of a forward of `grid`."""
        return self.cost_of(self.grid)

    @cached_property
    def layer_densities(self) -> list[float]:
        """The computed share of all token pairs of `grid`, by layer."""
        geometry = self.job.geometry
        return self.attention.layer_densities(self.grid, geometry.layers, geometry.heads)

    def cost_of(self, grid: TokenGrid) -> AttentionCost:
        """Return the attention's cost of a forward of one sample."""
        geometry = self.job.geometry
        return AttentionCost.of(
            self.attention, grid, geometry.layers, geometry.heads, geometry.head_dim
        )


@dataclass(frozen=True)
class LoadedModel:
    """A model in training, with its adapter and optimizer, under the run's engine.

    offload: keeps the tensors of checkpointed blocks in host memory; None if they stay on the GPU.
    """

    engine: Engine
    offload: Offload | None

    @classmethod
    def load(cls, setup: Setup) -> LoadedModel:
        """Read the model's weights, attach the adapter and build the optimizer."""
        config, job = setup.job.config, setup.job
        transformer = job.family.loader.load_transformer(
            job.model_path, config.model.revision, setup.dtype
        )
        if config.memory.base_dtype == "float8":
            layers = job.family.layers.float8
            quantised, total = float8.quantise_layers(transformer, layers, setup.device)
            log.info(f"{quantised / total:.0%} of the base's {total:,} parameters are in float8.")
        parameters = lora.attach(
            transformer,
            job.family,
            rank=config.lora.rank,
            alpha=config.lora_alpha,
            targets=config.lora.targets,
            dropout=config.lora.dropout,
            compute_dtype=config.lora.compute_dtype,
            seed=config.train.seed,
        )
        job.family.rope.apply(transformer, job.rope)
        job.family.install(
            transformer,
            setup.attention,
            fused_norms=config.speed.fused_norms,
            fused_modulation=config.speed.fused_modulation,
        )
        if config.memory.mlp_chunk:
            job.family.blocks.chunk_mlp(transformer, config.memory.mlp_chunk)
        blocks = block_checkpoint(config.memory, setup.attention, setup.device)
        if blocks is not None:
            transformer.enable_gradient_checkpointing(blocks)
        setup.processes.sequence.attach(job.family, transformer, setup.attention)
        transformer.train()
        count = sum(p.numel() for _, p in parameters)
        log.info(f"LoRA of rank {config.lora.rank}: {count:,} parameters to train.")
        name, train = config.train.optimizer, config.train
        engine = setup.processes.engine(
            setup.processes.accelerator,
            transformer,
            lambda trained: build_optimizer(name, trained, train.lr, train.weight_decay),
        )
        return cls(engine, None if blocks is None else blocks.offload)


class Learner:
    """One optimizer update after another of a loaded model, among the processes of a run.

    Everything random in an update is a function of (seed, step, process), and the same in processes
    that share a clip.

    completed_step: the step that parameters and moments stand at; None while the optimizer writes
    them. empty_caption: replaces dropped captions; required if `train.caption_dropout` is set.
    watch: records which part of a step this process is in.
    """

    def __init__(
        self,
        setup: Setup,
        model: LoadedModel,
        *,
        watch: Watch | None = None,
        empty_caption: Text | None = None,
    ) -> None:
        self.setup, self.job, self.config = setup, setup.job, setup.job.config
        self.device, self.dtype, self.attention = setup.device, setup.dtype, setup.attention
        self.accelerator, self.sequence = setup.processes.accelerator, setup.processes.sequence
        self.engine, self.offload = model.engine, model.offload
        self.model, self.transformer = self.engine.model, self.engine.transformer
        self.optimizer, self.parameters = self.engine.optimizer, self.engine.parameters
        self.watch = watch or Watch(60 * self.config.parallel.timeout)
        self.empty_caption = empty_caption or {}
        self.completed_step: int | None = 0
        self._skips = 0  # consecutive updates without effect, up to now

    def restore(self, state: State, step: int) -> None:
        """Load the checkpoint of `step`; raise ValueError for the moments of another optimizer."""
        self.engine.restore(state)
        self.completed_step = step

    def trial_step(self, text: Text) -> TrialStep:
        """Run and undo a step of the longest shape; return what it took.

        text: any caption, for its widths. Raises OutOfMemoryError or MemoryError if the step does
        not fit.

        It calls the model that the run calls, but processes do not exchange gradients unless they
        hold shards: FSDP2 would keep what was not exchanged, out of reach, for the next step.
        """

        def backward(clean: Tensor, noise: Tensor, sigma: Tensor, texts: list[Text]) -> None:
            with self.engine.batch(last=self.engine.sharded):
                self.engine.backward(self.loss_at(clean, noise, sigma, texts))

        return run_trial_step(
            self.job,
            backward,
            attention=self.attention,
            parameters=self.parameters.values(),
            optimizer=self.optimizer,
            offload=self.offload,
            text=text,
            device=self.device,
            dtype=self.dtype,
        )

    def dense_kernels(self) -> AbstractContextManager[object]:
        """Return the context of forward and backward that chooses dense attention's kernel."""
        return fastest_dense()

    def update(self, step: int, batches: Iterator[dict[str, Any]]) -> Row:
        """Make one optimizer update; return its line of metrics."""
        train = self.config.train
        started = time.perf_counter()
        lr = train.lr * lr_factor(step, train.warmup, train.steps, train.schedule)
        self.engine.set_lr(lr)
        loss, parts = torch.zeros((), device=self.device), []
        grids: list[TokenGrid] = []  # one per forward, because captions differ in length
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        for micro in range(train.gradient_accumulation):
            self.watch.enter(f"step {step}: reading clips")
            batch = next(batches)
            last = micro == train.gradient_accumulation - 1
            with self.dense_kernels(), self.engine.batch(last=last):
                self.watch.enter(f"step {step}: forward of batch {micro}")
                part = self.loss(batch, step, micro) / train.gradient_accumulation
                assert self.attention.current is not None
                grids.append(self.attention.current.grid)
                self.watch.enter(f"step {step}: backward of batch {micro}")
                self.engine.backward(part)
            loss += part.detach()
            parts.append((batch["ids"], part.detach()))
        limit = train.max_grad_norm or math.inf
        self.watch.enter(f"step {step}: exchange of loss and gradient norm")
        total = self.engine.clip(limit)
        # Reduced together, so that either all processes skip the update or none does.
        figures: Any = self.accelerator.reduce(torch.stack([loss, total.to(loss)]), "mean")
        mean_loss, norm = figures.tolist()
        self.watch.enter(f"step {step}: update")
        if math.isfinite(mean_loss) and math.isfinite(norm):
            self._skips = 0
            self.completed_step = None
            self.engine.step()
        else:
            self.engine.skip()
            self._skip(step, f"loss {mean_loss}, gradient norm {norm}", parts)
        self.completed_step = step
        seconds = time.perf_counter() - started
        samples = train.batch * self.sequence.data_size
        tokens = samples * sum(len(grid) for grid in grids)
        cost = AttentionCost.sum([self.setup.cost_of(grid) for grid in grids])
        cost = cost.training(samples, recomputed=self.config.memory.recompute == "all")
        return {
            "step": step,
            "loss": mean_loss,
            "lr": lr,
            "grad_norm": norm,
            "seconds_per_step": seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_gib": peak_memory_gib(self.device),
            "attention_density": cost.density,
            "attention_sparsity": cost.sparsity,
            "attention_pflop": cost.pflop,
            "attention_dense_pflop": cost.dense_pflop,
        }

    def _skip(self, step: int, found: str, parts: list[tuple[list[str], Tensor]]) -> None:
        """Log an update that is not made, and the clips to blame; all processes must call it.

        found: the loss and the gradient norm. parts: for each of this process's batches the ids of
        its clips and its loss. Raises SystemExit after more than `train.max_skips` skips in a row.
        """
        bad = [clip for ids, loss in parts if not loss.isfinite() for clip in ids]
        everywhere = gather_object([(self.accelerator.process_index, bad)])
        blamed = "; ".join(
            f"{', '.join(clips)} on process {process}" for process, clips in everywhere if clips
        )
        if not blamed:  # only gradients are not finite, and they are already summed over all clips
            clips = gather_object([clip for ids, _ in parts for clip in ids])
            blamed = f"one of {', '.join(dict.fromkeys(clips))}"
        self._skips += 1
        problem, limit = f"step {step}: {found}, with {blamed}", self.config.train.max_skips
        if self._skips > limit:
            raise SystemExit(
                f"error: {problem}. {self._skips} consecutive bad steps exceed "
                f"train.max_skips={limit}. The newest checkpoint in "
                f"{self.config.run_dir / 'checkpoints'} is intact; lower train.lr, the usual "
                "remedy, or check those clips for damage."
            )
        log.warning(f"No update at {problem}.")

    def loss(self, batch: dict[str, Any], step: int, micro: int) -> Tensor:
        """Return the loss of batch `micro` of `step`, under that step's noise."""
        train = self.config.train
        key = f"{train.seed}/{step}/{micro}/{self.sequence.data_rank}"
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
        # LoRA dropout draws from the global generator, for the tokens of this process only.
        torch.manual_seed(seed + self.sequence.rank)
        generator = torch.Generator().manual_seed(seed)
        clean = batch["latents"].to(self.device, non_blocking=True)
        if self.sequence.size > 1:
            clean = joined(self.sequence.collect(clean), batch["shape"])
        noise, sigma = flow.sample(clean, train.sigma, generator)
        texts = batch["texts"]
        if train.caption_dropout:
            kept = torch.rand(len(texts), generator=generator) >= train.caption_dropout
            texts = [t if keep else self.empty_caption for t, keep in zip(texts, kept, strict=True)]
        return self.loss_at(clean, noise, sigma, texts)

    def loss_at(self, clean: Tensor, noise: Tensor, sigma: Tensor, texts: list[Text]) -> Tensor:
        """Return the loss of latents at given noise levels.

        clean, noise, sigma: on the device. texts: one caption per sample, on the CPU.
        """
        family, guidance = self.job.family, self.config.train.guidance
        text = {key: value.to(self.device) for key, value in family.text.collate(texts).items()}
        return flow.flow_matching_loss(family, self.model, clean, text, sigma, noise, guidance)


def _check_backend(config: Config, head_dim: int, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend that computes sparse attention; raise ConfigError if it cannot train."""
    try:
        backend = resolve_backend(
            config.sparse.backend, device, dtype, head_dim, config.sparse.block
        )
    except ValueError as error:
        raise ConfigError(f"sparse.backend={config.sparse.backend}: {error}") from error
    if backend == "flex" and device.type == "cpu":
        raise ConfigError("sparse.backend=flex has no gradients on a CPU: use auto or reference.")
    return backend
