"""A mask on the grid of its raster, as a tiled GeoTIFF that is written while the rows come."""

from __future__ import annotations

import colorsys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from edge_rsvlm.errors import UsageError
from edge_rsvlm.sinks.files import writing, written_whole
from edge_rsvlm.types import Georeference

NODATA = 255
BLOCK_PX = 256
GOLDEN_RATIO = (5**0.5 - 1) / 2
"""Steps of this share of the colour circle never come close to a hue that was there."""


class MaskWriter:
    """A uint8 GeoTIFF at ``path``, whole or not at all; rows that are never written are nodata.

    Nodata is 255. With ``labels`` it is 0, which stands for no label as well, and the k-th label is k: a colour table
    shows them and tags LABEL_1 ... name them.

    Rows wait until a row of blocks is full, so that each block is compressed once and in order: the file's bytes do not
    depend on how the rows were cut. Raises UsageError when the file cannot be written.
    """

    def __init__(self, path: Path, georeference: Georeference, labels: Sequence[str] = ()) -> None:
        self._path, self._georeference, self._labels = path, georeference, labels
        self._nodata = 0 if labels else NODATA
        self._stack = ExitStack()
        self._dataset: Any = None
        self._waiting: NDArray[np.uint8] = np.full((BLOCK_PX, georeference.width), self._nodata, np.uint8)
        self._top = 0

    def __enter__(self) -> MaskWriter:
        with ExitStack() as stack:
            partial = stack.enter_context(written_whole(self._path))
            with self._gdal_errors():
                self._dataset = rasterio.open(partial, "w", **_profile(self._georeference, self._nodata))
            stack.callback(self._dataset.close)
            if self._labels:
                with self._gdal_errors():
                    self._name_labels()
            self._stack = stack.pop_all()
        return self

    def write_rows(self, first_row: int, rows_RW: NDArray[np.uint8]) -> None:
        """Rows in order, each once; a gap stays nodata."""
        while len(rows_RW):
            while first_row >= self._top + BLOCK_PX:
                self._write_block_row()
            start = first_row - self._top
            part = rows_RW[: BLOCK_PX - start]
            self._waiting[start : start + len(part)] = part
            first_row, rows_RW = first_row + len(part), rows_RW[len(part) :]

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if exc is not None:
            self._stack.__exit__(kind, exc, tb)  # as an error, which removes the file
            return
        with self._stack:
            while self._top < self._georeference.height:
                self._write_block_row()
            with self._gdal_errors():
                self._dataset.close()

    def _name_labels(self) -> None:
        self._dataset.write_colormap(1, colours(len(self._labels)))
        self._dataset.update_tags(1, **{f"LABEL_{k}": label for k, label in enumerate(self._labels, start=1)})

    def _write_block_row(self) -> None:
        height = min(BLOCK_PX, self._georeference.height - self._top)
        window = Window(0, self._top, self._georeference.width, height)
        with self._gdal_errors():
            self._dataset.write(self._waiting[:height], 1, window=window)
        self._waiting[:] = self._nodata
        self._top += BLOCK_PX

    @contextmanager
    def _gdal_errors(self) -> Iterator[None]:
        try:
            with warnings.catch_warnings(), writing(self._path):
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                yield
        except RasterioError as exc:
            raise UsageError(
                f"cannot write {self._path}: {exc}", fix="choose a folder with room that may be written"
            ) from exc


def colours(count: int) -> dict[int, tuple[int, int, int, int]]:
    """RGBA of the values 1 ... ``count``, far apart; 0 is transparent."""
    table = {0: (0, 0, 0, 0)}
    for k in range(count):
        red, green, blue = colorsys.hsv_to_rgb((k * GOLDEN_RATIO) % 1.0, 0.8, 0.95)
        table[k + 1] = (round(255 * red), round(255 * green), round(255 * blue), 255)
    return table


def _profile(georeference: Georeference, nodata: int) -> dict[str, Any]:
    profile: dict[str, Any] = {
        "driver": "GTiff", "width": georeference.width, "height": georeference.height, "count": 1, "dtype": "uint8",
        "nodata": nodata, "tiled": True, "blockxsize": BLOCK_PX, "blockysize": BLOCK_PX, "compress": "deflate",
        "bigtiff": "if_safer",
    }  # fmt: skip
    if georeference.rpcs is not None:
        return profile | {"rpcs": georeference.rpcs}  # which are of WGS 84 by definition
    if georeference.crs_wkt is not None:
        profile["crs"] = CRS.from_wkt(georeference.crs_wkt)
    if georeference.transform is not None:
        profile["transform"] = georeference.transform
    elif georeference.gcps:
        profile["gcps"] = [GroundControlPoint(row=p.row, col=p.col, x=p.x, y=p.y) for p in georeference.gcps]
    return profile
