"""Read video files through PyAV.

Frames are chosen by their timestamps, never by their number: files in the wild have variable frame
rates, dropped frames and wrong headers. Decoding runs from the start of the file, because a seek
lands on the wrong frame in many of them.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
from av import VideoStream
from av.container import InputContainer
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from .picture import Picture
from .report import too_short
from .shots import CutDetector

# Seconds. Matroska and WebM round timestamps to the millisecond: without this slack a frame that
# is due exactly at the wanted time would sometimes count as late.
TOLERANCE = 1e-3
# Frames that H.264 and HEVC let a decoder hold back in order to sort them.
REORDER_WINDOW = 16


class DecodeError(ValueError):
    """Raised for a file that does not give the wanted frames.

    frames: number of output frames that can be read before the fault.
    """

    def __init__(self, name: str, reason: str, frames: int = 0) -> None:
        super().__init__(name, reason, frames)
        self.name, self.reason, self.frames = name, reason, frames

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class VideoInfo:
    """Describes a video by its header and its first frame.

    fps: average frame rate. duration: seconds according to the header, which may be wrong or 0.
    width, height: size of the upright picture with square pixels.
    """

    fps: float
    duration: float
    width: int
    height: int


def probe(path: str | Path) -> VideoInfo:
    """Read the header and the first frame. Raises DecodeError if no frame can be decoded."""
    for _, picture in _decode(Path(path)):
        height, width = picture.upright_size
        return VideoInfo(float(picture.rate), picture.stated_duration, width, height)
    raise AssertionError("a stream without frames is a DecodeError")


@dataclass
class VideoFacts:
    """Holds what decoding a video found.

    frames: number of frames at the requested rate. height, width: size of the upright picture.
    cuts: frames that begin a shot. fault: what is wrong with the file after `frames` frames, empty
    if nothing.
    """

    frames: int = 0
    height: int = 0
    width: int = 0
    cuts: list[int] = field(default_factory=list)
    fault: str = ""


def examine(
    path: str | Path, fps: float, limit: int | None = None, *, find_cuts: bool = False
) -> VideoFacts:
    """Decode a video resampled to `fps`, up to `limit` frames or the first damage.

    I/O errors are raised as OSError, because they say nothing about the content.
    """
    facts, detector, scaler = VideoFacts(), CutDetector(), VideoReformatter()
    latest = None
    try:
        for picture in islice(resampled(Path(path), fps), limit):
            if latest is None:
                facts.height, facts.width = picture.upright_size
            if find_cuts and picture is not latest:
                detector.add(facts.frames, picture.small(scaler))
            latest = picture
            facts.frames += 1
    except DecodeError as error:
        facts.fault = error.reason
    facts.cuts = detector.cuts()
    return facts


def read_clip(
    path: str | Path, *, start: int, frames: int, fps: float, height: int, width: int
) -> np.ndarray:
    """Return uint8 RGB `[frames, height, width, 3]`: frame i as shown at (start + i) / fps seconds.

    Time counts from the first frame, and a frame stays until the next one's timestamp, so motion
    keeps its speed. The picture is turned upright, resized to cover `height` x `width` and cropped
    at its centre. Raises DecodeError if the video is damaged or ends too early.
    """
    clips = read_clips(path, starts=[start], frames=frames, fps=fps, height=height, width=width)
    return next(clips)[1]


def read_clips(
    path: str | Path, *, starts: Iterable[int], frames: int, fps: float, height: int, width: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (start, clip as `read_clip` returns it) for ascending `starts`, decoding only once."""
    path = Path(path)
    pictures = resampled(path, fps)
    scaler = VideoReformatter()
    position = 0  # index of the next frame that `pictures` yields
    latest, pixels = None, np.empty(0)
    clip, end = np.empty(0), 0  # the previous clip, and the position after its last frame
    for start in starts:
        overlap = max(0, end - start)
        assert overlap <= frames, "starts must ascend"
        previous, clip = clip, np.empty((frames, height, width, 3), np.uint8)
        if overlap:
            clip[:overlap] = previous[-overlap:]
        del previous
        end = start + frames
        for picture in islice(pictures, start + overlap - position, end - position):
            if picture is not latest:  # the same one again if `fps` exceeds the video's rate
                try:
                    latest, pixels = picture, picture.pixels(scaler, height, width)
                except FFmpegError as error:
                    what = f"{picture.frame.format.name} pictures do not convert to RGB"
                    raise DecodeError(path.name, f"{what} ({error.strerror})") from error
            clip[overlap] = pixels
            overlap += 1
        if overlap < frames:
            have = start + overlap
            raise DecodeError(path.name, too_short(have, fps, end), have)
        position = end
        yield start, clip


def resampled(path: Path, fps: float) -> Iterator[Picture]:
    """Yield the picture on display i / fps seconds after the first frame, for i = 0, 1, ..."""
    current, index = None, 0
    origin = now = interval = 0.0
    for time, picture in _with_sorted_times(_decode(path)):
        if current is None:
            origin, interval = time, float(1 / picture.rate)
        later = max(now, time - origin)  # timestamps never run backwards
        while current is not None and index / fps + TOLERANCE < later:
            yield current
            index += 1
        current, now, interval = picture, later, (later - now) or interval
    # Containers often store a wrong duration for the last frame: do not show it longer than the
    # frame before it.
    end = now + min(interval, current.duration or interval) if current is not None else 0.0
    while current is not None and index / fps + TOLERANCE < end:
        yield current
        index += 1


def _with_sorted_times(
    decoded: Iterator[tuple[float, Picture]],
) -> Iterator[tuple[float, Picture]]:
    """Yield the same pictures with their timestamps sorted.

    A decoder returns pictures in display order, but AVI numbers them in storage order, so the
    timestamps of H.264 with B-frames come shuffled. Sorting them within the reorder window repairs
    that and changes nothing for other files.
    """
    times: list[float] = []
    pictures: deque[Picture] = deque()
    damage = None
    try:
        for time, picture in decoded:
            heapq.heappush(times, time)
            pictures.append(picture)
            if len(pictures) > REORDER_WINDOW:
                yield heapq.heappop(times), pictures.popleft()
    except DecodeError as error:
        damage = error
    while pictures:
        yield heapq.heappop(times), pictures.popleft()
    if damage is not None:
        raise damage


def _decode(path: Path) -> Iterator[tuple[float, Picture]]:
    """Yield (timestamp in seconds, picture) in decoder order, up to the end or the first damage.

    I/O errors are raised as OSError, because they say nothing about the content.
    """
    if path.stat().st_size == 0:
        raise DecodeError(path.name, "the file is empty")
    try:
        container = av.open(
            str(path.absolute())
        )  # a relative "a:b.mp4" would be read as a protocol
    except FFmpegError as error:
        raise _fault(path, "not a readable video", error) from error
    with container:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream):
            raise DecodeError(path.name, "there is no video stream in it")
        if stream.codec_context is None:
            raise DecodeError(path.name, "there is no decoder for its video codec")
        # Frame threading would report damage late and lose frames decoded before it.
        stream.thread_type = "SLICE"
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        aspect = float(stream.sample_aspect_ratio or 1) or 1.0
        duration = (
            float(stream.duration * stream.time_base)
            if stream.duration and stream.time_base
            else (container.duration or 0) / av.time_base
        )
        first: float | None = None
        time = 0.0
        try:
            for frame in _frames(container, stream):
                time = time + float(1 / rate) if frame.time is None else frame.time
                first = time if first is None else first
                yield time, Picture(frame, rate, aspect, duration)
        except FFmpegError as error:
            if first is None:
                raise _fault(path, "no frame can be decoded", error) from error
            raise _fault(path, f"damaged after {time - first:.1f} s", error) from error
        if first is None:
            raise DecodeError(path.name, "there is no frame in it")


def _frames(container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    """Yield frames up to the end or the first damage, then raise its error.

    Errors before the first good packet are ignored: recordings may begin between key frames.
    """
    packets = container.demux(stream)
    started, problem = False, None
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                break
            yield from packet.decode()
            if packet.size:  # the last packet is empty and flushes the decoder
                started, problem = True, None
        except FFmpegError as error:
            problem = error
            if started or isinstance(error, OSError):
                break
    if problem is not None:
        if started:
            for frame in stream.decode(None):  # frames the decoder still holds
                frame.time_base = stream.time_base
                yield frame
        raise problem


def _fault(path: Path, what: str, error: Exception) -> Exception:
    """Turn a libav error into an OSError of `path` if it is one, else into a DecodeError."""
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror, str(path))
    return DecodeError(path.name, f"{what} ({getattr(error, 'strerror', None) or error})")
