"""Kill a run at random moments, start it again by the same command, and compare what it learnt.

    python tests/trainer/kill_and_resume.py [FOLDER] [kills=20] [seed=0] [processes=2] [key=...]

A tiny run of several processes over gloo is killed (kill -9 of one process, or of all) at moments
drawn at random: in a step, in the middle of a save, whose files are written in slow pieces so that
it is met, and while it starts. Kills are spread evenly over the run's steps, and over places and
processes; where in its share of the steps, of a step and of a save each falls is drawn. After each
kill every checkpoint in the run's folder must load whole, and the next start must go on from the
newest. The adapter, the moments and the metrics at the end equal those of a run that was left
alone, bit for bit. Other keys are settings of the run, as `parallel.sequence=2`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

import processes  # noqa: E402
import torch  # noqa: E402
from runs import arguments_of, rows  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from videos import write_waves  # noqa: E402

from longreel.trainer.adapter import lora  # noqa: E402
from longreel.trainer.run import checkpoint  # noqa: E402
from longreel.trainer.run.metrics import column, read_rows  # noqa: E402

STEPS, EVERY = 120, 2
SAVE = 0.1  # seconds that a slow save takes, about


@dataclass(frozen=True)
class Kill:
    """place: `step`, `save`, or `start`, before the first step. victim: a process, None for all.
    after: the step whose line of metrics.csv must be there first. wait: from then on, as a share of
    what a step, a save or a start takes."""

    place: str
    victim: int | None
    after: int
    wait: float

    def __str__(self) -> str:
        return "all" if self.victim is None else f"process {self.victim}"


def draw_kills(kills: int, steps: int, count: int, draw: random.Random) -> list[Kill]:
    """One in each of so many equal shares of the steps; places and victims in turn, shuffled."""
    places = ("step", "save", "step", "save", "start")
    chosen = list(itertools.product(places, [*range(count), None]))
    chosen = list(itertools.islice(itertools.cycle(chosen), kills))
    draw.shuffle(chosen)
    share = (steps - 2 * EVERY) / kills  # the last step's save would end the run
    return [
        Kill(*where, after=int(draw.uniform(i, i + 1) * share), wait=draw.random())
        for i, where in enumerate(chosen)
    ]


def start(count: int, arguments: list[str], folder: Path) -> list[subprocess.Popen]:
    folder.mkdir(exist_ok=True)
    return processes.start(count, "tests/helpers/slow_saves.py", *arguments, folder=folder)


def saving(run: Path, since: float) -> bool:
    """Return whether a save is under way; a folder from before `since` is what an earlier kill
    left."""
    for path in (run / "checkpoints").glob(".tmp-*"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime > since:
                return True
    return False


def newest_step(run: Path) -> int:
    """The last that metrics.csv has."""
    return max((int(row["step"]) for row in read_rows(run / "metrics.csv")), default=0)


def strike(kill: Kill, started: list[subprocess.Popen], run: Path, typical: dict) -> str | None:
    """Wait for a moment and kill; where that was, or None for a run that ended first."""
    metrics, since = run / "metrics.csv", time.time()
    before = metrics.stat().st_ino if metrics.exists() else None

    def begun() -> bool:
        """A start replaces the file, and in it the lines of steps that it makes again."""
        return metrics.exists() and metrics.stat().st_ino != before

    if kill.place == "start":
        # Which takes as long as the machine is busy: with the first step it is over.
        latest = since + kill.wait * typical["start"]
        while time.time() < latest and not begun():
            time.sleep(0.002)
    else:
        while not (
            begun()
            and newest_step(run) > kill.after
            and (kill.place == "step" or saving(run, since))
        ):
            if any(process.poll() is not None for process in started):
                return None
            time.sleep(0.002)
        time.sleep(kill.wait * typical[kill.place])
    step, in_save = newest_step(run), saving(run, since)
    for process in started if kill.victim is None else [started[kill.victim]]:
        process.send_signal(signal.SIGKILL)
    if kill.place == "start":
        return "a start"
    return f"{'a save' if in_save else 'a step'} after step {step}"


def end(started: list[subprocess.Popen], timeout: float) -> float:
    """Seconds until all have ended by themselves; `timeout` is what they may take."""
    began = time.monotonic()
    try:
        for process in started:
            process.wait(timeout=began + timeout - time.monotonic())
    finally:
        for process in started:
            process.kill()
    return time.monotonic() - began


def check_whole(run: Path) -> int:
    """Load every checkpoint that has its name; the newest step, 0 if there is none."""
    steps = [0]
    for folder in (run / "checkpoints").glob("step-*"):
        load_file(folder / checkpoint.TENSORS)
        load_file(folder / lora.WEIGHTS)
        steps.append(checkpoint.load_progress(folder).step)
    return max(steps)


def compare(run: Path, whole: Path, steps: int) -> None:
    """The adapters by their tensors, for each file's header names the settings of its run."""
    one, two = (load_file(folder / lora.WEIGHTS) for folder in (run, whole))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one), "the adapters differ"
    name = f"checkpoints/step-{steps:06d}/{checkpoint.TENSORS}"
    assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert rows(run) == rows(whole), "metrics differ"


def resumed_at(folder: Path) -> int | None:
    """The step that a start went on from; None if it was killed before it came to that."""
    said = " ".join((folder / "rank-0.log").read_text().split())
    _, found, rest = said.partition("Resuming from ")
    return int(rest.partition(" at step ")[2].partition(".")[0]) if found else None


def main(argv: list[str]) -> None:
    given = dict(argument.partition("=")[::2] for argument in argv if "=" in argument)
    kills, seed = int(given.pop("kills", 20)), int(given.pop("seed", 0))
    count, draw = int(given.pop("processes", 2)), random.Random(seed)
    folders = [argument for argument in argv if "=" not in argument]
    folder = Path(folders[0] if folders else tempfile.mkdtemp(prefix="kill-and-resume-"))
    folder.mkdir(exist_ok=True)
    write_waves(folder / "videos", 3, 17, 64, 64, 16)
    arguments = arguments_of("wan", folder / "videos", folder / "cache", folder / "run")
    settings = dict(argument.partition("=")[::2] for argument in arguments)
    settings |= {"train.steps": STEPS, "checkpoint.every": EVERY, "lora.dropout": 0.1}
    settings |= {
        "train.gradient_accumulation": 2,
        "train.schedule": "cosine",
        "validate.every": 10,
    } | given

    def command(run: Path) -> list[str]:
        return [f"{key}={value}" for key, value in (settings | {"run.dir": run}).items()]

    steps, whole, run = int(settings["train.steps"]), folder / "whole", folder / "run"
    spent = end(start(count, command(whole), folder / "whole-log"), 600)
    assert check_whole(whole) == steps, (folder / "whole-log/rank-0.log").read_text()[-3000:]
    times = column(read_rows(whole / "metrics.csv"), "seconds_per_step").values()
    typical = {"step": sum(times) / steps, "save": SAVE}
    typical["start"] = spent - sum(times) - SAVE * steps / EVERY
    print(f"left alone: {spent:.0f} s, of a step {typical['step']:.2f} s", flush=True)
    waiting = draw_kills(kills, steps, count, draw)
    killed: Counter[str] = Counter()
    for starts in itertools.count(1):
        log = folder / f"log-{starts}"
        before = check_whole(run)
        started = start(count, command(run), log)
        kill = waiting.pop(0) if waiting else None
        where = strike(kill, started, run, typical) if kill else None
        joined = "Attention backend" in (log / "rank-0.log").read_text()
        if where is not None and not joined:  # no process knows the others yet: the launcher's part
            for process in started:
                process.kill()
        spent = end(started, 600 if where is None else 60)
        now = check_whole(run)
        if before:
            wanted = [before] if now > before else [before, None]
            assert resumed_at(log) in wanted, f"{log}: not from step {before}"
        if where is None:
            break
        killed[where.partition(" after")[0]] += 1
        print(
            f"{killed.total()}: from step {before}, {kill} killed in {where}; newest whole "
            f"checkpoint {now}; the rest ended in {spent:.0f} s",
            flush=True,
        )
    codes = [process.returncode for process in started]
    assert codes == [0] * count, (log / "rank-0.log").read_text()[-3000:]
    assert check_whole(run) == steps
    compare(run, whole, steps)
    places = ", ".join(f"{number} in {place}" for place, number in sorted(killed.items()))
    print(
        f"{killed.total()} kills ({places}), {starts} starts, {steps} steps: adapter, moments and "
        "metrics equal the undisturbed run's bit for bit"
    )
    if killed.total() < kills:
        raise SystemExit(f"error: the run was complete after {killed.total()} of {kills} kills.")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1:])
