"""GGUF files run by llama.cpp's own functions, caches in float32, for comparison with transformers."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from edge_rsvlm.engines.llama_library import C

CONTEXT_TOKENS, BATCH_TOKENS = 512, 512


class LlamaFile:
    """One loaded text model and the cache of one sequence."""

    def __init__(self, path: Path, *, words_only: bool = False) -> None:
        params = C.llama_model_default_params()
        params.vocab_only, params.use_extra_bufts, params.n_gpu_layers = words_only, False, 0
        self.model = C.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, f"{path} does not load"
        self.words = C.llama_model_get_vocab(self.model)
        self.context = None if words_only else self._context()

    def _context(self):
        params = C.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT_TOKENS, BATCH_TOKENS, BATCH_TOKENS
        params.type_k = params.type_v = C.GGML_TYPE_F32
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type = C.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return C.llama_init_from_model(self.model, params)

    def close(self) -> None:
        if self.context:
            C.llama_free(self.context)
        C.llama_model_free(self.model)

    def tokens(self, text: str, *, special: bool = False) -> list[int]:
        data = text.encode()
        ids = (C.llama_token * (len(data) + 8))()
        count = C.llama_tokenize(self.words, data, len(data), ids, len(ids), special, True)
        assert count >= 0
        return list(ids[:count])

    def logits(self, ids: list[int], past: int = 0) -> np.ndarray:
        """[T, V] after each of ``ids``."""
        batch = C.llama_batch_init(len(ids), 0, 1)
        for i, token in enumerate(ids):
            batch.token[i] = token
        return self._run(batch, np.arange(past, past + len(ids))[None], len(ids))

    def embed_logits(self, embeds_TD: np.ndarray, positions_PT: np.ndarray) -> np.ndarray:
        """[T, V] after each of ``embeds_TD``; P is 1, or 4 of mrope."""
        count, width = embeds_TD.shape
        data = np.ascontiguousarray(embeds_TD, np.float32)
        batch = C.llama_batch_init(count * len(positions_PT), width, 1)
        ctypes.memmove(batch.embd, data.ctypes.data, data.nbytes)
        return self._run(batch, positions_PT, count)

    def _run(self, batch, positions_PT: np.ndarray, count: int) -> np.ndarray:
        batch.n_tokens = count
        for i, position in enumerate(positions_PT.ravel()):
            batch.pos[i] = int(position)
        for i in range(count):
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
        try:
            assert C.llama_decode(self.context, batch) == 0
            width = C.llama_vocab_n_tokens(self.words)
            return np.array(
                [np.ctypeslib.as_array(C.llama_get_logits_ith(self.context, i), (width,)) for i in range(count)]
            )
        finally:
            C.llama_batch_free(batch)

    def forget(self) -> None:
        C.llama_memory_clear(C.llama_get_memory(self.context), True)

    def greedy(self, ids: list[int], count: int) -> list[int]:
        self.forget()
        answer: list[int] = []
        logits = self.logits(ids)
        for _ in range(count):
            answer.append(int(logits[-1].argmax()))
            logits = self.logits(answer[-1:], len(ids) + len(answer) - 1)
        return answer


@contextmanager
def llama(path: Path, *, words_only: bool = False) -> Iterator[LlamaFile]:
    loaded = LlamaFile(path, words_only=words_only)
    try:
        yield loaded
    finally:
        loaded.close()
