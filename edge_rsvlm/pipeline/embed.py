"""Embeddings of an image's tiles in the space that texts share, for the index and for search by example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.task_specs import MatchTask
from edge_rsvlm.geo import box_ring, feature_geometry
from edge_rsvlm.pipeline.outcome import Outcome
from edge_rsvlm.pipeline.per_tile import EachTile, mapper_of
from edge_rsvlm.pipeline.runtime import Runtime
from edge_rsvlm.pipeline.stream import Seen, TileBatch, View

EmitVector = Callable[[NDArray[np.float32], dict[str, Any]], None]
"""Called with the unit vector [D] of a tile and its ``{"box", "geometry", "located"}``."""


@dataclass
class EmbedOutcome(Outcome):
    """``mean_D`` is the mean of the tiles' vectors, weighted by valid area; None when no pixel is valid."""

    mean_D: NDArray[np.float64] | None = None


def embed(
    runtime: Runtime, task: MatchTask, view: View, emit: EmitVector
) -> EachTile[EmbedOutcome, NDArray[np.float32]]:
    """Emits the vector of every tile that has a valid pixel."""
    outcome = EmbedOutcome()
    mapper = mapper_of(view, outcome)
    total = 0.0

    def vectors(tiles: TileBatch, kept: NDArray[np.intp]) -> list[NDArray[np.float32]]:
        return list(runtime.matcher("search", task).images(tiles.dates[0].pixels_NCHW(kept)))

    def use(seen: Seen, vector_D: NDArray[np.float32]) -> None:
        nonlocal total
        geometry = feature_geometry([box_ring(seen.xyxy)], mapper)
        emit(vector_D, {"box": seen.box, "geometry": geometry, "located": mapper.located})
        before = outcome.mean_D if outcome.mean_D is not None else np.zeros(len(vector_D))
        total += seen.valid_px
        outcome.mean_D = before + (vector_D - before) * (seen.valid_px / total)

    return EachTile(outcome, view.size, vectors, use)
