"""Values that travel between the layers.

Dimension letters: N tiles, C bands or channels, H rows, W columns, K classes.
Raster pixel coordinates put the *edges* of pixel (0, 0) at 0 and 1, x to the right, y down, as GDAL does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from affine import Affine
from numpy.typing import NDArray


@dataclass(frozen=True)
class Window:
    """A rectangle of whole raster pixels."""

    col: int
    row: int
    width: int
    height: int


@dataclass(frozen=True)
class GroundControlPoint:
    """Raster pixel (col, row) seen at CRS coordinates (x, y)."""

    col: float
    row: float
    x: float
    y: float


@dataclass(frozen=True)
class Georeference:
    """Where a raster lies. Either ``transform`` or ``gcps`` is set when ``crs_wkt`` is.

    ``transform`` maps raster pixels (col, row) to CRS coordinates (x, y).
    ``crs_wkt`` is None for a raster without a CRS: results then stay in pixel coordinates.
    """

    width: int
    height: int
    crs_wkt: str | None = None
    transform: Affine | None = None
    gcps: tuple[GroundControlPoint, ...] = ()


@dataclass(frozen=True)
class Pixels:
    """One window of a raster: pixels never travel without their geography.

    ``data_CHW`` is uint8, uint16 or float32; ``valid_HW`` is uint8, 1 where the pixel is valid.
    """

    data_CHW: NDArray[np.generic]
    valid_HW: NDArray[np.uint8]
    window: Window
    georeference: Georeference


@dataclass(frozen=True)
class Boxes:
    """Axis-aligned boxes: ``xyxy_N4`` float64, ``scores_N`` float32, ``labels_N`` int64 index into classes."""

    xyxy_N4: NDArray[np.float64]
    scores_N: NDArray[np.float32]
    labels_N: NDArray[np.int64]


class InferenceSession(Protocol):
    """The narrow seam to an engine: one loaded graph. Thread-safe, deterministic for a given thread count."""

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """The named outputs, in the order asked."""
        ...


Advance = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]
"""(the next token of each new row, the old row that it continues) -> logits [rows, V] of the token after it."""


@dataclass(frozen=True)
class Prompt:
    """Words with an image among them, for N images: ``visual_NTD`` stand in the places where ``visual_S`` is true.

    ``ids_S`` are int64, whatever number in those places. ``positions`` are [S], or [3, S] of mrope.
    """

    ids_S: NDArray[np.int64]
    visual_S: NDArray[np.bool_]
    visual_NTD: NDArray[np.float32]
    positions: NDArray[np.int64]


class LanguageModel(Protocol):
    """The seam to what reads and writes words: a decoder graph, or a model of llama.cpp."""

    def start(self, prompt: Prompt) -> tuple[NDArray[np.float32], Advance]:
        """Logits [N, V] of the first token after the prompt, and what goes on from there.

        Advance keeps what was read: one at a time may be in use.
        """
        ...
