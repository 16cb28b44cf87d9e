"""Text from an image and a prompt: visual tokens among the words, then token after token.

Letters: N images, K tiles of an image, T visual tokens, S tokens of the prompt, D model width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.task_specs import BoxFormat, GenerateTask
from edge_rsvlm.errors import BundleError, UsageError
from edge_rsvlm.tasks.encode import Features, encode
from edge_rsvlm.tasks.prompt import REMAKE, Layout, grid, mrope_positions, sequence_positions, write_image
from edge_rsvlm.tasks.search import RepetitionPenalty, Sampling, Stop, Tokens, beam_search, follow, greedy, sample
from edge_rsvlm.tasks.text import check_text, load_tokenizer
from edge_rsvlm.types import Advance, InferenceSession, LanguageModel, Prompt

__all__ = ["Generator", "PreparedImage", "Sampling", "Vision", "parse_boxes"]


class PreparedImage(Protocol):
    """An image as ``tiles.prepare`` makes it."""

    @property
    def pixels_KCHW(self) -> NDArray[np.float32]: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...


@dataclass(frozen=True)
class Vision:
    """``project`` is None where the encoder itself gives visual tokens."""

    encoder: InferenceSession
    project: InferenceSession | None


class Generator:
    """Images and one text -> what the model says of each."""

    def __init__(self, spec: GenerateTask, vision: Vision, language: LanguageModel, tokenizer: Path) -> None:
        self._spec, self._vision, self._language = spec, vision, language
        self._tokenizer = load_tokenizer(tokenizer)
        self._visual_id = _visual_id(self._tokenizer, spec.visual.token)
        self._hidden = _hidden_ids(self._tokenizer, spec.boxes)

    def __call__(self, images: Sequence[PreparedImage], text: str, sampling: Sampling | None = None) -> list[str]:
        """One answer per image. Images of one layout run together; that changes no answer."""
        return [self._text(tokens) for tokens in self.tokens(images, text, sampling)]

    def tokens(self, images: Sequence[PreparedImage], text: str, sampling: Sampling | None = None) -> list[Tokens]:
        """The answers as the model wrote them, the end included where it came."""
        groups: dict[Layout, list[int]] = {}
        for n, image in enumerate(images):
            groups.setdefault(_layout(image), []).append(n)
        answers: list[Tokens] = [np.zeros(0, np.int64)] * len(images)
        for layout, members in groups.items():
            pixels_NKCHW = np.stack([images[n].pixels_KCHW for n in members])
            found = self._answer(self._see(pixels_NKCHW), layout, text, sampling)
            for n, answer in zip(members, found, strict=True):
                answers[n] = answer
        return answers

    def follow(self, image: PreparedImage, text: str, answer_T: Tokens) -> NDArray[np.float32]:
        """Logits [T, V] by which each token of a given answer would be chosen after those before it."""
        logits_NV, advance = self._start(self._see(image.pixels_KCHW[None]), _layout(image), text)
        return follow(logits_NV, advance, answer_T)

    def read(self, image: PreparedImage, text: str) -> Prompt:
        """What the language model reads of an image and a text."""
        layout = _layout(image)
        ids_S = self._ids(self._prompt(layout, text))
        return self._placed(ids_S, self._see(image.pixels_KCHW[None]), layout)

    def _see(self, pixels_NKCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        """Visual tokens of images, tile by tile: a split image then needs no more memory than a small one."""
        tiles = range(pixels_NKCHW.shape[1])
        return np.concatenate([self._visual(self._encode(pixels_NKCHW[:, k])) for k in tiles], axis=1)

    def prompt(self, image: PreparedImage, text: str) -> str:
        """What the model reads, as one string."""
        return self._prompt(_layout(image), text)

    def _prompt(self, layout: Layout, text: str) -> str:
        check_text(text)
        visual = self._spec.visual
        if visual.token is not None and visual.token in text:
            raise UsageError(f"'{visual.token}' in the text would pass for the image", fix="leave it out")
        return self._spec.prompt.replace("{image}", write_image(visual, layout)).replace("{text}", text)

    def _ids(self, prompt: str) -> Tokens:
        spec = self._spec.tokenizer
        ids_S = np.array(self._tokenizer.encode(prompt, add_special_tokens=spec.add_special_tokens).ids, np.int64)
        if spec.max_length is not None and len(ids_S) > spec.max_length:
            raise UsageError(
                f"image and text make {len(ids_S)} tokens, the model reads {spec.max_length}",
                fix="ask a shorter question",
            )
        return ids_S

    def _encode(self, pixels_NCHW: NDArray[np.float32]) -> Features:
        return encode(self._vision.encoder, pixels_NCHW, self._spec.encoder_outputs)

    def _visual(self, features: Features) -> NDArray[np.float32]:
        """Visual tokens [N, T, D]."""
        inputs = {name: features[name] for name in self._spec.encoder_outputs}
        if self._vision.project is None:
            (visual_NTD,) = inputs.values()
            return visual_NTD
        return self._vision.project.run(inputs, ["features"])[0]

    def _answer(
        self, visual_NTD: NDArray[np.float32], layout: Layout, text: str, sampling: Sampling | None
    ) -> list[Tokens]:
        stop = self._stop(sampling)
        logits_NV, advance = self._start(visual_NTD, layout, text)
        return self._search(logits_NV, advance, stop, sampling)

    def _start(self, visual_NTD: NDArray[np.float32], layout: Layout, text: str) -> tuple[NDArray[np.float32], Advance]:
        """Logits of the first token, and what goes on from there."""
        ids_S = self._ids(self._prompt(layout, text))
        logits_NV, advance = self._language.start(self._placed(ids_S, visual_NTD, layout))
        if self._spec.repetition_penalty == 1:
            return logits_NV, advance
        penalty = RepetitionPenalty(self._spec.repetition_penalty, ids_S, advance)
        return penalty.first(logits_NV), penalty.advance

    def _stop(self, sampling: Sampling | None) -> Stop:
        limit = self._spec.max_tokens
        wanted = limit if sampling is None or sampling.max_tokens is None else sampling.max_tokens
        if wanted > limit:
            raise UsageError(f"{wanted} tokens are more than this bundle answers", fix=f"ask for at most {limit}")
        return Stop(self._spec.eos_ids, wanted)

    def _placed(self, ids_S: Tokens, visual_NTD: NDArray[np.float32], layout: Layout) -> Prompt:
        """The prompt with the visual tokens in the places of their own token, or before all words."""
        visual = visual_NTD.shape[1]
        if self._visual_id is None:
            ids_S = np.concatenate([np.zeros(visual, np.int64), ids_S])
            visual_S = np.arange(len(ids_S)) < visual
        else:
            visual_S = ids_S == self._visual_id
        if visual_S.sum() != visual:
            raise BundleError(f"{visual} visual tokens for {visual_S.sum()} places in the prompt", fix=REMAKE)
        if self._spec.positions == "mrope":
            positions = mrope_positions(visual_S, grid(self._spec.visual, layout.tile_hw))
        else:
            positions = sequence_positions(len(ids_S))
        return Prompt(ids_S, visual_S, visual_NTD, positions)

    def _search(
        self, logits_NV: NDArray[np.float32], advance: Advance, stop: Stop, sampling: Sampling | None
    ) -> list[Tokens]:
        if sampling is not None and sampling.temperature > 0:
            return sample(logits_NV, advance, stop, sampling)
        if self._spec.beams == 1:
            return greedy(logits_NV, advance, stop)
        beams, penalty = self._spec.beams, self._spec.length_penalty
        return beam_search(logits_NV, advance, stop, beams=beams, length_penalty=penalty)

    def _text(self, tokens_T: Tokens) -> str:
        """The words before the end, without special tokens."""
        ends = np.flatnonzero(np.isin(tokens_T, self._spec.eos_ids))
        said = tokens_T[: ends[0]] if len(ends) else tokens_T
        kept = [int(token) for token in said if int(token) not in self._hidden]
        return str(self._tokenizer.decode(kept, skip_special_tokens=False)).strip()


def _layout(image: PreparedImage) -> Layout:
    tiles, _, height, width = image.pixels_KCHW.shape
    return Layout(tiles, image.rows, image.cols, (height, width))


def _visual_id(tokenizer: Any, token: str | None) -> int | None:
    if token is None:
        return None
    found: int | None = tokenizer.token_to_id(token)
    if found is None:
        raise BundleError(f"the tokenizer has no token '{token}' for images", fix=REMAKE)
    return found


def _hidden_ids(tokenizer: Any, boxes: BoxFormat | None) -> set[int]:
    """Special tokens, which no answer shows; those that mark boxes are wanted where boxes are."""
    marks = () if boxes is None else (boxes.open, boxes.close)
    special = {number: token for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return {number for number, token in special.items() if not any(token.content in mark for mark in marks)}


NUMBER = re.compile(r"(?:(?<![0-9])-)?[0-9]*\.?[0-9]+")


def parse_boxes(
    answer: str, form: BoxFormat, prepared_hw: tuple[float, float]
) -> list[tuple[float, float, float, float]]:
    """Boxes x0, y0, x1, y1 in an answer, as shares (0..1) of the prepared image.

    What is not four finite numbers, or has no area inside the image, is no box; a fifth number (an angle) is ignored.
    """
    height, width = prepared_hw
    divisors = (width, height) * 2 if form.scale is None else (form.scale,) * 4
    found = []
    for inside in _between(answer, form.open, form.close):
        numbers = [float(text) for text in NUMBER.findall(inside)[:4]]
        if len(numbers) < 4 or not all(map(math.isfinite, numbers)):
            continue
        x0, y0, x1, y1 = (min(max(n / by, 0.0), 1.0) for n, by in zip(numbers, divisors, strict=True))
        if x0 != x1 and y0 != y1:
            found.append((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)))
    return found


def _between(text: str, before: str, after: str) -> list[str]:
    """What stands between the marks, of nested ones the innermost."""
    found, start, end = [], 0, text.find(after)
    while end >= 0:
        begin = text.rfind(before, start, end)
        if begin >= 0:
            found.append(text[begin + len(before) : end])
            start = end + len(after)
        else:
            # Nothing opens before here, but a mark that opens and closes alike may open here.
            start = max(start, end - len(before) + 1)
        end = text.find(after, end + 1)
    return found
