"""Checkpoints: a safetensors file, a JSON file and the adapter, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..config.values import ConfigError
from ..optimizer import moments_of, restore_moments

TENSORS = "state.safetensors"
STATE = "state.json"
VERSION = 2  # of the two files
ADAPTER = "lora"  # in TENSORS, begins the keys of the adapter; moments begin with their own names
NAME = re.compile(r"step-\d+")
NOT_SAVED = (OSError, SafetensorError)  # raised by a save that may succeed later


@dataclass(frozen=True)
class Progress:
    """Holds how far a run has come.

    step: optimizer updates done. Noise, sigmas, data order and learning rate are functions of it,
        of the seed, and of `world_size` and `drawn`.
    world_size: processes, where those that share clips count as one. clips: `fingerprint` of the
        training clips. drawn: clips that all processes together have trained on, per bucket
        (`SeededBatches.drawn_after`).
    """

    step: int
    world_size: int
    clips: str
    drawn: list[int]


@dataclass(frozen=True)
class State:
    """An adapter and its optimizer's state: whole tensors on the CPU, by the parameters' names.

    moments: for each parameter that has had updates, its moments by the names that the optimizer
    gives them. adam_steps: the number of updates that each of these parameters has had.
    """

    adapter: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    adam_steps: dict[str, float] = field(default_factory=dict)

    def as_file(self) -> dict[str, Tensor]:
        """Return the tensors by the keys of TENSORS: `lora.PARAMETER` and `MOMENT.PARAMETER`."""
        tensors = {f"{ADAPTER}.{name}": tensor for name, tensor in self.adapter.items()}
        for name, moments in self.moments.items():
            tensors |= {f"{moment}.{name}": tensor for moment, tensor in moments.items()}
        return tensors

    @classmethod
    def from_file(cls, tensors: Mapping[str, Tensor], adam_steps: dict[str, float]) -> State:
        """Undo `as_file`."""
        state = cls(moments={name: {} for name in adam_steps}, adam_steps=adam_steps)
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            if kind == ADAPTER:
                state.adapter[name] = tensor
            else:
                state.moments[name][kind] = tensor
        return state


class ExtraFiles(Protocol):
    """Writes files beside the state of a checkpoint."""

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> object:
        """Write them into `folder`. tensors: the adapter's, by the names of its parameters."""
        ...


def fingerprint(ids: Iterable[str]) -> str:
    """Return twelve hex digits that identify a list of clips."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:12]


def save(
    folder: Path,
    state: State,
    progress: Progress,
    *,
    keep_last: int,
    extra: ExtraFiles | None = None,
) -> Path:
    """Write `folder/step-N`, and keep it and the `keep_last` - 1 readable checkpoints before it.

    All files go to a temporary folder, which is renamed once it is complete and on disk. So neither
    a process that dies at any moment nor a full disk damages earlier checkpoints. A save that fails
    leaves no files and raises one of `NOT_SAVED`.

    extra: writes further files beside the state, such as the adapter; None for the state alone.
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
    """Delete a checkpoint, which is renamed first.

    A process that dies here leaves no partial checkpoint under a checkpoint's name; the next save
    deletes the rest.
    """
    nameless = path.with_name(f".tmp-removed-{path.name}")
    os.rename(path, nameless)
    shutil.rmtree(nameless, ignore_errors=True)


def _write(folder: Path, state: State, progress: Progress, extra: ExtraFiles | None) -> None:
    save_file(state.as_file(), folder / TENSORS)
    about = {"version": VERSION, "progress": asdict(progress), "adam_steps": state.adam_steps}
    (folder / STATE).write_text(json.dumps(about, indent=1))
    if extra is not None:
        extra.write(folder, state.adapter)
    mode = (folder / STATE).stat().st_mode  # set by the umask; safetensors creates files as 0600
    for file in folder.iterdir():
        file.chmod(mode)
        _sync(file)
    _sync(folder)


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint that can be read; None if there is none."""
    return next((path for path in reversed(_by_age(folder)) if _readable(path)), None)


def unreadable_after(newest: Path | None, folder: Path) -> list[Path]:
    """Return the checkpoints of `folder` that are newer than `newest`, its `latest`.

    None of them can be read. Without `newest` these are all checkpoints.
    """
    found = _by_age(folder)
    return found if newest is None else [path for path in found if _step(path) > _step(newest)]


def load_progress(path: Path) -> Progress:
    """Read a checkpoint's progress; raise ConfigError if another version of longreel wrote it."""
    about = json.loads((path / STATE).read_text())
    if about["version"] != VERSION:
        raise ConfigError(
            f"{path} is a checkpoint of version {about['version']}, this longreel resumes with "
            f"version {VERSION}: choose another run.dir, or the longreel that began the run."
        )
    return Progress(**about["progress"])


def check_continues(path: Path, saved: Progress, now: Progress) -> str | None:
    """Return a sentence about what resuming changes in the run; None if it changes nothing.

    Raises ConfigError if the clips are others: it would no longer be the same run.
    """
    if saved.clips != now.clips:
        raise ConfigError(
            f"{path} belongs to a run on other clips than data.path now gives: restore the folder, "
            "or choose another run.dir."
        )
    if saved.world_size == now.world_size:
        return None
    return (
        f"{path} was written by {saved.world_size} processes, and there are {now.world_size} "
        "(those that share clips count as one): weights, moments and the place among the clips are "
        f"kept, but an update now learns from {now.world_size / saved.world_size:g} times as many "
        "clips, and under other noise."
    )


def load(path: Path, parameters: Mapping[str, nn.Parameter]) -> State:
    """Read a checkpoint; raise ConfigError unless it holds exactly the given parameters."""
    with safe_open(path / TENSORS, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    state = State.from_file(tensors, json.loads((path / STATE).read_text())["adam_steps"])
    if state.adapter.keys() != parameters.keys():
        differing = sorted(state.adapter.keys() ^ parameters.keys())
        raise ConfigError(
            f"{path} holds other parameters than this run trains: {len(differing)} differ, such as "
            f"{differing[0]}. lora.targets or the model has changed."
        )
    return state


def gather(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, *, keep: bool = True
) -> State:
    """Return the state of parameters and their optimizer.

    If these are shards of FSDP2, all processes must call it. keep: False to gather without keeping
    the tensors, in processes that do not write them.
    """
    state = State()

    def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        full = {name: whole(tensor.detach()) for name, tensor in tensors.items()}
        return {name: x.cpu().contiguous() for name, x in full.items()} if keep else {}

    for name, parameter in parameters.items():
        state.adapter.update(gathered({name: parameter}))
        moments = moments_of(optimizer, parameter)
        if moments is not None:
            state.adam_steps[name], tensors = moments
            state.moments[name] = gathered(tensors)
    return state


def scatter(
    state: State, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Undo `gather`, in place. Raises ValueError for the moments of another optimizer."""
    with torch.no_grad():
        for name, tensor in state.adapter.items():
            parameter = parameters[name]
            parameter.copy_(_like(tensor, parameter))
            if name in state.adam_steps:
                own = {kind: _like(x, parameter) for kind, x in state.moments[name].items()}
                restore_moments(optimizer, parameter, state.adam_steps[name], own)


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor of which this process may hold a shard."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Shard a whole tensor the way `parameter` is sharded, if it is."""
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
