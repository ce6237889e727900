"""Batches are a function of the seed, whatever the ranks, and resume where they stopped."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longreel.data.sampler import SeededBatches

SHAPES = {
    "num_samples": st.integers(1, 40),
    "batch": st.integers(1, 9),
    "num_ranks": st.integers(1, 4),
    "seed": st.integers(0, 2**31),
}


def stream(num_samples, batch, seed, num_ranks, steps):
    """Return the samples of all ranks in the global order."""
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
    """So a run can resume with another number of processes if the global batch stays the same."""
    split = stream(num_samples, batch, seed, num_ranks, 5)
    assert split == stream(num_samples, batch * num_ranks, seed, 1, 5)


@given(start=st.integers(0, 50), rank=st.integers(0, 3), **SHAPES)
def test_resuming_goes_on_with_the_same_batches(num_samples, batch, num_ranks, seed, start, rank):
    place = {"rank": rank % num_ranks, "num_ranks": num_ranks}
    whole = SeededBatches(num_samples, batch, seed, **place)
    drawn = whole.drawn_after(start)
    resumed = SeededBatches(num_samples, batch, seed, drawn=drawn, **place)
    rest = list(islice(resumed, 6))
    assert rest == list(islice(whole, start, start + 6))
    assert all(len(indices) == batch for indices in rest)
    assert rest == list(islice(resumed, 6))  # iterating leaves no state behind


def test_seeds_and_epochs_differ():
    first, second = (stream(50, 50, seed, 1, 2) for seed in (0, 1))
    assert first != second
    assert first[:50] != first[50:] and first[50:] != second[:50]


BUCKETS = st.lists(st.sampled_from("abc"), min_size=1, max_size=30)


@settings(max_examples=40)
@given(buckets=BUCKETS, batch=st.integers(1, 3), num_ranks=st.integers(1, 3))
def test_a_step_is_of_one_bucket_and_all_samples_come_equally_often(buckets, batch, num_ranks):
    place = {"num_ranks": num_ranks, "buckets": buckets}
    ranks = [SeededBatches(len(buckets), batch, 5, rank=rank, **place) for rank in range(num_ranks)]
    counts, steps = Counter(), 40
    for step in range(steps):
        chosen = [index for rank in ranks for index in rank.batch_at(step)]
        assert len({buckets[index] for index in chosen}) == 1
        counts.update(chosen)
    drawn = steps * batch * num_ranks
    for bucket in set(buckets):
        members = [index for index in range(len(buckets)) if buckets[index] == bucket]
        seen = [counts[index] for index in members]
        assert max(seen) - min(seen) <= 1  # within a bucket
        share = drawn * len(members) / len(buckets)
        assert abs(sum(seen) - share) <= 1.5 * batch * num_ranks  # and among them


@settings(max_examples=40)
@given(buckets=BUCKETS, start=st.integers(0, 30))
def test_resuming_among_buckets(buckets, start):
    whole = SeededBatches(len(buckets), 2, 1, buckets=buckets)
    drawn = whole.drawn_after(start)
    resumed = SeededBatches(len(buckets), 2, 1, buckets=buckets, drawn=drawn)
    assert list(islice(resumed, 5)) == list(islice(whole, start, start + 5))
    assert resumed.batch_at(0) == whole.batch_at(start)  # any step, in any order


@given(buckets=BUCKETS, start=st.integers(0, 20))
def test_going_on_with_other_ranks_leaves_no_sample_out(buckets, start):
    """Each bucket's stream continues where it was, however many samples a step now takes."""
    two = SeededBatches(len(buckets), 1, 1, buckets=buckets, num_ranks=2, rank=0)
    drawn = two.drawn_after(start)
    assert sum(drawn) == 2 * start
    three = [
        SeededBatches(len(buckets), 1, 1, buckets=buckets, num_ranks=3, rank=rank, drawn=drawn)
        for rank in range(3)
    ]
    got = [index for step in range(6) for rank in three for index in rank.batch_at(step)]
    alone = SeededBatches(len(buckets), 1, 1, buckets=buckets, drawn=drawn)
    for bucket in set(buckets):
        members = [index for index in got if buckets[index] == bucket]
        steps = (alone.batch_at(step)[0] for step in range(20 * len(buckets)))
        assert members == list(islice((i for i in steps if buckets[i] == bucket), len(members)))


def test_one_bucket_is_as_none():
    plain, same = SeededBatches(7, 2, 3), SeededBatches(7, 2, 3, buckets=["x"] * 7)
    assert [plain.batch_at(step) for step in range(9)] == [same.batch_at(step) for step in range(9)]


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
