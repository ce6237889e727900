"""HunyuanVideo text-to-video: blocks of two streams, then of one, over `[video, text]`."""

from __future__ import annotations

from ..base import ModelFamily
from ..defaults import Defaults
from ..layers import LayerNames, MlpLayers
from ..names import ModelNames
from ..noising import NoisingConvention
from ..split import SequenceSplit
from . import tiny
from .attention import HunyuanAttention
from .blocks import HunyuanBlocks
from .geometry import HunyuanGeometry
from .loader import HunyuanLoader
from .rope import ROPE_DIM, HunyuanRope
from .text import HunyuanText
from .vae import HunyuanVae

NAMES = ModelNames(
    family="hunyuan",
    pipeline="HunyuanVideoPipeline",
    transformer="HunyuanVideoTransformer3DModel",
    repository="hunyuanvideo-community/HunyuanVideo",
)

DUAL, SINGLE = "transformer_blocks", "single_transformer_blocks"
ATTENTION = rf"{DUAL}\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)|{SINGLE}\.\d+\.attn\.to_[qkv]"
LAYERS = LayerNames(
    lora_targets={
        "attention": ATTENTION,
        "attention+text": rf"{ATTENTION}|{DUAL}\.\d+\.attn\.(add_[qkv]_proj|to_add_out)",
        # A single block's attention output has no projection of its own: it shares the MLP's.
        "attention+fused": rf"{ATTENTION}|{SINGLE}\.\d+\.proj_out",
    },
    original={
        "double_blocks.{}.img_attn_qkv": tuple(f"{DUAL}.{{}}.attn.to_{x}" for x in "qkv"),
        "double_blocks.{}.img_attn_proj": (f"{DUAL}.{{}}.attn.to_out.0",),
        "double_blocks.{}.img_mlp.fc1": (f"{DUAL}.{{}}.ff.net.0.proj",),
        "double_blocks.{}.img_mlp.fc2": (f"{DUAL}.{{}}.ff.net.2",),
        "double_blocks.{}.txt_attn_qkv": tuple(f"{DUAL}.{{}}.attn.add_{x}_proj" for x in "qkv"),
        "double_blocks.{}.txt_attn_proj": (f"{DUAL}.{{}}.attn.to_add_out",),
        "double_blocks.{}.txt_mlp.fc1": (f"{DUAL}.{{}}.ff_context.net.0.proj",),
        "double_blocks.{}.txt_mlp.fc2": (f"{DUAL}.{{}}.ff_context.net.2",),
        "single_blocks.{}.linear1": (
            *(f"{SINGLE}.{{}}.attn.to_{x}" for x in "qkv"),
            f"{SINGLE}.{{}}.proj_mlp",
        ),
        "single_blocks.{}.linear2": (f"{SINGLE}.{{}}.proj_out",),
    },
    float8=rf"({DUAL}|{SINGLE})\.\d+\.((attn|ff|ff_context)\..+|proj_mlp|proj_out)",
    mlp=(
        MlpLayers("ff.net.0.proj", "ff.net.2"),
        MlpLayers("proj_mlp", "proj_out", shares_output=True),
    ),
    text=r"attn\.(add_[qkv]_proj|to_add_out)|ff_context\..*",
    text_norms=r".*(_context|added).*",
)

HUNYUAN = ModelFamily(
    names=NAMES,
    defaults=Defaults(
        NAMES,
        fps=24,
        native_frames=125,
        guidance=6.0,
        steps=50,
        train_guidance=1.0,  # as FastVideo (its issue 140) and finetrainers train
    ),
    loader=HunyuanLoader(
        NAMES,
        tiny.build,
        tiny_version=2,
        text_components=("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"),
    ),
    geometry=HunyuanGeometry,
    text=HunyuanText(NAMES),
    attention=HunyuanAttention(),
    rope=HunyuanRope(),
    blocks=HunyuanBlocks(NAMES),
    layers=LAYERS,
    split=SequenceSplit("x_embedder", ROPE_DIM),
    noising=NoisingConvention(),
    vae=HunyuanVae(),
)
