"""Cached clips are read as a data set, and whole videos are held out."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stub_cache import BUCKET, SPEC, build

from longreel.data.cache import Entry
from longreel.data.dataset import LatentDataset, split


def test_dataset_items(folder, cache):
    prepared = build(folder, SPEC, cache)
    data = LatentDataset(prepared.entries)
    assert len(data) == 3
    item = data[1]
    assert set(item) == {"latents", "shape", "text", "id"} and item["id"] == "b.mp4@0"
    assert item["latents"].shape == (3, 9, 4, 6) and item["latents"].dtype == torch.bfloat16
    assert item["text"]["embeds"].shape == (5, 2) and item["text"]["mask"].shape == (5,)


def test_dataset_refuses_damaged_files(folder, cache):
    prepared = build(folder, replace(SPEC, windows="all"), cache)
    first, second, *_ = prepared.entries
    data = LatentDataset(prepared.entries)
    first.latents.write_bytes(second.latents.read_bytes())
    with pytest.raises(ValueError, match=f"cache file {first.latents} is damaged .*frame 0 on"):
        data[0]
    second.latents.write_bytes(b"")
    with pytest.raises(ValueError, match=f"cache file {second.latents} is damaged .*run again"):
        data[1]
    prepared.entries[2].text.unlink()
    with pytest.raises(ValueError, match="is damaged .*No such file.*run again"):
        data[2]


def entries(*names: str) -> list[Entry]:
    path = Path("x")
    return [
        Entry(f"{name}@{start}", name, path, path, "", start, BUCKET, name)
        for name in names
        for start in (0, 9)
    ]


def test_split_holds_out_whole_videos():
    everything = entries(*(f"{index}.mp4" for index in range(20)))
    train, held_out = split(everything, 4)
    assert len(held_out) == 8 and len(train) == 32
    held_names = {entry.source for entry in held_out}
    assert len(held_names) == 4 and held_names.isdisjoint(entry.source for entry in train)
    assert sorted([*train, *held_out], key=everything.index) == everything
    assert split(everything[::-1], 4)[1] == held_out[::-1]
    assert split(everything, 0) == (everything, [])


def test_split_is_stable_when_videos_are_added():
    names = [f"{index}.mp4" for index in range(20)]
    before = {entry.source for entry in split(entries(*names), 4)[1]}
    for index in range(20, 60):
        after = {entry.source for entry in split(entries(*names, f"{index}.mp4"), 4)[1]}
        assert len(before - after) <= 1


def test_split_that_leaves_nothing_is_refused():
    with pytest.raises(
        ValueError, match="holding out 2 of 2 usable videos leaves none to train on"
    ):
        split(entries("a.mp4", "b.mp4"), 2)
    with pytest.raises(ValueError, match="cannot hold out -1 videos"):
        split(entries("a.mp4"), -1)
