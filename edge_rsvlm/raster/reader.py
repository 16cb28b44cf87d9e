"""Reading windows of a raster through GDAL, whatever the format, with one error type for whatever goes wrong."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window as RasterioWindow

from edge_rsvlm.errors import InputError
from edge_rsvlm.types import Georeference, GroundControlPoint, Pixels, Window

CACHE_BYTES = 32 << 20
"""GDAL's block cache; the memory plan counts it."""
WHOLE_IMAGE_BYTES = 8 << 20
"""A single-block raster up to this decoded size is as good as windowed."""
WHOLE_IMAGE_DRIVERS = frozenset({"PNG", "JPEG", "WEBP", "GIF", "BMP"})
SUPPORTED = "GeoTIFF, COG, JPEG 2000, PNG, JPEG and WebP are supported"
SENTINEL_2_ROLES = {"B02": "blue", "B03": "green", "B04": "red", "B08": "nir", "B8A": "nir"}
ROLES = {
    ColorInterp.red: "red",
    ColorInterp.green: "green",
    ColorInterp.blue: "blue",
    ColorInterp.gray: "gray",
    ColorInterp.alpha: "alpha",
}

logging.getLogger("rasterio").setLevel(logging.CRITICAL)  # failures come back as errors; GDAL's log repeats them


@contextmanager
def foreign_errors(name: str) -> Iterator[None]:
    """Failures of GDAL as one InputError that names the input."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            yield
    except (RasterioError, OSError, ValueError, MemoryError) as exc:
        reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        raise InputError(f"{name}: cannot be read ({reason})", fix=_advice(name)) from exc
    except Exception as exc:
        if "CPLE" not in type(exc).__name__:
            raise
        raise InputError(f"{name}: cannot be read ({exc})", fix=_advice(name)) from exc


def _advice(name: str) -> str:
    path = Path(name)
    if name.startswith("/vsi"):
        return "check that the archive is whole"
    if not path.exists():
        return "check the path"
    if path.is_file() and path.stat().st_size == 0:
        return "the file is empty: copy it again"
    return f"copy it again if it should be whole; {SUPPORTED}"


@dataclass
class Raster:
    """An open raster. Use ``open_raster``; not for several threads at once."""

    name: str
    dataset: Any
    georeference: Georeference
    dtype: np.dtype[Any]
    band_roles: tuple[str, ...]
    _bands: tuple[int, ...]
    _palette: NDArray[np.uint8] | None = None
    _scaling: tuple[tuple[float, float], ...] | None = None
    _whole: tuple[NDArray[Any], NDArray[np.uint8]] | None = field(default=None, repr=False)

    @property
    def block_hw(self) -> tuple[int, int]:
        height, width = self.dataset.block_shapes[0]
        return int(height), int(width)

    @property
    def windowed(self) -> bool:
        """Whether a window can be read without decoding the whole image."""
        block_h, block_w = self.block_hw
        one_block = block_h >= self.georeference.height and block_w >= self.georeference.width
        large = self.decoded_bytes > WHOLE_IMAGE_BYTES
        return self.dataset.driver not in WHOLE_IMAGE_DRIVERS and not (one_block and large)

    @property
    def decoded_bytes(self) -> int:
        """Bytes of all bands and the mask when decoded whole."""
        per_pixel = len(self.band_roles) * self.dtype.itemsize + 1
        return self.georeference.width * self.georeference.height * per_pixel

    @property
    def overviews(self) -> tuple[int, ...]:
        """Decimation factors that can be read cheaply."""
        return tuple(int(d) for d in self.dataset.overviews(1))

    def read(self, window: Window, decimation: int = 1) -> Pixels:
        """Bands and validity of ``window``, which counts pixels of the raster decimated by ``decimation``."""
        if not self.windowed:
            data_CHW, valid_HW = self._decoded()
            rows = slice(window.row, window.row + window.height)
            columns = slice(window.col, window.col + window.width)
            return Pixels(data_CHW[:, rows, columns], valid_HW[rows, columns], window, self.georeference)
        data_CHW, valid_HW = self._read(window, decimation)
        return Pixels(data_CHW, valid_HW, window, self.georeference)

    def _decoded(self) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        if self._whole is None:
            self._whole = self._read(Window(0, 0, self.georeference.width, self.georeference.height), 1)
        return self._whole

    def _read(self, window: Window, decimation: int) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        width, height = self.georeference.width, self.georeference.height
        step_x = width / math.ceil(width / decimation)
        step_y = height / math.ceil(height / decimation)
        source = RasterioWindow(window.col * step_x, window.row * step_y, window.width * step_x, window.height * step_y)
        shape = (window.height, window.width)
        options = {"window": source, "resampling": Resampling.average if decimation > 1 else Resampling.nearest}
        with foreign_errors(self.name):
            raw_CHW = self.dataset.read(self._bands, out_shape=(len(self._bands), *shape), **options)
            valid_HW = self._validity(raw_CHW, options, shape)
        return self._values(raw_CHW), valid_HW

    def _validity(self, raw_CHW: NDArray[Any], options: dict[str, Any], shape: tuple[int, int]) -> NDArray[np.uint8]:
        """1 where a pixel is valid: by mask or alpha, unless all bands are nodata, and never where a band is not a number."""
        flags = self.dataset.mask_flag_enums[self._bands[0] - 1]
        if MaskFlags.all_valid in flags:
            valid = np.ones(shape, bool)
        elif MaskFlags.nodata in flags:
            valid = ~_equals(raw_CHW, self.dataset.nodata).all(axis=0)
        else:
            masks = {"window": options["window"], "out_shape": shape}
            valid = self.dataset.read_masks(self._bands[0], **masks) > 127
        if np.issubdtype(raw_CHW.dtype, np.inexact):
            valid &= np.isfinite(raw_CHW).all(axis=0)
        return valid.astype(np.uint8)

    def _values(self, raw_CHW: NDArray[Any]) -> NDArray[Any]:
        """Palette indices as colours; other types than 8 and 16 bits unsigned as float32; scale and offset applied."""
        if self._palette is not None:
            return np.ascontiguousarray(np.moveaxis(self._palette[raw_CHW[0]], -1, 0))
        if self._scaling is None and raw_CHW.dtype == self.dtype:
            return raw_CHW
        values = np.abs(raw_CHW) if np.iscomplexobj(raw_CHW) else raw_CHW
        values = np.nan_to_num(values.astype(np.float32), copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        for band, (scale, offset) in zip(values, self._scaling or (), strict=False):
            band *= scale
            band += offset
        return values


def _equals(values: NDArray[Any], nodata: float | None) -> NDArray[np.bool_]:
    if nodata is None:
        return np.zeros(values.shape, bool)
    found: NDArray[np.bool_] = np.isnan(values) if math.isnan(nodata) else values == nodata
    return found


@contextmanager
def open_raster(path: str, name: str | None = None) -> Iterator[Raster]:
    """Open ``path`` for reading by window; InputError when that cannot be done."""
    name = path if name is None else name
    with rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES, GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", GDAL_PAM_ENABLED="NO"):
        if Path(path).is_dir():
            raise InputError(f"{name}: is a folder without images", fix="name image files")
        with foreign_errors(name):
            dataset = rasterio.open(path)
        try:
            yield describe(name, dataset)
        finally:
            dataset.close()


def describe(name: str, dataset: Any) -> Raster:
    """The facts of an open dataset."""
    if dataset.count == 0 or dataset.width == 0 or dataset.height == 0:
        raise InputError(f"{name}: holds no bands (its subdatasets may)", fix="name one: gdalinfo lists them")
    roles = band_roles(dataset)
    bands = tuple(i + 1 for i, role in enumerate(roles) if role != "alpha")
    if not bands:
        raise InputError(f"{name}: has only an alpha band", fix="name an image with colour or gray bands")
    palette = _palette(dataset)
    scaled = any(s != 1 for s in dataset.scales) or any(o != 0 for o in dataset.offsets)
    dtype = np.dtype(dataset.dtypes[0])
    if palette is not None:
        dtype, roles, bands = np.dtype(np.uint8), ("red", "green", "blue"), (1,)
    elif scaled or dtype not in (np.uint8, np.uint16) or len(set(dataset.dtypes)) > 1:
        dtype = np.dtype(np.float32)
    scaling = tuple((dataset.scales[b - 1], dataset.offsets[b - 1]) for b in bands) if scaled else None
    return Raster(
        name, dataset, georeference(dataset), dtype, tuple(r for r in roles if r != "alpha"), bands, palette, scaling
    )


def georeference(dataset: Any) -> Georeference:
    """Transform or ground control points, and CRS; a CRS of neither kind of geometry is kept for the warning."""
    points, gcp_crs = dataset.gcps
    # rasterio reports the identity for a file without a transform.
    transform = dataset.transform if dataset.transform != Affine.identity() else None
    if transform is None and points and gcp_crs:
        gcps = tuple(GroundControlPoint(p.col, p.row, p.x, p.y) for p in points)
        return Georeference(dataset.width, dataset.height, gcp_crs.to_wkt(), None, gcps)
    crs_wkt = dataset.crs.to_wkt() if dataset.crs else None
    return Georeference(dataset.width, dataset.height, crs_wkt, transform)


def band_roles(dataset: Any) -> tuple[str, ...]:
    """What each band shows: Sentinel-2 names in the descriptions, then colour interpretation, then the usual orders."""
    named = [SENTINEL_2_ROLES.get((d or "").strip().upper()[:3]) for d in dataset.descriptions]
    if "red" in named:
        return tuple(role or "unknown" for role in named)
    roles = [ROLES.get(c, "unknown") for c in dataset.colorinterp]
    described = [(d or "").strip().lower() for d in dataset.descriptions]
    roles = [
        "nir" if d in ("nir", "near infrared", "near-infrared") else r for r, d in zip(roles, described, strict=True)
    ]
    optical = [i for i, role in enumerate(roles) if role != "alpha"]
    if "red" not in roles:
        usual = {1: ("gray",), 3: ("red", "green", "blue"), 4: ("red", "green", "blue", "nir")}.get(len(optical))
        for i, role in zip(optical, usual or (), strict=False):
            roles[i] = role
    elif roles.count("unknown") == 1 and "nir" not in roles and len(optical) == 4:
        roles[roles.index("unknown")] = "nir"
    return tuple(roles)


def _palette(dataset: Any) -> NDArray[np.uint8] | None:
    """Colours [256, 3] of an indexed image."""
    if dataset.colorinterp[0] != ColorInterp.palette or dataset.dtypes[0] != "uint8":
        return None
    colours = np.zeros((256, 3), np.uint8)
    for index, colour in dataset.colormap(1).items():
        if index < 256:
            colours[index] = colour[:3]
    return colours
