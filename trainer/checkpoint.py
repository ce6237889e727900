"""Checkpoints: one safetensors file and one JSON file, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import ConfigError
from .optimizer import moments_of, restore_moments

TENSORS = "state.safetensors"
STATE = "state.json"
NAME = re.compile(r"step-\d+")
NOT_SAVED = (OSError, SafetensorError)  # what a save raises that may succeed later


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    step: optimizer updates done. Noise, sigmas, data order and learning rate are functions of it,
        of the seed, and of the two below.
    world_size: processes, of which those that share clips count as one. clips: `fingerprint` of
        the training clips. drawn: clips that all processes together have trained on; None in
        checkpoints from before it was kept, whose world size was that of their whole run.
    """

    step: int
    world_size: int
    clips: str
    drawn: int | None = None


@dataclass(frozen=True)
class State:
    """What a checkpoint holds of an adapter and its optimizer: whole tensors on the CPU, by
    `lora.NAME` and `MOMENT.NAME`, and the updates that each parameter has had."""

    tensors: dict[str, Tensor]
    adam_steps: dict[str, float]

    @property
    def adapter(self) -> dict[str, Tensor]:
        """The adapter's tensors by the names of its parameters."""
        named = {name.partition(".")[::2]: tensor for name, tensor in self.tensors.items()}
        return {name: tensor for (kind, name), tensor in named.items() if kind == "lora"}


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
            shutil.rmtree(target)
        os.rename(temporary, target)
    except NOT_SAVED:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(folder)
    older = [path for path in _by_age(folder) if path != target]
    kept = [path for path in older if _readable(path) and _step(path) < progress.step]
    for path in set(older) - set(kept[len(kept) - keep_last + 1 :]):
        shutil.rmtree(path)
    return target


def _write(
    folder: Path, state: State, progress: Progress, extra: Callable[[Path], object] | None
) -> None:
    save_file(state.tensors, folder / TENSORS)
    about = {"version": 1, "progress": asdict(progress), "adam_steps": state.adam_steps}
    (folder / STATE).write_text(json.dumps(about, indent=1))
    if extra is not None:
        extra(folder)
    for file in folder.iterdir():
        _sync(file)
    _sync(folder)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint that can be read, None if there is none."""
    return next((path for path in reversed(_by_age(folder)) if _readable(path)), None)


def load_progress(path: Path) -> Progress:
    return Progress(**json.loads((path / STATE).read_text())["progress"])


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


def restore(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Load weights and optimizer moments in place; raises ConfigError if the names differ, or the
    moments are of another optimizer."""
    state = json.loads((path / STATE).read_text())
    stored: dict[str, dict[str, Tensor]] = {}  # by parameter: its weight and its moments
    with safe_open(path / TENSORS, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            kind, _, name = key.partition(".")
            stored.setdefault(name, {})[kind] = file.get_tensor(key)
    if stored.keys() != parameters.keys():
        differing = sorted(stored.keys() ^ parameters.keys())
        raise ConfigError(
            f"{path} holds other parameters than this run trains, {len(differing)} differ, such as "
            f"{differing[0]}: lora.targets or the model has changed."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            tensors = stored[name]
            parameter.copy_(tensors.pop("lora"))
            if name in state["adam_steps"]:
                try:
                    restore_moments(optimizer, parameter, state["adam_steps"][name], tensors)
                except ValueError as error:
                    raise ConfigError(
                        f"{path} was written under another memory.optimizer: {error}."
                    ) from error


def gather(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> State:
    """The state of parameters that are whole in this process."""
    tensors: dict[str, Tensor] = {}
    adam_steps: dict[str, float] = {}
    for name, parameter in parameters.items():
        tensors[f"lora.{name}"] = parameter.detach().cpu().contiguous()
        moments = moments_of(optimizer, parameter)
        if moments is not None:
            adam_steps[name], kept = moments
            for moment, tensor in kept.items():
                tensors[f"{moment}.{name}"] = tensor.detach().cpu().contiguous()
    return State(tensors, adam_steps)


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
