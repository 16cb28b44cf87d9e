"""Models of llama.cpp that see: a projector file (mmproj), by libmtmd, in front of a language model.

libmtmd prepares an image as the projector's checkpoint wants it, writes it into the prompt and encodes it. What it
makes goes the way of every prompt, through ``LlamaLanguage``.

Letters: S tokens of the prompt, T visual tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import mtmd_cpp as M
from numpy.typing import NDArray

from edge_rsvlm.engines.llama import LlamaLanguage
from edge_rsvlm.engines.llama_context import EXPORT_AGAIN
from edge_rsvlm.engines.llama_library import VERSION, C, listen, reason
from edge_rsvlm.errors import BundleError, InputError, UsageError
from edge_rsvlm.types import Advance, Prompt

M.mtmd_log_set(listen, None)
M.mtmd_helper_log_set(listen, None)
MOST_PIECE_BYTES = 256


@dataclass(frozen=True)
class _Part:
    """A stretch of the prompt: ``ids_T`` of words, or the visual tokens of one image or tile."""

    ids_T: NDArray[np.int64]
    positions: NDArray[np.int64]
    """[T], or [3, T] of mrope."""
    visual_TD: NDArray[np.float32] | None


class LlamaVision:
    """Images and prompts in, words out. BundleError when libmtmd cannot load ``projector``."""

    def __init__(self, language: LlamaLanguage, projector: Path) -> None:
        self._language, self._model, self._name = language, language.model, projector.name
        params = M.mtmd_context_params_default()
        params.use_gpu = params.print_timings = params.warmup = False
        params.n_threads = language.threads
        self._context = M.mtmd_init_from_file(str(projector).encode(), self._model.pointer, params)
        if not self._context or not M.mtmd_support_vision(self._context):
            raise BundleError(f"llama.cpp {VERSION} cannot see by {projector.name}: {reason()}", fix=EXPORT_AGAIN)
        weakref.finalize(self, M.mtmd_free, self._context)
        self.marker = (M.mtmd_get_marker(self._context) or M.mtmd_default_marker()).decode()
        """What stands for the image in a prompt."""
        vocabulary = self._model.vocabulary
        self.ends = tuple(n for n in range(self._model.words) if C.llama_vocab_is_eog(vocabulary, n))
        """Tokens that end an answer."""
        self._see_ahead = False

    def start(
        self, image_HWC: NDArray[np.uint8], prompt: str
    ) -> tuple[NDArray[np.float32], Advance, NDArray[np.int64]]:
        """Logits [1, V] of the first token after the prompt, in which ``marker`` stands for the image; what goes on
        from there; and the tokens of words that were read, those that libmtmd writes around the image among them."""
        self._see_ahead = False
        parts = list(self._parts(image_HWC, prompt))
        visual = [part.visual_TD for part in parts if part.visual_TD is not None]
        whole = Prompt(
            np.concatenate([part.ids_T for part in parts]),
            np.concatenate([np.full(len(part.ids_T), part.visual_TD is not None) for part in parts]),
            np.concatenate(visual)[None],
            np.concatenate([part.positions for part in parts], axis=-1),
        )
        logits_1V, advance = self._language.start(whole, images_see_ahead=self._see_ahead)
        return logits_1V, advance, whole.ids_S[~whole.visual_S]

    def tokens(self, image_HWC: NDArray[np.uint8], prompt: str) -> int:
        """How many tokens image and prompt are together; nothing is computed."""
        with self._chunks(image_HWC, prompt) as chunks:
            return sum(M.mtmd_input_chunk_get_n_tokens(chunk) for chunk in chunks)

    def text(self, tokens: Sequence[int], marks: Sequence[str] = ()) -> str:
        """The words of an answer, without special tokens but those that are in ``marks``."""
        pieces = [self._piece(token, marks) for token in tokens]
        return b"".join(pieces).decode("utf-8", "replace")

    def _piece(self, token: int, marks: Sequence[str]) -> bytes:
        vocabulary, buffer = self._model.vocabulary, ctypes.create_string_buffer(MOST_PIECE_BYTES)
        size = C.llama_token_to_piece(vocabulary, token, buffer, len(buffer), 0, True)
        piece = buffer.raw[: max(size, 0)]
        special = C.llama_vocab_is_control(vocabulary, token)
        return b"" if special and not any(piece.decode("utf-8", "replace") in mark for mark in marks) else piece

    @contextmanager
    def _chunks(self, image_HWC: NDArray[np.uint8], prompt: str) -> Iterator[list[Any]]:
        """The prompt as libmtmd cuts it, alive inside the block."""
        height, width = image_HWC.shape[:2]
        pixels = np.ascontiguousarray(image_HWC)
        written = prompt.encode()
        text = M.mtmd_input_text(written, len(written), True, True)
        chunks = M.mtmd_input_chunks_init()
        bitmap = M.mtmd_bitmap_init(width, height, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_ubyte)))
        try:
            bitmaps = (M.mtmd_bitmap_p_ctypes * 1)(bitmap)
            failed = M.mtmd_tokenize(self._context, chunks, ctypes.byref(text), bitmaps, 1)
            if failed:
                raise InputError(
                    f"{self._name} cannot prepare an image of {width} x {height} pixels: {reason()}",
                    fix="give it in another shape",
                )
            yield [M.mtmd_input_chunks_get(chunks, n) for n in range(M.mtmd_input_chunks_size(chunks))]
        finally:
            M.mtmd_bitmap_free(bitmap)
            M.mtmd_input_chunks_free(chunks)

    def _parts(self, image_HWC: NDArray[np.uint8], prompt: str) -> Iterator[_Part]:
        with self._chunks(image_HWC, prompt) as chunks:
            count = sum(M.mtmd_input_chunk_get_n_tokens(chunk) for chunk in chunks)
            if count >= self._language.context_tokens:  # before the image is encoded for nothing
                raise UsageError(
                    f"image and text make {count} tokens, the model reads {self._language.context_tokens - 1}",
                    fix="ask a shorter question",
                )
            position = 0
            for chunk in chunks:
                words = M.mtmd_input_chunk_get_type(chunk) == M.MTMD_INPUT_CHUNK_TYPE_TEXT
                yield self._words(chunk, position) if words else self._image(chunk, position)
                position += M.mtmd_input_chunk_get_n_pos(chunk)

    def _words(self, chunk: Any, position: int) -> _Part:
        count = ctypes.c_size_t()
        tokens = M.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
        ids_T = np.array(tokens[: count.value], np.int64)
        positions_T = position + np.arange(len(ids_T), dtype=np.int64)
        axes = 3 if self._model.mrope else 1
        return _Part(ids_T, np.tile(positions_T, (axes, 1)) if self._model.mrope else positions_T, None)

    def _image(self, chunk: Any, position: int) -> _Part:
        count = M.mtmd_input_chunk_get_n_tokens(chunk)
        if M.mtmd_encode_chunk(self._context, chunk):
            raise BundleError(f"{self._name} failed: {reason()}", fix="run `edge-rsvlm verify`")
        visual_TD = np.empty((count, self._model.width), np.float32)
        ctypes.memmove(visual_TD.ctypes.data, M.mtmd_get_output_embd(self._context), visual_TD.nbytes)
        self._see_ahead = bool(M.mtmd_decode_use_non_causal(self._context, chunk))
        positions = position + np.arange(count, dtype=np.int64)
        if self._model.mrope:
            places = (M.mtmd_decoder_pos * count)()
            M.mtmd_helper_image_get_decoder_pos(M.mtmd_input_chunk_get_tokens_image(chunk), position, places)
            positions = np.array([[p.t for p in places], [p.y for p in places], [p.x for p in places]], np.int64)
        return _Part(np.zeros(count, np.int64), positions, visual_TD)
