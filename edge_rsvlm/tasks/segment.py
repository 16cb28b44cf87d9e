"""Masks for words: how well each label goes with each cell of a map that lies in the space of texts.

Source: Li et al. 2022, "Language-driven Semantic Segmentation" (LSeg): cells are compared with the texts of labels.
Here each label is scored by itself (Zhai et al. 2023, SigLIP), so that a cell may be of none. Letters: N tiles,
D dimensions, K labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.task_specs import SegmentTask
from edge_rsvlm.tasks.encode import Features
from edge_rsvlm.tasks.match import embed_texts, unit
from edge_rsvlm.tasks.scores import sigmoid
from edge_rsvlm.tasks.text import Texts
from edge_rsvlm.types import InferenceSession


class Segmenter:
    """Scores of ``labels``, each put into the task's prompt, per cell of ``stride`` tile pixels."""

    def __init__(
        self, spec: SegmentTask, head: InferenceSession, text: InferenceSession, texts: Texts, labels: Sequence[str]
    ) -> None:
        self._spec, self._head = spec, head
        prompts = [spec.label_prompt.replace("{label}", label) for label in labels]
        self._labels_KD = unit(embed_texts(text, texts, prompts, spec.text.output))

    def embeddings(self, features: Features) -> NDArray[np.float32]:
        """Embeddings [N, D, h, w] of cells as the head gives them."""
        inputs = {name: features[name] for name in self._spec.encoder_outputs}
        found: NDArray[np.float32] = self._head.run(inputs, ["embeddings"])[0]
        return found

    def scores(self, embeddings_Dhw: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores [K, h, w] of the labels in the cells of one tile."""
        cosine_hwK = unit(np.moveaxis(embeddings_Dhw, 0, -1)) @ self._labels_KD.T
        logits_hwK = cosine_hwK * self._spec.logit_scale + self._spec.logit_bias
        return np.ascontiguousarray(np.moveaxis(sigmoid(logits_hwK), -1, 0))
