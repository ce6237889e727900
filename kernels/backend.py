"""The choice of backend that all operators share, and what the Triton backend needs."""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

# The backends of the fused operators, `norm_rope` and `modulated_norm`; block_sparse has more.
FusedBackend = Literal["auto", "triton", "reference"]
FUSED_BACKENDS: tuple[str, ...] = get_args(FusedBackend)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CAPABILITY = (8, 0)  # Ampere, the oldest GPU that the Triton kernels run on


def check_name(backend: str, known: Sequence[str]) -> None:
    """Raise ValueError unless `backend` is one of the `known` names."""
    if backend not in known:
        raise ValueError(f"backend {backend!r} is unknown; choose one of {', '.join(known)}")


def check_dtype(backend: str, dtype: torch.dtype) -> None:
    """Raise ValueError unless the kernels of `backend` compute in `dtype`."""
    if dtype not in DTYPES:
        raise ValueError(
            f"the {backend} backend does not compute in {dtype}; use bfloat16, float16 or float32, "
            "or backend='reference'"
        )


def check_triton(device: torch.device) -> None:
    """Raise ValueError unless Triton is installed and can compile for `device`.

    A CPU will do when Triton's interpreter is on (TRITON_INTERPRET=1).
    """
    try:
        from triton import knobs
    except ImportError as error:
        raise ValueError(
            "the triton backend needs the triton package (pip install 'triton>=3.6'); "
            "on a CPU use backend='reference'"
        ) from error
    if device.type == "cpu" and knobs.runtime.interpret:
        return
    if device.type != "cuda" or torch.version.hip is not None:
        kind = "AMD GPU" if torch.version.hip is not None else device.type
        raise ValueError(
            f"the triton backend needs an NVIDIA GPU, and the tensors are on: {kind}; use "
            "backend='reference'"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        raise ValueError(
            "the triton backend needs compute capability 8.0 (Ampere) or newer, and this GPU has "
            f"{capability[0]}.{capability[1]}; use backend='reference'"
        )


def resolve_fused(backend: str, x: Tensor, constants: Mapping[str, Tensor | None]) -> str:
    """Return the backend, "triton" or "reference", in which a fused operator computes.

    "auto" is "triton" on NVIDIA GPUs for the dtypes it has, unless one of the constants needs a
    gradient.

    Args:
        x: the operator's main input.
        constants: by name, the tensors for which the Triton kernels have no gradient.

    Raises:
        ValueError: if `backend` is unknown, or is "triton" where Triton cannot compute or a
            constant needs a gradient.
    """
    check_name(backend, FUSED_BACKENDS)
    trained = [name for name, c in constants.items() if c is not None and c.requires_grad]
    trained = trained if torch.is_grad_enabled() else []
    if backend == "auto":
        ours = x.is_cuda and torch.version.hip is None and x.dtype in DTYPES and not trained
        return "triton" if ours else "reference"
    if backend == "triton":
        check_triton(x.device)
        check_dtype(backend, x.dtype)
        if trained:
            raise ValueError(
                f"the triton backend has no gradient of {trained[0]}; freeze it, or use "
                "backend='reference'"
            )
    return backend


def contiguous_rows(x: Tensor) -> Tensor:
    """Return `x`, copied if its last dimension is not contiguous.

    The gradient of a sum arrives expanded, with stride 0, which the kernels cannot read.
    """
    return x if x.stride(-1) == 1 else x.contiguous()
