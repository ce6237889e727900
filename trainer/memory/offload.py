"""Activation offloading: tensors wait for their backward in host memory; copies overlap compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

PAGE = 2**24  # bytes: copies reach full speed, and a tensor's last page wastes 8 MiB on average
SLAB = 64  # pages per allocation

Pieces = Iterable[tuple[Tensor, Tensor]]  # (page, bytes of a tensor)


class Offload:
    """Moves the tensors that checkpointed blocks keep for backward to host memory, and back.

    When the forward of block i ends, block i - `keep` starts copying to the host; when the next
    forward ends, its device memory is released. So `keep` + 1 blocks are on the device. In
    backward, recomputing a block starts fetching the block before it. The host thread never waits;
    a late copy delays only the stream that needs it.

    Blocks are numbered in the order of their forwards, so several forwards may come before one
    backward. A block's memory is released when autograd drops its graph.

    device: where the model computes; on a CPU everything is copied the same way, one after another.
    keep: the last blocks, which stay on the device because their backward comes first.
    page: bytes of a page (None: PAGE); smaller tensors stay on the device.
    """

    def __init__(self, device: torch.device, *, keep: int = 1, page: int | None = None) -> None:
        gpu = device.type == "cuda"
        self.keep = keep
        self.pool = PagePool(page or PAGE, pinned=gpu)
        self.copies: Copies = StreamCopies(device) if gpu else PlainCopies()
        self._blocks: WeakValueDictionary[int, StoredBlock] = WeakValueDictionary()
        self._count = 0

    @contextmanager
    def block(self) -> Iterator[StoredBlock]:
        """Wrap the checkpointed forward of one block, and keep its inputs."""
        index, self._count = self._count, self._count + 1
        stored = self._blocks[index] = StoredBlock(self, index)
        with saved_tensors_hooks(stored.keep, _give_back):
            yield stored
        if (left := self._blocks.get(index - self.keep - 1)) is not None:
            left.release()
        if (leaving := self._blocks.get(index - self.keep)) is not None:
            leaving.send()

    def fetch(self, index: int) -> None:
        """Start copying a block back, and the one whose backward comes next."""
        for near in (index, index - 1):
            if (block := self._blocks.get(near)) is not None:
                block.fetch()


class StoredBlock:
    """Tensors that the backward of one block needs: on the device, in the pool, or in both."""

    def __init__(self, offload: Offload, index: int) -> None:
        self.offload, self.index = offload, index
        self.tensors: list[Tensor] = []  # on the device
        self.forms: list[tuple] = []  # shape, strides and dtype of each
        self.pages: list[list[Tensor]] = []
        self.away = False  # True if the tensors are in the pool only
        self.copied: Any = None  # an event at the end of the last copy

    def keep(self, x: Tensor) -> Callable[[], Tensor]:
        """Keep a tensor that autograd saves; return a function that brings it back."""
        x = x.detach()
        page = self.offload.pool.page
        if x.nbytes >= page:
            self.tensors.append(x)
            return partial(self._get, len(self.tensors) - 1)
        # A view of a small part, such as the text of a joint sequence, would hold the whole tensor.
        alone = x.clone() if x.untyped_storage().nbytes() >= page else x
        return alone.detach

    def _get(self, index: int) -> Tensor:
        self.offload.fetch(self.index)
        self.offload.copies.wait(self.copied)
        return self.tensors[index].detach()

    def send(self) -> None:
        """Start copying to the host; device memory is held until `release`."""
        self.tensors = [x if _is_dense(x) else x.clone() for x in self.tensors]  # clones are dense
        self.forms = [(x.shape, x.stride(), x.dtype) for x in self.tensors]
        self.pages = [self.offload.pool.take(x.nbytes) for x in self.tensors]
        self.copied = self.offload.copies.to_host(self._pieces())

    def release(self) -> None:
        """Free the device memory, to be reused by work that its stream does after the copy."""
        self.offload.copies.wait(self.copied)
        self.tensors, self.away = [], True

    def fetch(self) -> None:
        """Start copying back, unless the tensors are on the device."""
        if self.away:
            device = self.offload.copies.device
            self.tensors = [
                torch.empty_strided(shape, strides, dtype=dtype, device=device)
                for shape, strides, dtype in self.forms
            ]
            self.copied = self.offload.copies.to_device(self._pieces())
            self.away = False

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, pages in zip(self.tensors, self.pages, strict=True):
            memory = x.as_strided((x.numel(),), (1,)).view(torch.uint8)
            for page, piece in zip(pages, memory.split(len(pages[0])), strict=True):
                yield page[: len(piece)], piece

    def __del__(self) -> None:
        # Waiting here orders every later use of this memory after the copy, whether by a tensor on
        # the device or by a copy into these pages.
        self.offload.copies.wait(self.copied)
        for pages in self.pages:
            self.offload.pool.give_back(pages)


class PagePool:
    """Host memory in pages of equal size. The pool grows to its peak use, and is then reused.

    PyTorch's pinned allocator rounds each tensor up to a power of two, so the pool allocates powers
    of two: 1 GiB at a time for pages of 16 MiB.
    """

    def __init__(self, page: int, *, pinned: bool) -> None:
        self.page, self.pinned = page, pinned
        self.size = 0  # bytes
        self._free: list[Tensor] = []

    def take(self, size: int) -> list[Tensor]:
        """Take pages for `size` bytes. Raises MemoryError if the host has no more memory."""
        count = -(-size // self.page)
        while len(self._free) < count:
            self._grow()
        taken = self._free[-count:]
        del self._free[-count:]
        return taken

    def give_back(self, pages: list[Tensor]) -> None:
        """Return pages to the pool."""
        self._free += pages

    def _grow(self) -> None:
        size = SLAB * self.page
        try:
            slab = torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)
        except RuntimeError as error:
            raise MemoryError(
                f"memory.offload holds {self.size / 2**30:.1f} GiB of pinned host memory and could "
                f"not allocate more ({str(error).splitlines()[0]})"
            ) from error
        self._free += slab.split(self.page)
        self.size += size


class Copies(Protocol):
    """Copies tensors between `device` and the pool.

    A copy starts after all work queued on the current stream, and returns an event; `wait` delays
    that stream's later work until the event.
    """

    device: torch.device

    def to_host(self, pieces: Pieces) -> Any: ...

    def to_device(self, pieces: Pieces) -> Any: ...

    def wait(self, copied: Any) -> None: ...


class PlainCopies:
    """Copies at once, on a CPU."""

    device = torch.device("cpu")

    def to_host(self, pieces: Pieces) -> None:
        for page, piece in pieces:
            page.copy_(piece)

    def to_device(self, pieces: Pieces) -> None:
        for page, piece in pieces:
            piece.copy_(page)

    def wait(self, copied: None) -> None:
        pass


class StreamCopies:
    """Copies on a GPU, with a stream for each direction, so that both overlap the compute.

    Tensors are allocated and freed on the compute stream, which waits for a copy before it uses the
    copy's output or frees its input. `record_stream` would block reuse of memory until the host
    sees the copy end, and the host runs far ahead.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._outward, self._inward = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def to_host(self, pieces: Pieces) -> torch.cuda.Event:
        return self._copy(self._outward, pieces)

    def to_device(self, pieces: Pieces) -> torch.cuda.Event:
        return self._copy(self._inward, ((piece, page) for page, piece in pieces))

    def wait(self, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)

    def _copy(self, stream: torch.cuda.Stream, pairs: Pieces) -> torch.cuda.Event:
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(stream)
        return copied


def _is_dense(x: Tensor) -> bool:
    """Return whether a tensor fills its memory without gaps, in any order of its dimensions."""
    return x.permute(sorted(range(x.ndim), key=x.stride, reverse=True)).is_contiguous()


def _give_back(kept: Callable[[], Tensor]) -> Tensor:
    return kept()
