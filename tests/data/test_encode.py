"""Filling the cache: every clip and every caption once, however often it is interrupted."""

import errno
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from processes import run_script
from stub_cache import BUCKET, SPEC, Recording, add, build, never

from longreel.data.cache import SCHEMA, Encoders
from longreel.data.dataset import LatentDataset, read_text, split
from longreel.data.decode import read_clip
from longreel.data.encode import Prepared
from longreel.data.files import digest, read_tensors
from longreel.data.listing import Dropped
from longreel.data.report import Report


def test_what_is_built(folder, cache):
    calls, stages = Recording(), []
    prepared = build(
        folder,
        SPEC,
        cache,
        calls,
        extra_captions=["", "a bird", "a cat"],
        progress=lambda *call: call in stages or stages.append(call),
    )
    assert calls.loads == 1
    assert calls.clips == [list(range(9))] * 3
    assert calls.captions == ["a dog", "a cat", "", "a bird"]
    assert [entry.id for entry in prepared.entries] == ["a.mp4@0", "b.mp4@0", "deep/c.mp4@0"]
    report = Report(kept=3, sources=3, dropped=[], encoded=3, reused=0)
    shapes = {"buckets": {BUCKET: 3}, "new": {BUCKET: 3}}
    assert prepared.report == replace(report, **shapes, seconds=prepared.report.seconds)
    assert str(prepared.report) == "kept 3 clips of 3 videos: 3 encoded, 0 from the cache"
    assert set(prepared.texts) == {"a dog", "a cat", "", "a bird"}
    assert read_text(prepared.texts[""])["embeds"].shape == (0, 2)
    first = prepared.entries[0]
    assert (first.source, first.caption, first.start) == ("a.mp4", "a dog", 0)
    assert first.text == prepared.entries[2].text == prepared.texts["a dog"]
    tensors, about = read_tensors(first.latents)
    pixels = read_clip(folder / "a.mp4", start=0, frames=9, fps=16, height=32, width=48)
    expected = torch.from_numpy(pixels[:, ::8, ::8].copy()).permute(3, 0, 1, 2).bfloat16()
    assert torch.equal(tensors["latents"], expected)
    assert about == {
        "schema": SCHEMA,
        "encoder": "tiny-vae",
        "source": "a.mp4",
        "start": 0,
        "frames": 9,
        "fps": 16,
        "height": 32,
        "width": 48,
        "shape": [3, 9, 4, 6],
        "sha1": digest(tensors),
    }
    text, about = read_tensors(first.text)
    about_text = {"schema": SCHEMA, "encoder": "tiny-text", "caption": "a dog"}
    assert about == about_text | {"sha1": digest(text)}
    relative = first.latents.relative_to(cache)
    assert relative.parts[:2] == ("latents", SPEC.video_key(BUCKET))
    assert relative.parts[2] == relative.name[:2]
    assert stages == [
        *((done, 3, "checking videos") for done in range(4)),
        *((done, 4, "encoding text") for done in range(5)),
        *((done, 3, "encoding clips") for done in range(4)),
    ]


@pytest.mark.parametrize(
    ("stride", "starts"),
    [(0, [0, 9, 18]), (9, [0, 9, 18]), (5, [0, 5, 10, 15, 20]), (25, [0])],
)
def test_all_windows(tmp_path, cache, stride, starts):
    add(tmp_path / "videos", "a.mp4", 30, "a dog")
    spec = replace(SPEC, windows="all", stride=stride)
    calls = Recording()
    prepared = build(tmp_path / "videos", spec, cache, calls)
    assert [entry.start for entry in prepared.entries] == starts
    assert calls.clips == [list(range(start, start + 9)) for start in starts]
    assert prepared.report.kept == len(starts) and prepared.report.sources == 1
    again = build(tmp_path / "videos", spec, cache, never)
    assert again.entries == prepared.entries
    assert (again.report.encoded, again.report.reused) == (0, len(starts))


def test_a_changed_video_or_caption_is_encoded_anew(folder, cache):
    first = build(folder, SPEC, cache)
    add(folder, "a.mp4", 12, "a horse")
    calls = Recording()
    second = build(folder, SPEC, cache, calls)
    assert len(calls.clips) == 1 and calls.captions == ["a horse"]
    assert second.entries[0].latents != first.entries[0].latents
    assert second.entries[1:] == first.entries[1:]


def test_a_renamed_video_is_reused_and_a_copy_is_encoded_once(folder, cache):
    build(folder, SPEC, cache)
    for suffix in (".mp4", ".txt"):
        (folder / "a").with_suffix(suffix).rename((folder / "z").with_suffix(suffix))
    renamed = build(folder, SPEC, cache, never)
    assert [entry.id for entry in renamed.entries] == ["b.mp4@0", "deep/c.mp4@0", "z.mp4@0"]
    (folder / "copy.mp4").write_bytes((folder / "z.mp4").read_bytes())
    (folder / "copy.txt").write_text("a dog")
    calls = Recording()
    copied = build(folder, replace(SPEC, video_encoder="other"), cache, calls)
    assert len(copied.entries) == 3 and len(calls.clips) == 3
    reason = "frame 0 on: the same pictures and caption as copy.mp4@0"
    assert copied.report.dropped == [Dropped("z.mp4", "repeated", reason)]
    (folder / "copy.txt").write_text("another dog")
    other = build(folder, replace(SPEC, video_encoder="other"), cache)
    assert LatentDataset(other.entries)[3]["id"] == "z.mp4@0"
    train, heldout = split(other.entries, 2)  # copies go together
    assert len({entry.group for entry in heldout}) == 2 and len(train) + len(heldout) == 4


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
from longreel.data.encode import prepare
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


def test_a_disk_without_room_is_refused_before_anything_is_loaded(folder, cache):
    huge = replace(SPEC, buckets=(replace(BUCKET, bytes=10**15, tokens=1),))
    with pytest.raises(ValueError, match=r"needs 3000000.0 GB for 3 clips, and its disk has"):
        build(folder, huge, cache, never)
