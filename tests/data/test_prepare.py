"""Every clip and every caption is encoded once, and found again at the next start."""

from dataclasses import replace

import pytest
import torch
from stub_cache import BUCKET, SPEC, Recording, add, build, never

from longreel.data.cache import SCHEMA
from longreel.data.dataset import LatentDataset, read_text, split
from longreel.data.decode import read_clip
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
    reason = "from frame 0 on: the same pictures and caption as copy.mp4@0"
    assert copied.report.dropped == [Dropped("z.mp4", "repeated", reason)]
    (folder / "copy.txt").write_text("another dog")
    other = build(folder, replace(SPEC, video_encoder="other"), cache)
    assert LatentDataset(other.entries)[3]["id"] == "z.mp4@0"
    train, heldout = split(other.entries, 2)  # copies go together
    assert len({entry.group for entry in heldout}) == 2 and len(train) + len(heldout) == 4


def test_a_disk_without_room_is_refused_before_anything_is_loaded(folder, cache):
    huge = replace(SPEC, buckets=(replace(BUCKET, bytes=10**15, tokens=1),))
    with pytest.raises(ValueError, match=r"needs 3000000.0 GB for 3 clips, and its disk has"):
        build(folder, huge, cache, never)
