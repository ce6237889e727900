"""Optimizer steps of whole published models with random weights, beside what the plan predicted.

    python benchmarks/training.py recipe=hunyuan_2x [memory.offload=true ...] [steps=2]

One process on one GPU, one recipe a call with any of its settings; nothing is downloaded. Model,
attention, adapter, optimizer and step are the trainer's own; weights, latents and captions are
noise, with captions of the maximum length. The first step compiles and is reported separately:
seconds are the median of the others. Each call adds its row to the result file of the day, or
replaces it. `sparse.pattern.name=dense` is the dense baseline. Further keys: gpu (used for the
prediction; default: the one found), commit (of the code that predicts, if git is not available),
out (folder of the result files).
"""

from __future__ import annotations

import shlex
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass, field, fields, replace
from datetime import date
from itertools import repeat
from os import environ
from pathlib import Path

import accelerate
import diffusers
import peft
import torch
from lib.report import (
    RESULTS,
    dated,
    from_command_line,
    measured_on,
    resumed,
    short,
    with_sections,
    write,
)
from lib.untrained import random_batch, untrained

from longreel.trainer.config.recipe import load, split_options
from longreel.trainer.config.schema import Config
from longreel.trainer.config.values import ConfigError
from longreel.trainer.job import Job
from longreel.trainer.memory.device import ALLOCATOR, grow_segments
from longreel.trainer.plan import rates
from longreel.trainer.plan.estimate import GIB, read_knobs
from longreel.trainer.plan.predict import ResourcePlan, plan
from longreel.trainer.plan.timing import Passes, work
from longreel.trainer.run.metrics import peak_memory_gib
from longreel.trainer.run.progress import open_console
from longreel.trainer.step import Learner, LoadedModel, Setup
from longreel.trainer.summary import density_by_layer

PARTS = ("batch", "forward", "backward", "optimizer")
# Settings that say where files lie.
PLACES = ("cache.", "data.", "log.", "run.")
COLUMNS = (
    "recipe",
    "tokens",
    "density",
    "s",
    "predicted s",
    "s error",
    "first s",
    "forward / backward / optimizer s",
    "peak GiB",
    "predicted GiB",
    "GiB error",
    "reserved GiB",
    "GPU GiB",
    "host GiB",
    "pinned GiB",
    "PFLOP",
    "TFLOP/s",
)
NOTES = (
    "s: of one optimizer update, the median without the first. Errors: predicted over measured. "
    "Peak: what torch allocated, beside the plan's without its reserve; reserved: by torch's "
    "allocator; GPU: all that is taken of it after a step, CUDA's context too. Host: resident at "
    "most, without weights, which are made on the GPU; pinned: of memory.offload. PFLOP: of an "
    "update by the plan's arithmetic, recomputation counted; TFLOP/s: that by the seconds measured."
)


@dataclass(frozen=True)
class Options:
    """Holds the keys that are not a recipe's; the module's docstring explains them."""

    steps: int = 2
    gpu: str | None = None
    commit: str | None = None
    out: str = str(RESULTS)


@dataclass
class Step:
    """Holds one update. seconds: by PARTS. allocated: bytes as a part began, empty on a CPU."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    allocated: dict[str, int] = field(default_factory=dict)
    loss: float = float("nan")
    moved: int = 0  # tensors of the adapter with a gradient other than zero

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


@dataclass
class Measured:
    """Holds what a run measured.

    complaint: why it ended early; empty if it did not. peak, reserved, gpu, pinned: bytes.
    """

    steps: list[Step] = field(default_factory=list)
    complaint: str = ""
    peak: int = 0
    reserved: int = 0
    gpu: int = 0
    pinned: int = 0
    host_gib: float = 0.0
    adapted: int = 0  # tensors of the adapter

    @property
    def counted(self) -> list[Step]:
        return self.steps[1:]

    @property
    def seconds(self) -> float | None:
        return statistics.median(s.total for s in self.counted) if self.counted else None

    def part(self, name: str) -> float:
        return statistics.median(step.seconds[name] for step in self.counted)

    def note_memory(self, device: torch.device, learner: Learner | None) -> None:
        """Record memory use; `learner` is None while the model is loading."""
        self.host_gib = peak_memory_gib(torch.device("cpu"))
        offload = None if learner is None else learner.offload
        self.pinned = 0 if offload is None else offload.pool.size
        if device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
            free, total = torch.cuda.mem_get_info()
            self.gpu = max(self.gpu, total - free)


class Watch:
    """Follows a learner through the parts of its steps, and waits for the device between them.

    On a GPU it prints when each part begins, so that a killed process shows how far it got.
    """

    def __init__(self, learner: Learner) -> None:
        self.device, self.parameters = learner.device, learner.parameters
        self.step, self.part = Step(), PARTS[0]
        self._since = 0.0
        model, optimizer = learner.transformer, learner.optimizer
        model.register_forward_pre_hook(lambda *_: self.enter("forward"), prepend=True)
        model.register_forward_hook(lambda *_: self.enter("backward"))
        optimizer.register_step_pre_hook(lambda *_: self._check())
        optimizer.register_step_post_hook(lambda *_: self.enter("end"))

    def begin(self) -> None:
        self.step, self.part = Step(), PARTS[0]
        self._since = self._now()

    def enter(self, part: str) -> None:
        now = self._now()
        if self.part in PARTS:
            self.step.seconds[self.part] += now - self._since
        if self.device.type == "cuda":
            self.step.allocated.setdefault(part, torch.cuda.memory_allocated())
            say(f"  {part}: {torch.cuda.memory_allocated() / GIB:.1f} GiB, {self.step.total:.1f} s")
        self.part, self._since = part, now

    def _check(self) -> None:
        """Check that every gradient exists, outside the timed parts of the step.

        The learner itself checks that gradients are finite.
        """
        self.enter("check")
        grads = {name: p.grad for name, p in self.parameters.items()}
        missing = [name for name, grad in grads.items() if grad is None]
        if missing:
            raise SystemExit(f"error: no gradient for {', '.join(missing)}.")
        norms = torch.stack([grad.norm() for grad in grads.values() if grad is not None])
        self.step.moved = int(norms.count_nonzero())
        self.enter("optimizer")

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def measure(job: Job, steps: int) -> Measured:
    """Run this many updates; stop and say so when the GPU or the host runs out of memory."""
    found = Measured()
    open_console(True)
    setup = Setup.of_job(job)
    if setup.memory_warning is not None:
        say(setup.memory_warning)
    learner = watch = None
    try:
        started = time.perf_counter()
        learner = Learner(setup, LoadedModel.load(setup))
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()  # cached blocks left over from quantising
        say(f"model made in {time.perf_counter() - started:.0f} s")
        watch, found.adapted = Watch(learner), len(learner.parameters)
        batches = repeat(random_batch(job, setup.dtype, setup.clip_part))
        for index in range(1, steps + 1):
            watch.begin()
            watch.step.loss = learner.update(index, batches)["loss"]
            found.steps.append(watch.step)
            found.note_memory(setup.device, learner)
            say(f"step {index}/{steps}: {describe(watch.step)}; {describe_memory(found)}")
    except (RuntimeError, MemoryError) as error:
        where = "GPU" if isinstance(error, RuntimeError) else "host"
        reason = str(error).strip().partition("\n")[0]
        if where == "GPU" and not any(x in reason for x in ("out of memory", "ALLOC_FAILED")):
            raise
        found.note_memory(setup.device, learner)
        at = f"{watch.part} of step {len(found.steps) + 1}" if watch else "loading"
        found.complaint = f"out of {where} memory in {at}"
        say(f"{found.complaint}: {reason}; {describe_memory(found)}")
    return found


def describe(step: Step) -> str:
    parts = ", ".join(f"{part} {short(seconds)}" for part, seconds in step.seconds.items())
    return f"{short(step.total)} s ({parts}), loss {step.loss:.4f}, {step.moved} gradients not zero"


def describe_memory(found: Measured) -> str:
    sizes = {
        "peak": found.peak / GIB,
        "reserved": found.reserved / GIB,
        "of the GPU": found.gpu / GIB,
        "host": found.host_gib,
        "pinned": found.pinned / GIB,
    }
    return "GiB: " + ", ".join(f"{what} {size:.1f}" for what, size in sizes.items() if size)


# Beside the prediction


def gpu_found(device: torch.device) -> rates.Gpu | None:
    """Return the known GPU that matches a device by name, then by memory; None for others."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    size = torch.cuda.get_device_properties(device).total_memory / GIB
    alike = [gpu for gpu in rates.GPUS.values() if gpu.name.partition("_")[0] in name]
    return min(alike, key=lambda gpu: abs(gpu.memory - size), default=None)


def predicted_gib(made: ResourcePlan) -> dict[str, float]:
    """Return by moment the GiB that torch should have allocated: the plan's parts alive then."""
    parts = made.memory.gpu
    between = parts["frozen base"] + parts["LoRA, gradients, moments"] - 4 * made.model.lora
    kept = sum(parts.get(x, 0.0) for x in ("block inputs", "kept by blocks", "positions"))
    moments = {
        "GiB between steps": between,
        "GiB after the forward": between + kept,
        "GiB at the peak": made.memory.peak - parts["reserve"],
        "GiB pinned": made.memory.host.get("offload", 0.0),
    }
    return {moment: size / GIB for moment, size in moments.items()}


def measured_gib(found: Measured) -> dict[str, float | None]:
    """Return the measured GiB at the same moments; None for those not reached."""
    last = found.counted[-1].allocated if found.counted else {}
    moments: dict[str, float | None] = {
        "GiB between steps": last.get("forward"),
        "GiB after the forward": last.get("backward"),
        "GiB at the peak": found.peak or None,
        "GiB pinned": found.pinned or None,
    }
    return {moment: size and size / GIB for moment, size in moments.items()}


def section(
    job: Job, made: ResourcePlan, gpu: rates.Gpu | None, found: Measured, about: list[str]
) -> str:
    """Return one recipe's comparison in words and numbers."""
    rows: list[tuple[str, float, float | None]] = []
    if gpu is not None:
        rows.append(("seconds", made.seconds.total, found.seconds))
        measured = measured_gib(found)
        rows += [(part, size, measured[part]) for part, size in predicted_gib(made).items()]
    lines = ["| | predicted | measured | error |", "|---|---|---|---|"]
    for name, expected, was in rows:
        unknown = found.complaint and name == "GiB at the peak"  # a run that ended had none yet
        error = "-" if unknown else off(expected, was)
        lines.append(f"| {name} | {short(expected)} | {short(was)} | {error} |")
    return "\n\n".join(
        [
            *about,
            *([f"Ended early: {found.complaint}."] if found.complaint else []),
            *(["\n".join(lines)] if rows else []),
            *([f"Seconds predicted: {parts_of(made)}."] if gpu is not None else []),
            "\n".join(f"- step {i}: {describe(step)}" for i, step in enumerate(found.steps, 1))
            or "No step was finished.",
            f"The adapter has {found.adapted} tensors; the half that is zero at first learns "
            "first, the other half from step 2 on.",
            f"Attention computes {density_by_layer(made.densities)}, of {len(made.grid):,} tokens.",
            operations(job, made, found),
        ]
    )


def operations(job: Job, made: ResourcePlan, found: Measured) -> str:
    knobs, train = read_knobs(job.config), job.config.train
    samples = train.batch * train.gradient_accumulation
    once = work(made.model, made.grid, made.densities, knobs, Passes(1, 1, 1), samples)
    total, needed = made.flops.total / 1e12, once.total / 1e12
    text = (
        f"{short(total)} TFLOP an update by the plan's arithmetic, with dense attention "
        f"{short(made.flops.dense_total / 1e12)}; {short(needed)} without recomputation"
    )
    if found.seconds is None:
        return text + "."
    reached, useful = (short(x / found.seconds) for x in (total, needed))
    return f"{text}. Reached: {reached} TFLOP/s, {useful} without recomputation."


def parts_of(made: ResourcePlan) -> str:
    spent = {part.name: getattr(made.seconds, part.name) for part in fields(made.seconds)}
    return ", ".join(f"{name} {short(value)}" for name, value in spent.items() if value)


def row(name: str, made: ResourcePlan, gpu: rates.Gpu | None, found: Measured) -> str:
    """Return a recipe's line of the table."""
    seconds, peak = found.seconds, found.peak / GIB or None
    expected = None if gpu is None else made.seconds.total
    size = None if gpu is None else predicted_gib(made)["GiB at the peak"]
    split = [short(found.part(part)) for part in PARTS[1:]] if found.counted else []
    density = sum(made.densities) / len(made.densities)
    cells = {
        "recipe": name,
        "tokens": f"{len(made.grid):,}",
        "density": f"{density:.3f}",
        "s": found.complaint or short(seconds),
        "predicted s": short(expected),
        "s error": off(expected, seconds),
        "first s": short(found.steps[0].total if found.steps else None),
        "forward / backward / optimizer s": " / ".join(split) or "-",
        "peak GiB": short(peak),
        "predicted GiB": short(size),
        "GiB error": "-" if found.complaint else off(size, peak),
        "reserved GiB": short(found.reserved / GIB or None),
        "GPU GiB": short(found.gpu / GIB or None),
        "host GiB": short(found.host_gib),
        "pinned GiB": short(found.pinned / GIB or None),
        "PFLOP": short(made.flops.total / 1e15),
        "TFLOP/s": short(seconds and made.flops.total / 1e12 / seconds),
    }
    return f"| {' | '.join(cells[column] for column in COLUMNS)} |"


def off(expected: float | None, was: float | None) -> str:
    return "-" if not was or expected is None else f"{expected / was - 1:+.1%}"


# The file


def setup() -> str:
    """Describe the setup, which must be the same for everything in one result file.

    Sets the allocator's options first: asking for the GPU's name initialises CUDA, which reads
    them only then.
    """
    grow_segments()
    libraries = ", ".join(f"{x.__name__} {x.__version__}" for x in (diffusers, peft, accelerate))
    return f"{measured_on()}, {libraries}; one process, random weights."


def name_of(recipe: str, overrides: list[str]) -> str:
    """Return the recipe and the settings that can affect a step."""
    felt = sorted(x for x in overrides if not x.startswith((*PLACES, "recipe=")))
    return " ".join([recipe, *felt]).replace("|", "/")


def command(overrides: list[str], steps: int) -> str:
    """Return the command that produces the row, with the allocator's environment variables."""
    chosen = [f"{x}={shlex.quote(environ[x])}" for x in ALLOCATOR if x in environ]
    called = shlex.join([x for x in overrides if not x.startswith(PLACES)])
    return f"`{' '.join([*chosen, 'python benchmarks/training.py', called, f'steps={steps}'])}`"


def commit_here() -> str | None:
    """Return the working tree's commit; it ends in `-dirty` if there are uncommitted changes."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        run = subprocess.run(describe, cwd=RESULTS, capture_output=True, text=True)
    except OSError:
        return None
    return run.stdout.strip() or None


def rows_of(head: list[str]) -> dict[str, str]:
    """Return by recipe the lines of the table that ends a result's head."""
    lines = head[-1].splitlines()[2:] if head else []
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


def say(text: str) -> None:
    print(text, flush=True)


def read(argv: list[str]) -> tuple[Options, Config, list[str]]:
    """Split arguments into options, the config of all others, and those others as given."""
    options, overrides = split_options(Options, argv)
    if options.steps < 1:
        raise ConfigError(f"steps={options.steps} must be positive.")
    return options, load(overrides), overrides


def benchmark(argv: list[str]) -> Path:
    """Predict, measure, and write both; return the path of the result file."""
    options, config, overrides = read(argv)
    called = command(overrides, options.steps)
    alike = setup()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = gpu_found(device) if options.gpu is None else rates.gpu_named(options.gpu)
    path, name = dated(Path(options.out), "training"), name_of(config.recipe, overrides)
    resumed(path, alike)  # to fail before hours of work
    with tempfile.TemporaryDirectory() as nothing:
        config = replace(
            config,
            data=replace(config.data, path=nothing),
            run=replace(config.run, dir=nothing),
        )
        job = Job.from_config(config, published=True)
        made = plan(job, gpu or rates.MEASURED)
        commit = options.commit or commit_here() or "unknown"
        about = [called, told(gpu, commit)]
        say(f"{name}\n{alike}\n{about[1]}")
        if gpu is not None:
            peaks = ", ".join(f"{k} {short(v)}" for k, v in predicted_gib(made).items())
            say(f"predicted: {short(made.seconds.total)} s ({parts_of(made)}); {peaks}")
        found = measure(replace(job, family=untrained(job.family, device)), options.steps)
    head, sections = resumed(path, alike)  # read again: another recipe may have finished meanwhile
    rows = rows_of(head) | {name: row(name, made, gpu, found)}
    sections[name] = section(job, made, gpu, found, about)
    table = [f"| {' | '.join(COLUMNS)} |", f"|{len(COLUMNS) * '---|'}", *rows.values()]
    title = f"# Training steps, {date.today()}"
    write(path, with_sections([title, alike, NOTES, "\n".join(table)], sections))
    say(f"{rows[name]}\n\n{sections[name]}\n\nwritten to {path}")
    return path


def told(gpu: rates.Gpu | None, commit: str) -> str:
    if gpu is None:
        return "Not predicted: no GPU that the plan knows."
    return f"Predicted for {gpu.name} before the run, by commit {commit}."


if __name__ == "__main__":
    from_command_line(benchmark, __doc__)
