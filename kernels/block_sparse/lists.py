"""`Lists`: the form in which the kernels receive a layout."""

from typing import NamedTuple

from torch import Tensor


class Lists(NamedTuple):
    """Holds the pairs of blocks that attend, by row and by column, as int32 CSR on q's device.

    Shapes and meanings are those of the arguments of `block_sparse_attention`, in the same order.
    """

    row_indptr: Tensor
    row_indices: Tensor
    col_indptr: Tensor
    col_indices: Tensor
    head_to_layout: Tensor
    valid: Tensor | None
    block: int
