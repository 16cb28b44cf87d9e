"""Synthetic scenes with known objects, for tests of the way from a raster to results."""

from __future__ import annotations

import numpy as np
import rasterio
from rasterio.transform import Affine

SQUARES = ((40, 30, 14), (150, 61, 10), (97, 128, 12), (128, 90, 8), (300, 210, 16), (20, 250, 12), (255, 255, 10))
"""(col, row, side) on a raster of 340 x 300, one of them on a border of tiles."""
SIZE = (340, 300)


def pixels(squares=SQUARES, size=SIZE, dtype="uint8", bright=255, bands=3):
    """Dark ground with bright squares, [bands, H, W]."""
    image = np.full((bands, size[1], size[0]), bright * 0.2, dtype)
    for col, row, side in squares:
        image[:, row : row + side, col : col + side] = bright
    return image


def write(path, data_CHW, driver="GTiff", **profile):
    if driver == "GTiff" and "tiled" not in profile:
        profile |= {"tiled": True, "blockxsize": 128, "blockysize": 128}
    count, height, width = data_CHW.shape
    with rasterio.open(
        path, "w", driver=driver, width=width, height=height, count=count, dtype=data_CHW.dtype, **profile
    ) as out:
        out.write(data_CHW)
    return path


UTM = {"crs": "EPSG:32633", "transform": Affine(0.5, 0, 500_000, 0, -0.5, 5_300_000)}
