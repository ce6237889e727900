"""A start with a full cache needs only its manifest, and makes a damaged manifest again."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from processes import run_script
from stub_cache import SPEC, add, build, never

from longreel.data import prepare


def content(cache: Path) -> dict[str, tuple[int, bytes]]:
    """Return every file of the cache with its mtime and content."""
    files = (path for path in cache.rglob("*.*") if path.parent.name != "manifests")
    return {path.as_posix(): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_complete_cache_is_only_read(folder, cache):
    first = build(folder, SPEC, cache, extra_captions=[""])
    before = content(cache)
    second = build(folder, SPEC, cache, never, extra_captions=[""])
    assert (second.entries, second.texts) == (first.entries, first.texts)
    assert str(second.report) == "kept 3 clips of 3 videos: 0 encoded, 3 from the cache"
    assert content(cache) == before


READY = """
import sys
sys.modules["av"] = sys.modules["datasets"] = None  # importing them fails
from longreel.data.dataset import LatentDataset
from longreel.data.cache import Bucket, CacheSpec
from longreel.data.prepare import prepare
from longreel.data.loader import Loader
from longreel.data.sampler import SeededBatches
from longreel.data.listing import SourceSpec
from longreel.data.sources import list_videos
spec = CacheSpec((Bucket(9, 32, 48),), 16, "tiny-vae", "tiny-text")
listing = list_videos(SourceSpec(path=sys.argv[1]))
prepared = prepare(listing, spec, sys.argv[2], load_encoders=None)
data = LatentDataset(prepared.entries)
batch = next(iter(Loader(data, SeededBatches(len(data), 2, 0), workers=1)))
print(list(batch["latents"].shape))
print(prepared.report)
"""


def test_a_complete_cache_needs_no_decoder(folder, cache):
    add(folder, "short.mp4", 3, "a dog")
    (folder / "text.mp4").write_text("no video")
    (folder / "text.txt").write_text("a dog")
    build(folder, SPEC, cache)
    done = run_script(READY, folder, cache)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "[2, 3, 9, 4, 6]"
    assert lines[1] == "kept 3 clips of 3 videos: 0 encoded, 3 from the cache"
    assert lines[2] == "dropped 2: 1 too short, 1 undecodable"
    assert (
        lines[3]
        == "  short.mp4  too short: 6 frames (0.4 s) missing: 0.2 s = 3 frames at 16 fps, 9 needed"
    )
    assert lines[4].startswith("  text.mp4   undecodable: not a readable video (Invalid data")


@pytest.mark.parametrize("damage", ["gone", "torn", "garbage", "foreign"])
def test_the_manifest_is_made_again(folder, cache, damage):
    first = build(folder, SPEC, cache, extra_captions=[""])
    (path,) = (p for p in (cache / "manifests").iterdir() if "dropped" not in p.name)
    good = path.read_bytes()
    bad = {"torn": good[:-9], "garbage": b"\xff", "foreign": b"[1]\n{}\n"}
    path.unlink() if damage == "gone" else path.write_bytes(bad[damage])
    again = build(folder, SPEC, cache, never, extra_captions=[""])
    assert (again.entries, again.texts) == (first.entries, first.texts)
    assert path.read_bytes() == good


def test_a_full_cache_is_opened_by_its_manifest_alone(folder, cache, monkeypatch):
    first = build(folder, SPEC, cache, extra_captions=[""])
    shutil.rmtree(cache / "ledger")

    def looks(*arguments):
        raise AssertionError("the videos are looked at")

    monkeypatch.setattr(prepare, "survey", looks)
    again = build(folder, SPEC, cache, never, extra_captions=[""])
    assert (again.entries, again.texts) == (first.entries, first.texts)
    assert not (cache / "ledger").exists()
    for change in ("a video", "a caption", "latents", "an extra caption"):
        extra = ["", "new"] if change == "an extra caption" else [""]
        path = {"a video": folder / "a.mp4", "latents": first.entries[1].latents}.get(change)
        if path is not None:
            os.utime(path)
        caption = folder / "b.txt"
        caption.write_text("a fish" if change == "a caption" else "a cat")
        with pytest.raises(AssertionError, match="are looked at"):
            build(folder, SPEC, cache, never, extra_captions=extra)
        monkeypatch.undo()
        caption.write_text("a cat")
        build(folder, SPEC, cache, extra_captions=[""])
        monkeypatch.setattr(prepare, "survey", looks)


def test_a_cache_that_can_only_be_read_is_used(folder, cache, monkeypatch):
    first = build(folder, SPEC, cache)

    def refused(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refused)
    assert build(folder, SPEC, cache, never).entries == first.entries


def test_a_caption_that_is_not_utf_8_does_not_slow_every_start_down(folder, cache, monkeypatch):
    add(folder, "d.mp4", 12, None).with_suffix(".txt").write_bytes(b"\xff\xfe\xfa")
    first = build(folder, SPEC, cache)
    assert [item.kind for item in first.report.dropped] == ["no caption"]
    monkeypatch.setattr(prepare, "survey", None)
    assert build(folder, SPEC, cache, never).report.dropped == first.report.dropped
