"""A tiny HunyuanVideo of random weights, for tests and demos."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..names import diffusers_class
from ..tiny import amplify_attention, latent_statistics

# How Llama 3 splits text before its byte-level BPE (tokenizer.json of Meta-Llama-3-8B).
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build() -> Any:
    """Build a pipeline with two heads and two blocks of either kind.

    Every part of the published model is there, but small. The compression is the real one,
    4 x 8 x 8, and the tokenizer reads the pipeline's prompt template as the 95 tokens that the
    pipeline cuts off.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    text_width, pooled_width, channels = 32, 16, 4
    transformer = diffusers_class("HunyuanVideoTransformer3DModel")(
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
    amplify_attention(
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
    pipe = diffusers_class("HunyuanVideoPipeline")(
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer.eval(),
        vae=vae,
        scheduler=diffusers_class("FlowMatchEulerDiscreteScheduler")(shift=7.0),
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    )
    # As published; transformers 5 misreads this name, which is why `load_tokenizers` exists.
    pipe.register_to_config(tokenizer=("transformers", "LlamaTokenizerFast"))
    return pipe


def _llama_tokenizer() -> Any:
    """Return a byte-level BPE like Llama 3's that knows the words of the prompt template."""
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
    """Return CLIP's tokenizer without merges: two tokens for every byte, within a word or at its
    end."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{x}</w>" for x in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    with tempfile.TemporaryDirectory() as folder:  # transformers 4 reads it only from files
        Path(folder, "vocab.json").write_text(json.dumps(vocab))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77)
