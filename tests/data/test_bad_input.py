"""Each kind of bad file that folders really contain is reported, and the rest is used."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from stub_cache import SPEC, add, build
from videos import noise

from longreel.data.captions import CaptionLimit


def caption(folder: Path, name: str, text: str | bytes = "a fish") -> None:
    path = (folder / name).with_suffix(".txt")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def truncated(folder: Path) -> None:
    path = add(folder, "bad.mp4", 60, "a fish", frames=noise(60))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 10])


def zero_bytes(folder: Path) -> None:
    (folder / "bad.mp4").touch()
    caption(folder, "bad.mp4")


def audio_only(folder: Path) -> None:
    with av.open(str(folder / "bad.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        silence = np.zeros((1, 1024), np.float32)
        for index in range(8):
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    caption(folder, "bad.mp4")


def text_under_a_video_s_name(folder: Path) -> None:
    (folder / "bad.mp4").write_text("this is no video " * 99)
    caption(folder, "bad.mp4")


def unknown_extension(folder: Path) -> None:
    add(folder, "bad.mkv", 12, "a fish").rename(folder / "bad.mp5")


def no_caption(folder: Path) -> None:
    add(folder, "bad.mp4", 12, "").with_suffix(".txt").unlink()


def empty_caption(folder: Path) -> None:
    add(folder, "bad.mp4", 12, " \n")


def caption_not_utf_8(folder: Path) -> None:
    add(folder, "bad.mp4", 12, "")
    caption(folder, "bad.mp4", "ein Käfer".encode("latin-1"))


def path_outside(folder: Path) -> None:
    add(folder.parent, "bad.mp4", 12, "a fish")
    row = {"file_name": "../bad.mp4", "caption": "a fish"}
    (folder / "metadata.jsonl").write_text(json.dumps(row))


def link_to_itself(folder: Path) -> None:
    (folder / "bad.mp4").symlink_to("bad.mp4")
    caption(folder, "bad.mp4")


def duplicate(folder: Path) -> None:
    (folder / "same.mp4").write_bytes((folder / "good.mp4").read_bytes())
    caption(folder, "same.mp4", "good")


def too_short(folder: Path) -> None:
    add(folder, "bad.mp4", 12, "a fish", fps=25)


CASES: list[tuple[Callable[[Path], None], str, str]] = [
    (truncated, "undecodable", r"bad.mp4: (not a readable video|damaged after \d.\d s) \(.*\)"),
    (zero_bytes, "undecodable", "bad.mp4: the file is empty"),
    (audio_only, "undecodable", "bad.mp4: there is no video stream in it"),
    (text_under_a_video_s_name, "undecodable", r"bad.mp4: not a readable video \(Invalid data.*\)"),
    (
        unknown_extension,
        "no video extension",
        "bad.mp5: .mp5 is not among .avi, .*: rename it, .*",
    ),
    (no_caption, "no caption", "bad.mp4: neither a row in metadata.jsonl, .* nor a file bad.txt"),
    (empty_caption, "no caption", "bad.mp4: bad.txt is empty"),
    (
        caption_not_utf_8,
        "no caption",
        r"bad.mp4: bad.txt cannot be read as UTF-8 text \(.*0xe4.*\)",
    ),
    (path_outside, "outside the folder", "../bad.mp4: metadata.jsonl line 1: lies outside .*/v"),
    (
        link_to_itself,
        "unreadable",
        r"bad.mp4: cannot be read \(Too many levels of symbolic links\)",
    ),
    (
        duplicate,
        "repeated",
        "same.mp4: from frame 0 on: the same pictures and caption as good.mp4@0",
    ),
    (
        too_short,
        "too short",
        r"bad.mp4: 1 frames \(0.1 s\) missing: 0.5 s = 8 frames at 16 fps, .*",
    ),
]


@pytest.mark.parametrize(("make", "kind", "message"), CASES, ids=[c[0].__name__ for c in CASES])
def test_one_bad_input_is_told_and_the_rest_is_used(tmp_path, make, kind, message):
    folder, cache = tmp_path / "v", tmp_path / "cache"
    add(folder, "good.mp4", 12, "good")
    make(folder)
    report = build(folder, SPEC, cache).report
    assert report.kept == report.encoded == 1
    (bad,) = report.dropped
    assert bad.kind == kind and re.fullmatch(message, f"{bad.name}: {bad.reason}", re.DOTALL)
    assert report.lines()[1] == f"dropped 1: 1 {kind}"
    again = build(folder, SPEC, cache, None).report  # loads no encoder
    assert again.dropped == report.dropped and (again.kept, again.encoded) == (1, 0)
    with pytest.raises(ValueError, match="1 unusable; fix or remove them, or set data.strict"):
        build(folder, SPEC, tmp_path / "other", None, strict=True)
    assert not list((tmp_path / "other").rglob("*.safetensors"))


def test_a_folder_linked_into_itself_is_walked_once(tmp_path):
    add(tmp_path / "v", "good.mp4", 12, "good")
    (tmp_path / "v" / "again").symlink_to(tmp_path / "v")
    report = build(tmp_path / "v", SPEC, tmp_path / "cache").report
    assert (report.kept, report.dropped) == (1, [])


def test_a_video_under_another_one_s_extension_is_read_by_its_content(tmp_path):
    add(tmp_path / "v", "really.mkv", 12, "good").rename(tmp_path / "v" / "really.mp4")
    report = build(tmp_path / "v", SPEC, tmp_path / "cache").report
    assert (report.kept, report.dropped) == (1, [])


def test_a_far_too_long_caption_is_used_and_its_cut_end_is_told(tmp_path):
    words = [f"word{index}" for index in range(3000)]
    add(tmp_path / "v", "good.mp4", 12, " ".join(words))
    limit = CaptionLimit(511, lambda text: (len(text.split()), " ".join(text.split()[511:])))
    report = build(tmp_path / "v", SPEC, tmp_path / "cache", caption_limit=limit).report
    assert (report.kept, report.dropped) == (1, [])
    note = report.lines()[-1]
    assert note.startswith("caption 'word0 word1 word2 ")
    assert "has 3000 tokens, of which the model reads 511; cut: 'word511 word512 " in note


def test_a_replaced_video_is_encoded_anew_and_the_old_clip_is_kept(tmp_path):
    folder, cache = tmp_path / "v", tmp_path / "cache"
    path = add(folder, "a.mp4", 12, "good")
    times = os.stat(path)
    (before,) = build(folder, SPEC, cache).entries
    add(folder, "a.mp4", 12, "good", frames=noise(12))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as `cp -p` does
    replaced = build(folder, SPEC, cache)
    assert replaced.report.encoded == 1 and replaced.entries[0].latents != before.latents
    assert before.latents.exists()
