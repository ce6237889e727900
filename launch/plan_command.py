"""`longreel plan`: what a recipe takes on a GPU that need not be there, and what would fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from ..trainer.config.fields import POSITIVE, setting
from ..trainer.config.values import ConfigError

if TYPE_CHECKING:
    from ..trainer.job import Job
    from ..trainer.plan.predict import ResourcePlan
    from ..trainer.plan.rates import Gpu
    from ..trainer.plan.sampling import SamplingPlan

USAGE = "longreel plan recipe=NAME [key=value ...]"
TAKES_RECIPE = True


@dataclass(frozen=True)
class PlanOptions:
    """The options of `longreel plan` beside a recipe's settings."""

    gpu: str = setting("h200", "The GPU, which need not be there: h200, h100, a100 or a100_40.")
    gpus: int | None = setting(
        None, "How many of them; null takes those that share one clip.", POSITIVE
    )
    memory: float | None = setting(
        None, "GiB of one GPU, if it has another memory than the named one.", POSITIVE
    )
    price: float | None = setting(None, "Price of one GPU for an hour, in any currency.", POSITIVE)
    clips: int = setting(100, "Clips in the cache, for its size on disk.", POSITIVE)


OPTIONS = PlanOptions


def plan(argv: list[str]) -> None:
    """Print tokens, densities, operations, memory by part, seconds, cost and lengths that fit."""
    from ..trainer.config.recipe import load, split_options

    options, rest = split_options(PlanOptions, argv)
    config = load(rest)

    from ..trainer.job import Job
    from ..trainer.plan import predict, rates
    from ..trainer.plan.sampling import plan_sampling
    from ..trainer.run.progress import quiet_libraries

    gpu = rates.gpu_named(options.gpu)
    if config.memory.base_dtype == "float8" and not gpu.float8:
        raise ConfigError(
            f"memory.base_dtype=float8: gpu={gpu.name} does not multiply in float8, as GPUs since "
            "Ada do: use bfloat16."
        )
    quiet_libraries()
    job = Job.from_config(config, published=True)
    made = predict.plan(job, gpu, gpus=options.gpus, memory=options.memory)
    rows = [
        *_work(job, made),
        *_memory(job, made, gpu),
        *_time(job, made, options),
        *_faster(job, made, gpu),
        ("sampling", _sampling(plan_sampling(job, gpu), made.memory_limit)),
        ("rates", rates.note(gpu)),
        ("note", rates.CALIBRATION),
    ]
    for name, text in rows:
        print(f"{name + ':':13}{text}")


Rows = Iterator[tuple[str, str]]


def _work(job: Job, made: ResourcePlan) -> Rows:
    from ..trainer.summary import density_by_layer

    config, model, grid, flops = job.config, made.model, made.grid, made.flops
    adapter = f"LoRA of rank {model.rank} with {model.lora / 1e6:.1f} M"
    yield "model", f"{config.model.path}, {model.params / 1e9:.2f} B parameters, {adapter}"
    size = f"{config.height} x {config.width}"
    yield "length", f"{job.native_frames} -> {job.frames} frames of {size}"
    size = f"{grid.frames} x {grid.height} x {grid.width} video and {grid.text} text tokens"
    yield "tokens", f"{len(grid):,}: {size}"
    sharing = config.parallel.sequence
    if sharing > 1:
        tokens, heads = -(-grid.video // sharing) + grid.text, job.geometry.heads // sharing
        yield (
            "sharing",
            f"{sharing} GPUs a sample: {tokens:,} tokens each, {heads} heads in attention; each "
            f"sends {_short(made.exchanged / 1e9)} GB an update",
        )
    engine = config.parallel.engine or "ddp"
    if engine == "zero2":
        yield (
            "sharding",
            "zero2 shards gradients and moments, which a LoRA has few of; zero3 and fsdp2 shard "
            "the frozen base too",
        )
    elif engine != "ddp":
        yield (
            "sharding",
            f"{engine} keeps 1/{made.gpus} of the frozen base on each GPU, which receives the "
            f"rest, {_short(made.gathered / 1e9)} GB an update, while blocks compute; not in the "
            "time below",
        )
    yield "attention", density_by_layer(made.densities)
    parts = {
        "attention": flops.attention,
        "dense": flops.dense_attention,
        "matrix products": flops.matmul,
        "LoRA": flops.lora,
    }
    attention, dense, matmul, lora = (f"{k} {_short(v / 1e15)}" for k, v in parts.items())
    yield (
        "operations",
        f"{_short(flops.total / 1e15)} PFLOP an update, with dense attention "
        f"{_short(flops.dense_total / 1e15)}: {attention} ({dense}), {matmul}, {lora}; "
        f"element-wise {_short(flops.elementwise / 1e12)} TB moved",
    )


def _memory(job: Job, made: ResourcePlan, gpu: Gpu) -> Rows:
    from ..trainer.plan.advice import advice
    from ..trainer.plan.estimate import read_knobs
    from ..trainer.plan.predict import longest_training

    memory, limit = made.memory, made.memory_limit
    lines = [f"{_gib(memory.peak)} of {_gib(limit)}: {made.verdict}"]
    lines += [f"  {part:30}{size / 2**30:7.1f} GiB" for part, size in memory.gpu.items()]
    yield "memory", "\n".join(lines)
    stages = ", then ".join(f"{stage} {_gib(size)}" for stage, size in memory.host.items())
    yield "host memory", f"{_gib(memory.host_peak)} a process ({stages})"
    longest = longest_training(job, made.model, limit, read_knobs(job.config, made.gpus))
    known = "no length trains" if longest is None else f"{longest} frames train"
    native = job.native_frames
    less = "" if longest is None or longest >= native else f", less than the native {native}"
    yield "longest", f"{known} in {_gib(limit)} as set{less}"
    if not made.fits:
        yield "change", advice(job, made.model, limit, gpus=made.gpus, float8=gpu.float8)


def _time(job: Job, made: ResourcePlan, options: PlanOptions) -> Rows:
    seconds = made.seconds
    spent = {part.name: getattr(seconds, part.name) for part in fields(seconds)}
    parts = ", ".join(f"{name} {_short(value)}" for name, value in spent.items() if value)
    samples = "1 sample" if made.samples == 1 else f"{made.samples} samples"
    where = f"{made.gpus} x {options.gpu}"
    yield (
        "time",
        f"{_short(seconds.total)} s an update of {samples} on {where} ({parts}); dense "
        f"{_short(made.dense_seconds)} s",
    )
    cost = "" if options.price is None else f", costs {made.gpu_hours * options.price:,.0f}"
    hours = f"{_short(made.gpu_hours / made.gpus)} hours for {job.config.train.steps:,} updates"
    yield "run", f"{hours}, {_short(made.gpu_hours)} GPU hours{cost}"
    sizes = {"latents": made.clip_bytes, "text, at most": made.caption_bytes}
    total = _parts({part: options.clips * size for part, size in sizes.items()})
    yield "cache", f"{total} for {options.clips} clips"


def _faster(job: Job, made: ResourcePlan, gpu: Gpu) -> Rows:
    from ..trainer.plan.faster import faster

    if found := faster(job, made, gpu):
        sizes = f"{_gib(found.memory.peak)}, host {_gib(found.memory.host_peak)}"
        yield "faster", f"{_short(found.seconds)} s in {sizes}, with {' '.join(found.settings)}"


def _sampling(made: SamplingPlan, limit: float) -> str:
    stages = {"text": made.text, "transformer": made.transformer, "decoding": made.decoding}
    peaks = ", ".join(f"{name} {_gib(sum(parts.values()))}" for name, parts in stages.items())
    fits = "fits" if made.peak <= limit else "does not fit"
    forwards = f"{made.forwards} forwards"
    if made.samples > 1:
        forwards += f" of {made.samples} samples"
    return (
        f"{_gib(made.peak)}: {fits} ({peaks}); {_short(made.seconds.total)} s in {forwards}, text "
        "encoder and VAE not counted"
    )


def _short(number: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _parts(sizes: Mapping[str, float]) -> str:
    each = ", ".join(f"{part} {_gib(size)}" for part, size in sizes.items())
    return f"{_gib(sum(sizes.values()))} ({each})"
