"""AdamW over the adapter, its learning-rate schedule, and the form of its moments in checkpoints.

The 8-bit moments are those of bitsandbytes (Dettmers et al., 2022, arXiv 2110.02861): blocks of 256
moments share an fp32 maximum. A checkpoint holds the bytes and the maxima, so a resumed run is
exact. torchao's 8-bit AdamW is no substitute: it compiles at run time, and keeps moments in a form
of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from .config.values import ConfigError


def lr_factor(step: int, warmup: int, steps: int, schedule: str) -> float:
    """Return the share of the peak learning rate at update `step`, counted from 1.

    A linear warm-up, then constant or half a cosine, which would reach 0 one step after the last.
    """
    if step <= warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps + 1 - warmup)))


def check_installed(name: str) -> None:
    """Raise ConfigError if the library of optimizer `name` is missing."""
    if name == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise ConfigError(
            "train.optimizer=adamw8bit needs the package bitsandbytes: install it with `pip "
            "install 'longreel[bitsandbytes]'`, or use train.optimizer=adamw."
        )


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Build `adamw` or `adamw8bit`, which keeps moments of fewer than 4096 elements in fp32."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    from bitsandbytes.optim.adamw import AdamW8bit  # pyright: ignore[reportMissingImports]

    return AdamW8bit(parameters, lr=lr, weight_decay=weight_decay)


def moments_of(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter
) -> tuple[float, dict[str, Tensor]] | None:
    """Return a parameter's number of updates and its moments by name; None before the first.

    With 8 bits the moments are `state1`, `state2`, `absmax1` and `absmax2`. The library's lookup
    tables (`qmap`) are constants, and left out.
    """
    state = optimizer.state.get(parameter)
    if not state:
        return None
    tensors = {
        name: x
        for name, x in state.items()
        if isinstance(x, Tensor) and name != "step" and not name.startswith("qmap")
    }
    return float(state["step"]), tensors


def restore_moments(
    optimizer: torch.optim.Optimizer,
    parameter: nn.Parameter,
    step: float,
    tensors: Mapping[str, Tensor],
) -> None:
    """Undo `moments_of`. Raises ValueError for the moments of another optimizer."""
    state = _empty_state(optimizer, parameter)
    expected = moments_of(optimizer, parameter)
    assert expected is not None
    if expected[1].keys() != tensors.keys():
        raise ValueError(f"it holds {sorted(tensors)}, not {sorted(expected[1])}")
    for name, tensor in tensors.items():
        state[name].copy_(tensor)
    state["step"] = torch.tensor(step) if isinstance(state["step"], Tensor) else int(step)


@contextmanager
def moments_allocated(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]
) -> Iterator[None]:
    """Allocate zero moments for parameters that have none; remove them on exit."""
    new = [parameter for parameter in parameters if not optimizer.state.get(parameter)]
    try:
        for parameter in new:
            _empty_state(optimizer, parameter)
        yield
    finally:
        for parameter in new:
            optimizer.state.pop(parameter, None)


def _empty_state(optimizer: Any, parameter: nn.Parameter) -> dict[str, Any]:
    """Give a parameter the state that it has before its first update; return that state."""
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    else:
        ((group_index, index, group),) = (
            (i, j, group)
            for i, group in enumerate(optimizer.param_groups)
            for j, own in enumerate(group["params"])
            if own is parameter
        )
        optimizer.init_state(group, parameter, group_index, index)
    return optimizer.state[parameter]
