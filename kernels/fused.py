"""What the fused operators, `norm_rope` and `modulated_norm`, share: which backend computes."""

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from .block_sparse.op import check_triton

Backend = Literal["auto", "triton", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def resolve(backend: str, x: Tensor, constants: Mapping[str, Tensor | None]) -> str:
    """The backend that computes; "auto" is "triton" where that gives all that is asked of it.

    constants: by name, the tensors of which the kernels have no gradient. Raises ValueError for
    "triton" where it cannot compute, or one of these is to have a gradient.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    trained = [name for name, c in constants.items() if c is not None and c.requires_grad]
    trained = trained if torch.is_grad_enabled() else []
    if backend == "auto":
        ours = x.is_cuda and torch.version.hip is None and x.dtype in DTYPES and not trained
        return "triton" if ours else "reference"
    if backend == "triton":
        check_triton(x.device)
        if x.dtype not in DTYPES:
            raise ValueError(f"the triton backend does not compute in {x.dtype}; use 'reference'")
        if trained:
            raise ValueError(
                f"the triton backend has no gradient of {trained[0]}; freeze it, or use "
                "backend='reference'"
            )
    return backend


def dense(x: Tensor) -> Tensor:
    """Contiguous in its last dimension, which the gradient of a sum is not: it arrives expanded."""
    return x if x.stride(-1) == 1 else x.contiguous()
