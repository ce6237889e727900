"""DeepSpeed's ZeRO stages 2 and 3, through accelerate; needs the package deepspeed.

Stage 2 shards the adapter's gradients and moments, stage 3 the frozen base as well. DeepSpeed runs
in its fp32 mode, which leaves parameters in the dtypes that they have.
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
from .engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


def open_zero(name: str, config: Config, handlers: list[Any]) -> Accelerator:
    """Return an accelerator under DeepSpeed; raise ConfigError if accelerate would use CPUs."""
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
            f"parallel.engine={name} needs GPUs, and accelerate is set to use CPUs: use fsdp2, "
            "which runs on both."
        )
    return accelerator


class ZeroEngine(Engine):
    """A DeepSpeed engine, driven by its own backward and step."""

    # A step leaves traces in many of DeepSpeed's buffers, so a trial step cannot be undone.
    sharded, supports_trial_step = True, False

    @property
    def _zero(self) -> Any:
        """DeepSpeed's wrapper of `optimizer`."""
        return self.model.optimizer

    @contextlib.contextmanager
    def batch(self, *, last: bool) -> Iterator[None]:
        self.model.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss, scale_wrt_gas=False)

    def clip(self, limit: float) -> Tensor:
        """Return the norm; DeepSpeed itself clips to the same limit, in `step`."""
        squares = torch.zeros((), device=self.accelerator.device)
        for parameter in self.parameters.values():
            gradient = tensor_fragment().safe_get_full_grad(parameter)
            if gradient is not None:
                squares += gradient.float().square().sum()
        return squares.sqrt()

    def step(self) -> None:
        self.model.step()

    def skip(self) -> None:
        """Drop the gradients as DeepSpeed does after an overflow."""
        self._zero.zero_grad(set_to_none=True)
        for held in (self._zero.averaged_gradients, getattr(self._zero, "all_grad_tensors", {})):
            for group in held:  # emptied in place, because parameters refer to the dictionaries
                held[group] = None

    def gather(self) -> checkpoint.State:
        keep, fragment = self.accelerator.is_main_process, tensor_fragment()
        steps, state = self._steps(), checkpoint.State()
        for name, parameter in self.parameters.items():
            adapter = fragment.safe_get_full_fp32_param(parameter)
            moments = {
                moment: fragment.safe_get_full_optimizer_state(parameter, moment)
                for moment in (MOMENTS if steps else ())
            }
            if steps:
                state.adam_steps[name] = steps
            if keep:
                state.adapter[name] = adapter.detach().cpu().clone()
                if steps:
                    state.moments[name] = {k: x.detach().cpu().clone() for k, x in moments.items()}
        return state

    def restore(self, state: checkpoint.State) -> None:
        fragment = tensor_fragment()
        for name, tensor in state.adapter.items():
            parameter = self.parameters[name]
            with torch.no_grad(), whole_parameters([parameter]):  # the forward's copy
                parameter.copy_(tensor)
            fragment.safe_set_full_fp32_param(parameter, tensor)  # the optimizer's copy
            for moment, values in state.moments.get(name, {}).items():
                if moment not in MOMENTS:
                    raise ValueError(f"it holds {moment}, not {MOMENTS}")
                fragment.safe_set_full_optimizer_state(parameter, values, moment)
        counts = set(state.adam_steps.values())
        if len(counts) > 1:  # a layer had no gradient in some updates
            raise ValueError("its parameters have had different numbers of updates")
        for held in self._zero.optimizer.state.values():
            held["step"] = torch.tensor(counts.copy().pop() if counts else 0.0)

    def _steps(self) -> float:
        """Return the number of updates, which DeepSpeed counts for all parameters together."""
        held = self._zero.optimizer.state.values()
        return float(next((state["step"] for state in held if "step" in state), 0))


def whole_parameters(parameters: list[nn.Parameter]) -> Any:
    """Return a context in which stage 3 holds these parameters whole; writes to them persist."""
    import deepspeed  # pyright: ignore[reportMissingImports]

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def tensor_fragment() -> Any:
    """Return DeepSpeed's functions that read and write whole tensors of sharded parameters."""
    from deepspeed import utils  # pyright: ignore[reportMissingImports]

    return utils
