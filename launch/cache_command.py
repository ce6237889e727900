"""`longreel cache`: look into the cache, check it, and take out what no run uses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..data.cache import SCHEMA
from ..data.files import UNREADABLE, digest, read_about, read_tensors
from ..data.ledger import FOLDER as LEDGER
from ..data.manifest import FOLDER as MANIFESTS
from ..data.manifest import Manifest, read_manifests
from ..trainer.config.recipe import parse
from ..trainer.config.schema import Cache, ConfigError

CACHE_USAGE = """\
longreel cache verify [key=value ...]                   check every file of the cache
longreel cache gc [key=value ...]                       what no run of the last days has used
longreel cache show N [key=value ...]                   decode clip N of the newest run to an mp4"""
FILES = ("latents", "text", "canonical", "videos")
DAY = 24 * 3600.0


@dataclass(frozen=True)
class Verify:
    """`longreel cache verify`. dir: the cache. delete: damaged files, so that the next run encodes
    them again."""

    dir: str = Cache.dir
    delete: bool = False


@dataclass(frozen=True)
class Gc:
    """`longreel cache gc`. days: a run started within so many days keeps its files; temporary files
    older than a day always go. delete: do it; else only tell."""

    dir: str = Cache.dir
    days: float = 30.0
    delete: bool = False


@dataclass(frozen=True)
class Show:
    """`longreel cache show N`. clip: its place in the manifest, from 0. model: the folder or
    repository, if the base model has moved. device: that decodes."""

    dir: str = Cache.dir
    clip: int = 0
    out: str = "clip.mp4"
    model: str | None = None
    device: str = "cpu"


def cache(argv: list[str]) -> None:
    """One of verify, gc and show; raises ConfigError for mistakes, SystemExit for damaged files."""
    name, *rest = argv or [""]
    if name == "show" and rest and "=" not in rest[0]:
        rest[0] = f"clip={rest[0]}"
    commands: dict[str, Callable[[list[str]], None]] = {"verify": verify, "gc": gc, "show": show}
    if name not in commands:
        raise ConfigError(f"cache {name!r} is no command.\n\n{CACHE_USAGE}")
    commands[name](rest)


def verify(argv: list[str]) -> None:
    """Read every tensor and compare it with what its header promises."""
    options = parse(Verify, argv)
    root, bad, size, count = _existing(options.dir), 0, 0, 0
    for path in _files(root, "latents", "text"):
        fault = _fault(path)
        count, size = count + 1, size + (path.stat().st_size if path.exists() else 0)
        if fault is not None:
            bad += 1
            print(f"{path}: {fault}{'; deleted' if options.delete else ''}")
            if options.delete:
                path.unlink(missing_ok=True)
    print(f"{count} files, {size / 1e9:.2f} GB: {bad} damaged")
    for manifest in read_manifests(root):
        missing = [file for file in manifest.files if not (root / file).is_file()]
        if missing:
            where = manifest.about["where"]
            print(f"{where}: {len(missing)} files are missing, and are encoded at its next run")
    if bad and not options.delete:
        raise SystemExit(
            "error: the cache has damaged files. `longreel cache verify delete=true` takes them "
            "out, and the next run encodes them again."
        )


def gc(argv: list[str]) -> None:
    """Delete, or only count, the files that no recent manifest names."""
    options = parse(Gc, argv)
    if options.days < 0:
        raise ConfigError(f"days={options.days} must not be negative.")
    root, now = _existing(options.dir), time.time()
    manifests = read_manifests(root)
    recent = [m for m in manifests if now - m.path.stat().st_mtime <= options.days * DAY]
    for manifest in recent:
        print(f"in use: {_describe(manifest)}")
    if not recent and manifests:
        print(f"no run was started in the last {options.days:g} days")
    if not manifests:
        raise ConfigError(
            f"dir={root} has no manifest, so nothing is known of what is in use: start a run with "
            "this cache first, or delete the folder."
        )
    used = set().union(*(manifest.files for manifest in recent))
    old = [path for path in _files(root, "latents", "text") if _name(path, root) not in used]
    old += [path for path in _temporary(root) if now - path.stat().st_mtime > DAY]
    if not recent:  # copies of videos, which only encoding needs
        old += list(_files(root, "canonical", "videos"))
    old += [m.path for m in manifests if m not in recent]
    size = sum(path.stat().st_size for path in old)
    for path in old if options.delete else []:
        path.unlink(missing_ok=True)
    verb = "deleted" if options.delete else "not in use (delete=true deletes them)"
    print(f"{len(old)} files, {size / 1e9:.2f} GB: {verb}")


def show(argv: list[str]) -> None:
    """Decode a clip's latents by the VAE that made them, and write them as an mp4."""
    options = parse(Show, argv)
    root = _existing(options.dir)
    if not options.out.endswith(".mp4"):
        raise ConfigError(f"out={options.out} must end in .mp4.")
    manifests = read_manifests(root)
    if not manifests:
        raise ConfigError(f"dir={root} has no manifest: start a run with this cache first.")
    newest = manifests[0]
    if not 0 <= options.clip < len(newest.clips):
        raise ConfigError(
            f"clip {options.clip}: {_describe(newest)} has the clips 0 to {len(newest.clips) - 1}."
        )
    clip = newest.clips[options.clip]
    try:
        tensors, about = read_tensors(root / clip.latents)
        caption = read_about(root / clip.text)["caption"]
    except UNREADABLE as error:
        raise ConfigError(
            f"{clip.id} cannot be read ({error}): `longreel cache verify`."
        ) from error

    from ..data.decode import write_video
    from ..trainer.families import FAMILIES
    from ..trainer.run.progress import quiet_libraries

    quiet_libraries()
    name, _, rest = about["encoder"].partition(":")
    path, _, revision = rest.rpartition("@")
    revision = revision.partition(":")[0]
    family = FAMILIES[name]
    model = family.loader.resolve(options.model or path, options.dir)
    revision = None if revision == "None" else revision
    pipe = family.loader.load_pipeline(model, revision, text=False, dtype=torch.float32)
    pipe.to(options.device)
    frames = family.vae.decode(pipe.vae, tensors["latents"].float())
    write_video(options.out, frames, about["fps"])
    print(f"{clip.id}: {about['frames']} frames of {about['height']} x {about['width']}: {caption}")
    print(options.out)


def _existing(folder: str) -> Path:
    root = Path(folder).absolute()
    if not any((root / name).is_dir() for name in (*FILES, LEDGER, MANIFESTS)):
        raise ConfigError(f"dir={folder} is no cache: it holds none of {', '.join(FILES)}.")
    return root


def _files(root: Path, *kinds: str) -> Iterator[Path]:
    for kind in kinds:
        for path in sorted((root / kind).rglob("*")):
            if path.is_file() and path.suffix != ".tmp":
                yield path


def _temporary(root: Path) -> Iterator[Path]:
    """What killed processes left."""
    for kind in (*FILES, LEDGER, MANIFESTS):
        yield from sorted((root / kind).rglob(".*.tmp"))


def _fault(path: Path) -> str | None:
    """What is wrong with a file of tensors."""
    try:
        tensors, about = read_tensors(path)
    except UNREADABLE as error:
        return f"cannot be read ({error})"
    if about.get("schema") != SCHEMA:
        return f"is of schema {about.get('schema')}, not {SCHEMA}"
    if not all(bool(x.isfinite().all()) for x in tensors.values() if x.is_floating_point()):
        return "holds NaN or infinity"
    if about.get("sha1") != digest(tensors):
        return "its numbers are not those that were written"
    return None


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _describe(manifest: Manifest) -> str:
    about = manifest.about
    shapes = ", ".join(about["buckets"])
    return f"{about['where']}, {shapes} at {about['fps']:g} fps, {about['clips']} clips"
