"""Detection: peaks of a class heat map, each with its distances to the sides of its box.

Source: Zhou et al. 2019, "Objects as Points"; sides per cell as in Tian et al. 2019, "FCOS".
Letters: N tiles, K classes, h, w cells of ``stride`` tile pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.task_specs import DetectTask, TextDetectTask
from edge_rsvlm.tasks.encode import Features
from edge_rsvlm.types import Boxes, InferenceSession


class Detector:
    """Features of a batch -> boxes per tile, in tile pixels, best first, not yet suppressed across cells."""

    def __init__(self, spec: DetectTask, head: InferenceSession, *, score_threshold: float | None = None) -> None:
        self._spec, self._head = spec, head
        self._threshold = spec.score_threshold if score_threshold is None else score_threshold

    def __call__(self, features: Features) -> list[Boxes]:
        inputs = {name: features[name] for name in self._spec.encoder_outputs}
        scores_NKhw, ltrb_N4hw = self._head.run(inputs, ["scores", "ltrb"])
        return [
            boxes_of(scores, ltrb, self._spec, self._threshold)
            for scores, ltrb in zip(scores_NKhw, ltrb_N4hw, strict=True)
        ]


def boxes_of(
    scores_Khw: NDArray[np.float32],
    ltrb_4hw: NDArray[np.float32],
    spec: DetectTask | TextDetectTask,
    threshold: float,
) -> Boxes:
    """The boxes of one tile from its maps, in tile pixels, best first; ``ltrb`` are distances in tile pixels."""
    labels, rows, cols = np.nonzero(peaks(scores_Khw, threshold))
    scores = scores_Khw[labels, rows, cols]
    order = np.lexsort((cols, rows, labels, -scores))[: spec.max_boxes_per_tile]
    labels, rows, cols = labels[order], rows[order], cols[order]
    centre_xy = (np.stack([cols, rows], axis=1) + 0.5) * spec.stride
    left_top, right_bottom = ltrb_4hw[:2, rows, cols].T, ltrb_4hw[2:, rows, cols].T
    xyxy = np.hstack([centre_xy - left_top, centre_xy + right_bottom]).astype(np.float64)
    return Boxes(xyxy.reshape(-1, 4), scores[order], labels.astype(np.int64))


def peaks(scores_Khw: NDArray[np.float32], threshold: float) -> NDArray[np.bool_]:
    """Cells at or above ``threshold`` that no cell of their 3x3 neighbourhood exceeds."""
    padded = np.pad(scores_Khw, ((0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    rows = np.maximum(np.maximum(padded[:, :-2], padded[:, 1:-1]), padded[:, 2:])
    around = np.maximum(np.maximum(rows[:, :, :-2], rows[:, :, 1:-1]), rows[:, :, 2:])
    found: NDArray[np.bool_] = (scores_Khw >= threshold) & (scores_Khw >= around)
    return found
