"""A question about an image answered by one of the answers that the model knows.

Source: Kim et al. 2021, "ViLT: Vision-and-Language Transformer Without Convolution or Region Supervision".
Letters: N images, K answers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.task_specs import AnswerTask
from edge_rsvlm.errors import BundleError
from edge_rsvlm.tasks.scores import scores
from edge_rsvlm.tasks.text import Texts
from edge_rsvlm.types import InferenceSession

BEST = 5


class Answerer:
    """Images and a question -> the best answers with their scores."""

    def __init__(self, spec: AnswerTask, graph: InferenceSession, texts: Texts, answers: Sequence[str]) -> None:
        self._spec, self._graph, self._texts, self._answers = spec, graph, texts, answers

    def __call__(self, images: NDArray[np.float32], question: str) -> list[list[tuple[str, float]]]:
        """The five best of each image, best first.

        ``images`` are prepared pixels [N, C, H, W], or features of regions [N, R, D] for a task without an input spec.
        """
        return [self._best(row) for row in scores(self.logits(images, question), self._spec.score)]

    def logits(self, images: NDArray[np.float32], question: str) -> NDArray[np.float32]:
        """[N, K], one per answer."""
        role = "features" if self._spec.input is None else "tiles"
        words = {name: np.repeat(ids, len(images), axis=0) for name, ids in self._texts.encode([question]).items()}
        logits_NK = self._graph.run({role: images, **words}, ["logits"])[0]
        if logits_NK.shape[1] != len(self._answers):
            raise BundleError(
                f"{self._spec.graph} tells {logits_NK.shape[1]} answers apart, {self._spec.answers} names "
                f"{len(self._answers)}",
                fix="make the bundle again",
            )
        return np.asarray(logits_NK, np.float32)

    def _best(self, scores_K: NDArray[np.float32]) -> list[tuple[str, float]]:
        order = np.argsort(-scores_K, kind="stable")[:BEST]
        return [(self._answers[k], float(scores_K[k])) for k in order]
