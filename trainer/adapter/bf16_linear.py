"""LoRA layers whose products are bf16: parameters, their gradients and the sums stay fp32.

PEFT hands an fp32 adapter its input in fp32 and gets an fp32 result back, which costs several
passes over all tokens and a copy of the input for backward, and products at the rate of fp32. Here
the input is taken as it is, parameters are rounded for the moment, and the adapter's part is added
to the base's result by the product itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn


class Bf16Linear(Linear):
    """PEFT's layer, with its parameters and names."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        result: Tensor = self.base_layer(x, *args, **kwargs)
        # A result that nothing else refers to, which another autograd function's may be.
        in_place = type(self.base_layer) is nn.Linear
        for name in self.active_adapters:
            if name in self.lora_A:
                a, b = self.lora_A[name].weight, self.lora_B[name].weight
                kept = self.lora_dropout[name](x)
                result = _Addition.apply(result, kept, a, b, self.scaling[name], in_place)
        return result


def use_bf16_products(transformer: nn.Module) -> None:
    """Of the adapters of a transformer in bf16."""
    for module in transformer.modules():
        if type(module) is Linear:
            module.__class__ = Bf16Linear


class _Addition(torch.autograd.Function):
    """`result + scaling * x a^T b^T`. result `[..., out]` and x `[..., in]` are of one dtype; a
    `[rank, in]` and b `[out, rank]` are fp32, as their gradients are."""

    @staticmethod
    def forward(
        ctx: Any, result: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, in_place: bool
    ) -> Tensor:
        inner = F.linear(x, a.to(x.dtype))
        ctx.save_for_backward(x, inner, a, b)
        ctx.scaling = scaling
        rows = result.view(-1, result.shape[-1])
        added = inner.flatten(0, -2), b.to(x.dtype).T
        if not in_place:
            return torch.addmm(rows, *added, alpha=scaling).view(result.shape)
        ctx.mark_dirty(result)
        rows.addmm_(*added, alpha=scaling)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, a, b = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_inner = (rows @ b.to(grad.dtype)) * ctx.scaling
        grad_a = _product(grad_inner.T, x.reshape(-1, x.shape[-1]))
        grad_b = _product(rows.T, inner.reshape(-1, inner.shape[-1])) * ctx.scaling
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = (grad_inner @ a.to(grad.dtype)).view(x.shape)
        return grad, grad_x, grad_a, grad_b, None, None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """In fp32, of which bf16 would keep 8 bits: the sum goes over all tokens."""
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
