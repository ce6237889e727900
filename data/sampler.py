"""Which samples make which batch: a function of the seed and of how many were drawn before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class SeededBatches(Sampler[list[int]]):
    """Endless batches of sample indices for `DataLoader(batch_sampler=...)`.

    The samples form one endless stream, epoch after epoch, each a permutation of its own. A step
    takes the next `num_ranks * batch` of them and rank r the r-th `batch` of those; a batch that
    reaches the end of an epoch goes on in the next, so every sample is seen equally often and all
    batches are full.

    buckets: for each sample the shape that it has; samples of one batch, and of all ranks at one
    step, have the same. Each bucket is a stream, and a step takes from the one that is furthest
    behind its share of the samples. Without buckets, all samples are of one.
    drawn: how many samples of each stream came before step 0, as `drawn_after` gives them: a run
    that goes on sees what the uninterrupted one would have seen, and one that goes on with another
    batch or number of ranks the samples that come next. None: none.
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
            raise ValueError(f"no such place: rank {rank} of {num_ranks}")
        if buckets is not None and len(buckets) != num_samples:
            raise ValueError(f"{num_samples} samples, but buckets of {len(buckets)}")
        self.num_samples, self.batch, self.seed = num_samples, batch, seed
        self.rank, self.num_ranks = rank, num_ranks
        self._streams = _streams(num_samples, buckets, seed)
        counts = [0] * len(self._streams) if drawn is None else [*drawn]
        if len(counts) != len(self._streams) or min(counts) < 0:
            raise ValueError(f"no such place: after {counts} of {len(self._streams)} streams")
        sizes = [len(stream.samples) for stream in self._streams]
        self._turns = _Turns(sizes, counts, batch * num_ranks)

    def __iter__(self) -> Iterator[list[int]]:
        step = 0
        while True:
            yield self.batch_at(step)
            step += 1

    def batch_at(self, step: int) -> list[int]:
        """This rank's indices at `step`."""
        chosen, before = self._turns.at(step)
        first = before + self.rank * self.batch
        stream = self._streams[chosen]
        return [stream.sample(position) for position in range(first, first + self.batch)]

    def drawn_after(self, steps: int) -> list[int]:
        """Of each stream, by all ranks: samples that are drawn once so many steps are made."""
        return self._turns.counts_before(steps)


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


class _Turns:
    """Which stream each step takes `taken` samples from: the one that most lags its share."""

    def __init__(self, sizes: list[int], drawn: list[int], taken: int) -> None:
        self.sizes, self.drawn, self.taken = sizes, drawn, taken
        self._restart()

    def at(self, step: int) -> tuple[int, int]:
        """(stream, samples that were drawn from it before)."""
        if step < self._step - 1:
            self._restart()
        while self._step <= step:
            # In whole numbers, times all samples: shares would round.
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
        if step < self._step:
            self._restart()
        if step:
            self.at(step - 1)
        return [*self._counts]

    def _restart(self) -> None:
        self._counts, self._step, self._last = [*self.drawn], 0, 0
