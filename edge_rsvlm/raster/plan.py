"""Which tiles, and in which windows to read them: pure geometry, no file access.

All coordinates are read pixels: those of the raster, or of the overview that is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from edge_rsvlm.types import Window

Box = tuple[float, float, float, float]
MOST_MAGNIFIED = 2
SAME_SCALE = 0.005


@dataclass(frozen=True)
class TileGrid:
    """Overlapping tiles over a raster of ``width`` x ``height``; ``scale_xy`` read pixels make one tile pixel.

    Tiles are numbered in raster order. The last of a row or column is shifted back so that it ends at the edge; only a
    raster smaller than a tile has one that hangs outside.
    """

    width: int
    height: int
    scale_xy: tuple[float, float]
    tile_px: int
    overlap_px: int
    filter_px: int = 1
    """How far the resampling filter reaches at scale 1."""

    def halo(self, axis: int) -> int:
        """Pixels beyond a tile that its antialiased filter reaches."""
        return math.ceil(self.filter_px * max(self.scale_xy[axis], 1.0))

    @cached_property
    def _starts(self) -> tuple[list[float], list[float]]:
        return self._axis_starts(0), self._axis_starts(1)

    def _axis_starts(self, axis: int) -> list[float]:
        size = (self.width, self.height)[axis]
        side = self.tile_px * self.scale_xy[axis]
        stride = (self.tile_px - self.overlap_px) * self.scale_xy[axis]
        if size <= side:
            return [0.0]
        count = math.ceil((size - side) / stride - 1e-9) + 1
        return [min(i * stride, size - side) for i in range(count)]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of tiles."""
        return len(self._starts[1]), len(self._starts[0])

    def __len__(self) -> int:
        rows, columns = self.shape
        return rows * columns

    def box(self, i: int) -> Box:
        """What tile ``i`` sees: x0, y0, x1, y1."""
        row, column = divmod(i, self.shape[1])
        x, y = self._starts[0][column], self._starts[1][row]
        return x, y, x + self.tile_px * self.scale_xy[0], y + self.tile_px * self.scale_xy[1]

    def core(self, i: int) -> Box:
        """What tile ``i`` owns: cores meet in the middle of overlaps and partition the raster."""
        row, column = divmod(i, self.shape[1])
        x0, x1 = self._core(0, column)
        y0, y1 = self._core(1, row)
        return x0, y0, x1, y1

    def centred(self, x: float, y: float) -> Box:
        """What a tile sees whose centre is as near to a point as the raster allows; it is none of the grid's.

        It begins at a whole pixel where it can: at native resolution nothing is blurred.
        """
        side_x, side_y = (self.tile_px * scale for scale in self.scale_xy)
        left = max(min(math.floor(x - side_x / 2), self.width - side_x), 0.0)
        top = max(min(math.floor(y - side_y / 2), self.height - side_y), 0.0)
        return left, top, left + side_x, top + side_y

    def window(self, first: Box, last: Box) -> Window:
        """What to read for tiles from ``first`` (top left) to ``last``: with the halo, inside the raster."""
        halo_x, halo_y = self.halo(0), self.halo(1)
        col0 = max(math.floor(first[0]) - halo_x, 0)
        row0 = max(math.floor(first[1]) - halo_y, 0)
        col1 = min(math.ceil(last[2]) + halo_x, self.width)
        row1 = min(math.ceil(last[3]) + halo_y, self.height)
        return Window(col0, row0, col1 - col0, row1 - row0)

    def _core(self, axis: int, k: int) -> tuple[float, float]:
        starts, size = self._starts[axis], float((self.width, self.height)[axis])
        side = self.tile_px * self.scale_xy[axis]
        low = 0.0 if k == 0 else (starts[k] + starts[k - 1] + side) / 2
        high = size if k == len(starts) - 1 else (starts[k + 1] + starts[k] + side) / 2
        return low, high


@dataclass(frozen=True)
class SuperTile:
    """Tiles that are read together, and the window that holds them with the halo of the resampling filter."""

    tiles: tuple[int, ...]
    window: Window


def super_tiles(grid: TileGrid, block_hw: tuple[int, int], max_pixels: int) -> Iterator[SuperTile]:
    """Groups of tiles in raster order, each read in one window of at most ``max_pixels`` where a tile allows it.

    Groups grow along a row first when blocks are as wide as the raster, and towards a square otherwise, so that blocks
    are shared by few windows.
    """
    rows, columns = grid.shape
    per_row, per_column = _group_shape(grid, block_hw, max_pixels)
    for top in range(0, rows, per_column):
        for left in range(0, columns, per_row):
            tiles = tuple(
                row * columns + column
                for row in range(top, min(top + per_column, rows))
                for column in range(left, min(left + per_row, columns))
            )
            yield SuperTile(tiles, grid.window(grid.box(tiles[0]), grid.box(tiles[-1])))


def _group_shape(grid: TileGrid, block_hw: tuple[int, int], max_pixels: int) -> tuple[int, int]:
    """(columns, rows) of tiles per group."""
    rows, columns = grid.shape
    strips = block_hw[1] >= grid.width

    def pixels(n_columns: int, n_rows: int) -> float:
        spans = [
            ((n - 1) * (grid.tile_px - grid.overlap_px) + grid.tile_px) * grid.scale_xy[axis] + 2 * grid.halo(axis)
            for axis, n in enumerate((n_columns, n_rows))
        ]
        return min(spans[0], grid.width) * min(spans[1], grid.height)

    n_columns, n_rows = (columns, 1) if strips and pixels(columns, 1) <= max_pixels else (1, 1)
    while True:
        wider, taller = n_columns < columns, n_rows < rows
        if wider and (n_columns <= n_rows or not taller) and pixels(n_columns + 1, n_rows) <= max_pixels:
            n_columns += 1
        elif taller and pixels(n_columns, n_rows + 1) <= max_pixels:
            n_rows += 1
        else:
            return n_columns, n_rows


def choose_scale(
    metres_xy: tuple[float, float] | None,
    range_m: tuple[float, float],
    override_m: float | None,
    overviews: Sequence[int],
) -> tuple[float, float, int]:
    """(raster px per tile px along x, along y, decimation to read at).

    Tile pixels are square on the ground. Their size is the raster's own (the geometric mean of its axes) where the task
    was trained for it, else the nearer end of the task's range, else ``override_m``. The decimation is the coarsest
    overview that is still at least as fine as the tile. Where the ground size is unknown tiles are native pixels.
    A raster far coarser than the range is magnified MOST_MAGNIFIED times at most: there is no more to see in it.
    """
    if metres_xy is None:
        return 1.0, 1.0, 1
    own = math.sqrt(metres_xy[0] * metres_xy[1])
    target = override_m or max(min(max(own, range_m[0]), range_m[1]), own / MOST_MAGNIFIED)
    # Within half a percent tiles are native pixels: resampling would only blur.
    scales = [1.0 if abs(target / m - 1) < SAME_SCALE else target / m for m in metres_xy]
    decimation = max([d for d in overviews if d <= min(scales) * (1 + SAME_SCALE)], default=1)
    return scales[0], scales[1], decimation
