"""Several processes fill a cache, are killed at any moment, or run beside other builds."""

import json
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from stub_cache import SPEC, add, build, encoders, never
from videos import noise

from longreel.data.listing import SourceSpec
from longreel.data.prepare import prepare
from longreel.data.process_group import ProcessGroup
from longreel.data.sources import list_videos
from longreel.launch.demo import fetch_videos
from longreel.trainer.families import FAMILIES

TESTS = Path(__file__).parents[1] / "helpers"


def tensors(cache: Path) -> dict[str, bytes]:
    paths = cache.rglob("*.safetensors")
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def folder(tmp_path) -> Path:
    for index in range(5):
        add(tmp_path / "v", f"{index}.mp4", 20 + 7 * index, f"caption {index % 3}")
    add(tmp_path / "v", "short.mp4", 4, "short")
    (tmp_path / "v" / "bad.mp4").write_bytes(b"bad")
    (tmp_path / "v" / "bad.txt").write_text("bad")
    return tmp_path / "v"


class InThreads:
    """Runs `prepare` as `size` processes would, in threads with a barrier between them."""

    def __init__(self, size: int) -> None:
        self.barrier, self.size = threading.Barrier(size, timeout=60), size
        self.results, self.calls, self.answers = [None] * size, [0] * size, [False] * size

    def run(self, folder: Path, cache: Path, spec=SPEC, load=None):
        def one(rank: int) -> None:
            def counted():
                made = encoders()

                def video(pixels):
                    self.calls[rank] += 1
                    return made.video(pixels)

                return replace(made, video=video)

            def all_true(value: bool) -> bool:
                self.answers[rank] = value
                self.barrier.wait()
                return all(self.answers)

            group = ProcessGroup(rank, self.size, lambda: self.barrier.wait() and None, all_true)
            listing = list_videos(SourceSpec(path=str(folder)))
            try:
                self.results[rank] = prepare(listing, spec, cache, load or counted, group=group)
            except BaseException as error:
                self.results[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.results


@pytest.mark.parametrize("size", [2, 3, 9])
def test_processes_share_the_work_and_agree(folder, tmp_path, size):
    spec = replace(SPEC, windows="all")
    alone = build(folder, spec, tmp_path / "alone")
    threads = InThreads(size)
    results = threads.run(folder, tmp_path / "cache", spec)
    for prepared in results:
        assert [e.id for e in prepared.entries] == [e.id for e in alone.entries]
        assert prepared.report.dropped == alone.report.dropped
        assert prepared.report.encoded == alone.report.encoded
    assert sum(threads.calls) == len(alone.entries) == 17  # each clip once
    assert sorted(threads.calls)[-2] > 0 and max(threads.calls) <= 17 - 3 * (min(size, 5) - 1) + 2
    assert tensors(tmp_path / "cache") == tensors(tmp_path / "alone")
    again = InThreads(size).run(folder, tmp_path / "cache", spec, load=never)
    assert [e.id for e in again[0].entries] == [e.id for e in alone.entries]


def test_a_video_that_one_process_cannot_encode_is_dropped_by_all(folder, tmp_path):
    def load():
        (folder / "3.mp4").unlink(missing_ok=True)
        time.sleep(0.1)
        return encoders()

    results = InThreads(2).run(folder, tmp_path / "cache", load=load)
    for prepared in results:
        assert [e.source for e in prepared.entries] == ["0.mp4", "1.mp4", "2.mp4", "4.mp4"]
        assert "3.mp4" in [item.name for item in prepared.report.dropped]


BUILD = """
import sys
sys.path.insert(0, sys.argv[3])
from dataclasses import replace
from pathlib import Path
from stub_cache import SPEC, build
print("start", flush=True)
build(Path(sys.argv[1]), replace(SPEC, windows="all", stride=2), Path(sys.argv[2]))
"""


def start(script: str, *arguments) -> subprocess.Popen:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_that_know_nothing_of_each_other_fill_one_cache(folder, tmp_path):
    spec = replace(SPEC, windows="all", stride=2)
    build(folder, spec, tmp_path / "alone")
    both = [start(BUILD, folder, tmp_path / "cache", TESTS) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert tensors(tmp_path / "cache") == tensors(tmp_path / "alone")
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    build(folder, spec, tmp_path / "cache", never)


def kill_until_done(command, cache: Path, seconds: float, kills: int) -> int:
    """Start `command` again and again, killing it within `seconds`; return the number of kills."""
    random.seed(0)
    killed = 0
    for _ in range(kills):
        process = command()
        assert process.stdout is not None
        process.stdout.readline()
        try:
            process.wait(random.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.stdout.close()
        process.wait()
    process = command()
    process.communicate(timeout=300)
    assert process.returncode == 0
    return killed


@pytest.mark.slow
def test_a_build_killed_again_and_again_gives_the_same_bytes(folder, tmp_path):
    for index in range(4):
        add(folder, f"noise{index}.mp4", 60, "noise", frames=noise(60))
    spec = replace(SPEC, windows="all", stride=2)
    build(folder, spec, tmp_path / "alone")
    cache = tmp_path / "cache"
    killed = kill_until_done(lambda: start(BUILD, folder, cache, TESTS), cache, 0.15, 3)
    assert killed >= 2
    assert tensors(cache) == tensors(tmp_path / "alone")


REAL = """
import json, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from accelerate import Accelerator
from longreel.trainer.clips import prepare_data
from longreel.trainer.job import Job
from longreel.trainer.run.progress import quiet_libraries
from longreel.trainer.config.recipe import load

accelerator, folder = Accelerator(cpu=True), Path(sys.argv[1])
quiet_libraries()

def begin(cache):
    child = os.fork()  # children share the imports
    if child == 0:
        job = Job.from_config(load([*sys.argv[2:], f"cache.dir={cache}"]))
        prepare_data(job, accelerator, torch.float32)
        os._exit(0)
    return child

def paths(cache):
    return [p for kind in ("latents", "text") for p in (cache / kind).rglob("*.safetensors")]

def tensors(cache):
    return {str(p.relative_to(cache)): p.read_bytes() for p in paths(cache)}

began = time.perf_counter()
os.waitpid(begin(folder / "alone"), 0)
seconds = time.perf_counter() - began
whole = tensors(folder / "alone")
random.seed(0)
counts, killed = [], 0
for trial in range(20):
    cache = folder / f"killed {trial}"
    # Kill after a random number of files plus a random part of the time that one file takes; a time
    # alone would miss, because the machine may be busier than it was.
    after, child = random.randrange(len(whole)), begin(cache)
    while len(paths(cache)) < after:
        time.sleep(0.002)
    time.sleep(random.uniform(0, seconds / len(whole)))
    os.kill(child, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    there = tensors(cache)
    counts.append(len(there))
    assert all(whole[name] == content for name, content in there.items())
    assert os.waitpid(begin(cache), 0)[1] == 0
    assert tensors(cache) == whole
print(json.dumps([len(whole), counts, killed]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_real_clips_killed_at_20_random_moments_give_the_same_bytes(tmp_path, family):
    """Encode the clips of `make demo` by the family's own tokenizer, text encoder and VAE.

    At each of 20 kills all files are complete, and the same command continues to the same bytes.
    """
    fetch_videos(tmp_path / "videos")
    given = [f"recipe=tiny_{family}", f"data.path={tmp_path / 'videos'}", "data.shots=true"]
    given += ["frames=25", "extend.native=25", "extend.factor=null", "height=96", "width=128"]
    run = start(REAL, tmp_path, *given)
    out, _ = run.communicate(timeout=1200)
    assert run.returncode == 0
    total, counts, killed = json.loads(out.splitlines()[-1])
    assert total >= 6 and len(set(counts)) >= 3  # before, between and after files
    assert killed >= 15  # the others finished before they were killed
