"""Which samples make which batch: a function of the seed and the step, with no state to save."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class SeededBatches(Sampler[list[int]]):
    """Endless batches of sample indices for `DataLoader(batch_sampler=...)`.

    The samples form one endless stream, epoch after epoch, each a permutation of its own. Step k
    takes the next `num_ranks * batch` of them and rank r the r-th `batch` of those; a batch that
    reaches the end of an epoch goes on in the next, so every sample is seen equally often and all
    batches are full. Iteration begins at step `start`: a run resumed at step k sees what the
    uninterrupted one would have seen.

    buckets: for each sample the shape that it has; samples of one batch, and of all ranks at one
    step, have the same. Each bucket is a stream, and a step takes from the one
    that is furthest behind its share of the samples, so that no stream is a whole step ahead or
    behind. Without buckets, `num_samples` are all of one.
    """

    def __init__(
        self,
        num_samples: int,
        batch: int,
        seed: int,
        *,
        start: int = 0,
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
        if start < 0 or not 0 <= rank < num_ranks:
            raise ValueError(f"no such place: step {start}, rank {rank} of {num_ranks}")
        if buckets is not None and len(buckets) != num_samples:
            raise ValueError(f"{num_samples} samples, but buckets of {len(buckets)}")
        self.num_samples, self.batch, self.seed = num_samples, batch, seed
        self.start, self.rank, self.num_ranks = start, rank, num_ranks
        self._streams = _streams(num_samples, buckets, seed)
        self._chosen = _Chosen([len(stream.samples) for stream in self._streams])

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start
        while True:
            yield self.batch_at(step)
            step += 1

    def batch_at(self, step: int) -> list[int]:
        """This rank's indices at `step`."""
        bucket, before = self._chosen.at(step)
        first = (before * self.num_ranks + self.rank) * self.batch
        stream = self._streams[bucket]
        return [stream.sample(position) for position in range(first, first + self.batch)]


class _Stream:
    """The samples of a bucket, epoch after epoch."""

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
    members: dict[object, list[int]] = {}
    for index in range(num_samples):
        members.setdefault(None if buckets is None else buckets[index], []).append(index)
    if len(members) == 1:
        return [_Stream(np.arange(num_samples), (seed,))]
    ordered = sorted(members, key=lambda bucket: (len(members[bucket]), str(bucket)), reverse=True)
    return [_Stream(np.array(members[b]), (seed, place)) for place, b in enumerate(ordered)]


class _Chosen:
    """Which bucket each step takes from: the one whose share of the steps so far lags most."""

    def __init__(self, sizes: list[int]) -> None:
        self.shares = np.array(sizes) / sum(sizes)
        self._restart()

    def at(self, step: int) -> tuple[int, int]:
        """(bucket, how many earlier steps took from it)."""
        if step < self._step - 1:
            self._restart()
        while self._step <= step:
            self._step += 1
            self._last = int(np.argmax(self.shares * self._step - self._counts))
            self._counts[self._last] += 1
        return self._last, int(self._counts[self._last]) - 1

    def _restart(self) -> None:
        self._counts, self._step, self._last = np.zeros(len(self.shares), np.int64), 0, 0
