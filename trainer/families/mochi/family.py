"""Mochi 1 text-to-video: one attention over video and text, text in a narrower stream."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ....sparse.attention import SparseAttention
from ...config.values import ConfigError
from ..base import Geometry, Text, channel_statistics, diffusers_class
from ..chunked import ChunkedFeedForward
from ..codec import scaled
from ..joint import JointFamily, pad, trim
from ..modulated import MochiNorm, MochiZeroNorm, restore
from ..norm_rope import norm_and_rotate, rotate
from ..processor import LayerProcessor
from ..rope import NATIVE, RopePolicy
from ..tiny import latent_statistics, let_attention_speak
from .vae import EncoderInParts, continuing


class Mochi(JointFamily):
    name = "mochi"
    pipeline_name = "MochiPipeline"
    transformer_name = "MochiTransformer3DModel"
    default_path = "genmo/mochi-1-preview"
    fps = 30
    native_frames = 163
    guidance = 4.5
    steps = 64
    joins_guidance = True
    least_steps = 2  # half of the steps are linear in sigma, and their number is a divisor
    lora_targets = {
        "attention": r"transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)",
        # Nothing reads the last block's text, so that its `add_q_proj` learns nothing.
        "attention+text": r"transformer_blocks\.\d+\.attn1\."
        r"(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)",
    }
    float8_layers = r"transformer_blocks\.\d+\.(attn1|ff|ff_context)\..+"
    fuses_modulation = True
    embedder, rope_tokens = "patch_embed", 0
    # Without mlp_x.w1 and mlp_y.w1: there the halves, gate and value, are in the other order.
    original_layers = {
        original: tuple(f"transformer_blocks.{{}}.{layer}" for layer in layers)
        for original, layers in {
            "blocks.{}.attn.qkv_x": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
            "blocks.{}.attn.proj_x": ("attn1.to_out.0",),
            "blocks.{}.attn.qkv_y": ("attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj"),
            "blocks.{}.attn.proj_y": ("attn1.to_add_out",),
            "blocks.{}.mlp_x.w2": ("ff.net.2",),
            "blocks.{}.mlp_y.w2": ("ff_context.net.2",),
        }.items()
    }
    caption_tokens = 255  # and </s>
    fp32_components = ("vae", "text_encoder")
    tiny_version = 2

    def read_geometry(
        self,
        path: str,
        index: Mapping[str, Any],
        transformer: Mapping[str, Any],
        vae: Mapping[str, Any],
    ) -> Geometry:
        channels = transformer["in_channels"]
        latent_channels = vae.get("latent_channels", 12)
        if channels != latent_channels or transformer.get("out_channels") not in (None, channels):
            raise ConfigError(
                f"{path} is not a text-to-video model: its transformer takes {channels} channels "
                f"and gives {transformer.get('out_channels') or channels}, its VAE has "
                f"{latent_channels}; family=mochi takes models such as {self.default_path}."
            )
        return Geometry(
            temporal=math.prod(vae.get("temporal_expansions", (1, 2, 3))),
            spatial=math.prod(vae.get("spatial_expansions", (2, 2, 2))),
            patch=self.patch_of(transformer),
            latent_channels=channels,
            layers=transformer["num_layers"],
            heads=transformer["num_attention_heads"],
            head_dim=transformer["attention_head_dim"],
        )

    def patch_of(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        return 1, config["patch_size"], config["patch_size"]

    def load_pipeline(
        self, path: str, revision: str | None, *, transformer: Any = None, **options: Any
    ) -> Any:
        """As the others, around a transformer that takes the pipeline's fp32 latents and text."""
        pipe = super().load_pipeline(path, revision, transformer=transformer, **options)
        if transformer is not None and _cast not in transformer._forward_pre_hooks.values():
            transformer.register_forward_pre_hook(_cast, with_kwargs=True)
        return pipe

    def set_processors(
        self, transformer: Any, attention: SparseAttention, fused_norms: bool
    ) -> None:
        for index, block in enumerate(transformer.transformer_blocks):
            # It has no setter.
            block.attn1.processor = MochiJointAttention(index, attention, fused_norms)
        if not isinstance(transformer.rope, QuietRope):
            transformer.rope = QuietRope(transformer.rope)

    def fuse_modulation(self, transformer: Any, fused: bool) -> None:
        for block in transformer.transformer_blocks:  # the text's are of 256 tokens at most
            norms = [restore(norm) for norm in (block.norm1, block.norm2, block.norm3, block.norm4)]
            if fused:
                norms = [MochiZeroNorm(norms[0]), *map(MochiNorm, norms[1:])]
            block.norm1, block.norm2, block.norm3, block.norm4 = norms

    def extend_rope(self, stock: Any, rope: RopePolicy, config: Mapping[str, Any]) -> nn.Module:
        return QuietRope(stock, rope)

    def chunk_mlp(self, transformer: Any, tokens: int) -> None:
        for block in transformer.transformer_blocks:  # the text's is at most 256 tokens long
            block.ff = ChunkedFeedForward(block.ff, tokens)

    def encode_text(self, pipe: Any, caption: str) -> Text:
        # One caption a call: the pipeline zeroes an empty one only if it is the last of its batch.
        with torch.no_grad():
            embeds, mask, *_ = pipe.encode_prompt(caption, do_classifier_free_guidance=False)
        return {"prompt_embeds": trim(embeds[0], mask[0])}

    def pipeline_inputs(self, text: Text, negative: Text | None, guidance: float) -> dict[str, Any]:
        texts = {"prompt": text}
        if negative is not None:
            texts["negative_prompt"] = negative
        # To one length: the pipeline stacks them.
        embeds, mask = pad([text["prompt_embeds"] for text in texts.values()])
        inputs: dict[str, Any] = {"guidance_scale": guidance}
        for name, row, valid in zip(texts, embeds, mask, strict=True):
            inputs |= {f"{name}_embeds": row[None], f"{name}_attention_mask": valid[None]}
        return inputs

    def encode_chunks(self, vae: Any, pixels: Tensor) -> Iterator[Tensor]:
        """As `vae.encode`, tiles in space included, with the memory of `EncoderInParts`."""
        kept = (*vae.parameters(), *vae.buffers(), vae.decoder)
        vae = copy.deepcopy(vae, {id(part): part for part in kept})
        vae.encoder = EncoderInParts(vae.encoder, vae.num_sample_frames_batch_size)
        yield vae.encode(scaled(vae, pixels)).latent_dist.mode()

    def decode_chunks(self, vae: Any, latents: Tensor) -> Iterator[Tensor]:
        """As `vae.decode` without tiles, `vae.num_latent_frames_batch_size` latent frames (2) at a
        time; equal to it but for the rounding of convolutions, which goes by their size.

        At 480 x 848 the 12 frames of a chunk take 2.3 GiB in fp32 at the decoder's full resolution
        (128 channels), about five times over within a block, and the past frames that the
        convolutions keep 4.9 GiB: some 17 GiB, whatever the length.
        """
        decoder = continuing(vae.decoder)
        padding = vae.temporal_compression_ratio - 1  # frames before the first
        for chunk in latents.split(vae.num_latent_frames_batch_size, dim=2):
            pixels, _ = decoder(chunk)
            yield pixels[:, :, padding:]
            padding = 0

    def normalise(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = channel_statistics(vae, latents)
        return (latents - mean) * vae.config.scaling_factor / std

    def denormalise(self, vae: Any, latents: Tensor) -> Tensor:
        latents = latents.to(vae.dtype)
        mean, std = channel_statistics(vae, latents)
        return latents * std / vae.config.scaling_factor + mean  # rounded as the pipeline rounds

    # Mochi's time runs from noise to the video, and its velocity with it (genmo's `ut = z - eps`).
    # The scheduler's sigmas do too, but only once `set_timesteps` has inverted them: none are taken
    # from it.

    def timestep(self, sigma: Tensor) -> Tensor:
        return 1000 * (1 - sigma)

    def target(self, clean: Tensor, noise: Tensor) -> Tensor:
        return clean - noise

    def build_tiny(self) -> Any:
        """Two heads, three layers, and the real compression, which the stock pipeline has built in.

        103 frames of 160 x 192 are 2160 tokens.
        """
        from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

        text_width = 32
        transformer = diffusers_class(self.transformer_name)(
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
        let_attention_speak(
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
            # Its Fourier features, random functions of a pixel's last bits, would drown the rest.
            vae.encoder.proj_in.weight[:, 3:] *= 0.02
        mean, std = latent_statistics(vae, 31, 160, 192)
        vae.register_to_config(latents_mean=mean, latents_std=std)
        tokenizer = ByT5Tokenizer(model_max_length=self.text_tokens)
        text_encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=text_width,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
            )
        ).eval()
        scheduler = diffusers_class("FlowMatchEulerDiscreteScheduler")(invert_sigmas=True)
        return self.pipeline_class(scheduler, vae, text_encoder, tokenizer, transformer.eval())


class MochiJointAttention(LayerProcessor):
    """The stock one loops over the samples and cuts their padding off; here the plan knows it."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        q, k, v = _heads(attn, hidden_states, attn.to_q, attn.to_k, attn.to_v)
        text_layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_q, text_k, text_v = _heads(attn, encoder_hidden_states, *text_layers)
        # cos and sin are [S, H, D / 2]: every head has learned its own frequencies.
        if self.fused_norms:
            added_q, added_k = attn.norm_added_q, attn.norm_added_k
            q = norm_and_rotate(q, attn.norm_q, *image_rotary_emb, text=text_q, text_norm=added_q)
            k = norm_and_rotate(k, attn.norm_k, *image_rotary_emb, text=text_k, text_norm=added_k)
            v = torch.cat([v, text_v], dim=1)
        else:
            # In fp32 from the start, so that the gradients of the two products that each element is
            # in meet in fp32.
            q, k = (
                rotate(norm(x).float(), *image_rotary_emb).type_as(v)
                for norm, x in ((attn.norm_q, q), (attn.norm_k, k))
            )
            text = (attn.norm_added_q(text_q), attn.norm_added_k(text_k), text_v)
            q, k, v = (
                torch.cat([x, _gathered(y)], dim=1) for x, y in zip((q, k, v), text, strict=True)
            )
        out = self.attention.attention(self.layer_index, q, k, v).flatten(2)
        video, context = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        for module in attn.to_out:
            video = module(video)
        # The last block's text goes nowhere, and it has no projection for it.
        return video, context if attn.context_pre_only else attn.to_add_out(context)


class QuietRope(nn.Module):
    """The stock RoPE tables without its switch to an fp32 autocast, which a CPU refuses with a
    warning: the arithmetic is in fp32 anyway. Temporal positions, raw indices of latent frames, are
    scaled by the policy: that is the same as to interpolate each learned frequency."""

    def __init__(self, stock: Any, policy: RopePolicy = NATIVE) -> None:
        super().__init__()
        self.stock, self.policy = stock, policy

    def forward(
        self,
        pos_frequencies: Tensor,
        num_frames: int,
        height: int,
        width: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        positions = self.stock._get_positions(num_frames, height, width, device, dtype)
        positions[:, 0] *= self.policy.scale
        with torch.autocast(pos_frequencies.device.type, enabled=False):
            angles = torch.einsum("nd,dhf->nhf", positions.float(), pos_frequencies.float())
        return angles.cos(), angles.sin()


def _heads(attn: Any, x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """`[B, S, H, D]` of each projection of `[B, S, C]`."""
    return [layer(x).unflatten(2, (attn.heads, -1)) for layer in layers]


def _gathered(text: Tensor) -> Tensor:
    """`[B, S, H, D]` as it is, with gradients that lie head after head in memory as those of the
    stock model's gathered tokens do: sums over them are then the same to the bit. Copies the text
    alone, at most 256 tokens of a sequence of 44,520 and more."""
    every = torch.arange(text.shape[1], device=text.device)
    return text.transpose(1, 2).index_select(2, every).transpose(1, 2)


def _cast(transformer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook: latents and text in the transformer's dtype.

    The pipeline keeps latents in the text encoder's, and passes them on as they are.
    """
    names = {"hidden_states", "encoder_hidden_states"} & kwargs.keys()
    return args, kwargs | {name: kwargs[name].to(transformer.dtype) for name in names}
