"""The training run: from a config to an adapter."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import shutil
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn

from ..data.dataset import LatentDataset, joined, read_text, split
from ..data.encode import Prepared
from ..data.files import replacing
from ..data.loader import Loader
from ..data.sampler import SeededBatches
from ..kernels.block_sparse import resolve_backend
from ..sparse.draw import draw_pattern
from ..sparse.grid import TokenGrid
from . import checkpoint, float8, flow, lora, report
from .caching import extra_captions, prepare_data
from .config import Config, ConfigError
from .families.base import Text
from .job import Job
from .memory import block_checkpoint
from .metrics import AttentionCost, Metrics, Row, peak_memory_gib
from .optimizer import build_optimizer, check_installed
from .parallel import SequenceGroup
from .plan import check_memory, how_to_go_on
from .probe import Speedup, measure_speedup
from .progress import StepProgress, open_console
from .recipe import pattern_to_dict, save, to_dict, to_yaml
from .step_probe import is_probed, try_step
from .validate import Validator

log = logging.getLogger(__name__)

# What this version can train under; the precision is the recipe's, not accelerate's.
ENGINES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class Trainer:
    """One run: caches the data, trains the LoRA, validates, samples, saves, resumes.

    Everything random is a function of (seed, step, process), so a run that stops and goes on equals
    one that never stopped. Processes that share a clip draw the same for it.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.config = job.config
        self.run_dir = job.config.run_dir
        job.check_trainable()
        waiting = timedelta(days=1)  # for rank 0 to fill the cache, or to decode a sample
        handlers: Any = [InitProcessGroupKwargs(timeout=waiting)]
        self.accelerator = Accelerator(mixed_precision="no", kwargs_handlers=handlers)
        if self.accelerator.distributed_type not in ENGINES:
            raise ConfigError(
                f"accelerate is configured for {self.accelerator.distributed_type.value}, which is "
                "not supported yet; launch/ddp.yaml is a configuration that is."
            )
        size, heads = self.config.parallel.sequence, job.geometry.heads
        self.sequence = SequenceGroup.create(size, heads, waiting)
        self.device = self.accelerator.device
        self.console = open_console(self.accelerator.is_main_process)
        base_dtype = self.config.memory.base_dtype
        self.dtype = torch.float32 if base_dtype == "float32" else torch.bfloat16
        if base_dtype == "float8":
            float8.check_device(self.device)
        check_installed(self.config.memory.optimizer)
        self.backend = _check_backend(self.config, job.geometry.head_dim, self.device, self.dtype)
        lora.check_targets(
            job.family.blank_transformer(job.model_path, self.config.model.revision),
            job.family.target_pattern(self.config.lora.targets),
        )
        self.memory_warning = check_memory(job, self.device)
        self.attention = job.attention()
        self.grid = job.grid(job.frames)
        self.cost = self._cost(self.grid)
        geometry = job.geometry
        self.layer_densities = self.attention.layer_densities(
            self.grid, geometry.layers, geometry.heads
        )

    def fit(self) -> None:
        """Run to the last step. The same command again goes on from the newest checkpoint."""
        self._announce()
        prepared = self._prepare_data()
        train, heldout = self._split(prepared)
        if self.config.train.caption_dropout:
            self.empty_caption = read_text(prepared.texts[""])
        self._load_model()
        start = self._restore(train)
        steps = self.config.train.steps
        if start < steps and is_probed(self.config.memory, self.device):
            self._probe_step(train)
        speedup = self._measure_attention()
        ratio = speedup.ratio if isinstance(speedup, Speedup) else speedup
        if self.accelerator.is_main_process:
            self._open_log(start)
        if self.sequence.data_rank == 0:
            self.validator = self._make_validator(prepared, heldout)
        if start >= steps:
            log.info(f"{self.run_dir} is complete at step {start}; train.steps={steps}.")
        with self._keeping_what_is_learnt(start):
            self._validate(start)
            self._train(train, start, ratio)
        self._finish(str(speedup))

    # Before the first step

    def _announce(self) -> None:
        self.console.print(to_yaml(self.config).rstrip(), markup=False, highlight=False)
        note = ": the eager oracle, right but slow; meant for small models"
        log.info(
            f"Attention backend on {self.device}: {self.backend}"
            f"{note if self.backend == 'reference' else ''}."
        )
        job, grid = self.job, self.grid
        log.info(
            f"{job.native_frames} -> {job.frames} frames: {len(grid):,} tokens "
            f"({grid.frames} x {grid.height} x {grid.width}). Attention computes "
            f"{report.density_by_layer(self.layer_densities)}."
        )
        if job.rope.policy != "native":
            log.info(f"RoPE: {job.rope.describe(job.geometry.rope)}.")
        sparse, heads = self.config.sparse, job.geometry.heads
        if sparse.density is not None:
            log.info(f"sparse.density sets {report.solved_density(job, self.cost.layer_density)}.")
        rounded = job.pattern.note(grid.without_text(), sparse.block)
        if rounded is not None:
            log.info(rounded)
        if self.memory_warning is not None:
            log.warning(self.memory_warning)
        if self.accelerator.is_main_process:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            save(self.config, self.run_dir / "config.yaml")
            title = (
                f"{job.pattern}, {grid.frames} x {grid.height} x {grid.width} tokens, density "
                f"{self.cost.layer_density:.1%}"
            )
            figure = draw_pattern(job.pattern, grid, sparse.block, title, heads)
            report.save_figure(figure, self.run_dir / "mask.png")

    def _prepare_data(self) -> Prepared:
        """All processes fill the cache, each its share."""
        prepared = prepare_data(self.job, self.accelerator, self.dtype)
        self.console.print(str(prepared.report), markup=False, highlight=False)
        return prepared

    def _split(self, prepared: Prepared) -> tuple[LatentDataset, LatentDataset]:
        try:
            train, heldout = split(prepared.entries, self.config.validate.clips)
        except ValueError as error:
            raise ConfigError(f"validate.clips={self.config.validate.clips}: {error}") from error
        log.info(f"{len(train)} clips to train on, {len(heldout)} held out.")
        # Processes that share a clip read a part each; held-out clips are few, and read whole.
        part, pinned = (self.sequence.rank, self.sequence.size), self.device.type == "cuda"
        return LatentDataset(train, part=part, pinned=pinned), LatentDataset(heldout)

    def _load_model(self) -> None:
        config, job = self.config, self.job
        transformer = job.family.load_transformer(job.model_path, config.model.revision, self.dtype)
        if config.memory.base_dtype == "float8":
            layers = job.family.float8_layers
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
        job.family.set_rope(transformer, job.rope)
        job.family.install(transformer, self.attention, fused_norms=config.memory.fused_norms)
        if config.memory.mlp_chunk:
            job.family.chunk_mlp(transformer, config.memory.mlp_chunk)
        blocks = block_checkpoint(config.memory, self.attention, self.device)
        if blocks is not None:
            transformer.enable_gradient_checkpointing(blocks)
        self.sequence.attach(job.family, transformer, self.attention)
        self.offload = None if blocks is None else blocks.offload
        transformer.train()
        self.parameters = dict(parameters)
        count = sum(p.numel() for p in self.parameters.values())
        log.info(f"LoRA of rank {config.lora.rank}: {count:,} parameters to train.")
        optimizer = build_optimizer(
            config.memory.optimizer,
            self.parameters.values(),
            config.train.lr,
            config.train.weight_decay,
        )
        prepared: Any = self.accelerator.prepare(transformer, optimizer)
        self.model, self.optimizer = prepared
        self.transformer: nn.Module = self.accelerator.unwrap_model(self.model)

    def _restore(self, dataset: LatentDataset) -> int:
        self._clips = checkpoint.fingerprint(entry.id for entry in dataset.entries)
        newest = checkpoint.latest(self.run_dir / "checkpoints")
        if newest is None:
            return 0
        progress = checkpoint.load_progress(newest)
        checkpoint.check_continues(newest, progress, self._progress(progress.step))
        recorded, pattern = lora.read_entry(newest)["pattern"], pattern_to_dict(self.job.pattern)
        if recorded != pattern:
            raise ConfigError(
                f"{newest} was trained under {recorded}, and sparse.density now gives {pattern}. "
                "Set the recorded width as sparse.pattern.* in place of sparse.density, in another "
                "run.dir, or go back to the version of longreel that began the run."
            )
        checkpoint.restore(newest, self.parameters, self.optimizer.optimizer)
        if self.accelerator.is_main_process:
            self._publish(newest)  # the run may have ended between the checkpoint and this copy
        log.info(f"Resuming from {newest} at step {progress.step}.")
        return progress.step

    def _progress(self, step: int) -> checkpoint.Progress:
        return checkpoint.Progress(step, self.sequence.data_size, self._clips)

    def _probe_step(self, dataset: LatentDataset) -> None:
        """Try a step of the longest shape; the run is as it was, or ends here if it does not fit.

        The model is the one that the run calls, but processes do not exchange gradients.
        """

        def backward(clean: Tensor, noise: Tensor, sigma: Tensor, texts: list[Text]) -> None:
            with self.accelerator.no_sync(self.model):
                self.accelerator.backward(self._loss_at(clean, noise, sigma, texts))

        try:
            taken = try_step(
                self.job,
                backward,
                attention=self.attention,
                parameters=self.parameters.values(),
                optimizer=self.optimizer.optimizer,
                offload=self.offload,
                text=read_text(dataset.entries[0].text),
                device=self.device,
                dtype=self.dtype,
            )
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise self._out_of_memory(error, " in the step tried before the run") from error
        log.info(f"A step was tried, and fits: {taken}.")

    def _measure_attention(self) -> Speedup | str:
        """How much faster than dense a sparse layer's attention is; why not, if not measured."""
        geometry = self.job.geometry
        speedup = measure_speedup(
            self.job.attention(),  # of one process, whoever shares a clip
            self.grid,
            layers=geometry.layers,
            heads=geometry.heads,
            head_dim=geometry.head_dim,
            device=self.device,
            dtype=self.dtype,
        )
        log.info(f"Attention of a sparse layer against dense, forward and backward: {speedup}.")
        return speedup

    def _open_log(self, start: int) -> None:
        """The metrics, which the main process alone keeps."""
        self.metrics = Metrics(self.run_dir, resumed_step=start)
        if self.config.log.wandb:
            solved = {
                "pattern": pattern_to_dict(self.job.pattern),
                "density_by_layer": self.layer_densities,
            }
            config = to_dict(self.config) | {"attention": solved}
            self.metrics.start_wandb(self.config.log.project, config)
        self.metrics.image("mask", self.run_dir / "mask.png", start)

    def _make_validator(self, prepared: Prepared, heldout: LatentDataset) -> Validator:
        """Of the main process and those that share its clips."""
        return Validator(
            self.job,
            self.transformer,
            heldout,
            {text: read_text(prepared.texts[text]) for text in extra_captions(self.config)},
            self.metrics if self.accelerator.is_main_process else None,
            self.sequence,
            device=self.device,
            dtype=self.dtype,
        )

    def _cost(self, grid: TokenGrid) -> AttentionCost:
        geometry = self.job.geometry
        return AttentionCost.of(
            self.attention, grid, geometry.layers, geometry.heads, geometry.head_dim
        )

    # Training

    def _train(self, dataset: LatentDataset, start: int, ratio: float | str) -> None:
        steps, batches = self.config.train.steps, self._batches(dataset, start)
        with StepProgress(self.console, start, steps, self.cost.density) as progress:
            for step in range(start + 1, steps + 1):
                row = self._step(step, batches) | {"attention_layer_speedup": ratio}
                progress.advance(step, row)
                if self.offload is not None and step == start + 1:
                    size = self.offload.arena.size / 2**30
                    log.info(f"memory.offload holds {size:.1f} GiB of host memory, and keeps it.")
                if self.accelerator.is_main_process and step % self.config.log.every == 0:
                    self.metrics.write(row)
                if step % self.config.checkpoint.every == 0 or step == steps:
                    self._save(step)
                self._validate(step)

    def _batches(self, dataset: LatentDataset, start: int) -> Iterator[dict[str, Any]]:
        train = self.config.train
        sampler = SeededBatches(
            len(dataset),
            train.batch,
            train.seed,
            start=start * train.accumulate,
            rank=self.sequence.data_rank,
            num_ranks=self.sequence.data_size,
            buckets=[entry.bucket for entry in dataset.entries],
        )
        return iter(Loader(dataset, sampler, train.workers))

    def _step(self, step: int, batches: Iterator[dict[str, Any]]) -> Row:
        """One optimizer update; returns its line of metrics."""
        train = self.config.train
        started = time.perf_counter()
        lr = train.lr * lr_factor(step, train.warmup, train.steps, train.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, ids = torch.zeros((), device=self.device), []
        grids: list[TokenGrid] = []  # of each forward: captions differ in length
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        for micro in range(train.accumulate):
            last = micro == train.accumulate - 1
            waiting = contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)
            with waiting:
                batch = next(batches)
                ids += batch["ids"]
                part = self._loss(batch, step, micro) / train.accumulate
                assert self.attention.current is not None
                grids.append(self.attention.current.grid)
                self.accelerator.backward(part)
            loss += part.detach()
        limit = train.clip or math.inf
        total: Any = self.accelerator.clip_grad_norm_(self.parameters.values(), limit)
        mean: Any = self.accelerator.reduce(loss, "mean")
        norm, mean_loss = total.item(), mean.item()
        if not (math.isfinite(mean_loss) and math.isfinite(norm)):
            raise SystemExit(
                f"error: step {step}: loss {mean_loss}, gradient norm {norm}, with "
                f"{', '.join(ids)} on process {self.accelerator.process_index}. The last "
                f"checkpoint in {self.run_dir / 'checkpoints'} is whole; a lower train.lr is the "
                "usual remedy."
            )
        self._whole = None
        self.optimizer.step()
        self._whole = step
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        samples = train.batch * self.sequence.data_size
        tokens = samples * sum(len(grid) for grid in grids)
        cost = AttentionCost.sum([self._cost(grid) for grid in grids])
        cost = cost.training(samples, recomputed=self.config.memory.checkpoint == "full")
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

    def _loss(self, batch: dict[str, Any], step: int, micro: int) -> Tensor:
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
        return self._loss_at(clean, noise, sigma, texts)

    def _loss_at(self, clean: Tensor, noise: Tensor, sigma: Tensor, texts: list[Text]) -> Tensor:
        """Of latents at given noise levels, on the device; texts: a caption each, on the CPU."""
        family, guidance = self.job.family, self.config.train.guidance
        text = {key: value.to(self.device) for key, value in family.collate_text(texts).items()}
        return flow.flow_matching_loss(family, self.model, clean, text, sigma, noise, guidance)

    # Beside training

    @contextlib.contextmanager
    def _keeping_what_is_learnt(self, start: int) -> Iterator[None]:
        """End a run that is out of memory with its last whole step saved, and say what helps.

        `_whole` is the step that parameters and moments stand at, None while the optimizer writes
        them. On several processes the main one alone can save, if it is the one that fails.
        """
        self._whole: int | None = start
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError) as error:
            newest = checkpoint.latest(self.run_dir / "checkpoints")
            saved = 0 if newest is None else checkpoint.load_progress(newest).step
            if self._whole is not None and self._whole > saved:
                self._save(self._whole)
            raise self._out_of_memory(error) from error

    def _out_of_memory(self, error: BaseException, where: str = "") -> SystemExit:
        reason = str(error).strip().partition("\n")[0]
        newest = checkpoint.latest(self.run_dir / "checkpoints")
        change = how_to_go_on(self.job, self.device, newest)
        return SystemExit(f"error: out of memory{where}: {reason}\n{change}")

    def _validate(self, step: int) -> None:
        if self.sequence.data_rank == 0 and self.validator.due(step):
            self.validator.run(step)

    def _save(self, step: int) -> None:
        if not self.accelerator.is_main_process:
            return
        folder = checkpoint.save(
            self.run_dir / "checkpoints",
            self.parameters,
            self.optimizer.optimizer,
            self._progress(step),
            keep_last=self.config.checkpoint.keep_last,
            extra=lambda folder: lora.save(
                folder, self.transformer, self.job.family, self.job.adapter_entry()
            ),
        )
        self._publish(folder)

    def _publish(self, newest: Path) -> None:
        """The run folder holds the adapter of its newest checkpoint."""
        with replacing(self.run_dir / lora.WEIGHTS) as temporary:
            shutil.copyfile(newest / lora.WEIGHTS, temporary)

    def _finish(self, speedup: str) -> None:
        if self.accelerator.is_main_process:
            rows = self.metrics.rows()
            report.save_figure(report.draw_losses(rows), self.run_dir / "loss.png")
            self.metrics.image("losses", self.run_dir / "loss.png", self.config.train.steps)
            self.metrics.close()
            names = (lora.WEIGHTS, "metrics.csv", "mask.png", "loss.png")
            samples = self.validator.samples(self.config.train.steps)
            files = [*(self.run_dir / name for name in names), *samples]
            self.console.print(report.summary(self.job, self.cost, speedup, rows, files))
            note = self.job.rope.stock_note("Stock pipelines apply")
            if note is not None:
                log.info(note)
        # Leave together. The process group is not destroyed here: DDP's reducer still refers to it,
        # and would join gloo's threads under the GIL that they wait for when it goes.
        self.accelerator.wait_for_everyone()


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
