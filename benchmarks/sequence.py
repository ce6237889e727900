"""Measure the cost of sharing one clip between all GPUs, against one clip on each GPU.

    accelerate launch --config_file launch/ddp.yaml --num_processes 2 benchmarks/sequence.py \\
        recipe=hunyuan_2x [blocks=2] [key=value ...]

Random weights at full width and length, no files. First the gradients of one clip are compared,
shared and not. Then both ways take turns: efficiency is the seconds of a step with a clip on each
of N GPUs over N times those of a step with one clip on all. The slowest process counts, as it does
in a run. Each call adds its section to the result file of the day, or replaces it.

    blocks=2      blocks of each kind, dense and sparse, few enough that both ways fit; or `all`
    alone=true    `false` measures only the shared clip, for clips that one GPU cannot hold
    repeats=3     counted steps; the first of them is profiled
    warmup=full   or short: the step before them runs on a few frames, just to compile
    out=FOLDER    folder of the result files
"""

from __future__ import annotations

import logging
import os
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import torch
import training
from accelerate.utils import gather_object
from lib.agreement import ROOM
from lib.blocks import count_blocks, describe, with_blocks
from lib.parts import PARTS
from lib.report import RESULTS, dated, from_command_line, resumed, short, with_sections, write
from lib.rows import Caption, Point, Row, Stepper
from step import free, job_of
from torch import Tensor, nn
from training import say

from longreel.trainer.config.recipe import split_options
from longreel.trainer.config.values import ConfigError
from longreel.trainer.job import Job
from longreel.trainer.memory.device import fastest_dense, grow_segments
from longreel.trainer.plan import rates
from longreel.trainer.plan.estimate import GIB
from longreel.trainer.plan.predict import plan
from longreel.trainer.run.metrics import peak_memory_gib

NOTES = (
    "s: of an update, on the slowest process, the median; efficiency: seconds of a clip on each "
    "over those of as many shared ones. GiB: the most of any process; peak: that torch allocated; "
    "GPU: all that is taken of it after a step, CUDA's context and what NCCL holds too, and both "
    "ways where there are two; host: resident, pinned pages among it. Parts: seconds of kernels in "
    "process 0's first counted step; exchange: between GPUs, waiting for the other ones included."
)


@dataclass(frozen=True)
class Options:
    """Holds the keys that are not a recipe's; the module's docstring explains them."""

    blocks: str = "2"
    alone: bool = True
    repeats: int = 3
    warmup: Literal["full", "short"] = "full"
    out: str = str(RESULTS)


@dataclass
class Way:
    """Holds one way to spread clips over the processes.

    taken: GiB of the GPU in use after a step, including what other ways hold. host: peak GiB of
    host memory of this process.
    """

    name: str
    job: Job
    stepper: Stepper
    point: Point
    taken: float = 0.0
    host: float = 0.0

    def note_memory(self, device: torch.device) -> None:
        self.host = peak_memory_gib(torch.device("cpu"))
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            self.taken = (total - free) / GIB


def benchmark(argv: Sequence[str]) -> None:
    """Compare gradients, measure, and write the result file."""
    options, overrides = split_options(Options, argv)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        raise ConfigError("sequence.py compares several processes: run it by `accelerate launch`.")
    if options.blocks != "all" and not (options.blocks.isdigit() and int(options.blocks)):
        raise ConfigError(f"blocks={options.blocks} must be a number, or all.")
    grow_segments()  # before there is a device
    device, main = this_device(), os.environ["RANK"] == "0"
    alike = training.setup().replace("one process", f"{processes} processes")
    path = dated(Path(options.out), "sequence")
    if main:
        resumed(path, alike)  # to fail before the work
    shared: dict[str, nn.Parameter] = {}
    with tempfile.TemporaryDirectory() as nothing:
        ways = []
        for sequence in (1, processes) if options.alone else (processes,):
            row = Row("", "", (f"parallel.sequence={sequence}",))
            job = job_of(row, overrides, nothing)
            if options.blocks != "all":
                job = with_blocks(job, dict.fromkeys(count_blocks(job), int(options.blocks)))
            stepper = Stepper(job, shared, device, Caption())
            stepper.pin(plan(job, rates.MEASURED).memory.host.get("offload", 0.0))
            point = Point(count_blocks(job))
            name = "a clip on each" if sequence == 1 else f"one clip on {processes}"
            ways.append(Way(name, job, stepper, point))
        told = [f"Blocks: {describe(ways[0].point.counts)}."]
        if options.alone:
            told.append(compare(*ways))
            if main:
                say(told[-1])
        measure(ways, options, main)
        free()
    lines = report(ways, processes)
    if main:
        recipe = training.name_of(ways[0].job.config.recipe, overrides)
        title = f"{recipe}, blocks={options.blocks}"
        head, sections = resumed(path, alike)
        sections[title] = "\n\n".join([command(argv, processes), *told, "\n".join(lines)])
        write(path, with_sections([f"# Shared clips, {date.today()}", alike, NOTES], sections))
        say(f"{sections[title]}\n\nwritten to {path}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def this_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def compare(alone: Way, shared: Way) -> str:
    """Compare gradients of one clip at one noise level: both ways, and the first way twice.

    Raises SystemExit where sharing moves them by more than some roundings in the model's precision.
    """
    expected, again, found = (
        {name: grad.cpu() for name, grad in way.stepper.gradients(fastest_dense()).items()}
        for way in (alone, alone, shared)
    )
    budget = ROOM * torch.finfo(alone.stepper.learner.dtype).eps
    error, noise = apart(found, expected), apart(again, expected)
    told = (
        f"Before timing: gradients of one clip, shared against alone, relative: {error:.1e}; alone "
        f"against alone once more {noise:.1e}; allowed {budget:.1e}."
    )
    if error > budget:
        raise SystemExit(f"error: a shared clip gives other gradients. {told}")
    return told


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the relative distance of all gradients taken together."""
    squares = sum((found[n].double() - g.double()).square().sum() for n, g in expected.items())
    norm = sum(g.double().square().sum() for g in expected.values())
    return float((squares / norm) ** 0.5)


def measure(ways: list[Way], options: Options, main: bool) -> None:
    """Run one uncounted step of each way, then `repeats` counted ones, taking turns."""
    for turn in range(options.repeats + 1):
        for way in ways:
            way.stepper.learner.accelerator.wait_for_everyone()
            if not turn:
                way.stepper.warm(options.warmup == "short")
                continue
            way.stepper.step(way.point)
            if len(ways) == 1 and way.stepper.device.type == "cuda":
                way.point.peak = torch.cuda.max_memory_allocated()  # nothing else is there
            way.point.seconds[-1] = max(gather_object([way.point.seconds[-1]]))
            way.note_memory(way.stepper.device)
            if main:
                say(f"  turn {turn}, {way.name}: {short(way.point.seconds[-1])} s")


def report(ways: list[Way], processes: int) -> list[str]:
    """Return the tables, built from the measurements of all processes."""
    lines = [
        "| | tokens | s | of it a clip | efficiency | peak GiB | GPU GiB | host GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way in ways:
        clips = processes // way.job.config.parallel.sequence
        seconds = way.point.median
        efficiency = (
            "-" if len(ways) == 1 else f"{ways[0].point.median / (processes * seconds):.3f}"
        )
        sizes = gather_object([(way.point.peak / GIB, way.taken, way.host)])
        peak, taken, host = (max(of) for of in zip(*sizes, strict=True))
        shown = [way.name, f"{len(way.stepper.grid):,}", short(seconds), short(seconds / clips)]
        shown += [efficiency if clips == 1 else "1"]
        shown += [short(peak or None), short(taken or None), short(host)]
        lines.append(f"| {' | '.join(shown)} |")
    profiles = [(way.name, way.point.profile) for way in ways if way.point.profile is not None]
    if profiles:
        lines += ["", f"| s | {' | '.join(PARTS)} |", f"|---|{len(PARTS) * '---|'}"]
        for name, profile in profiles:
            spent = " | ".join(short(profile.parts[part]) for part in PARTS)
            lines.append(f"| {name} | {spent} |")
    return lines


def command(argv: Sequence[str], processes: int) -> str:
    given = shlex.join([x for x in argv if not x.startswith((*training.PLACES, "out="))])
    return (
        f"`accelerate launch --config_file launch/ddp.yaml --num_processes {processes} "
        f"benchmarks/sequence.py {given}`"
    )


if __name__ == "__main__":
    logging.disable(logging.INFO)  # of every model that is made
    from_command_line(benchmark, __doc__)
