"""A model family: one video diffusion model in its diffusers form, as longreel adapts it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...sparse.attention import SparseAttention
from .attention import AttentionAdapter
from .blocks import BlockAdapter
from .defaults import Defaults
from .geometry import Geometry
from .layers import LayerNames
from .loader import Loader, ModelConfigs
from .names import ModelNames
from .noising import NoisingConvention
from .rope import RopeAdapter
from .split import SequenceSplit
from .text import TextConditioning
from .vae import VideoCodec


@dataclass(frozen=True, eq=False)
class ModelFamily:
    """Composes a family of one part per concern.

    The file of a part's contract has the field's name (`text.py` for `text`), and so has the file
    of a family's own part (`wan/text.py`). Parts keep no state: one instance serves every model of
    the family.

    names: what the model is called at diffusers and on the Hub.
    defaults: frame rate, native length, guidance and steps.
    loader: files, tokenizers, transformers and pipelines.
    geometry: sizes of a model; valid lengths and resolutions, latent shapes, the token grid.
    text: captions for the cache, the transformer and the pipeline.
    attention: processors around `SparseAttention`, and the plan of a forward.
    rope: temporal positions beyond the native length.
    blocks: chunked MLPs and fused norms.
    layers: names of layers, for LoRA, export, float8 and memory estimates.
    split: where sequence parallelism cuts.
    noising: timestep, target and prediction.
    vae: encoding and decoding of clips.
    """

    names: ModelNames
    defaults: Defaults
    loader: Loader
    geometry: type[Geometry]
    text: TextConditioning
    attention: AttentionAdapter
    rope: RopeAdapter
    blocks: BlockAdapter
    layers: LayerNames
    split: SequenceSplit
    noising: NoisingConvention
    vae: VideoCodec

    @property
    def name(self) -> str:
        """The value of `family=` in recipes."""
        return self.names.family

    def read_geometry(self, path: str, revision: str | None = None) -> Geometry:
        """Read a model's sizes from its JSON files.

        Raises ConfigError for missing files and for models that this family does not cover.
        """
        return self.geometry.read(self.names, self.loader.read_configs(path, revision))

    def geometry_of(self, pipe: Any) -> Geometry:
        """Return the sizes of a loaded pipeline."""
        return self.geometry.read(self.names, ModelConfigs.from_pipeline(pipe))

    def install(
        self,
        transformer: Any,
        attention: SparseAttention,
        *,
        fused_norms: bool = False,
        fused_modulation: bool = False,
    ) -> None:
        """Let `attention` compute the transformer's self-attention, in training and in pipelines.

        This replaces what an earlier call installed. fused_norms, fused_modulation: as
        `AttentionAdapter.install` and `BlockAdapter.fuse_modulation` take them; raises ConfigError
        if the family cannot fuse modulation.
        """
        self.blocks.check_modulation(fused_modulation)
        self.attention.install(transformer, attention, fused_norms)
        self.blocks.fuse_modulation(transformer, fused_modulation)
