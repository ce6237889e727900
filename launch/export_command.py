"""`longreel export`: an adapter for ComfyUI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..trainer.config.fields import setting
from ..trainer.config.values import ConfigError, parse

USAGE = "longreel export lora=RUN [key=value ...]"


@dataclass(frozen=True)
class ExportOptions:
    """The options of `longreel export`."""

    lora: str = setting("", "A run, one of its checkpoints, or an adapter file.")
    out: str | None = setting(
        None, "The safetensors file to write; null is RUN_comfyui.safetensors in the run's folder."
    )
    dtype: Literal["float32", "bfloat16"] = setting("float32", "Precision of the written tensors.")
    model: str | None = setting(
        None, "Folder or repository of the base model, if it has moved since training."
    )
    cache: str = setting("cache", "Folder of tiny models.")


OPTIONS = ExportOptions


def export(argv: list[str]) -> None:
    """Write the adapter and print the file's name."""
    options = parse(ExportOptions, argv)
    if not options.lora:
        raise ConfigError("lora=... is missing. `longreel export --help` lists the keys.")

    import torch

    from ..trainer.sampling.comfyui import export_comfyui

    file = export_comfyui(
        options.lora,
        options.out,
        model_path=options.model,
        dtype=getattr(torch, options.dtype),
        cache_dir=options.cache,
    )
    print(file)
