"""Mochi 1 text-to-video: one attention over video and text, text in a narrower stream."""

from __future__ import annotations

from ..base import ModelFamily
from ..defaults import Defaults
from ..layers import LayerNames, MlpLayers
from ..names import ModelNames
from ..noising import NoisingConvention
from ..split import SequenceSplit
from . import tiny
from .attention import MochiAttention
from .blocks import MochiBlocks
from .geometry import MochiGeometry
from .loader import MochiLoader
from .rope import ROPE_DIM, MochiRope
from .text import MochiText
from .vae import MochiVae

NAMES = ModelNames(
    family="mochi",
    pipeline="MochiPipeline",
    transformer="MochiTransformer3DModel",
    repository="genmo/mochi-1-preview",
)

LAYERS = LayerNames(
    lora_targets={
        "attention": r"transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)",
        # Nothing reads the last block's text, so that its `add_q_proj` learns nothing.
        "attention+text": r"transformer_blocks\.\d+\.attn1\."
        r"(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)",
    },
    # Without mlp_x.w1 and mlp_y.w1: there the halves, gate and value, are in the other order.
    original={
        original: tuple(f"transformer_blocks.{{}}.{layer}" for layer in layers)
        for original, layers in {
            "blocks.{}.attn.qkv_x": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
            "blocks.{}.attn.proj_x": ("attn1.to_out.0",),
            "blocks.{}.attn.qkv_y": ("attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj"),
            "blocks.{}.attn.proj_y": ("attn1.to_add_out",),
            "blocks.{}.mlp_x.w2": ("ff.net.2",),
            "blocks.{}.mlp_y.w2": ("ff_context.net.2",),
        }.items()
    },
    float8=r"transformer_blocks\.\d+\.(attn1|ff|ff_context)\..+",
    mlp=(MlpLayers("ff.net.0.proj", "ff.net.2"),),
    text=r"attn1\.(add_[qkv]_proj|to_add_out)|ff_context\..*",
    text_norms=r".*(_context|added).*",
)

MOCHI = ModelFamily(
    names=NAMES,
    defaults=Defaults(
        NAMES,
        fps=30,
        native_frames=163,
        guidance=4.5,
        steps=64,
        min_steps=2,  # half of the steps are linear in sigma, and their number is a divisor
        batches_guidance=True,
    ),
    loader=MochiLoader(NAMES, tiny.build, tiny_version=2, fp32_components=("vae", "text_encoder")),
    geometry=MochiGeometry,
    text=MochiText(NAMES),
    attention=MochiAttention(),
    rope=MochiRope(),
    blocks=MochiBlocks(NAMES),
    layers=LAYERS,
    split=SequenceSplit("patch_embed", ROPE_DIM),
    # Mochi's time runs from noise to the video, and its velocity with it (genmo's `ut = z - eps`).
    # The scheduler's sigmas do too, but only once `set_timesteps` has inverted them: none are taken
    # from it.
    noising=NoisingConvention(reversed=True),
    vae=MochiVae(),
)
