"""Read cached clips as a map-style data set, and split off held-out videos."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .cache import Entry
from .files import UNREADABLE, read_pinned, read_tensors


class Item(TypedDict):
    """Holds one clip.

    latents: `[C, f, h, w]`, or `[numbers]` if only a part is read. shape: of the whole latents.
    text: the caption's embedding, as the text encoder returned it. id: `Entry.id`.
    """

    latents: Tensor
    shape: list[int]
    text: dict[str, Tensor]
    id: str


class LatentDataset(Dataset[Item]):
    """Reads the clips of `entries` from the cache on access.

    part: (i, n) reads only the i-th of n parts of each clip's flat latents, the last one padded
    with zeros, so that processes that share a clip read it only once; `joined` assembles the clip.
    pinned: read into page-locked memory, from which a GPU can copy while it computes. Access raises
    ValueError, naming the file, if a file was damaged or replaced.
    """

    def __init__(
        self, entries: Sequence[Entry], *, part: tuple[int, int] = (0, 1), pinned: bool = False
    ) -> None:
        self.entries = list(entries)
        self.part, self.pinned = part, pinned

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Item:
        entry = self.entries[index]
        try:
            latents, header = read_pinned(
                entry.latents, "latents", part=self.part, pinned=self.pinned
            )
        except UNREADABLE as error:
            raise _damaged(entry.latents, str(error)) from error
        shape = header.get("shape")
        whole = self.part[1] > 1 or list(latents.shape) == shape
        if not isinstance(shape, list) or not whole or header.get("start") != entry.start:
            what = f"it holds {list(latents.shape)} from frame {header.get('start')} on, {shape} "
            raise _damaged(entry.latents, what + f"from frame {entry.start} on is expected")
        text = read_text(entry.text)
        return {"latents": latents, "shape": shape, "text": text, "id": entry.id}


def joined(parts: Tensor, shape: Sequence[int]) -> Tensor:
    """Assemble the parts of a batch, `[parts, B, numbers]`, to latents `[B, *shape]`."""
    numbers = parts.transpose(0, 1).flatten(1)
    return numbers[:, : torch.Size(shape).numel()].unflatten(1, list(shape))


def collate(clips: list[Item]) -> dict[str, Any]:
    """Make a batch: `latents` `[B, C, f, h, w]` or `[B, numbers]`, `shape`, `texts` and `ids`."""
    latents = [clip["latents"] for clip in clips]
    return {
        # One clip is not copied: the copy would not be pinned.
        "latents": latents[0][None] if len(clips) == 1 else _stack(latents),
        "shape": clips[0]["shape"],
        "texts": [clip["text"] for clip in clips],
        "ids": [clip["id"] for clip in clips],
    }


def _stack(latents: list[Tensor]) -> Tensor:
    """Stack tensors into pinned memory if they are pinned."""
    first = latents[0]
    out = torch.empty((len(latents), *first.shape), dtype=first.dtype, pin_memory=first.is_pinned())
    return torch.stack(latents, out=out)


def read_text(path: Path) -> dict[str, Tensor]:
    """Read a caption's embedding. Raises ValueError, naming the file, if it is damaged."""
    try:
        return read_tensors(path)[0]
    except UNREADABLE as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(
        f"cache file {path} is damaged ({what}): delete it and run again to encode it anew"
    )


def split(entries: Sequence[Entry], holdout: int) -> tuple[list[Entry], list[Entry]]:
    """Return (training clips, held-out clips); all clips of `holdout` videos are held out.

    Videos are held out whole, with all their copies, because clips of one video look alike. The
    choice is by a hash of their names, so it is the same in every run, and adding a video changes
    at most one of the held-out videos.

    Raises ValueError if no clip is left to train on.
    """
    if holdout < 0:
        raise ValueError(f"cannot hold out {holdout} videos: give 0 or more")
    names = sorted({entry.group for entry in entries}, key=_rank)
    if holdout >= len(names):
        raise ValueError(
            f"holding out {holdout} of {len(names)} usable videos leaves none to train on: "
            "hold out fewer (validate.videos) or add videos"
        )
    held_out = set(names[:holdout])
    return (
        [entry for entry in entries if entry.group not in held_out],
        [entry for entry in entries if entry.group in held_out],
    )


def _rank(name: str) -> bytes:
    return hashlib.sha1(name.encode(), usedforsecurity=False).digest()
