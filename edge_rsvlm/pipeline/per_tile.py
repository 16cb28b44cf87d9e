"""What the tasks share that say something of each tile: they answer for its batches, and know where it lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.geo import PixelMapper, box_ring, feature_geometry
from edge_rsvlm.pipeline.outcome import Emit, Outcome
from edge_rsvlm.pipeline.stream import Seen, TileBatch, View

O = TypeVar("O", bound=Outcome)  # noqa: E741 - an outcome
T = TypeVar("T")
Kept = NDArray[np.intp]
"""Which tiles of a batch have a valid pixel."""


def mapper_of(view: View, outcome: Outcome) -> PixelMapper:
    """From pixels of the view's raster to places; what the user should know goes to the outcome's warnings."""
    mapper = PixelMapper(view.rasters[-1].georeference)
    outcome.warnings += [*view.warnings, *([mapper.warning] if mapper.warning else [])]
    return mapper


@dataclass(frozen=True)
class EachTile(Generic[O, T]):
    """A consumer that will ``use`` what ``answer`` gives for tiles that have a valid pixel, one by one.

    ``size`` is the raster's (width, height); ``conclude`` runs when all tiles were used.
    """

    outcome: O
    size: tuple[int, int]
    answer: Callable[[TileBatch, Kept], Sequence[T]]
    use: Callable[[Seen, T], None]
    conclude: Callable[[], None] = lambda: None

    def feed(self, tiles: TileBatch) -> None:
        kept = np.flatnonzero(tiles.valid_fraction_N > 0)
        if not len(kept):
            return
        with self.outcome.clock("engine"):
            answers = self.answer(tiles, kept)
        for n, found in zip(kept, answers, strict=True):
            self.use(tiles.seen(int(n), self.size), found)

    def finish(self) -> None:
        self.conclude()


def emit_tile(emit: Emit, mapper: PixelMapper, seen: Seen, record: dict[str, Any]) -> None:
    """Emit ``record`` with the tile's box and geometry."""
    emit({**record, "box": seen.box}, feature_geometry([box_ring(seen.xyxy)], mapper))
