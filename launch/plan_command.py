"""`longreel plan`: what a recipe takes on a GPU that need not be there, and what would fit."""

from __future__ import annotations

from dataclasses import dataclass

from ..trainer.config import Config, ConfigError, load, parse
from ..trainer.job import Job
from ..trainer.settings import check_known, leaf_types

PLAN_USAGE = """\
longreel plan recipe=NAME [key=value ...]               predict a recipe's memory, time and cost,
                                                        and what fits; no GPU, no weights"""


@dataclass(frozen=True)
class PlanOptions:
    """Keys of `longreel plan` beside a recipe's. gpu: a name of `rates.GPUS`. memory: GiB of one,
    if another than that GPU's. price: of one for an hour, in any currency. clips: in the cache."""

    gpu: str = "h200"
    gpus: int = 1
    memory: float | None = None
    price: float | None = None
    clips: int = 100


def plan(argv: list[str]) -> None:
    """Print tokens, densities, operations, memory by part, seconds, cost and lengths that fit."""
    options, config = _read(argv)

    from ..trainer import rates
    from ..trainer.plan import longest_training, plan, plan_sampling, remedies
    from ..trainer.progress import quiet_libraries
    from ..trainer.report import density_by_layer

    gpu = rates.gpu_named(options.gpu)
    quiet_libraries()
    job = Job.from_config(config, published=True)
    made = plan(job, gpu, gpus=options.gpus, memory=options.memory)
    config, train, limit = job.config, job.config.train, made.memory_limit
    grid, memory = made.grid, made.memory
    size = f"{grid.frames} x {grid.height} x {grid.width} video and {grid.text} text tokens"
    _line("model", f"{config.model.path}, {made.model.params / 1e9:.2f} B parameters, LoRA of rank "
          f"{made.model.rank} with {made.model.lora / 1e6:.0f} M")  # fmt: skip
    _line("length", f"{job.native_frames} -> {job.frames} frames of {config.height} x "
          f"{config.width}")  # fmt: skip
    _line("tokens", f"{len(grid):,}: {size}")
    _line("attention", density_by_layer(made.densities))

    flops = made.flops
    _line("operations", f"{flops.total / 1e15:.4g} PFLOP an update, "
          f"{flops.dense_total / flops.total:.1f}x fewer than dense: attention "
          f"{flops.attention / 1e15:.4g} (dense {flops.dense_attention / 1e15:.4g}), matrix "
          f"products {flops.matmul / 1e15:.4g}, LoRA {flops.lora / 1e15:.3g}; element-wise "
          f"{flops.elementwise / 1e12:.3g} TB moved")  # fmt: skip

    verdict = "fits" if made.fits else "does not fit"
    _line("memory", f"{_gib(memory.peak)} of {_gib(limit)}: {verdict}")
    for part, size in memory.gpu.items():
        print(f"  {part:32}{size / 2**30:8.1f} GiB")
    _line("host memory", _parts(memory.host))

    seconds = made.seconds
    parts = ", ".join(
        f"{name} {getattr(seconds, name):.3g}"
        for name in ("attention", "matmul", "lora", "elementwise", "offload")
        if getattr(seconds, name)
    )
    _line("time", f"{seconds.total:.3g} s an update of {made.samples} samples on {made.gpus} "
          f"{gpu.name} ({parts}); dense {made.dense_seconds:.3g} s")  # fmt: skip
    hours = f"{made.gpu_hours / made.gpus:.3g} h for {train.steps:,} updates"
    cost = "" if options.price is None else f", costs {made.gpu_hours * options.price:,.0f}"
    _line("run", f"{hours}, {made.gpu_hours:.3g} GPU hours{cost}")
    latents, text = options.clips * made.clip_bytes, options.clips * made.caption_bytes
    _line("cache", f"{_parts({'latents': latents, 'text, at most': text})} for {options.clips} "
          "clips")  # fmt: skip

    longest = longest_training(job, made.model, limit)
    known = "none" if longest is None else f"{longest} frames train in {_gib(limit)} as set"
    _line("longest", known)
    if not made.fits:
        turned = remedies(config, made.model, train.batch * len(grid), limit)
        steps = "; then ".join(f"{setting} ({_gib(peak)})" for setting, peak in turned.items())
        short = [*turned.values()][-1:] > [limit] or not turned
        end = "no setting is enough: fewer frames, or a GPU with more memory" if short else ""
        _line("change", "; ".join(filter(None, (steps, end))))

    sampling = plan_sampling(job, gpu)
    stages = {
        "text": sampling.text,
        "transformer": sampling.transformer,
        "decoding": sampling.decoding,
    }
    peaks = ", ".join(f"{name} {_gib(sum(parts.values()))}" for name, parts in stages.items())
    fits = "fits" if sampling.peak <= limit else "does not fit"
    together = f" of {sampling.samples} samples" if sampling.samples > 1 else ""
    _line("sampling", f"{_gib(sampling.peak)}: {fits} ({peaks}); {sampling.seconds.total:.4g} s in "
          f"{sampling.forwards} forwards{together}, without text encoder and VAE")  # fmt: skip
    _line("rates", rates.note(gpu))
    _line("note", rates.CALIBRATION)


def _read(argv: list[str]) -> tuple[PlanOptions, Config]:
    """The options among the arguments, and the recipe of the rest."""
    names = leaf_types(PlanOptions)
    keys = [argument.partition("=")[0] for argument in argv]
    plain = [key for key in keys if key and "." not in key]
    check_known(plain, ["recipe", *names, *leaf_types(Config)])
    own = [a for a, key in zip(argv, keys, strict=True) if key in names]
    options = parse(PlanOptions, own)
    for key in ("gpus", "memory", "price", "clips"):
        value = getattr(options, key)
        if value is not None and value <= 0:
            raise ConfigError(f"{key}={value} must be positive.")
    return options, load([argument for argument in argv if argument not in own])


def _line(name: str, text: str) -> None:
    print(f"{name + ':':13}{text}")


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _parts(sizes: dict[str, float]) -> str:
    total = _gib(sum(sizes.values()))
    return f"{total} ({', '.join(f'{part} {_gib(size)}' for part, size in sizes.items())})"
