"""Eager block-sparse attention: the oracle of the kernels, and the backend of CPUs.

Block rows are processed in groups of similar length. Each group gathers the key blocks that its
rows list, padded to the longest row, and scores them in one batched matrix product, so memory grows
with the lists and not with tokens x tokens. Statistics are fp32 (fp64 for fp64 inputs).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .lists import Lists

# Scores held at once, in elements (32 MiB in fp32), unless one block row needs more.
SCORE_BUDGET = 1 << 23


class Group(NamedTuple):
    """Block rows of one layout that are processed together."""

    heads: Tensor  # [h] heads that use the layout
    rows: Tensor  # [r] block rows
    blocks: Tensor  # [r, w] the key blocks they list, padded with 0
    listed: Tensor  # [r, w] bool, False on the padding


def _groups(lists: Lists, batch: int) -> Iterator[Group]:
    """Yield all (head, block row) pairs in groups within `SCORE_BUDGET`."""
    indices, block = lists.row_indices, lists.block
    device = indices.device
    for layout in lists.head_to_layout.unique().tolist():
        heads = (lists.head_to_layout == layout).nonzero().flatten()
        starts = lists.row_indptr[layout].long()
        counts = starts.diff()
        order = counts.argsort(descending=True)
        lengths = counts[order].clamp(min=1).tolist()
        done = 0
        while done < len(lengths):
            width = lengths[done]
            one_row = batch * len(heads) * width * block * block
            rows = order[done : done + max(1, SCORE_BUDGET // one_row)]
            done += len(rows)
            entry = torch.arange(width, device=device)
            listed = entry < counts[rows, None]
            place = torch.where(listed, starts[rows, None] + entry, 0)
            blocks = indices[place].long() if len(indices) else torch.zeros_like(place)
            yield Group(heads, rows, torch.where(listed, blocks, 0), listed)


def _blocked(x: Tensor, block: int, end: Tensor | None = None) -> Tensor:
    """Turn [B, S, H, D] into [B, H, blocks, block, D] in the compute dtype, zero from `end` [B] on.

    Masking scores is not enough: 0 * NaN would let a masked key's contents through.
    """
    batch, tokens, heads, head_dim = x.shape
    x = x.double() if x.dtype == torch.float64 else x.float()
    if end is not None:
        past = torch.arange(tokens, device=x.device) >= end[:, None]
        x = x.masked_fill(past[:, :, None, None], 0)
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -tokens % block))
    return x.view(batch, -1, block, heads, head_dim).permute(0, 3, 1, 2, 4)


def _unblocked(x: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """Invert `_blocked`; the result is contiguous."""
    return x.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :tokens].to(dtype).contiguous()


def _keys_end(q: Tensor, valid: Tensor | None) -> Tensor:
    """Return [B], one past the last key of each sample that is not masked."""
    if valid is None:
        return torch.full((len(q),), q.shape[1], device=q.device)
    return valid.long().clamp(max=q.shape[1])


def _gather(x: Tensor, heads: Tensor, blocks: Tensor) -> Tensor:
    """Gather the listed blocks: [B, H, blocks, block, D] to [B, h, r, w * block, D]."""
    return x[:, heads[:, None, None], blocks].flatten(3, 4)


def _scores(q: Tensor, k: Tensor, group: Group, end: Tensor, scale: float) -> Tensor:
    """Return scaled logits [B, h, r, block, w * block], -inf where a key is masked."""
    block = q.shape[3]
    position = group.blocks[..., None] * block + torch.arange(block, device=q.device)
    counts = group.listed[..., None] & (position < end[:, None, None, None])  # [B, r, w, block]
    counts = counts.flatten(2)[:, None, :, None]
    rows = q[:, group.heads[:, None], group.rows]
    scores = rows @ _gather(k, group.heads, group.blocks).mT * scale
    return scores.masked_fill(~counts, float("-inf"))


def _finite(lse: Tensor) -> Tensor:
    """Replace -inf by 0 for rows that see no key; their scores are -inf, so any finite value will
    do."""
    return lse.masked_fill(lse == float("-inf"), 0)


def forward(q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float) -> tuple[Tensor, Tensor]:
    """Compute `block_sparse_attention`'s outputs; lse is fp64 for fp64 inputs."""
    tokens = q.shape[1]
    end, block = _keys_end(q, lists.valid), lists.block
    queries, keys, values = _blocked(q, block), _blocked(k, block, end), _blocked(v, block, end)
    out = torch.empty_like(queries)
    lse = queries.new_empty(queries.shape[:4])
    for group in _groups(lists, len(q)):
        scores = _scores(queries, keys, group, end, scale)
        place = (slice(None), group.heads[:, None], group.rows)
        lse[place] = group_lse = scores.logsumexp(-1)
        p = (scores - _finite(group_lse)[..., None]).exp()
        out[place] = p @ _gather(values, group.heads, group.blocks)
    return _unblocked(out, tokens, q.dtype), lse.flatten(2)[..., :tokens].contiguous()


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: Lists,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dq, dk, dv from the saved out and lse: ds = p * (dp - rowsum(out * dout) + dlse)."""
    tokens = q.shape[1]
    end, block = _keys_end(q, lists.valid), lists.block
    queries, keys, values = _blocked(q, block), _blocked(k, block, end), _blocked(v, block, end)
    grads = _blocked(grad_out, block)
    delta = (_blocked(out, block) * grads).sum(-1)
    pad = (0, -tokens % block)
    if grad_lse is not None:
        grad_lse = torch.nn.functional.pad(grad_lse.masked_fill(lse == float("-inf"), 0), pad)
        delta = delta - grad_lse.view_as(delta)
    lse = _finite(torch.nn.functional.pad(lse, pad)).view_as(delta)
    dq = torch.empty_like(queries)
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    for group in _groups(lists, len(q)):
        heads, rows, blocks, _ = group
        place = (slice(None), heads[:, None], rows)
        p = (_scores(queries, keys, group, end, scale) - lse[place][..., None]).exp()
        dp = grads[place] @ _gather(values, heads, blocks).mT
        ds = p * (dp - delta[place][..., None])
        dq[place] = ds @ _gather(keys, heads, blocks) * scale
        for total, share in (
            (dv, p.mT @ grads[place]),
            (dk, ds.mT @ queries[place] * scale),
        ):
            share = share.unflatten(3, (-1, block))  # [B, h, r, w, block, D]
            for i, head in enumerate(heads.tolist()):
                total[:, head].index_add_(1, blocks.flatten(), share[:, i].flatten(1, 2))
    dq, dk, dv = (_unblocked(x, tokens, q.dtype) for x in (dq, dk, dv))
    return dq, dk, dv
