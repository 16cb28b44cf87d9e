"""A language model that goes on from its key-value caches.

Letters: N sequences, M sequences that go on, S tokens read now, P tokens read before, D model width, V vocabulary.

The caches pass through Python as NumPy arrays. Keeping them inside onnxruntime (OrtValue, I/O binding) gained nothing
on a CPU: with a decoder 512 wide of 8 layers, 512 tokens read, one thread: 67.7 tokens/s without, 66.3 with it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.task_specs import KeyValueCache, OnnxDecoder
from edge_rsvlm.errors import BundleError
from edge_rsvlm.types import Advance, InferenceSession, Prompt


def cache_names(cache: KeyValueCache) -> dict[str, str]:
    """Output name of every cache tensor -> the input name that takes it at the next step."""

    def named(pattern: str, layer: int, part: str) -> str:
        return pattern.replace("{layer}", str(layer)).replace("{part}", part)

    pairs = [(layer, part) for layer in range(cache.layers) for part in ("key", "value")]
    return {named(cache.present, layer, part): named(cache.past, layer, part) for layer, part in pairs}


class OnnxLanguage:
    """A language model of two graphs. ``roles`` are the inputs that the decoder lists."""

    def __init__(
        self, spec: OnnxDecoder, embed: InferenceSession, decoder: InferenceSession, roles: frozenset[str]
    ) -> None:
        self._spec, self._embed, self._decoder, self._roles = spec, embed, decoder, roles

    def start(self, prompt: Prompt) -> tuple[NDArray[np.float32], Advance]:
        decoder = Decoder(self._spec.cache, self._decoder, self._roles, len(prompt.visual_NTD))

        def advance(tokens_M: NDArray[np.int64], rows_M: NDArray[np.int64]) -> NDArray[np.float32]:
            return decoder.go_on(self._words(tokens_M[:, None]), rows_M)

        return decoder.read(self._read(prompt), prompt.positions), advance

    def _read(self, prompt: Prompt) -> NDArray[np.float32]:
        """Embeddings [N, S, D] of the prompt with the visual tokens in their places."""
        # The table may have no row for the visual token, whose own embedding nobody needs.
        words_1SD = self._words(np.where(prompt.visual_S, 0, prompt.ids_S)[None])
        embeds_NSD = np.repeat(words_1SD, len(prompt.visual_NTD), axis=0)
        embeds_NSD[:, prompt.visual_S] = prompt.visual_NTD
        return embeds_NSD

    def _words(self, ids_NS: NDArray[np.int64]) -> NDArray[np.float32]:
        embeds_NSD: NDArray[np.float32] = self._embed.run({"input_ids": ids_NS}, ["inputs_embeds"])[0]
        return embeds_NSD


class Decoder:
    """One batch of sequences being read; remembers what was read."""

    def __init__(self, cache: KeyValueCache, session: InferenceSession, roles: frozenset[str], count: int) -> None:
        self._session, self._roles, self._names = session, roles, cache_names(cache)
        self._position_shape: tuple[int, ...] = (1,)
        self._next_position = 0
        empty = np.zeros((count, cache.heads, 0, cache.head_dim), np.float32)
        self._past: dict[str, NDArray[np.float32]] = dict.fromkeys(self._names.values(), empty)

    def read(self, embeds_NSD: NDArray[np.float32], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [N, V] of the token after these, whose ``positions`` are [S], or [3, S] of mrope."""
        count, length = embeds_NSD.shape[:2]
        inputs: dict[str, NDArray[Any]] = {"inputs_embeds": embeds_NSD, **self._past}
        if "position_ids" in self._roles:
            inputs["position_ids"] = np.repeat(positions[..., None, :], count, axis=-2)
        if "attention_mask" in self._roles:
            past = next(iter(self._past.values())).shape[2]
            inputs["attention_mask"] = np.ones((count, past + length), np.int64)
        logits, *present = self._session.run(inputs, ["logits", *self._names])
        self._past = dict(zip(self._names.values(), present, strict=True))
        self._position_shape = (*positions.shape[:-1], 1)
        self._next_position = int(positions.max()) + 1
        last_NV: NDArray[np.float32] = logits[:, -1]
        if np.isnan(last_NV).any():
            raise BundleError("the decoder computes no numbers (NaN)", fix="export it with float32 weights")
        return last_NV

    def go_on(self, embeds_M1D: NDArray[np.float32], rows_M: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [M, V] after one more token of the sequences ``rows_M``, which may repeat or leave out some."""
        count = len(next(iter(self._past.values())))
        if not np.array_equal(rows_M, np.arange(count)):
            self._past = {name: values[rows_M] for name, values in self._past.items()}
        return self.read(embeds_M1D, np.full(self._position_shape, self._next_position, np.int64))
