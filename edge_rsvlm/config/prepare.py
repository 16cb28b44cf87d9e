"""How a whole image becomes the pixels of a model, as data: an ordered list of steps on 8-bit RGB.

These are the steps that image processors of published checkpoints run (Pillow semantics: antialiased filters, every
resize rounded to 8 bits), so that a checkpoint sees on the device what it saw in training. Sizes are (height, width).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from edge_rsvlm.config.model import Model

Filter = Literal["nearest", "bilinear", "bicubic", "lanczos3", "gaussian"]
"""bicubic has a = -0.5, lanczos3 three lobes; all but nearest are widened when an image shrinks (antialias).

gaussian is scikit-image's resize, which OWLv2 uses: where an image shrinks a Gaussian, then linear interpolation, the
image mirrored at its border, and as a last step not rounded."""

Pixels = Annotated[int, Field(gt=0)]
Size = tuple[Pixels, Pixels]


class Resize(Model):
    """To ``size``, whatever the aspect."""

    op: Literal["resize"] = "resize"
    size: Size
    filter: Filter


class ResizeShortest(Model):
    """Shortest side to ``px``, the longest kept at most ``longest_px``, both sides then cut down to ``multiple``.

    Fractions of a pixel are cut off (CLIP), and rounded where ``longest_px`` is given (ViLT).
    """

    op: Literal["resize_shortest"] = "resize_shortest"
    px: Pixels
    longest_px: Pixels | None = None
    multiple: Pixels = 1
    filter: Filter


class ResizeLongest(Model):
    """Longest side to ``px``; the other follows the aspect, cut to whole pixels, and then up to even where ``even``."""

    op: Literal["resize_longest"] = "resize_longest"
    px: Pixels
    even: bool = False
    filter: Filter


class ResizeToTiles(Model):
    """Longest side up to a multiple of ``px``, then the other to the multiple that its aspect needs (Idefics3)."""

    op: Literal["resize_to_tiles"] = "resize_to_tiles"
    px: Pixels
    filter: Filter


class SmartResize(Model):
    """Both sides to the nearest ``multiple``, the area between ``min_pixels`` and ``max_pixels`` (Qwen2-VL)."""

    op: Literal["smart_resize"] = "smart_resize"
    multiple: Pixels
    min_pixels: Pixels
    max_pixels: Pixels
    filter: Filter


class CenterCrop(Model):
    """The centre of ``size``, half a pixel up or left where that is between pixels; outside the image is 0."""

    op: Literal["center_crop"] = "center_crop"
    size: Size


class PadSquare(Model):
    """A square around the image, which sits in its ``place``; the rest has the colour ``fill`` (0..255)."""

    op: Literal["pad_square"] = "pad_square"
    fill: tuple[float, float, float]
    place: Literal["centre", "top_left"]


class Split(Model):
    """Tiles of ``px`` in raster order, then, if they are more than one, the whole image at that size (overview).

    It is the last step, and the image a multiple of ``px``.
    """

    op: Literal["split"] = "split"
    px: Pixels
    filter: Filter


Step = Annotated[
    Resize | ResizeShortest | ResizeLongest | ResizeToTiles | SmartResize | CenterCrop | PadSquare | Split,
    Field(discriminator="op"),
]
