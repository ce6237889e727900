"""Checkpoints: one safetensors file and one JSON file, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..config.values import ConfigError
from ..memory.optimizer import moments_of, restore_moments

TENSORS = "state.safetensors"
STATE = "state.json"
VERSION = 2  # of the two files
NAME = re.compile(r"step-\d+")
NOT_SAVED = (OSError, SafetensorError)  # what a save raises that may succeed later


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    step: optimizer updates done. Noise, sigmas, data order and learning rate are functions of it,
        of the seed, and of the two below.
    world_size: processes, of which those that share clips count as one. clips: `fingerprint` of
        the training clips. drawn: clips that all processes together have trained on, of each
        bucket (`SeededBatches.drawn_after`).
    """

    step: int
    world_size: int
    clips: str
    drawn: list[int]


@dataclass(frozen=True)
class State:
    """What a checkpoint holds of an adapter and its optimizer: whole tensors on the CPU, by
    `lora.NAME` and `MOMENT.NAME`, and the updates that each parameter has had."""

    tensors: dict[str, Tensor]
    adam_steps: dict[str, float]

    @property
    def adapter(self) -> dict[str, Tensor]:
        """The adapter's tensors by the names of its parameters."""
        return {name: tensor for kind, name, tensor in self._parts() if kind == "lora"}

    @property
    def moments(self) -> dict[str, dict[str, Tensor]]:
        """By the names of parameters, those that have had updates."""
        found: dict[str, dict[str, Tensor]] = {name: {} for name in self.adam_steps}
        for kind, name, tensor in self._parts():
            if kind != "lora":
                found[name][kind] = tensor
        return found

    def _parts(self) -> Iterator[tuple[str, str, Tensor]]:
        for key, tensor in self.tensors.items():
            kind, _, name = key.partition(".")
            yield kind, name, tensor


def fingerprint(ids: Iterable[str]) -> str:
    """Twelve hex digits that name a list of clips."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:12]


def save(
    folder: Path,
    state: State,
    progress: Progress,
    *,
    keep_last: int,
    extra: Callable[[Path], object] | None = None,
) -> Path:
    """Write `folder/step-N` and keep `keep_last` checkpoints, it and those whole ones before it.

    Everything goes to a temporary folder that is renamed when complete and on disk: a process that
    dies at any moment leaves the checkpoints before it whole, and so does a disk that is full, on
    which nothing of this one stays. Raises one of `NOT_SAVED` then.

    extra: writes further files, such as the adapter, into the folder it is given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    target = folder / f"step-{progress.step:06d}"
    temporary = folder / f".tmp-{target.name}"
    try:
        temporary.mkdir()
        _write(temporary, state, progress, extra)
        if target.exists():
            _remove(target)
        os.rename(temporary, target)
    except NOT_SAVED:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(folder)
    older = [path for path in _by_age(folder) if path != target]
    kept = [path for path in older if _readable(path) and _step(path) < progress.step]
    for path in set(older) - set(kept[len(kept) - keep_last + 1 :]):
        _remove(path)
    return target


def _remove(path: Path) -> None:
    """Take a checkpoint's name away first, so that a process that dies here leaves no part of one
    under it; the next save clears what is left."""
    nameless = path.with_name(f".tmp-removed-{path.name}")
    os.rename(path, nameless)
    shutil.rmtree(nameless, ignore_errors=True)


def _write(
    folder: Path, state: State, progress: Progress, extra: Callable[[Path], object] | None
) -> None:
    save_file(state.tensors, folder / TENSORS)
    about = {"version": VERSION, "progress": asdict(progress), "adam_steps": state.adam_steps}
    (folder / STATE).write_text(json.dumps(about, indent=1))
    if extra is not None:
        extra(folder)
    mode = (folder / STATE).stat().st_mode  # as the umask has it: safetensors' files are 0600
    for file in folder.iterdir():
        file.chmod(mode)
        _sync(file)
    _sync(folder)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint that can be read, None if there is none."""
    return next((path for path in reversed(_by_age(folder)) if _readable(path)), None)


def passed_over(newest: Path | None, folder: Path) -> list[Path]:
    """The checkpoints of `folder` after `newest`, its `latest`: none of them can be read."""
    found = _by_age(folder)
    return found if newest is None else [path for path in found if _step(path) > _step(newest)]


def load_progress(path: Path) -> Progress:
    """Raises ConfigError for a checkpoint of another version of longreel."""
    about = json.loads((path / STATE).read_text())
    if about["version"] != VERSION:
        raise ConfigError(
            f"{path} is a checkpoint of version {about['version']}, this longreel goes on with "
            f"version {VERSION}: choose another run.dir, or the longreel that began the run."
        )
    return Progress(**about["progress"])


def check_continues(path: Path, saved: Progress, now: Progress) -> str | None:
    """What going on changes in the run, a sentence; None: nothing. Raises ConfigError where it
    would silently be another run."""
    if saved.clips != now.clips:
        raise ConfigError(
            f"{path} is of a run on other clips than data.path now gives: restore the folder, or "
            "choose another run.dir."
        )
    if saved.world_size == now.world_size:
        return None
    return (
        f"{path} is of a run on {saved.world_size} processes, and there are {now.world_size} "
        "(those that share clips count as one): weights, moments and the place among the clips go "
        f"on, but an update now learns from {now.world_size / saved.world_size:g} times as many "
        "clips, under other noise than it would have been."
    )


def load(path: Path, parameters: Mapping[str, nn.Parameter]) -> State:
    """What `path` holds; raises ConfigError unless it is of the parameters of these names."""
    with safe_open(path / TENSORS, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    state = State(tensors, json.loads((path / STATE).read_text())["adam_steps"])
    if state.adapter.keys() != parameters.keys():
        differing = sorted(state.adapter.keys() ^ parameters.keys())
        raise ConfigError(
            f"{path} holds other parameters than this run trains, {len(differing)} differ, such as "
            f"{differing[0]}: lora.targets or the model has changed."
        )
    return state


def gather(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, *, keep: bool = True
) -> State:
    """The state of parameters and their optimizer. Where these are shards of FSDP2, all processes
    call it. keep: the tensors; a process that does not write them need not."""
    tensors: dict[str, Tensor] = {}
    adam_steps: dict[str, float] = {}
    for name, parameter in parameters.items():
        moments = moments_of(optimizer, parameter)
        found = {"lora": parameter.detach()}
        if moments is not None:
            adam_steps[name] = moments[0]
            found |= moments[1]
        for kind, tensor in found.items():
            full = whole(tensor.detach())
            if keep:
                tensors[f"{kind}.{name}"] = full.cpu().contiguous()
    return State(tensors, adam_steps)


def scatter(
    state: State, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """The inverse of `gather`, in place. Raises ValueError for the moments of another optimizer."""
    moments = state.moments
    with torch.no_grad():
        for name, tensor in state.adapter.items():
            parameter = parameters[name]
            parameter.copy_(_like(tensor, parameter))
            if name in state.adam_steps:
                own = {kind: _like(x, parameter) for kind, x in moments[name].items()}
                restore_moments(optimizer, parameter, state.adam_steps[name], own)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of which this process may have a shard."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor in shards as those of `parameter`, if that has shards."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(
        tensor.to(parameter.device), parameter.device_mesh, parameter.placements
    )


def _by_age(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step-*") if NAME.fullmatch(p.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _readable(path: Path) -> bool:
    try:
        json.loads((path / STATE).read_text())
        with safe_open(path / TENSORS, framework="pt"):
            return True
    except (OSError, ValueError, SafetensorError):
        return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
