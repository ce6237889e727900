"""Cached clips as a map-style dataset, and the hold-out split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .encode import Entry
from .files import UNREADABLE, read_tensors


class Item(TypedDict):
    latents: Tensor  # [C, f, h, w]
    text: dict[str, Tensor]  # as the text encoder returned it
    id: str


class LatentDataset(Dataset[Item]):
    """The clips of `entries`, read from the cache when asked for.

    Raises ValueError naming the file for one that was damaged or replaced since it was looked up.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = list(entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Item:
        entry = self.entries[index]
        tensors, about = _read(entry.latents)
        found = {name: list(tensor.shape) for name, tensor in tensors.items()}
        promised = {"latents": about.get("shape")}
        if found != promised or about.get("start") != entry.start:
            what = f"it holds {found}, {promised} from frame {entry.start} on is expected"
            raise _damaged(entry.latents, what)
        return {"latents": tensors["latents"], "text": read_text(entry.text), "id": entry.id}


def collate(clips: list[Item]) -> dict[str, Any]:
    """A batch: `latents [B, C, f, h, w]`, lists of `texts` and `ids`. A function, since workers may
    have to pickle it."""
    return {
        "latents": torch.stack([clip["latents"] for clip in clips]),
        "texts": [clip["text"] for clip in clips],
        "ids": [clip["id"] for clip in clips],
    }


def read_text(path: Path) -> dict[str, Tensor]:
    """One caption's embedding, as the text encoder returned it; ValueError if it is damaged."""
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        return read_tensors(path)
    except UNREADABLE as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(
        f"cache file {path} is damaged ({what}): delete it and run again to encode it anew"
    )


def split(entries: Sequence[Entry], holdout: int) -> tuple[list[Entry], list[Entry]]:
    """(training clips, held-out clips): all clips of `holdout` videos are held out.

    Whole videos, because clips of one video look alike. The choice hashes the names, so it is the
    same in every run, and an added video changes the set by at most one.

    Raises ValueError if no clip is left to train on.
    """
    if holdout < 0:
        raise ValueError(f"cannot hold out {holdout} videos: give 0 or more")
    names = sorted({entry.source for entry in entries}, key=_rank)
    if holdout >= len(names):
        raise ValueError(
            f"holding out {holdout} of {len(names)} usable videos leaves none to train on: "
            "hold out fewer (validate.clips) or add videos"
        )
    held_out = set(names[:holdout])
    return (
        [entry for entry in entries if entry.source not in held_out],
        [entry for entry in entries if entry.source in held_out],
    )


def _rank(name: str) -> bytes:
    return hashlib.sha1(name.encode(), usedforsecurity=False).digest()
