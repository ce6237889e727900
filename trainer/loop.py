"""The training run: from a config to an adapter."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..data.dataset import LatentDataset, read_text, split
from ..data.loader import Loader
from ..data.sampler import SeededBatches
from ..sparse.draw import draw_pattern
from . import summary
from .adapter import lora
from .clips import check_clips, extra_captions, prepare_data
from .config.recipe import pattern_to_dict, save, to_dict, to_yaml
from .config.values import ConfigError
from .families.text import Text
from .job import Job
from .parallel.sequence import any_process
from .plan.advice import how_to_go_on
from .plan.trial_step import wants_trial_step
from .run import checkpoint
from .run.attention_speedup import Speedup, measure_speedup
from .run.metrics import Metrics
from .run.progress import StepProgress, open_console
from .run.resume import Position, check_pattern, check_resumable, newest_everywhere
from .run.saving import Saver
from .run.signals import REQUEUE, StopSignals
from .run.watchdog import Watch
from .sampling.validate import Validator
from .step import Learner, LoadedModel, Setup

log = logging.getLogger(__name__)


def train(job: Job) -> Trainer:
    """Run a job to its last step; a job that was stopped continues from its newest checkpoint.

    Caches the data, loads the model, trains the adapter, validates, samples and saves. Everything
    random is a function of (seed, step, process), so a run that stops and resumes equals one that
    never stopped. All processes of the run call it. Returns the trainer of the complete run.

    Raises ConfigError for what cannot be trained, and SystemExit with `signals.REQUEUE` if a signal
    stopped the run, which is then saved.
    """
    check_trainable(job)
    setup = Setup.of_job(job)
    console = open_console(setup.processes.is_main)
    with Watch(60 * job.config.parallel.timeout) as watch:
        trainer = _prepare(setup, console, watch)
        complete = trainer.fit()
    if not complete:
        raise SystemExit(REQUEUE)
    return trainer


def check_trainable(job: Job) -> None:
    """Raise ConfigError if there is no data to train on, or the run folder is another run's."""
    check_clips(job)
    _check_folder("run.dir", job.config.run_dir)
    _check_folder("cache.dir", Path(job.config.cache.dir))
    check_resumable(job.config, job.config.run_dir)


def _check_folder(key: str, folder: Path) -> None:
    """Raise ConfigError unless files can be written to the folder, or it can be created."""
    path = folder.absolute()
    existing = next(part for part in (path, *path.parents) if part.exists())
    if not existing.is_dir():
        raise ConfigError(f"{key}={folder}: {existing} is a file, not a folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}={folder}: no permission to write to {existing}.")


@dataclass(frozen=True)
class TrainingData:
    """The cached clips of a run, and texts that are encoded beside their captions.

    clips: to train on. texts: the prompts of sample videos, and "" where guidance or caption
    dropout needs it.
    """

    clips: LatentDataset
    heldout: LatentDataset
    texts: Mapping[str, Text]


class Trainer:
    """Training, validation and saving, from finished parts: data, learner, saver, metrics.

    position: where the run begins. speedup: of a sparse layer's attention over dense, or why it
    was not measured. metrics: in the main process alone. validator: in processes that take part in
    validation, which are the main one, those that share its clips and, where a forward needs all
    processes, all of them.
    """

    def __init__(
        self,
        learner: Learner,
        data: TrainingData,
        position: Position,
        *,
        saver: Saver,
        metrics: Metrics | None,
        validator: Validator | None,
        speedup: Speedup | str,
        console: Console,
    ) -> None:
        self.learner, self.data, self.position = learner, data, position
        self.saver, self.metrics, self.validator = saver, metrics, validator
        self.speedup, self.console = speedup, console
        self.setup, self.job, self.config = learner.setup, learner.job, learner.config
        self.processes, self.watch = learner.setup.processes, learner.watch
        self.run_dir = self.config.run_dir

    def fit(self) -> bool:
        """Run to the last step; return False if a signal stopped the run before it."""
        start, steps = self.position.step, self.config.train.steps
        if start >= steps:
            log.info(f"{self.run_dir} is complete at step {start}; train.steps={steps}.")
        with self._saved_when_out_of_memory(), StopSignals() as signals:
            self._validate(start)
            complete = self._train(signals)
        self._finish(complete)
        return complete

    def _train(self, signals: StopSignals) -> bool:
        """Make the updates; return whether the last step was reached."""
        start, steps, batches = self.position.step, self.config.train.steps, self._batches()
        main, device = self.processes.is_main, self.setup.device
        ratio = self.speedup.ratio if isinstance(self.speedup, Speedup) else self.speedup
        with StepProgress(self.console, start, steps, self.setup.cost.density) as progress:
            for step in range(start + 1, steps + 1):
                row = self.learner.update(step, batches) | {"attention_layer_speedup": ratio}
                progress.advance(step, row)
                if self.learner.offload is not None and step == start + 1:
                    size = self.learner.offload.pool.size / 2**30
                    log.info(f"memory.offload now holds {size:.1f} GiB of host memory.")
                if self.metrics is not None and step % self.config.log.every == 0:
                    self.metrics.write(row)
                due = main and self.saver.due(step)
                due, stop = any_process(device, due, signals.received is not None)
                stop = stop and step < steps
                if due or stop or step == steps:
                    self._save(step, run_ends=stop or step == steps)
                if stop:
                    name = signals.received or "a signal to another process"
                    log.info(f"Stopped by {name} after step {step}, which is saved: requeue it.")
                    return False
                self._validate(step)
        return True

    def _batches(self) -> Iterator[dict[str, Any]]:
        return iter(Loader(self.data.clips, self.position.sampler, self.config.train.workers))

    def _validate(self, step: int) -> None:
        """Validate after `step` if the config asks for it and it has not been done."""
        if step % self.config.validate.every and step != self.config.train.steps:
            return
        self.watch.enter(f"validation at step {step}", limited=False)
        main, validator = self.processes.is_main, self.validator
        due = main and validator is not None and validator.missing(step)
        if any_process(self.setup.device, due)[0]:
            if validator is not None:
                validator.run(step)
            # Wait here, where time has no limit; in the next step the others would wait within it.
            self.processes.wait()

    def _save(self, step: int, *, run_ends: bool) -> None:
        """Save after `step`. If the run ends here, a save that fails is tried again, and the run
        fails with it in the end."""
        self.watch.enter(f"saving step {step}", limited=False)
        saved, progress = True, self.position.progress(step)
        state = self.learner.engine.gather()
        if self.processes.is_main:
            save = self.saver.save_with_retries if run_ends else self.saver.save
            saved = save(state, progress)
        # All wait here, where time has no limit: a disk may be slow.
        failed = any_process(self.setup.device, not saved)[0]
        if run_ends and failed:
            minutes = self.config.checkpoint.retry_minutes
            raise SystemExit(
                f"error: step {step} could not be saved within checkpoint.retry_minutes="
                f"{minutes:g}: updates since the newest checkpoint in {self.saver.folder} "
                "are lost. Free space and run the same command to continue from that checkpoint."
            )

    @contextlib.contextmanager
    def _saved_when_out_of_memory(self) -> Iterator[None]:
        """On running out of memory, save the last completed step and exit with advice.

        With several processes only the main one can save, and only if it is the one that fails and
        nothing is sharded: gathering shards takes all processes.
        """
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError) as error:
            newest = checkpoint.latest(self.saver.folder)
            saved = 0 if newest is None else checkpoint.load_progress(newest).step
            step, engine = self.learner.completed_step, self.learner.engine
            can_save = self.processes.is_main and not engine.sharded
            if can_save and step is not None and step > saved:
                self.saver.save(engine.gather(), self.position.progress(step))
            raise _out_of_memory(self.setup, error) from error

    def _finish(self, complete: bool) -> None:
        """Report a complete run, close the metrics, and leave together."""
        self.watch.enter("the end", limited=False)
        if self.metrics is not None:
            if complete:
                self._report(self.metrics)
            self.metrics.close()
        # The process group is not destroyed here: DDP's reducer still refers to it, and destroying
        # it would join gloo's threads while holding the GIL that they wait for.
        self.processes.wait()

    def _report(self, metrics: Metrics) -> None:
        """Draw the losses and print the summary."""
        rows = metrics.rows()
        summary.save_figure(summary.draw_losses(rows), self.run_dir / "loss.png")
        metrics.image("losses", self.run_dir / "loss.png", self.config.train.steps)
        names = (lora.WEIGHTS, "metrics.csv", "mask.png", "loss.png")
        assert self.validator is not None  # the main process takes part in validation
        samples = self.validator.samples(self.config.train.steps)
        files = [*(self.run_dir / name for name in names), *samples]
        speedup = str(self.speedup)
        self.console.print(summary.summary(self.job, self.setup.cost, speedup, rows, files))
        note = self.job.rope.stock_note("Stock pipelines apply")
        if note is not None:
            log.info(note)


# Before the first step


def _prepare(setup: Setup, console: Console, watch: Watch) -> Trainer:
    """Announce the run, prepare data and model, restore the newest checkpoint, try a step."""
    job, config, main = setup.job, setup.job.config, setup.processes.is_main
    _announce(setup, console)
    watch.enter("preparing the data", limited=False)
    data = _load_data(setup, console)
    watch.enter("loading the model", limited=False)
    model = LoadedModel.load(setup)
    learner = Learner(setup, model, watch=watch, empty_caption=data.texts.get(""))
    transformer = learner.transformer
    adapter = lora.AdapterWriter(transformer, job.family, job.adapter_entry())
    saver = Saver(config.run_dir, config.checkpoint, adapter)
    position = _restore(learner, data, saver)
    trial = wants_trial_step(config.memory, setup.device) and model.engine.supports_trial_step
    if position.step < config.train.steps and trial:
        _try_step(learner, data)
    speedup = _measure_attention(setup)
    metrics = _open_metrics(setup, position.step) if main else None
    validator = None
    sharded = model.engine.sharded
    if setup.processes.sequence.data_rank == 0 or sharded:
        validator = Validator(
            job,
            transformer,
            data.heldout,
            data.texts,
            metrics,
            device=setup.device,
            dtype=setup.dtype,
            wait=setup.processes.wait if sharded else None,
        )
    return Trainer(
        learner,
        data,
        position,
        saver=saver,
        metrics=metrics,
        validator=validator,
        speedup=speedup,
        console=console,
    )


def _announce(setup: Setup, console: Console) -> None:
    """Print the settings and what follows from them; write config.yaml and mask.png."""
    job, config, grid, cost = setup.job, setup.job.config, setup.grid, setup.cost
    console.print(to_yaml(config).rstrip(), markup=False, highlight=False)
    note = ": the eager reference, exact but slow; for small models only"
    log.info(
        f"Attention backend on {setup.device}: {setup.backend}"
        f"{note if setup.backend == 'reference' else ''}."
    )
    log.info(
        f"{job.native_frames} -> {job.frames} frames: {len(grid):,} tokens "
        f"({grid.frames} x {grid.height} x {grid.width}). Attention computes "
        f"{summary.density_by_layer(setup.layer_densities)}."
    )
    if job.rope.policy != "native":
        log.info(f"RoPE: {job.rope.describe(job.geometry.rope)}.")
    sparse, heads = config.sparse, job.geometry.heads
    if sparse.density is not None:
        log.info(f"sparse.density sets {summary.solved_density(job, cost.layer_density)}.")
    rounded = job.pattern.note(grid.without_text(), sparse.block)
    if rounded is not None:
        log.info(rounded)
    if setup.memory_warning is not None:
        log.warning(setup.memory_warning)
    if setup.processes.is_main:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        save(config, config.run_dir / "config.yaml")
        title = (
            f"{job.pattern}, {grid.frames} x {grid.height} x {grid.width} tokens, density "
            f"{cost.layer_density:.1%}"
        )
        figure = draw_pattern(job.pattern, grid, sparse.block, title, heads)
        summary.save_figure(figure, config.run_dir / "mask.png")


def _load_data(setup: Setup, console: Console) -> TrainingData:
    """Fill the cache, each process its share, and split its clips."""
    config, processes = setup.job.config, setup.processes
    prepared = prepare_data(setup.job, processes.accelerator, setup.dtype)
    console.print(str(prepared.report), markup=False, highlight=False)
    try:
        clips, heldout = split(prepared.entries, config.validate.videos)
    except ValueError as error:
        raise ConfigError(f"validate.videos={config.validate.videos}: {error}") from error
    log.info(f"{len(clips)} clips to train on, {len(heldout)} held out.")
    # Processes that share a clip read a part each; held-out clips are few, and read whole.
    pinned = setup.device.type == "cuda"
    return TrainingData(
        LatentDataset(clips, part=setup.clip_part, pinned=pinned),
        LatentDataset(heldout),
        {text: read_text(prepared.texts[text]) for text in extra_captions(config)},
    )


def _restore(learner: Learner, data: TrainingData, saver: Saver) -> Position:
    """Load the newest checkpoint, if there is one; return where the run stands."""
    setup, train_config = learner.setup, learner.config.train
    entries, sequence = data.clips.entries, setup.processes.sequence

    def position(step: int, drawn: list[int] | None) -> Position:
        sampler = SeededBatches(
            len(entries),
            train_config.batch,
            train_config.seed,
            drawn=drawn,
            rank=sequence.data_rank,
            num_ranks=sequence.data_size,
            buckets=[entry.bucket for entry in entries],
        )
        clips = checkpoint.fingerprint(entry.id for entry in entries)
        batches = train_config.gradient_accumulation
        return Position(step, sampler, batches, sequence.data_size, clips)

    beginning = position(0, None)
    newest = newest_everywhere(saver.folder)
    if newest is None:
        return beginning
    progress = checkpoint.load_progress(newest)
    changed = checkpoint.check_continues(newest, progress, beginning.progress(progress.step))
    if changed is not None:
        log.warning(changed)
    check_pattern(newest, pattern_to_dict(setup.job.pattern))
    state = checkpoint.load(newest, learner.parameters)
    try:
        learner.restore(state, progress.step)
    except ValueError as error:
        raise ConfigError(
            f"{newest} was written under another train.optimizer: {error}."
        ) from error
    if setup.processes.is_main:
        # The run may have ended between the checkpoint and this copy.
        saver.publish(newest)
    log.info(f"Resuming from {newest} at step {progress.step}.")
    return position(progress.step, progress.drawn)


def _try_step(learner: Learner, data: TrainingData) -> None:
    """Try a step of the longest shape; it changes nothing, and ends the run if it does not fit."""
    try:
        found = learner.trial_step(read_text(data.clips.entries[0].text))
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(learner.setup, error, " in the trial step before the run") from error
    log.info(f"The trial step fits: {found}.")


def _out_of_memory(setup: Setup, error: BaseException, where: str = "") -> SystemExit:
    reason = str(error).strip().partition("\n")[0]
    newest = checkpoint.latest(setup.job.config.run_dir / "checkpoints")
    change = how_to_go_on(setup.job, setup.device, newest)
    return SystemExit(f"error: out of memory{where}: {reason}\n{change}")


def _measure_attention(setup: Setup) -> Speedup | str:
    """Return a sparse layer's speedup over dense attention, or why it was not measured."""
    geometry = setup.job.geometry
    speedup = measure_speedup(
        setup.job.attention(),  # of one process, whoever shares a clip
        setup.grid,
        layers=geometry.layers,
        heads=geometry.heads,
        head_dim=geometry.head_dim,
        device=setup.device,
        dtype=setup.dtype,
    )
    log.info(f"Attention speedup of a sparse layer over dense, forward and backward: {speedup}.")
    return speedup


def _open_metrics(setup: Setup, start: int) -> Metrics:
    """Open metrics.csv, and wandb if the config asks for it."""
    config = setup.job.config
    metrics = Metrics(config.run_dir, resumed_step=start)
    if config.log.wandb:
        solved = {
            "pattern": pattern_to_dict(setup.job.pattern),
            "density_by_layer": setup.layer_densities,
        }
        metrics.start_wandb(config.log.project, to_dict(config) | {"attention": solved})
    metrics.image("mask", config.run_dir / "mask.png", start)
    return metrics
