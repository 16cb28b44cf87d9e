"""What the tasks share that say something of each tile: they run over its batches, and know where it lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.geo import PixelMapper, box_ring, feature_geometry
from edge_rsvlm.pipeline.outcome import Emit, Outcome
from edge_rsvlm.pipeline.runtime import Pace
from edge_rsvlm.pipeline.stream import Seen, TileBatch, View, scene_batches

T = TypeVar("T")
Kept = NDArray[np.intp]
"""Which tiles of a batch have a valid pixel."""


def mapper_of(view: View, outcome: Outcome) -> PixelMapper:
    """From pixels of the view's raster to places; what the user should know goes to the outcome's warnings."""
    mapper = PixelMapper(view.rasters[-1].georeference)
    outcome.warnings += [*view.warnings, *([mapper.warning] if mapper.warning else [])]
    return mapper


def each_tile(
    view: View,
    pace: Pace,
    outcome: Outcome,
    answer: Callable[[TileBatch, Kept], Sequence[T]],
    use: Callable[[Seen, T], None],
) -> None:
    """``use`` what ``answer`` gives for the tiles of every batch that have a valid pixel, tile by tile."""
    with scene_batches(view, pace, outcome) as source:
        for tiles in source:
            kept = np.flatnonzero(tiles.valid_fraction_N > 0)
            if not len(kept):
                continue
            with outcome.clock("engine"):
                answers = answer(tiles, kept)
            for n, found in zip(kept, answers, strict=True):
                use(tiles.seen(int(n), view.size), found)


def emit_tile(emit: Emit, mapper: PixelMapper, seen: Seen, record: dict[str, Any]) -> None:
    """Emit ``record`` with the tile's box and geometry."""
    emit({**record, "box": seen.box}, feature_geometry([box_ring(seen.xyxy)], mapper))
