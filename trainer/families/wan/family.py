"""Wan 2.1 text-to-video: self-attention over video tokens, text by cross-attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ....sparse.attention import SparseAttention
from ....sparse.grid import TokenGrid
from ...config.values import ConfigError
from ..base import Geometry, ModelFamily, Text, channel_statistics, diffusers_class
from ..chunked import ChunkedFeedForward
from ..codec import mode, scaled
from ..modulated import WanTransformerBlock, restore
from ..norm_rope import norm_and_rotate, rotate
from ..processor import LayerProcessor
from ..rope import RopePolicy, TemporalAxis, TemporalRope
from ..tiny import latent_statistics, let_attention_speak

TEXT_TOKENS = 512  # the pipeline's call pads to it; `encode_prompt` alone would pad to 226

ROPE_THETA = 10000.0  # of diffusers' WanRotaryPosEmbed; no config sets another

PROJECTIONS = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))


class Wan(ModelFamily):
    name = "wan"
    pipeline_name = "WanPipeline"
    transformer_name = "WanTransformer3DModel"
    default_path = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    fps = 16
    native_frames = 81
    guidance = 5.0
    steps = 50
    context_tokens = TEXT_TOKENS
    caption_tokens = TEXT_TOKENS - 1  # and </s>
    lora_targets = {
        "attention": r"blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)",
        "attention+text": r"blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
    }
    float8_layers = r"blocks\.\d+\.(attn1|attn2|ffn)\..+"
    fuses_modulation = True
    embedder, rope_tokens = "patch_embedding", 1
    original_layers = {
        **{f"blocks.{{}}.self_attn.{o}": (f"blocks.{{}}.attn1.{d}",) for o, d in PROJECTIONS},
        **{f"blocks.{{}}.cross_attn.{o}": (f"blocks.{{}}.attn2.{d}",) for o, d in PROJECTIONS},
        "blocks.{}.ffn.0": ("blocks.{}.ffn.net.0.proj",),
        "blocks.{}.ffn.2": ("blocks.{}.ffn.net.2",),
    }
    tiny_version = 1

    def read_geometry(
        self,
        path: str,
        index: Mapping[str, Any],
        transformer: Mapping[str, Any],
        vae: Mapping[str, Any],
    ) -> Geometry:
        unsupported = None
        if index.get("boundary_ratio") is not None or (index.get("transformer_2") or [None])[0]:
            unsupported = "a Wan 2.2 model of two experts"
        elif index.get("expand_timesteps"):
            unsupported = "a Wan 2.2 text-and-image model with a timestep per token"
        elif transformer.get("image_dim") or transformer["in_channels"] != vae["z_dim"]:
            unsupported = "an image-to-video model"
        if unsupported:
            raise ConfigError(
                f"{path} is {unsupported}, which is not supported yet; family=wan takes Wan 2.1 "
                f"text-to-video, such as {self.default_path}."
            )
        return Geometry(
            # Wan 2.1's published VAE config predates the two scale factors.
            temporal=vae.get("scale_factor_temporal", 4),
            spatial=vae.get("scale_factor_spatial", 8),
            patch=tuple(transformer["patch_size"]),
            latent_channels=transformer["in_channels"],
            layers=transformer["num_layers"],
            heads=transformer["num_attention_heads"],
            head_dim=transformer["attention_head_dim"],
            rope=_temporal_axis(transformer),
            max_positions=transformer.get("rope_max_seq_len", 1024),
        )

    def frame_step(self, geometry: Geometry) -> int:
        # The VAE reads one frame, then four at a time, whatever its compression, and drops a rest.
        return max(geometry.temporal, 4)

    def extended_frames(self, native: int, factor: int, geometry: Geometry) -> int:
        return (native - 1) * factor + 1

    def set_processors(
        self, transformer: Any, attention: SparseAttention, fused_norms: bool
    ) -> None:
        for index, block in enumerate(transformer.blocks):
            block.attn1.set_processor(WanSelfAttention(index, attention, fused_norms))

    def fuse_modulation(self, transformer: Any, fused: bool) -> None:
        blocks = transformer.blocks
        for index, block in enumerate(blocks):
            stock = restore(block)
            blocks[index] = WanTransformerBlock(stock) if fused else stock

    def extend_rope(self, stock: Any, rope: RopePolicy, config: Mapping[str, Any]) -> nn.Module:
        axis = _temporal_axis(config)
        return TemporalRope(
            stock, rope, axis, patch=config["patch_size"][0], token_dim=self.rope_tokens
        )

    def embedded_part(self, embedded: Tensor, part: slice, tokens: int) -> Tensor:
        return embedded.flatten(2)[:, :, part, None, None]  # of [B, C, f, h, w]

    def chunk_mlp(self, transformer: Any, tokens: int) -> None:
        for block in transformer.blocks:
            block.ffn = ChunkedFeedForward(block.ffn, tokens)

    def sequence(
        self, transformer: Any, inputs: Mapping[str, Any]
    ) -> tuple[TokenGrid, Sequence[int] | None]:
        return self.grid(inputs["hidden_states"].shape, transformer.config.patch_size), None

    def encode_text(self, pipe: Any, caption: str) -> Text:
        with torch.no_grad():
            embeds, _ = pipe.encode_prompt(
                caption, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS
            )
        # The model attends to the padding, but it is all zeros: leaving it out loses nothing.
        filled = embeds[0].ne(0).any(dim=1).nonzero()
        length = int(filled.max()) + 1 if len(filled) else 1
        return {"prompt_embeds": embeds[0, :length].cpu().clone()}

    def collate_text(self, texts: Sequence[Text]) -> Text:
        return {"encoder_hidden_states": _pad([text["prompt_embeds"] for text in texts])}

    def pipeline_inputs(self, text: Text, negative: Text | None, guidance: float) -> dict[str, Any]:
        inputs: dict[str, Any] = {"prompt_embeds": _pad([text["prompt_embeds"]])}
        if negative is not None:
            inputs["negative_prompt_embeds"] = _pad([negative["prompt_embeds"]])
        return inputs | {"guidance_scale": guidance}

    def limit_memory(self, vae: Any) -> None:
        """Nothing: the VAE takes four frames at a time anyway, and whole ones fit."""

    def encode_chunks(self, vae: Any, pixels: Tensor) -> Iterator[Tensor]:
        # As `vae.encode` without tiles, which keeps what came before in its caches and drops a rest
        # of fewer than four frames; here the pixels come to the device as they are needed.
        assert vae.config.patch_size is None, "Wan 2.1's VAE takes pixels as they are"
        vae.clear_cache()
        try:
            for start in range(-3, len(pixels) - 3, 4):
                chunk = scaled(vae, pixels[max(start, 0) : start + 4])
                vae._enc_conv_idx = [0]
                moments = vae.encoder(
                    chunk, feat_cache=vae._enc_feat_map, feat_idx=vae._enc_conv_idx
                )
                yield mode(vae.quant_conv(moments))
        finally:
            vae.clear_cache()

    def decode_chunks(self, vae: Any, latents: Tensor) -> Iterator[Tensor]:
        # As `vae.decode` without tiles, which keeps what came before in its caches.
        vae.clear_cache()
        try:
            for index, frame in enumerate(vae.post_quant_conv(latents).split(1, dim=2)):
                vae._conv_idx = [0]
                yield vae.decoder(
                    frame,
                    feat_cache=vae._feat_map,
                    feat_idx=vae._conv_idx,
                    first_chunk=index == 0,
                ).clamp(-1, 1)
        finally:
            vae.clear_cache()

    def normalise(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = channel_statistics(vae, latents)
        return (latents - mean) / std

    def denormalise(self, vae: Any, latents: Tensor) -> Tensor:
        latents = latents.to(vae.dtype)
        mean, std = channel_statistics(vae, latents)
        return latents / (1 / std) + mean  # rounded as the pipeline rounds

    def timestep(self, sigma: Tensor) -> Tensor:
        return 1000 * sigma

    def target(self, clean: Tensor, noise: Tensor) -> Tensor:
        return noise - clean

    def build_tiny(self) -> Any:
        """Two heads, three layers, and a VAE of full spatial but no temporal compression.

        So 49 frames of 160 x 192 are 5880 tokens: enough for block sparsity, seconds on a CPU. The
        stock pipeline's rounding of `num_frames` adds one frame under such a VAE.
        """
        from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

        text_width, channels = 32, 4
        transformer = diffusers_class(self.transformer_name)(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=channels,
            out_channels=channels,
            text_dim=text_width,
            freq_dim=32,
            ffn_dim=64,
            num_layers=3,
        )
        let_attention_speak(
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
        tokenizer = ByT5Tokenizer(model_max_length=TEXT_TOKENS)
        text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tokenizer),
                d_model=text_width,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
            )
        ).eval()
        scheduler = diffusers_class("UniPCMultistepScheduler")(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            num_train_timesteps=1000,
            flow_shift=3.0,  # Wan's for 480p
        )
        return self.pipeline_class(tokenizer, text_encoder, vae, scheduler, transformer.eval())


class WanSelfAttention(LayerProcessor):
    """Self-attention, over the video alone."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        assert encoder_hidden_states is None and attention_mask is None and rotary_emb is not None
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = (project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v))
        if not self.fused_norms:
            # The norms span all heads, so they come before the split.
            q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        cos, sin = rotary_emb[0][..., 0::2], rotary_emb[1][..., 1::2]  # each value comes twice
        if self.fused_norms:
            tables = cos[0, :, 0], sin[0, :, 0]
            q = norm_and_rotate(q, attn.norm_q, *tables, across_heads=True)
            k = norm_and_rotate(k, attn.norm_k, *tables, across_heads=True)
        else:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = self.attention.attention(self.layer_index, q, k, v).flatten(2)
        for module in attn.to_out:
            out = module(out)
        return out


def _temporal_axis(config: Mapping[str, Any]) -> TemporalAxis:
    """Of the transformer's config. Time has what two spatial axes, a third each, leave over."""
    head_dim = config["attention_head_dim"]
    return TemporalAxis(head_dim - 4 * (head_dim // 6), ROPE_THETA, torch.float64)


def _pad(embeds: Sequence[Tensor]) -> Tensor:
    """`[B, TEXT_TOKENS, D]`, zeros after each prompt as the pipeline has them."""
    batch = embeds[0].new_zeros(len(embeds), TEXT_TOKENS, embeds[0].shape[1])
    for row, prompt in zip(batch, embeds, strict=True):
        row[: len(prompt)] = prompt
    return batch
