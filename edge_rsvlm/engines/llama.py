"""Language models in GGUF files, run by llama.cpp: weights mapped from the file, key-value caches in f16.

Letters: N images, M rows that go on, S tokens of a prompt, T visual tokens, D model width, V vocabulary, P positions
per token (1, or 4 of mrope), K sequences that one token belongs to.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.engines.llama_library import VERSION, C, reason, repacks_safely
from edge_rsvlm.errors import BudgetError, BundleError, UsageError
from edge_rsvlm.types import Advance, Prompt

READ_AT_ONCE = 256
"""Tokens per pass. Twice as many were no faster on a CPU, and take twice the memory."""
_MROPE = (C.LLAMA_ROPE_TYPE_MROPE, C.LLAMA_ROPE_TYPE_IMROPE)
EXPORT_AGAIN = "export the bundle again"

Ints = NDArray[np.int32]


class LlamaModel:
    """The weights and the vocabulary of one GGUF file. BundleError when llama.cpp cannot load it."""

    def __init__(self, file: Path) -> None:
        params = C.llama_model_default_params()
        params.load_mode = C.LLAMA_LOAD_MODE_MMAP
        params.n_gpu_layers = 0
        params.use_extra_bufts = repacks_safely()
        self.name = file.name
        self.pointer = C.llama_model_load_from_file(str(file).encode(), params)
        if not self.pointer:
            raise BundleError(f"llama.cpp {VERSION} cannot load {file.name}: {reason()}", fix=EXPORT_AGAIN)
        self.vocabulary = C.llama_model_get_vocab(self.pointer)
        self.words: int = C.llama_vocab_n_tokens(self.vocabulary)
        self.width: int = C.llama_model_n_embd_inp(self.pointer)
        self.mrope: bool = C.llama_model_rope_type(self.pointer) in _MROPE
        weakref.finalize(self, C.llama_model_free, self.pointer)

    @property
    def specials(self) -> dict[str, str]:
        """Tokens that chat templates write by name; empty where the vocabulary has none."""
        found = {"bos_token": C.llama_vocab_bos(self.vocabulary), "eos_token": C.llama_vocab_eos(self.vocabulary)}
        return {
            name: "" if token < 0 else C.llama_vocab_get_text(self.vocabulary, token).decode("utf-8", "replace")
            for name, token in found.items()
        }

    @property
    def adds_bos(self) -> bool:
        """Whether the first of them comes before every text."""
        return bool(C.llama_vocab_get_add_bos(self.vocabulary))


class LlamaLanguage:
    """LanguageModel of a GGUF file, for prompts and answers of ``context_tokens`` together.

    ``beams`` rows may go on from one image. The caches of the sequences share one pool: rows that go on from one row
    share what it read, and nothing is copied.
    """

    def __init__(self, model: Path, context_tokens: int, threads: int, beams: int = 1) -> None:
        self.model, self.context_tokens, self.threads = LlamaModel(model), context_tokens, threads
        self._beams = beams
        self._context = _Context(self.model, context_tokens, beams, threads)

    def start(self, prompt: Prompt, *, images_see_ahead: bool = False) -> tuple[NDArray[np.float32], Advance]:
        """See LanguageModel. Tokens of an image see those after them where ``images_see_ahead``."""
        self._check(prompt)
        rows = len(prompt.visual_NTD) * self._beams
        if rows > self._context.rows:
            self._context.free()
            self._context = _Context(self.model, self.context_tokens, rows, self.threads)
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


class _Context:
    """Caches for ``rows`` sequences, and the buffers of one pass."""

    def __init__(self, model: LlamaModel, context_tokens: int, rows: int, threads: int) -> None:
        params = C.llama_context_default_params()
        params.n_ctx, params.n_seq_max = context_tokens * rows, rows
        params.n_batch = params.n_ubatch = max(READ_AT_ONCE, rows)
        params.n_outputs_max = rows  # logits of every token of a pass would be larger than the caches
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        self.model, self.rows, self.length, self.at_once = model, rows, context_tokens, params.n_batch
        self.pointer = C.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise BudgetError(
                f"{model.name} found no memory for {rows} x {context_tokens} tokens: {reason()}", fix="free some memory"
            )
        self.memory = C.llama_get_memory(self.pointer)
        self.free = weakref.finalize(self, C.llama_free, self.pointer)

    def run(self, batch: _Batch) -> NDArray[np.float32]:
        """One pass: logits [wanted, V]."""
        failed = C.llama_decode(self.pointer, batch.native)
        if failed:
            raise BundleError(f"{self.model.name} failed ({failed}): {reason()}", fix="run `edge-rsvlm verify`")
        logits = np.empty((batch.wanted, self.model.words), np.float32)
        if batch.wanted:
            ctypes.memmove(logits.ctypes.data, C.llama_get_logits(self.pointer), logits.nbytes)
            if np.isnan(logits).any():
                raise BundleError(f"{self.model.name} computes no numbers (NaN)", fix=EXPORT_AGAIN)
        return logits


class _Batch:
    """What one pass reads: arrays of ours, to which the structure of llama.cpp points.

    Either ``tokens_C`` or ``embeds_CD``; ``positions_PC``; the ``sequences_CK`` of each token; and of which tokens
    the logits are ``wanted_C``.
    """

    def __init__(
        self, positions_PC: Ints, sequences_CK: Ints, wanted_C: NDArray[np.int8], *,
        tokens_C: Ints | None = None, embeds_CD: NDArray[np.float32] | None = None,
    ) -> None:  # fmt: skip
        count, shared = sequences_CK.shape
        self.tokens_C, self.positions_PC, self.wanted = tokens_C, positions_PC, int(wanted_C.sum())
        each_C = np.full(count, shared, np.int32)
        lists_C = (sequences_CK.ctypes.data + np.arange(count) * sequences_CK.strides[0]).astype(np.uintp)
        self._kept = (positions_PC, sequences_CK, wanted_C, tokens_C, embeds_CD, each_C, lists_C)
        types: dict[str, Any] = dict(C.llama_batch._fields_)

        def pointer(name: str, array: NDArray[Any] | None) -> Any:
            assert array is None or array.flags.c_contiguous
            return types[name]() if array is None else ctypes.cast(array.ctypes.data, types[name])

        self.native = C.llama_batch(
            count, pointer("token", tokens_C), pointer("embd", embeds_CD), pointer("pos", positions_PC),
            pointer("n_seq_id", each_C), pointer("seq_id", lists_C), pointer("logits", wanted_C),
        )  # fmt: skip


class _Reading:
    """Sequences being read, one per row; ``_sequence_N`` is the number that llama.cpp knows each by."""

    def __init__(self, context: _Context, count: int, images_see_ahead: bool) -> None:
        C.llama_memory_clear(context.memory, False)
        self._context, self._images_see_ahead = context, images_see_ahead
        self._sequence_N: Ints = np.arange(count, dtype=np.int32)
        self._length, self._next_position = 0, 0
        self._step: _Batch | None = None

    def read(self, prompt: Prompt) -> NDArray[np.float32]:
        """Logits [N, V] after the prompt. What stands before the image is read once for all rows."""
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
            else:
                shared = not seen and not last
                logits = self._read_words(prompt.ids_S[begin:end].astype(np.int32), positions, shared, last)
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
            return self._passes(positions_PT, self._sequence_N[:, None], last, embeds=embeds)
        finally:
            if self._images_see_ahead:
                C.llama_set_causal_attn(self._context.pointer, True)

    def _read_words(self, ids_T: Ints, positions: Ints, shared: bool, last: bool) -> list[NDArray[np.float32]]:
        # One position is enough for a word: llama.cpp repeats it for every axis of mrope.
        positions_1T = positions.reshape(-1, len(ids_T))[:1]
        groups = self._sequence_N[None] if shared else self._sequence_N[:, None]
        return self._passes(positions_1T, groups, last, tokens=np.tile(ids_T, len(groups)))

    def _passes(
        self, positions_PT: Ints, groups_GK: Ints, last: bool, *,
        tokens: Ints | None = None, embeds: NDArray[np.float32] | None = None,
    ) -> list[NDArray[np.float32]]:  # fmt: skip
        """T tokens of every group of sequences, in as many passes as it takes; the logits of each group's last."""
        groups, count = len(groups_GK), positions_PT.shape[1]
        positions = np.tile(positions_PT, groups)
        sequences = np.repeat(groups_GK, count, axis=0)
        wanted = np.zeros((groups, count), np.int8)
        wanted[:, -1] = last
        found = []
        for begin in range(0, groups * count, self._context.at_once):
            part = slice(begin, begin + self._context.at_once)
            batch = _Batch(
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
            self._step = _Batch(
                np.zeros((1, count), np.int32), self._sequence_N[:, None].copy(), np.ones(count, np.int8),
                tokens_C=np.zeros(count, np.int32),
            )  # fmt: skip
        assert self._step.tokens_C is not None
        self._step.tokens_C[:] = tokens_M
        self._step.positions_PC[:] = self._next_position
        self._length += 1
        self._next_position += 1
        return self._context.run(self._step)

    def _follow(self, rows_M: NDArray[np.int64]) -> None:
        """Makes ``rows_M`` the rows: a sequence that goes on twice is shared, one that does not is forgotten."""
        if np.array_equal(rows_M, np.arange(len(self._sequence_N))):
            return
        if len(rows_M) > self._context.rows:
            raise BundleError(f"{len(rows_M)} beams for {self._context.rows} caches", fix=EXPORT_AGAIN)
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
        self._step = None


def _runs(visual_S: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """(begin, end) of the stretches of words and of visual tokens."""
    edges = [0, *(np.flatnonzero(np.diff(visual_S)) + 1).tolist(), len(visual_S)]
    return pairwise(edges)
