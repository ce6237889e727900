"""What learns: a model with its adapter and optimizer, and one update of them."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch import Tensor

from ..data.dataset import LatentDataset, joined, read_text
from ..kernels.block_sparse import resolve_backend
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
from .memory.optimizer import build_optimizer, check_installed
from .parallel.open import open_engine
from .parallel.sequence import SequenceGroup
from .plan.predict import check_memory
from .plan.trial_step import Taken, try_step
from .run.metrics import AttentionCost, Row, peak_memory_gib
from .run.progress import quiet_libraries
from .run.watchdog import Watch

log = logging.getLogger(__name__)


class Learner:
    """Model, adapter and optimizer on this process's device, among the processes of a run.

    Making one checks all that can be checked before weights are read; `load` reads them; `update`
    is one optimizer update. What is random in it is a function of (seed, step, process), and alike
    in processes that share a clip.

    whole: the step that parameters and moments stand at, None while the optimizer writes them.
    empty_caption: what stands in for dropped captions. watch: is told where in a step this process
    is.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.config = job.config
        self.watch = Watch(60 * job.config.parallel.timeout)
        self.whole: int | None = 0
        self._skips = 0  # in a row, up to now
        self.empty_caption: Text = {}
        grow_segments()
        waiting = timedelta(days=1)  # for rank 0 to fill the cache, or to decode a sample
        self.engine = open_engine(self.config, waiting)
        self.accelerator = self.engine.accelerator
        if dist.is_initialized() and self.accelerator.num_processes != dist.get_world_size():
            # DeepSpeed without GPUs: accelerate then calls every process the main one.
            raise ConfigError("The engines zero2 and zero3 need GPUs: on CPUs use fsdp2.")
        size, heads = self.config.parallel.sequence, job.geometry.heads
        self.sequence = SequenceGroup.create(size, heads, waiting)
        self.device = self.accelerator.device
        quiet_libraries()
        base_dtype = self.config.memory.base_dtype
        self.dtype = torch.float32 if base_dtype == "float32" else torch.bfloat16
        if base_dtype == "float8":
            float8.check_device(self.device)
        check_installed(self.config.train.optimizer)
        self.backend = _check_backend(self.config, job.geometry.head_dim, self.device, self.dtype)
        lora.check_targets(
            job.family.loader.blank_transformer(job.model_path, self.config.model.revision),
            job.family.layers.target_pattern(self.config.lora.targets),
        )
        self.memory_warning = check_memory(job, self.device, self.accelerator.num_processes)
        self.attention = job.attention()
        self.grid = job.grid(job.frames)
        self.cost = self.cost_of(self.grid)
        geometry = job.geometry
        self.layer_densities = self.attention.layer_densities(
            self.grid, geometry.layers, geometry.heads
        )

    def load(self) -> None:
        """Read the model's weights, attach the adapter and make the optimizer."""
        config, job = self.config, self.job
        transformer = job.family.loader.load_transformer(
            job.model_path, config.model.revision, self.dtype
        )
        if config.memory.base_dtype == "float8":
            layers = job.family.layers.float8
            quantised, total = float8.quantise_layers(transformer, layers, self.device)
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
            self.attention,
            fused_norms=config.speed.fused_norms,
            fused_modulation=config.speed.fused_modulation,
        )
        if config.memory.mlp_chunk:
            job.family.blocks.chunk_mlp(transformer, config.memory.mlp_chunk)
        blocks = block_checkpoint(config.memory, self.attention, self.device)
        if blocks is not None:
            transformer.enable_gradient_checkpointing(blocks)
        self.sequence.attach(job.family, transformer, self.attention)
        self.offload = None if blocks is None else blocks.offload
        transformer.train()
        count = sum(p.numel() for _, p in parameters)
        log.info(f"LoRA of rank {config.lora.rank}: {count:,} parameters to train.")
        name, train = config.train.optimizer, config.train
        self.engine.prepare(
            transformer,
            lambda trained: build_optimizer(name, trained, train.lr, train.weight_decay),
        )
        self.model, self.transformer = self.engine.model, self.engine.transformer
        self.optimizer, self.parameters = self.engine.optimizer, self.engine.parameters

    def try_step(self, dataset: LatentDataset) -> Taken:
        """What a step of the longest shape takes; the learner is as it was. Raises what running out
        of memory raises.

        The model is the one that the run calls, but processes do not exchange gradients, unless
        they hold shards: FSDP2 would keep what was not exchanged, out of reach, for the next step.
        """

        def backward(clean: Tensor, noise: Tensor, sigma: Tensor, texts: list[Text]) -> None:
            with self.engine.batch(last=self.engine.sharded):
                self.engine.backward(self.loss_at(clean, noise, sigma, texts))

        return try_step(
            self.job,
            backward,
            attention=self.attention,
            parameters=self.parameters.values(),
            optimizer=self.optimizer,
            offload=self.offload,
            text=read_text(dataset.entries[0].text),
            device=self.device,
            dtype=self.dtype,
        )

    @property
    def clip_part(self) -> tuple[int, int]:
        """Of a clip, which part of how many this process is given in a batch."""
        return self.sequence.rank, self.sequence.size

    def dense_kernels(self) -> AbstractContextManager[object]:
        """Around forward and backward: what dense attention runs on."""
        return fastest_dense()

    def update(self, step: int, batches: Iterator[dict[str, Any]]) -> Row:
        """One optimizer update; returns its line of metrics."""
        train = self.config.train
        started = time.perf_counter()
        lr = train.lr * lr_factor(step, train.warmup, train.steps, train.schedule)
        self.engine.set_lr(lr)
        loss, parts = torch.zeros((), device=self.device), []
        grids: list[TokenGrid] = []  # of each forward: captions differ in length
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
        # Together, so that every process sees the same, and all skip the update or none.
        figures: Any = self.accelerator.reduce(torch.stack([loss, total.to(loss)]), "mean")
        mean_loss, norm = figures.tolist()
        self.watch.enter(f"step {step}: update")
        if math.isfinite(mean_loss) and math.isfinite(norm):
            self._skips = 0
            self.whole = None
            self.engine.step()
        else:
            self.engine.skip()
            self._skip(step, f"loss {mean_loss}, gradient norm {norm}", parts)
        self.whole = step
        seconds = time.perf_counter() - started
        samples = train.batch * self.sequence.data_size
        tokens = samples * sum(len(grid) for grid in grids)
        cost = AttentionCost.sum([self.cost_of(grid) for grid in grids])
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
        """Tell of an update that is not made, and of the clips that are to blame; in all processes.

        parts: of this process's batches, the ids of their clips and their losses. Raises SystemExit
        after `train.max_skips` in a row.
        """
        bad = [clip for ids, loss in parts if not loss.isfinite() for clip in ids]
        everywhere = gather_object([(self.accelerator.process_index, bad)])
        blamed = "; ".join(
            f"{', '.join(clips)} on process {process}" for process, clips in everywhere if clips
        )
        if not blamed:  # the gradients alone, which are sums over all of them by now
            clips = gather_object([clip for ids, _ in parts for clip in ids])
            blamed = f"one of {', '.join(dict.fromkeys(clips))}"
        self._skips += 1
        told = f"step {step}: {found}, with {blamed}"
        if self._skips > self.config.train.max_skips:
            raise SystemExit(
                f"error: {told}. It is the {self._skips}th such step in a row, more than "
                f"train.max_skips={self.config.train.max_skips}. The newest checkpoint in "
                f"{self.config.run_dir / 'checkpoints'} is whole; a lower train.lr is the usual "
                "remedy, or those clips are damaged."
            )
        log.warning(f"No update at {told}.")

    def loss(self, batch: dict[str, Any], step: int, micro: int) -> Tensor:
        """Of one batch of step `step`, under that step's noise."""
        train = self.config.train
        key = f"{train.seed}/{step}/{micro}/{self.sequence.data_rank}"
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
        # LoRA dropout draws from the global generator, for tokens of this process alone.
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
        """Of latents at given noise levels, on the device; texts: a caption each, on the CPU."""
        family, guidance = self.job.family, self.config.train.guidance
        text = {key: value.to(self.device) for key, value in family.text.collate(texts).items()}
        return flow.flow_matching_loss(family, self.model, clean, text, sigma, noise, guidance)

    def cost_of(self, grid: TokenGrid) -> AttentionCost:
        geometry = self.job.geometry
        return AttentionCost.of(
            self.attention, grid, geometry.layers, geometry.heads, geometry.head_dim
        )


def lr_factor(step: int, warmup: int, steps: int, schedule: str) -> float:
    """Share of the peak learning rate at update `step`, counted from 1: linear warm-up, then
    constant, or a half cosine that would reach 0 one step after the last."""
    if step <= warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps + 1 - warmup)))


def _check_backend(config: Config, head_dim: int, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that will compute sparse attention; ConfigError if it cannot train here."""
    try:
        backend = resolve_backend(
            config.sparse.backend, device, dtype, head_dim, config.sparse.block
        )
    except ValueError as error:
        raise ConfigError(f"sparse.backend={config.sparse.backend}: {error}") from error
    if backend == "flex" and device.type == "cpu":
        raise ConfigError("sparse.backend=flex has no gradients on a CPU: use auto or reference.")
    return backend
