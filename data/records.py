"""Find out what videos hold: from the ledger, or by decoding each new video once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from .cache import CacheSpec, short_hash
from .files import DISK_FULL
from .ledger import Ledger, stamp
from .manifest import version

REPLACED = "it was replaced meanwhile: run again"


@dataclass(frozen=True)
class VideoRecord:
    """Holds what the ledger stores about a video's content.

    fingerprint: sha1 of the content. frames: number of frames at the spec's rate that were decoded.
    complete: True if these are all frames. height, width: size of the upright picture.
    cuts: frames that begin a shot; None if cuts were not looked for. fault: what is wrong with the
    file after `frames` frames, empty if nothing.
    """

    fingerprint: str
    frames: int
    complete: bool
    height: int
    width: int
    cuts: list[int] | None
    fault: str


class VideoRecords:
    """Looks videos up in the ledger, and decodes those that it does not know."""

    def __init__(self, spec: CacheSpec, cache_dir: Path, ledger: Ledger) -> None:
        self.spec, self.cache_dir, self.ledger = spec, cache_dir, ledger
        self.decoder = version("av")
        self.kind = f"video {float(spec.fps):g}" + (" canonical" if spec.canonical else "")

    def get(self, path: Path, frames_needed: int | None) -> VideoRecord | str:
        """Return the video's record, or the reason why the file cannot be read.

        frames_needed: decode no further than this; None for all frames. A system error is not
        stored in the ledger, because it says nothing about the content. An error of the cache's own
        disk is raised as OSError.
        """
        try:
            fingerprint = content_hash(path, self.ledger)
            record = self._stored(fingerprint, frames_needed)
            return record if record is not None else self._decode(path, fingerprint, frames_needed)
        except OSError as error:
            if error.errno in DISK_FULL or self._in_cache(error.filename):
                raise
            return read_error(error)

    def decoded_file(self, path: Path, fingerprint: str) -> Path:
        """Return the file that clips are decoded from: `path` itself or its canonical copy."""
        if not self.spec.canonical:
            return path
        rate = short_hash(float(self.spec.fps))[:8]
        folder = self.cache_dir / "canonical" / rate / fingerprint[:2]
        return folder / f"{fingerprint}.mp4"

    def _in_cache(self, filename: object) -> bool:
        return str(filename).startswith(f"{self.cache_dir}/")

    def _stored(self, fingerprint: str, frames_needed: int | None) -> VideoRecord | None:
        """Return the ledger's record if it is sufficient, else None.

        A fault counts only under the PyAV version that found it: the next one may read the file.
        """
        value = self.ledger.get(self.kind, fingerprint)
        if value is None:
            return None
        *facts, decoder = value
        record = VideoRecord(fingerprint, *facts)
        if self.spec.shots and record.cuts is None and not record.fault:
            return None
        if self.spec.canonical and not self.decoded_file(Path(), fingerprint).exists():
            return None
        if frames_needed is not None and record.frames >= frames_needed:
            return replace(record, complete=True, fault="") if record.fault else record
        if record.complete and (not record.fault or decoder == self.decoder):
            return record
        return None

    def _decode(self, path: Path, fingerprint: str, frames_needed: int | None) -> VideoRecord:
        from .decode import examine

        spec, original = self.spec, path
        fault = ""
        if spec.canonical:
            from .canonical import write_canonical

            path, frames_needed = self.decoded_file(path, fingerprint), None
            fault = write_canonical(original, path, spec.fps)
            if content_hash(original, self.ledger) != fingerprint:
                path.unlink(missing_ok=True)
                raise OSError(REPLACED)
            if not path.exists():
                return self._store(VideoRecord(fingerprint, 0, True, 0, 0, None, fault))
        facts = examine(path, spec.fps, frames_needed, find_cuts=spec.shots)
        if content_hash(original, self.ledger) != fingerprint:
            raise OSError(REPLACED)
        fault = fault or facts.fault
        complete = bool(fault) or frames_needed is None or facts.frames < frames_needed
        cuts = facts.cuts if spec.shots else None
        size = (facts.height, facts.width)
        return self._store(VideoRecord(fingerprint, facts.frames, complete, *size, cuts, fault))

    def _store(self, record: VideoRecord) -> VideoRecord:
        facts = [record.frames, record.complete, record.height, record.width]
        facts += [record.cuts, record.fault]
        self.ledger.put(self.kind, record.fingerprint, [*facts, self.decoder])
        return record


def content_hash(path: Path, ledger: Ledger) -> str:
    """Return the sha1 of a file's content; the ledger remembers it by the file's size and times."""
    key, now = str(path if path.is_absolute() else path.absolute()), list(stamp(path))
    known = ledger.get("file", key)
    if known is not None and known[:3] == now:
        return known[3]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, _sha1).hexdigest()
    ledger.put("file", key, [*now, digest])
    return digest


def read_error(error: OSError) -> str:
    """Return the reason that the report gives for a system error."""
    return f"cannot be read ({error.strerror or error})"


def _sha1():
    return hashlib.sha1(usedforsecurity=False)
