"""The geometry of one flat sequence of video and text tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class TokenGrid:
    """A diffusion transformer's sequence: `frames` x `height` x `width` video tokens, then text.

    Video tokens come frame by frame, rows of patches within a frame: token `(t, y, x)` stands at
    `(t * height + y) * width + x`. Sizes count patches of the latent video, not pixels.
    """

    frames: int
    height: int
    width: int
    text: int = 0

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1 or self.text < 0:
            raise ValueError(
                f"{self} is not a token grid: frames, height and width must be at least 1 "
                "and text at least 0."
            )

    @property
    def per_frame(self) -> int:
        """The number of tokens of one latent frame."""
        return self.height * self.width

    @property
    def video(self) -> int:
        """The number of video tokens."""
        return self.frames * self.per_frame

    def __len__(self) -> int:
        return self.video + self.text

    def without_text(self) -> TokenGrid:
        """Return the grid of the video tokens alone."""
        return replace(self, text=0)
