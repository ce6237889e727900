"""DeepSpeed's ZeRO stages 2 and 3, through accelerate; needs the package deepspeed.

Stage 2 shards moments and gradients, of the adapter alone; stage 3 the frozen base as well. In
fp32 mode of DeepSpeed, which leaves parameters in the dtypes that they have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .config import Config
from .engines import BuildOptimizer, Engine


def open_zero(name: str, config: Config, handlers: list[Any]) -> Engine:
    from accelerate.utils import DeepSpeedPlugin

    settings = {
        "train_micro_batch_size_per_gpu": config.train.batch,
        "gradient_accumulation_steps": config.train.accumulate,
        "gradient_clipping": config.train.clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 3 if name == "zero3" else 2,
            "overlap_comm": True,
            "contiguous_gradients": True,
        },
    }
    plugin = DeepSpeedPlugin(hf_ds_config=settings)
    return ZeroEngine(
        Accelerator(mixed_precision="no", deepspeed_plugin=plugin, kwargs_handlers=handlers)
    )


class ZeroEngine(Engine):
    """A DeepSpeed engine, driven by its own backward and step."""

    sharded = True

    def prepare(self, transformer: nn.Module, build: BuildOptimizer) -> None:
        super().prepare(transformer, build)
        self._zero: Any = self.model.optimizer
        self._norm = torch.zeros(())

    @contextlib.contextmanager
    def batch(self, *, last: bool) -> Iterator[None]:
        self.model.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss, scale_wrt_gas=False)

    def clip(self, limit: float) -> Tensor:
        """The norm; DeepSpeed clips by itself, in `step`."""
        from deepspeed.utils import safe_get_full_grad  # pyright: ignore[reportMissingImports]

        squares = torch.zeros((), device=self.accelerator.device)
        for parameter in self.parameters.values():
            gradient = safe_get_full_grad(parameter)
            if gradient is not None:
                squares += gradient.float().square().sum()
        return squares.sqrt()

    def step(self) -> None:
        self.model.step()

    def skip(self) -> None:
        """As DeepSpeed does after an overflow."""
        self._zero.zero_grad(set_to_none=True)
        self._zero.averaged_gradients = {}
