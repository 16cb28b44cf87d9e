"""From rasters to batches of model tiles: plan, read each block once, and gather, ahead of the engine.

Coordinates: *raster* pixels are those of the file; *read* pixels are those of the overview that is read.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.inputs import InputSpec
from edge_rsvlm.config.prepare import Filter
from edge_rsvlm.pipeline.cut import Cut, cut, share_validity
from edge_rsvlm.pipeline.dates import Read, read_window
from edge_rsvlm.pipeline.outcome import Deadline, Outcome, Progress
from edge_rsvlm.pipeline.prefetch import prefetch
from edge_rsvlm.pipeline.runtime import Pace
from edge_rsvlm.pipeline.scaling import Scaling, scalings
from edge_rsvlm.raster.flaws import Flaws
from edge_rsvlm.raster.moved import moved_boxes
from edge_rsvlm.raster.plan import TileGrid, super_tiles
from edge_rsvlm.raster.reader import Raster
from edge_rsvlm.raster.shift import STILL, Shift
from edge_rsvlm.tiles.reference import REACH_PX
from edge_rsvlm.types import Window

BATCHES_AHEAD = 2
SHARP: Filter = "lanczos3"
"""Bilinear interpolation between native pixels blurs, and a blurred date seems changed beside a sharp one."""


@dataclass(frozen=True)
class TileBatch:
    """Tiles of one or two dates, and where they lie.

    ``dates`` has one cut per date. ``boxes_N4`` and ``cores_N4`` are raster pixels: what a tile sees and what it
    owns; cores partition the raster. No later batch has a tile that begins above ``frontier_row``.
    ``valid_HW`` marks the read pixels of ``window`` that can be compared in every date; ``flaw_HW`` says why others
    cannot that are valid (``edge_rsvlm.raster.flaws``), where that was looked for.
    """

    dates: tuple[Cut, ...]
    boxes_N4: NDArray[np.float64]
    cores_N4: NDArray[np.float64]
    valid_fraction_N: NDArray[np.float32]
    frontier_row: float
    valid_HW: NDArray[np.uint8]
    window: Window
    flaw_HW: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.boxes_N4)

    @property
    def valid_core_px(self) -> float:
        """Valid area owned by these tiles, from each tile's valid fraction."""
        size = self.cores_N4[:, 2:] - self.cores_N4[:, :2]
        return float((size[:, 0] * size[:, 1] * self.valid_fraction_N).sum())

    def to_raster(self, n: int, xyxy_M4: NDArray[np.float64]) -> NDArray[np.float64]:
        """Boxes in pixels of what the model sees of tile ``n`` -> raster pixels."""
        cut, tile = self.dates[0], self.boxes_N4[n]
        scale_x, scale_y, offset_x, offset_y = cut.images[n].to_image
        in_tile = xyxy_M4 * (scale_x, scale_y, scale_x, scale_y) + (offset_x, offset_y, offset_x, offset_y)
        found: NDArray[np.float64] = in_tile * np.tile((tile[2:] - tile[:2]) / cut.hw[::-1], 2) + np.tile(tile[:2], 2)
        return found

    def seen(self, n: int, size: tuple[int, int]) -> Seen:
        """What tile ``n`` sees of a raster of ``size`` (width, height)."""
        x0, y0, x1, y1 = np.clip(self.boxes_N4[n], 0, np.tile(size, 2))
        return Seen(np.array([x0, y0, x1, y1]), float(self.valid_fraction_N[n]) * float((x1 - x0) * (y1 - y0)))


@dataclass(frozen=True)
class Seen:
    """A tile on the raster: ``xyxy`` in raster pixels, and how many of them are valid."""

    xyxy: NDArray[np.float64]
    valid_px: float

    @property
    def box(self) -> list[float]:
        """x, y, width, height as in ``--json``."""
        x0, y0, x1, y1 = self.xyxy
        return [round(float(v), 2) for v in (x0, y0, x1 - x0, y1 - y0)]


@dataclass(frozen=True)
class View:
    """One input spec over rasters of one size: ``scale_xy`` raster pixels per tile pixel, read at ``decimation``."""

    rasters: tuple[Raster, ...]
    spec: InputSpec
    scale_xy: tuple[float, float]
    decimation: int = 1
    whole: bool = False
    """The whole raster is one tile."""
    warnings: tuple[str, ...] = ()
    """What the user should know of how the raster is looked at."""
    shift: Shift = STILL
    """Where the first of two dates shows what the last one does, in raster pixels."""
    flaws: Flaws | None = None
    """What looks for pixels of two dates that cannot be compared."""

    @property
    def size(self) -> tuple[int, int]:
        georeference = self.rasters[0].georeference
        return georeference.width, georeference.height

    @property
    def read_size(self) -> tuple[int, int]:
        return self.rasters[0].size_at(self.decimation)

    @property
    def cut_hw(self) -> tuple[int, int]:
        """(height, width) that tiles are cut to: a whole image that steps prepare keeps its pixels."""
        if self.whole and self.spec.prepare:
            return self.read_size[::-1]
        return self.spec.tile_px, self.spec.tile_px

    @property
    def to_raster_xy(self) -> NDArray[np.float64]:
        """Raster pixels per read pixel."""
        return np.array(self.size, np.float64) / self.read_size

    @property
    def read_shift(self) -> Shift:
        """The shift in read pixels."""
        return self.shift.in_units_of(*self.to_raster_xy)

    def grid(self) -> TileGrid:
        width, height = self.read_size
        if self.whole:
            scale = (width / self.spec.tile_px, height / self.spec.tile_px)
            return TileGrid(width, height, scale, self.spec.tile_px, 0)
        scale_x, scale_y = np.array(self.scale_xy) / self.to_raster_xy
        spec, scale = self.spec, (float(scale_x), float(scale_y))
        return TileGrid(width, height, scale, spec.tile_px, spec.overlap_px, REACH_PX[spec.resampling])


def tile_batches(view: View, *, batch: int, read_pixels: int, threads: int, outcome: Outcome) -> Iterator[TileBatch]:
    """All tiles of ``view`` in raster order of super-tiles, ``batch`` at most at a time."""
    with outcome.clock("read"):
        scales = scalings(view.spec, view.rasters, outcome, view.shift)
    grid, to_raster, shift = view.grid(), np.tile(view.to_raster_xy, 2), view.read_shift
    plan = list(super_tiles(grid, view.rasters[0].block_hw, read_pixels))
    order = np.array([i for part in plan for i in part.tiles])
    tops = np.array([grid.box(int(i))[1] for i in order])
    # frontier[k]: the top of the highest tile at position k or later.
    frontier = np.append(np.minimum.accumulate(tops[::-1])[::-1], np.inf) * view.to_raster_xy[1]
    done = 0
    read: Read | None = None
    for part in plan:
        read = None  # two windows at once are more than the plan counts
        with outcome.clock("read"):
            read = read_window(view.rasters, part.window, view.decimation, shift, view.flaws)
        for chosen in _chunks(part.tiles, batch):
            boxes = np.array([grid.box(i) for i in chosen], np.float64)
            cores = np.array([grid.core(i) for i in chosen], np.float64)
            with outcome.clock("tiles"):
                cuts = _cuts(view, read, scales, boxes, moved_boxes(boxes, shift, view.read_size), threads)
            done += len(chosen)
            yield TileBatch(
                cuts,
                boxes * to_raster,
                cores * to_raster,
                np.minimum.reduce([made.valid_fraction_N for made in cuts]),
                float(frontier[done]),
                read.valid_HW,
                read.window,
                read.flaw_HW,
            )


def _cuts(
    view: View,
    read: Read,
    scales: Sequence[Scaling],
    boxes_N4: NDArray[np.float64],
    moved_N4: NDArray[np.float64],
    threads: int,
) -> tuple[Cut, ...]:
    """The same tiles of each date: of two the earlier is cut at ``moved_N4``."""
    boxes = (moved_N4, boxes_N4)[-len(read.dates) :]
    specs = (_moved_spec(view), view.spec)[-len(read.dates) :]
    cuts = tuple(
        cut(pixels, spec, view.cut_hw, view.read_size, places_N4, scaling, threads)
        for pixels, spec, places_N4, scaling in zip(read.dates, specs, boxes, scales, strict=True)
    )
    share_validity(cuts, view.spec)
    return cuts


def _moved_spec(view: View) -> InputSpec:
    """How a date is cut that is moved by a part of a pixel.

    Where tile pixels are read pixels the other date is not resampled at all, and must not be alone in being sharp.
    """
    native = view.grid().scale_xy == (1.0, 1.0) and not view.spec.prepare
    if not (view.shift.corrected and native):
        return view.spec
    return view.spec.model_copy(update={"resampling": SHARP})


@contextmanager
def scene_batches(view: View, pace: Pace, outcome: Outcome) -> Iterator[Iterator[TileBatch]]:
    """The tiles of a scene as ``pace`` asks for them; leave the block before the rasters are closed."""
    plan = pace.plan
    made = tile_batches(view, batch=plan.batch, read_pixels=plan.read_pixels, threads=pace.threads, outcome=outcome)
    with closing(paced(made, view, outcome, pace.deadline, pace.progress)) as batches:
        yield batches


def paced(
    batches: Iterator[TileBatch], view: View, outcome: Outcome, deadline: Deadline, progress: Progress | None
) -> Generator[TileBatch, None, None]:
    """Batches made ahead of the consumer until the deadline, with the accounts of what was and was not processed.

    Close it before the rasters: its thread reads from them.
    """
    total, done = len(view.grid()), 0
    remaining_px = float(view.size[0]) * view.size[1]
    source = prefetch(batches, BATCHES_AHEAD)
    # The first batch opens the model as well: what a batch takes is seen from the last two.
    recent_s: deque[float] = deque(maxlen=2)
    try:
        for tiles in source:
            if not deadline.allows(max(recent_s, default=0.0)):
                outcome.unread_px += remaining_px
                outcome.skipped_tiles["deadline"] += total - done
                return
            begun = time.monotonic()
            yield tiles
            recent_s.append(time.monotonic() - begun)
            size = tiles.cores_N4[:, 2:] - tiles.cores_N4[:, :2]
            remaining_px -= float((size[:, 0] * size[:, 1]).sum())
            outcome.processed_px += tiles.valid_core_px
            empty = int((tiles.valid_fraction_N == 0).sum())
            if empty:
                outcome.skipped_tiles["nodata"] += empty
            done += len(tiles)
            if progress:
                progress(done, total)
    finally:
        source.close()


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
