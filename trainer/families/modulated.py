"""Norms that the noise level modulates, and gated sums, in one pass over memory each.

Modules that take the place of diffusers' inside of a transformer. They share the registries of
those that they replace: adapters, state dicts and `restore` see no difference.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...kernels.modulated_norm import gated_add, modulated_norm


class Replacement(nn.Module):
    """Computes what a stock module does, with its submodules, parameters and mode.

    Hooks stay with the module that they were put on.
    """

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self._modules, self._parameters = stock._modules, stock._parameters
        self.training = stock.training
        self.replaced = (stock,)  # in a tuple, or it would be a submodule


def restore(module: Any) -> Any:
    """The stock module, where a replacement stands for it."""
    if not isinstance(module, Replacement):
        return module
    (stock,) = module.replaced
    stock.training = module.training
    return stock


class WanTransformerBlock(Replacement):
    """Wan 2.1's block; as the stock one but for its norms and gates.

    Of the stock one's name, by which accelerate finds what to wrap (`_no_split_modules`), diffusers
    what to compile (`_repeated_blocks`).
    """

    scale_shift_table: nn.Parameter
    norm1: Any
    attn1: Any
    norm2: Any
    attn2: Any
    norm3: Any
    ffn: Any

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: tuple[Tensor, Tensor],
    ) -> Tensor:
        if temb.ndim != 3:
            raise ValueError(
                "Wan's fused norms take one noise level a sample, not one a token; set "
                "speed.fused_modulation=false."
            )
        x = hidden_states
        modulation = (self.scale_shift_table + temb.float()).chunk(6, dim=1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        normed = _layer_norm(x, self.norm1, 1 + scale, shift)
        x = gated_add(x, self.attn1(normed, None, None, rotary_emb), gate)
        if isinstance(self.norm2, nn.LayerNorm):
            normed = _layer_norm(x, self.norm2, self.norm2.weight, self.norm2.bias)
        else:
            normed = x
        x = x + self.attn2(normed, encoder_hidden_states, None, None)
        normed = _layer_norm(x, self.norm3, 1 + mlp_scale, mlp_shift)
        return gated_add(x, self.ffn(normed), mlp_gate)


def _layer_norm(x: Tensor, norm: Any, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    return modulated_norm(x, scale, shift, norm="layer", eps=norm.eps)


class MochiNorm(Replacement):
    """`MochiModulatedRMSNorm`."""

    norm: Any

    def forward(self, hidden_states: Tensor, scale: Tensor | None = None) -> Tensor:
        return modulated_norm(hidden_states, scale, norm="rms", eps=self.norm.eps)


class MochiZeroNorm(Replacement):
    """`MochiRMSNormZero`."""

    silu: Any
    linear: Any
    norm: Any

    def forward(self, hidden_states: Tensor, emb: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scale, gate, mlp_scale, mlp_gate = self.linear(self.silu(emb)).chunk(4, dim=1)
        normed = modulated_norm(hidden_states, 1 + scale.float(), norm="rms", eps=self.norm.eps)
        return normed, gate, mlp_scale, mlp_gate
