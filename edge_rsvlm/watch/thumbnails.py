"""A small picture of each scene, for people on the ground."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_rsvlm.pipeline.scaling import role_bands
from edge_rsvlm.raster.reader import Raster, open_raster

SIDE_PX, QUALITY = 256, 70
SHOWN_PERCENTILES = (2, 98)


def thumbnail(path: str) -> bytes:
    """JPEG with a longest side of 256 px, in colour where the bands are named, else of the first one.

    InputError: unreadable.
    """
    stored = io.BytesIO()
    with open_raster(path) as raster:
        Image.fromarray(_picture(raster)).save(stored, "JPEG", quality=QUALITY)
    return stored.getvalue()


def _picture(raster: Raster) -> NDArray[np.uint8]:
    """[H, W, 3], stretched from dark to bright: for eyes, not for measuring."""
    pixels, lookup = raster.shrunk(SIDE_PX), role_bands(raster)
    data_3HW = pixels.data_CHW[[lookup.get(role, 0) for role in ("red", "green", "blue")]].astype(np.float32)
    valid_HW = (pixels.valid_HW > 0) & np.isfinite(data_3HW).all(axis=0)
    known = data_3HW[:, valid_HW]
    low, high = np.percentile(known, SHOWN_PERCENTILES) if known.size else (0.0, 1.0)
    stretched = np.where(valid_HW, (data_3HW - low) / max(high - low, 1e-6), 0)
    picture_HW3: NDArray[np.uint8] = np.rint(stretched.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    return picture_HW3
