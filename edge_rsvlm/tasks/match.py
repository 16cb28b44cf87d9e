"""Images and texts as points of one space, whose closeness is their likeness.

Sources: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (softmax); Zhai et
al. 2023, "Sigmoid Loss for Language Image Pre-Training" (sigmoid). Letters: N images, M texts, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.task_specs import MatchTask
from edge_rsvlm.tasks.encode import encode
from edge_rsvlm.tasks.scores import scores
from edge_rsvlm.tasks.text import Texts
from edge_rsvlm.types import InferenceSession

EMBEDDING = ("embedding",)
TEXTS_AT_ONCE = 16
"""Bounds the memory of a text encoder that is asked for very many labels."""


def embed_texts(
    session: InferenceSession, texts: Texts, wanted: Sequence[str], output: str = "embedding"
) -> NDArray[np.float32]:
    """Vectors [M, D] as the graph gives them in the role ``output``."""
    parts = [wanted[start : start + TEXTS_AT_ONCE] for start in range(0, len(wanted), TEXTS_AT_ONCE)]
    return np.concatenate([session.run(texts.encode(part), [output])[0] for part in parts])


def unit(vectors_ND: NDArray[Any]) -> NDArray[np.float32]:
    """Scaled to length 1; a vector of zeros stays one."""
    length_N1 = np.linalg.norm(vectors_ND, axis=-1, keepdims=True)
    return np.asarray(vectors_ND / np.maximum(length_N1, np.finfo(np.float32).tiny), np.float32)


class Matcher:
    """Embeds images and texts, and scores classes by their words. ``head`` is of tasks that name one."""

    def __init__(
        self,
        spec: MatchTask,
        encoder: InferenceSession,
        text: InferenceSession,
        texts: Texts,
        head: InferenceSession | None = None,
    ) -> None:
        self._spec, self._encoder, self._text, self._texts, self._head = spec, encoder, text, texts, head
        self._known: tuple[tuple[str, ...], NDArray[np.float32]] | None = None

    def images(self, pixels_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        """Unit vectors [N, D]."""
        if self._head is None:
            return unit(encode(self._encoder, pixels_NCHW, EMBEDDING)["embedding"])
        features = encode(self._encoder, pixels_NCHW, self._spec.encoder_outputs)
        return unit(self._head.run(features, EMBEDDING)[0])

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors [M, D] of texts as they are; at least one."""
        return unit(embed_texts(self._text, self._texts, texts, self._spec.text.output))

    def scores(self, images_ND: NDArray[np.float32], labels: Sequence[str]) -> NDArray[np.float32]:
        """Scores [N, M] of the classes ``labels``, each put into the task's prompt."""
        logits_NM = images_ND @ self._labels(tuple(labels)).T * self._spec.logit_scale + self._spec.logit_bias
        return scores(logits_NM, self._spec.score)

    def _labels(self, labels: tuple[str, ...]) -> NDArray[np.float32]:
        """Embedded once: the tiles of a scene are all asked for the same labels."""
        if self._known is None or self._known[0] != labels:
            prompts = [self._spec.label_prompt.replace("{label}", label) for label in labels]
            self._known = (labels, self.texts(prompts))
        return self._known[1]
