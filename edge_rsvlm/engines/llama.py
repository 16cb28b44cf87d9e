"""Language models in GGUF files, run by llama.cpp: weights mapped from the file, key-value caches in f16.

Letters: N images, M rows that go on, S tokens of a prompt, T visual tokens, D model width, V vocabulary, P positions
per token (1, or 4 of mrope), G groups of K sequences that read the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.engines.llama_context import EXPORT_AGAIN, NOTHING_READ, Batch, Context, Ints, LlamaModel
from edge_rsvlm.engines.llama_library import C
from edge_rsvlm.errors import BundleError, UsageError
from edge_rsvlm.types import Advance, Prompt


class LlamaLanguage:
    """LanguageModel of a GGUF file, for prompts and answers of ``context_tokens`` together.

    ``beams`` rows may go on from one image. The caches of the sequences share one pool: rows that go on from one row
    share what it read, and nothing is copied.
    """

    def __init__(self, model: Path, context_tokens: int, threads: int, beams: int = 1) -> None:
        self.model, self.context_tokens, self.threads = LlamaModel(model), context_tokens, threads
        self._beams = beams
        self._context = Context(self.model, context_tokens, beams, threads)

    def start(self, prompt: Prompt, *, images_see_ahead: bool = False) -> tuple[NDArray[np.float32], Advance]:
        """See LanguageModel. Tokens of an image see those after them where ``images_see_ahead``."""
        self._check(prompt)
        rows = max(len(prompt.visual_NTD) * self._beams, self._context.rows)
        # What sees ahead is read in one pass.
        together = prompt.visual_NTD.shape[1] if images_see_ahead else 0
        at_once = max(together, self._context.at_once)
        if (rows, at_once) != (self._context.rows, self._context.at_once):
            self._context.free()
            self._context.rows = 0  # should there be no memory for another
            self._context = Context(self.model, self.context_tokens, rows, self.threads, at_once)
        reading = _Reading(self._context, len(prompt.visual_NTD), images_see_ahead)
        return reading.read(prompt), reading.go_on

    def _check(self, prompt: Prompt) -> None:
        count = len(prompt.ids_S)
        if count >= self.context_tokens:
            raise UsageError(
                f"image and text make {count} tokens, the model reads {self.context_tokens - 1}",
                fix="ask a shorter question",
            )
        width, mrope = prompt.visual_NTD.shape[2], prompt.positions.ndim == 2
        if width != self.model.width or mrope != self.model.mrope:
            raise BundleError(f"{self.model.name} and the image encoder are not of one model", fix=EXPORT_AGAIN)
        if int(prompt.ids_S[~prompt.visual_S].max(initial=0)) >= self.model.words:
            raise BundleError(f"{self.model.name} has fewer words than the tokenizer", fix=EXPORT_AGAIN)


class _Reading:
    """Sequences being read, one per row; ``_sequence_N`` is the number that llama.cpp knows each by."""

    def __init__(self, context: Context, count: int, images_see_ahead: bool) -> None:
        self._context, self._images_see_ahead = context, images_see_ahead
        self._sequence_N: Ints = np.arange(count, dtype=np.int32)
        self._rows = np.arange(count).tobytes()
        self._length, self._next_position = 0, 0
        self._step: Batch | None = None

    def read(self, prompt: Prompt) -> NDArray[np.float32]:
        """Logits [N, V] after the prompt. What stands before the image is read once for all rows, and not again where
        the last prompt began so too.
        """
        first = next(_runs(prompt.visual_S))[1]
        opening = b"" if prompt.visual_S[0] or first == len(prompt.ids_S) else prompt.ids_S[:first].tobytes()
        known = self._context.goes_back(len(self._sequence_N), opening, first)
        self._length, self._next_position = len(prompt.ids_S), int(prompt.positions.max()) + 1
        seen = 0
        logits: list[NDArray[np.float32]] = []
        for begin, end in _runs(prompt.visual_S):
            positions = prompt.positions[..., begin:end].astype(np.int32)
            last = end == self._length
            if prompt.visual_S[begin]:
                here_NTD = prompt.visual_NTD[:, seen : seen + end - begin]
                seen += end - begin
                logits = self._read_image(here_NTD, positions, last)
            elif begin or not known:
                shared = not seen and not last
                logits = self._read_words(prompt.ids_S[begin:end].astype(np.int32), positions, shared, last)
        self._context.opening = (len(self._sequence_N), opening)
        return np.concatenate(logits)

    def _read_image(self, embeds_NTD: NDArray[np.float32], positions: Ints, last: bool) -> list[NDArray[np.float32]]:
        count, width = embeds_NTD.shape[1:]
        # mrope has a fourth axis that no image uses.
        rows = 4 if positions.ndim == 2 else 1
        positions_PT = np.zeros((rows, count), np.int32)
        positions_PT[: max(1, rows - 1)] = positions
        embeds = np.ascontiguousarray(embeds_NTD, np.float32).reshape(-1, width)
        if self._images_see_ahead:
            C.llama_set_causal_attn(self._context.pointer, False)
        try:
            at_once = count if self._images_see_ahead else self._context.at_once
            return self._passes(positions_PT, self._sequence_N[:, None], last, at_once, embeds=embeds)
        finally:
            if self._images_see_ahead:
                C.llama_set_causal_attn(self._context.pointer, True)

    def _read_words(self, ids_T: Ints, positions: Ints, shared: bool, last: bool) -> list[NDArray[np.float32]]:
        # One position is enough for a word: llama.cpp repeats it for every axis of mrope.
        positions_1T = positions.reshape(-1, len(ids_T))[:1]
        groups = self._sequence_N[None] if shared else self._sequence_N[:, None]
        tokens = np.tile(ids_T, len(groups))
        return self._passes(positions_1T, groups, last, self._context.at_once, tokens=tokens)

    def _passes(
        self, positions_PT: Ints, groups_GK: Ints, last: bool, at_once: int, *,
        tokens: Ints | None = None, embeds: NDArray[np.float32] | None = None,
    ) -> list[NDArray[np.float32]]:  # fmt: skip
        """T tokens of every group of sequences, ``at_once`` per pass; the logits of each group's last."""
        groups, count = len(groups_GK), positions_PT.shape[1]
        positions = np.tile(positions_PT, groups)
        sequences = np.repeat(groups_GK, count, axis=0)
        wanted = np.zeros((groups, count), np.int8)
        wanted[:, -1] = last
        found = []
        for begin in range(0, groups * count, at_once):
            part = slice(begin, begin + at_once)
            batch = Batch(
                np.ascontiguousarray(positions[:, part]), sequences[part], wanted.ravel()[part],
                tokens_C=None if tokens is None else tokens[part],
                embeds_CD=None if embeds is None else embeds[part],
            )  # fmt: skip
            found.append(self._context.run(batch))
        return found

    def go_on(self, tokens_M: NDArray[np.int64], rows_M: NDArray[np.int64]) -> NDArray[np.float32]:
        """See Advance."""
        if self._length >= self._context.length:
            raise UsageError(
                f"image, text and answer are longer than the {self._context.length} tokens that the model reads",
                fix="ask for a shorter answer with --max-tokens",
            )
        self._follow(rows_M)
        if self._step is None:
            count = len(rows_M)
            self._step = Batch(
                np.zeros((1, count), np.int32), self._sequence_N[:, None].copy(), np.ones(count, np.int8),
                tokens_C=np.zeros(count, np.int32),
            )  # fmt: skip
        assert self._step.tokens_C is not None
        self._step.tokens_C[:] = tokens_M
        self._step.positions_PC.fill(self._next_position)
        self._length += 1
        self._next_position += 1
        return self._context.run(self._step)

    def _follow(self, rows_M: NDArray[np.int64]) -> None:
        """Makes ``rows_M`` the rows: a sequence that goes on twice is shared, one that does not is forgotten."""
        if rows_M.tobytes() == self._rows:
            return
        if len(rows_M) > self._context.rows:
            raise BundleError(f"{len(rows_M)} beams for {self._context.rows} caches", fix=EXPORT_AGAIN)
        self._context.opening = NOTHING_READ
        memory, kept = self._context.memory, self._sequence_N[np.unique(rows_M)]
        for sequence in np.setdiff1d(self._sequence_N, kept):
            C.llama_memory_seq_rm(memory, int(sequence), -1, -1)
        free = iter(np.setdiff1d(np.arange(self._context.rows, dtype=np.int32), kept))
        taken: set[int] = set()
        following: list[int] = []
        for row in rows_M:
            source = int(self._sequence_N[row])
            target = source if source not in taken else int(next(free))
            if target != source:
                C.llama_memory_seq_cp(memory, source, target, -1, -1)
            taken.add(target)
            following.append(target)
        self._sequence_N = np.array(following, np.int32)
        self._rows = np.arange(len(following)).tobytes()
        self._step = None


def _runs(visual_S: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """(begin, end) of the stretches of words and of visual tokens."""
    edges = [0, *(np.flatnonzero(np.diff(visual_S)) + 1).tolist(), len(visual_S)]
    return pairwise(edges)
