"""What longreel asks of a video model family; one file a family fills it in."""

from __future__ import annotations

import inspect
import json
import os
import tempfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...sparse.attention import SparseAttention
from ...sparse.grid import TokenGrid
from ..config.values import ConfigError
from .codec import VideoCodec
from .hub import hub_file
from .rope import NATIVE, RopePolicy, TemporalAxis, stock_rope

Text = dict[str, Tensor]


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model that decide shapes and cost, read from its JSON files alone.

    temporal, spatial: compression of the VAE. patch: latent frames, rows and columns of a token.
    rope: of the temporal axis; None when a model has learned its frequencies.
    max_positions: rows of the RoPE table along each axis; None when positions have no limit.
    guidance_embeds: whether the model is distilled to be told its guidance as an input.
    """

    temporal: int
    spatial: int
    patch: tuple[int, int, int]
    latent_channels: int
    layers: int
    heads: int
    head_dim: int
    rope: TemporalAxis | None = None
    max_positions: int | None = None
    guidance_embeds: bool = False

    def latent_frames(self, frames: int) -> int:
        return (frames - 1) // self.temporal + 1

    def positions(self, frames: int) -> int:
        """Temporal positions: latent frames, unless a token spans several."""
        return self.latent_frames(frames) // self.patch[0]


class ModelFamily(VideoCodec):
    """One video diffusion model in its diffusers form: files, shapes, conventions, attention.

    Stateless, so one instance serves every model of the family. `path` is a folder in the layout of
    the Hub or a repository there.
    """

    name: str
    pipeline_name: str  # diffusers class
    transformer_name: str  # diffusers class
    default_path: str  # repository on the Hub
    fps: int
    native_frames: int  # the length the model was trained at
    guidance: float  # when sampling, as the pipeline's authors advise
    steps: int  # likewise
    least_steps: int = 1  # that the pipeline's schedule can take
    train_guidance: float = 1.0  # told to a guidance-distilled model in training
    text_tokens: int = 0  # at most, in the sequence beside the video's
    joins_guidance: bool = False  # the pipeline runs both forwards of guidance as one batch
    context_tokens: int = 0  # that the video's attend to beside the sequence, by cross-attention
    caption_tokens: int  # of a caption that the text encoder reads; the rest is cut
    # Regexes of whole module names by the names that `lora.targets` takes; the first is the default
    lora_targets: Mapping[str, str]
    # The layers of the published checkpoint, as ComfyUI names them, each with the diffusers layers
    # whose outputs it holds one after another. `{}` is the index of a block.
    original_layers: Mapping[str, tuple[str, ...]]
    float8_layers: str  # a regex of the products over all tokens in the blocks (float8.py)
    fuses_modulation: bool = False  # its blocks' norms and gates can be fused (modulated.py)
    embedder: str  # the module that makes the video's tokens
    rope_tokens: int  # the dimension of a RoPE table that counts tokens
    text_components: tuple[str, ...] = ("tokenizer", "text_encoder")  # of the pipeline
    fp32_components: tuple[str, ...] = ("vae",)
    tiny_version: int  # to be raised with every change of `build_tiny`

    # Files

    def resolve(self, path: str | None, cache_dir: str | Path) -> str:
        """The model's folder or repository: `tiny` is built once under `cache_dir`, None is the
        family's documented repository, anything else comes back unchanged."""
        if path != "tiny":
            return path or self.default_path
        folder = Path(cache_dir).absolute() / f"tiny-{self.name}-{self.tiny_version}"
        if not folder.is_dir():
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(
                    f"The cache's folder {folder.parent} cannot be made ({error.strerror}): "
                    "name another."
                ) from error
            with tempfile.TemporaryDirectory(prefix=".tiny-", dir=folder.parent) as temporary:
                finished = Path(temporary) / folder.name
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    self.build_tiny().save_pretrained(finished)
                try:
                    os.replace(finished, folder)
                except OSError:
                    if not folder.is_dir():  # else another process was quicker
                        raise
        return str(folder)

    @abstractmethod
    def build_tiny(self) -> Any:
        """A small pipeline of random weights that runs on a CPU in seconds, from torch's seed."""

    def geometry(self, path: str, revision: str | None = None) -> Geometry:
        """Sizes from the model's JSON files; raises ConfigError when they are missing or describe a
        model that this family does not cover."""
        names = ("model_index.json", "transformer/config.json", "vae/config.json")
        index, transformer, vae = (self.read_json(path, revision, name) for name in names)
        if index["_class_name"] != self.pipeline_name:
            raise ConfigError(
                f"{path} holds a {index['_class_name']}; family={self.name} covers "
                f"{self.pipeline_name} only, such as {self.default_path}."
            )
        return self.read_geometry(path, index, transformer, vae)

    def geometry_of(self, pipe: Any) -> Geometry:
        """Geometry of a loaded pipeline."""
        name = type(pipe).__name__
        return self.read_geometry(name, pipe.config, pipe.transformer.config, pipe.vae.config)

    @abstractmethod
    def read_geometry(
        self,
        path: str,
        index: Mapping[str, Any],
        transformer: Mapping[str, Any],
        vae: Mapping[str, Any],
    ) -> Geometry:
        """Geometry from the pipeline's index and two configs; ConfigError for other variants."""

    def load_transformer(self, path: str, revision: str | None, dtype: torch.dtype) -> Any:
        """The transformer with its parameters in `dtype`, save those diffusers keeps in fp32."""
        with self._fetching(path):
            return diffusers_class(self.transformer_name).from_pretrained(
                path, subfolder="transformer", revision=revision, dtype=dtype
            )

    def blank_transformer(self, path: str, revision: str | None) -> Any:
        """The transformer's modules on the meta device, from its config: names and shapes alone."""
        with self._fetching(path), torch.device("meta"):
            cls = diffusers_class(self.transformer_name)
            config = cls.load_config(path, subfolder="transformer", revision=revision)
            return cls.from_config(config)

    def load_pipeline(
        self,
        path: str,
        revision: str | None,
        *,
        transformer: Any = None,
        text: bool = True,
        vae: bool = True,
        dtype: torch.dtype,
    ) -> Any:
        """The stock pipeline around `transformer`, in `dtype` but for `fp32_components`.

        Components that are not asked for are None, and their files are never read.
        """
        components: dict[str, Any] = {"transformer": transformer}
        with self._fetching(path):
            if text:
                components |= self.load_tokenizers(path, revision)
            else:
                components |= dict.fromkeys(self.text_components)
            if not vae:
                components["vae"] = None
            fp32 = dict.fromkeys(self.fp32_components, torch.float32)
            return self.pipeline_class.from_pretrained(
                path, revision=revision, dtype={"default": dtype, **fp32}, **components
            )

    def load_tokenizers(self, path: str, revision: str | None) -> dict[str, Any]:
        """Tokenizers that the pipeline would not load right by itself, by component."""
        return {}

    def caption_tokenizer(self, path: str, revision: str | None) -> Any:
        """The tokenizer that cuts captions at `caption_tokens`."""
        from transformers import AutoTokenizer

        with self._fetching(path):
            own = self.load_tokenizers(path, revision).get("tokenizer")
            return own or AutoTokenizer.from_pretrained(
                path, subfolder="tokenizer", revision=revision or "main"
            )

    @property
    def pipeline_class(self) -> Any:
        return diffusers_class(self.pipeline_name)

    def read_json(self, path: str, revision: str | None, name: str) -> dict[str, Any]:
        """One of the model's JSON files; raises ConfigError when it is missing."""
        with self._fetching(path):
            if Path(path).is_dir():
                file = Path(path) / name
            elif path.startswith(("/", ".", "~")):
                raise FileNotFoundError("there is no such folder.")
            else:
                file = Path(hub_file(path, revision, name))
            return json.loads(file.read_text())

    @contextmanager
    def _fetching(self, path: str) -> Iterator[None]:
        """Turn the many ways in which files can be missing into one message with the remedy."""
        try:
            yield
        except Exception as error:  # the Hub's client raises families of its own
            if not isinstance(error, OSError) and "huggingface_hub" not in type(error).__module__:
                raise
            reason = str(error).strip().splitlines()[0]
            local = f"models/{self.default_path.rpartition('/')[2]}"
            raise ConfigError(
                f"model.path={path} cannot be loaded: {reason}\n"
                f"Fetch the model once with `hf download {self.default_path} --local-dir {local}` "
                f"and set model.path={local} (model={local} for `longreel sample`, `export` and "
                "`cache show`); it takes any local folder in the layout of the Hub "
                "(model_index.json, transformer/, vae/, text_encoder/, ...), a repository, or "
                "`tiny`."
            ) from error

    # Settings

    def target_pattern(self, targets: str | None) -> str:
        """The regex of `lora.targets`: one of `lora_targets` by name, None for the first."""
        if targets is None:
            return next(iter(self.lora_targets.values()))
        return self.lora_targets.get(targets, targets)

    def check_steps(self, name: str, steps: int) -> None:
        """Raise ConfigError for a number of diffusion steps that the pipeline cannot take."""
        if steps < self.least_steps:
            raise ConfigError(
                f"{name}={steps}: the schedule of {self.name} takes at least {self.least_steps}."
            )

    # Shapes

    def frame_step(self, geometry: Geometry) -> int:
        """Valid lengths are a multiple of this plus one: what one more latent frame takes."""
        return geometry.temporal

    def check_frames(self, frames: int, geometry: Geometry, rope: RopePolicy = NATIVE) -> None:
        """Raise ConfigError, naming the nearest lengths, for one that the model cannot take."""
        step = self.frame_step(geometry)
        if frames < 1 or (frames - 1) % step:
            below = max(frames - 1, 0) // step * step + 1
            raise ConfigError(
                f"frames={frames}: {self.name} takes {step}k + 1 frames; the nearest are {below} "
                f"and {below + step}."
            )
        positions, rows = geometry.positions(frames), geometry.max_positions
        if rows is not None and positions > rope.reach(rows):
            most = (rope.reach(rows) * geometry.patch[0] - 1) * geometry.temporal
            raise ConfigError(
                f"frames={frames} is {positions} latent frames, but the model's RoPE table ends at "
                f"{rows}: at most {most // step * step + 1} frames under rope.policy={rope.policy}."
            )

    @abstractmethod
    def extended_frames(self, native: int, factor: int, geometry: Geometry) -> int:
        """The length called `factor` times `native`."""

    def latent_shape(
        self, frames: int, height: int, width: int, geometry: Geometry, rope: RopePolicy = NATIVE
    ) -> tuple[int, int, int, int]:
        """`[channels, frames, height, width]` of a video's latents; ConfigError for sizes that do
        not divide into patches."""
        self.check_frames(frames, geometry, rope)
        for name, pixels, patch in zip(
            ("height", "width"), (height, width), geometry.patch[1:], strict=True
        ):
            step = geometry.spatial * patch
            if pixels < step or pixels % step:
                below = max(pixels // step, 1) * step
                raise ConfigError(
                    f"{name}={pixels} must be a multiple of {step}; the nearest are {below} and "
                    f"{below + step}."
                )
        size = (height // geometry.spatial, width // geometry.spatial)
        return geometry.latent_channels, geometry.latent_frames(frames), *size

    def grid(
        self, latent_shape: Sequence[int], patch: Sequence[int], text_tokens: int = 0
    ) -> TokenGrid:
        """The transformer's sequence for latents `[..., frames, height, width]`."""
        frames, height, width = (s // p for s, p in zip(latent_shape[-3:], patch, strict=True))
        return TokenGrid(frames, height, width, text_tokens)

    # Attention

    def install(
        self,
        transformer: Any,
        attention: SparseAttention,
        *,
        fused_norms: bool = False,
        fused_modulation: bool = False,
    ) -> None:
        """Let `attention` compute the transformer's self-attention, in training and in pipelines.

        Each layer gets a processor of its own, and a hook plans the geometry of every forward from
        its inputs. Installing again replaces what was installed before.

        fused_norms: query and key norms and RoPE by one kernel (`norm_rope`).
        fused_modulation: the blocks' norms and gates by one kernel each (`modulated`).

        Raises ConfigError for modulation that the family cannot fuse.
        """
        for hook in list(transformer._forward_pre_hooks.values()):
            if isinstance(hook, PlanForward):
                hook.handle.remove()
        self.set_processors(transformer, attention, fused_norms)
        self.fuse_modulation(transformer, fused_modulation)
        hook = PlanForward(self, attention)
        hook.handle = transformer.register_forward_pre_hook(hook, with_kwargs=True)

    @abstractmethod
    def set_processors(
        self, transformer: Any, attention: SparseAttention, fused_norms: bool
    ) -> None:
        """Give every self-attention layer, in the order they run, its processor."""

    def fuse_modulation(self, transformer: Any, fused: bool) -> None:
        """Let each block's norms, with what modulates them, and gated sums be one pass over the
        video each; False: let them be the stock ones again.

        Rounded as the stock modules round; gradients are rounded once. Of families that have
        `fuses_modulation`.
        """
        self.check_modulation(fused)

    def check_modulation(self, fused: bool) -> None:
        """Raise ConfigError for modulation to be fused in a family where it cannot."""
        if fused and not self.fuses_modulation:
            raise ConfigError(
                f"speed.fused_modulation=true: family={self.name} has no norms of blocks to fuse. "
                "Set it to false."
            )

    @abstractmethod
    def sequence(
        self, transformer: Any, inputs: Mapping[str, Any]
    ) -> tuple[TokenGrid, Sequence[int] | None]:
        """The grid of one forward, and how many tokens of each sample count (None: all do).

        inputs: the arguments of `transformer.forward` by name.
        """

    def embedded_part(self, embedded: Tensor, part: slice, tokens: int) -> Tensor:
        """Of the embedder's result over all `tokens` of the video, what the model's own reshaping
        then makes `[B, part, C]` of."""
        return embedded.reshape(-1, tokens, embedded.shape[-1])[:, part]

    @abstractmethod
    def chunk_mlp(self, transformer: Any, tokens: int) -> None:
        """Let each block's MLP take the video so many tokens at a time, as `chunked` does it.

        What the modules hold keeps its names: adapters and state dicts do not see a difference.
        """

    # Positions

    def set_rope(self, transformer: Any, rope: RopePolicy) -> None:
        """Let temporal positions follow a policy; native puts the stock module back."""
        transformer.rope = stock = stock_rope(transformer)
        if rope.policy != "native":
            transformer.rope = self.extend_rope(stock, rope, transformer.config)

    @abstractmethod
    def extend_rope(self, stock: Any, rope: RopePolicy, config: Mapping[str, Any]) -> nn.Module:
        """A module for the place of `stock`, the RoPE of a transformer with this config."""

    # Text

    @abstractmethod
    def encode_text(self, pipe: Any, caption: str) -> Text:
        """What the pipeline feeds the transformer for a caption, on the CPU, for the cache.

        Padding that `collate_text` restores exactly is left out.
        """

    @abstractmethod
    def collate_text(self, texts: Sequence[Text]) -> Text:
        """A batch of `encode_text` results as keyword arguments of the transformer."""

    def uses_negative(self, geometry: Geometry, guidance: float) -> bool:
        """Whether sampling leads away from a negative prompt, by a second forward a step."""
        return guidance > 1 and not geometry.guidance_embeds

    @abstractmethod
    def pipeline_inputs(self, text: Text, negative: Text | None, guidance: float) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call, batch 1, for `encode_text` results.

        negative: None unless `uses_negative`.
        """

    # Flow matching; sigma is the noise level in [0, 1], noisy = (1 - sigma) clean + sigma noise

    @abstractmethod
    def timestep(self, sigma: Tensor) -> Tensor:
        """The transformer's timestep `[B]` for noise levels `[B]`."""

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor) -> Tensor:
        """What the transformer is trained to predict."""

    def predict(
        self,
        transformer: Any,
        noisy: Tensor,
        sigma: Tensor,
        text: Text,
        guidance: float | None = None,
    ) -> Tensor:
        """The transformer's prediction for latents `[B, C, f, h, w]`, in their dtype.

        text: from `collate_text`, on the same device. guidance: what a model with
        `guidance_embeds` is told, None for others.
        """
        dtype = getattr(transformer, "module", transformer).dtype  # of the frozen base
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in text.items()}
        if guidance is not None:
            inputs["guidance"] = torch.full_like(sigma, 1000 * guidance)
        out = transformer(
            hidden_states=noisy.to(dtype),
            timestep=self.timestep(sigma),
            return_dict=False,
            **inputs,
        )
        return out[0].to(noisy.dtype)


class PlanForward:
    """Forward pre-hook of a transformer: plans its attention from the inputs of the forward."""

    handle: Any

    def __init__(self, family: ModelFamily, attention: SparseAttention) -> None:
        self.family = family
        self.attention = attention

    def __call__(self, transformer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        signature = inspect.signature(type(transformer).forward)
        inputs = signature.bind(transformer, *args, **kwargs).arguments
        grid, valid = self.family.sequence(transformer, inputs)
        schedule = self.attention.schedule
        step = None if schedule is None else schedule(inputs["timestep"])
        self.attention.plan(grid, valid=valid, step=step)


def installed_attention(transformer: Any) -> SparseAttention | None:
    """The attention that `ModelFamily.install` put into a transformer, None for a stock one."""
    hooks = transformer._forward_pre_hooks.values()
    return next((hook.attention for hook in hooks if isinstance(hook, PlanForward)), None)


def channel_statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel, from the VAE's config, `[C, 1, 1, 1]`.

    0 and 1 where the config lacks either. In the dtype and on the device of `like`.
    """
    mean, std = vae.config.latents_mean, vae.config.latents_std
    if mean is None or std is None:
        mean, std = [0.0], [1.0]
    mean, std = torch.tensor([mean, std]).to(like)
    return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)


def diffusers_class(name: str) -> Any:
    """A diffusers class; importing its module costs seconds, so it waits until one is needed."""
    import diffusers

    return getattr(diffusers, name)
