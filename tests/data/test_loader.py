"""Batches are read in order, ahead of their steps, in parts, and in bounded memory."""

import gc
import time
import weakref
from itertools import islice

import pytest
import torch
from stub_cache import SPEC, add, build

from longreel.data.dataset import LatentDataset, collate, joined
from longreel.data.files import read_tensors, save_tensors
from longreel.data.loader import Loader
from longreel.data.sampler import SeededBatches


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v")
    for index in range(5):
        add(folder, f"{index}.mp4", 10 + index, f"caption {index}")
    return build(folder, SPEC, tmp_path_factory.mktemp("cache")).entries


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_come_in_the_sampler_s_order(entries, workers):
    data, batches = LatentDataset(entries), SeededBatches(5, 2, seed=3)
    got = list(islice(Loader(data, batches, workers), 6))
    expected = [batches.batch_at(step) for step in range(6)]
    assert [batch["ids"] for batch in got] == [[entries[i].id for i in b] for b in expected]
    for batch, indices in zip(got, expected, strict=True):
        stored = [read_tensors(entries[i].latents)[0]["latents"] for i in indices]
        assert torch.equal(batch["latents"], torch.stack(stored))
        assert [len(text["embeds"]) for text in batch["texts"]] == [9, 9]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_where_its_batch_would_have(entries, workers, tmp_path):
    class Broken(LatentDataset):
        def __getitem__(self, index):
            if index == 3:
                raise ValueError("cache file 3 is damaged")
            return super().__getitem__(index)

    batches = SeededBatches(5, 1, seed=0)
    place = [batches.batch_at(step) for step in range(5)].index([3])
    loader = iter(Loader(Broken(entries), batches, workers))
    assert len(list(islice(loader, place))) == place
    with pytest.raises(ValueError, match="is damaged"):
        next(loader)


def test_memory_is_bounded(entries):
    """However long a step takes, no more batches wait than there are workers."""
    alive = []

    class Watched(LatentDataset):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            alive.append(weakref.ref(item["latents"]))
            return item

    loader = iter(Loader(Watched(entries), SeededBatches(5, 1, seed=0), 2))
    for _ in range(4):
        batch = next(loader)
        time.sleep(0.02)
        gc.collect()
        assert sum(reference() is not None for reference in alive) <= 3
        del batch
    loader.close()


def test_reading_goes_on_while_a_step_runs(entries):
    class Slow(LatentDataset):
        def __getitem__(self, index):
            time.sleep(0.05)
            return super().__getitem__(index)

    loader = iter(Loader(Slow(entries), SeededBatches(5, 1, seed=0), 1))
    next(loader)
    waited = 0.0
    for _ in range(5):
        time.sleep(0.08)  # the step
        began = time.perf_counter()
        next(loader)
        waited += time.perf_counter() - began
    assert waited < 0.1  # of 0.25 s of reading
    loader.close()


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_processes_that_share_a_clip_read_a_part_each(entries, parts):
    whole = collate([LatentDataset(entries)[i] for i in (0, 1)])
    pieces = [
        collate([LatentDataset(entries, part=(rank, parts))[i] for i in (0, 1)])
        for rank in range(parts)
    ]
    numbers = whole["latents"][0].numel()
    assert all(piece["latents"].shape == (2, -(-numbers // parts)) for piece in pieces)
    together = joined(torch.stack([piece["latents"] for piece in pieces]), pieces[0]["shape"])
    assert torch.equal(together, whole["latents"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_part_is_all_that_is_read(entries, dtype, tmp_path, monkeypatch):
    """Only the header and the bytes of that part are read from the file."""
    path = tmp_path / "a.safetensors"
    latents = torch.randn(16, 4, 32, 32).to(dtype)
    about = {"schema": 1, "shape": list(latents.shape), "start": 0}
    save_tensors(path, {"latents": latents}, about)
    from longreel.data import files

    read, real = [], files._exactly
    monkeypatch.setattr(files, "_exactly", lambda f, t: read.append(len(t)) or real(f, t))
    part, told = files.read_pinned(path, "latents", part=(1, 4))
    assert torch.equal(part, latents.flatten()[16384:32768]) and told == about
    assert read[2:] == [16384 * dtype.itemsize]


@pytest.mark.parametrize("cut", [-1, -5000, 100, 7, 0])
def test_torn_files_are_named(entries, tmp_path, cut):
    from dataclasses import replace

    path = tmp_path / "torn.safetensors"
    path.write_bytes(entries[0].latents.read_bytes()[: cut or None] if cut else b"")
    with pytest.raises(ValueError, match=f"cache file {path} is damaged .*run again"):
        LatentDataset([replace(entries[0], latents=path)])[0]
