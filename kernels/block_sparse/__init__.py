"""Trainable block-sparse attention over lists of kept blocks."""

from .op import BACKENDS, block_sparse_attention, resolve_backend

__all__ = ["BACKENDS", "block_sparse_attention", "resolve_backend"]
