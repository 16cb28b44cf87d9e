"""A small picture of each scene, for people on the ground."""

from __future__ import annotations

import io
import warnings

import numpy as np
import rasterio
from numpy.typing import NDArray
from PIL import Image
from rasterio.errors import NodataShadowWarning, NotGeoreferencedWarning

from edge_rsvlm.raster.reader import foreign_errors

SIDE_PX, QUALITY = 256, 70


def thumbnail(path: str) -> bytes:
    """JPEG with a longest side of 256 px, from the first three bands or the first one. InputError: unreadable."""
    stored = io.BytesIO()
    with foreign_errors(path):
        Image.fromarray(_picture(path)).save(stored, "JPEG", quality=QUALITY)
    return stored.getvalue()


def _picture(path: str) -> NDArray[np.uint8]:
    """[H, W, 3] or [H, W], stretched between the 2nd and 98th percentile: for eyes, not for measuring."""
    with warnings.catch_warnings(), rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="TRUE"):
        for warning in (NotGeoreferencedWarning, NodataShadowWarning):
            warnings.simplefilter("ignore", warning)
        with rasterio.open(path) as dataset:
            bands = [1, 2, 3] if dataset.count >= 3 else [1]
            scale = SIDE_PX / max(dataset.width, dataset.height, SIDE_PX)
            size = max(round(dataset.height * scale), 1), max(round(dataset.width * scale), 1)
            data_CHW = dataset.read(bands, out_shape=(len(bands), *size), masked=True).astype(np.float32)
    values = data_CHW.compressed()
    values = values[np.isfinite(values)]
    low, high = np.percentile(values, (2, 98)) if values.size else (0.0, 1.0)
    stretched = (data_CHW.filled(low) - low) / max(high - low, 1e-6) * 255
    picture_CHW = np.nan_to_num(stretched).clip(0, 255).astype(np.uint8)
    picture: NDArray[np.uint8] = picture_CHW.transpose(1, 2, 0) if len(bands) == 3 else picture_CHW[0]
    return picture
