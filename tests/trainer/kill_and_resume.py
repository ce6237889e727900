"""Kill a run at random moments, start it again by the same command, and compare what it learnt.

    python tests/trainer/kill_and_resume.py [FOLDER] [kills=20] [seed=0] [processes=2] [key=...]

A tiny run of several processes over gloo is killed (kill -9 of one process, or of all) at moments
drawn at random: between steps, in a step, and in the middle of a save, whose files are then written
in slow pieces so that it is met. After each kill every checkpoint in the run's folder must load
whole, and the next start must go on from the newest. The adapter, the moments and the metrics at
the end equal those of a run that was left alone, bit for bit. Other keys are settings of the run,
as `parallel.sequence=2`.
"""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import processes  # noqa: E402
import torch  # noqa: E402
from runs import arguments_of, rows  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from videos import write_waves  # noqa: E402

from longreel.trainer import checkpoint, lora  # noqa: E402

STEPS, EVERY = 120, 2


def start(count: int, arguments: list[str], folder: Path) -> list[subprocess.Popen]:
    folder.mkdir(exist_ok=True)
    return processes.start(count, "tests/slow_saves.py", *arguments, folder=folder)


def state_of(run: Path) -> str:
    """Where a run is, by its files."""
    if list((run / "checkpoints").glob(".tmp-*")):
        return "save"
    return "step" if (run / "checkpoints").is_dir() else "start"


def kill(started: list[subprocess.Popen], run: Path, draw: random.Random) -> str | None:
    """Wait for a random moment and kill; what was killed, or None for a run that ended first."""
    moment, victims = draw.choice(["step", "save", "save", "any"]), draw.choice(["one", "all"])
    delay = draw.uniform(0, 0.6)
    before = time.monotonic()
    newest = checkpoint.latest(run / "checkpoints")
    while True:
        if any(process.poll() is not None for process in started):
            return None
        moved = checkpoint.latest(run / "checkpoints") != newest
        here = state_of(run)
        if moment == "any" and time.monotonic() - before > 3 + 10 * delay:
            break
        if moment == here and (moved or here == "save"):
            time.sleep(delay if moment == "step" else delay / 6)
            break
        time.sleep(0.005)
    where = state_of(run)
    chosen = started if victims == "all" else [draw.choice(started)]
    for process in chosen:
        process.send_signal(signal.SIGKILL)
    ranks = "all" if victims == "all" else f"process {started.index(chosen[0])}"
    return f"{ranks} in a {where}"


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


def compare(run: Path, whole: Path) -> None:
    """The adapters by their tensors, for each file's header names the settings of its run."""
    one, two = (load_file(folder / lora.WEIGHTS) for folder in (run, whole))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one), "the adapters differ"
    name = f"checkpoints/step-{STEPS:06d}/{checkpoint.TENSORS}"
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
    settings |= {"train.accumulate": 2, "train.schedule": "cosine", "validate.every": 10} | given

    def command(run: Path) -> list[str]:
        return [f"{key}={value}" for key, value in (settings | {"run.dir": run}).items()]

    whole, run = folder / "whole", folder / "run"
    end(start(count, command(whole), folder / "whole-log"), 600)
    assert check_whole(whole) == STEPS, (folder / "whole-log/rank-0.log").read_text()[-3000:]
    killed, starts = 0, 0
    while True:
        starts += 1
        log = folder / f"log-{starts}"
        before = check_whole(run)
        started = start(count, command(run), log)
        what = kill(started, run, draw) if killed < kills else None
        joined = "Attention backend" in (log / "rank-0.log").read_text()
        if what is not None and not joined:  # no process knows the others yet: the launcher's part
            for process in started:
                process.kill()
        spent = end(started, 600 if what is None else 60)
        if before:
            wanted = [before] if check_whole(run) > before else [before, None]
            assert resumed_at(log) in wanted, f"{log}: not from step {before}"
        if what is None:
            codes = [process.returncode for process in started]
            assert codes == [0] * count, (log / "rank-0.log").read_text()[-3000:]
            break
        killed += 1
        now = check_whole(run)
        print(
            f"{killed}: from step {before}, killed {what}; newest whole checkpoint {now}; the "
            f"rest ended in {spent:.0f} s",
            flush=True,
        )
    assert check_whole(run) == STEPS
    compare(run, whole)
    with (run / "metrics.csv").open() as file:
        losses = [row["loss"] for row in csv.DictReader(file) if row["loss"]]
    print(
        f"{killed} kills, {starts} starts, {len(losses)} steps: adapter, moments and metrics equal "
        "the undisturbed run's bit for bit"
    )
    if killed < kills:
        raise SystemExit(f"error: the run was complete after {killed} of {kills} kills.")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1:])
