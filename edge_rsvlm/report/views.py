"""What a report shows of one scene, ready to be drawn. Outlines are in raster pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ring = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Item:
    """One result: closed rings of its polygons, what it is, and where it lies."""

    kind: Literal["object", "area", "tile"]
    rings: tuple[Ring, ...]
    label: str
    score: float | None
    where: str
    area: str | None = None

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1."""
        xy = np.array([point for ring in self.rings for point in ring])
        (x0, y0), (x1, y1) = xy.min(axis=0), xy.max(axis=0)
        return float(x0), float(y0), float(x1), float(y1)


@dataclass(frozen=True)
class TaskView:
    """Results of one task; ``files`` are written beside the page, by their path from it."""

    task: str
    summary: str
    items: tuple[Item, ...]
    coverage: float
    timing_ms: dict[str, float]
    files: tuple[str, ...]


@dataclass(frozen=True)
class SceneView:
    """``pictures_HW3`` are one or two dates as they are shown; ``aspect`` is ground width over ground height."""

    name: str
    title: str
    credit: str
    dates: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    pictures_HW3: tuple[NDArray[np.uint8], ...]
    aspect: float
    tasks: tuple[TaskView, ...]

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.pictures_HW3[-1].shape[:2]
        return width, height
