"""The training run: from a config to an adapter."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn

from ..data.dataset import LatentDataset, read_text, split
from ..data.encode import Prepared
from ..data.files import replacing
from ..data.sampler import SeededBatches
from ..kernels.block_sparse import resolve_backend
from ..sparse.draw import draw_layout
from . import checkpoint, flow, lora, report
from .caching import prepare_data
from .config import Config, ConfigError, save, to_dict, to_yaml
from .families.base import Text
from .job import Job
from .metrics import UNMEASURED, AttentionCost, Metrics, Row
from .probe import measure_speedup
from .progress import StepProgress, open_console
from .sampling import generate
from .validate import heldout_loss

log = logging.getLogger(__name__)


class Trainer:
    """One run: caches the data, trains the LoRA, validates, samples, saves, resumes.

    Everything random is a function of (seed, step, process), so a run that stops and goes on equals
    one that never stopped.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.config = job.config
        self.run_dir = job.config.run_dir
        job.check_trainable()
        timeout = InitProcessGroupKwargs(timeout=timedelta(hours=2))  # rank 0 may encode for long
        self.accelerator = Accelerator(kwargs_handlers=[timeout])
        self.device = self.accelerator.device
        self.console = open_console(self.accelerator.is_main_process)
        self.dtype = getattr(torch, self.config.memory.base_dtype)
        self.attention = job.attention()
        self.grid = job.grid(job.frames)
        self._sampler: Any = None  # the pipeline of the sample videos, loaded when first needed
        self.cost = AttentionCost.of(
            self.attention,
            self.grid,
            job.geometry.layers,
            job.geometry.heads,
            job.geometry.head_dim,
        )

    def fit(self) -> None:
        """Run to the last step. The same command again goes on from the newest checkpoint."""
        self._announce()
        prepared = self._prepare_data()
        train, heldout = self._split(prepared)
        self._load_model()
        start = self._restore()
        if self.accelerator.is_main_process:
            self._open_log(start)
        self._report_attention()
        self._prompts = [
            read_text(prepared.texts[prompt]) for prompt in self.config.validate.prompts
        ]
        self._negative = read_text(prepared.texts[""]) if self._prompts else {}
        steps = self.config.train.steps
        if start >= steps:
            log.info(f"{self.run_dir} is complete at step {start}; train.steps={steps}.")
        if self._validation_is_due(start):
            self._validate(start, heldout)
        batches = self._batches(train, start)
        with StepProgress(self.console, start, steps, self.cost.density) as progress:
            for step in range(start + 1, steps + 1):
                row = self._step(step, batches)
                progress.advance(step, row)
                if self.accelerator.is_main_process and step % self.config.log.every == 0:
                    self.metrics.write(row)
                if step % self.config.checkpoint.every == 0 or step == steps:
                    self._save(step)
                if self._validation_is_due(step):
                    self._validate(step, heldout)
        self._finish()

    # Before the first step

    def _announce(self) -> None:
        self.console.print(to_yaml(self.config).rstrip(), markup=False, highlight=False)
        backend = resolve_backend(
            self.config.sparse.backend, self.device, self.dtype, self.job.geometry.head_dim
        )
        note = ": the eager oracle, right but slow; meant for small models" * (
            backend == "reference"
        )
        log.info(f"Attention backend on {self.device}: {backend}{note}.")
        job, grid = self.job, self.grid
        log.info(
            f"{job.native_frames} -> {job.frames} frames: {len(grid):,} tokens "
            f"({grid.frames} x {grid.height} x {grid.width}); attention computes "
            f"{self.cost.density:.1%} of all pairs, {self.cost.layer_density:.1%} in sparse layers."
        )
        if self.accelerator.is_main_process:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            save(self.config, self.run_dir / "config.yaml")
            layout = self.attention.layout(grid)
            title = (
                f"{_pattern_title(self.config)}, {grid.frames} x {grid.height} x {grid.width} "
                f"tokens, density {layout.density:.1%}"
            )
            report.save_figure(draw_layout(layout, title), self.run_dir / "mask.png")

    def _prepare_data(self) -> Prepared:
        """One process fills the cache; the others then find it complete."""
        with self.accelerator.main_process_first():
            prepared = prepare_data(self.job, self.device, self.dtype)
        self.console.print(str(prepared.report), markup=False, highlight=False)
        return prepared

    def _split(self, prepared: Prepared) -> tuple[LatentDataset, LatentDataset]:
        try:
            train, heldout = split(prepared.entries, self.config.validate.clips)
        except ValueError as error:
            raise ConfigError(f"validate.clips={self.config.validate.clips}: {error}") from error
        log.info(f"{len(train)} clips to train on, {len(heldout)} held out.")
        return LatentDataset(train), LatentDataset(heldout)

    def _load_model(self) -> None:
        config, job = self.config, self.job
        transformer = job.family.load_transformer(job.model_path, config.model.revision, self.dtype)
        parameters = lora.attach(
            transformer,
            job.family,
            rank=config.lora.rank,
            alpha=config.lora_alpha,
            targets=config.lora.targets,
            dropout=config.lora.dropout,
            seed=config.train.seed,
        )
        job.family.install(transformer, self.attention)
        if config.memory.checkpoint:
            transformer.enable_gradient_checkpointing(self.attention.checkpoint)
        transformer.train()
        self.parameters = dict(parameters)
        count = sum(p.numel() for p in self.parameters.values())
        log.info(f"LoRA of rank {config.lora.rank}: {count:,} parameters to train.")
        optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.train.lr, weight_decay=config.train.weight_decay
        )
        prepared: Any = self.accelerator.prepare(transformer, optimizer)
        self.model, self.optimizer = prepared
        self.transformer: nn.Module = self.accelerator.unwrap_model(self.model)

    def _restore(self) -> int:
        newest = checkpoint.latest(self.run_dir / "checkpoints")
        if newest is None:
            return 0
        progress = checkpoint.restore(newest, self.parameters, self.optimizer.optimizer)
        log.info(f"Resuming from {newest} at step {progress.step}.")
        return progress.step

    def _open_log(self, start: int) -> None:
        self.metrics = Metrics(self.run_dir, resumed_step=start)
        if self.config.log.wandb:
            run_id = hashlib.sha256(str(self.run_dir.absolute()).encode()).hexdigest()[:12]
            self.metrics.start_wandb(
                self.config.log.project, to_dict(self.config), self.run_dir, run_id
            )
        self.metrics.image("mask", self.run_dir / "mask.png", start)

    def _report_attention(self) -> None:
        geometry = self.job.geometry
        speedup = measure_speedup(
            self.attention,
            self.grid,
            layers=geometry.layers,
            heads=geometry.heads,
            head_dim=geometry.head_dim,
            device=self.device,
            dtype=self.dtype,
        )
        log.info(f"Attention of a sparse layer against dense: {speedup or UNMEASURED}.")
        self.speedup = speedup

    # Training

    def _batches(self, dataset: LatentDataset, start: int) -> Iterator[dict[str, Any]]:
        train = self.config.train
        sampler = SeededBatches(
            len(dataset),
            train.batch,
            train.seed,
            start=start * train.accumulate,
            rank=self.accelerator.process_index,
            num_ranks=self.accelerator.num_processes,
        )
        return iter(
            torch.utils.data.DataLoader(
                dataset, batch_sampler=sampler, num_workers=train.workers, collate_fn=self._collate
            )
        )

    def _collate(self, clips: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "latents": torch.stack([clip["latents"] for clip in clips]),
            "text": self.job.family.collate_text([clip["text"] for clip in clips]),
            "ids": [clip["id"] for clip in clips],
        }

    def _step(self, step: int, batches: Iterator[dict[str, Any]]) -> Row:
        """One optimizer update; returns its line of metrics."""
        train = self.config.train
        started = time.perf_counter()
        lr = train.lr * lr_factor(step, train.warmup, train.steps, train.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = torch.zeros((), device=self.device)
        for micro in range(train.accumulate):
            last = micro == train.accumulate - 1
            waiting = contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)
            with waiting:
                batch = next(batches)
                part = self._loss(batch, step, micro) / train.accumulate
                self.accelerator.backward(part)
            loss += part.detach()
        limit = train.clip or math.inf
        norm = float(self.accelerator.clip_grad_norm_(self.parameters.values(), limit))  # type: ignore
        reduced: Any = self.accelerator.reduce(loss, "mean")
        mean_loss = reduced.item()
        if not (math.isfinite(mean_loss) and math.isfinite(norm)):
            raise SystemExit(
                f"error: step {step}: loss {mean_loss}, gradient norm {norm}, with "
                f"{', '.join(batch['ids'])} in the batch. Weights are as of the last checkpoint in "
                f"{self.run_dir / 'checkpoints'}; a lower train.lr is the usual remedy."
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        samples = train.batch * train.accumulate * self.accelerator.num_processes
        cost = self.cost.training(samples, recomputed=self.config.memory.checkpoint)
        return {
            "step": step,
            "loss": mean_loss,
            "lr": lr,
            "grad_norm": norm,
            "seconds_per_step": seconds,
            "tokens_per_second": samples * len(self.grid) / seconds,
            "peak_memory_gib": peak_memory_gib(self.device),
            "attention_density": cost.density,
            "attention_sparsity": cost.sparsity,
            "attention_pflops": cost.pflops,
            "attention_dense_pflops": cost.dense_pflops,
            "attention_speedup": self.speedup.ratio if self.speedup else UNMEASURED,
        }

    def _loss(self, batch: dict[str, Any], step: int, micro: int) -> Tensor:
        train = self.config.train
        key = f"{train.seed}/{step}/{micro}/{self.accelerator.process_index}"
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
        torch.manual_seed(seed)  # LoRA dropout draws from the global generator
        generator = torch.Generator().manual_seed(seed)  # the CPU's: equal draws on every device
        clean = batch["latents"].to(self.device)
        sigma = flow.sample_sigmas(len(clean), train.sigma, generator).to(self.device)
        noise = torch.randn(clean.shape, generator=generator).to(self.device)
        text = {key: value.to(self.device) for key, value in batch["text"].items()}
        return flow.flow_matching_loss(self.job.family, self.model, clean, text, sigma, noise)

    # Beside training

    def _validation_is_due(self, step: int) -> bool:
        """At step 0, at the last, every so often; not again if the run stopped right after it."""
        if not self.accelerator.is_main_process:
            return False
        due = step % self.config.validate.every == 0 or step == self.config.train.steps
        return due and step not in report.column(self.metrics.rows(), "heldout_loss_target")

    def _validate(self, step: int, heldout: LatentDataset) -> None:
        """Held-out loss and sample videos, on the main process."""
        validate, job = self.config.validate, self.job
        if len(heldout):
            row: Row = {"step": step}
            for name, frames in (("target", job.frames), ("native", job.native_frames)):
                row[f"heldout_loss_{name}"] = heldout_loss(
                    job.family,
                    self.transformer,
                    heldout,
                    sigmas=validate.sigmas,
                    latent_frames=job.latent_shape(frames)[1],
                    seed=validate.seed,
                    device=self.device,
                )
            self.metrics.write(row)
            log.info(
                f"step {step}: held-out loss {row['heldout_loss_target']:.4f} at {job.frames} "
                f"frames, {row['heldout_loss_native']:.4f} at {job.native_frames}."
            )
        for index, (prompt, text) in enumerate(zip(validate.prompts, self._prompts, strict=True)):
            path = self.run_dir / "samples" / f"step-{step:06d}-{index}.mp4"
            self._sample(path, text)
            self.metrics.video(f"samples/{index}", path, step, prompt)

    def _sample(self, path: Path, text: Text) -> None:
        """One video of the model as it stands; the VAE is on the device for as long as it takes."""
        from ..data.decode import write_video

        validate, job = self.config.validate, self.job
        if self._sampler is None:
            self._sampler = job.family.load_pipeline(
                job.model_path,
                self.config.model.revision,
                transformer=self.transformer,
                text=False,
                dtype=self.dtype,
            )
        self._sampler.vae.to(self.device)
        frames = generate(
            self._sampler,
            prompt=text,
            negative=self._negative,
            frames=validate.frames or job.frames,
            height=self.config.height,
            width=self.config.width,
            steps=validate.steps,
            guidance=validate.guidance,
            seed=validate.seed,
        )
        self._sampler.vae.to("cpu")
        write_video(path, frames, job.fps)

    def _save(self, step: int) -> None:
        if not self.accelerator.is_main_process:
            return
        folder = checkpoint.save(
            self.run_dir / "checkpoints",
            self.parameters,
            self.optimizer.optimizer,
            checkpoint.Progress(step, self.accelerator.num_processes),
            keep_last=self.config.checkpoint.keep_last,
            extra=lambda folder: lora.save(
                folder, self.transformer, self.job.family, self.job.adapter_entry()
            ),
        )
        with replacing(self.run_dir / lora.WEIGHTS) as temporary:
            shutil.copyfile(folder / lora.WEIGHTS, temporary)

    def _finish(self) -> None:
        if not self.accelerator.is_main_process:
            return
        rows = self.metrics.rows()
        report.save_figure(report.draw_losses(rows), self.run_dir / "loss.png")
        self.metrics.image("losses", self.run_dir / "loss.png", self.config.train.steps)
        self.metrics.close()
        samples = [
            f"samples/step-{self.config.train.steps:06d}-{i}.mp4"
            for i, _ in enumerate(self._prompts)
        ]
        files = [lora.WEIGHTS, "metrics.csv", "mask.png", "loss.png", *samples]
        self.console.print(report.summary(self.job, self.cost, self.speedup, rows, files))


def lr_factor(step: int, warmup: int, steps: int, schedule: str) -> float:
    """Share of the peak learning rate at update `step`, counted from 1: linear warm-up, then
    constant, or a half cosine that would reach 0 one step after the last."""
    if step <= warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps + 1 - warmup)))


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has held: allocated on the GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _pattern_title(config: Config) -> str:
    pattern = to_dict(config)["sparse"]["pattern"]
    name = pattern.pop("name")
    return f"{name}({', '.join(f'{key}={value}' for key, value in pattern.items())})"
