"""A whole image to the pixels of a model: the steps of ``config/prepare.py``, each resize one ``tile_gather``.

Resized pixels are bit for bit Pillow's. A resize waits for what comes next, so that the last one and the normalisation
are one pass. Letters: H, W image; K images out of one; C red, green, blue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.prepare import (
    CenterCrop,
    Filter,
    PadSquare,
    Resize,
    ResizeLongest,
    ResizeShortest,
    ResizeToTiles,
    SmartResize,
    Split,
    Step,
)
from edge_rsvlm.errors import UsageError
from edge_rsvlm.tiles.gather import tile_gather

RGB = (0, 1, 2)
MAX_ASPECT = 200
"""Beyond it Qwen2-VL's resize has no answer."""

Size = tuple[int, int]
Images = NDArray[Any]
PerChannel = float | Sequence[float]


@dataclass(frozen=True)
class Prepared:
    """What the model sees of one image.

    ``pixels_KCHW`` is float32 and normalised. K is 1, or ``rows * cols`` tiles in raster order and then the overview
    after a split into more than one tile. ``to_image`` is (scale_x, scale_y, offset_x, offset_y): a point x, y of the
    prepared image (pixel corners are whole numbers) is x * scale_x + offset_x, y * scale_y + offset_y of the image; of
    a split image the prepared image is the one that was split, ``cols`` tiles wide and ``rows`` high.
    """

    pixels_KCHW: NDArray[np.float32]
    rows: int
    cols: int
    to_image: tuple[float, float, float, float]


def prepare(
    image_HWC: NDArray[np.uint8], steps: Sequence[Step], mean: PerChannel, std: PerChannel, threads: int = 1
) -> Prepared:
    """``steps`` on an 8-bit RGB image, then (x / 255 - mean) / std, for all channels or one number each.

    ``threads`` share the tiles of a split. Raises UsageError for another kind of array, for an aspect that the steps
    have no answer for, and for a split that is not last or not of whole tiles.
    """
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != len(RGB) or image_HWC.size == 0:
        raise UsageError(
            f"image is {image_HWC.dtype} of shape {image_HWC.shape}", fix="pass a non-empty uint8 array [H, W, 3]"
        )
    canvas = _Canvas(image_HWC)
    scale = _Normalise(mean, std)
    split: Split | None = None
    for step in steps:
        if split:
            raise UsageError("a step follows the split", fix="make the split the last step")
        if isinstance(step, Split):
            split = step
        elif isinstance(step, CenterCrop):
            canvas.center_crop(step.size)
        elif isinstance(step, PadSquare):
            canvas.pad_square(step)
        else:
            canvas.resize(resized(step, canvas.size), step.filter)
    if split:
        return _split(canvas, split, scale, threads)
    return Prepared(canvas.normalised(scale), 1, 1, canvas.to_image)


def resized(step: Resize | ResizeShortest | ResizeLongest | ResizeToTiles | SmartResize, size: Size) -> Size:
    """(height, width) that a resizing step makes of an image of ``size``."""
    if isinstance(step, Resize):
        return step.size
    if isinstance(step, ResizeShortest):
        return _shortest(step, size)
    if isinstance(step, ResizeLongest):
        return _longest(step, size)
    if isinstance(step, ResizeToTiles):
        return _to_tiles(step.px, size)
    return _smart(step, size)


# The order of the operations in these four is that of transformers: a side that is off by a rounding error is a pixel
# off, and everything after it.


def _shortest(step: ResizeShortest, size: Size) -> Size:
    short, long = min(size), max(size)
    if step.longest_px is None:
        sides = float(step.px), step.px * long / short
    else:
        sides = float(step.px), step.px / short * long
        if max(sides) > step.longest_px:
            shrink = step.longest_px / max(sides)
            sides = shrink * sides[0] + 0.5, shrink * sides[1] + 0.5
        else:
            sides = sides[0] + 0.5, sides[1] + 0.5
    new_short, new_long = (max(int(side) // step.multiple, 1) * step.multiple for side in sides)
    return (new_long, new_short) if size[0] > size[1] else (new_short, new_long)


def _longest(step: ResizeLongest, size: Size) -> Size:
    height, width = size
    aspect = width / height
    other = int(step.px / aspect) if width >= height else int(step.px * aspect)
    other = max(other + (other % 2 if step.even else 0), 1)
    return (other, step.px) if width >= height else (step.px, other)


def _to_tiles(px: int, size: Size) -> Size:
    height, width = size
    aspect = width / height
    long = math.ceil(max(size) / px) * px
    other = max(math.ceil(int(long / aspect if width >= height else long * aspect) / px), 1) * px
    return (other, long) if width >= height else (long, other)


def _smart(step: SmartResize, size: Size) -> Size:
    height, width = size
    unit = step.multiple
    if max(size) / min(size) > MAX_ASPECT:
        raise UsageError(
            f"the image is {width} x {height} pixels: one side is over {MAX_ASPECT} times the other",
            fix="cut it into pieces",
        )
    new_height, new_width = round(height / unit) * unit, round(width / unit) * unit
    if new_height * new_width > step.max_pixels:
        shrink = math.sqrt((height * width) / step.max_pixels)
        new_height = max(unit, math.floor(height / shrink / unit) * unit)
        new_width = max(unit, math.floor(width / shrink / unit) * unit)
    elif new_height * new_width < step.min_pixels:
        grow = math.sqrt(step.min_pixels / (height * width))
        new_height = math.ceil(height * grow / unit) * unit
        new_width = math.ceil(width * grow / unit) * unit
    return new_height, new_width


class _Normalise:
    """(x / 255 - mean) / std as a gain and a bias per channel."""

    def __init__(self, mean: PerChannel, std: PerChannel) -> None:
        means, stds = (np.broadcast_to(np.asarray(value, np.float64), len(RGB)) for value in (mean, std))
        self.gain, self.bias = 1.0 / (255.0 * stds), -means / stds


class _Canvas:
    """The image so far: 8-bit pixels, and a resize of them that is still to be done."""

    def __init__(self, image_HWC: NDArray[np.uint8]) -> None:
        self._image_HWC = image_HWC
        self._pending: tuple[Size, Filter] | None = None
        self.to_image = (1.0, 1.0, 0.0, 0.0)

    @property
    def size(self) -> Size:
        return self._pending[0] if self._pending else (self._image_HWC.shape[0], self._image_HWC.shape[1])

    def resize(self, size: Size, resampling: Filter) -> None:
        if size == self.size:
            return
        self._settle()
        (height, width), (scale_x, scale_y, offset_x, offset_y) = self.size, self.to_image
        self.to_image = (scale_x * width / size[1], scale_y * height / size[0], offset_x, offset_y)
        self._pending = size, resampling

    def center_crop(self, size: Size) -> None:
        height, width = self.size
        self._window((height - size[0]) // 2, (width - size[1]) // 2, size, (0, 0, 0))

    def pad_square(self, step: PadSquare) -> None:
        height, width = self.size
        side = max(height, width)
        top, left = ((side - height) // 2, (side - width) // 2) if step.place == "centre" else (0, 0)
        self._window(-top, -left, (side, side), step.fill)

    def normalised(self, scale: _Normalise) -> NDArray[np.float32]:
        size, resampling = self._pending or (self.size, "nearest")
        return _gather(self._image_HWC, size, resampling, scale)

    def tiles(self, px: int, scale: _Normalise, threads: int) -> NDArray[np.float32]:
        """Tiles [K, C, px, px] of whole pixels in raster order."""
        self._settle()
        height, width = self.size
        boxes = [(x, y, x + px, y + px) for y in range(0, height, px) for x in range(0, width, px)]
        return _gather(self._image_HWC, (px, px), "nearest", scale, np.array(boxes, np.float64), threads)

    def _window(self, top: int, left: int, size: Size, fill: tuple[float, float, float]) -> None:
        if (top, left, size) == (0, 0, self.size):
            return
        self._settle()
        window = np.empty((*size, len(RGB)), np.uint8)
        window[:] = np.rint(fill)
        inside = self._image_HWC[max(top, 0) : top + size[0], max(left, 0) : left + size[1]]
        y, x = max(-top, 0), max(-left, 0)
        window[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
        self._image_HWC = window
        scale_x, scale_y, offset_x, offset_y = self.to_image
        self.to_image = (scale_x, scale_y, offset_x + left * scale_x, offset_y + top * scale_y)

    def _settle(self) -> None:
        if self._pending:
            self._image_HWC = _gather(self._image_HWC, *self._pending)[0].transpose(1, 2, 0)
            self._pending = None


def _gather(
    image_HWC: NDArray[np.uint8],
    size: Size,
    resampling: Filter,
    scale: _Normalise | None = None,
    boxes_N4: NDArray[np.float64] | None = None,
    threads: int = 1,
) -> Images:
    """The image, or its ``boxes_N4``, at ``size`` [N, C, H, W]: float32 by ``scale``, without it uint8."""
    height, width = image_HWC.shape[:2]
    return tile_gather(
        image_HWC,
        np.array([[0, 0, width, height]], np.float64) if boxes_N4 is None else boxes_N4,
        out_hw=size,
        bands=RGB,
        gain=scale.gain.tolist() if scale else (1.0, 1.0, 1.0),
        bias=scale.bias.tolist() if scale else (0.0, 0.0, 0.0),
        dtype=np.float32 if scale else np.uint8,
        resampling=resampling,
        rounding="once" if resampling == "gaussian" else "pillow",
        threads=threads,
    ).tiles_NCHW


def _split(canvas: _Canvas, step: Split, scale: _Normalise, threads: int) -> Prepared:
    height, width = canvas.size
    if height % step.px or width % step.px:
        raise UsageError(
            f"{width} x {height} pixels are no whole tiles of {step.px}", fix="put resize_to_tiles before split"
        )
    rows, cols, to_image = height // step.px, width // step.px, canvas.to_image
    pixels_KCHW = canvas.tiles(step.px, scale, threads)
    if rows * cols > 1:
        canvas.resize((step.px, step.px), step.filter)
        pixels_KCHW = np.concatenate([pixels_KCHW, canvas.normalised(scale)])
    return Prepared(pixels_KCHW, rows, cols, to_image)
