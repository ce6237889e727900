"""Encoding continues after interruptions, kills and full disks, and bad latents are refused."""

import errno
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from processes import run_script
from stub_cache import SPEC, Recording, add, build, never

from longreel.data.cache import Encoders
from longreel.data.dataset import LatentDataset
from longreel.data.prepare import Prepared


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.full((3, 9, 4, 6), float("nan")), "a.mp4@0: the encoder returned NaN or infinity"),
        (torch.zeros(9, 4, 6), r"a.mp4@0: the encoder must return \[C, f, h, w\], got \[9, 4, 6\]"),
    ],
)
def test_bad_latents_are_not_stored(folder, cache, latents, message):
    encoders = Encoders(lambda pixels: latents, lambda caption: {"embeds": torch.ones(1)})
    with pytest.raises(ValueError, match=message):
        build(folder, SPEC, cache, lambda: encoders)
    assert not list((cache / "latents").rglob("*.*"))


def test_an_interrupted_build_goes_on_where_it_stopped(folder, cache):
    interrupted = Recording(clips_before_failure=2)
    with pytest.raises(KeyboardInterrupt):
        build(folder, SPEC, cache, interrupted)
    calls = Recording()
    prepared = build(folder, SPEC, cache, calls)
    assert (len(interrupted.clips), len(calls.clips), calls.captions) == (2, 1, [])
    assert (prepared.report.encoded, prepared.report.reused) == (1, 2)
    assert not list(cache.rglob("*.tmp"))


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from longreel.data.cache import Bucket, CacheSpec, Encoders
from longreel.data.prepare import prepare
from longreel.data.listing import SourceSpec
from longreel.data.sources import list_videos
spec = CacheSpec((Bucket(9, 32, 48),), 16, "tiny-vae", "tiny-text")
written = 0
write_bytes = Path.write_bytes
def write_half(self, content):
    global written
    written += 1
    if written < int(sys.argv[3]):
        return write_bytes(self, content)
    write_bytes(self, content[: len(content) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
Path.write_bytes = write_half
latents, embeds = torch.zeros(3, 9, 4, 6), torch.ones(2)
encoders = Encoders(lambda pixels: latents, lambda caption: {"embeds": embeds})
prepare(list_videos(SourceSpec(path=sys.argv[1])), spec, sys.argv[2], lambda: encoders)
"""


def test_a_build_killed_in_the_middle_of_a_write_goes_on(folder, cache):
    killed = run_script(KILLED, folder, cache, 4)  # two captions, a clip, half a clip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    calls = Recording()
    prepared = build(folder, SPEC, cache, calls)
    assert (len(calls.clips), calls.captions) == (2, [])
    assert (prepared.report.encoded, prepared.report.reused) == (2, 1)
    assert len(list(cache.rglob("*.tmp"))) == 1  # half a file, for `longreel cache gc`


def test_builds_at_the_same_time_do_not_disturb_each_other(folder, cache):
    add(folder, "d.mp4", 40, "a horse")
    spec = replace(SPEC, windows="all")
    with ThreadPoolExecutor(4) as pool:
        builds = [pool.submit(build, folder, spec, cache) for _ in range(4)]
        results: list[Prepared] = [build.result() for build in builds]
    assert all(result.entries == results[0].entries for result in results)
    assert not list(cache.rglob("*.tmp"))
    assert len(LatentDataset(build(folder, spec, cache, never).entries)) == 10


def test_a_disk_that_fills_up_ends_the_build_and_it_goes_on(folder, cache, monkeypatch):
    written = []

    def full(source, target):
        if len(written) == 5:  # two files of a manifest, two captions and a clip
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(target)
        os.rename(source, target)

    monkeypatch.setattr("longreel.data.files.os.replace", full)
    with pytest.raises(ValueError, match=f"the disk of cache.dir={cache} is full .* goes on"):
        build(folder, SPEC, cache)
    assert not list(cache.rglob("*.tmp"))
    monkeypatch.undo()
    calls = Recording()
    assert build(folder, SPEC, cache, calls).report.dropped == []
    assert (len(calls.clips), calls.captions) == (2, [])
