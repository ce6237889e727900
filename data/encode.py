"""The cache of latents and text embeddings: built once, looked up ever after.

    <cache>/latents/<video key>/<aa>/<sha1>.safetensors    one clip
    <cache>/text/<text key>/<aa>/<sha1>.safetensors        one caption
    <cache>/videos/<fps key>/<aa>/<fingerprint>.json       how many frames a video has, or its fault

A key is the hash of everything that shaped the tensors, so a changed setting never meets a stale
file. Every file appears whole, by a rename: an interrupted build goes on where it stopped, and
several processes may build at once. A complete cache is used without PyAV and without encoders.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .files import UNREADABLE, read_about, replacing, save_tensors
from .manifest import Dropped, Source, scan, too_short

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SCHEMA = 1  # raise it with any change of what the tensors or the files hold
NAMED = 5  # reasons that an error message lists

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class CacheSpec:
    """What the clips are, and which encoders see them.

    `frames` pixel frames of `height` x `width` at `fps` make a clip. "first" takes the first clip
    of each video; "all" one every `stride` frames (0: every `frames`, that is without overlap) as
    long as it is whole. `video_encoder` and `text_encoder` identify the encoders: they must change
    with anything that changes their output.
    """

    frames: int
    height: int
    width: int
    fps: float
    windows: Literal["first", "all"]
    stride: int
    video_encoder: str
    text_encoder: str

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width", "fps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")
        if self.windows not in ("first", "all"):
            raise ValueError(f"windows is {self.windows!r}: choose 'first' or 'all'")
        if self.stride < 0:
            raise ValueError(f"stride is {self.stride}: give frames between clips, 0 for `frames`")

    @property
    def video_key(self) -> str:
        """Windows and stride are left out: a clip is the same wherever its neighbours begin."""
        shape = (self.frames, self.height, self.width, float(self.fps))
        return _hash(SCHEMA, *shape, self.video_encoder)[:16]

    @property
    def text_key(self) -> str:
        return _hash(SCHEMA, self.text_encoder)[:16]

    @property
    def fps_key(self) -> str:
        return _hash(SCHEMA, float(self.fps))[:16]

    def starts(self, available: int) -> range:
        """First frames of the clips of a video with `available` frames."""
        whole = range(0, available - self.frames + 1, self.stride or self.frames)
        return whole[:1] if self.windows == "first" else whole


@dataclass
class Encoders:
    """`video`: uint8 RGB [F, H, W, 3] -> [C, f, h, w]. `text`: caption -> named tensors.

    Tensors are stored in the dtype they come in. All captions are encoded before the first clip,
    so a text encoder may be loaded at its first call and freed at the first call of `video`.
    """

    video: Callable[[np.ndarray], Tensor]
    text: Callable[[str], dict[str, Tensor]]


@dataclass(frozen=True)
class Entry:
    """A cached clip: frames `start` ... of the video `source`, and its caption's embedding."""

    id: str
    source: str
    latents: Path
    text: Path
    caption: str
    start: int


@dataclass(frozen=True)
class Report:
    """`kept` clips of `sources` videos, of which `encoded` are new and `reused` were there."""

    kept: int
    sources: int
    dropped: list[Dropped]
    encoded: int
    reused: int

    def lines(self) -> list[str]:
        kept = f"kept {_count(self.kept, 'clip')} of {_count(self.sources, 'video')}"
        lines = [f"{kept}: {self.encoded} encoded, {self.reused} from the cache"]
        if self.dropped:
            width = min(48, max(len(item.name) for item in self.dropped))
            lines.append(f"dropped {len(self.dropped)}:")
            lines += [f"  {item.name:<{width}}  {item.reason}" for item in self.dropped]
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines())


@dataclass(frozen=True)
class Prepared:
    """`texts` maps every caption, the extra ones too, to its file."""

    entries: list[Entry]
    texts: dict[str, Path]
    report: Report


def prepare(
    folder: str | Path,
    spec: CacheSpec,
    cache_dir: str | Path,
    load_encoders: Callable[[], Encoders],
    *,
    extra_captions: Sequence[str] = (),
    strict: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Sees to it that every clip of `folder` and every caption is in the cache; says where.

    `load_encoders` is called at most once, and only if something is missing. `extra_captions` are
    encoded beside the videos' own (validation prompts, the empty prompt). `progress` is called
    with (done, total, "checking videos" | "encoding text" | "encoding clips").

    What cannot be used is dropped and reported; with `strict` it is a ValueError, and so is a
    folder of which nothing is left. Both come before an encoder is loaded: a video that is new to
    the cache is first decoded as far as it is wanted.
    """
    folder, cache_dir, progress = Path(folder), Path(cache_dir), progress or _silent
    sources, dropped = scan(folder)
    entries: list[Entry] = []
    for index, source in enumerate(sources):
        progress(index, len(sources), "checking videos")
        clips, fault = _clips(source, spec, cache_dir)
        entries += clips
        if fault:
            dropped.append(Dropped(source.name, fault))
    progress(len(sources), len(sources), "checking videos")
    _refuse(folder, entries, dropped, strict)

    captions = dict.fromkeys([*(entry.caption for entry in entries), *extra_captions])
    texts = {caption: _text_path(caption, spec, cache_dir) for caption in captions}
    new_texts = [caption for caption, path in texts.items() if not _is_intact(path)]
    new_clips = [entry for entry in entries if not _is_intact(entry.latents)]
    if new_texts or new_clips:
        encoders = load_encoders()
        _encode_texts(new_texts, texts, spec, encoders, progress)
        faults = _encode_clips(new_clips, folder, spec, encoders, progress)
        if faults:
            dropped += faults
            entries = [entry for entry in entries if _is_intact(entry.latents)]
            _refuse(folder, entries, dropped, strict)

    new = {entry.latents for entry in new_clips}
    encoded = sum(entry.latents in new for entry in entries)
    report = Report(
        kept=len(entries),
        sources=len({entry.source for entry in entries}),
        dropped=sorted(dropped, key=_by_name),
        encoded=encoded,
        reused=len(entries) - encoded,
    )
    return Prepared(entries, texts, report)


def _silent(done: int, total: int, stage: str) -> None:
    pass


def _by_name(item: Dropped) -> str:
    return item.name


def _clips(source: Source, spec: CacheSpec, cache_dir: Path) -> tuple[list[Entry], str]:
    """The clips of a video, and why it, or its rest, cannot be used."""
    try:
        fingerprint = _fingerprint(source.path)
    except OSError as error:
        return [], _unreadable(error)
    needed = spec.frames if spec.windows == "first" else None
    available, fault = _available(source.path, fingerprint, spec, cache_dir, needed)
    if available < spec.frames and not fault:
        fault = too_short(available, spec.fps, spec.frames)
    folder = cache_dir / "latents" / spec.video_key
    entries = []
    for start in spec.starts(available):
        name = _hash(fingerprint, start)
        entries.append(
            Entry(
                id=f"{source.name}@{start}",
                source=source.name,
                latents=folder / name[:2] / f"{name}.safetensors",
                text=_text_path(source.caption, spec, cache_dir),
                caption=source.caption,
                start=start,
            )
        )
    return entries, fault


def _available(
    path: Path, fingerprint: str, spec: CacheSpec, cache_dir: Path, needed: int | None
) -> tuple[int, str]:
    """(frames at the spec's rate, fault): from the cache if it knows enough, else by decoding.

    Frames are counted up to `needed`; None counts all. A fault is believed only under the PyAV
    that found it, for the next one may read the file.
    """
    record_path = cache_dir / "videos" / spec.fps_key / fingerprint[:2] / f"{fingerprint}.json"
    decoder = _version("av")
    record = _read_record(record_path)
    if record is not None:
        if needed is not None and record["frames"] >= needed:
            return record["frames"], ""
        if record["whole"] and (not record["fault"] or record["decoder"] == decoder):
            return record["frames"], record["fault"]

    from .decode import DecodeError, clip_count_frames

    fault = ""
    try:
        frames = clip_count_frames(path, spec.fps, needed)
    except DecodeError as error:
        frames, fault = error.frames, error.reason
    except OSError as error:
        return 0, _unreadable(error)  # not recorded: it says nothing about the content
    whole = bool(fault) or needed is None or frames < needed
    record = {"frames": frames, "whole": whole, "fault": fault, "decoder": decoder}
    with replacing(record_path) as temporary:
        temporary.write_text(json.dumps(record | {"name": path.name}), encoding="utf-8")
    return frames, fault


def _unreadable(error: OSError) -> str:
    return f"cannot be read ({error.strerror or error})"


def _read_record(path: Path) -> dict | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = isinstance(record, dict) and {"frames", "whole", "fault", "decoder"} <= record.keys()
    return record if known else None


def _refuse(folder: Path, entries: list[Entry], dropped: list[Dropped], strict: bool) -> None:
    if entries and not (strict and dropped):
        return
    named = sorted(dropped, key=_by_name)[:NAMED]
    reasons = [f"  {item.name}: {item.reason}" for item in named]
    if len(dropped) > NAMED:
        reasons.append(f"  and {len(dropped) - NAMED} more")
    if not entries:
        first = f"{folder} gives no clip to train on; mend the videos or captions, or ask for less:"
    else:
        first = f"{folder}: {len(dropped)} unusable; mend or remove them, or set data.strict=false:"
    raise ValueError("\n".join([first, *reasons]))


def _encode_texts(
    captions: list[str],
    paths: dict[str, Path],
    spec: CacheSpec,
    encoders: Encoders,
    progress: Progress,
) -> None:
    for index, caption in enumerate(captions):
        progress(index, len(captions), "encoding text")
        if not _is_intact(paths[caption]):  # another process may have been faster
            about = {"schema": SCHEMA, "caption": caption, "encoder": spec.text_encoder}
            save_tensors(paths[caption], encoders.text(caption), about)
        progress(index + 1, len(captions), "encoding text")


def _encode_clips(
    entries: list[Entry],
    folder: Path,
    spec: CacheSpec,
    encoders: Encoders,
    progress: Progress,
) -> list[Dropped]:
    """Encodes, video by video in one pass each; what fails although it was checked is returned."""
    by_source: dict[str, dict[int, Entry]] = {}
    for entry in entries:
        by_source.setdefault(entry.source, {})[entry.start] = entry
    faults: list[Dropped] = []
    done = 0
    for name, clips in by_source.items():
        # Another process may have been faster, or an equal file may have come before.
        missing = [start for start, entry in clips.items() if not _is_intact(entry.latents)]
        for encoded, (start, pixels) in enumerate(_read(folder, name, missing, spec, faults)):
            progress(done + encoded, len(entries), "encoding clips")
            latents = encoders.video(pixels)
            _check_latents(latents, clips[start].id)
            about = {
                "schema": SCHEMA,
                "encoder": spec.video_encoder,
                "source": name,
                "start": start,
                "frames": spec.frames,
                "fps": spec.fps,
                "height": spec.height,
                "width": spec.width,
                "shape": list(latents.shape),
            }
            save_tensors(clips[start].latents, {"latents": latents}, about)
        done += len(clips)
        progress(done, len(entries), "encoding clips")
    return faults


def _read(
    folder: Path, name: str, starts: list[int], spec: CacheSpec, faults: list[Dropped]
) -> Iterator[tuple[int, np.ndarray]]:
    """The clips of one video as far as they can be read; a fault is added to `faults`."""
    from .decode import DecodeError, read_clips

    try:
        yield from read_clips(
            folder / name,
            starts=starts,
            frames=spec.frames,
            fps=spec.fps,
            height=spec.height,
            width=spec.width,
        )
    except DecodeError as error:
        faults.append(Dropped(name, error.reason))
    except OSError as error:
        faults.append(Dropped(name, _unreadable(error)))


def _check_latents(latents: Tensor, clip: str) -> None:
    if latents.ndim != 4:
        raise ValueError(f"{clip}: the encoder must return [C, f, h, w], got {list(latents.shape)}")
    if not bool(latents.isfinite().all()):
        raise ValueError(f"{clip}: the encoder returned NaN or infinity; run it in float32")


def _is_intact(path: Path) -> bool:
    try:
        return read_about(path)["schema"] == SCHEMA
    except UNREADABLE:
        return False


def _text_path(caption: str, spec: CacheSpec, cache_dir: Path) -> Path:
    name = _hash(caption)
    return cache_dir / "text" / spec.text_key / name[:2] / f"{name}.safetensors"


def _fingerprint(path: Path) -> str:
    """sha1 of a file's size, first MiB and last MiB."""
    piece = 1 << 20
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha1(f"{size}:".encode(), usedforsecurity=False)
        digest.update(file.read(piece))
        file.seek(max(file.tell(), size - piece))
        digest.update(file.read(piece))
    return digest.hexdigest()


def _hash(*parts: object) -> str:
    return hashlib.sha1(json.dumps(parts).encode(), usedforsecurity=False).hexdigest()


def _version(package: str) -> str:
    """Of an installed package, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
