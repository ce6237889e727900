"""Draw batches of samples as a function of the seed and of the number of samples drawn before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class SeededBatches(Sampler[list[int]]):
    """Yields endless batches of sample indices, as `DataLoader(batch_sampler=...)` takes them.

    The samples form one endless stream of epochs, each with its own permutation. A step takes the
    next `num_ranks * batch` samples of the stream, and rank r takes the r-th `batch` of those. A
    batch that reaches the end of an epoch continues in the next one, so every sample is seen
    equally often and all batches are full.

    buckets: the shape of each sample. All samples of one step, on all ranks, have the same shape:
    each bucket is a stream of its own, and a step takes from the stream that is furthest behind its
    share of the samples. None: all samples are in one bucket.
    drawn: number of samples drawn from each stream before step 0, as `drawn_after` returns it;
    None for none. A resumed run sees what the uninterrupted one would have seen; if it changes the
    batch or the number of ranks, it continues with the next samples.
    Raises ValueError for impossible values.
    """

    def __init__(
        self,
        num_samples: int,
        batch: int,
        seed: int,
        *,
        drawn: Sequence[int] | None = None,
        rank: int = 0,
        num_ranks: int = 1,
        buckets: Sequence[object] | None = None,
    ) -> None:
        if num_samples < 1:
            raise ValueError("there is no sample to draw batches from")
        if batch < 1:
            raise ValueError(f"a batch of {batch} samples is not possible: give 1 or more")
        if seed < 0:
            raise ValueError(f"seed is {seed}: it must not be negative")
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank {rank} of {num_ranks} does not exist")
        if buckets is not None and len(buckets) != num_samples:
            raise ValueError(f"{num_samples} samples, but buckets of {len(buckets)}")
        self.num_samples, self.batch, self.seed = num_samples, batch, seed
        self.rank, self.num_ranks = rank, num_ranks
        self._streams = _streams(num_samples, buckets, seed)
        counts = [0] * len(self._streams) if drawn is None else [*drawn]
        if len(counts) != len(self._streams) or min(counts) < 0:
            raise ValueError(f"drawn is {counts}: give {len(self._streams)} counts, 0 or more")
        sizes = [len(stream.samples) for stream in self._streams]
        self._turns = _Turns(sizes, counts, batch * num_ranks)

    def __iter__(self) -> Iterator[list[int]]:
        step = 0
        while True:
            yield self.batch_at(step)
            step += 1

    def batch_at(self, step: int) -> list[int]:
        """Return this rank's sample indices at `step`."""
        chosen, before = self._turns.at(step)
        first = before + self.rank * self.batch
        stream = self._streams[chosen]
        return [stream.sample(position) for position in range(first, first + self.batch)]

    def drawn_after(self, steps: int) -> list[int]:
        """Return the samples drawn per stream, over all ranks, after `steps` steps."""
        return self._turns.counts_before(steps)


class _Stream:
    """Holds the samples of one bucket, permuted anew in every epoch."""

    def __init__(self, samples: np.ndarray, seed: tuple[int, ...]) -> None:
        self.samples, self.seed = samples, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def sample(self, position: int) -> int:
        epoch, index = divmod(position, len(self.samples))
        if epoch != self._epoch:
            generator = np.random.default_rng((*self.seed, epoch))
            self._order = generator.permutation(len(self.samples))
            self._epoch = epoch
        return int(self.samples[self._order[index]])


def _streams(num_samples: int, buckets: Sequence[object] | None, seed: int) -> list[_Stream]:
    """Return a stream per bucket, the largest first."""
    members: dict[object, list[int]] = {}
    for index in range(num_samples):
        members.setdefault(None if buckets is None else buckets[index], []).append(index)
    if len(members) == 1:
        return [_Stream(np.arange(num_samples), (seed,))]
    ordered = sorted(members, key=lambda bucket: (len(members[bucket]), str(bucket)), reverse=True)
    return [_Stream(np.array(members[b]), (seed, place)) for place, b in enumerate(ordered)]


class _Turns:
    """Chooses the stream of each step: the one that is furthest behind its share.

    sizes: samples of each stream. drawn: samples drawn from each before step 0. taken: samples that
    one step takes.
    """

    def __init__(self, sizes: list[int], drawn: list[int], taken: int) -> None:
        self.sizes, self.drawn, self.taken = sizes, drawn, taken
        self._restart()

    def at(self, step: int) -> tuple[int, int]:
        """Return (index of the stream, samples drawn from it before `step`)."""
        if step < self._step - 1:
            self._restart()
        while self._step <= step:
            # Integer arithmetic, scaled by the number of samples: shares would round.
            total = sum(self._counts) + self.taken
            lag = [
                size * total - sum(self.sizes) * count
                for size, count in zip(self.sizes, self._counts, strict=True)
            ]
            self._last = lag.index(max(lag))
            self._counts[self._last] += self.taken
            self._step += 1
        return self._last, self._counts[self._last] - self.taken

    def counts_before(self, step: int) -> list[int]:
        """Return the samples drawn from each stream before `step`."""
        if step < self._step:
            self._restart()
        if step:
            self.at(step - 1)
        return [*self._counts]

    def _restart(self) -> None:
        self._counts, self._step, self._last = [*self.drawn], 0, 0
