"""Files of Mochi 1, whose pipeline feeds a bf16 transformer in fp32."""

from __future__ import annotations

from typing import Any

from ..loader import Loader


class MochiLoader(Loader):
    def load_pipeline(
        self, path: str, revision: str | None, *, transformer: Any = None, **options: Any
    ) -> Any:
        """Load the pipeline, and let the transformer cast the pipeline's fp32 latents and text."""
        pipe = super().load_pipeline(path, revision, transformer=transformer, **options)
        if transformer is not None and _cast not in transformer._forward_pre_hooks.values():
            transformer.register_forward_pre_hook(_cast, with_kwargs=True)
        return pipe


def _cast(transformer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook that casts latents and text to the transformer's dtype.

    The pipeline keeps latents in the text encoder's dtype and passes them on as they are.
    """
    names = {"hidden_states", "encoder_hidden_states"} & kwargs.keys()
    return args, kwargs | {name: kwargs[name].to(transformer.dtype) for name in names}
