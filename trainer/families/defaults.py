"""Fill in what a recipe leaves open: lengths and rates of training, settings of the sampler."""

from __future__ import annotations

from dataclasses import dataclass

from ..config.values import ConfigError
from .names import ModelNames


@dataclass(frozen=True)
class Defaults:
    """Holds a family's default settings, and what its pipeline asks of the number of steps.

    native_frames: the length that the model was trained at.
    guidance, steps: of the sampler, as the pipeline's authors advise.
    train_guidance: the input of a guidance-distilled model in training.
    min_steps: the fewest diffusion steps that the pipeline's schedule can take.
    batches_guidance: True if the pipeline runs both forwards of guidance as one batch.
    """

    names: ModelNames
    fps: int
    native_frames: int
    guidance: float
    steps: int
    train_guidance: float = 1.0
    min_steps: int = 1
    batches_guidance: bool = False

    def check_steps(self, key: str, steps: int) -> None:
        """Raise ConfigError for a number of diffusion steps that the pipeline cannot take."""
        if steps < self.min_steps:
            raise ConfigError(
                f"{key}={steps}: the schedule of {self.names.family} takes at least "
                f"{self.min_steps}."
            )
