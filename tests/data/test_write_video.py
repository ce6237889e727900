"""Written videos read back, and a failed write leaves nothing behind."""

import weakref

import numpy as np
import pytest
from videos import numbers, painted

from longreel.data.decode import VideoInfo, examine, probe, read_clip
from longreel.data.write_video import write_video

COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 100, 50], [10, 10, 10]], np.uint8)


def test_colours_survive_writing_and_reading(tmp_path):
    frames = [np.broadcast_to(colour, (32, 32, 3)) for colour in COLOURS]
    write_video(tmp_path / "a.mp4", frames, 5)
    clip = read_clip(tmp_path / "a.mp4", start=0, frames=5, fps=5, height=32, width=32)
    assert np.abs(clip[:, 16, 16].astype(int) - COLOURS).max() <= 6


def test_written_video_reads_back(tmp_path):
    path = tmp_path / "new" / "a.mp4"
    write_video(path, (painted(index, 33, 49) for index in range(20)), 16)
    assert probe(path) == VideoInfo(fps=16.0, duration=1.25, width=48, height=32)
    assert examine(path, 16).frames == 20 and not examine(path, 16).fault
    clip = read_clip(path, start=0, frames=20, fps=16, height=32, width=48)
    assert numbers(clip) == list(range(20))
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # playable before it is complete


def test_writing_streams(tmp_path):
    alive: list[weakref.ref] = []

    def frames():
        for index in range(40):
            pixels = painted(index)
            alive.append(weakref.ref(pixels))
            assert sum(reference() is not None for reference in alive) <= 4
            yield pixels

    write_video(tmp_path / "a.mp4", frames(), 16)
    assert len(alive) == 40


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, [painted(0)] * 3, 16)
    before = path.read_bytes()

    def broken():
        yield painted(1)
        raise RuntimeError("the sampler failed")

    with pytest.raises(RuntimeError, match="the sampler failed"):
        write_video(path, broken(), 16)
    for frames in ([], [painted(0), painted(0, 32)], [painted(0) / 255], [painted(0)[..., 0]]):
        with pytest.raises(ValueError, match=r"a\.mp4: "):
            write_video(path, frames, 16)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
