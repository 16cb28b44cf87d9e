"""How each task looks at a raster: at which ground resolution, in which tiles."""

from __future__ import annotations

import math

from edge_rsvlm.budget import Demand
from edge_rsvlm.config.manifest import CaptionTask, ChangeTask, DetectTask, InputSpec
from edge_rsvlm.geo import PixelMapper, metres_per_pixel
from edge_rsvlm.pipeline.stream import View
from edge_rsvlm.raster.plan import choose_scale
from edge_rsvlm.raster.reader import Raster

BLOCKS_OPEN = 2
"""Decoded blocks that GDAL holds beside its cache: the one being decoded, in the file's layout and in ours."""
MUCH_COARSER = 4
WHOLE_IMAGE_TILES = 2
"""Without a CRS a caption describes the whole image when its long side is at most this many tiles."""


def scene_view(rasters: tuple[Raster, ...], spec: InputSpec, resolution_m: float | None) -> View:
    """Tiles of ``spec`` at the ground resolution it was trained for, or at native pixels where that is unknown."""
    reference = rasters[0]
    located = PixelMapper(reference.georeference).located
    metres = metres_per_pixel(reference.georeference) if located else None
    overviews = [d for d in reference.overviews if _same_overview(rasters, d)]
    scale_x, scale_y, decimation = choose_scale(metres, spec.resolution_m, resolution_m, overviews)
    warnings = list(dict.fromkeys(note for raster in rasters for note in raster.notes))
    if metres is None and resolution_m:
        warnings.append("its ground resolution is unknown: tiles are native pixels, and --resolution has no effect")
    if metres is not None and min(metres) > MUCH_COARSER * spec.resolution_m[1]:
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


def caption_view(raster: Raster, spec: InputSpec, resolution_m: float | None) -> View:
    """The whole image as one tile where its size on the ground is unknown and it is small; else tiles of the scene."""
    size = (raster.georeference.width, raster.georeference.height)
    located = PixelMapper(raster.georeference).located
    if not located and max(size) <= WHOLE_IMAGE_TILES * spec.tile_px:
        return View((raster,), spec, (size[0] / spec.tile_px, size[1] / spec.tile_px), max_extent=True)
    return scene_view((raster,), spec, resolution_m)


def demand(task: DetectTask | ChangeTask | CaptionTask, view: View) -> Demand:
    """What the memory plan must know of this view."""
    names = {DetectTask: "detect", ChangeTask: "change", CaptionTask: "caption"}
    raster = view.rasters[0]
    return Demand(
        names[type(task)],
        view.spec,
        task.memory,
        # One validity byte per pixel travels with the bands.
        bytes_per_pixel=len(raster.band_roles) * raster.dtype.itemsize + 1,
        scale_xy=view.grid().scale_xy,
        width=view.size[0],
        resident_bytes=sum(BLOCKS_OPEN * r.block_bytes if r.windowed else r.decoded_bytes for r in view.rasters),
        canvas_rows=math.ceil(2 * view.spec.tile_px * view.scale_xy[1]),
        dates=len(view.rasters),
    )
