"""Block-sparse attention by PyTorch's FlexAttention, an independent implementation to compare with.

Compiled FlexAttention walks the block lists and calls `mask_mod` only inside partial blocks: those
that extend past `valid`, while all others are full. Eager FlexAttention reads only `mask_mod`,
which then has to repeat the lists.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, and_masks, flex_attention

from .cache import PerTensor
from .lists import Lists


def attention(q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float) -> tuple[Tensor, Tensor]:
    """Compute `block_sparse_attention`'s outputs, with FlexAttention's own autograd."""
    mask = _block_mask(
        lists.row_indices,
        lists.row_indptr,
        lists.head_to_layout,
        lists.valid,
        settings=(q.shape[1], lists.block),
    )
    attend = _compiled() if q.is_cuda else flex_attention
    out, aux = attend(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        block_mask=mask,
        scale=scale,
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None
    return out.transpose(1, 2).contiguous(), aux.lse


@cache
def _compiled():
    # fullgraph: past its limit of shapes torch.compile would fall back to the eager form, which
    # holds tokens x tokens scores; so it raises instead.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@PerTensor
def _block_mask(
    row_indices: Tensor,
    row_indptr: Tensor,
    head_to_layout: Tensor,
    valid: Tensor | None,
    tokens: int,
    block: int,
) -> BlockMask:
    """Build the BlockMask of the lists by way of dense block maps, all on the device."""
    layouts, rows = row_indptr.shape[0], row_indptr.shape[1] - 1
    device = row_indices.device
    row = torch.repeat_interleave(
        torch.arange(layouts * rows, device=device),
        row_indptr.diff().flatten(),
        output_size=len(row_indices),
    )
    kept = torch.zeros(layouts * rows, rows, dtype=torch.bool, device=device)
    kept[row, row_indices.long()] = True
    kept = kept.view(layouts, rows, rows)
    # [1 or B, 1 or H, rows, columns]; FlexAttention broadcasts dimensions of size 1.
    visit = kept[None] if layouts == 1 else kept[head_to_layout.long()][None]
    mask_mods = []
    if device.type == "cpu":
        mask_mods.append(lambda b, h, q, kv: kept[head_to_layout[h], q // block, kv // block])
    if valid is None:
        partial, full = torch.zeros_like(visit), visit
    else:
        starts = torch.arange(rows, device=device) * block
        end = valid[:, None, None, None]
        full = visit & (starts + block <= end)
        partial = visit & (starts < end) & ~full
        mask_mods.append(lambda b, h, q, kv: kv < valid[b])
    return BlockMask.from_kv_blocks(
        *_ordered(partial),
        *_ordered(full),
        BLOCK_SIZE=block,
        mask_mod=and_masks(*mask_mods),
        seq_lengths=(tokens, tokens),
    )


def _ordered(visit: Tensor) -> tuple[Tensor, Tensor]:
    """Return counts [..., rows] and indices [..., rows, columns], ascending kept columns first."""
    counts = visit.sum(-1, dtype=torch.int32)
    return counts, torch.argsort(visit.byte(), dim=-1, descending=True, stable=True).int()
