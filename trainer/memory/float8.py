"""The frozen base in float8: e4m3 weights with a scale for each output channel.

Forward products are float8 x float8, with activations quantised dynamically, a scale per token. On
a CPU the same numbers are multiplied in fp32, for tests. In backward, the gradient of the input is
a bf16 product with the weight dequantised for that moment: e5m2 gradients would keep two bits of
mantissa, and a scale per output channel lies along that product's sum, where float8 products take
none. The frozen weight itself has no gradient.

Only linear layers of the blocks that see all tokens are quantised; each family names them.
Modulation steers every token by a few numbers, the first and last projections carry the latents
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
MULTIPLE = 16  # both features must be one: GPUs require it, and all published models comply


class Float8Linear(nn.Linear):
    """A frozen linear layer with float8 weights; PEFT wraps it like any other.

    weight: `[out, in]` e4m3, stored as bytes (uint8), so that neither a cast of the whole model nor
    a library that reads its dtype takes it for floats. scale: `[out, 1]` fp32.
    """

    scale: nn.Parameter

    def __init__(self, linear: nn.Linear, device: torch.device | None = None) -> None:
        """Quantise `linear`, on `device` if given."""
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
        """Return the weight `[out, in]`; bf16 and wider dtypes are exact."""
        return _dequantised(self.weight, self.scale, dtype)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return e4m3 values and fp32 scales `[..., 1]` by rows, with `x` close to values * scale.

    x: bf16 or wider. Scales are powers of two, as in torchao's row-wise recipe, so scaling is exact
    both ways. Rounding is the only error: at most 2^-4 of an element, unless the element is 2^13
    times smaller than its row's largest.
    """
    largest = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True)
    largest = largest.float().clamp(min=1e-12)
    # Round up to a power of two on the bits of fp32: log2 and exp2 are not exact on GPUs.
    bits = (largest / LARGEST).view(torch.int32)
    scale = ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return (x / scale.to(x.dtype)).to(E4M3), scale


def quantise_layers(
    transformer: nn.Module, layers: str, device: torch.device | None = None
) -> tuple[int, int]:
    """Replace the linear layers whose whole names match the regex, one by one, by float8 ones.

    The new layers are on `device`, if given. A layer whose sizes are no multiples of 16 stays as it
    is. Returns the number of quantised weights, and of all parameters of the transformer.
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
    """Return False for a GPU without float8 products; a CPU computes what a GPU would."""
    if device.type != "cuda":
        return True
    nvidia = torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def check_device(device: torch.device) -> None:
    """Raise ConfigError for a GPU without float8 products."""
    if not is_supported(device):
        capability = torch.cuda.get_device_capability(device)
        raise ConfigError(
            "memory.base_dtype=float8 needs an NVIDIA GPU of compute capability 8.9 (Ada) or "
            f"newer, and {torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}: "
            "use memory.base_dtype=bfloat16."
        )


class _Product(torch.autograd.Function):
    """Computes `x @ weight.T + bias` in float8; differentiable once, in x."""

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
                # Hopper's fast accumulation keeps 14 bits, over thousands of channels.
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
