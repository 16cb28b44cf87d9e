"""Examples instead of words: what a box in an image looks like.

The example is seen as ``detect`` would see it: in a tile of the same input spec, at the same ground resolution.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.manifest import Manifest
from edge_rsvlm.config.offered import detect_task
from edge_rsvlm.config.task_specs import DetectTask, TextDetectTask
from edge_rsvlm.errors import InputError, UsageError
from edge_rsvlm.pipeline.cut import cut
from edge_rsvlm.pipeline.outcome import Outcome
from edge_rsvlm.pipeline.runtime import Pace, Runtime
from edge_rsvlm.pipeline.scaling import Scaling, scalings
from edge_rsvlm.pipeline.stream import View
from edge_rsvlm.tasks.encode import encode
from edge_rsvlm.tasks.like import Examples, sides, symmetries
from edge_rsvlm.tiles.prepare import Prepared
from edge_rsvlm.types import Pixels

NUMBER = r"-?\d+(?:\.\d+)?"
WRITTEN = re.compile(rf"(.+)#({NUMBER}),({NUMBER}),({NUMBER}),({NUMBER})")
HOW = "write it like scene.tif#120,80,32,24: x, y, width and height in pixels of that image"
ROUNDING_PX = 0.02
"""Left and width, each written with two decimals, may end so far beyond the edge."""

Box = tuple[float, float, float, float]
"""x, y, width, height in pixels of an image."""


@dataclass(frozen=True)
class Example:
    """What is to be found looks like what is in ``box`` of ``image``."""

    image: str
    box: Box


def parse_example(text: str) -> Example:
    """``IMAGE#x,y,w,h``; UsageError for anything else, and for a box without area."""
    found = WRITTEN.fullmatch(text)
    if found is None:
        raise UsageError(f"example '{text}' names no box of an image", fix=HOW)
    x, y, width, height = map(float, found.groups()[1:])
    if width <= 0 or height <= 0:
        raise UsageError(f"example '{text}' has a box without area", fix=HOW)
    return Example(found[1], (x, y, width, height))


def example_task(manifest: Manifest) -> TextDetectTask:
    """The detect task of a bundle that finds by examples; UsageError says what another finds by."""
    task = detect_task(manifest)
    if isinstance(task, TextDetectTask):
        return task
    fix = f"leave --like out: it finds {', '.join(task.classes)}" if isinstance(task, DetectTask) else "use --query"
    raise UsageError(f"bundle '{manifest.name}' does not find by examples", fix=fix)


def embed_examples(
    runtime: Runtime, task: TextDetectTask, view: View, boxes: Sequence[Box], pace: Pace
) -> tuple[list[Examples], list[str]]:
    """Of each box of the view's raster: what it looks like in every symmetry of a tile around it; and warnings.

    Raises InputError for a box that reaches beyond the image or has no valid pixel.
    """
    outcome = Outcome(warnings=list(view.warnings))
    (scaling,) = scalings(view.spec, view.rasters, outcome)
    around = (_around(view, box, scaling, pace.threads) for box in boxes)
    return [embedded(runtime, task, image.pixels_KCHW, box_xyxy) for image, box_xyxy in around], outcome.warnings


def embedded(
    runtime: Runtime, task: TextDetectTask, tile_1CHW: NDArray[np.float32], box_xyxy: NDArray[np.float64]
) -> Examples:
    """What a box [4] of a tile, in its pixels, looks like. The symmetries are seen one by one, within the memory of one
    tile."""
    detector, encoder = runtime.like_detector(task), runtime.open(task.encoder)
    vectors = [
        detector.vectors(encode(encoder, turned, task.encoder_outputs), box[None])
        for turned, box in symmetries(tile_1CHW, box_xyxy)
    ]
    return Examples(np.concatenate(vectors), np.repeat(sides(box_xyxy[None]), len(vectors)))


def _around(view: View, box: Box, scaling: Scaling, threads: int) -> tuple[Prepared, NDArray[np.float64]]:
    """A tile around a box as the model sees it, and the corners of the box in its pixels."""
    corners = _inside(view, box) / np.tile(view.to_raster_xy, 2)
    centre_xy, grid = (corners[:2] + corners[2:]) / 2, view.grid()
    tile = np.array(grid.centred(*map(float, centre_xy)))
    window = grid.window(tuple(tile), tuple(tile))
    pixels = view.rasters[0].read(window, view.decimation)
    if not _part(pixels, corners).any():
        raise InputError(f"{view.rasters[0].name}: {_written(box)} has no valid pixel", fix="choose another example")
    made = cut(pixels, view.spec, view.cut_hw, view.read_size, tile[None], scaling, threads)
    in_tile = (corners - np.tile(tile[:2], 2)) * np.tile(made.hw[::-1] / (tile[2:] - tile[:2]), 2)
    (image,) = made.images
    scale_offset = np.array(image.to_image)
    return image, (in_tile - np.tile(scale_offset[2:], 2)) / np.tile(scale_offset[:2], 2)


def _inside(view: View, box: Box) -> NDArray[np.float64]:
    """The corners of a box in raster pixels; InputError where they lie outside of the raster."""
    x, y, width, height = box
    corners = np.array([x, y, x + width, y + height])
    inside: NDArray[np.float64] = np.clip(corners, 0, view.size * 2)
    if np.abs(corners - inside).max() > ROUNDING_PX:
        problem = f"{view.rasters[0].name}: {_written(box)} reaches beyond its {view.size[0]} x {view.size[1]} pixels"
        raise InputError(problem, fix="choose one inside")
    return inside


def _part(pixels: Pixels, corners: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Validity of the pixels of a box, as far as they were read."""
    window = pixels.window
    first = np.maximum(np.floor(corners[:2]).astype(int) - (window.col, window.row), 0)
    last = np.ceil(corners[2:]).astype(int) - (window.col, window.row)
    return pixels.valid_HW[first[1] : last[1], first[0] : last[0]]


def _written(box: Box) -> str:
    return f"box {','.join(f'{value:g}' for value in box)}"
