"""The frozen base in float8: e4m3 weights with a scale for each output channel.

Forward products are float8 x float8 with activations quantised as they come, a scale for each
token; on a CPU the same numbers are multiplied in fp32, for tests. Backward, the gradient of the
input is a bf16 product with the weight turned back for the moment: e5m2 gradients would keep two
bits of mantissa, and a scale for each output channel lies along that product's sum, where no
float8 product takes one. The frozen weight itself has no gradient.

What is quantised are the products over all tokens inside of the blocks, named by each family.
Modulation steers every token by a few numbers, the first and last projections are the latents
themselves, and embeddings and norms cost next to nothing.

Why not torchao: its float8 linear with dynamic activations has no backward pass (0.18), its
weight-only one computes in bf16, and its training layers keep the weights in bf16.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.values import ConfigError

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
LEAST_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0
MULTIPLE = 16  # of both features, which a GPU's product asks for and every published model has


class Float8Linear(nn.Linear):
    """A frozen linear layer; PEFT wraps it as any other.

    weight: `[out, in]` e4m3, kept as bytes (uint8), so that neither a cast of the whole model nor a
    library that looks for its dtype takes it for floats. scale: `[out, 1]` fp32.
    """

    scale: nn.Parameter

    def __init__(self, linear: nn.Linear, device: torch.device | None = None) -> None:
        """Quantise `linear`, on `device` if it is given."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantise(linear.weight.detach().to(device))
        self.weight = nn.Parameter(weight.view(torch.uint8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias.detach().to(device), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return _Product.apply(input, self.weight, self.scale, self.bias)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight `[out, in]`; exact in bf16 and wider."""
        return _dequantised(self.weight, self.scale, dtype)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values and fp32 scales `[..., 1]` with `x`, bf16 or wider, near values * scale by rows.

    Scales are powers of two, as in torchao's row-wise recipe: scaling is exact, both ways. Rounding
    then is the only error, at most 2^-4 of an element unless it is 2^13 times smaller than its
    row's largest.
    """
    largest = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True)
    largest = largest.float().clamp(min=1e-12)
    # Up to the next power of two, on the bits of fp32: log2 and exp2 of a GPU are not exact.
    bits = (largest / LARGEST).view(torch.int32)
    scale = ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return (x / scale.to(x.dtype)).to(E4M3), scale


def quantise_layers(
    transformer: nn.Module, layers: str, device: torch.device | None = None
) -> tuple[int, int]:
    """Replace the linear layers whose whole names the regex matches, one by one, by float8 ones.

    They are left on `device`, if it is given. A layer of odd sizes stays as it is. Returns how many
    weights were quantised, and how many parameters the transformer has.
    """
    parameters = sum(p.numel() for p in transformer.parameters())
    names = [name for name, _ in transformer.named_modules() if re.fullmatch(layers, name)]
    quantised = 0
    for name in names:
        module = transformer.get_submodule(name)
        if not isinstance(module, nn.Linear):
            continue
        if module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0:
            transformer.set_submodule(name, Float8Linear(module, device))
            quantised += module.weight.numel()
    return quantised, parameters


def is_supported(device: torch.device) -> bool:
    """False for a GPU that cannot multiply in float8; a CPU computes what a GPU would."""
    if device.type != "cuda":
        return True
    nvidia = torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def check_device(device: torch.device) -> None:
    """Raise ConfigError for a GPU that cannot multiply in float8."""
    if not is_supported(device):
        capability = torch.cuda.get_device_capability(device)
        raise ConfigError(
            "memory.base_dtype=float8 needs an NVIDIA GPU of compute capability 8.9 (Ada) or "
            f"newer, and {torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}: "
            "use memory.base_dtype=bfloat16."
        )


class _Product(torch.autograd.Function):
    """`x @ weight.T + bias` in float8, differentiable once in x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        rows, row_scale = quantise(x.reshape(-1, x.shape[-1]))
        if x.device.type == "cpu":
            wide = _dequantised(weight, scale, torch.float32)
            out = F.linear(rows.float() * row_scale, wide, None if bias is None else bias.float())
        else:
            out = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
                rows,
                weight.view(E4M3).t(),
                scale_a=row_scale,
                scale_b=scale.t(),
                bias=bias,
                out_dtype=torch.bfloat16,
                # Hopper's fast sum keeps 14 bits over thousands of channels.
                use_fast_accum=False,
            )
        return out.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        weight, scale = ctx.saved_tensors
        return grad @ _dequantised(weight, scale, grad.dtype), None, None, None


def _dequantised(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.view(E4M3).to(dtype) * scale.to(dtype)
