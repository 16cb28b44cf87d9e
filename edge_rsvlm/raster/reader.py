"""Reading windows of a raster through GDAL, whatever the format, with one error type for whatever goes wrong."""

from __future__ import annotations

import glob
import itertools
import logging
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.enums import MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window as RasterioWindow

from edge_rsvlm.errors import InputError
from edge_rsvlm.raster.bands import band_roles, palette
from edge_rsvlm.raster.drone import place_by_flight
from edge_rsvlm.raster.rpc import place_by_polynomials
from edge_rsvlm.types import Georeference, GroundControlPoint, Pixels, Window

CACHE_BYTES = 32 << 20
"""GDAL's block cache; the memory plan counts it."""
BLOCK_BYTES = 8 << 20
"""Rasters whose blocks decode to more are held whole: windows would decode each block again and again."""
WHOLE_IMAGE_DRIVERS = frozenset({"PNG", "JPEG", "WEBP", "GIF", "BMP"})
SUPPORTED = "GeoTIFF, COG, JPEG 2000, PNG, JPEG and WebP are supported"
SAMPLE_PX = 64
TAIL_BYTES = 1 << 16

logging.getLogger("rasterio").setLevel(logging.CRITICAL)  # failures come back as errors; GDAL's log repeats them


@contextmanager
def foreign_errors(name: str) -> Iterator[None]:
    """Failures of GDAL as one InputError that names the input."""
    try:
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
    if glob.has_magic(name) and not path.exists():
        return f"nothing has such a name; {SUPPORTED}"
    if path.suffix.lower() == ".tar" and path.is_file():
        return f"check that the archive is whole and holds images; {SUPPORTED}"
    if not path.exists():
        return "check the path"
    if path.is_file() and path.stat().st_size == 0:
        return "the file is empty: copy it again"
    return f"copy it again if it should be whole; {SUPPORTED}"


@dataclass
class Raster:
    """An open raster. Use ``open_raster``. Several threads may ``read``, one after another.

    ``open_overview`` opens the dataset at one of ``overviews``, its factors of decimation. Only bands that have a role
    are read, and ``band_roles`` are theirs.
    """

    name: str
    dataset: Any
    georeference: Georeference
    dtype: np.dtype[Any]
    source_dtype: np.dtype[Any]
    band_roles: tuple[str, ...]
    overviews: tuple[int, ...]
    open_overview: Callable[[int], Any]
    _bands: tuple[int, ...]
    notes: tuple[str, ...] = ()
    """What the user should know of how the file was understood."""
    approximate: bool = False
    """It was placed by what comes near, as a drone's own GPS."""
    _alpha: int | None = None
    _palette: NDArray[np.uint8] | None = None
    _scaling: tuple[tuple[float, float], ...] | None = None
    _opened: dict[int, Any] = field(default_factory=dict, repr=False)
    _whole: tuple[NDArray[Any], NDArray[np.uint8]] | None = field(default=None, repr=False)
    _lock: Any = field(default_factory=threading.RLock, repr=False)

    @property
    def block_hw(self) -> tuple[int, int]:
        height, width = self.dataset.block_shapes[0]
        return int(height), int(width)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of all bands when decoded."""
        block_h, block_w = self.block_hw
        itemsize = max(np.dtype(dtype).itemsize for dtype in self.dataset.dtypes)
        return int(block_h * block_w * self.dataset.count * itemsize)

    @property
    def windowed(self) -> bool:
        """Whether a window can be read without decoding the whole image."""
        return self.dataset.driver not in WHOLE_IMAGE_DRIVERS and self.block_bytes <= BLOCK_BYTES

    @property
    def alpha_band(self) -> int | None:
        """The band, from 1, that says where the image is."""
        return self._alpha

    @property
    def indexed(self) -> bool:
        """Whether pixels are indices of a palette."""
        return self._palette is not None

    @property
    def scaled(self) -> bool:
        """Whether the file's own scale and offset make its values."""
        return self._scaling is not None

    @property
    def decoded_bytes(self) -> int:
        """Bytes of the bands that are read, and of the mask, when decoded whole."""
        per_pixel = len(self.band_roles) * self.dtype.itemsize + 1
        return self.georeference.width * self.georeference.height * per_pixel

    def level(self, decimation: int) -> Any:
        """The dataset of an overview, or of the raster itself for 1."""
        if decimation == 1:
            return self.dataset
        if decimation not in self._opened:
            with foreign_errors(self.name):
                self._opened[decimation] = self.open_overview(decimation)
        return self._opened[decimation]

    def size_at(self, decimation: int) -> tuple[int, int]:
        """(width, height) in pixels of an overview."""
        level = self.level(decimation)
        return int(level.width), int(level.height)

    def close(self) -> None:
        for dataset in self._opened.values():
            dataset.close()
        self._opened.clear()

    def read(self, window: Window, decimation: int = 1) -> Pixels:
        """Bands and validity of ``window``, which counts pixels of the overview that ``decimation`` names."""
        with self._lock:
            if self.windowed:
                data_CHW, valid_HW = self._read(self.level(decimation), window)
                return Pixels(data_CHW, valid_HW, window, self.georeference)
            data_CHW, valid_HW = self._decoded()
        rows = slice(window.row, window.row + window.height)
        columns = slice(window.col, window.col + window.width)
        return Pixels(data_CHW[:, rows, columns], valid_HW[rows, columns], window, self.georeference)

    def shrunk(self, longest_px: int) -> Pixels:
        """The whole raster with a longest side of ``longest_px`` at most, for a picture of it."""
        width, height = self.georeference.width, self.georeference.height
        everything, scale = Window(0, 0, width, height), min(longest_px / max(width, height), 1.0)
        shape = max(round(height * scale), 1), max(round(width * scale), 1)
        with self._lock:
            if self.windowed:
                data_CHW, valid_HW = self._read(self.dataset, everything, shape)
            else:
                rows, cols = (np.arange(n) * full // n for n, full in zip(shape, (height, width), strict=True))
                data_CHW, valid_HW = (values[..., rows[:, None], cols] for values in self._decoded())
        return Pixels(data_CHW, valid_HW, everything, self.georeference)

    def sample(self) -> NDArray[np.float32]:
        """Valid values of all bands in a few small windows that are spread over the raster."""
        found = []
        width, height = self.georeference.width, self.georeference.height
        for fy, fx in itertools.product((1, 3, 5), (1, 3, 5)):
            col, row = max(fx * width // 6 - SAMPLE_PX // 2, 0), max(fy * height // 6 - SAMPLE_PX // 2, 0)
            window = Window(col, row, min(SAMPLE_PX, width - col), min(SAMPLE_PX, height - row))
            pixels = self.read(window)
            found.append(pixels.data_CHW[:, pixels.valid_HW > 0].astype(np.float32).ravel())
        return np.concatenate(found)

    def _decoded(self) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        if self._whole is None:
            everything = Window(0, 0, self.georeference.width, self.georeference.height)
            self._whole = self._read(self.dataset, everything)
        return self._whole

    def _read(
        self, level: Any, window: Window, shape: tuple[int, int] | None = None
    ) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        """Bands and validity of a window, brought to ``shape`` (rows, columns) where it is given."""
        shape = shape or (window.height, window.width)
        part = RasterioWindow(window.col, window.row, window.width, window.height)
        resampling = Resampling.nearest if self.indexed else Resampling.average  # which matters where shapes differ
        with foreign_errors(self.name):
            raw_CHW = level.read(self._bands, window=part, out_shape=(len(self._bands), *shape), resampling=resampling)
            valid_HW = self._validity(level, raw_CHW, part)
        return self._values(raw_CHW), valid_HW

    def _validity(self, level: Any, raw_CHW: NDArray[Any], part: RasterioWindow) -> NDArray[np.uint8]:
        """1 where a pixel is valid: by nodata of all bands, by mask, by alpha, and where every band is a number."""
        flags = level.mask_flag_enums[self._bands[0] - 1]
        valid: NDArray[np.bool_] = np.ones(raw_CHW.shape[1:], bool)
        if MaskFlags.nodata in flags:
            valid &= ~_equals(raw_CHW, level.nodata).all(axis=0)
        elif MaskFlags.all_valid not in flags and (self._alpha is not None or MaskFlags.alpha not in flags):
            valid &= level.read_masks(self._bands[0], window=part, out_shape=raw_CHW.shape[1:]) > 127
        if self._alpha is not None and MaskFlags.alpha not in flags:
            valid &= level.read(self._alpha, window=part, out_shape=raw_CHW.shape[1:]) > 0
        if np.issubdtype(raw_CHW.dtype, np.inexact):
            valid &= np.isfinite(raw_CHW).all(axis=0)
        return valid.astype(np.uint8)

    def _values(self, raw_CHW: NDArray[Any]) -> NDArray[Any]:
        """Palette indices as colours; other types than 8 and 16 bits unsigned as float32; scale and offset applied."""
        if self._palette is not None:
            return np.ascontiguousarray(np.moveaxis(self._palette[raw_CHW[0]], -1, 0))
        if self._scaling is None and raw_CHW.dtype == self.dtype and self.dtype.kind == "u":
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
    # Sidecars (masks, overviews, world files) are looked for by name; a folder of many files is not listed for them.
    with rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES, GDAL_DISABLE_READDIR_ON_OPEN="TRUE"):
        if Path(path).is_dir():
            raise InputError(f"{name}: is a folder without images", fix=f"name image files; {SUPPORTED}")
        with ExitStack() as stack:
            with foreign_errors(name), warnings.catch_warnings():
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                dataset = stack.enter_context(rasterio.open(path))
                _forget_complaints(dataset)
                levels = tuple(int(d) for d in dataset.overviews(1)) if dataset.count else ()
                raster = describe(name, dataset, levels, lambda d: _open_overview(path, levels.index(d)))
            _check_whole(path, dataset.driver)
            stack.callback(raster.close)
            yield raster


def _forget_complaints(dataset: Any) -> None:
    """GDAL keeps what it did not like on opening, as XMP that is not well-formed, for the next call to trip over."""
    try:
        dataset.colorinterp  # noqa: B018
    except Exception as exc:
        if "CPLE" not in type(exc).__name__:
            raise


def _check_whole(path: str, driver: str) -> None:
    """GDAL reads what is left of a picture that was cut off, without a word: look for its end."""
    file = Path(path)
    if driver not in WHOLE_IMAGE_DRIVERS or not file.is_file():
        return
    with file.open("rb") as stream:
        size = file.stat().st_size
        head = stream.read(12)
        stream.seek(max(size - TAIL_BYTES, 0))
        tail = stream.read()
    whole = {
        "PNG": b"IEND" in tail,
        "JPEG": b"\xff\xd9" in tail,
        "WEBP": int.from_bytes(head[4:8], "little") + 8 <= size,
    }
    if not whole.get(driver, True):
        raise InputError(f"{path}: is cut off", fix="copy it again")


def _open_overview(path: str, index: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        return rasterio.open(path, overview_level=index)


def describe(name: str, dataset: Any, overviews: tuple[int, ...], open_overview: Callable[[int], Any]) -> Raster:
    """The facts of an open dataset."""
    if dataset.count == 0 or dataset.width == 0 or dataset.height == 0:
        raise InputError(f"{name}: holds no bands (its subdatasets may)", fix="name one: gdalinfo lists them")
    with foreign_errors(name):
        roles, notes = band_roles(dataset)
        where, place_notes = place(dataset)
    bands = tuple(i + 1 for i, role in enumerate(roles) if role not in ("alpha", "unknown"))
    if not bands:
        raise InputError(
            f"{name}: none of its {len(roles)} bands is red, green, blue or gray",
            fix="name them: gdal_edit.py -colorinterp_1 red -colorinterp_2 green -colorinterp_3 blue FILE",
        )
    source_dtype = np.dtype(dataset.dtypes[bands[0] - 1])
    colours = palette(dataset)
    scaled = any(dataset.scales[b - 1] != 1 or dataset.offsets[b - 1] != 0 for b in bands)
    mixed = len({dataset.dtypes[b - 1] for b in bands}) > 1
    dtype = source_dtype if source_dtype in (np.uint8, np.uint16) and not (scaled or mixed) else np.dtype(np.float32)
    read_roles = tuple(roles[b - 1] for b in bands)
    if colours is not None:
        dtype, read_roles, bands, scaled = np.dtype(np.uint8), ("red", "green", "blue"), (1,), False
    raster = Raster(
        name, dataset, where, dtype, source_dtype, read_roles, (), open_overview, bands,
        notes=notes + place_notes,
        approximate=bool(where.crs_wkt and place_notes),
        _alpha=roles.index("alpha") + 1 if "alpha" in roles else None,
        _palette=colours,
        _scaling=tuple((dataset.scales[b - 1], dataset.offsets[b - 1]) for b in bands) if scaled else None,
    )  # fmt: skip
    raster.overviews = overviews if raster.windowed else ()
    return raster


def place(dataset: Any) -> tuple[Georeference, tuple[str, ...]]:
    """Where a dataset lies, and what the user should know of that: by its own coordinates, else by what comes near."""
    own = georeference(dataset)
    if own.transform is not None or own.gcps:
        return own, ()
    for approximate in (place_by_polynomials, place_by_flight):
        found, notes = approximate(dataset)
        if found or notes:
            return found or own, notes
    return own, ()


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
