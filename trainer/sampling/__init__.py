"""Videos from a trained adapter, and its file for other programs."""

from .pipeline import (
    apply_rope,
    apply_sparse_attention,
    encode_captions,
    generate,
    load_pipeline,
    share_tokens,
)

__all__ = [
    "apply_rope",
    "apply_sparse_attention",
    "encode_captions",
    "generate",
    "load_pipeline",
    "share_tokens",
]
