"""Read batches from the cache ahead of the steps that use them."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from .dataset import LatentDataset, collate
from .sampler import SeededBatches


class Loader:
    """Iterates over batches of `dataset` in the sampler's order, endlessly.

    workers: threads that read one batch each; 0 reads a batch when it is requested. Threads suffice
    because reading a file releases the GIL, and unlike processes they need no shared memory, of
    which containers often have only 64 MB. At most `workers` + 1 batches exist, including the one
    in use. A read error is raised in place of its batch.
    """

    def __init__(self, dataset: LatentDataset, sampler: SeededBatches, workers: int) -> None:
        self.dataset, self.sampler, self.workers = dataset, sampler, workers

    def __iter__(self) -> Generator[dict[str, Any], None, None]:
        if not self.workers:
            for indices in self.sampler:
                yield self._read(indices)
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="cache-reader")
        order = iter(self.sampler)
        waiting: deque[Future[dict[str, Any]]] = deque()
        try:
            for _ in range(self.workers):
                waiting.append(pool.submit(self._read, next(order)))
            while True:
                batch = waiting.popleft().result()
                waiting.append(pool.submit(self._read, next(order)))
                yield batch
                del batch
        finally:
            for future in waiting:
                future.cancel()
            pool.shutdown(wait=True)

    def _read(self, indices: list[int]) -> dict[str, Any]:
        return collate([self.dataset[index] for index in indices])
