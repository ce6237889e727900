import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from videos import noise, numbers, steady

from longreel.data import decode, encode
from longreel.data.cache import SCHEMA, Bucket, CacheSpec, Encoders, Entry
from longreel.data.dataset import LatentDataset, read_text, split
from longreel.data.decode import read_clip, write_video
from longreel.data.encode import Prepared
from longreel.data.files import digest, read_tensors
from longreel.data.report import Report
from longreel.data.sources import Dropped, SourceSpec, list_videos

BUCKET = Bucket(9, 32, 48)
SPEC = CacheSpec((BUCKET,), fps=16, video_encoder="tiny-vae", text_encoder="tiny-text")


def prepare(folder: Path, *arguments, **options) -> Prepared:
    return encode.prepare(list_videos(SourceSpec(path=str(folder))), *arguments, **options)


class Tiny:
    """Encoders that log their calls; latents are [3, F, h / 8, w / 8] samples of the pixels."""

    def __init__(self, clips_before_failure: int | None = None) -> None:
        self.loads, self.clips, self.captions = 0, [], []
        self.clips_before_failure = clips_before_failure

    def __call__(self) -> Encoders:
        self.loads += 1
        return Encoders(self.video, self.text)

    def video(self, pixels: np.ndarray) -> torch.Tensor:
        assert pixels.dtype == np.uint8
        if len(self.clips) == self.clips_before_failure:
            raise KeyboardInterrupt
        self.clips.append(numbers(pixels))
        return torch.from_numpy(pixels[:, ::8, ::8].copy()).permute(3, 0, 1, 2).bfloat16()

    def text(self, caption: str) -> dict[str, torch.Tensor]:
        self.captions.append(caption)
        return {"embeds": torch.full((len(caption), 2), 0.5), "mask": torch.ones(len(caption))}


def never() -> Encoders:
    raise AssertionError("a complete cache loads no encoder")


def add(folder: Path, name: str, num_frames: int, caption: str | None, fps: int = 16) -> Path:
    path = steady(folder / name, num_frames, fps)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three videos of 20, 30 and 9 frames, two of them with the same caption."""
    folder = tmp_path / "videos"
    add(folder, "a.mp4", 20, "a dog")
    add(folder, "b.mp4", 30, "a cat")
    add(folder, "deep/c.mp4", 9, "a dog")
    return folder


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def content(cache: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of the cache with its time of writing."""
    files = (path for path in cache.rglob("*.*") if path.parent.name != "manifests")
    return {path.as_posix(): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_what_is_built(folder, cache):
    tiny, stages = Tiny(), []
    prepared = prepare(
        folder,
        SPEC,
        cache,
        tiny,
        extra_captions=["", "a bird", "a cat"],
        progress=lambda *call: call in stages or stages.append(call),
    )
    assert tiny.loads == 1
    assert tiny.clips == [list(range(9))] * 3
    assert tiny.captions == ["a dog", "a cat", "", "a bird"]
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
    tiny = Tiny()
    prepared = prepare(tmp_path / "videos", spec, cache, tiny)
    assert [entry.start for entry in prepared.entries] == starts
    assert tiny.clips == [list(range(start, start + 9)) for start in starts]
    assert prepared.report.kept == len(starts) and prepared.report.sources == 1
    again = prepare(tmp_path / "videos", spec, cache, never)
    assert again.entries == prepared.entries
    assert (again.report.encoded, again.report.reused) == (0, len(starts))


def test_a_complete_cache_is_only_read(folder, cache):
    first = prepare(folder, SPEC, cache, Tiny(), extra_captions=[""])
    before = content(cache)
    second = prepare(folder, SPEC, cache, never, extra_captions=[""])
    assert (second.entries, second.texts) == (first.entries, first.texts)
    assert str(second.report) == "kept 3 clips of 3 videos: 0 encoded, 3 from the cache"
    assert content(cache) == before


READY = """
import sys
sys.modules["av"] = sys.modules["datasets"] = None  # importing them fails
from longreel.data.dataset import LatentDataset
from longreel.data.cache import Bucket, CacheSpec
from longreel.data.encode import prepare
from longreel.data.loader import Loader
from longreel.data.sampler import SeededBatches
from longreel.data.sources import SourceSpec, list_videos
spec = CacheSpec((Bucket(9, 32, 48),), 16, "tiny-vae", "tiny-text")
listing = list_videos(SourceSpec(path=sys.argv[1]))
prepared = prepare(listing, spec, sys.argv[2], load_encoders=None)
data = LatentDataset(prepared.entries)
batch = next(iter(Loader(data, SeededBatches(len(data), 2, 0), workers=1)))
print(list(batch["latents"].shape))
print(prepared.report)
"""


def run(script: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_complete_cache_needs_no_decoder(folder, cache):
    add(folder, "short.mp4", 3, "a dog")
    (folder / "text.mp4").write_text("no video")
    (folder / "text.txt").write_text("a dog")
    prepare(folder, SPEC, cache, Tiny())
    done = run(READY, folder, cache)
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


@pytest.mark.parametrize(
    ("change", "clips", "texts"),
    [
        ({"buckets": (Bucket(8, 32, 48),)}, 3, 0),
        ({"buckets": (Bucket(9, 40, 48),)}, 3, 0),
        ({"buckets": (Bucket(9, 32, 40),)}, 3, 0),
        ({"canonical": True}, 3, 0),
        ({"fps": 15}, 3, 0),
        ({"video_encoder": "other"}, 3, 0),
        ({"text_encoder": "other"}, 0, 2),
        ({"windows": "all"}, 3, 0),  # the three further clips of two videos
        ({"stride": 4}, 0, 0),
        ({"fps": 16.0}, 0, 0),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_a_changed_setting_meets_no_stale_file(folder, cache, change, clips, texts):
    first = prepare(folder, SPEC, cache, Tiny())
    tiny = Tiny()
    second = prepare(folder, replace(SPEC, **change), cache, tiny)
    assert (len(tiny.clips), len(tiny.captions)) == (clips, texts)
    assert tiny.loads == (clips + texts > 0)
    assert second.report.encoded == clips
    assert prepare(folder, SPEC, cache, never).entries == first.entries


def test_a_changed_video_or_caption_is_encoded_anew(folder, cache):
    first = prepare(folder, SPEC, cache, Tiny())
    add(folder, "a.mp4", 12, "a horse")
    tiny = Tiny()
    second = prepare(folder, SPEC, cache, tiny)
    assert len(tiny.clips) == 1 and tiny.captions == ["a horse"]
    assert second.entries[0].latents != first.entries[0].latents
    assert second.entries[1:] == first.entries[1:]


def test_a_renamed_video_is_reused_and_a_copy_is_encoded_once(folder, cache):
    prepare(folder, SPEC, cache, Tiny())
    for suffix in (".mp4", ".txt"):
        (folder / "a").with_suffix(suffix).rename((folder / "z").with_suffix(suffix))
    renamed = prepare(folder, SPEC, cache, never)
    assert [entry.id for entry in renamed.entries] == ["b.mp4@0", "deep/c.mp4@0", "z.mp4@0"]
    (folder / "copy.mp4").write_bytes((folder / "z.mp4").read_bytes())
    (folder / "copy.txt").write_text("a dog")
    tiny = Tiny()
    copied = prepare(folder, replace(SPEC, video_encoder="other"), cache, tiny)
    assert len(copied.entries) == 3 and len(tiny.clips) == 3
    reason = "frame 0 on: the same pictures and caption as copy.mp4@0"
    assert copied.report.dropped == [Dropped("z.mp4", "repeated", reason)]
    (folder / "copy.txt").write_text("another dog")
    other = prepare(folder, replace(SPEC, video_encoder="other"), cache, Tiny())
    assert LatentDataset(other.entries)[3]["id"] == "z.mp4@0"
    train, heldout = split(other.entries, 2)  # copies go together
    assert len({entry.group for entry in heldout}) == 2 and len(train) + len(heldout) == 4


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "foreign"])
def test_a_torn_file_is_encoded_again(folder, cache, damage):
    first = prepare(folder, SPEC, cache, Tiny())
    victims = [first.entries[1].latents, first.texts["a dog"]]
    good = [path.read_bytes() for path in victims]
    for path, data in zip(victims, good, strict=True):
        if damage == "foreign":
            from safetensors.torch import save_file

            save_file({"latents": torch.zeros(1)}, path)
        else:
            torn = {"truncated": data[:-7], "empty": b"", "garbage": b"x" * len(data)}
            path.write_bytes(torn[damage])
    tiny = Tiny()
    second = prepare(folder, SPEC, cache, tiny)
    assert (len(tiny.clips), tiny.captions) == (1, ["a dog"])
    assert second.report.encoded == 1 and second.report.reused == 2
    assert [path.read_bytes() for path in victims] == good


@pytest.mark.parametrize("damage", ["gone", "torn", "garbage"])
def test_the_ledger_is_made_again(folder, cache, damage):
    first = prepare(folder, SPEC, cache, Tiny())
    for path in (cache / "ledger").iterdir():
        content = path.read_bytes()
        torn = {"torn": content[: len(content) // 2], "garbage": b"\xff{}\n[1]\n"}
        path.unlink() if damage == "gone" else path.write_bytes(torn[damage])
    shutil.rmtree(cache / "manifests")
    assert prepare(folder, SPEC, cache, never).entries == first.entries
    before = content_of_ledger(cache)
    shutil.rmtree(cache / "manifests")
    assert prepare(folder, SPEC, cache, never).entries == first.entries
    assert content_of_ledger(cache) == before and len(before) >= 3


@pytest.mark.parametrize("damage", ["gone", "torn", "garbage", "foreign"])
def test_the_manifest_is_made_again(folder, cache, damage):
    first = prepare(folder, SPEC, cache, Tiny(), extra_captions=[""])
    (path,) = (p for p in (cache / "manifests").iterdir() if "dropped" not in p.name)
    good = path.read_bytes()
    bad = {"torn": good[:-9], "garbage": b"\xff", "foreign": b"[1]\n{}\n"}
    path.unlink() if damage == "gone" else path.write_bytes(bad[damage])
    again = prepare(folder, SPEC, cache, never, extra_captions=[""])
    assert (again.entries, again.texts) == (first.entries, first.texts)
    assert path.read_bytes() == good


def test_a_full_cache_is_opened_by_its_manifest_alone(folder, cache, monkeypatch):
    first = prepare(folder, SPEC, cache, Tiny(), extra_captions=[""])
    shutil.rmtree(cache / "ledger")

    def looks(*arguments):
        raise AssertionError("the videos are looked at")

    monkeypatch.setattr(encode, "survey", looks)
    again = prepare(folder, SPEC, cache, never, extra_captions=[""])
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
            prepare(folder, SPEC, cache, never, extra_captions=extra)
        monkeypatch.undo()
        caption.write_text("a cat")
        prepare(folder, SPEC, cache, Tiny(), extra_captions=[""])
        monkeypatch.setattr(encode, "survey", looks)


def content_of_ledger(cache: Path) -> set[str]:
    paths = (cache / "ledger").iterdir()
    return {line for p in paths for line in p.read_text(errors="replace").splitlines()}


def test_an_interrupted_build_goes_on_where_it_stopped(folder, cache):
    interrupted = Tiny(clips_before_failure=2)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, SPEC, cache, interrupted)
    tiny = Tiny()
    prepared = prepare(folder, SPEC, cache, tiny)
    assert (len(interrupted.clips), len(tiny.clips), tiny.captions) == (2, 1, [])
    assert (prepared.report.encoded, prepared.report.reused) == (1, 2)
    assert not list(cache.rglob("*.tmp"))


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from longreel.data.cache import Bucket, CacheSpec, Encoders
from longreel.data.encode import prepare
from longreel.data.sources import SourceSpec, list_videos
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
    killed = run(KILLED, folder, cache, 4)  # two captions, a clip, half a clip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    tiny = Tiny()
    prepared = prepare(folder, SPEC, cache, tiny)
    assert (len(tiny.clips), tiny.captions) == (2, [])
    assert (prepared.report.encoded, prepared.report.reused) == (2, 1)
    assert len(list(cache.rglob("*.tmp"))) == 1  # half a file, for `longreel cache gc`


def test_builds_at_the_same_time_do_not_disturb_each_other(folder, cache):
    add(folder, "d.mp4", 40, "a horse")
    spec = replace(SPEC, windows="all")
    with ThreadPoolExecutor(4) as pool:
        builds = [pool.submit(prepare, folder, spec, cache, Tiny()) for _ in range(4)]
        results: list[Prepared] = [build.result() for build in builds]
    assert all(result.entries == results[0].entries for result in results)
    assert not list(cache.rglob("*.tmp"))
    assert len(LatentDataset(prepare(folder, spec, cache, never).entries)) == 10


@pytest.fixture
def poor(folder) -> Path:
    """The three good videos, and one of each fault."""
    add(folder, "long_enough.mp4", 13, "25 fps", fps=25)
    add(folder, "short.mp4", 12, "25 fps", fps=25)
    add(folder, "mute.mp4", 20, None)
    for name, data in {"empty": b"", "text": b"hello " * 99}.items():
        (folder / f"{name}.mp4").write_bytes(data)
        (folder / f"{name}.txt").write_text("a fish")
    write_video(folder / "cut.mp4", noise(60), 16)
    (folder / "cut.txt").write_text("noise")
    data = (folder / "cut.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(data[: len(data) // 2])
    return folder


def test_faults_are_reported_and_the_rest_is_used(poor, cache):
    spec, tiny = replace(SPEC, windows="all"), Tiny()
    prepared = prepare(poor, spec, cache, tiny)
    dropped = {item.name: item.reason for item in prepared.report.dropped}
    assert dropped.pop("text.mp4").startswith("not a readable video (")
    assert dropped.pop("cut.mp4").startswith("damaged after 1.")
    assert dropped == {
        "empty.mp4": "the file is empty",
        "mute.mp4": "neither a row in metadata.jsonl, metadata.csv or metadata.parquet "
        "nor a file mute.txt",
        "short.mp4": "1 frames (0.1 s) missing: 0.5 s = 8 frames at 16 fps, 9 needed",
    }
    sources = {entry.source for entry in prepared.entries}
    assert sources == {"a.mp4", "b.mp4", "deep/c.mp4", "long_enough.mp4", "cut.mp4"}
    assert "a fish" not in prepared.texts
    lines = prepared.report.lines()
    assert lines[0] == "kept 10 clips of 5 videos: 10 encoded, 0 from the cache"
    assert lines[1] == "dropped 5: 3 undecodable, 1 no caption, 1 too short" and len(lines) == 7
    again = prepare(poor, spec, cache, never).report
    assert again.dropped == prepared.report.dropped


def test_strict_refuses_faults_before_anything_is_loaded(poor, cache):
    with pytest.raises(ValueError) as caught:
        prepare(poor, SPEC, cache, never, strict=True)
    first, *rest = str(caught.value).splitlines()
    assert first == f"{poor}: 4 unusable; mend or remove them, or set data.strict=false:"
    assert rest[0] == "  empty.mp4  undecodable: the file is empty" and len(rest) == 4


def test_nothing_left_is_refused_before_anything_is_loaded(tmp_path, cache):
    for index in range(7):
        add(tmp_path / "videos", f"{index}.mp4", 4 + index % 2, "a dog")
    with pytest.raises(ValueError) as caught:
        prepare(tmp_path / "videos", SPEC, cache, never)
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'videos'} gives no clip to train on; "
        "mend the videos or captions, or ask for less:",
        "  0.mp4  too short: 5 frames (0.3 s) missing: 0.2 s = 4 frames at 16 fps, 9 needed",
        "  1.mp4  too short: 4 frames (0.2 s) missing: 0.3 s = 5 frames at 16 fps, 9 needed",
        "  2.mp4  too short: 5 frames (0.3 s) missing: 0.2 s = 4 frames at 16 fps, 9 needed",
        "  3.mp4  too short: 4 frames (0.2 s) missing: 0.3 s = 5 frames at 16 fps, 9 needed",
        "  4.mp4  too short: 5 frames (0.3 s) missing: 0.2 s = 4 frames at 16 fps, 9 needed",
        "  and 2 more",
    ]


def test_a_fault_is_not_believed_after_an_upgrade_of_the_decoder(folder, cache):
    (folder / "text.mp4").write_text("no video")
    (folder / "text.txt").write_text("a dog")
    assert len(prepare(folder, SPEC, cache, Tiny()).report.dropped) == 1
    for path in (cache / "ledger").iterdir():
        facts = [json.loads(line) for line in path.read_text().splitlines()]
        for kind, _, value in facts:
            if kind.startswith("video") and value[5]:  # frames, whole, size, cuts, fault, decoder
                value[5:] = ["there is no decoder", "1.0"]
        path.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    assert prepare(folder, SPEC, cache, never).report.dropped[0].reason.startswith("not a readable")


def test_a_video_that_goes_away_after_the_check_is_dropped(folder, cache):
    def load() -> Encoders:
        (folder / "b.mp4").unlink()
        return Tiny()()

    prepared = prepare(folder, SPEC, cache, load)
    assert [entry.source for entry in prepared.entries] == ["a.mp4", "deep/c.mp4"]
    reason = "cannot be read (No such file or directory)"
    assert prepared.report.dropped == [Dropped("b.mp4", "unreadable", reason)]


@pytest.mark.parametrize("canonical", [False, True])
def test_a_video_that_is_replaced_while_others_are_encoded_is_not_kept_under_its_old_name(
    folder, cache, canonical
):
    """Pixels of the new one, found by the old one's hash, would be wrong for ever."""
    spec = replace(SPEC, canonical=canonical)
    (folder / "old.mp4").write_bytes((folder / "b.mp4").read_bytes())

    def load() -> Encoders:
        write_video(folder / "b.mp4", noise(40), 16)
        (folder / "a.mp4").touch()  # the same content: nothing is wrong with it
        return Tiny()()

    prepared = prepare(folder, spec, cache, load)
    if canonical:  # copies were made before
        assert [entry.source for entry in prepared.entries] == ["a.mp4", "b.mp4", "deep/c.mp4"]
    else:
        assert [entry.source for entry in prepared.entries] == ["a.mp4", "deep/c.mp4"]
        reason = "cannot be read (it was replaced meanwhile: run again)"
        assert Dropped("b.mp4", "unreadable", reason) in prepared.report.dropped
    prepare(folder, spec, cache, Tiny())  # the new one
    (folder / "old.mp4").rename(folder / "b.mp4")
    again = prepare(folder, spec, cache, Tiny()).entries
    alone = prepare(folder, spec, cache.with_name("alone"), Tiny()).entries
    assert [e.latents.read_bytes() for e in again] == [e.latents.read_bytes() for e in alone]


def test_a_video_that_is_replaced_while_it_is_checked_is_not_remembered(folder, cache, monkeypatch):
    real = decode.examine

    def slow(path, *arguments, **options):
        facts = real(path, *arguments, **options)
        if path.name == "b.mp4" and not done:
            done.append(add(folder, "b.mp4", 33, "a cat"))
        return facts

    done = []
    monkeypatch.setattr(decode, "examine", slow)
    spec = replace(SPEC, windows="all")
    prepared = prepare(folder, spec, cache, Tiny())
    reason = "cannot be read (it was replaced meanwhile: run again)"
    assert prepared.report.dropped == [Dropped("b.mp4", "unreadable", reason)]
    again = prepare(folder, spec, cache, Tiny())
    assert [e.start for e in again.entries if e.source == "b.mp4"] == [0, 9, 18]
    assert again.report.dropped == []


def test_a_cache_that_can_only_be_read_is_used(folder, cache, monkeypatch):
    first = prepare(folder, SPEC, cache, Tiny())

    def refused(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refused)
    assert prepare(folder, SPEC, cache, never).entries == first.entries


def test_a_caption_that_is_not_utf_8_does_not_slow_every_start_down(folder, cache, monkeypatch):
    add(folder, "d.mp4", 12, None).with_suffix(".txt").write_bytes(b"\xff\xfe\xfa")
    first = prepare(folder, SPEC, cache, Tiny())
    assert [item.kind for item in first.report.dropped] == ["no caption"]
    monkeypatch.setattr(encode, "survey", None)
    assert prepare(folder, SPEC, cache, never).report.dropped == first.report.dropped


def test_a_disk_that_fills_up_ends_the_build_and_it_goes_on(folder, cache, monkeypatch):
    written = []

    def full(source, target):
        if len(written) == 5:  # two files of a manifest, two captions and a clip
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(target)
        os.rename(source, target)

    monkeypatch.setattr("longreel.data.files.os.replace", full)
    with pytest.raises(ValueError, match=f"the disk of cache.dir={cache} is full .* goes on"):
        prepare(folder, SPEC, cache, Tiny())
    assert not list(cache.rglob("*.tmp"))
    monkeypatch.undo()
    tiny = Tiny()
    assert prepare(folder, SPEC, cache, tiny).report.dropped == []
    assert (len(tiny.clips), tiny.captions) == (2, [])


def test_a_disk_that_is_full_for_the_ledger_is_not_blamed_on_the_videos(folder, cache, monkeypatch):
    def full(self, kind, key, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("longreel.data.ledger.Ledger.put", full)
    with pytest.raises(ValueError, match="is full"):
        prepare(folder, SPEC, cache, never)


def test_a_disk_without_room_is_refused_before_anything_is_loaded(folder, cache):
    huge = replace(SPEC, buckets=(replace(BUCKET, bytes=10**15, tokens=1),))
    with pytest.raises(ValueError, match=r"needs 3000000.0 GB for 3 clips, and its disk has"):
        prepare(folder, huge, cache, never)


def test_a_video_that_cannot_be_opened_is_dropped_but_not_remembered(folder, cache, tmp_path):
    """A link into a disk that is not mounted, say."""
    (folder / "a.mp4").rename(tmp_path / "moved.mp4")
    (folder / "a.mp4").symlink_to(tmp_path / "disk.mp4")
    dropped = prepare(folder, SPEC, cache, Tiny()).report.dropped
    reason = "cannot be read (No such file or directory)"
    assert dropped == [Dropped("a.mp4", "unreadable", reason)]
    (tmp_path / "moved.mp4").rename(tmp_path / "disk.mp4")
    report = prepare(folder, SPEC, cache, Tiny()).report
    assert (report.kept, report.encoded, report.reused, report.dropped) == (3, 1, 2, [])


def test_damage_after_the_first_clip_matters_only_if_all_are_wanted(poor, cache):
    def cut(windows: str) -> bool:
        report = prepare(poor, replace(SPEC, windows=windows), cache, Tiny()).report
        return "cut.mp4" in [item.name for item in report.dropped]

    assert [cut("first"), cut("all"), cut("first")] == [False, True, False]


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
        prepare(folder, SPEC, cache, lambda: encoders)
    assert not list((cache / "latents").rglob("*.*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"buckets": ()}, "buckets is empty"),
        ({"fps": -1.0}, "fps is -1.0: it must be above 0"),
        ({"windows": "some"}, "windows is 'some': choose 'first' or 'all'"),
        ({"stride": -3}, "stride is -3"),
    ],
)
def test_impossible_specs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SPEC, **change)


def test_dataset_items(folder, cache):
    prepared = prepare(folder, SPEC, cache, Tiny())
    data = LatentDataset(prepared.entries)
    assert len(data) == 3
    item = data[1]
    assert set(item) == {"latents", "shape", "text", "id"} and item["id"] == "b.mp4@0"
    assert item["latents"].shape == (3, 9, 4, 6) and item["latents"].dtype == torch.bfloat16
    assert item["text"]["embeds"].shape == (5, 2) and item["text"]["mask"].shape == (5,)


def test_dataset_refuses_damaged_files(folder, cache):
    prepared = prepare(folder, replace(SPEC, windows="all"), cache, Tiny())
    first, second, *_ = prepared.entries
    data = LatentDataset(prepared.entries)
    first.latents.write_bytes(second.latents.read_bytes())
    with pytest.raises(ValueError, match=f"cache file {first.latents} is damaged .*frame 0 on"):
        data[0]
    second.latents.write_bytes(b"")
    with pytest.raises(ValueError, match=f"cache file {second.latents} is damaged .*run again"):
        data[1]
    prepared.entries[2].text.unlink()
    with pytest.raises(ValueError, match="is damaged .*No such file.*run again"):
        data[2]


def entries(*names: str) -> list[Entry]:
    path = Path("x")
    return [
        Entry(f"{name}@{start}", name, path, path, "", start, BUCKET, name)
        for name in names
        for start in (0, 9)
    ]


def test_split_holds_out_whole_videos():
    everything = entries(*(f"{index}.mp4" for index in range(20)))
    train, held_out = split(everything, 4)
    assert len(held_out) == 8 and len(train) == 32
    held_names = {entry.source for entry in held_out}
    assert len(held_names) == 4 and held_names.isdisjoint(entry.source for entry in train)
    assert sorted([*train, *held_out], key=everything.index) == everything
    assert split(everything[::-1], 4)[1] == held_out[::-1]
    assert split(everything, 0) == (everything, [])


def test_split_is_stable_when_videos_are_added():
    names = [f"{index}.mp4" for index in range(20)]
    before = {entry.source for entry in split(entries(*names), 4)[1]}
    for index in range(20, 60):
        after = {entry.source for entry in split(entries(*names, f"{index}.mp4"), 4)[1]}
        assert len(before - after) <= 1


def test_split_that_leaves_nothing_is_refused():
    with pytest.raises(
        ValueError, match="holding out 2 of 2 usable videos leaves none to train on"
    ):
        split(entries("a.mp4", "b.mp4"), 2)
    with pytest.raises(ValueError, match="cannot hold out -1 videos"):
        split(entries("a.mp4"), -1)
