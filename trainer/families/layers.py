"""Names of a transformer's layers, by what uses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class MlpLayers:
    """Names the first and the last linear layer of an MLP, within a block.

    shares_output: True if the last layer is attention's output projection as well.
    """

    first: str
    last: str
    shares_output: bool = False


@dataclass(frozen=True)
class LayerNames:
    """Names the layers of a family's transformer; patterns are regexes of whole names.

    Names in the model:
    lora_targets: patterns by the names that `lora.targets` takes; the first is the default.
    original: layers of the published checkpoint, as ComfyUI names them, each with the diffusers
        layers whose outputs it holds one after another. `{}` is the index of a block.
    float8: a pattern of the layers over all tokens in the blocks, which `memory/float8.py` stores
        in 8 bits.

    Names within a block, by which `longreel plan` counts:
    mlp: the MLP; blocks of several kinds are told apart by which of these they have.
    text: linear layers that see the text alone.
    modulation: linear layers that see one vector a sample.
    text_norms: norms of the text's tokens.
    qk_norms: norms of queries and keys.
    qkv: the last part of the names of projections that share their input.
    attention_out: the last part of the name of attention's output projection.
    """

    lora_targets: Mapping[str, str]
    original: Mapping[str, tuple[str, ...]]
    float8: str
    mlp: tuple[MlpLayers, ...]
    text: str
    text_norms: str
    modulation: str = r"norm.*"
    qk_norms: str = r"attn.*\.norm_[qk]"
    qkv: str = r"to_[qkv]"
    attention_out: str = "to_out.0"

    def target_pattern(self, targets: str | None) -> str:
        """Return the regex that `lora.targets` means: one of `lora_targets` by name, the first for
        None, or the given regex itself."""
        if targets is None:
            return next(iter(self.lora_targets.values()))
        return self.lora_targets.get(targets, targets)
