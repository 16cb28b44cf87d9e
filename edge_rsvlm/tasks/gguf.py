"""Text from an image and a prompt by a model that sees for itself, token after token.

Letters: H, W image, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.task_specs import GgufTask
from edge_rsvlm.errors import BundleError, UsageError
from edge_rsvlm.tasks.generate import PreparedImage
from edge_rsvlm.tasks.search import RepetitionPenalty, Sampling, Stop, Tokens, follow, greedy, sample
from edge_rsvlm.tasks.text import check_text
from edge_rsvlm.types import Advance


class VisionLanguageModel(Protocol):
    """The seam to what sees, reads and writes: a language model and a projector of llama.cpp."""

    marker: str
    """What stands for the image in a prompt."""
    ends: tuple[int, ...]
    """Tokens that end an answer."""

    def start(self, image_HWC: NDArray[np.uint8], prompt: str) -> tuple[NDArray[np.float32], Advance, Tokens]:
        """Logits [1, V] of the first token after the prompt, what goes on from there (see LanguageModel), and the
        tokens of words that were read."""
        ...

    def text(self, tokens: Sequence[int], marks: Sequence[str] = ()) -> str:
        """The words of an answer, without special tokens but those that are in ``marks``."""
        ...


class GgufGenerator:
    """Images and one text -> what the model says of each."""

    def __init__(self, spec: GgufTask, model: VisionLanguageModel) -> None:
        self._spec, self._model = spec, model

    def __call__(self, images: Sequence[PreparedImage], text: str, sampling: Sampling | None = None) -> list[str]:
        """One answer per image, whose pixels run from 0 to 255."""
        return [self._text(tokens) for tokens in self.tokens(images, text, sampling)]

    def tokens(self, images: Sequence[PreparedImage], text: str, sampling: Sampling | None = None) -> list[Tokens]:
        """The answers as the model wrote them, the end included where it came."""
        return [self._answer(eight_bits(image), text, sampling) for image in images]

    def follow(self, image: PreparedImage, text: str, answer_T: Tokens) -> NDArray[np.float32]:
        """Logits [T, V] by which each token of a given answer would be chosen after those before it."""
        return self.follow_pixels(eight_bits(image), text, answer_T)

    def follow_pixels(self, image_HWC: NDArray[np.uint8], text: str, answer_T: Tokens) -> NDArray[np.float32]:
        """``follow`` for an image in 8 bits."""
        logits_1V, advance = self._start(image_HWC, text)
        return follow(logits_1V, advance, answer_T)

    def _answer(self, image_HWC: NDArray[np.uint8], text: str, sampling: Sampling | None) -> Tokens:
        stop = self._stop(sampling)
        logits_1V, advance = self._start(image_HWC, text)
        if sampling is not None and sampling.temperature > 0:
            return sample(logits_1V, advance, stop, sampling)[0]
        return greedy(logits_1V, advance, stop)[0]

    def _start(self, image_HWC: NDArray[np.uint8], text: str) -> tuple[NDArray[np.float32], Advance]:
        logits_1V, advance, read_S = self._model.start(image_HWC, self._prompt(text))
        if self._spec.repetition_penalty == 1:
            return logits_1V, advance
        penalty = RepetitionPenalty(self._spec.repetition_penalty, read_S, advance)
        return penalty.first(logits_1V), penalty.advance

    def _prompt(self, text: str) -> str:
        check_text(text)
        if self._model.marker in text:
            raise UsageError(f"'{self._model.marker}' in the text would pass for the image", fix="leave it out")
        return self._spec.prompt.replace("{image}", self._model.marker).replace("{text}", text)

    def _stop(self, sampling: Sampling | None) -> Stop:
        limit = self._spec.max_tokens
        wanted = limit if sampling is None or sampling.max_tokens is None else sampling.max_tokens
        if wanted > limit:
            raise UsageError(f"{wanted} tokens are more than this bundle answers", fix=f"ask for at most {limit}")
        return Stop(self._model.ends, wanted)

    def _text(self, tokens_T: Tokens) -> str:
        ends = np.flatnonzero(np.isin(tokens_T, self._model.ends))
        said = tokens_T[: ends[0]] if len(ends) else tokens_T
        boxes = self._spec.boxes
        return self._model.text(said.tolist(), () if boxes is None else (boxes.open, boxes.close)).strip()


def eight_bits(image: PreparedImage) -> NDArray[np.uint8]:
    """The one view of an image [H, W, 3]; BundleError where it was split."""
    if len(image.pixels_KCHW) != 1:
        raise BundleError("llama.cpp splits an image itself, and gets it split", fix="export the bundle again")
    pixels_HWC: NDArray[np.uint8] = np.rint(image.pixels_KCHW[0].transpose(1, 2, 0)).astype(np.uint8)
    return pixels_HWC
