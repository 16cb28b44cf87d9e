"""Detection by vectors, of words or of examples: peaks of the likeness between a map of embeddings and a query.

Sources: Minderer et al. 2022, "Simple Open-Vocabulary Object Detection" (the score), and those of ``detect`` (the
peaks). Letters: N tiles, Q queries, D dimensions, h, w cells of ``stride`` tile pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.task_specs import TextDetectTask
from edge_rsvlm.tasks.detect import boxes_of
from edge_rsvlm.tasks.encode import Features
from edge_rsvlm.tasks.match import unit
from edge_rsvlm.tasks.scores import sigmoid
from edge_rsvlm.types import Boxes, InferenceSession

MAPS = ("embeddings", "shift", "scale", "ltrb")


class TextDetector:
    """Features of a batch and unit vectors of what is looked for -> boxes per tile, not yet suppressed across cells."""

    def __init__(self, spec: TextDetectTask, head: InferenceSession) -> None:
        self._spec, self._head = spec, head

    def __call__(self, features: Features, queries_QD: NDArray[np.float32], threshold: float) -> list[Boxes]:
        """In tile pixels, best first; labels are rows of ``queries_QD``."""
        embeddings_NDhw, shift_N1hw, scale_N1hw, ltrb_N4hw = self._run(features, MAPS)
        scores_NQhw = sigmoid((cosines(queries_QD, embeddings_NDhw) + shift_N1hw) * scale_N1hw)
        return [
            boxes_of(scores, ltrb, self._spec, threshold) for scores, ltrb in zip(scores_NQhw, ltrb_N4hw, strict=True)
        ]

    def at(self, features: Features, centre_xy: NDArray[np.float64]) -> NDArray[np.float32]:
        """The unit vector [D] of what is at a point of the only tile, in its pixels."""
        (embeddings_1Dhw,) = self._run(features, MAPS[:1])
        height, width = embeddings_1Dhw.shape[2:]
        col, row = (int(v // self._spec.stride) for v in centre_xy)
        # A point on the tile's last edge is of the last cell.
        return unit(embeddings_1Dhw[0, :, min(row, height - 1), min(col, width - 1)])

    def _run(self, features: Features, outputs: Sequence[str]) -> list[NDArray[np.float32]]:
        return self._head.run({name: features[name] for name in self._spec.encoder_outputs}, outputs)


def cosines(queries_QD: NDArray[np.float32], embeddings_NDhw: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of unit vectors with the vector of each cell [N, Q, h, w]; 0 where that is zero."""
    tiles, dims, height, width = embeddings_NDhw.shape
    dots_NQC = queries_QD @ embeddings_NDhw.reshape(tiles, dims, height * width)
    length_N1hw = np.linalg.norm(embeddings_NDhw, axis=1, keepdims=True)
    dots_NQhw = dots_NQC.reshape(tiles, -1, height, width)
    found: NDArray[np.float32] = dots_NQhw / np.maximum(length_N1hw, np.finfo(np.float32).tiny)
    return found
