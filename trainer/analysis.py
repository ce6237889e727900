"""Attention analysis of a model on its own noised clips, measured by `sparse.analyze`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..sparse.analyze import Observer, summary
from ..sparse.attention import SparseAttention
from ..sparse.density import layer_density, nearest_density
from ..sparse.patterns import PATTERNS, SparsePattern
from .adapter import lora
from .job import Job

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Observation:
    """The part of a model and its clips that an analysis looks at.

    adapter: a run whose adapter is merged into the model; None for the base model. sigmas: noise
    levels. layers: indices; empty for all. clips: how many, the first of the data. rows: queries of
    a layer and forward, spread over the video; 0 for all. positions: the greatest raster distance.
    """

    adapter: str | None
    sigmas: Sequence[float]
    layers: Sequence[int] = ()
    clips: int = 1
    rows: int = 256
    positions: int = 41


def at_density(job: Job, names: Sequence[str]) -> dict[str, tuple[SparsePattern, float]]:
    """Patterns at the widths that come nearest to the density of the job's, and their densities.

    Of a job that trains dense: to that of radial at its defaults.
    """
    grid, heads, block = job.grid(job.frames), job.geometry.heads, job.config.sparse.block
    pattern = PATTERNS["radial"]() if job.pattern.__class__ is PATTERNS["dense"] else job.pattern
    target = layer_density(pattern, grid, block, heads)
    found = {}
    for name in names:
        candidate = pattern if type(pattern) is PATTERNS[name] else PATTERNS[name]()
        found[name] = nearest_density(candidate, grid, target, block, heads)[:2]
    return found


def observe(
    job: Job, options: Observation, masks: dict[str, tuple[SparsePattern, float]]
) -> dict[str, Any]:
    """Return `analyze.summary` of the model on its clips, a forward a clip and noise level."""
    from accelerate import Accelerator

    from ..data.dataset import LatentDataset
    from .clips import prepare_data
    from .flow import add_noise

    accelerator = Accelerator()
    device = accelerator.device
    half = device.type == "cuda" and job.config.memory.base_dtype != "float32"
    dtype = torch.bfloat16 if half else torch.float32
    clips = LatentDataset(prepare_data(job, accelerator, dtype).entries)
    transformer = job.family.loader.load_transformer(
        job.model_path, job.config.model.revision, dtype
    )
    if options.adapter is not None:
        merge(transformer, options.adapter)
    transformer.to(device).eval()
    job.family.rope.apply(transformer, job.rope)
    attention: SparseAttention = job.attention()
    observer = Observer(
        attention.pattern,
        block=attention.block,
        backend=attention.backend,
        dense_layers=attention.dense_layers,
        masks={name: pattern for name, (pattern, _) in masks.items()},
        layers=list(options.layers) or None,
        rows=options.rows,
        positions=options.positions,
    )
    job.family.install(transformer, observer)
    for index in range(min(options.clips, len(clips))):
        clip = clips[index]
        clean = clip["latents"][None].float().to(device)
        text = {k: x.to(device) for k, x in job.family.text.collate([clip["text"]]).items()}
        for level, sigma in enumerate(options.sigmas):
            generator = torch.Generator().manual_seed(index * 101 + level)
            noise = torch.randn(clean.shape, generator=generator).to(device)
            sigmas = torch.full((1,), sigma, device=device)
            with torch.no_grad():
                noisy = add_noise(clean, noise, sigmas)
                job.family.noising.predict(
                    transformer, noisy, sigmas, text, job.config.train.guidance
                )
            log.info(f"clip {index}, noise level {sigma:g}: {len(observer.found)} layers seen")
    about = {
        "model": job.config.model.path,
        "adapter": options.adapter,
        "frames": job.frames,
        "grid": vars(job.grid(job.frames)),
        "sigmas": list(options.sigmas),
        "clips": min(options.clips, len(clips)),
        "rows": options.rows,
        "masks": {name: str(pattern) for name, (pattern, _) in masks.items()},
    }
    return {"about": about} | summary(observer, {name: d for name, (_, d) in masks.items()})


def merge(transformer: Any, run: str) -> None:
    """Add a run's adapter to the weights that it adapts."""
    scale, updates = lora.read_updates(transformer, run)
    with torch.no_grad():
        for name, (a, b) in updates.items():
            weight = transformer.get_submodule(name).weight
            weight.copy_(weight.float() + scale * (b.float() @ a.float()))
