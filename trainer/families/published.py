"""Sizes of published models by repository, for plans before a file is downloaded.

diffusers' defaults are each architecture's largest published model; this file holds what differs.
The text encoders' sizes are those of their own published configs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .base import ModelFamily
from .geometry import Geometry
from .loader import ModelConfigs
from .names import diffusers_class

_T5_XXL: dict[str, Any] = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
_LLAMA_3_8B: dict[str, Any] = {
    "vocab_size": 128320,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
_UMT5_XXL = {"text_encoder": ("UMT5EncoderModel", _T5_XXL | {"vocab_size": 256384})}


@dataclass(frozen=True)
class Published:
    """Describes a published model.

    vae: a diffusers class, at its defaults. text: a transformers class and its settings by
    component. transformer: settings that differ from diffusers' defaults.
    """

    vae: str
    text: Mapping[str, tuple[str, Mapping[str, Any]]]
    transformer: Mapping[str, Any] = field(default_factory=dict)


PUBLISHED: dict[str, Published] = {
    "hunyuanvideo-community/HunyuanVideo": Published(
        "AutoencoderKLHunyuanVideo",
        {
            "text_encoder": ("LlamaModel", _LLAMA_3_8B),
            "text_encoder_2": ("CLIPTextModel", _CLIP_L),
        },
    ),
    "genmo/mochi-1-preview": Published(
        "AutoencoderKLMochi",
        {"text_encoder": ("T5EncoderModel", _T5_XXL | {"vocab_size": 32128})},
    ),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": Published("AutoencoderKLWan", _UMT5_XXL),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": Published(
        "AutoencoderKLWan",
        _UMT5_XXL,
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    ),
}


def published_geometry(family: ModelFamily, path: str, revision: str | None) -> Geometry | None:
    """Return the sizes of a published model without reading files; None for other models."""
    known = _published(path, revision)
    if known is None:
        return None
    index = {"_class_name": family.names.pipeline}
    transformer = _defaults(family.names.transformer) | dict(known.transformer)
    configs = ModelConfigs(path, index, transformer, _defaults(known.vae))
    return family.geometry.read(family.names, configs)


def blank_transformer(family: ModelFamily, path: str, revision: str | None) -> Any:
    """Build the transformer on the meta device, from published sizes or the model's files."""
    known = _published(path, revision)
    if known is None:
        return family.loader.blank_transformer(path, revision)
    with torch.device("meta"):
        return family.names.transformer_class(**known.transformer)


def blank_encoders(family: ModelFamily, path: str, revision: str | None) -> tuple[Any, list[Any]]:
    """Build the VAE and the text encoders on the meta device.

    Raises ConfigError for missing files.
    """
    import transformers

    known = _published(path, revision)
    if known is not None:
        with torch.device("meta"):
            texts = []
            for name, settings in known.text.values():
                cls = getattr(transformers, name)
                texts.append(cls(cls.config_class(**settings)))
            return diffusers_class(known.vae)(), texts
    index = family.loader.read_json(path, revision, "model_index.json")
    with torch.device("meta"):
        vae_class = diffusers_class(index["vae"][1])
        vae = vae_class.from_config(family.loader.read_json(path, revision, "vae/config.json"))
        texts = []
        for component in family.loader.text_components:
            if component.startswith("text_encoder"):
                cls = getattr(transformers, index[component][1])
                settings = family.loader.read_json(path, revision, f"{component}/config.json")
                texts.append(cls(cls.config_class.from_dict(settings)))
    return vae, texts


def _published(path: str, revision: str | None) -> Published | None:
    return PUBLISHED.get(path) if revision is None else None


def _defaults(name: str) -> dict[str, Any]:
    """Return the default settings of a diffusers class."""
    parameters = inspect.signature(diffusers_class(name).__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}
