"""Modulated (adaptive) norms and gated sums, each in one pass over memory."""

from .op import gated_add, modulated_norm

__all__ = ["gated_add", "modulated_norm"]
