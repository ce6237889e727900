"""Tensors that wait for their backward in host memory, copied there and back beside the compute."""

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
SLAB = 64  # pages allocated together

Pieces = Iterable[tuple[Tensor, Tensor]]  # (page, bytes of a tensor)


class Offload:
    """Moves what checkpointed blocks keep for backward to host memory, and back in time.

    When a block's forward ends, the tensors of the block `keep` before it set out for the host, and
    when the next one ends the device's memory is free again: `keep` + 1 blocks are on the device.
    In backward, a block's recomputation begins with fetching the block before it. The host never
    waits; a copy that is late delays the stream that needs it.

    Blocks are told apart by the order of their forwards, so several forwards may come before one
    backward. A block's memory is given back when autograd drops its graph.

    device: where the model computes; on a CPU everything is copied the same way, in turns.
    keep: blocks that stay on the device, those whose backward comes first.
    page: bytes of a page (None: PAGE); smaller tensors stay on the device.
    """

    def __init__(self, device: torch.device, *, keep: int = 1, page: int | None = None) -> None:
        gpu = device.type == "cuda"
        self.keep = keep
        self.arena = Arena(page or PAGE, pinned=gpu)
        self.copies: Copies = StreamCopies(device) if gpu else PlainCopies()
        self._blocks: WeakValueDictionary[int, StoredBlock] = WeakValueDictionary()
        self._count = 0

    @contextmanager
    def block(self) -> Iterator[StoredBlock]:
        """Around the checkpointed forward of one block, whose inputs it keeps."""
        index, self._count = self._count, self._count + 1
        stored = self._blocks[index] = StoredBlock(self, index)
        with saved_tensors_hooks(stored.keep, _give_back):
            yield stored
        if (left := self._blocks.get(index - self.keep - 1)) is not None:
            left.release()
        if (leaving := self._blocks.get(index - self.keep)) is not None:
            leaving.send()

    def fetch(self, index: int) -> None:
        """Begin to copy a block back, and the one whose backward comes after its own."""
        for near in (index, index - 1):
            if (block := self._blocks.get(near)) is not None:
                block.fetch()


class StoredBlock:
    """What the backward of one block needs: on the device, in the arena, or in both."""

    def __init__(self, offload: Offload, index: int) -> None:
        self.offload, self.index = offload, index
        self.tensors: list[Tensor] = []  # on the device
        self.forms: list[tuple] = []  # shape, strides and dtype of each
        self.pages: list[list[Tensor]] = []
        self.away = False  # in the arena alone
        self.copied: Any = None  # when the last copy ends

    def keep(self, x: Tensor) -> Callable[[], Tensor]:
        """Take a tensor that autograd saves; gives what brings it back, on its device."""
        x = x.detach()
        page = self.offload.arena.page
        if x.nbytes >= page:
            self.tensors.append(x)
            return partial(self._get, len(self.tensors) - 1)
        # A small part of a large tensor, such as the text of a joint sequence, would hold it all.
        alone = x.clone() if x.untyped_storage().nbytes() >= page else x
        return alone.detach

    def _get(self, index: int) -> Tensor:
        self.offload.fetch(self.index)
        self.offload.copies.wait(self.copied)
        return self.tensors[index].detach()

    def send(self) -> None:
        """Begin to copy to the host; the device's memory stays taken until `release`."""
        self.tensors = [x if _is_dense(x) else x.clone() for x in self.tensors]  # which is dense
        self.forms = [(x.shape, x.stride(), x.dtype) for x in self.tensors]
        self.pages = [self.offload.arena.take(x.nbytes) for x in self.tensors]
        self.copied = self.offload.copies.to_host(self._pieces())

    def release(self) -> None:
        """Free the device's memory, for whatever its stream computes after the copy."""
        self.offload.copies.wait(self.copied)
        self.tensors, self.away = [], True

    def fetch(self) -> None:
        """Begin to copy back, unless the tensors are on the device."""
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
        # What takes this memory next is ordered after the stream that waits here, be it a tensor on
        # the device or a copy into these pages.
        self.offload.copies.wait(self.copied)
        for pages in self.pages:
            self.offload.arena.give(pages)


class Arena:
    """Host memory in pages of equal size, which grows to what was once needed and is then reused.

    PyTorch's allocator of pinned memory rounds each tensor up to a power of two, so it is asked for
    whole powers of two: 1 GiB at a time for pages of 16 MiB.
    """

    def __init__(self, page: int, *, pinned: bool) -> None:
        self.page, self.pinned = page, pinned
        self.size = 0  # bytes
        self._free: list[Tensor] = []

    def take(self, size: int) -> list[Tensor]:
        """Pages for so many bytes. Raises MemoryError when the host has no more."""
        count = -(-size // self.page)
        while len(self._free) < count:
            self._grow()
        taken = self._free[-count:]
        del self._free[-count:]
        return taken

    def give(self, pages: list[Tensor]) -> None:
        """Take pages back."""
        self._free += pages

    def _grow(self) -> None:
        size = SLAB * self.page
        try:
            slab = torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)
        except RuntimeError as error:
            raise MemoryError(
                f"memory.offload holds {self.size / 2**30:.1f} GiB of pinned host memory and was "
                f"given no more ({str(error).splitlines()[0]})"
            ) from error
        self._free += slab.split(self.page)
        self.size += size


class Copies(Protocol):
    """How tensors travel between `device` and the arena.

    Each call copies after all that the current stream was given before it, and returns what `wait`
    makes that stream's later work come after.
    """

    device: torch.device

    def to_host(self, pieces: Pieces) -> Any: ...

    def to_device(self, pieces: Pieces) -> Any: ...

    def wait(self, copied: Any) -> None: ...


class PlainCopies:
    """On a CPU: at once."""

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
    """On a GPU: each way on a stream of its own, so that both run beside the compute.

    Tensors are allocated and freed on the compute stream, which waits for a copy before it may use
    what the copy wrote or free what it read. `record_stream` would keep memory from reuse until the
    host sees the copy end, and the host runs far ahead.
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
    """Whether a tensor fills its memory without gaps, in whatever order of the dimensions."""
    return x.permute(sorted(range(x.ndim), key=x.stride, reverse=True)).is_contiguous()


def _give_back(kept: Callable[[], Tensor]) -> Tensor:
    return kept()
