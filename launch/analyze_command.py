"""`longreel analyze`: how a trained model's attention decays, and what each mask leaves of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..data.files import replacing
from ..sparse.attention import SparseAttention
from ..sparse.density import layer_density, nearest_density
from ..sparse.patterns import PATTERNS, SparsePattern
from ..trainer.adapter import lora
from ..trainer.config.recipe import load, load_file, parse
from ..trainer.config.schema import ConfigError
from ..trainer.config.source import is_drawn
from ..trainer.job import Job

log = logging.getLogger(__name__)

ANALYZE_USAGE = """\
longreel analyze run=RUN | recipe=NAME ... [key=value]  how attention falls with distance, and what
                                                        each mask leaves of it, on noised clips"""


@dataclass(frozen=True)
class Analyze:
    """Keys of `longreel analyze` beside a recipe's.

    run: folder of a training run, whose settings and adapter are taken; else a recipe's base model.
    masks: patterns to judge, each at the density of the run's. sigmas: noise levels of the clips.
    layers: indices (none: all). clips: how many, the first of the data. rows: queries of a layer
    and forward, spread over the video (0: all). positions: raster distances, and fits, up to this.
    """

    run: str | None = None
    masks: list[str] = field(default_factory=lambda: [n for n in PATTERNS if n != "dense"])
    sigmas: list[float] = field(default_factory=lambda: [0.3, 0.6, 0.9])
    layers: list[int] = field(default_factory=list)
    clips: int = 1
    rows: int = 256
    positions: int = 41
    out: str = "analysis.json"


OWN = tuple(Analyze.__dataclass_fields__)


def analyze(argv: list[str]) -> None:
    """Print the figures and write all of them to `out`."""
    own = [text for text in argv if text.partition("=")[0] in OWN]
    options = parse(Analyze, own)
    _check(options)
    job = _job(options, [text for text in argv if text not in own])
    masks = at_density(job, options.masks)

    from ..trainer.run.progress import quiet_libraries

    quiet_libraries()
    figures = observe(job, options, masks)
    with replacing(Path(options.out)) as temporary:
        temporary.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    for line in describe(figures):
        print(line)
    if job.config.model.path == "tiny":
        print("model.path=tiny has random weights: these figures tell nothing of a trained model.")
    print(options.out)


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
    job: Job, options: Analyze, masks: dict[str, tuple[SparsePattern, float]]
) -> dict[str, Any]:
    """`analyze.summary` of the job's model on its own clips, one forward a clip and noise level."""
    from accelerate import Accelerator

    from ..data.dataset import LatentDataset
    from ..sparse.analyze import Observer, summary
    from ..trainer.clips import prepare_data
    from ..trainer.flow import add_noise

    accelerator = Accelerator()
    device = accelerator.device
    half = device.type == "cuda" and job.config.memory.base_dtype != "float32"
    dtype = torch.bfloat16 if half else torch.float32
    clips = LatentDataset(prepare_data(job, accelerator, dtype).entries)
    transformer = job.family.loader.load_transformer(
        job.model_path, job.config.model.revision, dtype
    )
    if options.run is not None:
        merge(transformer, options.run)
    transformer.to(device).eval()
    job.family.rope.apply(transformer, job.rope)
    attention: SparseAttention = job.attention()
    observer = Observer(
        attention.pattern,
        block=attention.block,
        backend=attention.backend,
        dense_layers=attention.dense_layers,
        masks={name: pattern for name, (pattern, _) in masks.items()},
        layers=options.layers or None,
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
        "adapter": options.run,
        "frames": job.frames,
        "grid": vars(job.grid(job.frames)),
        "sigmas": options.sigmas,
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


def describe(figures: dict[str, Any]) -> list[str]:
    """The figures over all layers and heads, a line each."""
    lines = []
    for kind, found in figures["decay"].items():
        lines.append(
            f"{kind} decay exp(-ax + b): median R^2 {found['median_r2']:.4f}, above 0.985 in "
            f"{found['above_0.985']:.0%} of {found['heads']} heads"
        )
    lines.append(f"{'mask':18}{'density':>9}{'recalled mass':>15}{'relative MSE':>14}")
    by_error = sorted(figures["masks"].items(), key=lambda item: item[1]["relative_mse"])
    for name, mask in by_error:
        lines.append(
            f"{name:18}{mask['density']:9.2%}{mask['recall']:15.2%}{mask['relative_mse']:14.2e}"
        )
    return lines


def _job(options: Analyze, recipe: list[str]) -> Job:
    if options.run is None:
        job = Job.from_config(load(recipe))
    else:
        if recipe:
            raise ConfigError(
                f"run={options.run} brings its own settings: leave {', '.join(recipe)} out."
            )
        path = Path(options.run) / "config.yaml"
        if not path.is_file():
            raise ConfigError(f"run={options.run} is not the folder of a run: {path} is missing.")
        lora.read_entry(options.run)  # refuses a run without an adapter
        config = load_file(path)
        job = Job.from_config(replace(config, train=replace(config.train, workers=0)))
    if job.config.data.path is None and not is_drawn(job.config):
        raise ConfigError("data.path is not set: the folder of videos to noise and look at.")
    beyond = [index for index in options.layers if not 0 <= index < job.geometry.layers]
    if beyond:
        raise ConfigError(f"layers={beyond}: the model has layers 0 to {job.geometry.layers - 1}.")
    return job


def _check(options: Analyze) -> None:
    unknown = [name for name in options.masks if name not in PATTERNS]
    if unknown:
        raise ConfigError(f"masks={unknown}: the patterns are {', '.join(PATTERNS)}.")
    if any(not 0 < sigma <= 1 for sigma in options.sigmas) or not options.sigmas:
        raise ConfigError(f"sigmas={options.sigmas}: noise levels are above 0 and at most 1.")
    for key, least in (("clips", 1), ("rows", 0), ("positions", 2)):
        if getattr(options, key) < least:
            raise ConfigError(f"{key}={getattr(options, key)} must be at least {least}.")
    if not options.out.endswith(".json") or not Path(options.out).parent.is_dir():
        raise ConfigError(f"out={options.out} must be a .json file in a folder that exists.")
