"""Boxes for any words: each patch of the image proposes one box, whose class embedding is compared with the words.

Source: Minderer et al. 2022, "Simple Open-Vocabulary Object Detection", with the class head and the selection of
``transformers`` (``post_process_grounded_object_detection``): the best word of each box is its label, and its score
must exceed the threshold. Letters: N images, P proposals, Q queries, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.task_specs import OpenDetectTask
from edge_rsvlm.tasks.match import embed_texts
from edge_rsvlm.tasks.scores import sigmoid
from edge_rsvlm.tasks.text import Texts
from edge_rsvlm.types import Boxes, InferenceSession

EPSILON = 1e-6  # of the published class head
OUTPUTS = ("class_embeds", "boxes", "logit_shift", "logit_scale")


class OpenDetector:
    """Prepared images -> boxes in shares (0..1) of them, best first, not yet suppressed."""

    def __init__(
        self,
        spec: OpenDetectTask,
        encoder: InferenceSession,
        text: InferenceSession,
        texts: Texts,
        labels: Sequence[str],
        score_threshold: float | None = None,
    ) -> None:
        self._spec, self._encoder = spec, encoder
        self._threshold = spec.score_threshold if score_threshold is None else score_threshold
        prompts = [spec.query_prompt.replace("{label}", label) for label in labels]
        self._queries_QD = _unit(embed_texts(text, texts, prompts, spec.text.output))

    def __call__(self, pixels_NCHW: NDArray[np.float32]) -> list[Boxes]:
        """Per image at most ``max_boxes_per_tile`` boxes; they may reach beyond the image."""
        class_NPD, boxes_NP4, shift_NP, scale_NP = self._encoder.run({"tiles": pixels_NCHW}, OUTPUTS)
        logits_NPQ = (_unit(class_NPD) @ self._queries_QD.T + shift_NP[..., None]) * scale_NP[..., None]
        return [self._select(logits, boxes) for logits, boxes in zip(logits_NPQ, boxes_NP4, strict=True)]

    def _select(self, logits_PQ: NDArray[np.float32], boxes_P4: NDArray[np.float32]) -> Boxes:
        labels_P, best_P = logits_PQ.argmax(axis=1), logits_PQ.max(axis=1)
        order = np.argsort(-best_P, kind="stable")[: self._spec.max_boxes_per_tile]
        scores = sigmoid(best_P[order])
        kept = order[scores > self._threshold]
        centre_xy, half_wh = boxes_P4[kept, :2].astype(np.float64), boxes_P4[kept, 2:].astype(np.float64) / 2
        xyxy = np.hstack([centre_xy - half_wh, centre_xy + half_wh])
        return Boxes(xyxy, scores[scores > self._threshold], labels_P[kept])


def _unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(vectors / (np.linalg.norm(vectors, axis=-1, keepdims=True) + EPSILON), np.float32)
