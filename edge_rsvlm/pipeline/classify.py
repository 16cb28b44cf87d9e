"""Scene classes by words: scores per tile, and their mean over the scene weighted by valid area."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.task_specs import MatchTask
from edge_rsvlm.pipeline.outcome import Emit, Outcome
from edge_rsvlm.pipeline.per_tile import EachTile, Kept, emit_tile, mapper_of
from edge_rsvlm.pipeline.runtime import Runtime
from edge_rsvlm.pipeline.stream import Seen, TileBatch, View

Labels = list[tuple[str, float]]


@dataclass
class ClassifyOutcome(Outcome):
    """``labels`` with scores, best first; empty when no pixel of the image is valid."""

    labels: Labels = field(default_factory=list)


def classify(
    runtime: Runtime, task: MatchTask, view: View, labels: Sequence[str], emit: Emit
) -> EachTile[ClassifyOutcome, NDArray[np.float32]]:
    """Emits ``{"labels", "box"}`` per tile (box x, y, w, h in raster pixels); the outcome has the image's classes."""
    outcome = ClassifyOutcome()
    mapper = mapper_of(view, outcome)
    total_M, weight = np.zeros(len(labels)), 0.0

    def scores(tiles: TileBatch, kept: Kept) -> list[NDArray[np.float32]]:
        matcher = runtime.matcher("classify", task)
        return list(matcher.scores(matcher.images(tiles.dates[0].pixels_NCHW(kept)), list(labels)))

    def use(seen: Seen, scores_M: NDArray[np.float32]) -> None:
        nonlocal weight
        emit_tile(emit, mapper, seen, {"labels": _ranked(labels, scores_M)})
        total_M[:] += scores_M * seen.valid_px
        weight += seen.valid_px

    def conclude() -> None:
        if weight:
            outcome.labels = _ranked(labels, total_M / weight)

    return EachTile(outcome, view.size, scores, use, conclude)


def _ranked(labels: Sequence[str], scores_M: NDArray[np.floating]) -> Labels:
    order = np.argsort(-scores_M, kind="stable")
    return [(labels[m], round(float(scores_M[m]), 4)) for m in order]
