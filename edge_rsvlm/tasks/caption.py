"""Captions: a Llama-architecture decoder reads projected visual tokens; beam search writes the sentence.

Letters: N images, B beams, T tokens, V vocabulary, L layers, A heads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.manifest import CaptionTask
from edge_rsvlm.tasks.encode import Features
from edge_rsvlm.types import InferenceSession

DISTINCT = 0.5  # word overlap (Jaccard) under which two captions say different things
WORTH_SAYING = 0.15  # share of the scene that earns a second clause in its summary


@dataclass(frozen=True)
class CaptionSessions:
    prefix: InferenceSession
    embed: InferenceSession
    decoder: InferenceSession


class Captioner:
    """Features of a batch -> one sentence per tile."""

    def __init__(self, spec: CaptionTask, sessions: CaptionSessions, tokenizer: Path) -> None:
        from tokenizers import Tokenizer

        self._spec, self._sessions = spec, sessions
        self._tokenizer: Any = Tokenizer.from_file(str(tokenizer))

    def __call__(self, features: Features) -> list[str]:
        inputs = {name: features[name] for name in self._spec.encoder_outputs}
        (prefix_NTD,) = self._sessions.prefix.run(inputs, ["prefix"])
        return [self._text(tokens) for tokens in self._search(prefix_NTD)]

    def _text(self, tokens: NDArray[np.int64]) -> str:
        kept = [int(t) for t in tokens if t not in (self._spec.bos_id, self._spec.eos_id)]
        return str(self._tokenizer.decode(kept)).strip()

    def _search(self, prefix_NTD: NDArray[np.float32]) -> list[NDArray[np.int64]]:
        """Beam search: the tokens of the best finished beam of each image."""
        spec, count = self._spec, len(prefix_NTD)
        beams, rows = spec.beams, np.arange(count)[:, None]
        empty = np.zeros((spec.layers, count, spec.heads, 0, spec.head_dim), np.float32)
        start = self._embed(np.full((count, 1), spec.bos_id, np.int64))
        log_NV, keys, values = self._step(np.concatenate([prefix_NTD, start], axis=1), empty, empty)
        keys, values = np.repeat(keys, beams, axis=1), np.repeat(values, beams, axis=1)
        # All beams of an image start equal: only the first may propose, or they would stay equal.
        total_NB = np.full((count, beams), -np.inf, np.float32)
        total_NB[:, 0] = 0.0
        log_NBV = np.repeat(log_NV[:, None], beams, axis=1)
        tokens_NBT = np.zeros((count, beams, 0), np.int64)
        done_NB = np.zeros((count, beams), bool)
        length_NB = np.zeros((count, beams), np.int64)
        for step in range(spec.max_tokens):
            candidate = total_NB[..., None] + _only_eos_after_end(log_NBV, done_NB, spec.eos_id)
            flat = candidate.reshape(count, -1)
            best = np.argsort(-flat, axis=1, kind="stable")[:, :beams]
            parent, token = np.divmod(best, log_NBV.shape[2])
            total_NB = flat[rows, best]
            length_NB = length_NB[rows, parent] + ~done_NB[rows, parent]
            tokens_NBT = np.concatenate([tokens_NBT[rows, parent], token[..., None]], axis=2)
            done_NB = done_NB[rows, parent] | (token == spec.eos_id)
            if done_NB.all() or step == spec.max_tokens - 1:
                break
            origin = (np.arange(count)[:, None] * beams + parent).ravel()
            embeds = self._embed(token.reshape(-1, 1))
            log, keys, values = self._step(embeds, keys[:, origin], values[:, origin])
            log_NBV = log.reshape(count, beams, -1)
        ranked = np.argmax(total_NB / np.maximum(length_NB, 1) ** spec.length_penalty, axis=1)
        return [tokens_NBT[n, b] for n, b in enumerate(ranked)]

    def _embed(self, tokens_NT: NDArray[np.int64]) -> NDArray[np.float32]:
        embeds: NDArray[np.float32] = self._sessions.embed.run({"tokens": tokens_NT}, ["embeds"])[0]
        return embeds

    def _step(
        self, embeds_NTD: NDArray[np.float32], keys: NDArray[np.float32], values: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Log-probabilities [N, V] of the next token, and the grown caches [L, N, A, T, head_dim]."""
        inputs = {"embeds": embeds_NTD, "past_keys": keys, "past_values": values}
        logits, keys, values = self._sessions.decoder.run(inputs, ["logits", "keys", "values"])
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_NV: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        return log_NV, keys, values


def _only_eos_after_end(log_NBV: NDArray[np.float32], done_NB: NDArray[np.bool_], eos_id: int) -> NDArray[np.float32]:
    """A finished beam continues with the end token alone, at no cost."""
    frozen: NDArray[np.float32] = log_NBV.copy()
    frozen[done_NB] = -np.inf
    frozen[done_NB, eos_id] = 0.0
    return frozen


def summarise(captions: Sequence[str], weights: Sequence[float]) -> str:
    """One sentence for a scene from its tile captions, weighted by valid area.

    The caption that agrees best with all others (weighted word overlap) leads; a second one follows when captions
    unlike the first cover at least 15 % of the scene.
    """
    share: Counter[str] = Counter()
    for caption, weight in zip(captions, weights, strict=True):
        share[caption] += weight / sum(weights)  # type: ignore[assignment]
    if not share:
        return ""
    first = _most_agreed(share, share)
    rest = Counter({c: s for c, s in share.items() if _overlap(c, first) < DISTINCT})
    if sum(rest.values()) < WORTH_SAYING:
        return first
    second = _most_agreed(rest, rest)
    return f"{first.rstrip(' .')}; elsewhere, {second}"


def _most_agreed(candidates: Counter[str], voters: Counter[str]) -> str:
    def agreement(caption: str) -> float:
        return sum(weight * _overlap(caption, other) for other, weight in voters.items())

    return min(candidates, key=lambda caption: (-round(agreement(caption), 9), caption))


def _overlap(a: str, b: str) -> float:
    words_a, words_b = set(a.split()), set(b.split())
    return len(words_a & words_b) / max(len(words_a | words_b), 1)
