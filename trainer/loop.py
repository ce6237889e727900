"""The training run: from a config to an adapter."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from ..data.dataset import LatentDataset, read_text, split
from ..data.loader import Loader
from ..data.prepare import Prepared
from ..data.sampler import SeededBatches
from ..sparse.draw import draw_pattern
from . import summary
from .adapter import lora
from .clips import check_clips, extra_captions, prepare_data
from .config.recipe import pattern_to_dict, save, to_dict, to_yaml
from .config.values import ConfigError
from .job import Job
from .parallel.sequence import any_process
from .plan.predict import how_to_go_on
from .plan.trial_step import is_probed
from .run import checkpoint
from .run.attention_speedup import Speedup, measure_speedup
from .run.metrics import Metrics
from .run.progress import StepProgress, open_console
from .run.resume import check_resumable
from .run.saving import Saver
from .run.signals import REQUEUE, StopSignals
from .sampling.validate import Validator
from .step import Learner

log = logging.getLogger(__name__)

# Seconds between looks for what another machine has written: network file systems answer from
# memory for up to a minute.
SHOWN_LATE = (0, 5, 20, 45)


def check_trainable(job: Job) -> None:
    """Raise ConfigError if there is no data to train on, or the run folder is another run's."""
    check_clips(job)
    _check_folder("run.dir", job.config.run_dir)
    _check_folder("cache.dir", Path(job.config.cache.dir))
    check_resumable(job.config, job.config.run_dir)


def _check_folder(key: str, folder: Path) -> None:
    """Files can be written to the folder, or it can be made."""
    path = folder.absolute()
    existing = next(part for part in (path, *path.parents) if part.exists())
    if not existing.is_dir():
        raise ConfigError(f"{key}={folder}: {existing} is a file, not a folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}={folder}: nothing can be written to {existing}.")


class Trainer:
    """One run: caches the data, trains the LoRA, validates, samples, saves, resumes.

    Everything random is a function of (seed, step, process), so a run that stops and goes on equals
    one that never stopped. learner: what is trained, and one update of it.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.config = job.config
        self.run_dir = job.config.run_dir
        check_trainable(job)
        self.learner = Learner(job)
        self.accelerator, self.sequence = self.learner.accelerator, self.learner.sequence
        self.console = open_console(self.accelerator.is_main_process)

    def fit(self) -> None:
        """Run to the last step. The same command again goes on from the newest checkpoint.

        Raises SystemExit with `signals.REQUEUE` if a signal stopped the run, which is then saved.
        """
        with self.learner.watch:
            complete = self._run()
        if not complete:
            raise SystemExit(REQUEUE)

    def _run(self) -> bool:
        """Whether the run is complete."""
        self._announce()
        self.learner.watch.enter("preparing the data", limited=False)
        prepared = self._prepare_data()
        self.dataset, heldout = self._split(prepared)
        if self.config.train.caption_dropout:
            self.learner.empty_caption = read_text(prepared.texts[""])
        self.learner.watch.enter("loading the model", limited=False)
        self.learner.load()
        self.saver = Saver(self.run_dir, self.config.checkpoint, self._write_adapter)
        start = self._restore()
        steps = self.config.train.steps
        probed = is_probed(self.config.memory, self.learner.device)
        if start < steps and probed and self.learner.engine.probes:
            self._probe_step()
        speedup = self._measure_attention()
        ratio = speedup.ratio if isinstance(speedup, Speedup) else speedup
        if self.accelerator.is_main_process:
            self._open_log(start)
        if self._validates:
            self.validator = self._make_validator(prepared, heldout)
        if start >= steps:
            log.info(f"{self.run_dir} is complete at step {start}; train.steps={steps}.")
        with self._keeping_what_is_learnt(start), StopSignals() as signals:
            self._validate(start)
            complete = self._train(start, ratio, signals)
        self._finish(str(speedup) if complete else None)
        return complete

    # Before the first step

    def _announce(self) -> None:
        self.console.print(to_yaml(self.config).rstrip(), markup=False, highlight=False)
        note = ": the eager oracle, right but slow; meant for small models"
        log.info(
            f"Attention backend on {self.learner.device}: {self.learner.backend}"
            f"{note if self.learner.backend == 'reference' else ''}."
        )
        job, grid = self.job, self.learner.grid
        log.info(
            f"{job.native_frames} -> {job.frames} frames: {len(grid):,} tokens "
            f"({grid.frames} x {grid.height} x {grid.width}). Attention computes "
            f"{summary.density_by_layer(self.learner.layer_densities)}."
        )
        if job.rope.policy != "native":
            log.info(f"RoPE: {job.rope.describe(job.geometry.rope)}.")
        sparse, heads = self.config.sparse, job.geometry.heads
        if sparse.density is not None:
            achieved = self.learner.cost.layer_density
            log.info(f"sparse.density sets {summary.solved_density(job, achieved)}.")
        rounded = job.pattern.note(grid.without_text(), sparse.block)
        if rounded is not None:
            log.info(rounded)
        if self.learner.memory_warning is not None:
            log.warning(self.learner.memory_warning)
        if self.accelerator.is_main_process:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            save(self.config, self.run_dir / "config.yaml")
            title = (
                f"{job.pattern}, {grid.frames} x {grid.height} x {grid.width} tokens, density "
                f"{self.learner.cost.layer_density:.1%}"
            )
            figure = draw_pattern(job.pattern, grid, sparse.block, title, heads)
            summary.save_figure(figure, self.run_dir / "mask.png")

    def _prepare_data(self) -> Prepared:
        """All processes fill the cache, each its share."""
        prepared = prepare_data(self.job, self.accelerator, self.learner.dtype)
        self.console.print(str(prepared.report), markup=False, highlight=False)
        return prepared

    def _split(self, prepared: Prepared) -> tuple[LatentDataset, LatentDataset]:
        try:
            train, heldout = split(prepared.entries, self.config.validate.videos)
        except ValueError as error:
            raise ConfigError(f"validate.videos={self.config.validate.videos}: {error}") from error
        log.info(f"{len(train)} clips to train on, {len(heldout)} held out.")
        # Processes that share a clip read a part each; held-out clips are few, and read whole.
        part, pinned = self.learner.clip_part, self.learner.device.type == "cuda"
        return LatentDataset(train, part=part, pinned=pinned), LatentDataset(heldout)

    def _restore(self) -> int:
        self._clips = checkpoint.fingerprint(entry.id for entry in self.dataset.entries)
        self._start, self.sampler = 0, self._make_sampler(None)
        newest, folder = self._newest(), self.run_dir / "checkpoints"
        unread = checkpoint.passed_over(newest, folder)
        for path in unread:
            log.warning(f"{path} cannot be read, and is passed over.")
        if newest is None:
            if unread:
                raise ConfigError(
                    f"No checkpoint in {folder} can be read, and beginning anew would replace "
                    "them: bring them back, or delete that folder."
                )
            return 0
        progress = checkpoint.load_progress(newest)
        changed = checkpoint.check_continues(newest, progress, self._progress(progress.step))
        if changed is not None:
            log.warning(changed)
        self._start = progress.step
        self.sampler = self._make_sampler(progress.drawn)
        recorded, pattern = lora.read_entry(newest)["pattern"], pattern_to_dict(self.job.pattern)
        if recorded != pattern:
            raise ConfigError(
                f"{newest} was trained under {recorded}, and sparse.density now gives {pattern}. "
                "Set the recorded width as sparse.pattern.* in place of sparse.density, in another "
                "run.dir, or go back to the version of longreel that began the run."
            )
        state = checkpoint.load(newest, self.learner.parameters)
        try:
            self.learner.engine.restore(state)
        except ValueError as error:
            raise ConfigError(
                f"{newest} was written under another train.optimizer: {error}."
            ) from error
        if self.accelerator.is_main_process:
            # The run may have ended between the checkpoint and this copy.
            self.saver.publish(newest)
        log.info(f"Resuming from {newest} at step {progress.step}.")
        return progress.step

    def _newest(self) -> Path | None:
        """The checkpoint to go on from, which all processes must see, on whatever machine they are:
        from different ones they would train apart. Raises ConfigError if they go on to differ."""
        folder, seen = self.run_dir / "checkpoints", []
        for seconds in SHOWN_LATE:
            time.sleep(seconds)
            newest = checkpoint.latest(folder)
            seen = gather_object([None if newest is None else newest.name])
            if len(set(seen)) == 1:
                return newest
        told = ", ".join(f"{name} on process {rank}" for rank, name in enumerate(seen))
        raise ConfigError(
            f"Processes see different newest checkpoints in {folder}: {told}. run.dir must lie "
            "where all machines see it."
        )

    def _progress(self, step: int) -> checkpoint.Progress:
        drawn = self.sampler.drawn_after(
            (step - self._start) * self.config.train.gradient_accumulation
        )
        return checkpoint.Progress(step, self.sequence.data_size, self._clips, drawn)

    def _make_sampler(self, drawn: list[int] | None) -> SeededBatches:
        train = self.config.train
        return SeededBatches(
            len(self.dataset),
            train.batch,
            train.seed,
            drawn=drawn,
            rank=self.sequence.data_rank,
            num_ranks=self.sequence.data_size,
            buckets=[entry.bucket for entry in self.dataset.entries],
        )

    def _probe_step(self) -> None:
        """Try a step of the longest shape; the run is as it was, or ends if it does not fit."""
        try:
            taken = self.learner.try_step(self.dataset)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise self._out_of_memory(error, " in the step tried before the run") from error
        log.info(f"A step was tried, and fits: {taken}.")

    def _measure_attention(self) -> Speedup | str:
        """How much faster than dense a sparse layer's attention is; why not, if not measured."""
        geometry = self.job.geometry
        speedup = measure_speedup(
            self.job.attention(),  # of one process, whoever shares a clip
            self.learner.grid,
            layers=geometry.layers,
            heads=geometry.heads,
            head_dim=geometry.head_dim,
            device=self.learner.device,
            dtype=self.learner.dtype,
        )
        log.info(f"Attention of a sparse layer against dense, forward and backward: {speedup}.")
        return speedup

    def _open_log(self, start: int) -> None:
        """The metrics, which the main process alone keeps."""
        self.metrics = Metrics(self.run_dir, resumed_step=start)
        if self.config.log.wandb:
            solved = {
                "pattern": pattern_to_dict(self.job.pattern),
                "density_by_layer": self.learner.layer_densities,
            }
            config = to_dict(self.config) | {"attention": solved}
            self.metrics.start_wandb(self.config.log.project, config)
        self.metrics.image("mask", self.run_dir / "mask.png", start)

    @property
    def _validates(self) -> bool:
        """Whether this process takes part in validation: the main one and those that share its
        clips, and all where a forward takes all of them, which then do the same."""
        return self.sequence.data_rank == 0 or self.learner.engine.sharded

    def _make_validator(self, prepared: Prepared, heldout: LatentDataset) -> Validator:
        return Validator(
            self.job,
            self.learner.transformer,
            heldout,
            {text: read_text(prepared.texts[text]) for text in extra_captions(self.config)},
            self.metrics if self.accelerator.is_main_process else None,
            device=self.learner.device,
            dtype=self.learner.dtype,
            wait=self.accelerator.wait_for_everyone if self.learner.engine.sharded else None,
        )

    # Training

    def _train(self, start: int, ratio: float | str, signals: StopSignals) -> bool:
        """Whether the last step was reached."""
        steps, batches = self.config.train.steps, self._batches()
        main, device = self.accelerator.is_main_process, self.learner.device
        with StepProgress(self.console, start, steps, self.learner.cost.density) as progress:
            for step in range(start + 1, steps + 1):
                row = self.learner.update(step, batches) | {"attention_layer_speedup": ratio}
                progress.advance(step, row)
                if self.learner.offload is not None and step == start + 1:
                    size = self.learner.offload.arena.size / 2**30
                    log.info(f"memory.offload holds {size:.1f} GiB of host memory, and keeps it.")
                if main and step % self.config.log.every == 0:
                    self.metrics.write(row)
                due = main and self.saver.due(step)
                due, stop = any_process(device, due, signals.received is not None)
                stop = stop and step < steps
                if due or stop or step == steps:
                    self._save(step, insist=stop or step == steps)
                if stop:
                    name = signals.received or "a signal to another process"
                    log.info(f"Stopped by {name} at step {step}, which is saved: requeue it.")
                    return False
                self._validate(step)
        return True

    def _batches(self) -> Iterator[dict[str, Any]]:
        return iter(Loader(self.dataset, self.sampler, self.config.train.workers))

    # Beside training

    @contextlib.contextmanager
    def _keeping_what_is_learnt(self, start: int) -> Iterator[None]:
        """End a run that is out of memory with its last whole step saved, and say what helps.

        On several processes the main one alone can save, if it is the one that fails, and where
        nothing is sharded, for gathering shards takes all of them.
        """
        self.learner.whole = start
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError) as error:
            newest = checkpoint.latest(self.run_dir / "checkpoints")
            saved = 0 if newest is None else checkpoint.load_progress(newest).step
            whole = self.learner.whole
            alone = self.accelerator.is_main_process and not self.learner.engine.sharded
            if alone and whole is not None and whole > saved:
                self.saver.save(self.learner.engine.gather(), self._progress(whole))
            raise self._out_of_memory(error) from error

    def _out_of_memory(self, error: BaseException, where: str = "") -> SystemExit:
        reason = str(error).strip().partition("\n")[0]
        newest = checkpoint.latest(self.run_dir / "checkpoints")
        change = how_to_go_on(self.job, self.learner.device, newest)
        return SystemExit(f"error: out of memory{where}: {reason}\n{change}")

    def _validate(self, step: int) -> None:
        if step % self.config.validate.every and step != self.config.train.steps:
            return
        self.learner.watch.enter(f"validation at step {step}", limited=False)
        due = self.accelerator.is_main_process and self.validator.missing(step)
        if any_process(self.learner.device, due)[0]:
            if self._validates:
                self.validator.run(step)
            # Here, where time has no limit; in the next step the others would wait within it.
            self.accelerator.wait_for_everyone()

    def _save(self, step: int, *, insist: bool) -> None:
        """insist: the run ends here, so a save that fails is tried again, and ends it if it goes on
        failing."""
        self.learner.watch.enter(f"saving step {step}", limited=False)
        saved, progress = True, self._progress(step)
        state = self.learner.engine.gather()
        if self.accelerator.is_main_process:
            save = self.saver.insist if insist else self.saver.save
            saved = save(state, progress)
        # All wait here, where time has no limit: a disk may be slow.
        failed = any_process(self.learner.device, not saved)[0]
        if insist and failed:
            raise SystemExit(
                f"error: step {step} could not be saved within checkpoint.retry_minutes="
                f"{self.config.checkpoint.retry_minutes:g}: what was learnt since the newest "
                f"checkpoint in {self.saver.folder} is lost. Free space, and the same command goes "
                "on from there."
            )

    def _write_adapter(self, folder: Path, state: checkpoint.State) -> None:
        entry = self.job.adapter_entry()
        lora.save(folder, self.learner.transformer, self.job.family, entry, state.adapter)

    def _finish(self, speedup: str | None) -> None:
        """speedup: None if the run is not complete."""
        self.learner.watch.enter("the end", limited=False)
        if self.accelerator.is_main_process:
            if speedup is not None:
                self._report(speedup)
            self.metrics.close()
        # Leave together. The process group is not destroyed here: DDP's reducer still refers to it,
        # and would join gloo's threads under the GIL that they wait for when it goes.
        self.accelerator.wait_for_everyone()

    def _report(self, speedup: str) -> None:
        """What the complete run shows."""
        rows = self.metrics.rows()
        summary.save_figure(summary.draw_losses(rows), self.run_dir / "loss.png")
        self.metrics.image("losses", self.run_dir / "loss.png", self.config.train.steps)
        names = (lora.WEIGHTS, "metrics.csv", "mask.png", "loss.png")
        samples = self.validator.samples(self.config.train.steps)
        files = [*(self.run_dir / name for name in names), *samples]
        self.console.print(summary.summary(self.job, self.learner.cost, speedup, rows, files))
        note = self.job.rope.stock_note("Stock pipelines apply")
        if note is not None:
            log.info(note)
