"""Measure the cache at scale on this machine: python benchmarks/cache.py [--write]

1. Start-up with a full cache of 100,000 clips: seconds and memory of listing and looking up.
2. The loader with latents of HunyuanVideo at 4x (16 x 128 x 90 x 160 bf16, 59 MB) from a disk
   whose cached pages are dropped: compared with reading the bytes alone, and the wait per 2 s step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from longreel.data.cache import SCHEMA, Bucket, CacheSpec, Encoders, Entry
from longreel.data.dataset import LatentDataset
from longreel.data.files import save_tensors
from longreel.data.ledger import Ledger, stamp
from longreel.data.listing import SourceSpec
from longreel.data.loader import Loader
from longreel.data.prepare import prepare
from longreel.data.sampler import SeededBatches
from longreel.data.sources import list_videos

CLIPS = 100_000
LATENTS = (16, 128, 90, 160)
STEP = 2.0  # seconds
BUCKET = Bucket(9, 32, 48, tokens=100, bytes=1000)
SPEC = CacheSpec((BUCKET,), fps=16, video_encoder="video", text_encoder="text")
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--write", action="store_true", help="a dated page in results/")
    options.add_argument("--clips", type=int, default=CLIPS)
    options.add_argument("--files", type=int, default=24, help="of latents")
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--folder", help="where files are written; default: a temporary one")
    options.add_argument("--open", nargs=2, metavar=("VIDEOS", "CACHE"), help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.open:
        print(json.dumps(open_cache(*map(Path, given.open))))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        lines = [*start_up(Path(folder), given.clips)]
        lines += loading(Path(folder), given.files, given.steps)
    page = "\n".join([*head(), *lines]) + "\n"
    print(page)
    if given.write:
        name = f"{time.strftime('%Y-%m-%d')}-cache-cpu.md"
        (RESULTS / name).write_text(page, encoding="utf-8")


def head() -> list[str]:
    return [
        "# The cache at scale",
        "",
        f"`python benchmarks/cache.py --write`, {time.strftime('%Y-%m-%d')}, on {os.cpu_count()} "
        f"cores of {processor()}, Linux {platform.release()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}. Load of the machine before: {os.getloadavg()[0]:.1f}.",
        "",
    ]


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


# Start-up


def start_up(folder: Path, clips: int) -> list[str]:
    videos, cache = folder / "videos", folder / "cache"
    fill(videos, cache, clips)
    command = [sys.executable, __file__, "--open", str(videos), str(cache)]
    # The first start writes the manifest; the others show what every later start takes.
    runs = [json.loads(subprocess.check_output(command)) for _ in range(4)]
    shutil.rmtree(videos)
    shutil.rmtree(cache)

    def row(name: str, key: str, digits: int = 1) -> str:
        middle = sorted(run[key] for run in runs[1:])[1]
        return f"| {name} | {runs[0][key]:.{digits}f} | {middle:.{digits}f} |"

    return [
        f"## Start-up with {clips:,} cached clips",
        "",
        "Synthetic files: a video and a row of metadata.jsonl for each clip, a caption of its own, "
        "latents of one number. Every file's size and times are looked up; none is opened.",
        "",
        "| | first | median of the next three |",
        "|---|---|---|",
        row("listing the videos and their table, seconds", "listing"),
        row("opening the cache, seconds", "opening"),
        row("both, seconds of the processor", "processor"),
        row("memory added, MB", "memory", 0),
        "",
        "The first start looks at every video and writes the manifest, the others read it.",
        "",
    ]


def fill(videos: Path, cache: Path, clips: int) -> None:
    """Write videos that hold their number, and a cache that lists each with nine frames."""
    videos.mkdir(parents=True)
    ledger = Ledger(cache)
    one = torch.zeros(1, 1, 1, 1)
    save_tensors(videos / ".one", {"latents": one}, {"schema": SCHEMA})
    content = (videos / ".one").read_bytes()
    kind, decoder = f"video {SPEC.fps:g}", "any"
    with (videos / "metadata.jsonl").open("w") as table:
        for index in range(clips):
            caption = f"clip number {index}, " + "a caption of a usual length " * 10
            path = videos / f"{index:06d}.mp4"
            path.write_text(str(index))
            table.write(json.dumps({"file_name": path.name, "caption": caption}) + "\n")
            fingerprint = f"{index:040x}"
            ledger.put("file", str(path), [*stamp(path), fingerprint])
            ledger.put(kind, fingerprint, [9, True, 32, 48, None, "", decoder])
            for file in (
                SPEC.latents_path(cache, BUCKET, fingerprint, 0),
                SPEC.text_path(cache, caption.strip()),
            ):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
                key = str(file).removeprefix(f"{cache}/")
                ledger.put("whole", key, stamp(file))
    ledger.close()


def open_cache(videos: Path, cache: Path) -> dict[str, float]:
    """Return the seconds and MB that a start takes beyond its imports."""

    def never() -> Encoders:
        raise AssertionError("everything is there")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, busy = time.perf_counter(), time.process_time()
    listing = list_videos(SourceSpec(path=str(videos)))
    listed = time.perf_counter()
    prepared = prepare(listing, SPEC, cache, never)
    opened, busy = time.perf_counter(), time.process_time() - busy
    assert prepared.report.reused == len(prepared.entries) == len(listing.sources)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {
        "listing": listed - began,
        "opening": opened - listed,
        "processor": busy,
        "memory": memory,
    }


# The loader


def loading(folder: Path, files: int, steps: int) -> list[str]:
    entries = [make(folder, index) for index in range(files)]
    size = entries[0].latents.stat().st_size / 1e6
    rows = [
        ("bytes of the files alone, one thread", *measure(entries, 0, raw=True)),
        ("the loader, train.workers=0", *measure(entries, 0)),
        ("the loader, train.workers=1", *measure(entries, 1)),
        ("the loader, train.workers=2", *measure(entries, 2)),
    ]
    waits = {workers: wait(entries, workers, steps) for workers in (0, 1, 2)}
    return [
        f"## The loader: {files} clips of {size:.0f} MB",
        "",
        "HunyuanVideo at 4x: latents of 16 x 128 x 90 x 160, bfloat16, and a caption's embedding. "
        "Cached pages of the files are dropped before each measurement.",
        "",
        "| | MB/s | ms a clip |",
        "|---|---|---|",
        *(f"| {name} | {size / seconds:.0f} | {1000 * seconds:.0f} |" for name, seconds in rows),
        "",
        f"Beside simulated steps of {STEP:g} s, {steps} of them:",
        "",
        "| train.workers | share of the time that steps wait |",
        "|---|---|",
        *(f"| {workers} | {share:.2%} |" for workers, share in waits.items()),
    ]


def make(folder: Path, index: int) -> Entry:
    latents, text = folder / f"{index}.safetensors", folder / f"{index}.text.safetensors"
    generator = torch.Generator().manual_seed(index)
    values = torch.randn(LATENTS, generator=generator).bfloat16()
    save_tensors(latents, {"latents": values}, {"schema": SCHEMA, "shape": LATENTS, "start": 0})
    save_tensors(text, {"prompt_embeds": torch.randn(80, 4096).bfloat16()}, {"schema": SCHEMA})
    return Entry(str(index), str(index), latents, text, "", 0, BUCKET, str(index))


def measure(entries: list[Entry], workers: int, *, raw: bool = False) -> tuple[float]:
    """Return the seconds per clip when every clip is read once."""
    with dropped(entries):
        began = time.perf_counter()
        if raw:
            for entry in entries:
                entry.latents.read_bytes()
        else:
            batches = iter(Loader(LatentDataset(entries), order(entries), workers))
            for _ in entries:
                next(batches)
            seconds = time.perf_counter() - began
            batches.close()
            return (seconds / len(entries),)
    return ((time.perf_counter() - began) / len(entries),)


def wait(entries: list[Entry], workers: int, steps: int) -> float:
    with dropped(entries):
        batches = iter(Loader(LatentDataset(entries), order(entries), workers))
        next(batches)  # of the first step: nothing to hide behind
        waited, began = 0.0, time.perf_counter()
        for _ in range(steps):
            time.sleep(STEP)
            asked = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - asked
        total = time.perf_counter() - began
        batches.close()
    return waited / total


def order(entries: list[Entry]) -> SeededBatches:
    return SeededBatches(len(entries), 1, seed=0)


@contextmanager
def dropped(entries: list[Entry]) -> Iterator[None]:
    """Drop the files' pages from the page cache, so that they are read from the disk."""
    for entry in entries:
        with entry.latents.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    yield


if __name__ == "__main__":
    main()
