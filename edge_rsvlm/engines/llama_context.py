"""What llama.cpp keeps of a GGUF model in memory, and one pass through it.

Letters: C tokens of a pass, V vocabulary, D model width, P positions per token (1, or 4 of mrope), K sequences that one
token belongs to.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.engines.llama_library import VERSION, C, reason, repacks_safely
from edge_rsvlm.errors import BudgetError, BundleError

READ_AT_ONCE = 256
"""Tokens per pass. Twice as many were no faster on a CPU, and take twice the memory."""
EXPORT_AGAIN = "export the bundle again"
NOTHING_READ = (0, b"")
_MROPE = (C.LLAMA_ROPE_TYPE_MROPE, C.LLAMA_ROPE_TYPE_IMROPE)

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


class Context:
    """Caches for ``rows`` sequences, and the buffers of one pass of at most ``at_once`` tokens."""

    def __init__(
        self, model: LlamaModel, context_tokens: int, rows: int, threads: int, at_once: int = READ_AT_ONCE
    ) -> None:
        params = C.llama_context_default_params()
        params.n_ctx, params.n_seq_max = context_tokens * rows, rows
        params.n_batch = params.n_ubatch = max(at_once, rows)
        params.n_outputs_max = rows  # logits of every token of a pass would be larger than the caches
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        self.model, self.rows, self.length, self.at_once = model, rows, context_tokens, params.n_batch
        self.pointer = C.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise BudgetError(
                f"{model.name} found no memory for {rows} x {context_tokens} tokens: {reason()}", fix="free some memory"
            )
        self._place = 0
        self._buffer: NDArray[np.float32] = np.empty((0, 0), np.float32)
        self.memory = C.llama_get_memory(self.pointer)
        self.free = weakref.finalize(self, C.llama_free, self.pointer)
        self.opening: tuple[int, bytes] = NOTHING_READ
        """Sequences, from the first, that began with the same words, and those words; kept up to date by who reads."""

    def goes_back(self, rows: int, opening: bytes, length: int) -> bool:
        """Whether the first ``rows`` sequences hold ``opening``, which is ``length`` tokens, and no longer more than
        that; else nothing is held at all."""
        held, self.opening = self.opening, NOTHING_READ
        known = bool(opening) and held == (rows, opening)
        # Models that keep a state instead of caches do not go back.
        if known and all(C.llama_memory_seq_rm(self.memory, row, length, -1) for row in range(rows)):
            return True
        C.llama_memory_clear(self.memory, False)
        return False

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """One pass: logits [wanted, V]."""
        failed = C.llama_decode(self.pointer, batch.native)
        if failed:
            raise BundleError(f"{self.model.name} failed ({failed}): {reason()}", fix="run `edge-rsvlm verify`")
        logits = self._logits(batch.wanted)
        # The place of the greatest is that of a NaN where there is one; `max` takes 4 % of a token of a small model.
        if batch.wanted and math.isnan(logits.item(logits.argmax())):
            raise BundleError(f"{self.model.name} computes no numbers (NaN)", fix=EXPORT_AGAIN)
        return logits

    def _logits(self, rows: int) -> NDArray[np.float32]:
        """A copy of the first ``rows`` of llama.cpp's own buffer, which the next pass overwrites."""
        if not rows:
            return np.empty((0, self.model.words), np.float32)
        place = ctypes.addressof(C.llama_get_logits(self.pointer).contents)
        if place != self._place:
            kept = (ctypes.c_float * (self.rows * self.model.words)).from_address(place)
            self._place, self._buffer = place, np.ctypeslib.as_array(kept).reshape(self.rows, -1)
        copied: NDArray[np.float32] = self._buffer[:rows].copy()
        return copied


class Batch:
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
