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

from ..config.schema import Config
from ..config.values import ConfigError
from ..run import checkpoint
from .engine import BuildOptimizer, Engine

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


def open_zero(name: str, config: Config, handlers: list[Any]) -> Engine:
    from accelerate.utils import DeepSpeedPlugin, DistributedType

    settings = {
        "train_micro_batch_size_per_gpu": config.train.batch,
        "gradient_accumulation_steps": config.train.gradient_accumulation,
        "gradient_clipping": config.train.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 3 if name == "zero3" else 2,
            "overlap_comm": True,
            "contiguous_gradients": True,
        },
    }
    plugin = DeepSpeedPlugin(hf_ds_config=settings)
    accelerator = Accelerator(
        mixed_precision="no", deepspeed_plugin=plugin, kwargs_handlers=handlers
    )
    if accelerator.distributed_type is not DistributedType.DEEPSPEED:
        raise ConfigError(
            f"parallel.engine={name} needs GPUs, and accelerate is told to use CPUs: use fsdp2, "
            "which runs on both."
        )
    return ZeroEngine(accelerator)


class ZeroEngine(Engine):
    """A DeepSpeed engine, driven by its own backward and step."""

    sharded, probes = True, False  # what a step leaves is spread over DeepSpeed's buffers

    def prepare(self, transformer: nn.Module, build: BuildOptimizer) -> None:
        super().prepare(transformer, build)
        self._zero: Any = self.model.optimizer  # around the optimizer that was built

    @contextlib.contextmanager
    def batch(self, *, last: bool) -> Iterator[None]:
        self.model.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss, scale_wrt_gas=False)

    def clip(self, limit: float) -> Tensor:
        """The norm; DeepSpeed clips by itself, in `step`, to the same limit."""
        squares = torch.zeros((), device=self.accelerator.device)
        for parameter in self.parameters.values():
            gradient = tensor_fragment().safe_get_full_grad(parameter)
            if gradient is not None:
                squares += gradient.float().square().sum()
        return squares.sqrt()

    def step(self) -> None:
        self.model.step()

    def skip(self) -> None:
        """As DeepSpeed does after an overflow."""
        self._zero.zero_grad(set_to_none=True)
        for held in (self._zero.averaged_gradients, getattr(self._zero, "all_grad_tensors", {})):
            for group in held:  # the dictionaries themselves are what parameters refer to
                held[group] = None

    def gather(self) -> checkpoint.State:
        keep, fragment = self.accelerator.is_main_process, tensor_fragment()
        tensors: dict[str, Tensor] = {}
        steps = self._steps()
        for name, parameter in self.parameters.items():
            found = {"lora": fragment.safe_get_full_fp32_param(parameter)}
            for moment in MOMENTS if steps else ():
                found[moment] = fragment.safe_get_full_optimizer_state(parameter, moment)
            for kind, tensor in found.items():
                if keep:
                    tensors[f"{kind}.{name}"] = tensor.detach().cpu().clone()
        return checkpoint.State(tensors, dict.fromkeys(self.parameters, steps) if steps else {})

    def restore(self, state: checkpoint.State) -> None:
        fragment, moments = tensor_fragment(), state.moments
        for name, tensor in state.adapter.items():
            parameter = self.parameters[name]
            with torch.no_grad(), whole_parameters([parameter]):  # what the forward computes with
                parameter.copy_(tensor)
            fragment.safe_set_full_fp32_param(parameter, tensor)  # what the optimizer updates
            for moment, values in moments.get(name, {}).items():
                if moment not in MOMENTS:
                    raise ValueError(f"it holds {moment}, not {MOMENTS}")
                fragment.safe_set_full_optimizer_state(parameter, values, moment)
        counts = set(state.adam_steps.values())
        if len(counts) > 1:  # of a layer that had no gradient in some updates
            raise ValueError("its parameters have had different numbers of updates")
        for held in self._zero.optimizer.state.values():
            held["step"] = torch.tensor(counts.copy().pop() if counts else 0.0)

    def _steps(self) -> float:
        """Updates made, which DeepSpeed counts for all parameters together."""
        held = self._zero.optimizer.state.values()
        return float(next((state["step"] for state in held if "step" in state), 0))


def whole_parameters(parameters: list[nn.Parameter]) -> Any:
    """Within it stage 3 has all of these parameters; what is written to them stays."""
    import deepspeed  # pyright: ignore[reportMissingImports]

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def tensor_fragment() -> Any:
    """DeepSpeed's functions that read and write whole tensors of parameters that it has split."""
    from deepspeed import utils  # pyright: ignore[reportMissingImports]

    return utils
