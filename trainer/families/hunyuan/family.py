"""HunyuanVideo text-to-video: blocks of two streams, then of one, over `[video, text]`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....sparse.attention import SparseAttention
from ...config.values import ConfigError
from ..base import Geometry, Text, diffusers_class
from ..chunked import ChunkedFeedForward, chunked
from ..codec import mode, scaled
from ..joint import JointFamily, pad, trim
from ..norm_rope import norm_and_rotate, rotate
from ..processor import LayerProcessor
from ..rope import RopePolicy, TemporalAxis, TemporalRope
from ..tiny import latent_statistics, let_attention_speak

DUAL, SINGLE = "transformer_blocks", "single_transformer_blocks"
ATTENTION = rf"{DUAL}\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)|{SINGLE}\.\d+\.attn\.to_[qkv]"

# How Llama 3 splits text before its byte-level BPE (tokenizer.json of Meta-Llama-3-8B).
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Hunyuan(JointFamily):
    name = "hunyuan"
    pipeline_name = "HunyuanVideoPipeline"
    transformer_name = "HunyuanVideoTransformer3DModel"
    default_path = "hunyuanvideo-community/HunyuanVideo"
    fps = 24
    native_frames = 125
    guidance = 6.0
    steps = 50
    train_guidance = 1.0  # as FastVideo (its issue 140) and finetrainers train
    lora_targets = {
        "attention": ATTENTION,
        "attention+text": rf"{ATTENTION}|{DUAL}\.\d+\.attn\.(add_[qkv]_proj|to_add_out)",
        # A single block's attention output has no projection of its own: it shares the MLP's.
        "attention+fused": rf"{ATTENTION}|{SINGLE}\.\d+\.proj_out",
    }
    float8_layers = rf"({DUAL}|{SINGLE})\.\d+\.((attn|ff|ff_context)\..+|proj_mlp|proj_out)"
    embedder, rope_tokens = "x_embedder", 0
    original_layers = {
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
    }
    text_components = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    tiny_version = 2

    def read_geometry(
        self,
        path: str,
        index: Mapping[str, Any],
        transformer: Mapping[str, Any],
        vae: Mapping[str, Any],
    ) -> Geometry:
        channels = transformer["in_channels"]
        if transformer.get("image_condition_type") or channels != vae["latent_channels"]:
            raise ConfigError(
                f"{path} is an image-to-video model, which is not supported yet; family=hunyuan "
                f"takes HunyuanVideo text-to-video, such as {self.default_path}."
            )
        return Geometry(
            temporal=vae.get("temporal_compression_ratio", 4),
            spatial=vae.get("spatial_compression_ratio", 8),
            patch=self.patch_of(transformer),
            latent_channels=channels,
            layers=transformer["num_layers"] + transformer["num_single_layers"],
            heads=transformer["num_attention_heads"],
            head_dim=transformer["attention_head_dim"],
            rope=_temporal_axis(transformer),
            guidance_embeds=transformer["guidance_embeds"],
        )

    def patch_of(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        return config["patch_size_t"], config["patch_size"], config["patch_size"]

    def load_tokenizers(self, path: str, revision: str | None) -> dict[str, Any]:
        """Llama 3's tokenizer as its tokenizer.json has it.

        The published index names LlamaTokenizerFast, under which transformers 5 builds a
        SentencePiece tokenizer of the same vocabulary: other ids, and no error.
        """
        from transformers import PreTrainedTokenizerFast

        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(
                path, subfolder="tokenizer", revision=revision or "main", padding_side="right"
            )
        except ValueError as error:  # its own, about converters, for files that are missing
            raise FileNotFoundError("tokenizer/tokenizer.json cannot be read.") from error
        splitter = tokenizer.backend_tokenizer.pre_tokenizer
        # As bytes are written: a ByteLevel splitter, alone or in a Sequence, makes Ċ of a newline.
        if splitter is None or splitter.pre_tokenize_str("\n")[0][0] != "Ċ":
            raise ConfigError(
                f"tokenizer/tokenizer.json of {path} has {type(splitter).__name__} in place of the "
                "ByteLevel pre-tokenizer of Llama 3, so captions would get other ids than the "
                "model was trained with. Saving it with transformers 5 does that: fetch the files "
                f"again with `hf download {self.default_path} --include 'tokenizer/*'`."
            )
        return {"tokenizer": tokenizer}

    def set_processors(
        self, transformer: Any, attention: SparseAttention, fused_norms: bool
    ) -> None:
        # The token refiner's attention, over text alone, stays as it is.
        blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
        for index, block in enumerate(blocks):
            block.attn.set_processor(HunyuanAttention(index, attention, fused_norms))

    def extend_rope(self, stock: Any, rope: RopePolicy, config: Mapping[str, Any]) -> nn.Module:
        axis = _temporal_axis(config)
        return TemporalRope(
            stock, rope, axis, patch=config["patch_size_t"], token_dim=self.rope_tokens
        )

    def chunk_mlp(self, transformer: Any, tokens: int) -> None:
        for block in transformer.transformer_blocks:  # the text's is at most 256 tokens long
            block.ff = ChunkedFeedForward(block.ff, tokens)
        singles = transformer.single_transformer_blocks
        for index, block in enumerate(singles):
            singles[index] = ChunkedSingleBlock(block, tokens)

    def encode_text(self, pipe: Any, caption: str) -> Text:
        with torch.no_grad():
            embeds, pooled, mask = pipe.encode_prompt(caption)
        text = trim(embeds[0], mask[0])
        if not len(text):  # even "" ends with <|eot_id|>; a mean over no token would be NaN
            raise ConfigError(
                "The prompt template alone fills the text encoder's window, so captions do not "
                "reach the model: the folder tokenizer/ is not HunyuanVideo's. Fetch it again with "
                f"`hf download {self.default_path} --include 'tokenizer/*'`."
            )
        return {"prompt_embeds": text, "pooled_prompt_embeds": pooled[0].cpu().clone()}

    def collate_text(self, texts: Sequence[Text]) -> Text:
        pooled = torch.stack([text["pooled_prompt_embeds"] for text in texts])
        return super().collate_text(texts) | {"pooled_projections": pooled}

    def pipeline_inputs(self, text: Text, negative: Text | None, guidance: float) -> dict[str, Any]:
        inputs = _pipeline_text(text)
        if negative is None:
            return inputs | {"guidance_scale": guidance}
        inputs |= {f"negative_{name}": x for name, x in _pipeline_text(negative).items()}
        return inputs | {"true_cfg_scale": guidance, "guidance_scale": 1.0}

    def encode_chunks(self, vae: Any, pixels: Tensor) -> Iterator[Tensor]:
        # As `vae.encode`: tiles of some frames and one before them, each faded into the next. Only
        # the last one is kept.
        step, size = vae.tile_sample_stride_num_frames, vae.tile_sample_min_num_frames
        if not vae.use_framewise_encoding or len(pixels) <= size:
            yield mode(_encode_tile(vae, scaled(vae, pixels)))
            return
        ratio = vae.temporal_compression_ratio
        left, before = (len(pixels) - 1) // ratio + 1, None
        for start in range(0, len(pixels), step):
            tile = _encode_tile(vae, scaled(vae, pixels[start : start + size + 1]))
            if before is None:
                chunk = tile[:, :, : step // ratio + 1]
            else:
                tile = vae.blend_t(before, tile[:, :, 1:], (size - step) // ratio)
                chunk = tile[:, :, : step // ratio]
            chunk = chunk[:, :, :left]
            before, left = tile, left - chunk.shape[2]
            if chunk.shape[2]:  # a last tile may hold just the frame before it
                yield mode(chunk)

    def decode_chunks(self, vae: Any, latents: Tensor) -> Iterator[Tensor]:
        # As `vae.decode`: tiles of some latent frames and one before them, each faded into the
        # next. Only the last one is kept.
        step, size = vae.tile_sample_stride_num_frames, vae.tile_sample_min_num_frames
        latent_step, latent_size = (n // vae.temporal_compression_ratio for n in (step, size))
        if not vae.use_framewise_decoding or latents.shape[2] <= latent_size:
            yield _decode_tile(vae, latents)
            return
        left = (latents.shape[2] - 1) * vae.temporal_compression_ratio + 1
        before = None
        for start in range(0, latents.shape[2], latent_step):
            tile = _decode_tile(vae, latents[:, :, start : start + latent_size + 1])
            if before is None:
                chunk = tile[:, :, : step + 1]
            else:
                tile = vae.blend_t(before, tile[:, :, 1:], size - step)
                chunk = tile[:, :, :step]
            chunk = chunk[:, :, :left]
            before, left = tile, left - chunk.shape[2]
            if chunk.shape[2]:  # a last tile may hold just the frame before it
                yield chunk

    def normalise(self, vae: Any, latents: Tensor) -> Tensor:
        return latents * vae.config.scaling_factor

    def denormalise(self, vae: Any, latents: Tensor) -> Tensor:
        return latents.to(vae.dtype) / vae.config.scaling_factor

    def timestep(self, sigma: Tensor) -> Tensor:
        return 1000 * sigma

    def target(self, clean: Tensor, noise: Tensor) -> Tensor:
        return noise - clean

    def build_tiny(self) -> Any:
        """Two heads, two blocks of either kind, every part as in the published model but small.

        The compression is the real one, 4 x 8 x 8, and the tokenizer reads the pipeline's prompt
        template as the 95 tokens that the pipeline cuts off.
        """
        from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

        text_width, pooled_width, channels = 32, 16, 4
        transformer = diffusers_class(self.transformer_name)(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=channels,
            out_channels=channels,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=text_width,
            pooled_projection_dim=pooled_width,
            rope_axes_dim=(4, 6, 6),
        )
        dual, single = transformer.transformer_blocks, transformer.single_transformer_blocks
        width = transformer.proj_out.in_features
        norms = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
        let_attention_speak(
            transformer,
            # The third of six parts of a dual block's modulation, the third of three of a single's.
            gates=[
                norm.linear.bias[2 * width : 3 * width]
                for norm in (
                    *(n for block in dual for n in (block.norm1, block.norm1_context)),
                    *(block.norm for block in single),
                )
            ],
            norms=[getattr(block.attn, name) for block in (*dual, *single) for name in norms],
        )
        vae = diffusers_class("AutoencoderKLHunyuanVideo")(
            latent_channels=channels,
            block_out_channels=(4, 4, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
        ).eval()
        mean, std = latent_statistics(vae, 17, 192, 224)
        vae.quant_conv.bias.data[:channels] -= torch.tensor(mean)  # its config has a scale alone
        vae.register_to_config(scaling_factor=round(channels / sum(std), 4))
        tokenizer, tokenizer_2 = _llama_tokenizer(), _clip_tokenizer()
        text_encoder = LlamaModel(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=text_width,
                intermediate_size=64,
                num_attention_heads=4,
                num_hidden_layers=4,  # the pipeline takes the third last state
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        ).eval()
        text_encoder_2 = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer_2),
                hidden_size=pooled_width,
                intermediate_size=32,
                num_attention_heads=2,
                num_hidden_layers=2,
                projection_dim=pooled_width,
                bos_token_id=tokenizer_2.bos_token_id,
                eos_token_id=tokenizer_2.eos_token_id,
                pad_token_id=tokenizer_2.pad_token_id,
            )
        ).eval()
        pipe = self.pipeline_class(
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer.eval(),
            vae=vae,
            scheduler=diffusers_class("FlowMatchEulerDiscreteScheduler")(shift=7.0),
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )
        # As published: what transformers 5 makes of this name is why `load_tokenizers` exists.
        pipe.register_to_config(tokenizer=("transformers", "LlamaTokenizerFast"))
        return pipe


class HunyuanAttention(LayerProcessor):
    """In a dual block text has projections of its own, in a single block it shares the video's. The
    mask that the model builds is ignored: the plan knows the lengths, and a mask would cost SDPA
    its fused kernels.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert image_rotary_emb is not None
        video, text = hidden_states, encoder_hidden_states
        lengths, dual = [video.shape[1], text.shape[1]], attn.add_q_proj is not None
        if not dual:
            video = torch.cat([video, text], dim=1)
        projections = (attn.to_q, attn.to_k, attn.to_v)
        q, k, v = (project(video).unflatten(2, (attn.heads, -1)) for project in projections)
        tq = tk = None
        if dual:
            projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            tq, tk, tv = (project(text).unflatten(2, (attn.heads, -1)) for project in projections)
            v = torch.cat([v, tv], dim=1)
        # Each value comes twice, for a pair; text has no position.
        cos, sin = (table[:, 0::2] for table in image_rotary_emb)
        norm = self._fused if self.fused_norms else self._stock
        q = norm(q, attn.norm_q, cos, sin, tq, attn.norm_added_q)
        k = norm(k, attn.norm_k, cos, sin, tk, attn.norm_added_k)
        out = self.attention.attention(self.layer_index, q, k, v).flatten(2)
        video, text = out.split(lengths, dim=1)
        if dual:
            for module in attn.to_out:
                video = module(video)
            text = attn.to_add_out(text)
        return video, text

    def _stock(
        self, x: Tensor, norm: Any, cos: Tensor, sin: Tensor, text: Tensor | None, text_norm: Any
    ) -> Tensor:
        """Norms, RoPE of the video's tokens, and text after them, module by module."""
        x, video = norm(x), len(cos)
        rest = x[:, video:] if text is None else text_norm(text)
        return torch.cat([rotate(x[:, :video], cos[:, None], sin[:, None]), rest], dim=1)

    def _fused(
        self, x: Tensor, norm: Any, cos: Tensor, sin: Tensor, text: Tensor | None, text_norm: Any
    ) -> Tensor:
        """The same in one kernel."""
        return norm_and_rotate(
            x, norm, cos, sin, text=text, text_norm=text_norm, round_before_weight=True
        )


def _temporal_axis(config: Mapping[str, Any]) -> TemporalAxis:
    """Of the transformer's config."""
    dim = config.get("rope_axes_dim", (16, 56, 56))[0]
    return TemporalAxis(dim, config.get("rope_theta", 256.0), torch.float32)


class ChunkedSingleBlock(nn.Module):
    """The stock single-stream block with its MLP chunked; it adopts the stock one's children.

    The stock block holds the MLP's inside, four times as wide as the model, and beside attention's
    output once more, for the one projection that both share: 5.7 and 7.1 GB in bf16 for 230,400
    tokens. Here both are a chunk long.
    """

    def __init__(self, stock: Any, tokens: int) -> None:
        super().__init__()
        self.attn, self.norm, self.proj_mlp = stock.attn, stock.norm, stock.proj_mlp
        self.act_mlp, self.proj_out = stock.act_mlp, stock.proj_out
        self.tokens = tokens

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        *args: Any,
    ) -> tuple[Tensor, Tensor]:
        lengths = [hidden_states.shape[1], encoder_hidden_states.shape[1]]
        joint = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        normed, gate = self.norm(joint, emb=temb)
        video, text = normed.split(lengths, dim=1)
        attended = self.attn(video, text, attention_mask, image_rotary_emb=image_rotary_emb)
        out = chunked(self._project, self.tokens, normed, torch.cat(attended, dim=1))
        video, text = (gate.unsqueeze(1) * out + joint).split(lengths, dim=1)
        return video, text

    def _project(self, normed: Tensor, attended: Tensor) -> Tensor:
        inside = self.act_mlp(self.proj_mlp(normed))
        return self.proj_out(torch.cat([attended, inside], dim=2))


def _pipeline_text(text: Text) -> dict[str, Tensor]:
    embeds, mask = pad([text["prompt_embeds"]])
    return {
        "prompt_embeds": embeds,
        "prompt_attention_mask": mask,
        "pooled_prompt_embeds": text["pooled_prompt_embeds"][None],
    }


def _encode_tile(vae: Any, pixels: Tensor) -> Tensor:
    height, width = pixels.shape[-2:]
    if vae.use_tiling and (
        height > vae.tile_sample_min_height or width > vae.tile_sample_min_width
    ):
        return vae.tiled_encode(pixels)
    return vae.quant_conv(vae.encoder(pixels))


def _decode_tile(vae: Any, latents: Tensor) -> Tensor:
    """Pixels of latents that are not split over time, spatially tiled where the VAE would."""
    height, width = (size * vae.spatial_compression_ratio for size in latents.shape[-2:])
    if vae.use_tiling and (
        height > vae.tile_sample_min_height or width > vae.tile_sample_min_width
    ):
        return vae.tiled_decode(latents).sample
    return vae.decoder(vae.post_quant_conv(latents))


def _llama_tokenizer() -> Any:
    """A byte-level BPE in the manner of Llama 3 that knows the words of the prompt template."""
    from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    template = pipeline_hunyuan_video.DEFAULT_PROMPT_TEMPLATE
    special = [
        f"<|{name}|>"
        for name in ("begin_of_text", "pad", "eot_id", "start_header_id", "end_header_id")
    ]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A", special_tokens=[(special[0], 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2000,  # more than there are: every word becomes a token
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([template["template"]], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=special[0],
        pad_token=special[1],
        eos_token=special[2],
        additional_special_tokens=special[3:],
        model_max_length=1024,
        padding_side="right",
    )
    prefix = template["template"].partition("{}")[0]
    assert len(tokenizer(prefix).input_ids) == template["crop_start"]
    return tokenizer


def _clip_tokenizer() -> Any:
    """CLIP's tokenizer without a merge: a token for every byte, inside of a word or at its end."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{x}</w>" for x in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    with tempfile.TemporaryDirectory() as folder:  # transformers 4 reads it from files alone
        Path(folder, "vocab.json").write_text(json.dumps(vocab))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77)
