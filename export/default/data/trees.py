"""Tree points on NAIP tiles (Ventura et al. 2022), for the dense map: cells with a tree, and cells without a plant.

Shapes: tiles [5,size,size], cells of STRIDE tile pixels. A plant that nobody marked may be a tree or not: only where
near infrared says that there is none is a cell known to hold no tree.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import rasterio

from edge_rsvlm.export.default.data.augment import degraded
from edge_rsvlm.export.default.data.views import U8_RANGE, cut, dihedral, jitter
from edge_rsvlm.export.default.model.dense import STRIDE
from edge_rsvlm.tiles import ABSENT, VALIDITY

F32 = npt.NDArray[np.float32]
BARE_NDVI = 0.05
"""Below it nothing green grows: soil, roofs and roads lie under 0.1, lawns and crowns from 0.2 up."""
NIR_SHARE = 0.3
"""Of tiles that show their near infrared; the others are colour images, as most are."""


class TreeData:
    """Random crops of the tiles of all places but those in ``exclude`` (names of cities)."""

    def __init__(self, folder: Path, exclude: frozenset[str] = frozenset()) -> None:
        rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
        self.tiles = [
            (_read(folder / "train" / row["image"]), np.array(row["trees_xy"], np.float64).reshape(-1, 2))
            for row in rows
            if city_of(row["site"]) not in exclude
        ]

    def sample(self, rng: np.random.Generator, size_px: int) -> tuple[F32, F32]:
        """A tile, and per cell [size/8,size/8] whether there is a tree: 1, 0, or -1 where nobody knows."""
        image, points_xy = self.tiles[rng.integers(len(self.tiles))]
        side = size_px / float(np.exp(rng.uniform(np.log(1.0), np.log(1.6))))
        height, width = image.shape[:2]
        x0, y0 = rng.uniform(0, max(width - side, 0)), rng.uniform(0, max(height - side, 0))
        box = (x0, y0, x0 + side, y0 + side)
        nir = 3 if rng.random() < NIR_SHARE else ABSENT
        light = jitter(rng, 0.15, 0.05, 0.03)
        tile = cut(image, box, (size_px, size_px), (0, 1, 2, nir, VALIDITY), U8_RANGE, light)
        view = int(rng.integers(8))
        known = _cells(image, points_xy, box, size_px // STRIDE)
        return degraded(rng, np.ascontiguousarray(dihedral(tile, view))), np.ascontiguousarray(dihedral(known, view))


def city_of(site: str) -> str:
    """Sites of a city lie near each other."""
    return site.rpartition("_")[0]


def _read(path: Path) -> npt.NDArray[np.uint8]:
    with rasterio.open(path) as raster:
        return np.ascontiguousarray(raster.read().transpose(1, 2, 0))


def _cells(
    image: npt.NDArray[np.uint8], points_xy: npt.NDArray[np.float64], box: tuple[float, float, float, float], n: int
) -> F32:
    whole = cut(image, box, (n, n), (0, ABSENT, ABSENT, 3, VALIDITY), U8_RANGE)
    red, nir = (whole[[0, 3]] * 0.5 + 0.5).astype(np.float64)
    bare = (nir - red) / np.maximum(nir + red, 1e-3) < BARE_NDVI
    known = np.where(bare & (whole[4] > 0), 0.0, -1.0).astype(np.float32)
    col, row = ((points_xy - box[:2]) / (np.subtract(box[2:], box[:2])) * n).T.astype(int)
    inside = (col >= 0) & (row >= 0) & (col < n) & (row < n)
    known[row[inside], col[inside]] = 1.0
    return known
