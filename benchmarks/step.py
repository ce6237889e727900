"""Compare sparse and dense training steps in one process: time by part, and memory.

    python benchmarks/step.py recipe=hunyuan_2x [speed.fused_norms=true ...] [rows=fair,radial]

Each row changes the recipe: `stock` (diffusers and PEFT alone), `dense`, `fair` (dense, with every
memory setting of the recipe), `radial` (the recipe), `sparse` (without dense layers), and one for
each memory setting switched by itself. A step of the published model takes minutes, so by default
models of few blocks at full width and length take turns, and the depth is extrapolated from what
one more block of each kind takes. Dense layers run on the fastest dense attention of torch.

The predicted time of each row is printed first; `dry=true` ends there. Before anything is timed,
the recipe's step is compared with the dense one on a small grid. Results go into one JSON file per
day, row by row, with tables beside it, so that a run may be split over several calls.

    rows=all      names separated by commas
    blocks=1,2    blocks of each kind in the small models; `all`: the whole model, not extrapolated
    repeats=3     counted steps of each model; the first of them is profiled
    warmup=full   or short: the step before them runs on a few frames, just to compile
    caption=N     tokens of the caption (default: as many as the model takes)
    resume=true   skip rows that the file already holds
    gpu=h200      GPU whose rates are used for predictions (default: the one found)
    out=FOLDER    folder of the result files
"""

from __future__ import annotations

import gc
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Literal

import torch
import training
from lib import agreement, speedup
from lib.blocks import count_blocks, describe, with_blocks
from lib.report import RESULTS, dated, from_command_line, short
from lib.rows import Caption, Point, Row, Stepper, rows_for
from lib.speedup import WHOLE, Record, Section
from torch import nn
from training import say

from longreel.trainer.config.recipe import load, split_options
from longreel.trainer.config.schema import Config
from longreel.trainer.config.values import ConfigError, did_you_mean
from longreel.trainer.job import Job
from longreel.trainer.plan import rates
from longreel.trainer.plan.estimate import GIB
from longreel.trainer.plan.predict import plan

STOCK_SLOWER = 537 / 344  # of a masked step to one without, for predictions: `speedup.KNOWN`
MAKING = 5.0  # seconds for a model, assumed
CHECKING = 60.0  # for the comparison before, assumed


@dataclass(frozen=True)
class Options:
    """Holds the keys that are not a recipe's; the module's docstring explains them."""

    rows: str = "all"
    blocks: str = "1,2"
    repeats: int = 3
    warmup: Literal["full", "short"] = "full"
    caption: int | None = None
    resume: bool = False
    dry: bool = False
    gpu: str | None = None
    out: str = str(RESULTS)

    @property
    def counts(self) -> tuple[int, int]:
        """Return the low and high number of blocks of each kind; zeros mean the whole model."""
        if self.blocks == "all":
            return 0, 0
        low, _, high = self.blocks.partition(",")
        if not (low.isdigit() and high.isdigit() and 0 < int(low) < int(high)):
            raise ConfigError(f"blocks={self.blocks} must be two numbers, as in 1,2, or all.")
        return int(low), int(high)


@dataclass
class Task:
    """Holds a row to measure with its job and record."""

    row: Row
    job: Job
    record: Record

    def predict(self, gpu: rates.Gpu, options: Options) -> tuple[list[float], float]:
        """Return the predicted seconds of a step at each point, and the highest peak in bytes."""
        slower = STOCK_SLOWER if self.row.stock else 1.0
        made = [plan(with_blocks(self.job, x), gpu) for x in self.record.design.points]
        return [slower * p.seconds.total for p in made], max(p.memory.peak for p in made)


def benchmark(argv: Sequence[str]) -> Path:
    """Predict, check, measure and write the results; return the path of the numbers."""
    options, overrides = read(argv)
    alike = training.setup()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = rates.gpu_named(options.gpu) if options.gpu else training.gpu_found(device)
    path = dated(Path(options.out), "step").with_suffix(".json")
    held = speedup.read(path, alike)  # to fail before the work
    recipe = training.name_of(load(overrides).recipe, overrides)
    with tempfile.TemporaryDirectory() as nothing:
        tasks = plan_rows(options, overrides, nothing, gpu)
        if options.resume and recipe in held.sections:
            found = held.sections[recipe].rows
            tasks = {name: task for name, task in tasks.items() if name not in found}
        say(f"{recipe}\n{alike}")
        if gpu is not None:
            announce(tasks, gpu, options)
        if options.dry or not tasks:
            return path

        def save() -> None:
            results = speedup.read(path, alike)  # read again: another process may have added to it
            section = results.sections.setdefault(recipe, Section())
            section.check = checked or section.check
            section.rows |= {name: t.record for name, t in tasks.items() if told(t.record)}
            speedup.save(results, path, f"# Training steps, sparse and dense, {date.today()}")

        rows = rows_for(load(overrides))
        checked = agreement.check(
            *(job_of(rows[name], overrides, nothing) for name in ("dense", "radial")), device
        )
        say(checked)
        for name, group in groups(tasks).items():
            say(f"measuring {name}")
            measure(group, device, options, save)
            save()
    section = speedup.read(path, alike).sections[recipe]
    say(f"{speedup.described(recipe, section, alike)}\n\nwritten to {path.with_suffix('.md')}")
    return path


def plan_rows(
    options: Options, overrides: Sequence[str], folder: str, gpu: rates.Gpu | None
) -> dict[str, Task]:
    """Return the chosen rows by their names in the file."""
    rows, tasks = rows_for(load(overrides)), {}
    names = list(rows) if options.rows == "all" else options.rows.split(",")
    for name in names:
        if name not in rows:
            raise ConfigError(f"rows={name} is unknown.{did_you_mean(name, rows)}")
        row, (low, high) = rows[name], options.counts
        job = job_of(row, overrides, folder)
        densities = job.attention().layer_densities(
            job.grid(job.frames), job.geometry.layers, job.geometry.heads
        )
        record = Record(
            about=row.about,
            command=command(overrides, options, name),
            family=job.family.name,
            frames=job.frames,
            tokens=len(job.grid(job.frames)),
            density=sum(densities) / len(densities),
            offload=job.config.memory.offload,
            whole=count_blocks(job),
            low=low,
            high=high,
        )
        if gpu is not None and not row.stock:  # no rate of masked attention is known
            record.predicted = plan(job, gpu).seconds.total
        tasks[name if high else name + WHOLE] = Task(row, job, record)
    return tasks


def job_of(row: Row, overrides: Sequence[str], folder: str) -> Job:
    """Build a row's job without files: an empty folder stands in for its videos."""
    config: Config = row.config(overrides)
    places = {"data": replace(config.data, path=folder), "run": replace(config.run, dir=folder)}
    return Job.from_config(replace(config, **places), published=True)


def announce(tasks: dict[str, Task], gpu: rates.Gpu, options: Options) -> None:
    """Print what each row is predicted to take."""
    total, steps = CHECKING, options.repeats + (options.warmup == "full")
    for name, task in tasks.items():
        each, peak = task.predict(gpu, options)
        seconds = steps * sum(each) + MAKING * len(each)
        total += seconds
        say(
            f"  {name}: {describe(task.record.whole)}, density {task.record.density:.3f}; models "
            f"of {', '.join(short(x) for x in each)} s a step, {steps} each: {seconds:.0f} s; at "
            f"most {peak / GIB:.0f} GiB; {task.row.about}"
        )
    say(f"  in all about {total:.0f} s on {gpu.name}, as predicted")


def groups(tasks: dict[str, Task]) -> dict[str, list[Task]]:
    """Group rows that take turns: all rows of few blocks together, each whole model alone."""
    few = {name: task for name, task in tasks.items() if task.record.high}
    whole = {name: [task] for name, task in tasks.items() if not task.record.high}
    return whole | ({", ".join(few): list(few.values())} if few else {})


def measure(
    group: list[Task], device: torch.device, options: Options, save: Callable[[], None]
) -> None:
    """Fill in the records of the rows, whose models take turns; `save` after each turn.

    A row whose memory ends, or that this machine cannot run, says so and leaves the turns.
    """
    free()
    shared: dict[str, nn.Parameter] = {}
    steppers: list[tuple[Task, Point, Stepper]] = []
    for task in group:

        def make(task: Task = task) -> None:
            caption = Caption(options.caption, task.row.stock)
            for counts in task.record.design.points:
                job = with_blocks(task.job, counts)
                stepper = Stepper(job, shared, device, caption)
                stepper.pin(plan(job, rates.MEASURED).memory.host.get("offload", 0.0))
                steppers.append((task, Point(counts), stepper))

        attempt(task, make)
    for turn in range(options.repeats + 1):
        for task, point, stepper in steppers:
            if task.record.complaint:
                continue
            if not turn:
                attempt(task, lambda s=stepper: s.warm(options.warmup == "short"))
                continue
            attempt(task, lambda s=stepper, p=point: s.step(p))
            task.record.tokens = len(stepper.grid)
            shown = f"{short(point.seconds[-1])} s" if point.seconds else task.record.complaint
            say(f"  turn {turn}, {task.row.name}, {describe(point.counts)}: {shown}")
        if turn:
            for task in group:
                task.record.points = [p for of, p, _ in steppers if of is task]
            save()


def attempt(task: Task, function: Callable[[], None]) -> None:
    """Call it; record a complaint in its row if the machine cannot run it or is out of memory."""
    reason = ""
    try:
        function()
    except ConfigError as error:
        reason = str(error)
    except (RuntimeError, MemoryError) as error:
        reason = str(error).strip().partition("\n")[0]
        ended = isinstance(error, MemoryError) or "ALLOC_FAILED" in reason
        if not ended and "out of memory" not in reason:
            raise
        reason = f"out of memory: {reason}"
    if reason:  # outside the handler, because the error keeps the failed computation alive
        task.record.complaint = reason.replace("\n", " ")
        free()


def free() -> None:
    """Free memory no longer needed; hooks and graphs hold models in reference cycles."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def told(record: Record) -> bool:
    return bool(record.complaint or record.steps)


def command(overrides: Sequence[str], options: Options, row: str) -> str:
    """Return the command that produces this row alone."""
    chosen = [f"rows={row}", f"blocks={options.blocks}", f"repeats={options.repeats}"]
    if options.warmup != "full":
        chosen.append(f"warmup={options.warmup}")
    if options.caption is not None:
        chosen.append(f"caption={options.caption}")
    shown = [x for x in overrides if not x.startswith(training.PLACES)]
    return f"`python benchmarks/step.py {' '.join([*shown, *chosen])}`"


def read(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """Split arguments into the options and the recipe with its settings as given."""
    options, overrides = split_options(Options, argv)
    if options.repeats < 1:
        raise ConfigError(f"repeats={options.repeats} must be positive.")
    return options, overrides


if __name__ == "__main__":
    logging.disable(logging.INFO)  # of every model that is made
    from_command_line(benchmark, __doc__)
