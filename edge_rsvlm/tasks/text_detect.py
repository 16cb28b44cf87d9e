"""Detection by words: peaks of the likeness between a map of embeddings and their vectors.

Sources: Minderer et al. 2022, "Simple Open-Vocabulary Object Detection" (the score), and those of ``detect`` (the
peaks). Letters: N tiles, Q queries, D dimensions, h, w cells of ``stride`` tile pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.task_specs import TextDetectTask
from edge_rsvlm.tasks.detect import boxes_of
from edge_rsvlm.tasks.encode import Features
from edge_rsvlm.tasks.scores import sigmoid
from edge_rsvlm.types import Boxes, InferenceSession

MAPS = ("embeddings", "shift", "scale", "ltrb")


class TextDetector:
    """Features of a batch and unit vectors of words -> boxes per tile, not yet suppressed across cells."""

    def __init__(self, spec: TextDetectTask, head: InferenceSession) -> None:
        self._spec, self._head = spec, head

    def __call__(self, features: Features, queries_QD: NDArray[np.float32], threshold: float) -> list[Boxes]:
        """In tile pixels, best first; labels are rows of ``queries_QD``."""
        scores_NQhw, ltrb_N4hw = self._maps(features, queries_QD)
        return self._boxes(scores_NQhw, ltrb_N4hw, threshold)

    def objects(self, features: Features, queries_QD: NDArray[np.float32], threshold: float) -> list[Boxes]:
        """Whatever any of the queries finds, once; all have label 0."""
        scores_NQhw, ltrb_N4hw = self._maps(features, queries_QD)
        return self._boxes(scores_NQhw.max(axis=1, keepdims=True), ltrb_N4hw, threshold)

    def _maps(
        self, features: Features, queries_QD: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Scores [N, Q, h, w] and distances to the sides."""
        inputs = {name: features[name] for name in self._spec.encoder_outputs}
        embeddings_NDhw, shift_N1hw, scale_N1hw, ltrb_N4hw = self._head.run(inputs, MAPS)
        return sigmoid((cosines(queries_QD, embeddings_NDhw) + shift_N1hw) * scale_N1hw), ltrb_N4hw

    def _boxes(self, scores_NQhw: NDArray[np.float32], ltrb_N4hw: NDArray[np.float32], threshold: float) -> list[Boxes]:
        return [
            boxes_of(scores, ltrb, self._spec, threshold) for scores, ltrb in zip(scores_NQhw, ltrb_N4hw, strict=True)
        ]


def cosines(queries_QD: NDArray[np.float32], embeddings_NDhw: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of unit vectors with the vector of each cell [N, Q, h, w]; 0 where that is zero."""
    tiles, dims, height, width = embeddings_NDhw.shape
    dots_NQC = queries_QD @ embeddings_NDhw.reshape(tiles, dims, height * width)
    length_N1hw = np.linalg.norm(embeddings_NDhw, axis=1, keepdims=True)
    dots_NQhw = dots_NQC.reshape(tiles, -1, height, width)
    found: NDArray[np.float32] = dots_NQhw / np.maximum(length_N1hw, np.finfo(np.float32).tiny)
    return found
