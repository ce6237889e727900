"""Validation of a run: the loss on held-out clips, and sample videos."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...data.dataset import LatentDataset
from ..families.base import ModelFamily
from ..families.text import Text
from ..flow import flow_matching_loss
from ..job import Job
from ..run.metrics import Metrics, Row
from .pipeline import evaluating

log = logging.getLogger(__name__)


class Validator:
    """Computes held-out losses and sample videos of a transformer in training, without changing it.

    texts: `encode_text` results of the prompts, and of "" for guidance. metrics: of the process
    that writes; None in others, which compute the same because a forward needs all of them. wait:
    waits for all processes, if they all validate; called when a video is written.
    """

    def __init__(
        self,
        job: Job,
        transformer: nn.Module,
        heldout: LatentDataset,
        texts: Mapping[str, Text],
        metrics: Metrics | None,
        *,
        device: torch.device,
        dtype: torch.dtype,
        wait: Callable[[], object] | None = None,
    ) -> None:
        self.job, self.transformer, self.heldout, self.texts = job, transformer, heldout, texts
        self.metrics = metrics
        self.device, self.dtype, self.wait = device, dtype, wait
        self._pipeline: Any = None  # of the samples, loaded when first needed

    def samples(self, step: int) -> list[Path]:
        """Return the paths of a step's sample videos, one per prompt."""
        folder = self.job.config.run_dir / "samples"
        return [
            folder / f"step-{step:06d}-{index}.mp4"
            for index, _ in enumerate(self.job.config.validate.prompts)
        ]

    def missing(self, step: int) -> bool:
        """Return whether a step's validation is incomplete; only for the process that writes."""
        assert self.metrics is not None
        measured = step in self.metrics.column("heldout_loss_target") or not len(self.heldout)
        return not (measured and all(path.is_file() for path in self.samples(step)))

    def run(self, step: int) -> None:
        config, job = self.job.config, self.job
        for prompt, path in zip(config.validate.prompts, self.samples(step), strict=True):
            written = self._sample(prompt, path)
            if written and self.metrics is not None:
                self.metrics.video(f"samples/{path.stem.rpartition('-')[2]}", path, step, prompt)
        if not len(self.heldout):
            return
        row: Row = {"step": step}
        for name, frames in (("target", job.frames), ("native", job.native_frames)):
            row[f"heldout_loss_{name}"] = heldout_loss(
                job.family,
                self.transformer,
                self.heldout,
                sigmas=config.validate.sigmas,
                latent_frames=job.latent_shape(frames)[1],
                seed=config.validate.seed,
                guidance=config.train.guidance,
                device=self.device,
            )
        if self.metrics is None:
            return
        log.info(
            f"step {step}: held-out loss {row['heldout_loss_target']:.4f} at {job.frames} frames, "
            f"{row['heldout_loss_native']:.4f} at {job.native_frames}."
        )
        self.metrics.write(row)

    def _sample(self, prompt: str, path: Path) -> bool:
        """Sample a video; return whether this process wrote it.

        The VAE is on the device only meanwhile. On a full disk only this video is lost.
        """
        from ...data.write_video import write_video
        from .pipeline import generate

        config, job = self.job.config, self.job
        if self._pipeline is None:
            self._pipeline = job.family.loader.load_pipeline(
                job.model_path,
                config.model.revision,
                transformer=self.transformer,
                text=False,
                dtype=self.dtype,
            )
        self._pipeline.vae.to(self.device)
        frames = generate(
            self._pipeline,
            prompt=self.texts[prompt],
            negative=self.texts[""],
            frames=config.validate.frames or job.frames,
            height=config.height,
            width=config.width,
            steps=config.validate.steps,
            guidance=config.validate.guidance,
            seed=config.validate.seed,
        )
        written = self.metrics is not None
        if written:
            try:
                write_video(path, frames, job.fps)  # decodes as it writes
            except OSError as error:
                written = False
                log.error(f"{path} could not be written: {error}")
        self._pipeline.vae.to("cpu")
        if self.wait is not None:
            # The next forward would wait in DeepSpeed's own group, which allows ten minutes only.
            self.wait()
        return written


@torch.no_grad()
def heldout_loss(
    family: ModelFamily,
    transformer: nn.Module,
    clips: LatentDataset,
    *,
    sigmas: Sequence[float],
    latent_frames: int,
    seed: int,
    guidance: float | None,
    device: torch.device,
) -> float:
    """Return the mean loss over clips and noise levels.

    The noise is always the same, so only the weights change the loss. latent_frames: of each clip,
    counted from its start; the VAEs are causal, so these are the latents of a shorter clip.
    """
    losses = []
    with evaluating(transformer):
        for index in range(len(clips)):
            clip = clips[index]
            clean = clip["latents"][None, :, :latent_frames].float().to(device)
            text = {k: v.to(device) for k, v in family.text.collate([clip["text"]]).items()}
            for level, sigma in enumerate(sigmas):
                generator = torch.Generator().manual_seed(seed * 1_000_003 + index * 101 + level)
                noise = torch.randn(clean.shape, generator=generator).to(device)
                noise_level = torch.full((1,), sigma, device=device)
                loss = flow_matching_loss(
                    family, transformer, clean, text, noise_level, noise, guidance
                )
                losses.append(loss.item())
    return sum(losses) / len(losses)
