"""``tile_gather``: one call from a window of raster pixels to a batch of model tiles, native or NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm import _kernels
from edge_rsvlm.config.prepare import Filter
from edge_rsvlm.errors import UsageError
from edge_rsvlm.tiles import reference
from edge_rsvlm.tiles.reference import ABSENT, VALIDITY

__all__ = ["ABSENT", "VALIDITY", "GatherResult", "tile_gather", "variants"]

SOURCE_DTYPES = (np.uint8, np.uint16, np.float32)
TILE_DTYPES = (np.float32, np.uint8)


@dataclass(frozen=True)
class GatherResult:
    """``tiles_NCHW`` float32 or uint8; ``valid_fraction_N`` and ``texture_N`` float32."""

    tiles_NCHW: NDArray[Any]
    valid_fraction_N: NDArray[np.float32]
    texture_N: NDArray[np.float32]


def variants() -> tuple[str, ...]:
    """What can run here, best first; the last one is the NumPy specification."""
    return (*_kernels.variants(), "reference")


def tile_gather(
    source: NDArray[Any],
    boxes_N4: NDArray[np.float64],
    *,
    out_hw: tuple[int, int],
    bands: Sequence[int],
    gain: Sequence[float],
    bias: Sequence[float],
    layout: Literal["HWC", "CHW"] = "HWC",
    origin: tuple[int, int] = (0, 0),
    raster_size: tuple[int, int] | None = None,
    valid: NDArray[Any] | None = None,
    nodata: float | None = None,
    dtype: type[np.float32] | type[np.uint8] = np.float32,
    resampling: Filter = "bilinear",
    rounding: Literal["once", "pillow"] = "once",
    threads: int = 1,
    variant: str = "auto",
) -> GatherResult:
    """Cut, resample, select, normalise and lay out tiles; see ``tiles/reference.py`` for the exact meaning.

    ``source`` is uint8, uint16 or float32 in ``layout``; its pixel (0, 0) is raster pixel ``origin`` = (col, row) of a
    raster of ``raster_size`` = (width, height). ``boxes_N4`` are (x0, y0, x1, y1) in raster pixels, may hang outside:
    what lies outside is invalid. ``bands[c]`` is the source band of channel c, or ABSENT, or VALIDITY; a tile value is
    source * ``gain[c]`` + ``bias[c]``, and uint8 tiles are rounded half to even and clipped. A pixel is invalid where
    ``valid`` [H, W] is zero, and where every source band that is used equals ``nodata``. The result does not depend on
    ``threads``. With ``rounding="pillow"`` the resampled value is the 8-bit one that ``PIL.Image.resize`` gives, before
    gain and bias; this takes a whole raster of uint8 pixels that are all valid. Raises UsageError for shapes, dtypes, a
    filter or a variant that cannot work.
    """
    source = np.ascontiguousarray(source)
    boxes_N4 = np.ascontiguousarray(boxes_N4, dtype=np.float64)
    _check(source, boxes_N4, bands, gain, bias, layout, dtype, valid)
    height, width = source.shape[:2] if layout == "HWC" else source.shape[1:]
    raster_size = raster_size or (origin[0] + width, origin[1] + height)
    valid_HW = _validity(source, bands, layout, valid, nodata)
    whole = tuple(origin) == (0, 0) and tuple(raster_size) == (width, height)
    _check_resampling(source, whole and valid_HW is None, resampling, rounding)
    bands_C, gain_C, bias_C = np.asarray(bands, np.int32), np.asarray(gain, np.float32), np.asarray(bias, np.float32)
    result = GatherResult(
        np.empty((len(boxes_N4), len(bands_C), *out_hw), dtype),
        np.empty(len(boxes_N4), np.float32),
        np.empty(len(boxes_N4), np.float32),
    )
    chosen = variants()[0] if variant == "auto" else variant
    if chosen not in variants():
        raise UsageError(f"kernel variant '{variant}' does not run here", fix=f"choose one of {', '.join(variants())}")
    if chosen == "reference":
        source_CHW = source.transpose(2, 0, 1) if layout == "HWC" else source
        for n, box in enumerate(boxes_N4):
            tile, result.valid_fraction_N[n], result.texture_N[n] = reference.gather_tile(
                source_CHW, valid_HW, box, out_hw, bands_C, gain_C, bias_C, origin, raster_size,
                resampling, rounding == "pillow",
            )  # fmt: skip
            result.tiles_NCHW[n] = np.clip(np.rint(tile), 0, 255) if dtype is np.uint8 else tile
        return result
    _kernels.tile_gather_into(
        source, layout == "HWC", valid_HW, boxes_N4, bands_C, gain_C, bias_C, list(origin), list(raster_size),
        result.tiles_NCHW, result.valid_fraction_N, result.texture_N, resampling, rounding == "pillow", threads, chosen,
    )  # fmt: skip
    return result


def _check(
    source: NDArray[Any],
    boxes_N4: NDArray[np.float64],
    bands: Sequence[int],
    gain: Sequence[float],
    bias: Sequence[float],
    layout: str,
    dtype: type,
    valid: NDArray[Any] | None,
) -> None:
    if source.ndim != 3 or source.dtype.type not in SOURCE_DTYPES or source.size == 0:
        raise UsageError(
            f"source is {source.dtype} of shape {source.shape}",
            fix="pass a non-empty 3-D uint8, uint16 or float32 array",
        )
    if dtype not in TILE_DTYPES:
        raise UsageError(f"tile dtype {dtype} is not supported", fix="ask for numpy.float32 or numpy.uint8")
    if not (len(bands) == len(gain) == len(bias)):
        raise UsageError("bands, gain and bias differ in length", fix="give one of each per channel")
    count = source.shape[2] if layout == "HWC" else source.shape[0]
    if any(band >= count or band < VALIDITY for band in bands):
        raise UsageError(f"bands {list(bands)} of a source with {count}", fix=f"use 0..{count - 1}, ABSENT or VALIDITY")
    spatial = source.shape[:2] if layout == "HWC" else source.shape[1:]
    if valid is not None and valid.shape != spatial:
        raise UsageError(f"valid has shape {valid.shape}, the source {spatial}", fix="make them equal")
    if boxes_N4.ndim != 2 or boxes_N4.shape[1] != 4 or not np.isfinite(boxes_N4).all():
        raise UsageError("boxes must be finite and of shape [N, 4]", fix="pass x0, y0, x1, y1 in raster pixels")
    if (boxes_N4[:, 2:] <= boxes_N4[:, :2]).any():
        raise UsageError("a box is empty", fix="make x1 > x0 and y1 > y0")


def _check_resampling(source: NDArray[Any], complete: bool, resampling: str, rounding: str) -> None:
    if resampling not in get_args(Filter):
        raise UsageError(f"filter '{resampling}' is not known", fix=f"choose one of {', '.join(get_args(Filter))}")
    if rounding not in ("once", "pillow"):
        raise UsageError(f"rounding '{rounding}' is not known", fix="choose once or pillow")
    if rounding == "pillow" and (source.dtype != np.uint8 or not complete or resampling == "gaussian"):
        raise UsageError(
            "Pillow's rounding is for whole 8-bit rasters that are valid everywhere, and for Pillow's filters",
            fix="gather to uint8 first, and resize the result",
        )


def _validity(
    source: NDArray[Any], bands: Sequence[int], layout: str, valid: NDArray[Any] | None, nodata: float | None
) -> NDArray[np.uint8] | None:
    used = sorted({band for band in bands if band >= 0})
    mask = None if valid is None else valid != 0
    if nodata is not None and used:
        planes = source[..., used] if layout == "HWC" else np.moveaxis(source[used], 0, -1)
        absent = np.isnan(planes) if np.isnan(nodata) else planes == nodata
        mask = ~absent.all(axis=-1) if mask is None else mask & ~absent.all(axis=-1)
    return None if mask is None else np.ascontiguousarray(mask, dtype=np.uint8)
