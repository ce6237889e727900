"""Which samples make which batch: a function of the seed and the step, with no state to save."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class SeededBatches(Sampler[list[int]]):
    """Endless batches of sample indices for `DataLoader(batch_sampler=...)`.

    The samples form one endless stream, epoch after epoch, each a permutation of its own. Step k
    takes the next `num_ranks * batch` of them and rank r the r-th `batch` of those; a batch that
    reaches the end of an epoch goes on in the next, so every sample is seen equally often and all
    batches are full. Step 0 begins after the first `drawn` samples of the stream: a run that goes
    on sees what the uninterrupted one would have seen, and one that goes on with another number of
    ranks the samples that come next.
    """

    def __init__(
        self,
        num_samples: int,
        batch: int,
        seed: int,
        *,
        drawn: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        if num_samples < 1:
            raise ValueError("there is no sample to draw batches from")
        if batch < 1:
            raise ValueError(f"a batch of {batch} samples is not possible: give 1 or more")
        if seed < 0:
            raise ValueError(f"seed is {seed}: it must not be negative")
        if drawn < 0 or not 0 <= rank < num_ranks:
            raise ValueError(f"no such place: after {drawn}, rank {rank} of {num_ranks}")
        self.num_samples, self.batch, self.seed = num_samples, batch, seed
        self.drawn, self.rank, self.num_ranks = drawn, rank, num_ranks
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __iter__(self) -> Iterator[list[int]]:
        step = 0
        while True:
            yield self.batch_at(step)
            step += 1

    def batch_at(self, step: int) -> list[int]:
        """This rank's indices at `step`."""
        first = self.drawn + (step * self.num_ranks + self.rank) * self.batch
        return [self._sample(position) for position in range(first, first + self.batch)]

    def _sample(self, position: int) -> int:
        epoch, index = divmod(position, self.num_samples)
        if epoch != self._epoch:
            self._order = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)
            self._epoch = epoch
        return int(self._order[index])
