"""LoRA layers with bf16 products; parameters, their gradients and the sums stay fp32.

PEFT casts the input of an fp32 adapter to fp32 and gets an fp32 result back. That costs several
passes over all tokens, a copy of the input for backward, and products at fp32 rates. Here the
input keeps its dtype, parameters are rounded for the product, and the product itself adds the
adapter's part to the base's result.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn


class Bf16Linear(Linear):
    """PEFT's linear layer with bf16 products; parameters and names are the same."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        result: Tensor = self.base_layer(x, *args, **kwargs)
        # Only if nothing else refers to the result; another autograd function may keep its own.
        in_place = type(self.base_layer) is nn.Linear
        for name in self.active_adapters:
            if name in self.lora_A:
                a, b = self.lora_A[name].weight, self.lora_B[name].weight
                kept = self.lora_dropout[name](x)
                result = _Addition.apply(result, kept, a, b, self.scaling[name], in_place)
        return result


def use_bf16_products(transformer: nn.Module) -> None:
    """Give all adapted layers of a bf16 transformer bf16 products."""
    for module in transformer.modules():
        if type(module) is Linear:
            module.__class__ = Bf16Linear


class _Addition(torch.autograd.Function):
    """Computes `result + scaling * x a^T b^T`.

    result `[..., out]` and x `[..., in]` have one dtype; a `[rank, in]`, b `[out, rank]` and their
    gradients are fp32.
    """

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
    """Return `a @ b` in fp32: it sums over all tokens, and bf16 would keep 8 bits of it."""
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
