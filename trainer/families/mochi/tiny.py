"""A tiny Mochi of random weights, for tests and demos."""

from __future__ import annotations

from typing import Any

import torch

from ..names import diffusers_class
from ..tiny import amplify_attention, latent_statistics, t5_encoder
from .text import MochiText


def build() -> Any:
    """Build a pipeline with two heads, three layers, and the real compression, which the stock
    pipeline has built in.

    103 frames of 160 x 192 are 2160 tokens.
    """
    text_width = 32
    transformer = diffusers_class("MochiTransformer3DModel")(
        num_attention_heads=2,
        attention_head_dim=32,  # wide enough for the 48 numbers of a patch
        num_layers=3,
        pooled_projection_dim=16,
        text_embed_dim=text_width,
        time_embed_dim=32,
    )
    blocks = transformer.transformer_blocks
    norms = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    with torch.no_grad():
        # Positions that count: latent frames, and pixels of an image scaled to the area of
        # 192 x 192.
        transformer.pos_frequencies[0].normal_(std=0.3)
        transformer.pos_frequencies[1:].normal_(std=0.03)
    amplify_attention(
        transformer,
        gates=[
            norm.linear.bias.view(4, -1)[1]  # of scale, gate, scale, gate
            for block in blocks
            for norm in (block.norm1, block.norm1_context)
            if norm is block.norm1 or not block.context_pre_only
        ],
        norms=[getattr(block.attn1, name) for block in blocks for name in norms],
    )
    vae = diffusers_class("AutoencoderKLMochi")(
        encoder_block_out_channels=(32,) * 4,  # the least that its group norms take
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(0, 0, 1, 1, 1),
        latents_mean=(0.0,) * 12,
        latents_std=(1.0,) * 12,
    ).eval()
    with torch.no_grad():
        # Its Fourier features, random functions of a pixel's last bits, would drown out the rest.
        vae.encoder.proj_in.weight[:, 3:] *= 0.02
    mean, std = latent_statistics(vae, 31, 160, 192)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    tokenizer, text_encoder = t5_encoder(
        "T5EncoderModel", "T5Config", text_width, max_length=MochiText.sequence_tokens
    )
    scheduler = diffusers_class("FlowMatchEulerDiscreteScheduler")(invert_sigmas=True)
    return diffusers_class("MochiPipeline")(
        scheduler, vae, text_encoder, tokenizer, transformer.eval()
    )
