"""Temporal positions of rotary embedding beyond the native length.

The policies change only the temporal axis; docs/rope.md compares them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config.schema import Rope, RopeName
from ..config.values import ConfigError

RIFLEX_MARGIN = 0.9  # share of its period that the video may fill (the authors' code)


@dataclass(frozen=True)
class TemporalAxis:
    """Describes the channels of a head that turn with time, in pairs.

    Pair k, counted from 1, turns by `theta ** (-2 (k - 1) / dim)` radians a latent frame, so that
    its period grows with k. dim: channels, two a pair. dtype: the dtype of the stock model's
    angles.
    """

    dim: int
    theta: float
    dtype: torch.dtype

    def period(self, k: int) -> float:
        """Return the latent frames in which pair k turns once (RIFLEx, arXiv 2502.15894, Eq. 4)."""
        return 2 * math.pi * self.theta ** (2 * (k - 1) / self.dim)

    def frequencies(self, device: torch.device | None = None) -> Tensor:
        """Return `[dim / 2]` radians a latent frame, bit-equal to the stock model's."""
        exponents = torch.arange(0, self.dim, 2, dtype=self.dtype, device=device) / self.dim
        return 1.0 / self.theta**exponents


@dataclass(frozen=True)
class RopePolicy:
    """Describes the temporal positions that an adapter was trained with.

    native, target: latent frames that the base model and the adapter were trained at.
    k: the pair whose frequency riflex lowers, counted from 1; None for other policies.
    """

    policy: RopeName = "native"
    native: int = 1
    target: int = 1
    k: int | None = None

    @classmethod
    def resolve(
        cls, settings: Rope, native: int, target: int, axis: TemporalAxis | None
    ) -> RopePolicy:
        """Return the policy that settings mean for these lengths.

        axis: None for a model that has learned its frequencies. Without a `rope.k` riflex lowers
        the first frequency that does not turn once within the native length: it is the first to
        repeat in longer videos (HunyuanVideo k = 4, CogVideoX k = 2, which the paper finds by
        looking at videos). Raises ConfigError where the policy has no meaning.
        """
        if settings.policy != "riflex":
            return cls(settings.policy, native, target)
        if axis is None:
            raise ConfigError(
                "rope.policy=riflex lowers the one temporal frequency that makes videos repeat. "
                "This model has learned its frequencies, each head its own, and every pair of "
                "channels turns with time and space together: there is no such one. Set "
                "rope.policy to interpolate or native."
            )
        pairs, k = axis.dim // 2, settings.k
        if k is None:
            repeating = sum(axis.period(j) < native for j in range(1, pairs + 1))
            k = min(repeating + 1, pairs)
        if not 1 <= k <= pairs:
            raise ConfigError(f"rope.k={k}: the model has {pairs} temporal frequencies, 1 first.")
        return cls("riflex", native, target, k)

    @classmethod
    def recorded(cls, entry: Mapping[str, Any]) -> RopePolicy:
        """Return the policy of an adapter's entry (`lora.read_entry`)."""
        rope = entry.get("rope")
        return cls(**rope) if isinstance(rope, dict) else NATIVE  # before there was a choice

    @property
    def scale(self) -> float:
        """The factor of temporal positions (Position Interpolation, arXiv 2306.15595).

        It is the training's, whatever length is sampled: the LoRA knows frames at this distance.
        """
        return self.native / self.target if self.policy == "interpolate" else 1.0

    def most_positions(self, rows: int) -> int:
        """Return how many latent frames have positions within a table of `rows` rows."""
        return (rows - 1) * self.target // self.native + 1 if self.policy == "interpolate" else rows

    def lowered(self, frames: int, axis: TemporalAxis) -> float | None:
        """Return the period, in latent frames, that riflex gives pair k in a video of `frames`
        latent frames (Eq. 8).

        None if the pair keeps its own: under another policy, or if its period covers the video.
        Videos shorter than the training's keep the training's period, which is what the LoRA knows
        (the authors' code does so after fine-tuning); for longer ones it grows with them.
        """
        if self.k is None:
            return None
        frames = max(frames, self.target)
        return frames / RIFLEX_MARGIN if frames > axis.period(self.k) else None

    def angles(self, frames: int, axis: TemporalAxis, device: torch.device | None = None) -> Tensor:
        """Return `[frames, dim / 2]` radians by which each pair is turned in each latent frame."""
        frequencies = axis.frequencies(device)
        period = self.lowered(frames, axis)
        if period is not None:
            assert self.k is not None
            frequencies[self.k - 1] = 2 * math.pi / period
        positions = torch.arange(frames, dtype=axis.dtype, device=device) * self.scale
        return torch.outer(positions, frequencies)

    def describe(self, axis: TemporalAxis | None) -> str:
        """Describe the policy at the training length, in a sentence without its full stop."""
        if self.k is None or axis is None:
            positions = f"times {self.native}/{self.target}" if self.scale != 1 else "unchanged"
            return f"{self.policy}, temporal positions {positions}"
        own, period = axis.period(self.k), self.lowered(self.target, axis)
        pair = f"riflex, temporal frequency {self.k} of {axis.dim // 2}"
        if period is None:
            return f"{pair} unchanged: its period of {own:.1f} covers {self.target} latent frames"
        return f"{pair} lowered: its period goes from {own:.1f} to {period:.1f} latent frames"

    def stock_note(self, where: str) -> str | None:
        """Return a warning for loading the adapter elsewhere; None if nothing is lost."""
        if self.policy == "native":
            return None
        return (
            f"{where} native RoPE, but this adapter was trained with rope.policy={self.policy}. "
            "`longreel sample` and `sampling.load_pipeline` restore it; "
            "`sampling.apply_rope(pipe, lora.read_entry(RUN))` does on a stock diffusers pipeline."
        )


NATIVE = RopePolicy()


class TemporalRope(nn.Module):
    """The stock RoPE module with temporal channels, which come first, that follow a policy.

    It replaces the stock module as `rope`. Spatial tables are the stock module's own; temporal
    angles are computed, so that no table limits the length.
    """

    def __init__(
        self, stock: Any, policy: RopePolicy, axis: TemporalAxis, *, patch: int, token_dim: int
    ) -> None:
        """Wrap the stock module.

        patch: latent frames of a token. token_dim: the dimension of a table that counts tokens,
        any but the last.
        """
        super().__init__()
        self.stock, self.policy, self.axis = stock, policy, axis
        self.patch, self.token_dim = patch, token_dim

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin for latents `[B, C, F, H, W]`, shaped as the stock module's."""
        frames = hidden_states.shape[2] // self.patch
        angles = self.policy.angles(frames, self.axis, hidden_states.device)
        angles = angles.repeat_interleave(2, dim=1)  # each value comes twice, for a pair
        cos, sin = self.stock(hidden_states[:, :, : self.patch])  # space is the same in each frame
        return self._join(angles.cos(), cos), self._join(angles.sin(), sin)

    def _join(self, temporal: Tensor, one_frame: Tensor) -> Tensor:
        spatial = one_frame.flatten(0, -2)[:, self.axis.dim :]  # [tokens of a frame, channels]
        frames, tokens = len(temporal), len(spatial)
        table = torch.cat(
            [
                temporal.float()[:, None].expand(-1, tokens, -1),
                spatial.expand(frames, -1, -1),
            ],
            dim=-1,
        )
        shape = list(one_frame.shape)
        shape[self.token_dim] = frames * tokens
        return table.view(shape)


class RopeAdapter(ABC):
    """Lets a family's transformers follow a `RopePolicy`.

    per_head: True if each head has positions of its own, so that a table holds half of a head's
    channels for each head; otherwise it holds all of a head's channels once.
    """

    per_head: ClassVar[bool] = False

    def apply(self, transformer: Any, policy: RopePolicy) -> None:
        """Let temporal positions follow a policy; native puts the stock module back."""
        transformer.rope = stock = stock_rope(transformer)
        if policy.policy != "native":
            transformer.rope = self.extend(stock, policy, transformer.config)

    @abstractmethod
    def extend(self, stock: Any, policy: RopePolicy, config: Mapping[str, Any]) -> nn.Module:
        """Return a module to replace `stock`, the RoPE of a transformer with this config."""


def stock_rope(transformer: Any) -> Any:
    """Return a transformer's own RoPE module, which one of ours may have replaced."""
    return getattr(transformer.rope, "stock", transformer.rope)


def installed_rope(transformer: Any) -> RopePolicy:
    """Return the policy that a transformer's RoPE follows."""
    return getattr(transformer.rope, "policy", NATIVE)
