"""Wan 2.1 text-to-video: self-attention over video tokens, text by cross-attention."""

from __future__ import annotations

from ..base import ModelFamily
from ..defaults import Defaults
from ..layers import LayerNames, MlpLayers
from ..loader import Loader
from ..names import ModelNames
from ..noising import NoisingConvention
from . import tiny
from .attention import WanAttention
from .blocks import WanBlocks
from .geometry import WanGeometry
from .rope import ROPE_DIM, WanRope
from .split import WanSplit
from .text import WanText
from .vae import WanVae

NAMES = ModelNames(
    family="wan",
    pipeline="WanPipeline",
    transformer="WanTransformer3DModel",
    repository="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
)

PROJECTIONS = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
LAYERS = LayerNames(
    lora_targets={
        "attention": r"blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)",
        "attention+text": r"blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
    },
    original={
        **{f"blocks.{{}}.self_attn.{o}": (f"blocks.{{}}.attn1.{d}",) for o, d in PROJECTIONS},
        **{f"blocks.{{}}.cross_attn.{o}": (f"blocks.{{}}.attn2.{d}",) for o, d in PROJECTIONS},
        "blocks.{}.ffn.0": ("blocks.{}.ffn.net.0.proj",),
        "blocks.{}.ffn.2": ("blocks.{}.ffn.net.2",),
    },
    float8=r"blocks\.\d+\.(attn1|attn2|ffn)\..+",
    mlp=(MlpLayers("ffn.net.0.proj", "ffn.net.2"),),
    text=r"attn2\.to_[kv]",
    text_norms=r"attn2\.norm_k",
)

WAN = ModelFamily(
    names=NAMES,
    defaults=Defaults(NAMES, fps=16, native_frames=81, guidance=5.0, steps=50),
    loader=Loader(NAMES, tiny.build, tiny_version=1),
    geometry=WanGeometry,
    text=WanText(NAMES),
    attention=WanAttention(),
    rope=WanRope(),
    blocks=WanBlocks(NAMES),
    layers=LAYERS,
    split=WanSplit("patch_embedding", ROPE_DIM),
    noising=NoisingConvention(),
    vae=WanVae(),
)
