"""How each task looks at a raster: at which ground resolution, in which tiles."""

from __future__ import annotations

import math

from edge_rsvlm.budget import Demand
from edge_rsvlm.config.inputs import InputSpec
from edge_rsvlm.config.offered import AnyTask
from edge_rsvlm.config.task_specs import ChangeTask, GenerateTask, GgufDecoder, SegmentTask
from edge_rsvlm.errors import InputError, UsageError
from edge_rsvlm.geo import PixelMapper, metres_per_pixel
from edge_rsvlm.pipeline.outcome import Outcome
from edge_rsvlm.pipeline.scaling import find_flaws
from edge_rsvlm.pipeline.segment import MOST_LABELS
from edge_rsvlm.pipeline.shapes import Shape, prepared_shape
from edge_rsvlm.pipeline.stream import View
from edge_rsvlm.raster.flaws import WORK_BYTES
from edge_rsvlm.raster.moved import SPARE_PX
from edge_rsvlm.raster.plan import choose_scale
from edge_rsvlm.raster.reader import Raster
from edge_rsvlm.raster.registration import MOST_MOVED_PX

BLOCKS_OPEN = 2
"""Decoded blocks that GDAL holds beside its cache: the one being decoded, in the file's layout and in ours."""
CANVAS_COPIES = 3
"""Of a row of the canvas: as it is, as it grows, and what is computed of it."""
MUCH_COARSER = 4
FLAW_BYTES = math.ceil(WORK_BYTES / 4)
"""Of a pixel of each of two dates, counted twice as the pixels are."""
F32_BYTES = 4
PROMPT_TOKENS = 256
"""Room for the words of a prompt in the key-value caches."""


def scene_view(rasters: tuple[Raster, ...], spec: InputSpec, resolution_m: float | None) -> View:
    """Tiles of ``spec`` at the ground resolution it was trained for, or at native pixels where either is unknown."""
    reference = rasters[0]
    located = PixelMapper(reference.georeference).located
    metres = metres_per_pixel(reference.georeference) if located else None
    overviews = [d for d in reference.overviews if _same_overview(rasters, d)]
    range_m = spec.resolution_m or ((resolution_m, resolution_m) if resolution_m else None)
    scale_x, scale_y, decimation = (
        (1.0, 1.0, 1) if range_m is None else choose_scale(metres, range_m, resolution_m, overviews)
    )
    warnings = list(dict.fromkeys(note for raster in rasters for note in raster.notes))
    if metres is None and resolution_m:
        warnings.append("its ground resolution is unknown: tiles are native pixels, and --resolution has no effect")
    if metres is not None and spec.resolution_m and min(metres) > MUCH_COARSER * spec.resolution_m[1]:
        warnings.append(
            f"its pixels are {max(metres):.3g} m and the model was made for {spec.resolution_m[1]:g} m at most: "
            "do not expect much"
        )
    return View(rasters, spec, (scale_x, scale_y), decimation, warnings=tuple(warnings))


def _same_overview(rasters: tuple[Raster, ...], decimation: int) -> bool:
    """Whether all rasters have this overview, of one size."""
    return (
        all(decimation in raster.overviews for raster in rasters)
        and len({raster.size_at(decimation) for raster in rasters}) == 1
    )


def image_view(raster: Raster, spec: InputSpec, resolution_m: float | None) -> View:
    """The whole image as one tile where it is small and its ground resolution, or the task's, is unknown.

    Else tiles of the scene.
    """
    size = (raster.georeference.width, raster.georeference.height)
    located = PixelMapper(raster.georeference).located
    unknown = not located or (spec.resolution_m is None and resolution_m is None)
    if unknown and max(size) <= spec.whole_px:
        return View(
            (raster,), spec, (size[0] / spec.tile_px, size[1] / spec.tile_px), whole=True, warnings=tuple(raster.notes)
        )
    return scene_view((raster,), spec, resolution_m)


def demand(verb: str, task: AnyTask, view: View, max_tokens: int | None = None) -> Demand:
    """What the memory plan must know of this view. ``max_tokens`` is what the user asks for, where it is not the
    task's own."""
    raster = view.rasters[0]
    tile_bytes, seen = _tile(view)
    two_dates = len(view.rasters) == 2
    return Demand(
        verb,
        task.memory,
        tile_px=view.spec.tile_px,
        tile_bytes=tile_bytes,
        tiles=len(view.grid()),
        cache_bytes=cache_bytes(task, seen, max_tokens) if isinstance(task, GenerateTask) else 0,
        # One validity byte per pixel travels with the bands.
        bytes_per_pixel=len(raster.band_roles) * raster.dtype.itemsize + 1 + (FLAW_BYTES if two_dates else 0),
        scale_xy=view.grid().scale_xy,
        width=view.size[0],
        margin_xy=_margin_xy(view) if two_dates else (0, 0),
        resident_bytes=sum(BLOCKS_OPEN * r.block_bytes if r.windowed else r.decoded_bytes for r in view.rasters),
        canvas_rows=math.ceil(2 * view.spec.tile_px * view.scale_xy[1]),
        canvas_bytes=CANVAS_COPIES * planes(task),
        map_bytes=map_bytes(task),
        dates=len(view.rasters),
    )


def _margin_xy(view: View) -> tuple[int, int]:
    """What is read beyond a window of two dates: to move one by the shift that is found, and to look for flaws."""
    x, y = find_flaws(view.spec, view.rasters, view.to_raster_xy, Outcome()).reach_xy()
    moved = math.ceil(MOST_MOVED_PX) + SPARE_PX
    return x + moved, y + moved


def planes(task: AnyTask) -> int:
    """Bytes that a task keeps of a raster pixel until its row is complete."""
    return 2 if isinstance(task, SegmentTask) else 1 if isinstance(task, ChangeTask) else 0


def map_bytes(task: AnyTask) -> int:
    """What a task computes of the cells of one tile, beyond what its graphs give."""
    if not isinstance(task, SegmentTask):
        return 0
    # Logits, their exponentials and scores.
    return 3 * F32_BYTES * MOST_LABELS * math.ceil(task.input.tile_px / task.stride) ** 2


def _tile(view: View) -> tuple[int, Shape]:
    """Bytes of one tile on its way to the model, and what the model sees of it."""
    channels, (height, width) = len(view.spec.bands), view.cut_hw
    try:
        seen = prepared_shape(view.cut_hw, view.spec.prepare)
    except UsageError as exc:
        raise InputError(
            f"{view.rasters[0].name}: cannot be prepared for this model ({exc})", fix="give it in another shape"
        ) from exc
    if not view.spec.prepare:
        return F32_BYTES * channels * seen.px, seen
    # 8 bits as cut and with channels last; two copies in 8 bits while a step runs; two of the result in float.
    return channels * (2 * height * width + 2 * seen.largest_px + 2 * F32_BYTES * seen.px), seen


def cache_bytes(task: GenerateTask, seen: Shape, max_tokens: int | None) -> int:
    """Key-value caches of one image when its answer is longest, as they are passed in and come out."""
    if isinstance(task.decoder, GgufDecoder):
        return 0  # made with the session, and measured with it
    visual, cache = task.visual, task.decoder.cache
    per_view = visual.per_tile or (seen.height * seen.width // visual.unit_px**2 if visual.unit_px else 0)
    tokens = seen.views * per_view + PROMPT_TOKENS + (max_tokens or task.max_tokens)
    return 2 * 2 * F32_BYTES * cache.layers * cache.heads * cache.head_dim * tokens * task.beams
