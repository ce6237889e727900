"""What the kernels are told of a layout."""

from typing import NamedTuple

from torch import Tensor


class Lists(NamedTuple):
    """Which blocks attend to which, in both orders, as compressed sparse rows; int32 on q's device.

    Shapes and meanings are those of `block_sparse_attention`'s arguments, which come in this order.
    """

    row_indptr: Tensor
    row_indices: Tensor
    col_indptr: Tensor
    col_indices: Tensor
    head_to_layout: Tensor
    valid: Tensor | None
    block: int
