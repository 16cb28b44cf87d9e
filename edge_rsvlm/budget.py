"""The memory plan: computed in bytes from the manifest and the raster's header, before a model is loaded.

Counted is anonymous memory, not the page cache. The plan first shrinks what may shrink (tiles per batch, pixels per
read) and refuses only when the smallest form does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from edge_rsvlm.config.inputs import TaskMemory
from edge_rsvlm.config.units import format_bytes
from edge_rsvlm.errors import BudgetError

MIB = 1 << 20
RASTER_CACHE_BYTES = 32 * MIB
"""What GDAL may keep of decoded blocks."""
RESULTS_BYTES = 16 * MIB
"""Unresolved boxes or regions, and buffered output."""
TILE_BATCHES_IN_FLIGHT = 4
"""One being filled, two queued, one at the engine."""
BATCHES = (8, 4, 2, 1)
READ_PIXELS = (4 * MIB, 2 * MIB, MIB)
JOIN = " + "
SLACK = 1.10
"""Allocators keep some freed memory."""
BETWEEN_STARTS_BYTES = 2 * MIB
"""By how much a process may be larger when it is started again with the memory that it was advised to give."""


@dataclass(frozen=True)
class Demand:
    """What one task asks of one input; ``dates`` is 2 for change.

    ``tile_bytes`` is one tile as the model takes it with what preparing it holds, of one date; ``cache_bytes`` are the
    key-value caches of one. ``adapter_bytes`` are factors that are fed whatever the tile. The input has ``tiles``, of
    ``tile_px``. ``scale_xy`` are pixels as read (of the raster or an overview) per tile pixel, ``width`` pixels of the
    raster. ``margin_xy`` pixels are read beyond a window on each side. ``resident_bytes`` stay decoded for as long as
    the input is open. ``canvas_rows`` is how many rows of the raster the results of two rows of tiles cover, at
    ``canvas_bytes`` per pixel; ``map_bytes`` are the results of one tile before they are there.
    """

    task: str
    memory: TaskMemory
    tile_px: int
    tile_bytes: int
    tiles: int
    cache_bytes: int = 0
    adapter_bytes: int = 0
    bytes_per_pixel: int = 0
    scale_xy: tuple[float, float] = (1.0, 1.0)
    width: int = 1
    margin_xy: tuple[int, int] = (0, 0)
    resident_bytes: int = 0
    canvas_rows: int = 0
    canvas_bytes: int = 0
    map_bytes: int = 0
    dates: int = 1

    @property
    def verbs(self) -> tuple[str, ...]:
        """The task, or those that were joined."""
        return tuple(self.task.split(JOIN))


def joined(demands: Sequence[Demand]) -> Demand:
    """What tasks ask of one input that are fed the same tiles in turn: each keeps its own results meanwhile.

    Features that one leaves for the next count as if every task had made its own.
    """
    first, *others = demands
    if not others:
        return first
    return replace(
        first,
        task=JOIN.join(d.task for d in demands),
        memory=TaskMemory(
            session_bytes=sum(d.memory.session_bytes for d in demands),
            tile_bytes=sum(d.memory.tile_bytes for d in demands),
        ),
        cache_bytes=sum(d.cache_bytes for d in demands),
        canvas_bytes=sum(d.canvas_bytes for d in demands),
        map_bytes=max(d.map_bytes for d in demands),
    )


@dataclass(frozen=True)
class MemoryPlan:
    """An admitted plan. ``items`` are (what, bytes); their sum with slack is ``total_bytes``."""

    items: tuple[tuple[str, int], ...]
    batch: int
    read_pixels: int

    @property
    def total_bytes(self) -> int:
        return math.ceil(sum(size for _, size in self.items) * SLACK)

    @property
    def engine_bytes(self) -> int:
        return dict(self.items)["engine"]


def process_bytes() -> int:
    """Anonymous memory of this process now (RssAnon of the Linux kernel)."""
    with open("/proc/self/status") as lines:  # noqa: PTH123 - a kernel file
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def plan_memory(demands: Sequence[Demand], *, limit_bytes: int, base_bytes: int | None = None) -> MemoryPlan:
    """The roomiest plan under ``limit_bytes`` for tasks that run one after another over one input.

    Raises BudgetError with the numbers, and with what would fit, when the smallest plan is too large.
    """
    base = process_bytes() if base_bytes is None else base_bytes
    plan = _plan(demands, base, BATCHES[-1], READ_PIXELS[-1])
    for batch in BATCHES:
        for read_pixels in READ_PIXELS:
            candidate = _plan(demands, base, batch, read_pixels)
            if candidate.total_bytes <= limit_bytes:
                return candidate
    needs = ", ".join(f"{name} {format_bytes(size)}" for name, size in plan.items)
    fit = format_bytes(math.ceil((plan.total_bytes + BETWEEN_STARTS_BYTES) / MIB) * MIB)
    tasks = ", ".join(dict.fromkeys(d.task for d in demands))
    raise BudgetError(
        f"{tasks} needs at least {format_bytes(plan.total_bytes)} ({needs}) and may take {format_bytes(limit_bytes)}",
        fix=f"give --memory {fit.replace(' ', '')}" + _smaller_input_advice(demands),
    )


def _smaller_input_advice(demands: Sequence[Demand]) -> str:
    if max(d.resident_bytes for d in demands) >= 16 * MIB:
        return ", or make the input readable by window: gdal_translate -of COG INPUT OUTPUT.tif"
    if max(max(d.scale_xy) for d in demands) >= 2:
        return ", or give the input overviews: gdaladdo -r average INPUT 2 4 8 16"
    return ""


def _plan(demands: Sequence[Demand], base: int, batch: int, read_pixels: int) -> MemoryPlan:
    def most(of: str) -> int:
        return max(_sizes(demand, batch, read_pixels)[of] for demand in demands)

    adapter = max(demand.adapter_bytes for demand in demands)
    items = [
        ("process", base),
        # Sessions stay open from task to task; the arena's peak is that of the largest.
        ("engine", sum(d.memory.session_bytes for d in demands) + most("engine")),
        *([("adapter", adapter)] if adapter else []),
        ("raster", RASTER_CACHE_BYTES + most("pixels")),
        ("tiles", most("tiles")),
        ("results", RESULTS_BYTES + most("canvas")),
    ]
    return MemoryPlan(tuple(items), batch, read_pixels)


def _with_margin(pixels: int, demand: Demand) -> int:
    """Pixels of a window of ``pixels`` and its margin, when it is as wide and low as windows get: a row of tiles."""
    side_x, side_y = (demand.tile_px * scale for scale in demand.scale_xy)
    wide = max(min(pixels / side_y, demand.width), side_x)
    x, y = demand.margin_xy
    return pixels + math.ceil(2 * x * pixels / wide + 2 * y * (wide + 2 * x))


def _sizes(demand: Demand, batch: int, read_pixels: int) -> dict[str, int]:
    halo_px = max(demand.scale_xy) * 2 + 2
    smallest_read = math.prod(demand.tile_px * scale + halo_px for scale in demand.scale_xy)
    pixels = math.ceil(max(read_pixels, smallest_read))
    # One copy as decoded, one as handed to the tiles, for each date.
    read_bytes = 2 * _with_margin(pixels, demand) * demand.bytes_per_pixel * demand.dates + demand.resident_bytes
    in_flight = min(batch * TILE_BATCHES_IN_FLIGHT, demand.tiles)
    at_once = min(batch, demand.tiles)
    magnification = demand.canvas_rows / (2 * demand.tile_px * demand.scale_xy[1])
    rows = demand.canvas_rows + math.ceil(pixels * magnification**2 / max(demand.width, 1))
    return {
        "pixels": read_bytes,
        "tiles": demand.tile_bytes * demand.dates * in_flight,
        "engine": (demand.memory.tile_bytes + demand.cache_bytes) * at_once,
        "canvas": demand.width * rows * demand.canvas_bytes + demand.map_bytes,
    }
