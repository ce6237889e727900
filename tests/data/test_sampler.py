from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from longreel.data.sampler import SeededBatches

SHAPES = {
    "num_samples": st.integers(1, 40),
    "batch": st.integers(1, 9),
    "num_ranks": st.integers(1, 4),
    "seed": st.integers(0, 2**31),
}


def stream(num_samples, batch, seed, num_ranks, steps):
    """What all ranks see, in the global order."""
    ranks = [
        SeededBatches(num_samples, batch, seed, rank=rank, num_ranks=num_ranks)
        for rank in range(num_ranks)
    ]
    return [index for step in range(steps) for rank in ranks for index in rank.batch_at(step)]


@given(**SHAPES)
def test_every_epoch_is_a_permutation_shared_out_among_ranks(num_samples, batch, num_ranks, seed):
    steps = -(-3 * num_samples // (batch * num_ranks))
    seen = stream(num_samples, batch, seed, num_ranks, steps)
    for epoch in range(3):
        part = seen[epoch * num_samples : (epoch + 1) * num_samples]
        assert sorted(part) == list(range(num_samples))
    counts = Counter(seen)
    assert max(counts.values()) - min(counts.values()) <= 1


@given(**SHAPES)
def test_the_global_order_does_not_depend_on_the_number_of_ranks(
    num_samples, batch, num_ranks, seed
):
    """So a run may go on with other numbers of processes as long as the global batch stays."""
    split = stream(num_samples, batch, seed, num_ranks, 5)
    assert split == stream(num_samples, batch * num_ranks, seed, 1, 5)


@given(start=st.integers(0, 50), rank=st.integers(0, 3), **SHAPES)
def test_resuming_goes_on_with_the_same_batches(num_samples, batch, num_ranks, seed, start, rank):
    place = {"rank": rank % num_ranks, "num_ranks": num_ranks}
    whole = SeededBatches(num_samples, batch, seed, **place)
    resumed = SeededBatches(num_samples, batch, seed, drawn=start * batch * num_ranks, **place)
    rest = list(islice(resumed, 6))
    assert rest == list(islice(whole, start, start + 6))
    assert all(len(indices) == batch for indices in rest)
    assert rest == list(islice(resumed, 6))  # iterating leaves no state behind


def test_seeds_and_epochs_differ():
    first, second = (stream(50, 50, seed, 1, 2) for seed in (0, 1))
    assert first != second
    assert first[:50] != first[50:] and first[50:] != second[:50]


@pytest.mark.parametrize("workers", [0, 2])
def test_feeds_a_data_loader(workers):
    data, batches = TensorDataset(torch.arange(10)), SeededBatches(10, 4, seed=3, drawn=28)
    loader = DataLoader(data, batch_sampler=batches, num_workers=workers)
    got = [batch[0].tolist() for batch in islice(loader, 5)]
    assert got == [SeededBatches(10, 4, seed=3).batch_at(step) for step in range(7, 12)]


@pytest.mark.parametrize(
    ("given_values", "message"),
    [
        ((0, 1, 0), "there is no sample to draw batches from"),
        ((4, 0, 0), "a batch of 0 samples is not possible"),
        ((4, 1, -1), "seed is -1"),
    ],
)
def test_impossible_values_are_refused(given_values, message):
    with pytest.raises(ValueError, match=message):
        SeededBatches(*given_values)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        SeededBatches(4, 1, 0, rank=2, num_ranks=2)
