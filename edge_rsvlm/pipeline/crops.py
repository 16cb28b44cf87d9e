"""Small pictures of a change: both dates on one ground and in one brightness, with the change outlined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from edge_rsvlm.pipeline.looks import Polygon, both_dates, bounds_px, middle
from edge_rsvlm.pipeline.outcome import Outcome
from edge_rsvlm.pipeline.scaling import radiometry, role_bands
from edge_rsvlm.pipeline.stream import View
from edge_rsvlm.sinks.files import writing, written_whole
from edge_rsvlm.types import Pixels, Window

SIDE_PX = 256
"""Longest side of a picture."""
LEAST_PX = 48
"""Least side of what is shown, in raster pixels: a change of a few pixels says nothing without its surroundings."""
MOST_READ_PX = 512
"""Longest side of what is read; of a larger region a part is shown."""
MARGIN = 0.3
"""Of the region's side, around it."""
OUTLINE, SHADOW = (255, 209, 71), (18, 22, 28)
WEBP_QUALITY = 85
NO_DATA = 24


@dataclass(frozen=True)
class Crops:
    """Writes pictures into ``folder``. Of each date ``bands`` are red, green and blue; ``values`` black and white."""

    folder: Path
    view: View
    bands: Sequence[Sequence[int]]
    values: Sequence[tuple[float, float]]

    @staticmethod
    def of(view: View, folder: Path) -> Crops:
        """Values are those between which the model sees each date, whatever lies in a crop."""
        lookups = [role_bands(raster) for raster in view.rasters]
        bands = [[lookup[role] for role in ("red", "green", "blue")] for lookup in lookups]
        return Crops(folder, view, bands, [radiometry(view.spec, raster, Outcome()) for raster in view.rasters])

    def write(self, name: str, polygon: Polygon) -> list[str]:
        """The files of BEFORE and AFTER, in this order; none where not both dates show the region."""
        decimation, window = self._window(polygon)
        dates = both_dates(self.view, window, decimation)
        if dates is None:
            return []
        paths = [self.folder / f"{name}.{which}.webp" for which in ("before", "after")]
        for path, pixels, bands, values in zip(paths, dates, self.bands, self.values, strict=True):
            picture = self._drawn(_shown(pixels, bands, values), polygon, dates[1].window, decimation)
            with written_whole(path) as partial, writing(path):
                picture.save(partial, "WEBP", quality=WEBP_QUALITY)
        return [str(path) for path in paths]

    def _window(self, polygon: Polygon) -> tuple[int, Window]:
        """(decimation, window in pixels of that overview) around a region."""
        x0, y0, x1, y1 = bounds_px(polygon)
        side = max(max(x1 - x0, y1 - y0) * (1 + 2 * MARGIN), LEAST_PX)
        x, y = ((x0 + x1) / 2, (y0 + y1) / 2) if side <= MOST_READ_PX else middle(polygon)
        usable = [d for d in self.view.rasters[-1].overviews if self._has(d) and side / d >= SIDE_PX]
        decimation = max(usable, default=1)
        width, height = self.view.rasters[-1].size_at(decimation)
        scale_x, scale_y = self.view.size[0] / width, self.view.size[1] / height
        half_x, half_y = (min(side / scale, MOST_READ_PX) / 2 for scale in (scale_x, scale_y))
        left, top = max(math.floor(x / scale_x - half_x), 0), max(math.floor(y / scale_y - half_y), 0)
        right, bottom = min(math.ceil(x / scale_x + half_x), width), min(math.ceil(y / scale_y + half_y), height)
        return decimation, Window(left, top, right - left, bottom - top)

    def _has(self, decimation: int) -> bool:
        """Whether both dates have an overview, of one size."""
        before, after = self.view.rasters
        return decimation in before.overviews and before.size_at(decimation) == after.size_at(decimation)

    def _drawn(self, rgb_HW3: NDArray[np.uint8], polygon: Polygon, window: Window, decimation: int) -> Image.Image:
        picture = Image.fromarray(rgb_HW3)
        zoom = SIDE_PX / max(picture.size)
        size = (max(round(picture.width * zoom), 1), max(round(picture.height * zoom), 1))
        resampling = Image.Resampling.LANCZOS if zoom < 1 else Image.Resampling.BICUBIC
        picture = picture.resize(size, resampling)
        overview = np.array(self.view.rasters[-1].size_at(decimation)) / self.view.size
        scale = np.array(size) / (window.width, window.height)
        draw = ImageDraw.Draw(picture)
        parts = [polygon["coordinates"]] if polygon["type"] == "Polygon" else polygon["coordinates"]
        rings = [((np.array(ring) * overview - (window.col, window.row)) * scale) for part in parts for ring in part]
        for colour, width in ((SHADOW, 4), (OUTLINE, 2)):
            for ring in rings:
                draw.line([tuple(point) for point in ring.tolist()], fill=colour, width=width)
        return picture


def _shown(pixels: Pixels, bands: Sequence[int], values: tuple[float, float]) -> NDArray[np.uint8]:
    """Red, green and blue [H, W, 3], from the darkest to the brightest value that the model knows."""
    low, high = values
    rgb_3HW = np.clip((pixels.data_CHW[list(bands)].astype(np.float32) - low) / (high - low), 0, 1)
    rgb_HW3: NDArray[np.uint8] = np.rint(rgb_3HW.transpose(1, 2, 0) * 255).astype(np.uint8)
    rgb_HW3[pixels.valid_HW == 0] = NO_DATA
    return rgb_HW3
