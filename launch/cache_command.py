"""`longreel cache`: check the cache, delete what no run uses, and decode clips from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..trainer.config.fields import NOT_NEGATIVE, setting
from ..trainer.config.values import ConfigError, parse

if TYPE_CHECKING:
    from ..data.manifest import Manifest

USAGE = """\
longreel cache verify [key=value ...]       check every file
longreel cache gc [key=value ...]           find what no run of the last days used
longreel cache show N [key=value ...]       decode clip N of the newest run to an mp4"""
CACHE = "The cache, as `cache.dir` of a run."


@dataclass(frozen=True)
class VerifyOptions:
    """The options of `longreel cache verify`."""

    dir: str = setting("cache", CACHE)
    delete: bool = setting(False, "Delete damaged files, so that the next run encodes them again.")


@dataclass(frozen=True)
class GcOptions:
    """The options of `longreel cache gc`."""

    dir: str = setting("cache", CACHE)
    days: float = setting(
        30.0,
        "Keep the files of runs started within so many days; temporary files older than a day "
        "are never kept.",
        NOT_NEGATIVE,
    )
    delete: bool = setting(False, "Delete the files instead of only counting them.")


@dataclass(frozen=True)
class ShowOptions:
    """The options of `longreel cache show N`."""

    dir: str = setting("cache", CACHE)
    clip: int = setting(0, "Index of the clip in the newest manifest, from 0.")
    out: str = setting("clip.mp4", "The mp4 file to write.")
    model: str | None = setting(None, "Folder or repository of the base model, if it has moved.")
    device: str = setting("cpu", "The device that decodes.")


OPTIONS = {"verify": VerifyOptions, "gc": GcOptions, "show": ShowOptions}


def cache(argv: list[str]) -> None:
    """Run verify, gc or show. Raises ConfigError for mistakes, SystemExit for damaged files."""
    name, *rest = argv or [""]
    if name == "show" and rest and "=" not in rest[0]:
        rest[0] = f"clip={rest[0]}"
    commands = {"verify": verify, "gc": gc, "show": show}
    if name not in commands:
        raise ConfigError(f"cache {name!r} is not a command.\n\n{USAGE}")
    commands[name](rest)


def verify(argv: list[str]) -> None:
    """Print the damaged files, and how many files of each manifest are missing."""
    from ..data.manifest import read_manifests
    from ..data.verify import verify_files

    options = parse(VerifyOptions, argv)
    root, bad, size, count = _existing(options.dir), 0, 0, 0
    for checked in verify_files(root):
        count, size = count + 1, size + checked.size
        if checked.fault is not None:
            bad += 1
            print(f"{checked.path}: {checked.fault}{'; deleted' if options.delete else ''}")
            if options.delete:
                checked.path.unlink(missing_ok=True)
    print(f"{count} files, {size / 1e9:.2f} GB: {bad} damaged")
    for manifest in read_manifests(root):
        missing = [file for file in manifest.files if not (root / file).is_file()]
        if missing:
            where = manifest.about["where"]
            print(f"{where}: {len(missing)} files are missing, and are encoded at its next run")
    if bad and not options.delete:
        raise SystemExit(
            "error: the cache has damaged files. `longreel cache verify delete=true` deletes them, "
            "and the next run encodes them again."
        )


def gc(argv: list[str]) -> None:
    """Count, or delete, the files that no recent run uses."""
    from ..data.gc import find_unused

    options = parse(GcOptions, argv)
    root = _existing(options.dir)
    try:
        unused = find_unused(root, options.days)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for manifest in unused.recent:
        print(f"in use: {_describe(manifest)}")
    if not unused.recent:
        print(f"no run was started in the last {options.days:g} days")
    if options.delete:
        unused.delete()
    verb = "deleted" if options.delete else "not in use (delete=true deletes them)"
    print(f"{len(unused.files)} files, {unused.size / 1e9:.2f} GB: {verb}")


def show(argv: list[str]) -> None:
    """Decode a clip's latents with the VAE that made them, and write them as an mp4."""
    from ..data.files import UNREADABLE, read_header, read_tensors
    from ..data.identity import EncoderIdentity
    from ..data.manifest import read_manifests

    options = parse(ShowOptions, argv)
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
        tensors, header = read_tensors(root / clip.latents)
        caption = read_header(root / clip.text)["caption"]
        encoder = EncoderIdentity.parse(header["encoder"])
    except UNREADABLE as error:
        raise ConfigError(
            f"{clip.id} cannot be read ({error}): run `longreel cache verify`."
        ) from error

    import torch

    from ..data.write_video import write_video
    from ..trainer.families import FAMILIES
    from ..trainer.run.progress import quiet_libraries

    quiet_libraries()
    family = FAMILIES[encoder.family]
    model = family.loader.resolve(options.model or encoder.model, options.dir)
    pipe = family.loader.load_pipeline(model, encoder.revision, text=False, dtype=torch.float32)
    pipe.to(options.device)
    frames = family.vae.decode(pipe.vae, tensors["latents"].float())
    write_video(options.out, frames, header["fps"])
    size = f"{header['height']} x {header['width']}"
    print(f"{clip.id}: {header['frames']} frames of {size}: {caption}")
    print(options.out)


def _existing(folder: str) -> Path:
    """Return the absolute path of an existing cache. Raises ConfigError for any other folder."""
    from ..data.cache import CONTENT_FOLDERS, is_cache

    root = Path(folder).absolute()
    if not is_cache(root):
        raise ConfigError(
            f"dir={folder} is not a cache: it holds none of {', '.join(CONTENT_FOLDERS)}."
        )
    return root


def _describe(manifest: Manifest) -> str:
    about = manifest.about
    shapes = ", ".join(about["buckets"])
    return f"{about['where']}, {shapes} at {about['fps']:g} fps, {about['clips']} clips"
