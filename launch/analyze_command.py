"""`longreel analyze`: how a trained model's attention decays, and what each mask leaves of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..trainer.config.fields import NOT_NEGATIVE, POSITIVE, Range, setting
from ..trainer.config.values import ConfigError

if TYPE_CHECKING:
    from ..trainer.job import Job

USAGE = "longreel analyze run=RUN | recipe=NAME ... [key=value]      see docs/analyze.md"
TAKES_RECIPE = True


@dataclass(frozen=True)
class AnalyzeOptions:
    """The options of `longreel analyze` beside a recipe's settings."""

    run: str | None = setting(
        None,
        "Folder of a training run, whose settings and adapter are taken; null analyses a recipe's "
        "base model.",
    )
    masks: list[str] = setting(
        [], "Patterns to judge, each at the density of the run's; empty judges all but dense."
    )
    sigmas: list[float] = setting(
        [0.3, 0.6, 0.9], "Noise levels of the clips.", Range(above=0, most=1)
    )
    layers: list[int] = setting([], "Indices of the layers to look at; empty looks at all.")
    clips: int = setting(1, "How many clips are looked at, the first of the data.", POSITIVE)
    rows: int = setting(
        256, "Queries of a layer and forward, spread over the video; 0 takes all.", NOT_NEGATIVE
    )
    positions: int = setting(
        41, "Greatest raster distance of curves and fits, in tokens.", Range(least=2)
    )
    out: str = setting("analysis.json", "The .json file to write, in a folder that exists.")


OPTIONS = AnalyzeOptions


def analyze(argv: list[str]) -> None:
    """Print the figures and write all of them to `out`."""
    from ..trainer.config.recipe import split_options

    options, rest = split_options(AnalyzeOptions, argv)
    options = _checked(options)

    from ..data.files import replacing
    from ..trainer.analysis import Observation, at_density, observe
    from ..trainer.run.progress import quiet_libraries

    job = _job(options, rest)
    masks = at_density(job, options.masks)
    quiet_libraries()
    observation = Observation(
        options.run, options.sigmas, options.layers, options.clips, options.rows, options.positions
    )
    figures = observe(job, observation, masks)
    with replacing(Path(options.out)) as temporary:
        temporary.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    for line in describe(figures):
        print(line)
    if job.config.model.path == "tiny":
        print("model.path=tiny has random weights: these figures say nothing of a trained model.")
    print(options.out)


def describe(figures: dict[str, Any]) -> list[str]:
    """Return the figures over all layers and heads, a line each."""
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


def _job(options: AnalyzeOptions, recipe: list[str]) -> Job:
    from ..trainer.adapter import lora
    from ..trainer.config.recipe import load, load_file
    from ..trainer.config.source import is_drawn
    from ..trainer.job import Job

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


def _checked(options: AnalyzeOptions) -> AnalyzeOptions:
    """Return the options with all masks named; raise ConfigError for those that cannot be."""
    from ..sparse.patterns import PATTERNS

    unknown = [name for name in options.masks if name not in PATTERNS]
    if unknown:
        raise ConfigError(f"masks={unknown}: the patterns are {', '.join(PATTERNS)}.")
    if not options.sigmas:
        raise ConfigError("sigmas=[]: name noise levels above 0 and at most 1.")
    if not options.out.endswith(".json") or not Path(options.out).parent.is_dir():
        raise ConfigError(f"out={options.out} must be a .json file in a folder that exists.")
    every = [name for name in PATTERNS if name != "dense"]
    return replace(options, masks=options.masks or every)
