"""Predict what a sample video takes: memory by stage, and the seconds of its forwards."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..families.published import blank_encoders
from ..job import Job
from .anatomy import anatomy
from .estimate import GIB, decoding_bytes, forward_memory, read_knobs
from .rates import RESERVE, Gpu
from .timing import SAMPLING, Seconds, seconds


@dataclass(frozen=True)
class SamplingPlan:
    """The predicted memory and time of one video that `longreel sample` makes.

    text, transformer, decoding: peak bytes by part of these three stages, which run one after
    another. steps: diffusion steps. forwards: of the transformer, each of `samples` at once.
    seconds: of all forwards, without text encoders and VAE.
    """

    steps: int
    forwards: int
    samples: int
    text: dict[str, float]
    transformer: dict[str, float]
    decoding: dict[str, float]
    seconds: Seconds

    @property
    def peak(self) -> float:
        return max(sum(s.values()) for s in (self.text, self.transformer, self.decoding))


def plan_sampling(job: Job, gpu: Gpu) -> SamplingPlan:
    """Predict a video of the job's length, with the family's steps and guidance, on one GPU."""
    model, family, config = anatomy(job), job.family, job.config
    knobs = replace(read_knobs(config), offload=False, sequence=1, engine="ddp")
    vae, encoders = blank_encoders(family, job.model_path, config.model.revision)
    grid, attention = job.grid(job.frames), job.attention()
    negative = job.geometry.uses_negative(family.defaults.guidance)
    samples = 2 if negative and family.defaults.batches_guidance else 1
    forwards = family.defaults.steps * (1 + (negative and samples == 1))
    spent = Seconds(0, 0, 0, 0)
    layers = range(job.geometry.layers)
    sparse = attention.layer_densities(grid, len(layers), job.geometry.heads)
    for step in range(family.defaults.steps):
        dense = attention.planned(grid, step=(step, family.defaults.steps)).dense
        once = seconds(
            model,
            grid,
            [1.0] * len(layers) if dense else sparse,
            knobs,
            gpu,
            SAMPLING,
            batch=samples,
            backend=config.sparse.backend,
        )
        spent = spent.plus(once.times(forwards / family.defaults.steps))

    def weights(module: Any, component: str) -> float:
        bytes_each = 4 if component in family.loader.fp32_components else knobs.act
        return bytes_each * sum(p.numel() for p in module.parameters())

    vae_bytes, reserve = {"VAE": weights(vae, "vae")}, {"reserve": RESERVE * GIB}
    transformer = forward_memory(model, len(grid), knobs, samples)
    held = {part: transformer[part] for part in ("frozen base", "LoRA")}
    text = sum(weights(encoder, "text_encoder") for encoder in encoders)
    return SamplingPlan(
        steps=family.defaults.steps,
        forwards=forwards,
        samples=samples,
        text={"text encoders": text} | reserve,
        transformer=transformer | vae_bytes | reserve,
        decoding=held | vae_bytes | {"decoder": decoding_bytes(job)} | reserve,
        seconds=spent,
    )
