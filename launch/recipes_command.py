"""`longreel recipes`: the recipes, with what each takes by the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..trainer.config.fields import setting
from ..trainer.config.values import parse

if TYPE_CHECKING:
    from ..trainer.plan.rates import Gpu

USAGE = "longreel recipes [gpu=NAME]"
COLUMNS = ("recipe", "frames", "size", "tokens", "density", "memory", "host", "seconds", "hours")


@dataclass(frozen=True)
class RecipesOptions:
    """The options of `longreel recipes`."""

    gpu: str = setting("h200", "The GPU that memory and time are predicted for.")


OPTIONS = RecipesOptions


def recipes(argv: list[str]) -> None:
    """Print a line for each recipe of a published model; nothing is downloaded."""
    options = parse(RecipesOptions, argv)
    from ..trainer.plan import rates
    from ..trainer.run.progress import quiet_libraries

    gpu = rates.gpu_named(options.gpu)
    quiet_libraries()
    rows = [COLUMNS, *table(gpu)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    print(
        f"\nPredicted for one {gpu.name} as the recipe stands: GiB of GPU and host memory,\n"
        "seconds of an update, hours of the run. `longreel plan recipe=NAME` has the parts, and\n"
        "what fits another GPU. tiny_wan, tiny_hunyuan and tiny_mochi train random models on a CPU."
    )


def table(gpu: Gpu) -> list[tuple[str, ...]]:
    """Give the cells of each published recipe's line, as text."""
    from ..trainer.config.recipe import load, recipe_names
    from ..trainer.job import Job
    from ..trainer.plan.predict import plan

    rows = []
    for name in recipe_names():
        config = load([f"recipe={name}"])
        if config.model.path == "tiny":
            continue
        job = Job.from_config(config, published=True)
        made = plan(job, gpu)
        density = sum(made.densities) / len(made.densities)
        fits = "" if made.fits else ", does not fit"
        rows.append(
            (
                name,
                f"{job.native_frames} -> {job.frames}",
                f"{job.config.height} x {job.config.width}",
                f"{len(made.grid):,}",
                f"{density:.1%}",
                f"{made.memory.peak / 2**30:.0f}{fits}",
                f"{made.memory.host_peak / 2**30:.0f}",
                f"{made.seconds.total:.0f}",
                f"{made.gpu_hours / made.gpus:.0f}",
            )
        )
    return rows
