"""Sequence parallelism: processes that share the tokens of one clip.

As DeepSpeed Ulysses does it (Jacobs et al., 2023, arXiv 2309.14509): between attentions a process
has some of the video's tokens, inside each attention all tokens of some heads, and all-to-all
exchanges lead from one to the other. Text is short, so every process has all of it: only what
attention gives for it has to be collected, and that travels with the exchange back.

Gradients are exact, however uneven the parts, because each exchange is linear and its backward is
its adjoint. Each process computes the whole loss, from the whole prediction. So what backward
leaves in one process is its part of the gradient times `size`, and the mean over all processes,
which data parallelism takes anyway, is the mean over clips.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...sparse.attention import SparseAttention
from ...sparse.grid import TokenGrid
from ..config.schema import Parallel
from ..config.values import ConfigError
from ..families.base import ModelFamily


def check_sequence(
    sequence: int, heads: int, processes: int | None = None, name: str = "parallel.sequence"
) -> None:
    """Raise ConfigError unless `sequence` processes can share a clip.

    processes: of the run; None if unknown. name: the setting to name in the error.
    """
    counts = range(1, heads + 1)
    allowed = [n for n in counts if heads % n == 0 and (processes is None or processes % n == 0)]
    if sequence not in allowed:
        both = "" if processes is None else f" and the number of processes, {processes}"
        raise ConfigError(
            f"{name}={sequence} must divide the model's {heads} heads{both}; what does: "
            f"{', '.join(map(str, allowed))}."
        )


def join_all(heads: int, device: str | None = None) -> tuple[SequenceGroup, str | None]:
    """Return all launched processes as one group, and this one's device: for sampling, for example.

    heads: of the model. device: as asked for. One process alone keeps it, of several each has a GPU
    of its own or, with "cpu", none. Raises ConfigError for another, and for a number of processes
    that does not divide the heads.
    """
    from accelerate import PartialState

    timeout = timedelta(minutes=Parallel.timeout)
    # Left to itself, accelerate takes processes that find no GPU for one alone each.
    cpu = device == "cpu" or not torch.cuda.is_available()
    state = PartialState(cpu=cpu, timeout=timeout)
    processes = state.num_processes
    if processes == 1:
        return SequenceGroup(), device
    if device not in (None, "cpu", "cuda"):
        raise ConfigError(
            f"device={device} is one device, but each of {processes} processes has its own: leave "
            "the setting out."
        )
    check_sequence(processes, heads, name="--num_processes")
    return SequenceGroup.create(processes, heads, timeout), str(state.device)


def any_process(device: torch.device, *choices: bool) -> list[bool]:
    """Return, for each choice, whether it is true in any process; the same in all processes."""
    if not dist.is_initialized():
        return list(choices)
    agreed = torch.tensor(choices, dtype=torch.int32, device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return [bool(choice) for choice in agreed.tolist()]


@dataclass(frozen=True, eq=False)
class SequenceGroup:
    """The processes that share a clip, which are neighbours, and this one's place.

    size, rank: of the group. data_size, data_rank: of the groups, each with clips of its own; what
    is random about a clip depends on these alone. Also the `Exchange` of `SparseAttention`.
    """

    size: int = 1
    rank: int = 0
    data_size: int = 1
    data_rank: int = 0
    group: dist.ProcessGroup | None = None

    @classmethod
    def create(cls, size: int, heads: int, timeout: timedelta | None = None) -> SequenceGroup:
        """Return the group of this process; all processes of the run must call it.

        timeout: of its exchanges. Raises ConfigError for a size that does not divide the model's
        heads and the number of processes.
        """
        running = dist.is_initialized()
        process, processes = (dist.get_rank(), dist.get_world_size()) if running else (0, 1)
        check_sequence(size, heads, processes)
        group: Any = dist.new_subgroups(size, timeout=timeout)[0] if size > 1 else None
        data_rank, rank = divmod(process, size)
        return cls(size, rank, processes // size, data_rank, group)

    def attach(self, family: ModelFamily, transformer: Any, attention: SparseAttention) -> None:
        """Let each process compute its part of the tokens; the prediction is whole in all of them.

        Call it after everything that replaces modules: LoRA, RoPE, processors.
        """
        if self.size == 1:
            return
        attention.exchange = self

        def tokens() -> int:
            assert attention.current is not None
            return attention.current.grid.video

        # Copies: a view would hold the tensor of the whole clip until the end of backward.

        def cut(module: Any, args: Any, embedded: Tensor) -> Tensor:
            return family.split.cut(embedded, self.part(tokens()), tokens()).clone()

        def cut_tables(module: Any, args: Any, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            part = self.part(tokens())
            where = (family.split.rope_dim, part.start, part.stop - part.start)
            return tuple(table.narrow(*where).clone() for table in tables)

        def collect(module: Any, args: Any, predicted: Tensor) -> Tensor:
            return self.gather(predicted, tokens())

        getattr(transformer, family.split.embedder).register_forward_hook(cut)
        transformer.rope.register_forward_hook(cut_tables)
        transformer.proj_out.register_forward_hook(collect)

    # Tokens and heads of each process

    def counts(self, tokens: int) -> list[int]:
        """Return the number of video tokens of each process, as even as possible."""
        return [tokens // self.size + (rank < tokens % self.size) for rank in range(self.size)]

    def part(self, tokens: int) -> slice:
        """Return the slice of video tokens that this process holds."""
        counts = self.counts(tokens)
        start = sum(counts[: self.rank])
        return slice(start, start + counts[self.rank])

    def own_heads(self, heads: int) -> slice:
        """Return the slice of heads that this process computes inside attention."""
        each = heads // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    # Exchanges; a buffer has tokens first, so that what one process sends or receives lies together

    def to_heads(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """Exchange `[B, own tokens, H, D]`, text last, for `[B, len(grid), H / size, D]`."""
        counts = self.counts(grid.video)
        video, text = x.split([counts[self.rank], grid.text], dim=1)
        by_process = video.unflatten(2, (self.size, -1)).permute(2, 1, 0, 3, 4).flatten(0, 1)
        whole = self._exchange(by_process, [counts[self.rank]] * self.size, counts)
        if grid.text:
            own = text[:, :, self.own_heads(x.shape[2])]
            whole = torch.cat([whole, own.transpose(0, 1)])
        return whole.transpose(0, 1)

    def to_tokens(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """Exchange `[B, len(grid), H / size, D]` for `[B, own tokens, H, D]`, text last.

        Each process receives its tokens and the text.
        """
        counts = self.counts(grid.video)
        *videos, text = x.transpose(0, 1).split([*counts, grid.text])
        by_process = torch.cat([piece for video in videos for piece in (video, text)])
        sent = [count + grid.text for count in counts]
        got = self._exchange(by_process, sent, [sent[self.rank]] * self.size)
        return got.unflatten(0, (self.size, -1)).permute(2, 1, 0, 3, 4).flatten(2, 3)

    def gather(self, x: Tensor, tokens: int) -> Tensor:
        """Gather `[B, own tokens, C]` into `[B, tokens, C]`."""
        counts = self.counts(tokens)
        copies = torch.cat([x.transpose(0, 1)] * self.size)
        return self._exchange(copies, [x.shape[1]] * self.size, counts).transpose(0, 1)

    def collect(self, part: Tensor) -> Tensor:
        """Return the parts of all processes, `[size, *part.shape]` by rank, without gradients."""
        whole = part.new_empty(self.size, *part.shape)
        dist.all_gather_into_tensor(whole.flatten(0, 1), part.contiguous(), group=self.group)
        return whole

    def _exchange(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        result: Any = _AllToAll.apply(x, self.group, sent, received)
        return result


class _AllToAll(torch.autograd.Function):
    """Sends rows of `x` to the processes of a group; the adjoint sends them back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: dist.ProcessGroup, sent: list[int], received: list[int]
    ) -> Tensor:
        ctx.group, ctx.sizes = group, (sent, received)
        return _all_to_all(x, group, sent, received)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore
        sent, received = ctx.sizes
        return _all_to_all(grad, ctx.group, received, sent), None, None, None


def _all_to_all(
    x: Tensor, group: dist.ProcessGroup, sent: list[int], received: list[int]
) -> Tensor:
    result = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(result, x.contiguous(), received, sent, group=group)
    return result
