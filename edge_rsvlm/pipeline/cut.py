"""From a window of raster pixels to what a model takes of it: tiles cut, and prepared where the manifest says how.

Letters: N tiles, K views of one tile, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.inputs import InputSpec
from edge_rsvlm.errors import BundleError
from edge_rsvlm.pipeline.scaling import Scaling, per_channel
from edge_rsvlm.tiles import GatherResult, tile_gather
from edge_rsvlm.tiles.prepare import Prepared, prepare
from edge_rsvlm.types import Pixels

UNCHANGED = (1.0, 1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Cut:
    """Tiles of one date, each cut to ``hw`` pixels. ``images`` is what the model sees of each."""

    images: tuple[Prepared, ...]
    hw: tuple[int, int]
    valid_fraction_N: NDArray[np.float32]

    def chosen(self, kept: Sequence[int] | NDArray[np.intp]) -> list[Prepared]:
        return [self.images[n] for n in kept]

    def pixels_NCHW(self, kept: Sequence[int] | NDArray[np.intp]) -> NDArray[np.float32]:
        """The chosen tiles as one array, for a task that looks at each once."""
        chosen = self.chosen(kept)
        if any(len(image.pixels_KCHW) != 1 for image in chosen):
            raise BundleError("a task that looks at an image once splits it", fix="export the bundle again")
        return np.concatenate([image.pixels_KCHW for image in chosen])


def share_validity(cuts: Sequence[Cut], spec: InputSpec) -> None:
    """What is not valid in one date of a tile is made so in every date, in place: an edge of data is no change.

    Where the model is told of validity; N tiles of each date alike.
    """
    if "validity" not in spec.bands or spec.prepare:
        return
    channel = spec.bands.index("validity")
    for images in zip(*(date.images for date in cuts), strict=True):
        valid = [image.pixels_KCHW[:, channel : channel + 1] for image in images]
        joint_K1HW = np.minimum.reduce(valid)
        for image, own in zip(images, valid, strict=True):
            if not np.array_equal(own, joint_K1HW):
                np.multiply(image.pixels_KCHW, joint_K1HW, out=image.pixels_KCHW)


def extent_xy(image: Prepared) -> tuple[int, int]:
    """(width, height) in pixels of what the model sees of an image, all its views but the overview together."""
    height, width = image.pixels_KCHW.shape[2:]
    return image.cols * width, image.rows * height


def cut(
    pixels: Pixels,
    spec: InputSpec,
    hw: tuple[int, int],
    raster_size: tuple[int, int],
    boxes_N4: NDArray[np.float64],
    scaling: Scaling,
    threads: int,
) -> Cut:
    """Tiles of ``boxes_N4`` (read pixels of a raster of ``raster_size``) as the input spec defines them."""
    found = _gathered(pixels, spec, hw, raster_size, boxes_N4, scaling, threads)
    if spec.prepare:
        count = len(spec.bands)
        mean, std = per_channel(spec.mean, count), per_channel(spec.std, count)
        images = tuple(
            prepare(np.ascontiguousarray(tile_CHW.transpose(1, 2, 0)), spec.prepare, mean, std, threads)
            for tile_CHW in found.tiles_NCHW
        )
    else:
        images = tuple(Prepared(tile_CHW[None], 1, 1, UNCHANGED) for tile_CHW in found.tiles_NCHW)
    return Cut(images, hw, found.valid_fraction_N)


def _gathered(
    pixels: Pixels,
    spec: InputSpec,
    hw: tuple[int, int],
    raster_size: tuple[int, int],
    boxes_N4: NDArray[np.float64],
    scaling: Scaling,
    threads: int,
) -> GatherResult:
    """Model values, or 8 bits where steps prepare them; what is not valid is 0."""
    return tile_gather(
        pixels.data_CHW,
        boxes_N4,
        out_hw=hw,
        bands=scaling.bands,
        gain=scaling.gain,
        bias=scaling.bias,
        layout="CHW",
        origin=(pixels.window.col, pixels.window.row),
        raster_size=raster_size,
        valid=pixels.valid_HW,
        dtype=np.uint8 if spec.prepare else np.float32,
        resampling=spec.resampling,
        threads=threads,
    )
