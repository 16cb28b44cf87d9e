"""How large an image becomes by the steps that prepare it: for the memory plan, which runs none of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge_rsvlm.config.prepare import CenterCrop, PadSquare, Split, Step
from edge_rsvlm.tiles.prepare import resized


@dataclass(frozen=True)
class Shape:
    """What the model sees, and ``largest_px``, the pixels of the largest image on the way there."""

    views: int
    height: int
    width: int
    largest_px: int

    @property
    def px(self) -> int:
        return self.views * self.height * self.width


def prepared_shape(image_hw: tuple[int, int], steps: Sequence[Step]) -> Shape:
    """What ``steps`` make of an image of (height, width)."""
    views, (height, width) = 1, image_hw
    largest_px = height * width
    for step in steps:
        if isinstance(step, Split):
            tiles = -(-height // step.px) * -(-width // step.px)
            views, height, width = tiles + (tiles > 1), step.px, step.px
        elif isinstance(step, CenterCrop):
            height, width = step.size
        elif isinstance(step, PadSquare):
            height = width = max(height, width)
        else:
            height, width = resized(step, (height, width))
        largest_px = max(largest_px, views * height * width)
    return Shape(views, height, width, largest_px)
