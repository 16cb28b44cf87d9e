"""What sensors, air and storage do to an image, done to a tile: noise, blur, haze, JPEG.

Shapes: tiles [5,H,W] f32 as the model sees them, in the stem's band order (red, green, blue, nir, validity).
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from edge_rsvlm.export.default.data.views import MEAN, STD

F32 = npt.NDArray[np.float32]
SHARE = 0.35
"""Of tiles that are degraded, each in one way."""
RGB = slice(0, 3)


def degraded(rng: np.random.Generator, tile_5HW: F32) -> F32:
    """The tile, or one that went through worse optics, weather or storage; validity, and what is invalid, stay."""
    if rng.random() > SHARE:
        return tile_5HW
    colours = tile_5HW[RGB] * STD + MEAN
    made = (noise, blur, haze, jpeg)[int(rng.integers(4))](rng, colours)
    result = tile_5HW.copy()
    result[RGB] = np.where(tile_5HW[4] > 0, (made - MEAN) / STD, tile_5HW[RGB])
    return result


def noise(rng: np.random.Generator, rgb_3HW: F32) -> F32:
    """Shot and read noise as of a camera at high gain: its spread grows with the root of the signal."""
    strength = rng.uniform(0.01, 0.06)
    spread = strength * np.sqrt(np.clip(rgb_3HW, 0.02, 1.0) + 0.1)
    return np.asarray(rgb_3HW + rng.normal(size=rgb_3HW.shape) * spread, np.float32)


def blur(rng: np.random.Generator, rgb_3HW: F32) -> F32:
    """A Gaussian point spread of 0.5 to 1.8 px, as of focus, motion or a coarser sensor that was magnified."""
    radius = ImageFilter.GaussianBlur(float(rng.uniform(0.5, 1.8)))
    return np.stack([np.asarray(Image.fromarray(band).filter(radius)) for band in _bytes(rgb_3HW)]).astype(
        np.float32
    ) / np.float32(255)


def haze(rng: np.random.Generator, rgb_3HW: F32) -> F32:
    """Light scattered into the view: v t + A (1 - t) with a transmission t and an airlight A a little blue.

    (Koschmieder's law, as in Narasimhan & Nayar 2002, "Vision and the Atmosphere".)
    """
    transmission = float(rng.uniform(0.4, 0.9))
    light = (float(rng.uniform(0.7, 0.95)) + np.array([-0.02, 0.0, 0.03]))[:, None, None]
    return np.asarray(rgb_3HW * transmission + light * (1 - transmission), np.float32)


def jpeg(rng: np.random.Generator, rgb_3HW: F32) -> F32:
    """Stored as JPEG at a quality of 20 to 80."""
    stored = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(_bytes(rgb_3HW).transpose(1, 2, 0))).save(
        stored, "JPEG", quality=int(rng.integers(20, 81))
    )
    read = np.asarray(Image.open(stored).convert("RGB"), np.float32) / np.float32(255)
    return np.ascontiguousarray(read.transpose(2, 0, 1))


def _bytes(rgb_3HW: F32) -> npt.NDArray[np.uint8]:
    return np.asarray(np.clip(rgb_3HW * 255 + 0.5, 0, 255), np.uint8)
