"""Video files in and out through PyAV; the only module that imports it.

Frames are chosen by their timestamps, never by their number: files as found have variable frame
rates, dropped frames and headers that lie. Decoding runs from the start of the file, because a
seek lands on the wrong frame in many of them.
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
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from . import hdr
from .files import replacing
from .report import too_short
from .shots import HEIGHT, WIDTH, CutDetector

# Seconds. Matroska and WebM round timestamps to the millisecond: without the slack a frame that
# is due exactly at the wanted time would now and then count as late.
TOLERANCE = 1e-3
# Frames that H.264 and HEVC let a decoder hold back to put them in order.
REORDERED = 16
# Bicubic filters widen with the reduction in swscale, so a reduced picture does not alias.
SCALING = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)
UNSPECIFIED = 2  # colorspace, primaries and transfer as H.273 numbers them
BT709 = 1


class DecodeError(ValueError):
    """A file that does not give the wanted frames; `frames` output frames come before the fault."""

    def __init__(self, name: str, reason: str, frames: int = 0) -> None:
        super().__init__(name, reason, frames)
        self.name, self.reason, self.frames = name, reason, frames

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class VideoInfo:
    """What the header and the first frame say; `duration` is in seconds and may be wrong, or 0.

    `width` and `height` are those of the upright picture with square pixels.
    """

    fps: float
    duration: float
    width: int
    height: int


def probe(path: str | Path) -> VideoInfo:
    """Raises DecodeError where no frame can be decoded."""
    for _, picture in _decode(Path(path)):
        height, width = picture.upright_size
        return VideoInfo(float(picture.rate), picture.stated_duration, width, height)
    raise AssertionError("a stream without frames is a DecodeError")


@dataclass
class VideoFacts:
    """What decoding a video told: how many frames it shows at a rate, the size of its upright
    picture, the frames that begin a shot, and what is wrong with it after `frames`."""

    frames: int = 0
    height: int = 0
    width: int = 0
    cuts: list[int] = field(default_factory=list)
    fault: str = ""


def examine(
    path: str | Path, fps: float, limit: int | None = None, *, find_cuts: bool = False
) -> VideoFacts:
    """Decodes a video as it is shown at `fps`, up to `limit` frames or to damage.

    I/O errors pass through as OSError, for they say nothing about the content.
    """
    facts, detector, scaler = VideoFacts(), CutDetector(), VideoReformatter()
    latest = None
    try:
        for picture in islice(shown(Path(path), fps), limit):
            if latest is None:
                facts.height, facts.width = picture.upright_size
            if find_cuts and picture is not latest:
                detector.see(facts.frames, picture.small(scaler))
            latest = picture
            facts.frames += 1
    except DecodeError as error:
        facts.fault = error.reason
    facts.cuts = detector.cuts()
    return facts


def read_clip(
    path: str | Path, *, start: int, frames: int, fps: float, height: int, width: int
) -> np.ndarray:
    """uint8 RGB [frames, height, width, 3]: what is on display (start + i) / fps seconds in.

    Time counts from the first frame; a frame stays until the next one's timestamp, so motion keeps
    its speed. The picture is turned upright, resized to cover `height` x `width` and cropped at
    its centre. Raises DecodeError if the video is damaged or ends earlier.
    """
    clips = read_clips(path, starts=[start], frames=frames, fps=fps, height=height, width=width)
    return next(clips)[1]


def read_clips(
    path: str | Path, *, starts: Iterable[int], frames: int, fps: float, height: int, width: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(start, clip as `read_clip` gives it) for ascending `starts`, in one pass over the file."""
    path = Path(path)
    pictures = shown(path, fps)
    scaler = VideoReformatter()
    position = 0  # of the next frame of `pictures`
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
            if picture is not latest:  # shown again where `fps` is above the video's own
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


def write_video(
    path: str | Path,
    frames: Iterable[np.ndarray],
    fps: float,
    options: dict[str, str] | None = None,
) -> None:
    """Writes uint8 RGB frames [height, width, 3] as H.264 (BT.709 4:2:0, faststart) mp4.

    Frames are encoded as they come; an odd last row or column is cut, as 4:2:0 needs even sizes.
    options: of libx264. The file appears when it is complete. Raises ValueError for frames that do
    not fit.
    """
    path, rate = Path(path), Fraction(fps).limit_denominator(1001)
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError(f"{path}: there is no frame to write")
    if first.ndim != 3 or first.shape[2] != 3 or min(first.shape[:2]) < 2:
        raise ValueError(f"{path}: frames must be [height, width, 3], got {list(first.shape)}")
    height, width = (size // 2 * 2 for size in first.shape[:2])
    with (
        replacing(path) as temporary,
        av.open(
            str(temporary.absolute()), "w", format="mp4", options={"movflags": "+faststart"}
        ) as container,
    ):
        stream = container.add_stream("libx264", rate=rate, options=options or {"crf": "17"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = 1  # limited
        scaler = VideoReformatter()
        for index, pixels in enumerate(_chain(first, frames)):
            if pixels.shape != first.shape or pixels.dtype != np.uint8:
                raise ValueError(
                    f"{path}: frame {index} is {pixels.dtype} {list(pixels.shape)}, "
                    f"uint8 {list(first.shape)} is needed"
                )
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(pixels[:height, :width]), format="rgb24"
            )
            frame = scaler.reformat(
                frame,
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=1,
                interpolation=SCALING,
            )
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _chain(first: np.ndarray, rest: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    yield first
    yield from rest


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded frame with what its stream says about it."""

    frame: av.VideoFrame
    rate: Fraction
    pixel_aspect: float  # width / height of a pixel
    stated_duration: float  # of the stream, seconds

    @property
    def duration(self) -> float:
        """Seconds, by its container; 0 if that does not say."""
        frame = self.frame
        return float((frame.duration or 0) * (frame.time_base or 0))

    @property
    def turns(self) -> int:
        """Quarter turns, counterclockwise, that make the picture upright."""
        return round(self.frame.rotation / 90) % 4

    @property
    def upright_size(self) -> tuple[int, int]:
        """Height and width with square pixels."""
        height, width = self.frame.height, round(self.frame.width * self.pixel_aspect)
        return (width, height) if self.turns % 2 else (height, width)

    def small(self, scaler: VideoReformatter) -> np.ndarray:
        """uint8 YUV [HEIGHT, WIDTH, 3], for finding cuts."""
        frame = scaler.reformat(
            self.frame,
            width=WIDTH,
            height=HEIGHT,
            format="yuv444p",
            interpolation=Interpolation.AREA,
        )
        return frame.to_ndarray().transpose(1, 2, 0)

    def pixels(self, scaler: VideoReformatter, height: int, width: int) -> np.ndarray:
        """uint8 RGB [height, width, 3], resized to cover and cropped at the centre.

        Grey becomes RGB, alpha is left out, and HDR is mapped to the range of other video.
        """
        if self.turns % 2:
            height, width = width, height
        frame, square_width = self.frame, self.frame.width * self.pixel_aspect
        scale = max(height / frame.height, width / square_width)
        cover_height = max(height, round(frame.height * scale))
        cover_width = max(width, round(square_width * scale))
        high_range = frame.color_trc in hdr.TRANSFERS
        cover = scaler.reformat(
            frame,
            width=cover_width,
            height=cover_height,
            format="rgb48le" if high_range else "rgb24",
            src_colorspace=_colorspace(frame),
            interpolation=SCALING,
        ).to_ndarray()
        top, left = (cover_height - height) // 2, (cover_width - width) // 2
        picture = cover[top : top + height, left : left + width]
        if high_range:
            picture = hdr.tone_map(picture, frame.color_trc)
        return np.rot90(picture, self.turns)


def _colorspace(frame: av.VideoFrame) -> int:
    """As tagged; an untagged picture is BT.709 from 720 rows up and BT.601 below, as in players."""
    if frame.colorspace != UNSPECIFIED:
        return frame.colorspace
    return Colorspace.ITU709 if min(frame.height, frame.width) >= 720 else Colorspace.ITU601


def shown(path: Path, fps: float) -> Iterator[Picture]:
    """The picture on display i / fps seconds after the first frame, for i = 0, 1, ..."""
    current, index = None, 0
    origin = now = interval = 0.0
    for time, picture in _in_order(_decode(path)):
        if current is None:
            origin, interval = time, float(1 / picture.rate)
        later = max(now, time - origin)  # a clock that runs backwards stands still
        while current is not None and index / fps + TOLERANCE < later:
            yield current
            index += 1
        current, now, interval = picture, later, (later - now) or interval
    # Containers often write the last frame's duration wrong: it may not stay longer than the one
    # before did.
    end = now + min(interval, current.duration or interval) if current is not None else 0.0
    while current is not None and index / fps + TOLERANCE < end:
        yield current
        index += 1


def _in_order(decoded: Iterator[tuple[float, Picture]]) -> Iterator[tuple[float, Picture]]:
    """The same with timestamps that fit the order of the pictures.

    A decoder puts pictures in order, but AVI numbers them as they are stored, so the timestamps
    of H.264 with B-frames come shuffled. Sorting them over the reordering window repairs that and
    changes nothing elsewhere.
    """
    times: list[float] = []
    pictures: deque[Picture] = deque()
    damage = None
    try:
        for time, picture in decoded:
            heapq.heappush(times, time)
            pictures.append(picture)
            if len(pictures) > REORDERED:
                yield heapq.heappop(times), pictures.popleft()
    except DecodeError as error:
        damage = error
    while pictures:
        yield heapq.heappop(times), pictures.popleft()
    if damage is not None:
        raise damage


def _decode(path: Path) -> Iterator[tuple[float, Picture]]:
    """(timestamp in seconds, picture) as the decoder gives them, up to the end or to damage.

    I/O errors pass through as OSError, for they say nothing about the content.
    """
    if path.stat().st_size == 0:
        raise DecodeError(path.name, "the file is empty")
    try:
        container = av.open(str(path.absolute()))  # "a:b.mp4" would name a protocol
    except FFmpegError as error:
        raise _fault(path, "not a readable video", error) from error
    with container:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream):
            raise DecodeError(path.name, "there is no video stream in it")
        if stream.codec_context is None:
            raise DecodeError(path.name, "there is no decoder for its video codec")
        # Threads across frames would report damage late and lose what came before it.
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
    """Frames up to the end, or up to damage and then its error.

    Errors before the first good packet are passed over: recordings may begin between key frames.
    """
    packets = container.demux(stream)
    started, problem = False, None
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                break
            yield from packet.decode()
            if packet.size:  # the last one is empty and flushes the decoder
                started, problem = True, None
        except FFmpegError as error:
            problem = error
            if started or isinstance(error, OSError):
                break
    if problem is not None:
        if started:
            for frame in stream.decode(None):  # what the decoder held back
                frame.time_base = stream.time_base
                yield frame
        raise problem


def _fault(path: Path, what: str, error: Exception) -> Exception:
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror, str(path))
    return DecodeError(path.name, f"{what} ({getattr(error, 'strerror', None) or error})")
