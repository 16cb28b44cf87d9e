"""Values that travel between the layers.

Dimension letters: N tiles, C bands or channels, H rows, W columns, K classes.
Raster pixel coordinates put the *edges* of pixel (0, 0) at 0 and 1, x to the right, y down, as GDAL does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from affine import Affine
from numpy.typing import NDArray

if TYPE_CHECKING:
    from rasterio.rpc import RPC


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
    """Where a raster lies. One of ``transform``, ``gcps`` and ``rpcs`` is set when ``crs_wkt`` is.

    ``transform`` maps raster pixels (col, row) to CRS coordinates (x, y).
    ``rpcs`` are rational polynomials from WGS 84 to pixels, taken at ``height_m`` above the ellipsoid.
    ``crs_wkt`` is None for a raster without a CRS: results then stay in pixel coordinates.
    """

    width: int
    height: int
    crs_wkt: str | None = None
    transform: Affine | None = None
    gcps: tuple[GroundControlPoint, ...] = ()
    rpcs: RPC | None = None
    height_m: float = 0.0


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


def iou(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union of boxes x0, y0, x1, y1 in the last axis; the others broadcast. Of two empty ones, 0."""
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = np.maximum(sides, 0).prod(axis=-1)
    area_a, area_b = ((box[..., 2:] - box[..., :2]).prod(axis=-1) for box in (a, b))
    union = area_a + area_b - shared
    found: NDArray[np.float64] = np.divide(shared, union, out=np.zeros_like(union), where=union > 0)
    return found


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


@dataclass(frozen=True)
class Alert:
    """What a rule found worth telling, with its evidence.

    ``id`` is stable: the same rule over the same pair of scenes gives the same id again, so that a receiver can drop
    repeats. ``time`` is UTC in ISO 8601: when the later scene was taken, or arrived where that is not known.
    ``geometry`` is RFC 7946 in WGS 84, None where the scene has no place on Earth. ``record`` is the change as in
    ``change --json``, with ``before`` and ``after``. ``crops`` are image files of both dates, where they were kept.
    """

    id: str
    rule: str
    time: str
    score: float
    sentence: str
    geometry: Mapping[str, Any] | None
    record: Mapping[str, Any]
    crops: tuple[str, ...] = ()


class AlertSink(Protocol):
    """The seam to what takes alerts: a file, a web service, a broker."""

    def send(self, alert: Alert) -> None:
        """Return once the receiver has it. Raises DeliveryError when it has not, which says whether to try again."""
        ...
