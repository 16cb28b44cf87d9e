"""How each task looks at a raster: at which ground resolution, in which tiles."""

from __future__ import annotations

from edge_rsvlm.budget import Demand
from edge_rsvlm.config.manifest import CaptionTask, ChangeTask, DetectTask, InputSpec
from edge_rsvlm.geo import PixelMapper, metres_per_pixel
from edge_rsvlm.pipeline.stream import View
from edge_rsvlm.raster.plan import choose_scale
from edge_rsvlm.raster.reader import Raster

WHOLE_IMAGE_TILES = 2
"""Without a CRS a caption describes the whole image when its long side is at most this many tiles."""


def scene_view(rasters: tuple[Raster, ...], spec: InputSpec, resolution_m: float | None) -> View:
    """Tiles of ``spec`` at the ground resolution it was trained for, or at native pixels where that is unknown."""
    reference = rasters[0]
    located = PixelMapper(reference.georeference).located
    metres = metres_per_pixel(reference.georeference) if located else None
    overviews = [d for d in reference.overviews if all(d in raster.overviews for raster in rasters)]
    scale_x, scale_y, decimation = choose_scale(metres, spec.resolution_m, resolution_m, overviews)
    return View(rasters, spec, (scale_x, scale_y), decimation)


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
        scale_xy=view.scale_xy,
        width=view.size[0],
        decoded_bytes=sum(0 if r.windowed else r.decoded_bytes for r in view.rasters),
        dates=len(view.rasters),
    )
