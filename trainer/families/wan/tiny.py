"""A tiny Wan of random weights, for tests and demos."""

from __future__ import annotations

from typing import Any

from ..names import diffusers_class
from ..tiny import amplify_attention, latent_statistics, t5_encoder
from .text import TEXT_TOKENS


def build() -> Any:
    """Build a pipeline with two heads, three layers, and a VAE of full spatial but no temporal
    compression.

    So 49 frames of 160 x 192 are 5880 tokens: enough for block sparsity, seconds on a CPU. The
    stock pipeline's rounding of `num_frames` adds one frame under such a VAE.
    """
    text_width, channels = 32, 4
    transformer = diffusers_class("WanTransformer3DModel")(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=channels,
        text_dim=text_width,
        freq_dim=32,
        ffn_dim=64,
        num_layers=3,
    )
    amplify_attention(
        transformer,
        gates=[block.scale_shift_table[:, 2] for block in transformer.blocks],
        norms=[n for b in transformer.blocks for n in (b.attn1.norm_q, b.attn1.norm_k)],
    )
    vae = diffusers_class("AutoencoderKLWan")(
        base_dim=3,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, False, False],
        scale_factor_temporal=1,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    ).eval()
    mean, std = latent_statistics(vae, 9, 160, 192)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    tokenizer, text_encoder = t5_encoder(
        "UMT5EncoderModel", "UMT5Config", text_width, max_length=TEXT_TOKENS
    )
    scheduler = diffusers_class("UniPCMultistepScheduler")(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=3.0,  # Wan's for 480p
    )
    return diffusers_class("WanPipeline")(
        tokenizer, text_encoder, vae, scheduler, transformer.eval()
    )
